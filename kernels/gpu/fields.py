"""Activations times a matrix of packed fields, for few tokens: the kernel that decoding runs on.

A matrix holds `width`-bit codes in the word layout of `format.py`, in blocks of `16 / width * 32` columns. For every
group of columns that shares a scale s and a zero point z it adds

    s * (multiplier * sum_k code_k x_k  -  z * sum_k x_k)  [+ offset * sum_k x_k]

Sign planes are 1-bit codes with multiplier 2 and z = 1; integers have multiplier 1. A field of a word tile [rows, 32]
is, after one AND, the fp16 number `code * 2^(position - 24)`: subnormal, but exact, and an operand of the tensor cores
as it is. So a field costs half an instruction a weight, and its product with 32 inputs is one `tl.dot` whose left
operand are weights, since tokens are few: they fill the narrow side. `prologue` has put the inverse power of two into
the inputs. The fields of the high byte are first shifted into the low one, where they are read.

Where a device should not take subnormals (`subnormals_are_exact`), 1.0 is OR-ed in and subtracted: one more
instruction for two weights.

Blocks of columns are dealt out to `splits` programs, whose partial sums `reduce` adds in a fixed order. The reference
is that of the whole, `packed_matmul_ref`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from ultralowbit.format.ints import Ints
from ultralowbit.format.planes import Planes, TiedPlanes
from ultralowbit.format.segment import Segment
from ultralowbit.format.weight import Format
from ultralowbit.format.words import LANES, WORD_BITS, group_count, word_count
from ultralowbit.kernels.gpu.launch import ASSEMBLY, cdiv, tl, triton


@dataclass(frozen=True)
class Matrix:
    """Codes of one width over consecutive columns, and the sum that they stand for (see above).

    prefix: name of the stored words; column: the first; planes: of the same inputs, one after the other; group: columns
    that share a scale, None the row; start, stride: of a row's words; zero: z, unless zero_width bits of it are stored.
    """

    prefix: str
    column: int
    columns: int
    width: int
    planes: int
    group: int | None
    start: int
    stride: int
    multiplier: int
    zero: float
    zero_width: int = 0
    offset: bool = False

    @property
    def fields(self) -> int:
        return WORD_BITS // self.width

    @property
    def block(self) -> int:
        """Columns of a full block."""
        return self.fields * LANES

    @property
    def full(self) -> int:
        """Full blocks; what follows is the tail, whose `lanes` words are fewer than 32."""
        return self.columns // self.block

    @property
    def lanes(self) -> int:
        return cdiv(self.columns % self.block, self.fields)

    @property
    def tails(self) -> int:
        """The tail is multiplied once for each group in it, by inputs that are zero elsewhere: there a group need not
        end where a field does."""
        rest = self.columns % self.block
        return 0 if not rest else 1 if self.group is None else self.groups - self.full * self.block // self.group

    @property
    def blocks(self) -> int:
        return self.full + self.tails

    @property
    def groups(self) -> int:
        return group_count(self.columns, self.group)

    @property
    def groups_in_block(self) -> int:
        return 1 if self.group is None else max(1, self.block // self.group)

    @property
    def blocks_in_group(self) -> int:
        return 1 if self.group is None else max(1, self.group // self.block)

    def places(self, device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
        """The column of every input in x16, and whether there is one: int64 and bool [blocks, block]."""
        i = torch.arange(self.block, device=device)
        block = torch.arange(self.blocks, device=device)[:, None]
        field, lane = i // LANES, i % LANES
        whole, start, group = block < self.full, self.full * self.block, self.group or self.columns
        column = torch.where(whole, block * self.block + i, start + field * self.lanes + lane)
        of_block = column // group == start // group + block - self.full
        return column, whole | ((lane < self.lanes) & (column < self.columns) & of_block)

    @property
    def fits(self) -> bool:
        """Whether groups end where fields or blocks do."""
        return self.group is None or (
            self.group % LANES == 0 and (self.block % self.group == 0 or self.group % self.block == 0)
        )


def _matrices_of(prefix: str, column: int, part: Segment) -> Iterator[Matrix]:
    shared = {"prefix": prefix, "column": column, "columns": part.columns, "group": part.group}
    if isinstance(part, Planes):
        # sum_p s_p (2 b_p - 1) x: codes 0 and 1 between -1 and +1
        multiplier, zero = (2, 1.0) if part.alphabet == "pm1" else (1, 0.0)
        yield Matrix(
            **shared, width=1, planes=part.planes, start=0, stride=word_count(part.columns, 1), multiplier=multiplier,
            zero=zero, offset=part.offset,
        )  # fmt: skip
        return
    if isinstance(part, TiedPlanes):
        # s (2 code - (2^planes - 1)): the same between two odd numbers
        yield Matrix(
            **shared, width=part.planes, planes=1, start=0, stride=word_count(part.columns, part.planes), multiplier=2,
            zero=2.0**part.planes - 1,
        )  # fmt: skip
        return
    stride, start, multiplier = sum(word_count(part.columns, w) for w in part.widths), 0, 1
    zero = {"zero": float(1 << part.bits - 1)} if part.symmetric else {"zero": 0.0, "zero_width": part.zero_width}
    for width in part.widths:  # 3 bits: the low two, then the high one without a zero point
        yield Matrix(**shared, width=width, planes=1, start=start, stride=stride, multiplier=multiplier, **zero)
        start, multiplier, zero = start + word_count(part.columns, width), multiplier << width, {"zero": 0.0}


@lru_cache(maxsize=1024)
def matrices(format: Format) -> tuple[Matrix, ...] | None:
    """The matrices whose products add up to that of the format's segments; None where a segment is no such sum or has
    groups that end inside a field."""
    whole: list[Matrix] = []
    column = 0
    for i, part in enumerate(format.segments):
        if not isinstance(part, Planes | TiedPlanes | Ints):
            return None
        whole += _matrices_of(f"weight_{i}" if i else "weight", column, part)
        column += part.columns
    return tuple(whole) if all(m.fits for m in whole) else None


@triton.jit
def _unpack(words, bit: tl.constexpr, width: tl.constexpr, subnormal: tl.constexpr):
    """The field of int16 words at `bit` as fp16: code * 2^(bit % 8 - 24), or 2^14 times that if not `subnormal`."""
    shift: tl.constexpr = bit // 8 * 8
    mask: tl.constexpr = ((1 << width) - 1) << (bit % 8)
    if ASSEMBLY:  # two words at a time: without it each half of a register is masked alone; 0xEA is (a & b) | c
        masks = tl.full(words.shape, mask, tl.int16)
        if subnormal:
            if shift == 0:
                code: tl.constexpr = "and.b32 $0, $1, $2;"
            else:
                code: tl.constexpr = "{ .reg .b32 t; shr.b32 t, $1, 8; and.b32 $0, t, $2; }"
        else:
            if shift == 0:
                code: tl.constexpr = """{ .reg .b32 t, o; mov.b32 o, 0x3C003C00; lop3.b32 t, $1, $2, o, 0xEA;
                    sub.f16x2 $0, t, o; }"""
            else:
                code: tl.constexpr = """{ .reg .b32 t, o; mov.b32 o, 0x3C003C00; shr.b32 t, $1, 8;
                    lop3.b32 t, t, $2, o, 0xEA; sub.f16x2 $0, t, o; }"""
        return tl.inline_asm_elementwise(code, "=r,r,r", [words, masks], dtype=tl.float16, is_pure=True, pack=2)
    masked = ((words >> shift) & mask).to(tl.int16)
    if subnormal:
        return masked.to(tl.float16, bitcast=True)
    return (masked | 0x3C00).to(tl.int16).to(tl.float16, bitcast=True) - 1.0


@triton.jit
def _levels(
    scale, zero, offset, group, groups, rows, out_rows, plane, z: tl.constexpr, zero_width: tl.constexpr,
    has_offset: tl.constexpr,
):  # fmt: skip
    """Of one group: the scale s and the factor k of the group's sum of inputs, both fp32 [rows]."""
    s = tl.load(scale + (plane * groups + group) * out_rows + rows).to(tl.float32)
    if zero_width:
        at = group * zero_width
        k = -s * ((tl.load(zero + at // 8 * out_rows + rows).to(tl.int32) >> at % 8) & ((1 << zero_width) - 1))
    else:
        k = -z * s
    if has_offset:  # of all planes together
        mine = rows < tl.where(plane == 0, out_rows, 0)
        k += tl.load(offset + group * out_rows + rows, mask=mine, other=0.0).to(tl.float32)
    return s, k


@triton.jit
def _rows(out_rows, few_rows: tl.constexpr, BN: tl.constexpr):
    """The rows [BN] that a program writes, and those that it reads for them."""
    if few_rows:
        n = tl.arange(0, BN)
        return n, tl.minimum(n, out_rows - 1)
    # the last tile is moved up instead, so that the rows of all are consecutive; some are written twice alike
    n = tl.minimum(tl.program_id(1) * BN, out_rows - BN) + tl.arange(0, BN)
    return n, n


@triton.jit
def _add_group(acc, part, sum, s, k, z: tl.constexpr, zero_width: tl.constexpr, has_offset: tl.constexpr):
    """acc [BN, BM] and what a group adds: its part [BN, BM] and the sum [BM] of its inputs, by the levels s, k [BN]."""
    if zero_width or has_offset:
        acc += sum[None, :] * k[:, None]
        acc += part * s[:, None]
    else:  # one operation a sum less
        acc += (part - z * sum[None, :]) * s[:, None]
    return acc


# an alignment that does not help would only mean more variants to compile
_UNALIGNED = ["planes", "plane_stride", "row_stride", "blocks", "full", "lanes", "groups", "blocks_in_group", "splits"]


@triton.jit(do_not_specialize=["tokens"], do_not_specialize_on_alignment=_UNALIGNED)
def multiply(
    x16, sums, units, words, scale, zero, offset, partial, tokens, out_rows, planes, plane_stride, row_stride, blocks,
    full, lanes, groups, blocks_in_group, splits, width: tl.constexpr, fields_in_group: tl.constexpr,
    row_scale: tl.constexpr, tail: tl.constexpr, multiplier: tl.constexpr, z: tl.constexpr, zero_width: tl.constexpr,
    has_offset: tl.constexpr, subnormal: tl.constexpr, aligned: tl.constexpr, few_rows: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """partial [planes * splits, tokens, out] fp32: what one plane and every `splits`-th block add to the product.

    x16 [tokens, blocks * block] fp16, sums [tokens, blocks * groups in a block] and units [tokens, blocks] fp32 from
    `prologue`; words [planes, out, row_stride] int16; scale [planes, groups, out], offset [groups, out] fp16, zero
    packed uint8 [., out]. Grid (tiles of tokens, tiles of rows, planes * splits).
    """
    fields: tl.constexpr = 16 // width
    groups_in_block: tl.constexpr = fields // fields_in_group
    unit: tl.constexpr = multiplier * (1 << (width + 16 if subnormal else width + 2))
    m = tl.program_id(0) * BM + tl.arange(0, BM)
    n, rows = _rows(out_rows, few_rows, BN)
    split = tl.program_id(2) // planes
    plane = tl.program_id(2) % planes
    c = tl.arange(0, 32)
    live = m < tokens
    plane_stride *= aligned  # these come in units of so many words: what can be loaded at once
    row_stride *= aligned
    lanes *= aligned
    lines = words + plane * plane_stride + rows[:, None] * row_stride + c[None, :]  # [BN, 32]
    inputs = x16 + m[None, :] * (blocks * (fields * 32)) + c[:, None]  # [32, BM]
    sums += m * (blocks * groups_in_block)
    units += m * blocks

    acc = tl.zeros([BN, BM], tl.float32)
    total = tl.zeros([BM], tl.float32)
    for block in range(split, blocks, splits):
        at = tl.minimum(block, full) * 32
        if tail:
            word = tl.load(lines + at, mask=c[None, :] < tl.where(block < full, 32, lanes), other=0)
        else:
            word = tl.load(lines + at)
        e = tl.load(units + block, mask=live, other=0.0) * unit
        for g in tl.static_range(groups_in_block):
            part = tl.zeros([BN, BM], tl.float32)
            for j in tl.static_range(g * fields_in_group, (g + 1) * fields_in_group):
                x = tl.load(inputs + (block * fields + j) * 32, mask=live[None, :], other=0.0)
                part = tl.dot(_unpack(word, j * width, width, subnormal), x, part)
            sum = tl.load(sums + block * groups_in_block + g, mask=live, other=0.0)
            if row_scale:
                acc += part * e[None, :]
                total += sum
            else:
                group = (block * groups_in_block + g) // blocks_in_group
                if tail:  # whose blocks are of one group each
                    of_tail = full * groups_in_block // blocks_in_group + block - full
                    group = tl.where(block < full, group, of_tail)
                s, k = _levels(scale, zero, offset, group, groups, rows, out_rows, plane, z, zero_width, has_offset)
                acc = _add_group(acc, part * e[None, :], sum, s, k, z, zero_width, has_offset)
    if row_scale:
        s, k = _levels(scale, zero, offset, 0, 1, rows, out_rows, plane, z, zero_width, has_offset)
        acc = acc * s[:, None] + total[None, :] * k[:, None]
    at = (tl.program_id(2) * tokens + m[None, :]) * out_rows + n[:, None]
    tl.store(partial + at, acc, mask=live[None, :] & (n[:, None] < out_rows))


@triton.jit(do_not_specialize=["count", "tokens"])
def reduce(partial, y, count, tokens, out_rows, digits: tl.constexpr, BN: tl.constexpr):
    """y [tokens, out] = sum of partial [count, digits * tokens, out] fp32 in a fixed order. Grid (tiles of rows,
    tokens)."""
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    acc = tl.zeros([BN], tl.float32)
    for i in range(count):
        for digit in tl.static_range(digits):
            line = (i * digits + digit) * tokens + tl.program_id(1)
            acc += tl.load(partial + line * out_rows + n, mask=n < out_rows, other=0.0)
    tl.store(y + tl.program_id(1) * out_rows + n, acc.to(y.dtype.element_ty), mask=n < out_rows)
