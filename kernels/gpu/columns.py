"""Rounding a block of columns on a GPU (`kernels.columns`): two launches and three products.

A program has a few rows of the weight and all columns of the block. What their loop changes, [columns, rows] fp32,
stays in its registers; column j is taken out of them by a sum over a mask, which costs what an update does.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ultralowbit.kernels.gpu.launch import Launch, cdiv, run, tl, triton

ROWS = 8
"""Of the weight in one program: with 256 columns the two tiles take 32 registers of its 128 threads."""


@triton.jit
def _nearest(wanted, tables, group, rows, there, out, levels: tl.constexpr):
    at = tables + group * levels * out + rows
    below = tl.load(at, mask=there, other=0.0)
    value = below
    for i in tl.static_range(1, levels):
        level = tl.load(at + i * out, mask=there, other=0.0)
        value = tl.where(wanted >= (below + level) / 2, level, value)
        below = level
    return value


@triton.jit
def _tile(columns, out, B: tl.constexpr, T: tl.constexpr):
    """This program's columns [B] and rows [T], which rows there are, and where its tile [B, T] lies, and what of it."""
    k, rows = tl.arange(0, B), tl.program_id(0) * T + tl.arange(0, T)
    there = rows < out
    return k, rows, there, k[:, None] * out + rows[None, :], (k < columns)[:, None] & there[None, :]


@triton.jit
def compensate(
    weight, R, tables, which, rest, values, columns, out, levels: tl.constexpr, B: tl.constexpr, T: tl.constexpr
):
    """One column after the other: writes values, and rest anew. Grid (tiles of T rows,); B columns, a power of two."""
    k, rows, there, at, inside = _tile(columns, out, B, T)
    sums = tl.load(rest + at, mask=inside, other=0.0)
    for j in range(columns):
        row = tl.load(R + j * columns + k, mask=k < columns, other=0.0)
        w = tl.load(weight + j * out + rows, mask=there, other=0.0)
        own = tl.sum(tl.where(k[:, None] == j, sums, 0.0), axis=0)
        wanted = w + tl.div_rn(own, tl.load(R + j * columns + j) + tl.zeros_like(own))
        value = _nearest(wanted, tables, tl.load(which + j), rows, there, out, levels)
        tl.store(values + j * out + rows, value, mask=there)
        sums += row[:, None] * (w - value)[None, :]
    tl.store(rest + at, sums, mask=inside)


@triton.jit
def sweep(
    gram, tables, which, values, gradient, columns, out, sweeps, levels: tl.constexpr, B: tl.constexpr, T: tl.constexpr
):
    """At most `sweeps` passes over the columns, until nothing changes: writes values anew. Grid as before."""
    k, rows, there, at, inside = _tile(columns, out, B, T)
    v = tl.load(values + at, mask=inside, other=0.0)
    g = tl.load(gradient + at, mask=inside, other=0.0)
    done, limit = 0, sweeps
    while done < limit:
        moved = tl.zeros([T], tl.int32)
        for i in range(columns):
            j = tl.where(done % 2 == 1, i, columns - 1 - i)
            row = tl.load(gram + j * columns + k, mask=k < columns, other=0.0)
            held = tl.sum(tl.where(k[:, None] == j, v, 0.0), axis=0)
            own = tl.sum(tl.where(k[:, None] == j, g, 0.0), axis=0)
            wanted = held + tl.div_rn(own, tl.load(gram + j * columns + j) + tl.zeros_like(own))
            value = _nearest(wanted, tables, tl.load(which + j), rows, there, out, levels)
            g += row[:, None] * (held - value)[None, :]
            v = tl.where(k[:, None] == j, value[None, :], v)
            moved |= (held != value).to(tl.int32)
        done += 1
        limit = tl.where(tl.max(moved, axis=0) > 0, sweeps, 0)
    tl.store(values + at, v, mask=inside)


def _launch(kernel, tables: Tensor, shape: torch.Size, *args: Tensor | int) -> Launch:
    columns, out = shape
    constants = {"levels": tables.shape[1], "B": max(16, triton.next_power_of_2(columns)), "T": ROWS}
    return Launch(kernel, (cdiv(out, ROWS),), args, constants)


def compensation(weight: Tensor, R: Tensor, tables: Tensor, which: Tensor, rest: Tensor, values: Tensor) -> Launch:
    """Of `compensate`; all contiguous, which int32."""
    return _launch(compensate, tables, weight.shape, weight, R, tables, which, rest, values, *weight.shape)


def search(gram: Tensor, tables: Tensor, which: Tensor, values: Tensor, gradient: Tensor, sweeps: int) -> Launch:
    """Of `sweep`; all contiguous, which int32."""
    return _launch(sweep, tables, values.shape, gram, tables, which, values, gradient, *values.shape, sweeps)


def round_block(
    weight: Tensor, rest: Tensor, R: Tensor, tables: Tensor, which: Tensor, sweeps: int
) -> tuple[Tensor, Tensor]:
    """`kernels.columns.round_block` in Triton."""
    weight, R, tables = weight.contiguous(), R.contiguous(), tables.contiguous()
    rest, values, which = rest.clone(memory_format=torch.contiguous_format), torch.empty_like(weight), which.int()
    run([compensation(weight, R, tables, which, rest, values)], weight.device)
    if sweeps:
        before, gram, gradient = values.clone(), R @ R.T, R @ rest
        run([search(gram, tables, which, values, gradient, sweeps)], weight.device)
        rest.addmm_(R.T, before - values)
    return values, rest
