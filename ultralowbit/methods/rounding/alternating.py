"""Rounding to sums of binary planes, whose scales alternate with the nearest levels."""

from __future__ import annotations

from copy import copy
from typing import NamedTuple

import torch
from torch import Tensor

from ultralowbit.format.planes import Planes
from ultralowbit.format.weight import Format, PackedWeight
from ultralowbit.format.words import group_count, to_scale
from ultralowbit.methods.base import MIN_SCALE

_FIT = 1 << 19  # weights fitted at a time: more do not fit a cache


class Levels(NamedTuple):
    """The values that the codes of a group stand for, rising in each row."""

    levels: Tensor  # [levels, out]
    codes: Tensor  # [levels, out] uint8
    middles: Tensor  # [levels - 1, out], the decision thresholds

    @classmethod
    def of(cls, scale: Tensor, low: int) -> Levels:
        """The sums of planes of `low` and 1 with scales [K, out]; bit p of a code says which of the two plane p has."""
        bits = (
            torch.arange(2 ** len(scale), device=scale.device)[:, None] >> torch.arange(len(scale), device=scale.device)
            & 1
        )  # [2^K, K]
        values, order = (torch.where(bits > 0, 1, low).to(scale.dtype) @ scale).sort(dim=0)
        return cls(values, order.to(torch.uint8), (values[1:] + values[:-1]) / 2)

    def nearest(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """weight [..., out] -> (codes, values) of the nearest level."""
        rank = torch.zeros_like(weight, dtype=torch.uint8)
        for middle in self.middles:
            rank += weight >= middle
        index = rank.long().reshape(-1, weight.shape[-1])  # [columns, out]
        return self.codes.gather(0, index).view_as(rank), self.levels.gather(0, index).view_as(weight)


class Greedy(NamedTuple):
    """The levels +-a_1 or +-a_1 +-a_2, a_1 >= a_2 >= 0, whose nearest has the sign of w and of what +-a_1 leaves."""

    scale: Tensor  # [K, out]

    def nearest(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        value = torch.copysign(self.scale[0], weight)
        codes = (value >= 0).view(torch.uint8)
        if len(self.scale) == 1:
            return codes, value
        second = torch.copysign(self.scale[1], weight - value)
        return torch.add(codes, (second >= 0).view(torch.uint8), alpha=2), value.add_(second)

    @property
    def levels(self) -> Tensor:
        a = self.scale
        return torch.stack([-a[0], a[0]] if len(a) == 1 else [-a[0] - a[1], a[1] - a[0], a[0] - a[1], a[0] + a[1]])


class OddMultiples(NamedTuple):
    """The levels (2 c - top) s for the codes c = 0 to top."""

    scale: Tensor  # [out]
    top: int

    def nearest(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        codes = (weight / (2 * self.scale).clamp_min(MIN_SCALE)).floor_().add_((self.top + 1) // 2).clamp_(0, self.top)
        return codes, (2 * codes).sub_(self.top).mul_(self.scale)

    @property
    def levels(self) -> Tensor:
        codes = torch.arange(self.top + 1, dtype=torch.float32, device=self.scale.device)
        return (2 * codes - self.top)[:, None] * self.scale


class AlternatingRounding:
    """K binary planes with scales: the nearest of 2^K levels of a group.

    Fit: from the start of a subclass, alternate the weighted least-squares scales of the planes with the nearest
    levels, row by row and only where the weighted squared error falls.
    """

    def __init__(self, out: int, columns: int, planes: int, group: int | None, iterations: int, device) -> None:
        groups = group_count(columns, group)
        self.segment = Planes(columns, planes, group)
        self.group, self.planes, self.iterations = group, planes, iterations
        self.scale = torch.zeros(groups, planes, out, dtype=torch.float32, device=device)
        self._tables: dict[int, Levels | Greedy | OddMultiples] = {}

    def fit(self, g: int, weight: Tensor, importance: Tensor | None) -> None:
        h = torch.ones_like(weight[:, 0]) if importance is None else importance / importance.mean()  # [columns]
        rows = max(1, _FIT // len(weight))  # rows are independent: a few at a time bounds the memory
        for start in range(0, weight.shape[1], rows):
            part = weight[:, start : start + rows]
            self.scale[g, :, start : start + rows] = self._alternate(part, h)
        self._tables[g] = self._table(self.scale[g])

    def round(self, g: int, weight: Tensor, first: int = 0) -> tuple[Tensor, Tensor]:
        return self._tables[g].nearest(weight)

    def table(self, g: int) -> Tensor:
        return self._tables[g].levels

    def rescale(self, scale: Tensor) -> None:
        """Take other scales [groups, K, out] in the place of all."""
        self.scale = scale
        self._tables = {g: self._table(of_group) for g, of_group in enumerate(scale)}

    def of_rows(self, rows: Tensor) -> AlternatingRounding:
        """What this is for some rows of the weight."""
        part = copy(self)
        part.rescale(self.scale[..., rows])
        return part

    def _start(self, weight: Tensor, h: Tensor) -> Tensor:
        """Scales [K, out] to alternate from."""
        raise NotImplementedError

    def _least_squares(self, codes: Tensor, weight: Tensor, h: Tensor) -> Tensor:
        """Scales [K, out] that minimise sum_j h_j (w_j - q_j)^2 for the codes."""
        raise NotImplementedError

    def _table(self, scale: Tensor) -> Levels | Greedy | OddMultiples:
        """The levels of scales [K, out]."""
        raise NotImplementedError

    def _alternate(self, weight: Tensor, h: Tensor) -> Tensor:
        scale = to_scale(self._start(weight, h))  # [K, out]
        if self.planes == 1:
            return scale
        codes, error = self._assess(scale, weight, h)
        rows = torch.arange(weight.shape[1], device=weight.device)  # that got better: the others would only do so again
        for _ in range(self.iterations):
            tried = to_scale(self._least_squares(codes, weight, h))
            codes, tried_error = self._assess(tried, weight, h)
            better = tried_error < error
            rows, codes, error, weight = rows[better], codes[:, better], tried_error[better], weight[:, better]
            if not len(rows):
                break
            scale[:, rows] = tried[:, better]
        return scale

    def _assess(self, scale: Tensor, weight: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        """Nearest codes [columns, out] for scales [K, out], and the weighted squared error [out] they leave."""
        codes, values = self._table(scale).nearest(weight)
        return codes, h @ (values - weight).square_()

    def plane(self, codes: Tensor, p: int) -> Tensor:
        """What bit p of the codes, of plane p, stands for."""
        return ((codes >> p) & 1).float().mul_(2).sub_(1)

    def _free(self, codes: Tensor, weight: Tensor, h: Tensor) -> Tensor:
        """The least squares of scales that are free of one another."""
        planes = [self.plane(codes, p) for p in range(self.planes)]  # K of [columns, out]
        A = torch.stack([torch.stack([h @ (x * y) for y in planes], dim=-1) for x in planes], dim=-1)  # [out, K, K]
        b = torch.stack([h @ (x * weight) for x in planes], dim=-1)  # [out, K]
        # equal planes make A singular: the ridge then splits their scale, and the error decides
        A.diagonal(dim1=1, dim2=2).add_(1e-6 * h.sum())
        return torch.linalg.solve(A, b).T

    def pack(self, codes: Tensor) -> PackedWeight:
        bits = torch.stack([(codes >> p) & 1 for p in range(self.planes)])
        return PackedWeight.encode(Format((self.segment,)), {"bits": bits, "scale": self.scale.permute(1, 2, 0)})
