"""Round to nearest: the baseline that needs no data.

q = clamp(round(w / s) + z, 0, 2^b - 1), s = (max - min) / (2^b - 1), z = round(-min / s), for each row and group,
the range widened to include 0.
"""

from __future__ import annotations

from typing import ClassVar, Literal

from torch import Tensor

from ultralowbit.format.ints import Ints
from ultralowbit.format.weight import Format, PackedWeight
from ultralowbit.methods.base import fields
from ultralowbit.methods.compensate import round_to_nearest
from ultralowbit.methods.rounding.ints import IntRounding
from ultralowbit.methods.statistics import InputStats, Need


@fields
class RTN:
    """bits: 2, 3, 4 or 8; group: columns that share a scale, null for the row; clip: `mse` searches the range, and
    which way a symmetric one leans."""

    needs: ClassVar[Need] = Need.NOTHING
    method: Literal["rtn"] = "rtn"
    bits: Literal[2, 3, 4, 8] = 4
    group: Literal[32, 64, 128] | None = 128
    symmetric: bool = False
    clip: Literal["mse"] | None = None

    def format(self, in_features: int) -> Format:
        return Format((Ints(in_features, self.bits, self.group, self.symmetric),))

    def quantize(self, weight: Tensor, stats: InputStats | None) -> PackedWeight:
        rounding = IntRounding(*weight.shape, self.bits, self.group, self.symmetric, self.clip == "mse", weight.device)
        return round_to_nearest(weight, rounding)
