"""Rounding a block of columns: the inner loop of every method that compensates.

    round_block(w, e, R, tables, which, sweeps) -> q, e'

rounds w [columns, out] to levels q such that |e'|^2, e' = e + R^T (w - q), is small. e [columns, out] is what the
columns before leave in these, R [columns, columns] is upper triangular. Each row of the weight, a column here, is on
its own:

1. column by column, q_j is the level nearest to w_j + e_j / R_jj, and e_k += R_jk (w_j - q_j) for k >= j;
2. `sweeps` over all columns, backwards and forwards in turn: q_j becomes the level nearest to q_j + g_j / G_jj, which
   lowers the error most, with G = R R^T and g = R e' as it is by then.

`round_block_ref` is what it means, with any nearest level; the compiled kernels of a CPU and Triton's do the same.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ultralowbit.kernels import cpu
from ultralowbit.kernels.packed_matmul import triton_products

Nearest = Callable[[int, Tensor], Tensor]
"""(j, wanted values [out] of column j) -> the nearest levels [out]."""


def round_block_ref(
    weight: Tensor, rest: Tensor, R: Tensor, nearest: Nearest, sweeps: int = 0
) -> tuple[Tensor, Tensor]:
    """Values q and e' [columns, out] fp32, by plain loops."""
    values, rest = torch.empty_like(weight), rest.clone()
    for j, pivot in enumerate(R.diagonal().tolist()):
        values[j] = nearest(j, weight[j] + rest[j] / pivot)
        rest[j:].addr_(R[j, j:], weight[j] - values[j])
    if not sweeps:
        return values, rest
    before, gram, gradient = values.clone(), R @ R.T, R @ rest
    curvature = gram.diagonal().tolist()
    for sweep in range(sweeps):
        forwards = range(len(values))
        for j in forwards if sweep % 2 else reversed(forwards):
            value = nearest(j, values[j] + gradient[j] / curvature[j])
            gradient.addr_(gram[j], values[j] - value)
            values[j] = value
    return values, rest.addmm_(R.T, before - values)


def nearest_of(tables: Tensor, which: Tensor) -> Nearest:
    """Of levels that rise, tables [groups, levels, out]; which [columns] int64 is the group of each column."""
    groups, middles = which.tolist(), (tables[:, 1:] + tables[:, :-1]) / 2

    def nearest(j: int, wanted: Tensor) -> Tensor:
        rank = (wanted >= middles[groups[j]]).sum(0, keepdim=True)
        return tables[groups[j]].gather(0, rank)[0]

    return nearest


def round_block(
    weight: Tensor, rest: Tensor, R: Tensor, tables: Tensor, which: Tensor, sweeps: int = 0
) -> tuple[Tensor, Tensor]:
    """Values q and e' [columns, out] fp32 for w and e [columns, out] and R [columns, columns].

    tables [groups, levels, out]: the levels of each group and row, rising; which [columns] int64: the group of each
    column.
    """
    if weight.device.type == "cpu" and cpu.runs_here():
        return cpu.round_block(weight, rest, R, tables, which, sweeps)
    if weight.device.type == "cuda" and triton_products():
        from ultralowbit.kernels.gpu import columns as gpu

        return gpu.round_block(weight, rest, R, tables, which, sweeps)
    return round_block_ref(weight, rest, R, nearest_of(tables, which), sweeps)
