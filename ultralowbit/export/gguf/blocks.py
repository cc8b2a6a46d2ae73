"""Block types of llama.cpp: which of them hold a packed weight exactly, and its bytes in one of them.

A weight of one segment without outliers or input transform is whole numbers times fp16 scales. A block type stores a
scale d for every 32, 64 or 128 weights of a row, and codes from a small grid. d may be negative, so that the 2-bit grid
{-1, 0, 1, 2} d holds {-2, -1, 0, 1} s too, with d = -s.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from ultralowbit.format.ints import Ints
from ultralowbit.format.planes import Planes, TiedPlanes
from ultralowbit.format.segment import Segment
from ultralowbit.format.weight import Format, PackedWeight
from ultralowbit.format.words import unpack_fields


@dataclass(frozen=True)
class Multiples:
    """A weight [out, in] as whole numbers times scale [out, groups, 1] fp16, whose groups have `group` columns.

    low, high: what the numbers of each group lie between, [out, groups, 1] int16. signs: all of them are -1 or 1.
    """

    packed: PackedWeight
    scale: Tensor
    group: int
    low: Tensor
    high: Tensor
    signs: bool

    @classmethod
    def of(cls, packed: PackedWeight) -> Multiples | None:
        """None for a weight that is no such product: several free planes, an offset, outliers, an input transform."""
        if not is_product(packed.format):
            return None
        segment, tensors = packed.format.segments[0], packed.tensors
        scale = tensors["weight_scale"][0] if isinstance(segment, Planes) else tensors["weight_scale"]
        scale = scale.T[..., None]
        low, high = _bounds(segment, tensors)
        low, high = (torch.as_tensor(x, dtype=torch.int16).expand(scale.shape) for x in (low, high))
        signs = isinstance(segment, Planes) and segment.alphabet == "pm1"
        return cls(packed, scale, segment.group or segment.columns, low, high, signs)

    def numbers(self) -> Tensor:
        """The whole numbers [out, in] int16."""
        segment, tensors = self.packed.format.segments[0], self.packed.tensors
        if isinstance(segment, Planes):
            bits = unpack_fields(tensors["weight"][0], 1, segment.columns)
            return 2 * bits - 1 if segment.alphabet == "pm1" else bits
        if isinstance(segment, TiedPlanes):
            return 2 * unpack_fields(tensors["weight"], segment.planes, segment.columns) + self.low[0, 0]
        lowest = self.low[..., 0].repeat_interleave(self.group, dim=1)[:, : segment.columns]
        return segment.unpack_codes(tensors["weight"]) + lowest

    def by_block(self, values: Tensor, size: int) -> Tensor:
        """Values [out, groups, 1] of the groups -> those [out, blocks, 1] of the blocks of `size` columns in them."""
        return values[:, torch.arange(0, self.packed.shape[1], size) // self.group]


def is_product(format: Format) -> bool:
    """Whether all that a format can store is whole numbers times one scale a group."""
    segment = format.segments[0]
    if len(format.segments) > 1 or format.outliers is not None or format.transform is not None:
        return False
    if isinstance(segment, Planes):
        return segment.planes == 1 and not segment.offset
    return isinstance(segment, TiedPlanes | Ints)


def _bounds(segment: Segment, tensors: dict[str, Tensor]) -> tuple[Tensor | int, Tensor | int]:
    """The least and the largest number that the codes of each group can stand for."""
    if isinstance(segment, Planes):
        return (-1 if segment.alphabet == "pm1" else 0), 1
    if isinstance(segment, TiedPlanes):
        top = 2**segment.planes - 1
        return -top, top
    if segment.symmetric:
        low = torch.tensor(-(2 ** (segment.bits - 1)), dtype=torch.int16)
    else:
        low = -segment.unpack_zero(tensors["weight_zero"]).T[..., None].to(torch.int16)
    return low, low + 2**segment.bits - 1


class BlockType(ABC):
    """A type of ggml: its number in a file, the weights of a block, and the bytes that it takes."""

    name: str
    number: int
    file_type: int
    """llama.cpp's number for a file whose weights are mostly of this type."""
    size: int
    bytes: int

    def holds(self, weight: Multiples) -> bool:
        """Whether blocks of this type mean exactly this weight, for whatever codes it stores."""
        columns = weight.packed.shape[1]
        aligned = columns % self.size == 0 and (weight.group % self.size == 0 or weight.group >= columns)
        return aligned and self._fits(weight)

    def encode(self, weight: Multiples) -> Tensor:
        """The bytes [out, row bytes] uint8 of a weight that it holds."""
        numbers = weight.numbers().unflatten(1, (-1, self.size))  # [out, blocks, size]
        codes, *fields = self._codes(weight, numbers)
        fields = [field.contiguous().view(torch.uint8) for field in fields]  # [out, blocks, 2]
        return torch.cat([*fields, self._pack(codes.to(torch.uint8))], dim=-1).flatten(1)

    @property
    def bits(self) -> float:
        """Bits a weight, all counted."""
        return 8 * self.bytes / self.size

    def bytes_of(self, shape: tuple[int, int]) -> int:
        """The bytes of a whole weight."""
        return shape[0] * shape[1] // self.size * self.bytes

    @abstractmethod
    def _fits(self, weight: Multiples) -> bool:
        """Whether its grid has the numbers of every group."""

    @abstractmethod
    def _codes(self, weight: Multiples, numbers: Tensor) -> tuple[Tensor, ...]:
        """Codes [out, blocks, size] and the fp16 fields [out, blocks, 1] that stand before them."""

    @abstractmethod
    def _pack(self, codes: Tensor) -> Tensor:
        """Codes [..., size] uint8 -> their bytes [..., n]."""


class Signs(BlockType):
    """The signs of one scale."""

    name, number, file_type, size, bytes = "Q1_0", 41, 40, 128, 18

    def _fits(self, weight: Multiples) -> bool:
        return weight.signs

    def _codes(self, weight: Multiples, numbers: Tensor) -> tuple[Tensor, ...]:
        return numbers > 0, weight.by_block(weight.scale, self.size)

    def _pack(self, codes: Tensor) -> Tensor:
        return _share_bytes(codes, 1)


class Grid(BlockType):
    """Numbers from `low` to `high` times one scale, or the opposite numbers times the opposite scale."""

    low: int
    high: int

    def _straight(self, weight: Multiples) -> Tensor:
        return (weight.low >= self.low) & (weight.high <= self.high)

    def _fits(self, weight: Multiples) -> bool:
        turned = (-weight.high >= self.low) & (-weight.low <= self.high)
        return bool((self._straight(weight) | turned).all())

    def _codes(self, weight: Multiples, numbers: Tensor) -> tuple[Tensor, ...]:
        straight = weight.by_block(self._straight(weight), self.size)
        scale = weight.by_block(weight.scale, self.size)
        return torch.where(straight, numbers, -numbers) - self.low, torch.where(straight, scale, -scale)


class Two(Grid):
    """Four weights share a byte, the first in its lowest bits."""

    name, number, file_type, size, bytes = "Q2_0", 42, 41, 64, 18
    low, high = -1, 2

    def _pack(self, codes: Tensor) -> Tensor:
        return _share_bytes(codes, 2)


class Four(Grid):
    """Weight j of the first half of a block shares a byte with weight j of the second."""

    name, number, file_type, size, bytes = "Q4_0", 2, 2, 32, 18
    low, high = -8, 7

    def _pack(self, codes: Tensor) -> Tensor:
        return _share_halves(codes)


class FourOffset(BlockType):
    """Codes from 0 to 15 times a scale, and a minimum."""

    name, number, file_type, size, bytes = "Q4_1", 3, 3, 32, 20

    def _fits(self, weight: Multiples) -> bool:
        minimum = weight.low * weight.scale.float()
        return bool((weight.high - weight.low <= 15).all() and (minimum.half() == minimum).all())

    def _codes(self, weight: Multiples, numbers: Tensor) -> tuple[Tensor, ...]:
        low, scale = weight.by_block(weight.low, self.size), weight.by_block(weight.scale, self.size)
        return numbers - low, scale, (low * scale.float()).half()

    def _pack(self, codes: Tensor) -> Tensor:
        return _share_halves(codes)


class Eight(Grid):
    """A signed byte a weight."""

    name, number, file_type, size, bytes = "Q8_0", 8, 7, 32, 34
    low, high = -128, 127

    def _pack(self, codes: Tensor) -> Tensor:
        return codes ^ 128  # code - 128 in two's complement


def _share_bytes(codes: Tensor, width: int) -> Tensor:
    """Neighbours share a byte, the first in its lowest bits."""
    shifts = torch.arange(0, 8, width, dtype=torch.uint8)
    return (codes.unflatten(-1, (-1, 8 // width)) << shifts).sum(-1, dtype=torch.uint8)


def _share_halves(codes: Tensor) -> Tensor:
    low, high = codes.chunk(2, dim=-1)
    return low | (high << 4)


BLOCK_TYPES = (Signs(), Two(), Four(), FourOffset(), Eight())
"""From the fewest bits a weight to the most."""


def exact_type(weight: Multiples) -> BlockType | None:
    """The smallest block type that holds the weight exactly, None where none does."""
    return next((kind for kind in BLOCK_TYPES if kind.holds(weight)), None)
