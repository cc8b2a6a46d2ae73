"""The inputs of packed matrices: in the order and basis of their columns, and as their kernel takes them.

`transform` does what `InputTransform` says in one launch; where the Hadamard blocks are not all of one size, in one for
each size.

`prologue` cuts the columns of a `Matrix` into its blocks. In each block of a token

    unit e = the power of two with 128 <= max |x| / e < 256,   x16 = fp16(x / e * 2^(8 - width - position of the field))

so that a bf16 x is exact, none overflows, and every masked field times its input is code * x / e * 2^(-16 - width).
An fp32 x is given as two tokens, x = x16 + 2^-11 x16', which together keep 22 bits. The tail has one block for each
group in it, zero outside the group.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from ultralowbit.format.weight import Format
from ultralowbit.format.words import LANES
from ultralowbit.kernels.gpu.dequantize import field, words_of
from ultralowbit.kernels.gpu.fields import Matrix
from ultralowbit.kernels.gpu.launch import Launch, cdiv, tl, triton

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


@triton.jit(do_not_specialize=["tokens", "columns", "blocks", "full", "lanes", "group"])
def prologue(
    x, x16, sums, units, tokens, token_stride, column_stride, first, columns, blocks, full, lanes, group,
    width: tl.constexpr, groups_in_block: tl.constexpr, digits: tl.constexpr,
):  # fmt: skip
    """x [tokens, in] -> x16 [lines, blocks, block] fp16, sums [lines, blocks, groups in a block] and units [lines,
    blocks] fp32, where lines = digits * tokens. Grid (blocks, tokens)."""
    fields: tl.constexpr = 16 // width
    size: tl.constexpr = fields * 32
    block, token = tl.program_id(0), tl.program_id(1)
    i = tl.arange(0, size)
    f, c = i // 32, i % 32
    whole = block < full
    column = tl.where(whole, block * size + i, full * size + f * lanes + c)
    apart = tl.where(whole, 0, column // group - (full * size // group + block - full))  # from the block's group
    there = (c < tl.where(whole, 32, lanes)) & (column < columns) & (apart == 0)
    v = tl.load(x + token.to(tl.int64) * token_stride + (first + column) * column_stride, mask=there, other=0.0)
    v = v.to(tl.float32)
    exponent = tl.max(tl.abs(v)).to(tl.int32, bitcast=True) >> 23
    exponent = tl.maximum(exponent, 8)  # of what is next to nothing
    e = ((exponent - 7) << 23).to(tl.float32, bitcast=True)
    v *= ((261 - exponent) << 23).to(tl.float32, bitcast=True)
    position = f * width % 8
    factor = ((135 - width - position) << 23).to(tl.float32, bitcast=True)
    back = ((119 + width + position) << 23).to(tl.float32, bitcast=True)
    for digit in tl.static_range(digits):
        line = (digit * tokens + token) * blocks + block
        stored = (v * factor).to(tl.float16)
        tl.store(x16 + line.to(tl.int64) * size + i, stored)
        kept = stored.to(tl.float32) * back
        sum = tl.sum(tl.reshape(kept, [groups_in_block, size // groups_in_block]), axis=1)
        g = tl.arange(0, groups_in_block)
        sum = tl.where(whole, sum, tl.where(g == 0, tl.sum(kept), 0.0))  # a block of the tail is of one group
        tl.store(sums + line * groups_in_block + g, sum * e)
        tl.store(units + line, e)
        v = (v - kept) * 2048.0
        e *= 1.0 / 2048.0


def transformed(
    x: Tensor, tensors: Mapping[str, Tensor], format: Format, dtype: torch.dtype
) -> tuple[list[Launch], Tensor]:
    """The launches that transform x [tokens, in], and T(x) in `dtype` that they leave; of a format without a transform
    none, and x. The reference is `Format.transformed`."""
    steps, columns = format.transform, format.in_features
    if steps is None:
        return [], x
    out = x.new_empty(len(x), columns, dtype=dtype)
    marks, scale = tensors.get("weight_input_channel_order", out), tensors.get("weight_input_scale", out)
    launches, start = [], 0
    while start < columns:
        block = min(steps.hadamard or 1, 1 << (columns - start).bit_length() - 1)
        stop, size = columns - (columns - start) % block, max(block, PIECE)
        args = (
            x, out, marks, scale, *x.stride(), start, stop, columns, format.segments[0].columns, *words_of(columns, 1),
        )  # fmt: skip
        constants = {
            "rounds": block.bit_length() - 1, "root": block**-0.5, "has_marks": steps.channel_order,
            "has_scale": steps.column_scale, "size": size,
        }  # fmt: skip
        grid = len(x), cdiv(stop - start, size)
        launches.append(Launch(transform, grid, args, constants, warps=min(16, max(1, size // 256))))
        start = stop
    return launches, out


def prologue_ref(x: Tensor, matrix: Matrix, digits: int) -> tuple[Tensor, Tensor, Tensor]:
    """The x16, sums and units that `prologue` writes."""
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
    x16, sums, units = (torch.cat(parts) for parts in zip(*pieces, strict=True))
    return x16, sums, units
