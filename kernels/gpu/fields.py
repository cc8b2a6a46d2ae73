"""Activations times a matrix of packed fields: the kernel that decoding runs on.

A field of a word tile [rows, 32] is, after one AND, the fp16 number `code * 2^(position - 24)`: subnormal, but exact,
and an operand of the tensor cores as it is. So a field costs half an instruction a weight, and its product with 32
inputs is one `tl.dot` whose left operand are weights, since tokens are few: they fill the narrow side. The inputs hold
the inverse power of two (`inputs.py`). The fields of the high byte are first shifted into the low one, where they are
read. Where a device should not take subnormals (`subnormals_are_exact`), 1.0 is OR-ed in and subtracted: one more
instruction for two weights.

Blocks of columns are dealt out to splits, each a program for every tile of rows. For few tokens a product is one
launch: a program makes the inputs that it reads itself (those of other rows make the same, and write the same bits to
the same place), and the last of a tile to arrive adds the parts of all in their fixed order, so that the result has
the same bits every time, whoever comes last. Single weights that replace those below them (`outliers.py`) are more
programs of the launch. The reference is that of the whole, `packed_matmul_ref`.
"""

from __future__ import annotations

from ultralowbit.kernels.gpu.dequantize import zero_point
from ultralowbit.kernels.gpu.inputs import fill, rotate
from ultralowbit.kernels.gpu.launch import ASSEMBLY, tl, triton
from ultralowbit.kernels.gpu.outliers import correction


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
    k = -s * zero_point(zero, group, rows, out_rows, zero_width) if zero_width else -z * s
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


@triton.jit
def _prepare(
    x, turned, column_scale, x16, sums, units, tokens, token_stride, column_stride, first, columns, group, start, stop,
    blocks, full, lanes, width: tl.constexpr, groups_in_block: tl.constexpr, digits: tl.constexpr,
    rounds: tl.constexpr, root: tl.constexpr, has_scale: tl.constexpr, pieces: tl.constexpr, turn: tl.constexpr,
):  # fmt: skip
    """The inputs of the blocks from start to stop, for all tokens, as `inputs.py` describes them."""
    size: tl.constexpr = 16 // width * 32
    if rounds:
        low = tl.minimum(start, full) * size // (turn * 64)
        high = tl.cdiv(tl.where(stop > full, columns, stop * size), turn * 64)
        for piece in range(low, high):
            for token in range(tokens):
                rotate(x, turned, token, piece, token_stride, column_stride, columns, rounds, root, digits, turn)
        tl.debug_barrier()
        x, token_stride, column_stride = turned, columns, 1
    for block in range(start, stop, pieces):
        for token in range(tokens):
            fill(
                x, column_scale, x16, sums, units, token, block, stop, token_stride, column_stride, first, columns,
                blocks, full, lanes, group, width, groups_in_block, digits, has_scale, pieces,
            )  # fmt: skip
    tl.debug_barrier()


@triton.jit
def _blocks(
    x16, sums, units, words, scale, zero, offset, m, rows, lines, out_rows, plane, start, stop, blocks, full, lanes,
    row_stride, groups, blocks_in_group, width: tl.constexpr, fields_in_group: tl.constexpr,
    row_scale: tl.constexpr, tail: tl.constexpr, multiplier: tl.constexpr, z: tl.constexpr, zero_width: tl.constexpr,
    has_offset: tl.constexpr, subnormal: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """What the blocks from start to stop of a plane add to the product of its rows [BN] with the lines m [BM]: fp32
    [BN, BM]. words: those of the plane."""
    fields: tl.constexpr = 16 // width
    groups_in_block: tl.constexpr = fields // fields_in_group
    unit: tl.constexpr = multiplier * (1 << (width + 16 if subnormal else width + 2))
    c = tl.arange(0, 32)
    live = m < lines
    of_row = words + rows[:, None] * row_stride + c[None, :]  # [BN, 32]
    inputs = x16 + m[None, :] * (blocks * (fields * 32)) + c[:, None]  # [32, BM]
    sums += m * (blocks * groups_in_block)
    units += m * blocks

    acc = tl.zeros([BN, BM], tl.float32)
    total = tl.zeros([BM], tl.float32)
    for block in range(start, stop):
        at = tl.minimum(block, full) * 32
        if tail:
            word = tl.load(of_row + at, mask=c[None, :] < tl.where(block < full, 32, lanes), other=0)
        else:
            word = tl.load(of_row + at)
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
    return acc


@triton.jit
def _add_up(
    acc, partial, arrived, y, m, n, part, parts, lines, tokens, out_rows, digits: tl.constexpr, alone: tl.constexpr,
    last: tl.constexpr, BM: tl.constexpr,
):  # fmt: skip
    """Keep a part [BN, BM] of lines m and rows n; where all of this tile have arrived, y is their sum."""
    here = n[:, None] < out_rows
    live = here & (m < lines)[None, :]
    if alone:
        tl.store(y + m[None, :] * out_rows + n[:, None], acc.to(y.dtype.element_ty), mask=live)
    else:
        tl.store(partial + (part * lines + m[None, :]) * out_rows + n[:, None], acc, mask=live)
    if last and not alone:
        tl.debug_barrier()  # all threads have stored before one says so
        tile = arrived + tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)
        if tl.atomic_add(tile, 1) == tl.num_programs(2) - 1:
            i = tl.arange(0, BM)
            token = tl.program_id(0) * (BM // digits) + i
            there = here & ((i < BM // digits) & (token < tokens))[None, :]
            total = tl.zeros_like(acc)
            for k in range(parts):
                for digit in tl.static_range(digits):
                    line = k * lines + token * digits + digit
                    # past the first cache, where the memory was before others wrote to it
                    at = partial + line[None, :] * out_rows + n[:, None]
                    total += tl.load(at, mask=there, other=0.0, cache_modifier=".cg")
            tl.store(y + token[None, :] * out_rows + n[:, None], total.to(y.dtype.element_ty), mask=there)
            tl.store(tile, 0)


# an alignment that does not help would only mean more variants to compile
_UNALIGNED = [
    "first", "columns", "group", "planes", "plane_stride", "row_stride", "blocks", "full", "lanes", "groups",
    "blocks_in_group", "span", "splits", "before", "parts", "entries", "entries_in_block", "entry_block",
]  # fmt: skip
_ANY = ["tokens", "span", "splits", "before", "parts", "entries", "entries_in_block", "entry_block"]


@triton.jit(do_not_specialize=_ANY, do_not_specialize_on_alignment=_UNALIGNED)
def multiply(
    x, turned, column_scale, x16, sums, units, words, scale, zero, offset, index, value, value_scale, value_zero,
    partial, arrived, y, tokens, token_stride, column_stride, first, columns, group, out_rows, planes, plane_stride,
    row_stride, blocks, full, lanes, groups, blocks_in_group, span, splits, before, parts, entries,
    entries_in_block, entry_block, width: tl.constexpr, fields_in_group: tl.constexpr, row_scale: tl.constexpr,
    tail: tl.constexpr, multiplier: tl.constexpr, z: tl.constexpr, zero_width: tl.constexpr,
    has_offset: tl.constexpr, subnormal: tl.constexpr, aligned: tl.constexpr, few_rows: tl.constexpr,
    digits: tl.constexpr, prepares: tl.constexpr, rounds: tl.constexpr, root: tl.constexpr,
    has_scale: tl.constexpr, corrects: tl.constexpr, alone: tl.constexpr, last: tl.constexpr, pieces: tl.constexpr,
    turn: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """y [tokens, out] = x [tokens, in] times a matrix, and what is before it in partial [parts, lines, out] fp32; not
    `last`: only its own parts there, from `before` on.

    turned [tokens, in] fp32 and x16, sums, units as of `inputs.py`: room for the inputs if it `prepares`, else made by
    `prologue`. words [planes, out, row_stride] int16; scale [planes, groups, out], offset [groups, out] fp16, zero
    packed uint8 [., out]; index, value [entries, out] of replaced weights if it `corrects`. arrived int32, a zero for
    each of the first two sides of the grid (tiles of lines, tiles of rows, parts), left as zeros.
    """
    m = tl.program_id(0) * BM + tl.arange(0, BM)
    n, rows = _rows(out_rows, few_rows, BN)
    part, lines = tl.program_id(2), tokens * digits
    plane_stride *= aligned  # these come in units of so many words: what can be loaded at once
    row_stride *= aligned
    lanes *= aligned
    plane, start = part % planes, tl.minimum(part // planes * span, blocks)  # none for the programs after the splits
    stop = tl.minimum(start + span, blocks)
    if prepares:
        _prepare(
            x, turned, column_scale, x16, sums, units, tokens, token_stride, column_stride, first, columns, group,
            start, stop, blocks, full, lanes, width, 16 // width // fields_in_group, digits, rounds, root, has_scale,
            pieces, turn,
        )  # fmt: skip
    acc = _blocks(
        x16, sums, units, words + plane * plane_stride, scale, zero, offset, m, rows, lines, out_rows, plane, start,
        stop, blocks, full, lanes, row_stride, groups, blocks_in_group, width, fields_in_group, row_scale, tail,
        multiplier, z, zero_width, has_offset, subnormal, BM, BN,
    )  # fmt: skip
    if corrects:
        split = part - planes * splits
        if split >= 0:
            acc += correction(
                x, index, value, value_scale, value_zero, words, scale, offset, m, n, lines, token_stride,
                column_stride, out_rows, entries, entries_in_block, entry_block, full, lanes, plane_stride,
                row_stride, groups, group, split, tl.num_programs(2) - planes * splits, planes, multiplier == 2,
                has_offset, digits, BM, BN,
            )  # fmt: skip
    _add_up(
        acc, partial, arrived, y, m, n, before + part, parts, lines, tokens, out_rows, digits, alone, last, BM,
    )  # fmt: skip
