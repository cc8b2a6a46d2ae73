"""Single weights at 8 bits in the place of what the segments say."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ultralowbit.errors import FormatError
from ultralowbit.format.segment import BudgetKind, Outliers, check_fields, random_marks
from ultralowbit.format.words import TensorSpec, pack_fields, unpack_fields, word_count


@dataclass(frozen=True)
class IndexedOutliers(Outliers):
    """Single weights at 8 bits in the place of what the segments say: w = (value - zero) * scale.

    Each row has `count` of them in every `block` columns, and ceil(count * rest / block) in a shorter last block.
    Stored by rising column: index in the block uint8 [entries, out]; value uint8 [entries, out]; and a row's scale fp16
    [1, out] and zero uint8 [1, out].
    """

    kind: ClassVar[str] = "indexed_outliers"
    budget: ClassVar[Mapping[str, BudgetKind]] = {
        "_index": "masks and indices", "_value": "salient values", "_scale": "scales and offsets",
        "_zero": "scales and offsets",
    }  # fmt: skip
    columns: int
    count: int
    block: int = 256

    def __post_init__(self) -> None:
        check_fields(self, block=range(1, 257))
        check_fields(self, count=range(1, self.block + 1))

    @property
    def summary(self) -> str:
        return f"{self.count}of{self.block}xint8"

    @property
    def blocks(self) -> list[tuple[int, int, int]]:
        """First column, columns and entries of each block."""
        starts = range(0, self.columns, self.block)
        sizes = [min(self.block, self.columns - start) for start in starts]
        return [(start, size, -(-self.count * size // self.block)) for start, size in zip(starts, sizes, strict=True)]

    @property
    def share(self) -> float:
        return sum(entries for _, _, entries in self.blocks) / self.columns

    def tensors(self, out_features: int) -> dict[str, TensorSpec]:
        entries = sum(entries for _, _, entries in self.blocks)
        return {
            "_index": TensorSpec(torch.uint8, (entries, out_features)),
            "_value": TensorSpec(torch.uint8, (entries, out_features)),
            "_scale": TensorSpec(torch.float16, (1, out_features)),
            "_zero": TensorSpec(torch.uint8, (1, out_features)),
        }

    def encode(self, mask: Tensor, codes: Tensor, scale: Tensor, zero: Tensor) -> dict[str, Tensor]:
        """mask [out, columns] bool; codes [out, columns] uint8, read where the mask is set; scale [out] fp16-exact,
        zero [out] whole numbers."""
        index, value = [], []
        for start, size, entries in self.blocks:
            part = mask[:, start : start + size]
            if (part.sum(1) != entries).any():
                raise FormatError(f"{self.summary} holds {entries} weights in columns {start} to {start + size - 1}")
            at = part.nonzero()[:, 1].view(len(mask), entries)
            index.append(at.T.to(torch.uint8))
            value.append(codes[:, start : start + size].gather(1, at).T)
        return {"_index": torch.cat(index), "_value": torch.cat(value), **_row_grid(scale, zero)}

    def decode(self, parts: Mapping[str, Tensor], out: Tensor) -> None:
        """Replace what out [rows, columns] fp32 holds at the stored columns."""
        first = [
            torch.full((entries, 1), start, device=out.device, dtype=torch.int64) for start, _, entries in self.blocks
        ]
        out.scatter_(1, (parts["_index"] + torch.cat(first)).T, _grid_values(parts))

    def faults(self, parts: Mapping[str, Tensor]) -> Iterator[tuple[str, str]]:
        yield from super().faults(parts)
        of_block = parts["_index"].int().split([entries for _, _, entries in self.blocks])
        for (start, size, _), index in zip(self.blocks, of_block, strict=True):
            if (index >= size).any() or (index.diff(dim=0) <= 0).any():
                yield "_index", f"does not rise below {size} in the columns from {start} on"
                return

    def random(self, out_features: int, generator: torch.Generator) -> dict[str, Tensor]:
        index = []
        for _, size, entries in self.blocks:
            order = torch.rand(size, out_features, generator=generator, dtype=torch.float32, device=generator.device)
            index.append(order.argsort(0)[:entries].sort(0).values.to(torch.uint8))
        return {**super().random(out_features, generator), "_index": torch.cat(index)}


@dataclass(frozen=True)
class MaskedOutliers(Outliers):
    """Like `IndexedOutliers`, for any number of weights in a row: a bit for each weight says whether it is replaced.

    Stored: mask words int16 [out, words]; value uint8 [capacity, out], of the row's set bits by rising column, zeros
    after the last; scale fp16 [1, out]; zero uint8 [1, out]. `ratio` is the share of the whole weight that is meant to
    be replaced: bits that papers claim come from it, stored ones from `capacity`, which is that of the fullest row.
    """

    kind: ClassVar[str] = "masked_outliers"
    row_axis: ClassVar[Mapping[str, int | None]] = {"_mask": -2}
    budget: ClassVar[Mapping[str, BudgetKind]] = {
        "_mask": "masks and indices", "_value": "salient values", "_scale": "scales and offsets",
        "_zero": "scales and offsets",
    }  # fmt: skip
    columns: int
    capacity: int
    ratio: float

    def __post_init__(self) -> None:
        check_fields(self, capacity=range(1, self.columns + 1))
        if not 0 <= self.ratio <= 1:
            raise FormatError(f"masked_outliers.ratio is {self.ratio!r}, expected a share from 0 to 1")

    @property
    def summary(self) -> str:
        return f"{self.capacity}xint8/masked({self.ratio:g})"

    @property
    def share(self) -> float:
        return self.ratio

    def tensors(self, out_features: int) -> dict[str, TensorSpec]:
        return {
            "_mask": TensorSpec(torch.int16, (out_features, word_count(self.columns, 1))),
            "_value": TensorSpec(torch.uint8, (self.capacity, out_features)),
            "_scale": TensorSpec(torch.float16, (1, out_features)),
            "_zero": TensorSpec(torch.uint8, (1, out_features)),
        }

    def encode(self, mask: Tensor, codes: Tensor, scale: Tensor, zero: Tensor) -> dict[str, Tensor]:
        """As `IndexedOutliers.encode`."""
        if (fullest := int(mask.sum(1).max())) > self.capacity:
            raise FormatError(f"{self.summary} holds {self.capacity} weights a row, a row of the mask has {fullest}")
        value = codes.new_zeros(len(mask), self.capacity)
        value[self._used(mask)] = codes[mask]  # both in order of rows, then columns
        parts = {"_mask": pack_fields(mask.to(torch.uint8), 1), "_value": value.T.contiguous()}
        return parts | _row_grid(scale, zero)

    def decode(self, parts: Mapping[str, Tensor], out: Tensor) -> None:
        """Replace what out [rows, columns] fp32 holds where the mask is set."""
        mask = unpack_fields(parts["_mask"], 1, self.columns).bool()
        out[mask] = _grid_values(parts)[self._used(mask)]

    def faults(self, parts: Mapping[str, Tensor]) -> Iterator[tuple[str, str]]:
        yield from super().faults(parts)
        fullest = int(unpack_fields(parts["_mask"], 1, self.columns).sum(1).max())
        if fullest > self.capacity:
            yield "_mask", f"marks {fullest} weights of a row, expected at most {self.capacity}"

    def random(self, out_features: int, generator: torch.Generator) -> dict[str, Tensor]:
        counts = torch.randint(self.capacity + 1, (out_features, 1), generator=generator, device=generator.device)
        mask = random_marks(out_features, self.columns, counts, generator)
        return {**super().random(out_features, generator), "_mask": mask}

    def _used(self, mask: Tensor) -> Tensor:  # [rows, columns] -> [rows, capacity] bool
        return torch.arange(self.capacity, device=mask.device) < mask.sum(1, keepdim=True)


def _row_grid(scale: Tensor, zero: Tensor) -> dict[str, Tensor]:
    return {"_scale": scale[None].half(), "_zero": zero[None].to(torch.uint8)}


def _grid_values(parts: Mapping[str, Tensor]) -> Tensor:
    """The values [rows, entries] fp32 that are stored."""
    return ((parts["_value"].float() - parts["_zero"].float()) * parts["_scale"].float()).T
