"""Sign planes with free scales: 1 to 8 binary planes, the XNOR-Net scale at one.

Rastegari et al.: XNOR-Net, ECCV 2016, arXiv 1603.05279 (a = mean |w|); Lin et al.: Towards Accurate Binary
Convolutional Neural Network, NIPS 2017, arXiv 1711.11294 (several planes); alternating least squares as in Xu et al.:
Alternating Multi-bit Quantization, ICLR 2018, arXiv 1802.00150.

w ~ sum_p a_p b_p, b_p in {-1, +1}, a_p for each row (and group): residual start a_p = sum h|r| / sum h, then alternate
    a = argmin sum_j h_j (w_j - sum_p a_p b_pj)^2  (K x K normal equations a row),   b = nearest of the 2^K levels,
with h_j = 1 / U_jj^2 from the Hessian (without data h = 1), accepted where the weighted error falls. Columns are
compensated as in GPTQ, whose U this is; `refine.py` lowers the whole layer's error further.

`tied` planes have a_p = 2^(K - p) a, one scale to store and fit (our own composition). On Gaussian weights two of them
lose 1 % of what free ones lose, and a GPU unpacks both with one instruction.
"""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field, model_validator
from torch import Tensor

from ultralowbit.format.planes import Planes, TiedPlanes
from ultralowbit.format.weight import Format, PackedWeight
from ultralowbit.methods.base import fields
from ultralowbit.methods.compensate import round_to_nearest
from ultralowbit.methods.refine import refine
from ultralowbit.methods.rounding.signs import SignRounding, TiedSignRounding
from ultralowbit.methods.statistics import InputStats, Need


@fields
class Sign:
    """planes: K sign planes; group: columns that share K scales, null for the row; tied: each scale is half the one
    before it, for 2 or 4 planes; iterations: of the alternating fit, at most; refine: of free scales,
    rounds of joint scales and searched codes, the first while it compensates; damp, act_order: as in GPTQ."""

    needs: ClassVar[Need] = Need.HESSIAN
    method: Literal["sign"] = "sign"
    planes: int = Field(1, ge=1, le=8)
    group: Literal[32, 64, 128] | None = None
    tied: bool = False
    iterations: int = Field(15, ge=0)
    refine: int = Field(0, ge=0)
    damp: float = Field(0.01, gt=0, le=1)
    act_order: bool = False

    @model_validator(mode="after")
    def _can_be_tied(self) -> Sign:
        if self.tied and (self.planes not in (2, 4) or self.refine):
            raise ValueError("tied planes are 2 or 4 planes without refine")
        return self

    def format(self, in_features: int) -> Format:
        return Format(((TiedPlanes if self.tied else Planes)(in_features, self.planes, self.group),))

    def quantize(self, weight: Tensor, stats: InputStats | None) -> PackedWeight:
        kind = TiedSignRounding if self.tied else SignRounding
        rounding = kind(*weight.shape, self.planes, self.group, self.iterations, weight.device)
        if stats is None:
            return round_to_nearest(weight, rounding)
        factor = stats.factor(self.damp, self.act_order)
        return rounding.pack(refine(weight, rounding, factor, self.refine))
