"""What is done to the inputs of a weight before its segments multiply them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ultralowbit.errors import FormatError
from ultralowbit.format.segment import BudgetKind, Part, check_fields
from ultralowbit.format.words import TensorSpec, pack_fields, unpack_fields, word_count

MANY_ROWS = 16
"""Rows from which on a Hadamard transform is faster on a copy that has them side by side."""


@dataclass(frozen=True)
class InputTransform(Part):
    """What is done to the inputs of a weight before its segments and outliers multiply them: y = stored @ T(x),

        T(x) = scale * channel_order(hadamard(x))

    each part optional. `hadamard` is a block size, a power of two: blocks of so many channels are multiplied by the
    orthonormal Hadamard matrix (-1)^popcount(i & j) / sqrt(size); the channels after the last whole block are cut into
    falling powers of two. `channel_order` puts the channels of the first segment, which a bit marks, before the others,
    both in rising order. `column_scale` is a factor for each channel, in the order that the segments then have.

    Stored: channel_order words int16 [words]; scale fp16 [columns]. All rows share them.
    """

    kind: ClassVar[str] = "input"
    row_axis: ClassVar[Mapping[str, int | None]] = {"_channel_order": None, "_scale": None}
    budget: ClassVar[Mapping[str, BudgetKind]] = {"_channel_order": "input transform", "_scale": "input transform"}
    columns: int
    channel_order: bool = False
    column_scale: bool = False
    hadamard: int | None = None

    def __post_init__(self) -> None:
        check_fields(self, channel_order=(True, False), column_scale=(True, False))
        if self.hadamard not in (None, *(2**k for k in range(1, 17))):
            raise FormatError(f"input.hadamard is {self.hadamard!r}, expected a power of two from 2 to 65536")
        if not (self.channel_order or self.column_scale or self.hadamard):
            raise FormatError("an input transform needs a channel_order, a column_scale or a hadamard: leave it out")

    @property
    def summary(self) -> str:
        steps = (
            f"hadamard{self.hadamard}" if self.hadamard else "",
            "channel_order" if self.channel_order else "",
            "scale" if self.column_scale else "",
        )
        return f"input({','.join(filter(None, steps))})"

    def tensors(self, out_features: int) -> dict[str, TensorSpec]:
        specs = {}
        if self.channel_order:
            specs["_channel_order"] = TensorSpec(torch.int16, (word_count(self.columns, 1),))
        if self.column_scale:
            specs["_scale"] = TensorSpec(torch.float16, (self.columns,))
        return specs

    def encode(self, channel_order: Tensor | None = None, scale: Tensor | None = None) -> dict[str, Tensor]:
        """channel_order [columns] bool, set for the channels of the first segment; scale [columns] fp16-exact, in the
        order that the segments have."""
        parts = {}
        if self.channel_order:
            parts["_channel_order"] = pack_fields(channel_order.to(torch.uint8), 1)
        if self.column_scale:
            parts["_scale"] = scale.half()
        return parts

    def order(self, parts: Mapping[str, Tensor]) -> Tensor:
        """The channel [columns] int64 that comes to each place."""
        return unpack_fields(parts["_channel_order"], 1, self.columns).argsort(descending=True, stable=True)

    def apply(self, parts: Mapping[str, Tensor], x: Tensor) -> Tensor:
        """T(x) for x [..., columns]: computed in fp32, rounded once to x's dtype."""
        y = x.float()
        if self.hadamard:
            y = block_hadamard(y, self.hadamard)
        if self.channel_order:
            y = y[..., self.order(parts)]
        if self.column_scale:
            y = y * parts["_scale"].float()
        return y.to(x.dtype)

    def decode(self, parts: Mapping[str, Tensor], out: Tensor) -> None:
        """Turn out [rows, columns] fp32, which multiplies T(x), into the weight that multiplies x."""
        if self.column_scale:
            out *= parts["_scale"].float()
        if self.channel_order:
            out[:, self.order(parts)] = out.clone()
        if self.hadamard:
            out.copy_(block_hadamard(out, self.hadamard))


def block_hadamard(x: Tensor, block: int) -> Tensor:
    """x [..., columns] times the orthonormal, symmetric block matrix that `InputTransform` describes."""
    return _BlockHadamard.apply(x, block)


class _BlockHadamard(torch.autograd.Function):
    """The matrix is symmetric: the gradient is multiplied by it as x is."""

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, int], output: Tensor) -> None:
        _, ctx.block = inputs

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, _: None) -> Tensor:
        return block_hadamard(tangent, ctx.block)

    @staticmethod
    def forward(x: Tensor, block: int) -> Tensor:
        columns = x.shape[-1]
        sizes = [block] * (columns // block)
        while rest := columns - sum(sizes):
            sizes.append(1 << rest.bit_length() - 1)
        rows = x.reshape(-1, columns)
        # with the rows side by side, all that a round adds is long and contiguous
        beside = len(rows) >= MANY_ROWS
        y = rows.T.contiguous() if beside else rows
        axis = 0 if beside else 1
        widths = {size: size * n for size, n in Counter(sizes).items()}
        parts = [
            _walsh(part.contiguous(), size, len(rows) if beside else 1)
            for size, part in zip(widths, y.split([*widths.values()], axis), strict=True)
        ]
        y = parts[0] if len(parts) == 1 else torch.cat(parts, axis)
        return (y.T if beside else y).reshape(x.shape)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return block_hadamard(gradient, ctx.block), None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int, None], x: Tensor, block: int) -> tuple[Tensor, int]:
        return block_hadamard(x.movedim(in_dims[0], 0), block), 0


def _walsh(x: Tensor, size: int, inner: int) -> Tensor:
    """The fast transform of each `size` numbers of x, which lie `inner` places from each other: log2(size) rounds of
    sums and differences."""
    y, half = torch.empty_like(x), inner
    source = x
    while half < size * inner:
        a, b = source.view(-1, 2, half).unbind(1)  # [pairs, half]
        if torch.compiler.is_compiling():  # it writes into no part of a tensor
            source, half = torch.stack([a + b, a - b], 1).view(x.shape), 2 * half
            continue
        sums, differences = y.view(-1, 2, half).unbind(1)
        torch.add(a, b, out=sums)
        torch.sub(a, b, out=differences)
        source, y = y, torch.empty_like(x) if source is x else source
        half *= 2
    return source * size**-0.5
