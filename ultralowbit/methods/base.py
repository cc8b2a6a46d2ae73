"""What all methods share: the protocols of a method and of a rounding."""

from __future__ import annotations

from typing import Protocol

from pydantic import ConfigDict
from pydantic.dataclasses import dataclass
from torch import Tensor

from ultralowbit.format.weight import Format, PackedWeight
from ultralowbit.methods.statistics import InputStats, Need

MIN_SCALE = 2.0**-24
"""Smallest positive fp16: a scale that rounded to 0 could not be divided by."""


fields = dataclass(frozen=True, config=ConfigDict(extra="forbid", allow_inf_nan=False))
"""Makes a class a frozen dataclass whose fields are validated recipe keys."""


class Method(Protocol):
    """A quantization method: a frozen dataclass whose fields are the recipe's keys, with the paper's values."""

    @property
    def needs(self) -> Need:
        """What `quantize` reads of the statistics; a class attribute where no field decides it."""
        ...

    def format(self, in_features: int) -> Format:
        """How a weight with `in_features` columns will be stored; where that depends on data, a likely format."""
        ...

    def quantize(self, weight: Tensor, stats: InputStats | None) -> PackedWeight:
        """weight [out, in] fp32, not modified; stats of its inputs, None to round to nearest without them.

        Raises `ultralowbit.stats.SingularHessian` where the statistics cannot be used.
        """
        ...


class Rounding(Protocol):
    """How weights become codes: parameters for each group of columns, then the nearest code."""

    group: int | None

    def fit(self, g: int, weight: Tensor, importance: Tensor | None) -> None:
        """Choose the parameters of group g for weight [columns, out]; importance [columns] > 0 weighs the columns."""
        ...

    def round(self, g: int, weight: Tensor, first: int = 0) -> tuple[Tensor, Tensor]:
        """weight [columns, out], or [out] for one column, of group g -> (codes, whole numbers of any dtype, the values
        they stand for), both in its shape. `first` is the place of the first column in the original weight."""
        ...

    def table(self, g: int) -> Tensor | None:
        """The levels of group g, rising, [levels, out]: a code stands for one of them. None where they are more than a
        few, or not the same for all columns."""
        ...

    def pack(self, codes: Tensor) -> PackedWeight:
        """codes [out, in] uint8 and the parameters of all groups -> the packed weight."""
        ...
