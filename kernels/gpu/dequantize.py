"""The weight that stored tensors mean, written out: for many tokens, and for what is no sum of fields.

One kernel for each kind of segment and outliers. All do what `decode` does, in the same order and in fp32, and round
once: products of a code or sign with scales are exact in fp32, so the result is the reference's to the bit.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from ultralowbit.format.ints import Ints
from ultralowbit.format.outliers import IndexedOutliers, MaskedOutliers
from ultralowbit.format.planes import Planes, TiedPlanes
from ultralowbit.format.salient import SalientSplit
from ultralowbit.format.segment import Segment
from ultralowbit.format.weight import Format
from ultralowbit.format.words import LANES, WORD_BITS, unpack_fields, word_count
from ultralowbit.kernels.gpu.launch import Launch, cdiv, tl, triton

COLUMNS = 128
"""Of the weight that one program writes."""
ROWS = {Planes: 32, TiedPlanes: 32, Ints: 32, IndexedOutliers: 32, SalientSplit: 16, MaskedOutliers: 16}
"""Of the weight that one program writes; more of them need more registers than there are."""


@triton.jit
def field(words, line, column, there, full, lanes, width: tl.constexpr):
    """The codes of columns [1, columns] in rows whose words begin at `line` [rows, 1] -> int32 [rows, columns]."""
    fields: tl.constexpr = 16 // width
    rest = column - full * fields * 32
    whole = rest < 0
    at = tl.where(whole, column // (fields * 32) * 32 + column % 32, full * 32 + rest % lanes)
    bit = tl.where(whole, column // 32 % fields, rest // lanes) * width
    return tl.load(words + line + at, mask=there, other=0).to(tl.int32) >> bit & ((1 << width) - 1)


@triton.jit
def zero_point(zero, group, rows, out_rows, width: tl.constexpr):
    """The stored zero points of rows that there are, in a group: int32."""
    at = group * width
    return tl.load(zero + at // 8 * out_rows + rows).to(tl.int32) >> at % 8 & ((1 << width) - 1)


@triton.jit
def _tile(first_row, rows, columns, BN: tl.constexpr, BK: tl.constexpr):
    """The rows [BN, 1] and columns [1, BK] of this program, and which of them there are."""
    n = first_row + tl.program_id(0) * BN + tl.arange(0, BN)[:, None]
    k = tl.program_id(1) * BK + tl.arange(0, BK)[None, :]
    return n, k, (n < first_row + rows) & (k < columns)


@triton.jit
def planes(
    words, scale, offset, weight, first_row, rows, out_rows, in_columns, first, columns, full, lanes, row_stride,
    groups, group, count: tl.constexpr, sign: tl.constexpr, has_offset: tl.constexpr, BN: tl.constexpr,
    BK: tl.constexpr,
):  # fmt: skip
    """weight [rows, in], columns `first` on = sum_p scale_p b_p (+ offset). Grid (tiles of rows, tiles of columns)."""
    n, k, there = _tile(first_row, rows, columns, BN, BK)
    w = tl.zeros([BN, BK], tl.float32)
    for p in tl.static_range(count):
        b = field(words, (p * out_rows + n) * row_stride, k, there, full, lanes, 1)
        if sign:
            b = 2 * b - 1
        s = tl.load(scale + (p * groups + k // group) * out_rows + n, mask=there, other=0.0).to(tl.float32)
        w += b.to(tl.float32) * s
    if has_offset:
        w += tl.load(offset + k // group * out_rows + n, mask=there, other=0.0).to(tl.float32)
    at = (n - first_row).to(tl.int64) * in_columns + first + k
    tl.store(weight + at, w.to(weight.dtype.element_ty), mask=there)


@triton.jit
def ints(
    words, high, scale, zero, weight, first_row, rows, out_rows, in_columns, first, columns, full, lanes, high_full,
    high_lanes, row_stride, group, width: tl.constexpr, high_width: tl.constexpr, multiplier: tl.constexpr,
    z: tl.constexpr, zero_width: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """weight [rows, in], columns `first` on = (code - stored zero) scale, codes of `width` bits and `high_width` above
    them; or without zero_width (multiplier code - z) scale. Grid (tiles of rows, tiles of columns)."""
    n, k, there = _tile(first_row, rows, columns, BN, BK)
    code = field(words, n * row_stride, k, there, full, lanes, width)
    if high_width:
        code += field(high, n * row_stride, k, there, high_full, high_lanes, high_width) << width
    g = k // group
    if zero_width:
        at = g * zero_width
        packed = tl.load(zero + at // 8 * out_rows + n, mask=there, other=0).to(tl.int32)
        code -= packed >> at % 8 & ((1 << zero_width) - 1)
    else:
        code = multiplier * code - z
    w = code.to(tl.float32) * tl.load(scale + g * out_rows + n, mask=there, other=0.0).to(tl.float32)
    at = (n - first_row).to(tl.int64) * in_columns + first + k
    tl.store(weight + at, w.to(weight.dtype.element_ty), mask=there)


@triton.jit
def salient_split(
    words, marks, rank, third, scale, offset, column_scale, third_scale, weight, first_row, rows, out_rows,
    in_columns, first, columns, full, lanes, row_stride, third_full, third_lanes, third_stride, salient_columns,
    blocks, block, has_third: tl.constexpr, has_offset: tl.constexpr, has_columns: tl.constexpr, BN: tl.constexpr,
    BK: tl.constexpr,
):  # fmt: skip
    """weight [rows, in], columns `first` on, as `SalientSplit` says; rank [columns] int32: how many salient columns lie
    before a column. Grid (tiles of rows, tiles of columns)."""
    n, k, there = _tile(first_row, rows, columns, BN, BK)
    here = k < columns
    salient = field(marks, 0, k, here, full, lanes, 1)  # [1, BK]
    s = field(words, n * row_stride, k, there, full, lanes, 1)
    second = field(words, (out_rows + n) * row_stride, k, there, full, lanes, 1)
    g = second
    if not has_third:
        g = tl.where(salient > 0, 0, second)
    of_s = 2 * salient + g
    level = tl.load(scale + (of_s * blocks + k // block) * out_rows + n, mask=there, other=0.0).to(tl.float32)
    if has_columns:
        level *= tl.load(column_scale + g * columns + k, mask=there, other=0.0).to(tl.float32)
    w = level * (2 * s - 1).to(tl.float32)

    both = there & (salient > 0)
    if has_third:
        at = tl.load(rank + k, mask=here, other=0)
        t = field(third, n * third_stride, at, both, third_full, third_lanes, 1)
        of_t = 4 + g
    else:
        t = second
        of_t = 3 + 0 * g
    level = tl.load(scale + (of_t * blocks + k // block) * out_rows + n, mask=both, other=0.0).to(tl.float32)
    if has_columns:
        if has_third:
            level *= tl.load(third_scale + g * salient_columns + at, mask=both, other=0.0).to(tl.float32)
        else:
            level *= tl.load(column_scale + columns + k, mask=here, other=0.0).to(tl.float32)
    w += level * (2 * t - 1).to(tl.float32)
    if has_offset:
        w += tl.load(offset + (of_s * blocks + k // block) * out_rows + n, mask=there, other=0.0).to(tl.float32)
    at = (n - first_row).to(tl.int64) * in_columns + first + k
    tl.store(weight + at, w.to(weight.dtype.element_ty), mask=there)


@triton.jit
def outliers(
    index, value, scale, zero, weight, first_row, rows, out_rows, in_columns, entries, count, block, BN: tl.constexpr,
    BK: tl.constexpr,
):  # fmt: skip
    """Replace the stored entries of weight [rows, in]. Grid (tiles of rows, tiles of entries)."""
    n, e, there = _tile(first_row, rows, entries, BN, BK)
    column = e // count * block + tl.load(index + e * out_rows + n, mask=there, other=0).to(tl.int32)
    code = tl.load(value + e * out_rows + n, mask=there, other=0).to(tl.int32)
    here = n < first_row + rows
    code -= tl.load(zero + n, mask=here, other=0).to(tl.int32)
    w = code.to(tl.float32) * tl.load(scale + n, mask=here, other=0.0).to(tl.float32)
    at = (n - first_row).to(tl.int64) * in_columns + column
    tl.store(weight + at, w.to(weight.dtype.element_ty), mask=there)


@triton.jit
def masked(
    mask, value, scale, zero, weight, first_row, rows, out_rows, columns, full, lanes, row_stride, BN: tl.constexpr,
    BK: tl.constexpr,
):  # fmt: skip
    """Replace what the mask marks in weight [rows, columns], counting through a row. Grid (tiles of rows, 1)."""
    n, k, _ = _tile(first_row, rows, columns, BN, BK)
    s = tl.load(scale + n, mask=n < first_row + rows, other=0.0).to(tl.float32)
    z = tl.load(zero + n, mask=n < first_row + rows, other=0).to(tl.int32)
    before = tl.zeros([BN], tl.int32)
    for start in range(0, columns, BK):
        there = (n < first_row + rows) & (start + k < columns)
        marked = field(mask, n * row_stride, start + k, there, full, lanes, 1)
        at = before[:, None] + tl.cumsum(marked, axis=1) - marked
        there = there & (marked > 0)
        code = tl.load(value + at * out_rows + n, mask=there, other=0).to(tl.int32) - z
        w = code.to(tl.float32) * s
        at = (n - first_row).to(tl.int64) * columns + start + k
        tl.store(weight + at, w.to(weight.dtype.element_ty), mask=there)
        before += tl.sum(marked, axis=1)


def dequantize(tensors: Mapping[str, Tensor], format: Format, first_row: int, weight: Tensor) -> Iterator[Launch]:
    """The launches that write the rows from `first_row` on of what segments and outliers mean, without the transform,
    into weight [rows, in]. The reference is `Format.decode`."""
    where = first_row, len(weight)
    column = 0
    for i, part in enumerate(format.segments):
        parts = _stored(tensors, f"weight_{i}" if i else "weight", part)
        yield LAUNCHES[type(part)](part, parts, weight, where, column)
        column += part.columns
    if format.outliers is not None:
        parts = _stored(tensors, "weight_outliers", format.outliers)
        yield LAUNCHES[type(format.outliers)](format.outliers, parts, weight, where, 0)


def knows(format: Format) -> bool:
    """Whether there is a kernel for every part of a format."""
    parts = [*format.segments, *([format.outliers] if format.outliers is not None else [])]
    return all(type(part) in LAUNCHES for part in parts)


def _stored(
    tensors: Mapping[str, Tensor], prefix: str, part: Segment | IndexedOutliers | MaskedOutliers
) -> dict[str, Tensor]:
    return {suffix: tensors[prefix + suffix] for suffix in part.tensors(1)}


def words_of(columns: int, width: int) -> tuple[int, int]:
    """Full blocks of words in a row, and words in the tail (1 if there is none: kernels divide by it)."""
    full, rest = divmod(columns, WORD_BITS // width * LANES)
    return full, max(1, cdiv(rest, WORD_BITS // width))


def _launch(kernel: Any, rows: int, columns: int, weight: Tensor, args: tuple[Any, ...], **constants: Any) -> Launch:
    grid = cdiv(len(weight), rows), cdiv(columns, COLUMNS)
    return Launch(kernel, grid, args, constants | {"BN": rows, "BK": COLUMNS})


def _planes(part: Planes, parts: Mapping[str, Tensor], weight: Tensor, where: tuple[int, int], column: int) -> Launch:
    words, scale = parts[""], parts["_scale"]
    args = (
        words, scale, parts.get("_offset", scale), weight, *where, words.shape[-2], weight.shape[1], column,
        part.columns, *words_of(part.columns, 1), words.shape[-1], scale.shape[1], part.group or part.columns,
    )  # fmt: skip
    sign = part.alphabet == "pm1"
    return _launch(
        planes, ROWS[Planes], part.columns, weight, args, count=part.planes, sign=sign, has_offset=part.offset
    )


def _ints(part: Ints, parts: Mapping[str, Tensor], weight: Tensor, where: tuple[int, int], column: int) -> Launch:
    words, scale, (width, high) = parts[""], parts["_scale"], (*part.widths, 0)[:2]
    args = (
        words, words[:, word_count(part.columns, width) :], scale, parts.get("_zero", words), weight, *where,
        len(words), weight.shape[1], column, part.columns, *words_of(part.columns, width),
        *words_of(part.columns, high or width), words.shape[-1], part.group or part.columns,
    )  # fmt: skip
    zero = {"z": 1 << part.bits - 1, "zero_width": 0 if part.symmetric else part.zero_width}
    return _launch(ints, ROWS[Ints], part.columns, weight, args, width=width, high_width=high, multiplier=1, **zero)


def _tied(part: TiedPlanes, parts: Mapping[str, Tensor], weight: Tensor, where: tuple[int, int], column: int) -> Launch:
    words, scale, full = parts[""], parts["_scale"], words_of(part.columns, part.planes)
    args = (
        words, words, scale, words, weight, *where, len(words), weight.shape[1], column, part.columns, *full, *full,
        words.shape[-1], part.group or part.columns,
    )  # fmt: skip
    constants = {"width": part.planes, "high_width": 0, "multiplier": 2, "z": 2**part.planes - 1, "zero_width": 0}
    return _launch(ints, ROWS[TiedPlanes], part.columns, weight, args, **constants)


def _salient_split(
    part: SalientSplit, parts: Mapping[str, Tensor], weight: Tensor, where: tuple[int, int], column: int
) -> Launch:
    words, scale = parts[""], parts["_scale"]
    third = parts.get("_third", words)
    marks = unpack_fields(parts["_salient"], 1, part.columns)
    rank = marks.cumsum(0, dtype=torch.int32) - marks  # [columns]
    args = (
        words, parts["_salient"], rank, third, scale, parts.get("_offset", scale), parts.get("_column", scale),
        parts.get("_third_column", scale), weight, *where, words.shape[-2], weight.shape[1], column, part.columns,
        *words_of(part.columns, 1), words.shape[-1], *words_of(part.salient, 1), third.shape[-1], part.salient,
        scale.shape[1], part.block,
    )  # fmt: skip
    constants = {"has_third": part.third, "has_offset": part.offset, "has_columns": part.column_scale}
    return _launch(salient_split, ROWS[SalientSplit], part.columns, weight, args, **constants)


def _outliers(
    part: IndexedOutliers, parts: Mapping[str, Tensor], weight: Tensor, where: tuple[int, int], column: int
) -> Launch:
    index = parts["_index"]
    args = (
        index, parts["_value"], parts["_scale"], parts["_zero"], weight, *where, index.shape[1], weight.shape[1],
        len(index), part.count, part.block,
    )  # fmt: skip
    return _launch(outliers, ROWS[IndexedOutliers], len(index), weight, args)


def _masked(
    part: MaskedOutliers, parts: Mapping[str, Tensor], weight: Tensor, where: tuple[int, int], column: int
) -> Launch:
    mask = parts["_mask"]
    args = (
        mask, parts["_value"], parts["_scale"], parts["_zero"], weight, *where, len(mask), part.columns,
        *words_of(part.columns, 1), mask.shape[1],
    )  # fmt: skip
    return _launch(masked, ROWS[MaskedOutliers], 1, weight, args)


LAUNCHES = {
    Planes: _planes,
    TiedPlanes: _tied,
    Ints: _ints,
    SalientSplit: _salient_split,
    IndexedOutliers: _outliers,
    MaskedOutliers: _masked,
}
