"""What a part of the packed format is: a run of input columns (a segment), outliers, or the input transform."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any, ClassVar, Protocol

from torch import Tensor

from ultralowbit.errors import FormatError
from ultralowbit.format.words import TensorSpec


class Part(Protocol):
    """A frozen dataclass whose fields go into config.json as they are, with `kind`.

    kind: its name in config.json. row_axis: stored tensor -> the axis that its rows lie on, the last one unless named,
    None for what all rows share. columns: input columns.
    """

    kind: ClassVar[str]
    row_axis: ClassVar[Mapping[str, int | None]]
    columns: int

    @property
    def summary(self) -> str:
        """A few characters that name every field."""
        ...

    def tensors(self, out_features: int) -> dict[str, TensorSpec]:
        """Suffix of the name, dtype and shape of everything stored for so many rows; "" is the main tensor."""
        ...

    def encode(self, **parts: Tensor) -> dict[str, Tensor]:
        """What a method has found -> the stored tensors by suffix."""
        ...

    def decode(self, parts: Mapping[str, Tensor], out: Tensor) -> None:
        """Write the meaning of the stored rows into out [rows, columns] fp32. This IS the meaning."""
        ...


class Segment(Part, Protocol):
    """A run of input columns: its `decode` writes all of `out`."""

    @property
    def code_bits(self) -> float:
        """Bits a weight as papers count them: the codes alone."""
        ...


def check_fields(part: Part, **allowed: Sequence[Any]) -> None:
    """Raise `FormatError` for columns or a group below 1, or a field with another value than those allowed."""
    group = getattr(part, "group", None)
    if part.columns < 1 or (group is not None and group < 1):
        raise FormatError(f"columns and group must be positive, got {part}")
    for name, values in allowed.items():
        if getattr(part, name) not in values:
            expected = f"{values[0]} to {values[-1]}" if isinstance(values, range) else f"one of {list(values)}"
            raise FormatError(f"{part.kind}.{name} is {getattr(part, name)!r}, expected {expected}")


def unknown_fields(cls: type, entry: Mapping[str, Any]) -> set[str]:
    """Keys of `entry` that are no fields of the dataclass."""
    return set(entry) - {f.name for f in fields(cls)}
