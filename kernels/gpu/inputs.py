"""The inputs of packed matrices: in the order and basis of their columns, and as their kernel takes them.

`transform` does what `InputTransform` says in one launch; where the Hadamard blocks are not all of one size, in one for
each size.

Columns of a `Matrix` are cut into its blocks. In each block of a token

    unit e = the power of two with 128 <= max |x| / e < 256,   x16 = fp16(x / e * 2^(8 - width - position of the field))

so that a bf16 x is exact, none overflows, and every masked field times its input is code * x / e * 2^(-16 - width).
An fp32 x is given as two lines, x = x16 + 2^-11 x16', which together keep 22 bits, one after the other. The tail has
one block for each group in it, zero outside the group. So there are

    x16 [lines, blocks, block] fp16,  sums [lines, blocks, groups in a block] and units [lines, blocks] fp32,
    lines = digits * tokens.

For few tokens the programs of `multiply` make the blocks that they read themselves, with `fill`, and `rotate` before
where Hadamard blocks of at most 4096 divide the columns; for more, one launch of `prologue` makes all.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from ultralowbit.format.transform import InputTransform
from ultralowbit.format.weight import Format
from ultralowbit.format.words import LANES
from ultralowbit.kernels.gpu.dequantize import field, words_of
from ultralowbit.kernels.gpu.launch import Launch, cdiv, run, tl, triton
from ultralowbit.kernels.gpu.matrix import Matrix

PIECE = 1024
"""Channels that one program transforms, at least."""


@triton.jit
def _sums_and_differences(v, half: tl.constexpr, size: tl.constexpr):
    a, b = tl.split(tl.permute(tl.reshape(v, [size // half // 2, 2, half]), [0, 2, 1]))
    return tl.reshape(tl.permute(tl.join(a + b, a - b), [0, 2, 1]), [size])


@triton.jit
def transform(
    x, out, marks, scale, token_stride, column_stride, start, stop, columns, first_columns, full, lanes,
    rounds: tl.constexpr, root: tl.constexpr, has_marks: tl.constexpr, has_scale: tl.constexpr, size: tl.constexpr,
):  # fmt: skip
    """out [tokens, columns] = T(x) of the channels from start to stop, in Hadamard blocks of 2^rounds. Grid (tokens,
    pieces of `size`, a multiple of that)."""
    token = tl.program_id(0).to(tl.int64)
    here = start + tl.program_id(1) * size
    k = here + tl.arange(0, size)
    at = x + token * token_stride + k.to(tl.int64) * column_stride
    v = tl.load(at, mask=k < stop, other=0.0).to(tl.float32)
    for i in tl.static_range(rounds):
        v = _sums_and_differences(v, 1 << i, size)
    if rounds:
        v *= root
    place = k
    if has_marks:
        counts = tl.zeros([1, 1024], tl.int32)
        for i in range(0, here, 1024):
            j = i + tl.arange(0, 1024)[None, :]
            counts += field(marks, 0, j, j < here, full, lanes, 1)
        before = tl.sum(counts)
        marked = tl.reshape(field(marks, 0, k[None, :], k[None, :] < stop, full, lanes, 1), [size])
        rank = before + tl.cumsum(marked, axis=0) - marked  # of the marked channels
        place = tl.where(marked > 0, rank, first_columns + k - rank)
    if has_scale:
        v *= tl.load(scale + place, mask=k < stop, other=0.0).to(tl.float32)
    tl.store(out + token * columns + place, v.to(out.dtype.element_ty), mask=k < stop)


@triton.jit
def _exponent(largest):
    """Of the largest |value|, biased; that of the power of two e with 128 <= largest / e < 256 is 7 less."""
    return tl.maximum(largest.to(tl.int32, bitcast=True) >> 23, 8)  # 8: of what is next to nothing


@triton.jit
def _hadamard(size: tl.constexpr, rounds: tl.constexpr):
    """fp16 [size, size]: the signs of Hadamard blocks of 2^rounds rows and columns, 0 outside."""
    i, j = tl.arange(0, size)[:, None], tl.arange(0, size)[None, :]
    p = i & j & ((1 << rounds) - 1)
    p ^= p >> 4
    p ^= p >> 2
    p ^= p >> 1
    return tl.where((i ^ j) >> rounds == 0, 1 - 2 * (p & 1), 0).to(tl.float16)


@triton.jit
def rotate(
    x, turned, token, piece, token_stride, column_stride, columns, rounds: tl.constexpr, root: tl.constexpr,
    digits: tl.constexpr, lines: tl.constexpr,
):  # fmt: skip
    """turned [tokens, columns] fp32 = the channels of x in Hadamard blocks of 2^rounds, at most 64 lines of them: those
    of one token and piece, as v [lines, 64] -> left @ v @ right on tensor cores.

    What they take is fp16: a bf16 v is exact in it, of an fp32 one and of what is between the products, two numbers of
    11 bits are.
    """
    i, j = tl.arange(0, lines)[:, None], tl.arange(0, 64)[None, :]
    k = piece * (lines * 64) + i * 64 + j
    v = tl.load(x + token * token_stride + k * column_stride, mask=k < columns, other=0.0).to(tl.float32)
    exponent = _exponent(tl.max(tl.abs(v)))
    v *= ((261 - exponent) << 23).to(tl.float32, bitcast=True)
    right = _hadamard(64, rounds if rounds < 6 else 6)
    high = v.to(tl.float16)
    half = tl.dot(high, right)
    if digits == 2:
        low = ((v - high.to(tl.float32)) * 2048.0).to(tl.float16)
        half += tl.dot(low, right) * (1.0 / 2048.0)
    if rounds > 6:
        left = _hadamard(lines, rounds - 6)
        high = half.to(tl.float16)
        low = ((half - high.to(tl.float32)) * 2048.0).to(tl.float16)
        half = tl.dot(left, high) + tl.dot(left, low) * (1.0 / 2048.0)
    half *= ((exponent - 7) << 23).to(tl.float32, bitcast=True) * root
    tl.store(turned + token * columns + k, half, mask=k < columns)


@triton.jit
def fill(
    x, column_scale, x16, sums, units, token, first_block, stop, token_stride, column_stride, first, columns, blocks,
    full, lanes, group, width: tl.constexpr, groups_in_block: tl.constexpr, digits: tl.constexpr,
    has_scale: tl.constexpr, pieces: tl.constexpr,
):  # fmt: skip
    """x16, sums and units of a token's blocks from first_block on, `pieces` of them, but none from stop on."""
    fields: tl.constexpr = 16 // width
    size: tl.constexpr = fields * 32
    block = first_block + tl.arange(0, pieces)  # [pieces]
    b, i = block[:, None], tl.arange(0, size)[None, :]
    f, c = i // 32, i % 32
    whole = b < full
    column = tl.where(whole, b * size + i, full * size + f * lanes + c)
    apart = tl.where(whole, 0, column // group - (full * size // group + b - full))  # from the block's group
    there = (c < tl.where(whole, 32, lanes)) & (column < columns) & (apart == 0) & (b < stop)
    at = x + token * token_stride + (first + column).to(tl.int64) * column_stride
    v = tl.load(at, mask=there, other=0.0).to(tl.float32)
    if has_scale:
        v *= tl.load(column_scale + column, mask=there, other=0.0).to(tl.float32)
    exponent = _exponent(tl.max(tl.abs(v), axis=1))  # [pieces]
    e = ((exponent - 7) << 23).to(tl.float32, bitcast=True)
    v *= ((261 - exponent) << 23).to(tl.float32, bitcast=True)[:, None]
    position = f * width % 8
    factor = ((135 - width - position) << 23).to(tl.float32, bitcast=True)
    back = ((119 + width + position) << 23).to(tl.float32, bitcast=True)
    g = tl.arange(0, groups_in_block)[None, :]
    for digit in tl.static_range(digits):
        line = (token * digits + digit) * blocks + block
        stored = (v * factor).to(tl.float16)
        tl.store(x16 + line.to(tl.int64)[:, None] * size + i, stored, mask=b < stop)
        kept = stored.to(tl.float32) * back
        sum = tl.sum(tl.reshape(kept, [pieces, groups_in_block, size // groups_in_block]), axis=2)
        all = tl.where(g == 0, tl.sum(kept, axis=1)[:, None], 0.0)
        sum = tl.where(whole, sum, all)  # a block of the tail is of one group
        tl.store(sums + line[:, None] * groups_in_block + g, sum * e[:, None], mask=b < stop)
        tl.store(units + line, e, mask=block < stop)
        v = (v - kept) * 2048.0
        e *= 1.0 / 2048.0


@triton.jit(do_not_specialize=["columns", "blocks", "full", "lanes", "group"])
def prologue(
    x, x16, sums, units, token_stride, column_stride, first, columns, blocks, full, lanes, group,
    width: tl.constexpr, groups_in_block: tl.constexpr, digits: tl.constexpr, pieces: tl.constexpr,
):  # fmt: skip
    """The inputs of all blocks of a matrix, from x [tokens, in]. Grid (tiles of blocks, tokens)."""
    token = tl.program_id(1).to(tl.int64)
    fill(
        x, x, x16, sums, units, token, tl.program_id(0) * pieces, blocks, token_stride, column_stride, first, columns,
        blocks, full, lanes, group, width, groups_in_block, digits, False, pieces,
    )  # fmt: skip


def transformed(
    x: Tensor, tensors: Mapping[str, Tensor], format: Format, dtype: torch.dtype
) -> tuple[list[Launch], Tensor]:
    """The launches that transform x [tokens, in], and T(x) in `dtype` that they leave; of a format without a transform
    none, and x. The reference is `Format.transformed`."""
    steps, columns = format.transform, format.in_features
    if steps is None:
        return [], x
    out = x.new_empty(len(x), columns, dtype=dtype)
    return _transforms(x, out, steps, tensors, format.segments[0].columns), out


def block_hadamard(x: Tensor, block: int) -> Tensor:
    """`kernels.hadamard.block_hadamard` of x [rows, columns] fp32: a launch for each size of block."""
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    run(_transforms(x, out, InputTransform(x.shape[1], hadamard=block), {}), x.device)
    return out


def _transforms(
    x: Tensor, out: Tensor, steps: InputTransform, tensors: Mapping[str, Tensor], first_columns: int = 0
) -> list[Launch]:
    """The launches that write T(x) to out [tokens, columns]."""
    marks, scale = tensors.get("weight_input_channel_order", out), tensors.get("weight_input_scale", out)
    launches, start, columns = [], 0, steps.columns
    while start < columns:
        block = min(steps.hadamard or 1, 1 << (columns - start).bit_length() - 1)
        stop, size = columns - (columns - start) % block, max(block, PIECE)
        args = (x, out, marks, scale, *x.stride(), start, stop, columns, first_columns, *words_of(columns, 1))
        constants = {
            "rounds": block.bit_length() - 1, "root": block**-0.5, "has_marks": steps.channel_order,
            "has_scale": steps.column_scale, "size": size,
        }  # fmt: skip
        grid = len(x), cdiv(stop - start, size)
        launches.append(Launch(transform, grid, args, constants, warps=min(16, max(1, size // 256))))
        start = stop
    return launches


def prologue_ref(x: Tensor, matrix: Matrix, digits: int) -> tuple[Tensor, Tensor, Tensor]:
    """The x16, sums and units of a matrix, for T(x) [tokens, in]."""
    column, there = matrix.places(x.device)
    v = torch.where(there, x.float()[:, matrix.column + column.clamp_max(matrix.columns - 1)], 0)
    exponent = (v.abs().amax(-1, keepdim=True).view(torch.int32) >> 23).clamp_min(8)
    e = (exponent - 7 << 23).view(torch.float32)
    field = torch.arange(matrix.fields, device=x.device).repeat_interleave(LANES)
    factor = 2.0 ** (8 - matrix.width - field * matrix.width % 8)
    v, pieces = v / e, []
    for _ in range(digits):
        x16 = (v * factor).half()
        kept = x16.float() / factor
        sums = kept.unflatten(-1, (matrix.groups_in_block, -1)).sum(-1)
        sums[:, matrix.full :] = F.pad(kept[:, matrix.full :].sum(-1, keepdim=True), (0, matrix.groups_in_block - 1))
        pieces.append((x16, sums * e, e[..., 0]))
        v, e = (v - kept) * 2048, e / 2048
    x16, sums, units = (torch.stack(parts, 1).flatten(0, 1) for parts in zip(*pieces, strict=True))
    return x16, sums, units
