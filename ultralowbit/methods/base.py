"""What all methods share: the protocol, roundings (how a column becomes codes) and the GPTQ column loop."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple, Protocol

import torch
from pydantic import ConfigDict
from pydantic.dataclasses import dataclass
from torch import Tensor

from ultralowbit.format import Format, Ints, PackedWeight, Planes, TiedPlanes, group_count, to_scale
from ultralowbit.stats import Factor, InputStats, Need

MIN_SCALE = 2.0**-24
"""Smallest positive fp16: a scale that rounded to 0 could not be divided by."""


fields = dataclass(frozen=True, config=ConfigDict(extra="forbid"))
"""Makes a class a frozen dataclass whose fields are validated recipe keys."""


class Method(Protocol):
    """A quantization method: a frozen dataclass whose fields are the recipe's keys, with the paper's values."""

    @property
    def needs(self) -> Need:
        """What `quantize` reads of the statistics; a class attribute where no field decides it."""
        ...

    def format(self, in_features: int) -> Format:
        """How a weight with `in_features` columns will be stored; where that depends on data, a likely format."""
        ...

    def quantize(self, weight: Tensor, stats: InputStats | None) -> PackedWeight:
        """weight [out, in] fp32, not modified; stats of its inputs, None to round to nearest without them.

        Raises `ultralowbit.stats.SingularHessian` where the statistics cannot be used.
        """
        ...


class Rounding(Protocol):
    """How weights become codes: parameters for each group of columns, then the nearest code."""

    group: int | None

    def fit(self, g: int, weight: Tensor, importance: Tensor | None) -> None:
        """Choose the parameters of group g for weight [columns, out]; importance [columns] > 0 weighs the columns."""
        ...

    def round(self, g: int, weight: Tensor, first: int = 0) -> tuple[Tensor, Tensor]:
        """weight [columns, out], or [out] for one column, of group g -> (codes, whole numbers of any dtype, the values
        they stand for), both in its shape. `first` is the place of the first column in the original weight."""
        ...

    def pack(self, codes: Tensor) -> PackedWeight:
        """codes [out, in] uint8 and the parameters of all groups -> the packed weight."""
        ...


class IntRounding:
    """Uniform integer grid between the smallest and largest weight of a group, zero included (GPTQ's quantizer).

    clip: shrink the range, per row and group, in 80 steps of 1 % to the one with the least sum |w - q|^2.4.
    """

    def __init__(
        self, out: int, columns: int, bits: int, group: int | None, symmetric: bool, clip: bool, device
    ) -> None:
        groups = group_count(columns, group)
        self.segment = Ints(columns, bits, group, symmetric)
        self.group, self.symmetric, self.clip = group, symmetric, clip
        self.top = 2**bits - 1
        self.scale = torch.ones(groups, out, device=device)
        self.zero = torch.zeros(groups, out, device=device)

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
        for i in range(1, 80):
            self._set(g, low * (1 - i / 100), high * (1 - i / 100))
            error = (self.round(g, weight)[1] - weight).abs_().pow_(2.4).sum(0)
            better = error < best
            best = torch.where(better, error, best)
            scale, zero = torch.where(better, self.scale[g], scale), torch.where(better, self.zero[g], zero)
        self.scale[g], self.zero[g] = scale, zero

    def _set(self, g: int, low: Tensor, high: Tensor) -> None:
        scale = to_scale((high - low) / self.top).clamp_min_(MIN_SCALE)
        self.scale[g] = scale
        self.zero[g] = (self.top + 1) / 2 if self.symmetric else (-low / scale).round_().clamp_(0, self.top)

    def round(self, g: int, weight: Tensor, first: int = 0) -> tuple[Tensor, Tensor]:
        scale, zero = self.scale[g], self.zero[g]
        codes = (weight / scale).round_().add_(zero).clamp_(0, self.top)
        return codes, (codes - zero).mul_(scale)

    def pack(self, codes: Tensor) -> PackedWeight:
        zero = None if self.symmetric else self.zero.T
        return PackedWeight.encode(Format((self.segment,)), {"codes": codes, "scale": self.scale.T, "zero": zero})


_FIT = 1 << 21  # weights fitted at a time


class Levels(NamedTuple):
    """The values that the codes of a group stand for, rising in each row."""

    values: Tensor  # [levels, out]
    codes: Tensor  # [levels, out] uint8
    middles: Tensor  # [levels - 1, out], the decision thresholds

    def nearest(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """weight [..., out] -> (codes, values) of the nearest level."""
        rank = torch.zeros_like(weight, dtype=torch.uint8)
        for middle in self.middles:
            rank += weight >= middle
        index = rank.long().reshape(-1, weight.shape[-1])  # [columns, out]
        return self.codes.gather(0, index).view_as(rank), self.values.gather(0, index).view_as(weight)


class _Greedy(NamedTuple):
    """The levels +-a_1 or +-a_1 +-a_2, a_1 >= a_2 >= 0, whose nearest has the sign of w and of what +-a_1 leaves."""

    scale: Tensor  # [K, out]

    def nearest(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        value = torch.copysign(self.scale[0], weight)
        codes = (value >= 0).view(torch.uint8)
        if len(self.scale) == 1:
            return codes, value
        second = torch.copysign(self.scale[1], weight - value)
        return torch.add(codes, (second >= 0).view(torch.uint8), alpha=2), value.add_(second)


class _OddMultiples(NamedTuple):
    """The levels (2 c - top) s for the codes c = 0 to top."""

    scale: Tensor  # [out]
    top: int

    def nearest(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        codes = (weight / (2 * self.scale).clamp_min(MIN_SCALE)).floor_().add_((self.top + 1) // 2).clamp_(0, self.top)
        return codes, (2 * codes).sub_(self.top).mul_(self.scale)


class AlternatingRounding:
    """K binary planes with scales: the nearest of 2^K levels of a group.

    Fit: from the start of a subclass, alternate the weighted least-squares scales of the planes with the nearest
    levels, row by row and only where the weighted squared error falls.
    """

    def __init__(self, out: int, columns: int, bases: int, group: int | None, iterations: int, device) -> None:
        groups = group_count(columns, group)
        self.segment = Planes(columns, bases, group)
        self.group, self.bases, self.iterations = group, bases, iterations
        self.scale = torch.zeros(groups, bases, out, device=device)
        self._tables: dict[int, Levels | _Greedy | _OddMultiples] = {}

    def fit(self, g: int, weight: Tensor, importance: Tensor | None) -> None:
        h = torch.ones_like(weight[:, 0]) if importance is None else importance / importance.mean()  # [columns]
        rows = max(1, _FIT // len(weight))  # rows are independent: a few at a time bounds the memory
        for start in range(0, weight.shape[1], rows):
            part = weight[:, start : start + rows]
            self.scale[g, :, start : start + rows] = self._alternate(part, h)
        self._tables[g] = self._table(self.scale[g])

    def round(self, g: int, weight: Tensor, first: int = 0) -> tuple[Tensor, Tensor]:
        return self._tables[g].nearest(weight)

    def _start(self, weight: Tensor, h: Tensor) -> Tensor:
        """Scales [K, out] to alternate from."""
        raise NotImplementedError

    def _least_squares(self, codes: Tensor, weight: Tensor, h: Tensor) -> Tensor:
        """Scales [K, out] that minimise sum_j h_j (w_j - q_j)^2 for the codes."""
        raise NotImplementedError

    def _table(self, scale: Tensor) -> Levels | _Greedy | _OddMultiples:
        """The levels of scales [K, out]."""
        raise NotImplementedError

    def _alternate(self, weight: Tensor, h: Tensor) -> Tensor:
        scale = to_scale(self._start(weight, h))  # [K, out]
        if self.bases == 1:
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

    def _plane(self, codes: Tensor, p: int) -> Tensor:
        """What bit p of the codes, of plane p, stands for."""
        return ((codes >> p) & 1).float().mul_(2).sub_(1)

    def _free(self, codes: Tensor, weight: Tensor, h: Tensor) -> Tensor:
        """The least squares of scales that are free of one another."""
        planes = [self._plane(codes, p) for p in range(self.bases)]  # K of [columns, out]
        A = torch.stack([torch.stack([h @ (x * y) for y in planes], dim=-1) for x in planes], dim=-1)  # [out, K, K]
        b = torch.stack([h @ (x * weight) for x in planes], dim=-1)  # [out, K]
        # equal planes make A singular: the ridge then splits their scale, and the error decides
        A.diagonal(dim1=1, dim2=2).add_(1e-6 * h.sum())
        return torch.linalg.solve(A, b).T

    def _levels(self, scale: Tensor) -> Levels:
        """The sums of the planes of every code, in order."""
        codes = torch.arange(2**self.bases, device=scale.device)
        planes = torch.stack([self._plane(codes, p) for p in range(self.bases)], dim=1)  # [2^K, K]
        values, order = (planes @ scale).sort(dim=0)
        return Levels(values, order.to(torch.uint8), (values[1:] + values[:-1]) / 2)

    def pack(self, codes: Tensor) -> PackedWeight:
        bits = torch.stack([(codes >> p) & 1 for p in range(self.bases)])
        return PackedWeight.encode(Format((self.segment,)), {"bits": bits, "scale": self.scale.permute(1, 2, 0)})


class SignRounding(AlternatingRounding):
    """K sign planes with free scales: the nearest of the levels sum_p +-a_p, from greedy residual binarisation.

    For K = 1 that is a = sum h|w| / sum h at once.
    """

    def _start(self, weight: Tensor, h: Tensor) -> Tensor:
        rest, scales = weight.clone(), []
        for _ in range(self.bases):
            a = (h @ rest.abs()) / h.sum()  # [out]
            scales.append(a)
            rest -= torch.copysign(a, rest)
        return torch.stack(scales)

    def _least_squares(self, codes: Tensor, weight: Tensor, h: Tensor) -> Tensor:
        return self._ordered(self._free(codes, weight, h))

    def _ordered(self, scale: Tensor) -> Tensor:
        """The same levels with positive, falling scales: a negative one only flips its plane."""
        return scale.abs().sort(dim=0, descending=True).values

    def _table(self, scale: Tensor) -> Levels | _Greedy:
        return _Greedy(scale) if self.bases <= 2 else self._levels(scale)

    def _alternate(self, weight: Tensor, h: Tensor) -> Tensor:
        return self._alternate_two(weight, h) if self.bases == 2 else super()._alternate(weight, h)

    def _alternate_two(self, weight: Tensor, h: Tensor) -> Tensor:
        """The alternation in terms of u = |w| and r, the product of the two signs: 1 where u >= a_1, else -1."""
        u, total = weight.abs(), h.sum()
        energy, first = h @ u.square(), h @ u  # [out]
        scale = tried = to_scale(self._ordered(self._start(weight, h)))  # [2, out]
        best = torch.full_like(first, torch.inf)
        for _ in range(self.iterations + 1):
            outer = (u >= tried[0]).float()  # [columns, out]
            both = 2 * (h @ outer) - total  # sum h r
            second = 2 * (h @ outer.mul_(u)) - first  # sum h r u
            a, b = tried
            error = energy - 2 * (a * first + b * second) + (a * a + b * b) * total + 2 * a * b * both
            better = error < best - 1e-6 * energy  # what fp32 sums can tell
            if not better.any():
                break
            scale, best = torch.where(better, tried, scale), torch.where(better, error, best)
            # signs that are always equal, or always opposite, make the system singular: the ridge splits the scale
            diagonal = total * (1 + 1e-6)
            determinant = diagonal * diagonal - both * both
            found = torch.stack([diagonal * first - both * second, diagonal * second - both * first]) / determinant
            tried = to_scale(self._ordered(found))
        return scale


class TiedSignRounding(AlternatingRounding):
    """K sign planes whose scales halve from one to the next: the nearest odd multiple of one scale of a group. A code
    counts the levels from below, so that its highest bit is the plane of the largest scale."""

    def __init__(self, out: int, columns: int, bases: int, group: int | None, iterations: int, device) -> None:
        super().__init__(out, columns, bases, group, iterations, device)
        self.segment = TiedPlanes(columns, bases, group)
        self.scale = self.scale[:, :1]

    def _start(self, weight: Tensor, h: Tensor) -> Tensor:
        middle = 2 ** (self.bases - 1)  # levels as large as |w| on average
        return ((h @ weight.abs()) / (h.sum() * middle))[None]

    def _least_squares(self, codes: Tensor, weight: Tensor, h: Tensor) -> Tensor:
        odd = codes.float().mul_(2).sub_(2**self.bases - 1)  # [columns, out]
        return ((h @ (odd * weight)).abs() / (h @ odd.square()))[None]

    def _table(self, scale: Tensor) -> _OddMultiples:
        return _OddMultiples(scale[0], 2**self.bases - 1)

    def pack(self, codes: Tensor) -> PackedWeight:
        return PackedWeight.encode(Format((self.segment,)), {"codes": codes, "scale": self.scale[:, 0].T})


class PartlyBinary:
    """Salient weights as integers of `bits` bits between the ends of their whole row; the others of a group at their
    mean -+ their mean distance from it. salient: [out, in], or [1, in] where all rows have the same.

    A subclass says how the codes are packed; a code of a weight that is not salient is its sign, 0 or 1.
    """

    def __init__(self, weight: Tensor, salient: Tensor, bits: int, group: int | None) -> None:
        (out, columns), device = weight.shape, weight.device
        self.group = group
        self.low = (~salient.T).float(memory_format=torch.contiguous_format)  # [in, out or 1], 1 or 0
        self.high = IntRounding(out, columns, bits, None, False, False, device)
        self.high.fit(0, weight.T, None)
        groups = group_count(columns, group)
        self.mean = torch.zeros(groups, out, device=device)
        self.scale = torch.zeros(groups, out, device=device)

    def fit(self, g: int, weight: Tensor, importance: Tensor | None) -> None:
        start = g * (self.group or 0)
        low = self.low[start : start + len(weight)]  # [columns, out or 1]
        count = low.sum(0).clamp_min(1)
        self.mean[g] = mean = to_scale((weight * low).sum(0) / count)
        self.scale[g] = to_scale(((weight - mean).abs_() * low).sum(0) / count)

    def round(self, g: int, weight: Tensor, first: int = 0) -> tuple[Tensor, Tensor]:
        mean = self.mean[g]
        low = self.low[first] if weight.dim() == 1 else self.low[first : first + len(weight)]
        centred = weight - mean
        codes, values = self.high.round(0, weight)
        # lerp at 0 and 1 chooses, exactly, and in a fraction of the time of `where`
        value = torch.lerp(values, torch.copysign(self.scale[g], centred).add_(mean), low)
        return torch.lerp(codes, (centred >= 0).float(), low), value


def round_to_nearest(weight: Tensor, rounding: Rounding) -> PackedWeight:
    """Each group of weight [out, in] on its own, no compensation between columns."""
    columns = weight.T.contiguous()  # [in, out]
    codes = torch.empty_like(columns, dtype=torch.uint8)
    group = rounding.group or len(columns)
    for g, start in enumerate(range(0, len(columns), group)):
        part = columns[start : start + group]
        rounding.fit(g, part, None)
        codes[start : start + group] = rounding.round(g, part, start)[0]
    return rounding.pack(codes.T.contiguous())


_LEAF = 16


def compensate(weight: Tensor, rounding: Rounding, factor: Factor) -> PackedWeight:
    """GPTQ (Frantar et al. 2023, arXiv 2210.17323, algorithm 1) with any rounding.

    Columns are rounded one by one, and each error is made up for by the columns after it: W[:, j:] -= e_j U[j, j:] with
    e_j = (w_j - q_j) / U_jj. Groups are fitted when their first column is reached, to the weights as compensated by
    then; in another order of columns (act-order) they are fitted to the original weights beforehand, so that they stay
    contiguous in storage. The updates are applied by halves, so that nearly all of them are large matrix products; the
    paper's block size has no counterpart, the result does not depend on it.
    """
    U, order = factor.U, factor.order
    # [in, out]; done rows hold their error. A copy always: one row, one column or a transposed view is contiguous as is
    columns = weight.T.clone(memory_format=torch.contiguous_format) if order is None else weight.T[order]
    total = len(columns)
    codes = torch.empty_like(columns, dtype=torch.uint8)
    group = rounding.group or total
    importance = U.diagonal().reciprocal().square_()  # [in], in rounding order
    pivots = U.diagonal().tolist()
    if order is not None:
        original = torch.empty_like(importance).scatter_(0, order, importance)
        for g, start in enumerate(range(0, total, group)):
            rounding.fit(g, weight[:, start : start + group].T, original[start : start + group])
    places = list(range(total)) if order is None else order.tolist()  # in the original weight

    for low, middle, high in _steps(0, total, group):
        if middle < high:
            columns[middle:high].addmm_(U[low:middle, middle:high].T, columns[low:middle], alpha=-1)
            continue
        for j in range(low, high):
            if order is None and j % group == 0:
                rounding.fit(j // group, columns[j : j + group], importance[j : j + group])
            column = columns[j]
            codes[j], value = rounding.round(places[j] // group, column, places[j])
            column.sub_(value).div_(pivots[j])
            columns[j + 1 : high].addr_(U[j, j + 1 : high], column, alpha=-1)
    if order is not None:
        codes = torch.empty_like(codes).index_copy_(0, order, codes)
    return rounding.pack(codes.T.contiguous())


def _steps(low: int, high: int, group: int) -> Iterator[tuple[int, int, int]]:
    """What to do with the columns low:high, in order: (low, high, high) rounds them one by one, (low, middle, high)
    lets middle:high make up for low:middle."""
    # no closure in `compensate`: one that calls itself would keep columns and U until the next garbage collection
    if high - low <= _LEAF:
        yield low, high, high
        return
    # a cut inside a group would fit it before all earlier columns have reached it
    unit = group if high - low > group else _LEAF
    middle = low + max(1, (high - low) // (2 * unit)) * unit
    yield from _steps(low, middle, group)
    yield low, middle, high
    yield from _steps(middle, high, group)
