"""What outliers add to the product of the planes below them: (value - what the planes say there) x, entry by entry.

The entries of a row are its own, so inputs and words are gathered, and a thread has a row. For few tokens only.
"""

from __future__ import annotations

from ultralowbit.kernels.gpu.dequantize import field
from ultralowbit.kernels.gpu.launch import tl, triton


@triton.jit
def correction(
    x, index, value, value_scale, value_zero, words, scale, offset, m, n, lines, token_stride, column_stride, out_rows,
    entries, count, block, full, lanes, plane_stride, row_stride, groups, group, split, splits, planes,
    sign: tl.constexpr, has_offset: tl.constexpr, digits: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """fp32 [BN, BM]: what every `splits`-th entry of the rows n adds for the lines m of x [tokens, in]; the second line
    of a token has none."""
    m, n = m[None, :], n[:, None]
    there = n < out_rows
    live = (m < lines) & (m % digits == 0)
    s = tl.load(value_scale + n, mask=there, other=0.0).to(tl.float32)
    zero = tl.load(value_zero + n, mask=there, other=0).to(tl.int32)
    lanes = tl.maximum(lanes, 1)  # `field` divides by it
    acc = tl.zeros([BN, BM], tl.float32)
    for e in range(split, entries, splits):
        column = e // count * block + tl.load(index + e * out_rows + n, mask=there, other=0).to(tl.int32)
        code = tl.load(value + e * out_rows + n, mask=there, other=0).to(tl.int32) - zero
        w = code.to(tl.float32) * s
        for p in range(planes):
            b = field(words, p * plane_stride + n * row_stride, column, there, full, lanes, 1)
            if sign:
                b = 2 * b - 1
            of_plane = scale + (p * groups + column // group) * out_rows + n
            w -= b.to(tl.float32) * tl.load(of_plane, mask=there, other=0.0).to(tl.float32)
        if has_offset:
            w -= tl.load(offset + column // group * out_rows + n, mask=there, other=0.0).to(tl.float32)
        at = x + (m // digits).to(tl.int64) * token_stride + column * column_stride
        acc += w * tl.load(at, mask=there & live, other=0.0).to(tl.float32)
    return acc
