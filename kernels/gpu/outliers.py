"""What outliers adds to the product of the planes below it: (value - what the planes say there) x, entry by entry.

The entries of a row are its own, so inputs and words are gathered, and a thread has a row. For few tokens only.
"""

from __future__ import annotations

from ultralowbit.kernels.gpu.dequantize import field
from ultralowbit.kernels.gpu.launch import tl, triton


@triton.jit
def correct(
    x, index, value, value_scale, value_zero, words, scale, offset, partial, tokens, lines, token_stride,
    column_stride, out_rows, entries, count, block, full, lanes, row_stride, groups, group, splits,
    planes: tl.constexpr, sign: tl.constexpr, has_offset: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """partial [splits, lines, out] fp32: what every `splits`-th entry of the rows adds for x [tokens, in], and zeros
    for the lines after the tokens. Grid (tiles of lines, tiles of rows, splits)."""
    m = tl.program_id(0) * BM + tl.arange(0, BM)[None, :]
    n = tl.program_id(1) * BN + tl.arange(0, BN)[:, None]
    there = n < out_rows
    s = tl.load(value_scale + n, mask=there, other=0.0).to(tl.float32)
    z = tl.load(value_zero + n, mask=there, other=0).to(tl.int32)
    acc = tl.zeros([BN, BM], tl.float32)
    for e in range(tl.program_id(2), entries, splits):
        column = e // count * block + tl.load(index + e * out_rows + n, mask=there, other=0).to(tl.int32)
        code = tl.load(value + e * out_rows + n, mask=there, other=0).to(tl.int32) - z
        w = code.to(tl.float32) * s
        for p in tl.static_range(planes):
            b = field(words, (p * out_rows + n) * row_stride, column, there, full, lanes, 1)
            if sign:
                b = 2 * b - 1
            of_plane = scale + (p * groups + column // group) * out_rows + n
            w -= b.to(tl.float32) * tl.load(of_plane, mask=there, other=0.0).to(tl.float32)
        if has_offset:
            w -= tl.load(offset + column // group * out_rows + n, mask=there, other=0.0).to(tl.float32)
        at = x + m.to(tl.int64) * token_stride + column * column_stride
        acc += w * tl.load(at, mask=there & (m < tokens), other=0.0).to(tl.float32)
    tl.store(partial + (tl.program_id(2) * lines + m) * out_rows + n, acc, mask=there & (m < lines))
