"""Integer codes of 2, 3, 4 or 8 bits."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ultralowbit.format.segment import BudgetKind, Segment, check_fields
from ultralowbit.format.words import TensorSpec, group_count, group_views, pack_fields, unpack_fields, word_count


@dataclass(frozen=True)
class Ints(Segment):
    """`columns` inputs as unsigned integer codes: w = (code - zero) * scale.

    Stored: words int16 [out, words] (3 bits: all the low 2-bit fields, then the high bits); scale fp16 [groups, out];
    zero points, where asymmetric, at the code's own width (4 bits for 3), packed along the groups into bytes:
    uint8 [ceil(groups / per byte), out]. Symmetric codes have the zero point 2**(bits - 1) and store none.
    """

    kind: ClassVar[str] = "ints"
    row_axis: ClassVar[Mapping[str, int | None]] = {"": -2}
    budget: ClassVar[Mapping[str, BudgetKind]] = {
        "": "integer codes", "_scale": "scales and offsets", "_zero": "scales and offsets",
    }  # fmt: skip
    columns: int
    bits: int
    group: int | None = None
    symmetric: bool = False

    def __post_init__(self) -> None:
        check_fields(self, bits=(2, 3, 4, 8), symmetric=(True, False))

    @property
    def code_bits(self) -> int:
        return self.bits

    @property
    def summary(self) -> str:
        scale = "row" if self.group is None else f"g{self.group}"
        return f"{self.columns}xint{self.bits}/{scale}{'+sym' if self.symmetric else ''}"

    @property
    def widths(self) -> tuple[int, ...]:
        """Of the fields that a code is stored in, its low bits first."""
        return (2, 1) if self.bits == 3 else (self.bits,)

    @property
    def zero_width(self) -> int:
        """Bits of a stored zero point."""
        return 4 if self.bits == 3 else self.bits

    def tensors(self, out_features: int) -> dict[str, TensorSpec]:
        groups = group_count(self.columns, self.group)
        words = sum(word_count(self.columns, w) for w in self.widths)
        specs = {
            "": TensorSpec(torch.int16, (out_features, words)),
            "_scale": TensorSpec(torch.float16, (groups, out_features)),
        }
        if not self.symmetric:
            specs["_zero"] = TensorSpec(torch.uint8, (-(-groups * self.zero_width // 8), out_features))
        return specs

    def encode(self, codes: Tensor, scale: Tensor, zero: Tensor | None = None) -> dict[str, Tensor]:
        """codes [out, columns] uint8; scale [out, groups] fp16-exact; zero [out, groups] whole numbers."""
        if self.bits == 3:
            words = torch.cat([pack_fields(codes & 3, 2), pack_fields(codes >> 2, 1)], dim=-1)
        else:
            words = pack_fields(codes, self.bits)
        parts = {"": words, "_scale": scale.T.half().contiguous()}
        if zero is not None:
            parts["_zero"] = self._pack_zero(zero.T.to(torch.uint8))
        return parts

    def _pack_zero(self, zero: Tensor) -> Tensor:  # [groups, out] -> [bytes, out]
        width = self.zero_width
        per_byte = 8 // width
        packed = zero.new_zeros((-(-len(zero) // per_byte), zero.shape[1]))
        for f in range(per_byte):
            part = zero[f::per_byte]
            packed[: len(part)] |= part << (width * f)
        return packed

    def unpack_zero(self, packed: Tensor) -> Tensor:
        """The stored zero points, uint8 [bytes, rows] -> uint8 [groups, rows]."""
        width = self.zero_width
        shifts = torch.arange(0, 8, width, dtype=torch.uint8, device=packed.device)
        zero = (packed[:, None] >> shifts[:, None]) & ((1 << width) - 1)  # [bytes, per byte, rows]
        return zero.flatten(0, 1)[: group_count(self.columns, self.group)]

    def unpack_codes(self, words: Tensor) -> Tensor:
        """The stored codes, int16 [rows, words] -> int16 [rows, columns]."""
        if self.bits != 3:
            return unpack_fields(words, self.bits, self.columns)
        low, high = words.split([word_count(self.columns, 2), word_count(self.columns, 1)], dim=-1)
        return unpack_fields(low, 2, self.columns) + (unpack_fields(high, 1, self.columns) << 2)

    def decode(self, parts: Mapping[str, Tensor], out: Tensor) -> None:
        """Write the meaning of the stored rows into out [rows, columns] fp32."""
        out.copy_(self.unpack_codes(parts[""]))
        if self.symmetric:
            out -= 2 ** (self.bits - 1)
        else:
            for view, zero in group_views(out, self.unpack_zero(parts["_zero"]), self.group):
                view.sub_(zero)
        for view, scale in group_views(out, parts["_scale"], self.group):
            view.mul_(scale)
