"""Activations of many tokens times a packed segment, whose weights are unpacked by the programs that multiply them.

A program has a tile of rows and a tile of tokens. It turns words into weights in its registers, with the bits that
`dequantize.py` would write in the dtype of x, and multiplies all its tokens by them: what a weight costs to unpack is
shared by as many products, all planes are one operand, and no weight is ever in memory. A step of the loop takes a few
fields of a block of words. The tail, whose fields are shorter, is gathered as `dequantize.py` does.

The reference is `packed_matmul_ref`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from ultralowbit.format.ints import Ints
from ultralowbit.format.planes import Planes, TiedPlanes
from ultralowbit.format.segment import Segment
from ultralowbit.format.weight import Format
from ultralowbit.format.words import LANES, WORD_BITS, word_count
from ultralowbit.kernels.gpu.dequantize import field, words_of, zero_point
from ultralowbit.kernels.gpu.inputs import transformed
from ultralowbit.kernels.gpu.launch import ASSEMBLY, Launch, cdiv, tl, triton

STEP = 128
"""Columns that a step of the loop multiplies; fewer where a block of words has fewer."""
TAIL = 32
"""Columns of the tail at a time."""
ABOVE = tl.constexpr(0x4B000000)
"""2^23 in fp32: a whole number below that in the place of its mantissa is added to it. Instructions that convert are
slow."""
NOTHING = tl.constexpr(-0.0)
"""What a sum begins with: unlike that of 0.0, the compiler may leave its addition out."""


@triton.jit
def _levels(scale, zero, p, g, groups, rows, out_rows, z: tl.constexpr, zero_width: tl.constexpr):
    """The scale of a group and 2^23 more than its zero point, fp32."""
    s = tl.load(scale + (p * groups + g) * out_rows + rows).to(tl.float32)
    if zero_width:
        zeros = (zero_point(zero, g, rows, out_rows, zero_width) | ABOVE).to(tl.float32, bitcast=True)
    else:
        zeros = z + 8388608.0
    return s, zeros


@triton.jit
def _weight(
    word, bit, high_word, high_bit, s, zero, width: tl.constexpr, high_width: tl.constexpr, multiplier: tl.constexpr,
    signs: tl.constexpr,
):  # fmt: skip
    """fp32 weights of the fields at `bit` of int32 words, with those of high words above them."""
    if signs:  # s, turned over where the bit is not set
        turned = ~(word << (31 - bit)) & -2147483648
        weight = (s.to(tl.int32, bitcast=True) ^ turned).to(tl.float32, bitcast=True)
    else:
        code = word * multiplier >> bit & ((1 << width) - 1) * multiplier
        if high_width:
            code |= (high_word >> high_bit & ((1 << high_width) - 1)) << width
        weight = ((code | ABOVE).to(tl.float32, bitcast=True) - zero) * s
    return weight


@triton.jit
def _times(weight, x, acc):
    """acc + weight, rounded to the dtype of x, @ x."""
    weight = weight.to(x.dtype)
    if not ASSEMBLY:  # the interpreter multiplies the bytes of bf16
        weight, x = weight.to(tl.float32), x.to(tl.float32)
    return tl.dot(weight, x, acc)


@triton.jit
def _whole(
    acc, inputs, live, words, high, scale, zero, offset, rows, out_rows, row_stride, plane_stride, steps, groups, group,
    count: tl.constexpr, signs: tl.constexpr, width: tl.constexpr, high_width: tl.constexpr, multiplier: tl.constexpr,
    z: tl.constexpr, zero_width: tl.constexpr, has_offset: tl.constexpr, fields: tl.constexpr,
    one_group: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """acc [BN, BM] and what the columns in whole blocks of words add to it."""
    columns: tl.constexpr = fields * 32  # of a step
    f, c = tl.arange(0, fields)[None, :, None], tl.arange(0, 32)[None, None, :]
    per_word: tl.constexpr = 16 // width // fields  # steps to a block
    per_high: tl.constexpr = 16 // (high_width if high_width else width) // fields
    lines, rows = (rows * row_stride)[:, None, None], rows[:, None, None]
    for step in range(steps):
        k = step * columns + tl.arange(0, columns)
        v = tl.load(inputs + k[:, None], mask=live[None, :], other=0.0)
        g = step * columns // group
        if not one_group:
            g = (step * columns + f * 32) // group
        total = tl.full([BN, fields, 32], NOTHING, tl.float32)
        for p in tl.static_range(count):
            word = tl.load(words + p * plane_stride + lines + step // per_word * 32 + c).to(tl.int32)
            above = word
            if high_width:
                above = tl.load(high + lines + step // per_high * 32 + c).to(tl.int32)
            s, zeros = _levels(scale, zero, p, g, groups, rows, out_rows, z, zero_width)
            total += _weight(
                word, step % per_word * (fields * width) + f * width, above,
                step % per_high * (fields * high_width) + f * high_width, s, zeros, width, high_width, multiplier,
                signs,
            )  # fmt: skip
        if has_offset:
            total += tl.load(offset + g * out_rows + rows).to(tl.float32)
        acc = _times(tl.reshape(total, [BN, columns]), v, acc)
    return acc


@triton.jit
def _rest(
    acc, inputs, live, words, high, scale, zero, offset, rows, out_rows, row_stride, plane_stride, first, columns,
    full, lanes, high_full, high_lanes, groups, group, count: tl.constexpr, signs: tl.constexpr, width: tl.constexpr,
    high_width: tl.constexpr, multiplier: tl.constexpr, z: tl.constexpr, zero_width: tl.constexpr,
    has_offset: tl.constexpr, BN: tl.constexpr, BT: tl.constexpr,
):  # fmt: skip
    """acc [BN, BM] and what the columns from `first` on add to it."""
    lines, rows = (rows * row_stride)[:, None], rows[:, None]
    for start in tl.range(first, columns, BT, num_stages=1):
        there = start + tl.arange(0, BT) < columns
        k = tl.minimum(start + tl.arange(0, BT), columns - 1)
        g = k[None, :] // group
        total = tl.full([BN, BT], NOTHING, tl.float32)
        for p in tl.static_range(count):
            code = field(words + p * plane_stride, lines, k[None, :], there[None, :], full, lanes, width)
            above = code
            if high_width:
                above = field(high, lines, k[None, :], there[None, :], high_full, high_lanes, high_width)
            s, zeros = _levels(scale, zero, p, g, groups, rows, out_rows, z, zero_width)
            total += _weight(code, 0, above, 0, s, zeros, width, high_width, multiplier, signs)
        if has_offset:
            total += tl.load(offset + g * out_rows + rows).to(tl.float32)
        v = tl.load(inputs + k[:, None], mask=live[None, :] & there[:, None], other=0.0)
        acc = _times(total, v, acc)
    return acc


@triton.jit(do_not_specialize=["tokens", "steps", "full", "lanes", "high_full", "high_lanes", "groups"])
def unpack_and_multiply(
    x, words, high, scale, zero, offset, y, tokens, columns, out_rows, row_stride, plane_stride, steps, full, lanes,
    high_full, high_lanes, groups, group, count: tl.constexpr, signs: tl.constexpr, width: tl.constexpr,
    high_width: tl.constexpr, multiplier: tl.constexpr, z: tl.constexpr, zero_width: tl.constexpr,
    has_offset: tl.constexpr, fields: tl.constexpr, one_group: tl.constexpr, tail: tl.constexpr, BM: tl.constexpr,
    BN: tl.constexpr, BT: tl.constexpr,
):  # fmt: skip
    """y [tokens, out] = x [tokens, columns] @ weight [out, columns].T. Grid (tiles of tokens, tiles of rows).

    words [count, out, row_stride] int16, high words of the same rows; scale [count, groups, out], offset [groups, out]
    fp16; zero packed uint8 [., out]. The first `steps` steps of `fields` fields of 32 columns lie in whole blocks;
    one_group: a step has one.
    """
    m = tl.program_id(0) * BM + tl.arange(0, BM)
    n = tl.program_id(1) * BN + tl.arange(0, BN)
    live = m < tokens
    rows = tl.minimum(n, out_rows - 1)  # all are there to be read
    inputs = x + m.to(tl.int64)[None, :] * columns
    acc = _whole(
        tl.zeros([BN, BM], tl.float32), inputs, live, words, high, scale, zero, offset, rows, out_rows, row_stride,
        plane_stride, steps, groups, group, count, signs, width, high_width, multiplier, z, zero_width, has_offset,
        fields, one_group, BN,
    )  # fmt: skip
    if tail:
        acc = _rest(
            acc, inputs, live, words, high, scale, zero, offset, rows, out_rows, row_stride, plane_stride,
            steps * fields * 32, columns, full, lanes, high_full, high_lanes, groups, group, count, signs, width,
            high_width, multiplier, z, zero_width, has_offset, BN, BT,
        )  # fmt: skip
    at = m.to(tl.int64)[None, :] * out_rows + n[:, None]
    tl.store(y + at, acc.to(y.dtype.element_ty), mask=(n < out_rows)[:, None] & live[None, :])


@dataclass(frozen=True)
class _Fields:
    """How the fields of a segment are read and what they stand for: the constants of the kernel."""

    width: int
    high_width: int = 0
    count: int = 1
    signs: bool = False
    multiplier: int = 1
    z: float = 0.0
    zero_width: int = 0
    has_offset: bool = False

    @classmethod
    def of(cls, part: Segment) -> _Fields | None:
        if isinstance(part, Planes):
            return cls(1, count=part.planes, signs=part.alphabet == "pm1", has_offset=part.offset)
        if isinstance(part, TiedPlanes):
            return cls(part.planes, multiplier=2, z=2.0**part.planes - 1)
        if not isinstance(part, Ints):
            return None
        width, high = (*part.widths, 0)[:2]
        zero = {"z": float(1 << part.bits - 1)} if part.symmetric else {"zero_width": part.zero_width}
        return cls(width, high, **zero)


def can_unpack(format: Format) -> bool:
    """Whether the kernel knows a format: one segment of planes or integers, whose groups do not end inside a field."""
    part = format.segments[0]
    alone = len(format.segments) == 1 and format.outliers is None
    return alone and _Fields.of(part) is not None and (part.group is None or part.group % LANES == 0)


def unpacking_product(
    x: Tensor, tensors: Mapping[str, Tensor], format: Format, size: int, rows: int, warps: int, stages: int
) -> tuple[list[Launch], Tensor]:
    """The launches that multiply x [tokens, in], contiguous, in tiles of `size` tokens and `rows` rows, and the y
    [tokens, out] that they leave."""
    part, of = format.segments[0], _Fields.of(format.segments[0])
    launches, x = transformed(x, tensors, format, x.dtype)
    words, scale, out_rows = tensors["weight"], tensors["weight_scale"], tensors["weight"].shape[-2]
    high = words[..., word_count(part.columns, of.width) :] if of.high_width else words
    fields = min(STEP // LANES, WORD_BITS // of.width)
    block = WORD_BITS // min(of.width, of.high_width or of.width) * LANES  # of whole words, low and high
    whole = part.columns - part.columns % block
    group = part.group or part.columns
    y = x.new_empty(len(x), out_rows)
    args = (
        x, words, high, scale, tensors.get("weight_zero", scale), tensors.get("weight_offset", scale), y, len(x),
        part.columns, out_rows, words.shape[-1], out_rows * words.shape[-1], whole // (fields * LANES),
        *words_of(part.columns, of.width), *words_of(part.columns, of.high_width or of.width), scale.shape[-2], group,
    )  # fmt: skip
    constants = vars(of) | {
        "fields": fields, "one_group": part.group is None or part.group % (fields * LANES) == 0,
        "tail": whole < part.columns, "BM": size, "BN": rows, "BT": TAIL,
    }  # fmt: skip
    grid = cdiv(len(x), size), cdiv(out_rows, rows)
    launches.append(Launch(unpack_and_multiply, grid, args, constants, warps, stages))
    return launches, y
