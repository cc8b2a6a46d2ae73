"""The matrices of packed codes that a format's product is a sum of.

A matrix holds `width`-bit codes in the word layout of `format.py`, in blocks of `16 / width * 32` columns. For every
group of columns that shares a scale s and a zero point z it adds

    s * (multiplier * sum_k code_k x_k  -  z * sum_k x_k)  [+ offset * sum_k x_k]

Sign planes are 1-bit codes with multiplier 2 and z = 1; integers have multiplier 1.
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
from ultralowbit.kernels.gpu.launch import cdiv


@dataclass(frozen=True)
class Matrix:
    """Codes of one width over consecutive columns, and the sum that they stand for.

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
