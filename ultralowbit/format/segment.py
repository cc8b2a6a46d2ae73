"""The contract of a part of the packed format: a run of input columns, outliers, or the input transform.

A new segment is a frozen dataclass that inherits `Segment`, and a line in `SEGMENTS` (`format/weight.py`); a new kind
of outliers inherits `Outliers` and has a line in `OUTLIERS`. Nothing else has to know it: files, sizes, checks, the
reference product and loading follow from the methods here. Lines in other tables make it faster (`kernels/`) or
trainable (`FAKE_QUANT`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor

from ultralowbit.errors import FormatError
from ultralowbit.format.words import TensorSpec, pack_fields

BudgetKind = Literal[
    "sign planes",
    "integer codes",
    "salient values",
    "scales and offsets",
    "masks and indices",
    "input transform",
    "other parts",
]
"""What the bytes of a stored part are spent on."""

PART_KINDS: tuple[BudgetKind, ...] = get_args(BudgetKind)


class Part(ABC):
    """A frozen dataclass whose fields go into config.json as they are, beside its `kind`.

    Stored tensors are named by suffixes: "" is the main one, `_scale` its scales, and so on.
    """

    kind: ClassVar[str]
    """Its name in config.json."""

    row_axis: ClassVar[Mapping[str, int | None]] = {}
    """Suffix -> the axis that the rows of the weight lie on, None for what all rows share; the last one if absent."""

    budget: ClassVar[Mapping[str, BudgetKind]] = {}
    """Suffix -> what its bytes are counted as; "other parts" if absent."""

    columns: int
    """Input columns."""

    @property
    @abstractmethod
    def summary(self) -> str:
        """A few characters that name every field."""

    @abstractmethod
    def tensors(self, out_features: int) -> dict[str, TensorSpec]:
        """Suffix -> dtype and shape of everything that is stored for `out_features` rows."""

    @abstractmethod
    def encode(self, **parts: Tensor) -> dict[str, Tensor]:
        """What a method makes (codes, scales, ...) -> the stored tensors by suffix."""

    @abstractmethod
    def decode(self, parts: Mapping[str, Tensor], out: Tensor) -> None:
        """Write what the stored rows mean into out [rows, columns] fp32. This IS the meaning."""

    def faults(self, parts: Mapping[str, Tensor]) -> Iterator[tuple[str, str]]:
        """Suffix and description of every stored tensor whose values no `encode` could have written."""
        for suffix, tensor in parts.items():
            if tensor.is_floating_point() and not tensor.isfinite().all():
                yield suffix, "holds values that are not finite"

    def random(self, out_features: int, generator: torch.Generator) -> dict[str, Tensor]:
        """Random stored tensors for tests and benchmarks, on the generator's device: all codes, random bits in the
        padding too, scales of both signs such that the sums of a row stay near 1."""
        where = {"generator": generator, "device": generator.device}
        parts = {}
        for suffix, (dtype, shape) in self.tensors(out_features).items():
            if dtype.is_floating_point:
                values = torch.randn(shape, dtype=torch.float32, **where)
                parts[suffix] = (values * self.columns**-0.5).to(dtype)
            else:
                limits = torch.iinfo(dtype)
                parts[suffix] = torch.randint(limits.min, limits.max + 1, shape, dtype=dtype, **where)
        return parts


class Segment(Part):
    """A run of input columns: its `decode` writes all of `out`."""

    @property
    @abstractmethod
    def code_bits(self) -> float:
        """Bits a weight as papers count them: the codes alone."""

    def sparsity(self, parts: Mapping[str, Tensor]) -> list[float]:
        """The share of zeros in each plane whose bits mean 0 and 1; empty where there are no such planes."""
        return []


class Outliers(Part):
    """Single weights in the place of what the segments say: its `decode` writes some of `out`."""

    @property
    @abstractmethod
    def share(self) -> float:
        """The share of the weights that is replaced, as papers count it."""


def check_fields(part: Part, **allowed: Sequence[Any]) -> None:
    """Raise `FormatError` for columns or a group below 1, or a field with another value than those allowed."""
    group = getattr(part, "group", None)
    if any(type(n) is not int or n < 1 for n in (part.columns, 1 if group is None else group)):
        raise FormatError(f"columns and group must be positive whole numbers, got {part}")
    for name, values in allowed.items():
        value = getattr(part, name)
        if value not in values or type(value) is not type(values[0]):
            expected = f"{values[0]} to {values[-1]}" if isinstance(values, range) else f"one of {list(values)}"
            raise FormatError(f"{part.kind}.{name} is {value!r}, expected {expected}")


def unknown_fields(cls: type, entry: Mapping[str, Any]) -> set[str]:
    """Keys of `entry` that are no fields of the dataclass."""
    return set(entry) - {f.name for f in fields(cls)}


def random_marks(rows: int, columns: int, counts: Tensor | int, generator: torch.Generator) -> Tensor:
    """Words [rows, words] int16 in which `counts` (one number, or [rows, 1]) random columns of each row are marked."""
    order = (
        torch.rand(rows, columns, generator=generator, dtype=torch.float32, device=generator.device)
        .argsort(1)
        .argsort(1)
    )
    return pack_fields((order < counts).to(torch.uint8), 1)
