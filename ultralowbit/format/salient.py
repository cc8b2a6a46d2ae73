"""Sign planes whose scales depend on whether a column is salient."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ultralowbit.format.segment import BudgetKind, Segment, check_fields, random_marks
from ultralowbit.format.words import TensorSpec, group_count, pack_fields, unpack_fields, word_count


@dataclass(frozen=True)
class SalientSplit(Segment):
    """`columns` inputs as signs s, t = -1 or +1 whose scales depend on two things: whether the column is one of the
    `salient` ones, which all rows share, and in which group g = 0 or 1 a weight is by a bit of its own.

        other columns                   w = a[g] s + c[g]
        salient columns, two planes     w = a[2] s + a[3] t + c[2]             the second plane holds t, there is no g
        salient columns, `third`        w = a[2+g] s + a[4+g] t + c[2+g]

    with a = scale, for each row and block; with `column_scale` times u of the column, where u[0], u[1] belong to the
    a[g] of s and v[0], v[1] to those of t (without g, u[0] to s and u[1] to t); c = offset only with `offset`.

    Stored: words int16 [2, out, words], of s and of g or t; which columns are salient int16 [words]; with `third`, t of
    the salient columns alone int16 [out, words of them]; scale fp16 [4 or 6, blocks, out]; offset fp16 [3 or 4, blocks,
    out]; u fp16 [2, columns] and, with `third`, v fp16 [2, salient].
    """

    kind: ClassVar[str] = "salient_split"
    row_axis: ClassVar[Mapping[str, int | None]] = {
        "": -2, "_third": -2, "_salient": None, "_column": None, "_third_column": None,
    }  # fmt: skip
    budget: ClassVar[Mapping[str, BudgetKind]] = {
        "": "sign planes", "_third": "sign planes", "_salient": "masks and indices", "_scale": "scales and offsets",
        "_offset": "scales and offsets", "_column": "scales and offsets", "_third_column": "scales and offsets",
    }  # fmt: skip
    columns: int
    salient: int
    block: int = 128
    third: bool = False
    column_scale: bool = False
    offset: bool = False

    def __post_init__(self) -> None:
        flags = dict.fromkeys(("third", "column_scale", "offset"), (True, False))
        check_fields(self, salient=range(bool(self.third), self.columns + 1), block=range(1, 1 << 16), **flags)

    @property
    def code_bits(self) -> float:
        """As papers count: a sign, and one more on salient columns; not the second plane."""
        return 1 + self.salient / self.columns

    @property
    def summary(self) -> str:
        planes = f"{self.salient}salient{'x3' if self.third else ''}"
        scales = f"{'+columns' if self.column_scale else ''}{'+offset' if self.offset else ''}"
        return f"{self.columns}xsalient({planes})/b{self.block}{scales}"

    def tensors(self, out_features: int) -> dict[str, TensorSpec]:
        words, blocks = word_count(self.columns, 1), group_count(self.columns, self.block)
        specs = {
            "": TensorSpec(torch.int16, (2, out_features, words)),
            "_salient": TensorSpec(torch.int16, (words,)),
            "_scale": TensorSpec(torch.float16, (6 if self.third else 4, blocks, out_features)),
        }
        if self.third:
            specs["_third"] = TensorSpec(torch.int16, (out_features, word_count(self.salient, 1)))
        if self.offset:
            specs["_offset"] = TensorSpec(torch.float16, (4 if self.third else 3, blocks, out_features))
        if self.column_scale:
            specs["_column"] = TensorSpec(torch.float16, (2, self.columns))
            if self.third:
                specs["_third_column"] = TensorSpec(torch.float16, (2, self.salient))
        return specs

    def encode(
        self,
        bits: Tensor,
        salient: Tensor,
        scale: Tensor,
        offset: Tensor | None = None,
        column: Tensor | None = None,
        third: Tensor | None = None,
        third_column: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """bits [2, out, columns], salient [columns], third [out, salient] bool; scale [4 or 6, out, blocks], offset
        [3 or 4, out, blocks], column [2, columns], third_column [2, salient] fp16-exact. All join on the last axis."""
        parts = {
            "": pack_fields(bits.to(torch.uint8), 1),
            "_salient": pack_fields(salient.to(torch.uint8), 1),
            "_scale": scale.transpose(1, 2).half().contiguous(),
        }
        if self.third:
            parts["_third"] = pack_fields(third.to(torch.uint8), 1)
        if self.offset:
            parts["_offset"] = offset.transpose(1, 2).half().contiguous()
        if self.column_scale:
            parts["_column"] = column.half().contiguous()
            if self.third:
                parts["_third_column"] = third_column.half().contiguous()
        return parts

    def decode(self, parts: Mapping[str, Tensor], out: Tensor) -> None:
        """Write the meaning of the stored rows into out [rows, columns] fp32."""
        s, second = unpack_fields(parts[""], 1, self.columns)  # [rows, columns]
        mask = unpack_fields(parts["_salient"], 1, self.columns).bool()
        others, salient = (~mask).nonzero()[:, 0], mask.nonzero()[:, 0]
        g, t, u, v = second[:, salient], second[:, salient], parts.get("_column"), parts.get("_third_column")

        def of_block(values: Tensor, columns: Tensor) -> Tensor:  # [., blocks, rows] -> [., rows, columns or 1]
            values = values.float()
            return (values if values.shape[1] == 1 else values[:, columns // self.block]).transpose(1, 2)

        def term(sign: Tensor, scales: slice, g: Tensor, columns: Tensor, factor: Tensor | None) -> Tensor:
            level = of_block(parts["_scale"][scales], columns)
            return _of_group(level if factor is None else level * factor.float()[:, None], g) * (2 * sign - 1)

        out[:, others] = term(s[:, others], slice(0, 2), second[:, others], others, u if u is None else u[:, others])
        first, u = s[:, salient], u if u is None else u[:, salient]
        if self.third:
            t = unpack_fields(parts["_third"], 1, self.salient)
            out[:, salient] = term(first, slice(2, 4), g, salient, u) + term(t, slice(4, 6), g, salient, v)
        else:
            u, v = (None, None) if u is None else (u[:1], u[1:])
            out[:, salient] = term(first, slice(2, 3), g, salient, u) + term(t, slice(3, 4), g, salient, v)
        if self.offset:
            out[:, others] += _of_group(of_block(parts["_offset"][:2], others), second[:, others])
            out[:, salient] += _of_group(of_block(parts["_offset"][2:], salient), g)

    def faults(self, parts: Mapping[str, Tensor]) -> Iterator[tuple[str, str]]:
        yield from super().faults(parts)
        marked = int(unpack_fields(parts["_salient"], 1, self.columns).sum())
        if marked != self.salient:
            yield "_salient", f"marks {marked} columns, expected {self.salient}"

    def random(self, out_features: int, generator: torch.Generator) -> dict[str, Tensor]:
        marks = random_marks(1, self.columns, self.salient, generator)[0]
        return {**super().random(out_features, generator), "_salient": marks}


def _of_group(values: Tensor, g: Tensor) -> Tensor:
    """values [2, rows, columns or 1] of the groups that g [rows, columns] names, or [1, ...] of all."""
    # lerp at 0 and 1 chooses, exactly, and in a fraction of the time of `where`
    return values[0] if len(values) == 1 else torch.lerp(values[0], values[1], g.float())
