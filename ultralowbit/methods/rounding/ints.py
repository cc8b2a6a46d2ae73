"""Rounding to uniform integer grids."""

from __future__ import annotations

from copy import copy
from typing import NamedTuple

import torch
from torch import Tensor

from ultralowbit.format.ints import Ints
from ultralowbit.format.weight import Format, PackedWeight
from ultralowbit.format.words import group_count, to_scale
from ultralowbit.methods.base import MIN_SCALE

MOST_LEVELS = 16
"""Levels of a table; a grid of more is computed."""


class Grid(NamedTuple):
    """The levels (c - zero) s for the codes c = 0 to top."""

    scale: Tensor  # [out]
    zero: Tensor  # [out], whole numbers
    top: int

    def nearest(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """weight [..., out] -> (codes, values) of the nearest level."""
        codes = (weight / self.scale).round_().add_(self.zero).clamp_(0, self.top)
        return codes, (codes - self.zero).mul_(self.scale)


class IntRounding:
    """Uniform integer grid between the smallest and largest weight of a group, zero included (GPTQ's quantizer).

    clip: shrink the range, per row and group, in 80 steps of 1 % to the one with the least sum |w - q|^2.4. A symmetric
    grid has one code more below zero than above: the scale is negative where the same grid turned over fits better.
    """

    def __init__(
        self, out: int, columns: int, bits: int, group: int | None, symmetric: bool, clip: bool, device
    ) -> None:
        groups = group_count(columns, group)
        self.segment = Ints(columns, bits, group, symmetric)
        self.group, self.symmetric, self.clip = group, symmetric, clip
        self.top = 2**bits - 1
        self.scale = torch.ones(groups, out, dtype=torch.float32, device=device)
        self.zero = torch.zeros(groups, out, dtype=torch.float32, device=device)

    def fit(self, g: int, weight: Tensor, importance: Tensor | None) -> None:
        low, high = weight.amin(0).clamp_max(0), weight.amax(0).clamp_min(0)  # [out]
        if self.symmetric:
            high = torch.maximum(high, -low)
            low = -high
        self._set(g, low, high)
        if not self.clip:
            return
        best = (self.round(g, weight)[1] - weight).abs_().pow_(2.4).sum(0)
        scale, zero = self.scale[g].clone(), self.zero[g].clone()
        kept = [1 - i / 100 for i in range(1, 80)]
        for share in [*kept, -1, *(-share for share in kept)] if self.symmetric else kept:
            self._set(g, low * share, high * share)
            error = (self.round(g, weight)[1] - weight).abs_().pow_(2.4).sum(0)
            better = error < best
            best = torch.where(better, error, best)
            scale, zero = torch.where(better, self.scale[g], scale), torch.where(better, self.zero[g], zero)
        self.scale[g], self.zero[g] = scale, zero

    def _set(self, g: int, low: Tensor, high: Tensor) -> None:
        scale = self.ordered(to_scale((high - low) / self.top))
        self.scale[g] = scale
        self.zero[g] = (self.top + 1) / 2 if self.symmetric else (-low / scale).round_().clamp_(0, self.top)

    def round(self, g: int, weight: Tensor, first: int = 0) -> tuple[Tensor, Tensor]:
        return Grid(self.scale[g], self.zero[g], self.top).nearest(weight)

    def multiples(self, g: int, codes: Tensor, rows: slice) -> list[Tensor]:
        return [codes - self.zero[g, rows]]

    def table(self, g: int) -> Tensor | None:
        if self.top >= MOST_LEVELS:
            return None
        codes = torch.arange(self.top + 1, dtype=torch.float32, device=self.scale.device)
        levels = (codes[:, None] - self.zero[g]) * self.scale[g]
        return torch.where(self.scale[g] < 0, levels.flip(0), levels)

    def rescale(self, scale: Tensor) -> None:
        """Take other scales [groups, 1, out] in the place of all."""
        self.scale = scale[:, 0]

    def of_rows(self, rows: Tensor) -> IntRounding:
        """What this is for some rows of the weight."""
        part = copy(self)
        part.scale, part.zero = self.scale[:, rows], self.zero[:, rows]
        return part

    def ordered(self, scale: Tensor) -> Tensor:
        """Scales of any shape that weights can be divided by."""
        return torch.where(scale.abs() < MIN_SCALE, MIN_SCALE, scale)

    def pack(self, codes: Tensor) -> PackedWeight:
        zero = None if self.symmetric else self.zero.T
        return PackedWeight.encode(Format((self.segment,)), {"codes": codes, "scale": self.scale.T, "zero": zero})
