"""GPTQ, block of columns by block, with any rounding; and a search within the blocks.

With H + damp I = R R^T, R upper triangular, and D = W - Q, the error tr(D H D^T) is the sum of squares of e = D R. Its
entries of a block B of columns depend on no later column:

    e_B = D_before R[before, B] + D_B R_BB.

Algorithm 1 of Frantar et al. 2023, arXiv 2210.17323, rounds column by column, and each error is made up for by the
later ones: q_j is what comes nearest to w_j + e_j / R_jj, e_j being that of the columns before. (These are the same
numbers as with U = R^-1, without the inverse.) `sweeps` over a block then change single columns as long as |e_B|^2
falls, while every later block can still make up for what is left (ours). On rotated weights they win as much as two
passes over all columns afterwards, on others three quarters of it, and they need no product with H.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ultralowbit.format.weight import PackedWeight
from ultralowbit.kernels.columns import round_block, round_block_ref
from ultralowbit.methods.base import Rounding
from ultralowbit.methods.statistics import BLOCK, Factor, invert_upper


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


def compensate(weight: Tensor, rounding: Rounding, factor: Factor) -> PackedWeight:
    """The weight [out, in] with codes that make up for each other's errors, packed."""
    return rounding.pack(stored(compensated(weight, rounding, factor), factor))


def stored(codes: Tensor, factor: Factor) -> Tensor:
    """Codes [in, out] in the order of rounding -> [out, in] as they are stored."""
    if factor.order is not None:
        codes = torch.empty_like(codes).index_copy_(0, factor.order, codes)
    return codes.T.contiguous()


def compensated(
    weight: Tensor, rounding: Rounding, factor: Factor, sweeps: int = 0, rest: Tensor | None = None, fit: bool = True
) -> Tensor:
    """Codes [in, out] uint8 of a weight [out, in], columns in the order of rounding; rest [in, out] takes e.

    Groups are fitted when their first column is reached, to the weights as compensated by then; in another order of
    columns (act-order) they are fitted to the original weights beforehand, so that they stay contiguous in storage.
    Without `fit` they stay as they are.
    """
    R, order = factor.R, factor.order
    total = len(R)
    # [in, out]; where blocks are done, D. A copy always: a transposed view may be contiguous as it is
    D = weight.T.clone(memory_format=torch.contiguous_format)
    D = D if order is None else D[order]
    codes = torch.empty_like(D, dtype=torch.uint8)
    group = min(rounding.group or total, total)
    places = torch.arange(total, device=D.device) if order is None else order  # in the original weight
    importance = R.diagonal().square()  # [in]
    if order is not None and fit:
        fit_groups(weight, rounding, factor)
    width = group if order is None and group < total else BLOCK  # a group is fitted once all blocks before it are done
    for low in range(0, total, width):
        block = slice(low, min(low + width, total))
        own, left = R[block, block], R[:low, block].T @ D[:low]
        if fit and order is None and low % group == 0:
            # the values of these columns that leave e_B = 0
            target = D if low == 0 else D[block] + invert_upper(own.double()).float().T @ left
            rounding.fit(low // group, target[:group], importance[low : low + group])
        codes[block], values, left = rounded(rounding, D[block], left, own, places[block], group, sweeps)
        D[block] -= values
        if rest is not None:
            rest[block] = left
    return codes


def fit_groups(weight: Tensor, rounding: Rounding, factor: Factor) -> None:
    """Fit every group to the weight [out, in] as it is."""
    importance = factor.R.diagonal().square()  # [in], in the order of rounding
    if factor.order is not None:
        importance = torch.empty_like(importance).index_copy_(0, factor.order, importance)
    group = rounding.group or len(importance)
    for g, start in enumerate(range(0, len(importance), group)):
        rounding.fit(g, weight[:, start : start + group].T, importance[start : start + group])


def rounded(
    rounding: Rounding, weight: Tensor, rest: Tensor, R: Tensor, places: Tensor, group: int, sweeps: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Codes, values and e' [columns, out] of a block, see `kernels.columns`; places [columns] of its columns in the
    original weight, group: columns of a group there."""
    groups = places // group
    used, which = groups.unique(return_inverse=True)
    tables = [rounding.table(g) for g in used.tolist()]
    codes = torch.empty_like(weight, dtype=torch.uint8)
    if tables[0] is None:
        at = places.tolist()

        def nearest(j: int, column: Tensor) -> Tensor:
            codes[j], values = rounding.round(at[j] // group, column, at[j])
            return values

        return codes, *round_block_ref(weight, rest, R, nearest, sweeps)
    values, rest = round_block(weight, rest, R, torch.stack(tables), which, sweeps)
    for k, g in enumerate(used.tolist()):
        here = slice(None) if len(tables) == 1 else which == k
        codes[here] = rounding.round(g, values[here])[0].to(torch.uint8)
    return codes, values, rest
