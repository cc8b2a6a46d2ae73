"""Sign planes: one bit a weight and plane."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from ultralowbit.format.segment import BudgetKind, Segment, check_fields
from ultralowbit.format.words import TensorSpec, group_count, group_views, pack_fields, unpack_fields, word_count


@dataclass(frozen=True)
class Planes(Segment):
    """`columns` inputs as sign planes: w = sum_p scale[p] * b[p] (+ offset), b in {-1, +1} or {0, 1}.

    Stored: words [planes, out, words] int16 (bit 1 is +1); scale [planes, groups, out] fp16; with `offset`, one more
    fp16 [groups, out]. `group` is the columns that share a scale, None one scale a row.
    """

    kind: ClassVar[str] = "planes"
    row_axis: ClassVar[Mapping[str, int | None]] = {"": -2}
    budget: ClassVar[Mapping[str, BudgetKind]] = {
        "": "sign planes", "_scale": "scales and offsets", "_offset": "scales and offsets",
    }  # fmt: skip
    columns: int
    planes: int
    group: int | None = None
    alphabet: Literal["pm1", "01"] = "pm1"
    offset: bool = False

    def __post_init__(self) -> None:
        check_fields(self, planes=range(1, 9), alphabet=("pm1", "01"))

    @property
    def code_bits(self) -> int:
        return self.planes

    @property
    def summary(self) -> str:
        scale = "row" if self.group is None else f"g{self.group}"
        name = "sign" if self.alphabet == "pm1" else "bool"
        return f"{self.columns}x{self.planes}{name}/{scale}{'+offset' if self.offset else ''}"

    def tensors(self, out_features: int) -> dict[str, TensorSpec]:
        groups = group_count(self.columns, self.group)
        specs = {
            "": TensorSpec(torch.int16, (self.planes, out_features, word_count(self.columns, 1))),
            "_scale": TensorSpec(torch.float16, (self.planes, groups, out_features)),
        }
        if self.offset:
            specs["_offset"] = TensorSpec(torch.float16, (groups, out_features))
        return specs

    def encode(self, bits: Tensor, scale: Tensor, offset: Tensor | None = None) -> dict[str, Tensor]:
        """bits [planes, out, columns] bool; scale [planes, out, groups], offset [out, groups], both fp16-exact."""
        parts = {"": pack_fields(bits.to(torch.uint8), 1), "_scale": scale.transpose(1, 2).half().contiguous()}
        if offset is not None:
            parts["_offset"] = offset.T.half().contiguous()
        return parts

    def decode(self, parts: Mapping[str, Tensor], out: Tensor) -> None:
        """Write the meaning of the stored rows into out [rows, columns] fp32."""
        for p, (words, scale) in enumerate(zip(parts[""], parts["_scale"], strict=True)):
            plane = out if p == 0 else torch.empty_like(out)
            plane.copy_(unpack_fields(words, 1, self.columns))
            if self.alphabet == "pm1":
                plane.mul_(2).sub_(1)
            for view, s in group_views(plane, scale, self.group):
                view.mul_(s)
            if p:
                out += plane
        if self.offset:
            for view, offset in group_views(out, parts["_offset"], self.group):
                view.add_(offset)

    def sparsity(self, parts: Mapping[str, Tensor]) -> list[float]:
        if self.alphabet == "pm1":
            return []
        bits = unpack_fields(parts[""], 1, self.columns)  # [planes, out, columns]
        return (bits == 0).float().mean((1, 2)).tolist()


@dataclass(frozen=True)
class TiedPlanes(Segment):
    """`columns` inputs as sign planes whose scales halve from one to the next, so that one is stored:
    w = scale * (2^(planes - 1) b_1 + ... + 2 b_(planes - 1) + b_planes), b in {-1, +1}; an odd number times the scale.

    Stored: words int16 [out, words] with fields of `planes` bits, that of b_1 the highest; scale fp16 [groups, out].
    """

    kind: ClassVar[str] = "tied"
    row_axis: ClassVar[Mapping[str, int | None]] = {"": -2}
    budget: ClassVar[Mapping[str, BudgetKind]] = {"": "sign planes", "_scale": "scales and offsets"}
    columns: int
    planes: int
    group: int | None = None

    def __post_init__(self) -> None:
        check_fields(self, planes=(2, 4))

    @property
    def code_bits(self) -> int:
        return self.planes

    @property
    def summary(self) -> str:
        scale = "row" if self.group is None else f"g{self.group}"
        return f"{self.columns}x{self.planes}tied/{scale}"

    def tensors(self, out_features: int) -> dict[str, TensorSpec]:
        return {
            "": TensorSpec(torch.int16, (out_features, word_count(self.columns, self.planes))),
            "_scale": TensorSpec(torch.float16, (group_count(self.columns, self.group), out_features)),
        }

    def encode(self, codes: Tensor, scale: Tensor) -> dict[str, Tensor]:
        """codes [out, columns] uint8, the bits of a weight from b_1 down; scale [out, groups] fp16-exact."""
        return {"": pack_fields(codes, self.planes), "_scale": scale.T.half().contiguous()}

    def decode(self, parts: Mapping[str, Tensor], out: Tensor) -> None:
        """Write the meaning of the stored rows into out [rows, columns] fp32."""
        out.copy_(unpack_fields(parts[""], self.planes, self.columns)).mul_(2).sub_(2**self.planes - 1)
        for view, scale in group_views(out, parts["_scale"], self.group):
            view.mul_(scale)
