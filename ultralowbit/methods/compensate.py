"""The GPTQ column loop, with any rounding."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ultralowbit.format.weight import PackedWeight
from ultralowbit.methods.base import Rounding
from ultralowbit.methods.statistics import Factor


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
    """The weight [out, in] with codes that make up for each other's errors, packed."""
    return rounding.pack(compensated_codes(weight, rounding, factor))


def compensated_codes(weight: Tensor, rounding: Rounding, factor: Factor) -> Tensor:
    """Codes [out, in] uint8 by GPTQ (Frantar et al. 2023, arXiv 2210.17323, algorithm 1) with any rounding.

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
    return codes.T.contiguous()


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
