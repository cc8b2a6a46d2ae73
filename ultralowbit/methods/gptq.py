"""GPTQ. Frantar, Ashkboos, Hoefler, Alistarh: GPTQ: Accurate Post-Training Quantization for Generative Pre-trained
Transformers, ICLR 2023, arXiv 2210.17323.

H = 2/T X X^T + damp mean(diag H) I;  H^-1 = U^T U;  column by column q_j = round(w_j), e_j = (w_j - q_j) / U_jj,
W[:, j+1:] -= e_j U[j, j+1:]   (equations 2 and 3, algorithm 1).

Differences from the published code: scales are rounded to the stored fp16 before the codes are chosen; a group shorter
than the code's block of 128 is fitted to weights that the whole block so far has compensated; a channel that is zero on
all calibration text keeps its rounded weights instead of losing them; a failed Cholesky factorisation is tried again
with ten times the damping. `refine.py`, which is ours, lowers the whole layer's error further.
"""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field
from torch import Tensor

from ultralowbit.format.ints import Ints
from ultralowbit.format.weight import Format, PackedWeight
from ultralowbit.methods.base import fields
from ultralowbit.methods.compensate import round_to_nearest
from ultralowbit.methods.refine import refine
from ultralowbit.methods.rounding.ints import IntRounding
from ultralowbit.methods.statistics import InputStats, Need


@fields
class GPTQ:
    """bits: 2, 3, 4 or 8; group: columns that share a scale, null for the row; damp: share of mean(diag H) added to the
    diagonal; act_order: columns by falling diag H, with static groups; clip: `mse` searches the range of a group, and
    which way a symmetric one leans; refine: rounds of joint scales and searched codes, the first while it
    compensates."""

    needs: ClassVar[Need] = Need.HESSIAN
    method: Literal["gptq"] = "gptq"
    bits: Literal[2, 3, 4, 8] = 4
    group: Literal[32, 64, 128] | None = 128
    symmetric: bool = False
    damp: float = Field(0.01, gt=0, le=1)
    act_order: bool = False
    clip: Literal["mse"] | None = None
    refine: int = Field(0, ge=0)

    def format(self, in_features: int) -> Format:
        return Format((Ints(in_features, self.bits, self.group, self.symmetric),))

    def quantize(self, weight: Tensor, stats: InputStats | None) -> PackedWeight:
        rounding = IntRounding(*weight.shape, self.bits, self.group, self.symmetric, self.clip == "mse", weight.device)
        if stats is None:
            return round_to_nearest(weight, rounding)
        factor = stats.factor(self.damp, self.act_order)
        return rounding.pack(refine(weight, rounding, factor, self.refine))
