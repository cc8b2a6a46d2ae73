"""PTQ1.61. Zhao, Zhang, Wang, Shang, Zhang, Guan, Wang, Zhang: PTQ1.61: Push the Real Limit of Extremely Low-Bit
Post-Training Quantization Methods for Large Language Models, ACL 2025, arXiv 2502.13179.

The fifth of the input channels whose largest |x_j| over the calibration text is largest is salient in all rows:

    salient columns   4-bit integers between the smallest and the largest weight of the whole row
    other columns     q_ij = r1_i r2_j (alpha_i sign(w_ij - mu_i) + mu_i),   mu = mean w over them

At 4096 x 4096 that is 1.615 bits with everything stored. What is here is the start, r1 = r2 = 1; the paper then learns
alpha, r1 and r2 block by block, and keeps the signs and mu.

Differences from the published code: it starts at alpha = mean |w|; mean |w - mu| is the least-squares alpha, the same
where rows have no mean, and exact for constant rows. Its threshold lets one channel more in than a fifth; here the
share is the nearest that fills whole words. r1 is no vector of its own: r1 alpha and r1 mu are stored. Where blocks are
tuned the channels are those of the original's activations, as there; else of what the packed blocks before pass on.

`compensation: gptq` is not in the paper. It rounds the columns one by one in the same format, as in GPTQ: first the
others by falling diag H, then the salient columns, which are fine enough to make up for what the signs have left.
Before every pass and after the last, alpha and mu are fitted to the codes: they then leave the least tr(D H D^T) that
the codes can, D = W - Q.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from ultralowbit.format.ints import Ints
from ultralowbit.format.planes import Planes
from ultralowbit.format.transform import InputTransform
from ultralowbit.format.weight import Format, PackedWeight
from ultralowbit.format.words import to_scale
from ultralowbit.methods.base import fields
from ultralowbit.methods.compensate import compensate, round_to_nearest
from ultralowbit.methods.rounding.partly_binary import PartlyBinary
from ultralowbit.methods.statistics import InputStats, Need, SingularHessian

BITS = 4
"""Of the salient columns."""


@fields
class PTQ161:
    """ratio: share of the input channels that is salient; score: of a channel, max |x_j| or mean |x_j|; compensation:
    `gptq`, which needs a Hessian, in so many passes; damp: as in GPTQ."""

    method: Literal["ptq161"] = "ptq161"
    ratio: float = Field(0.2, ge=0, le=1)
    score: Literal["max", "mean"] = "max"
    compensation: Literal["none", "gptq"] = "none"
    passes: int = Field(3, ge=1)
    damp: float = Field(0.01, gt=0, le=1)

    @property
    def needs(self) -> Need:
        return Need.MAGNITUDES if self.compensation == "none" else Need.MAGNITUDES | Need.HESSIAN

    def format(self, in_features: int) -> Format:
        count = self._count(in_features)
        salient = (Ints(count, BITS),) if count else ()
        others = (Planes(in_features - count, 1, offset=True),) if count < in_features else ()
        transform = InputTransform(in_features, channel_order=bool(salient and others), column_scale=True)
        return Format(salient + others, transform=transform)

    def quantize(self, weight: Tensor, stats: InputStats | None) -> PackedWeight:
        salient = self._salient(weight, stats)
        rounding = _SalientColumns(weight, salient, self.format(weight.shape[1]))
        packed = round_to_nearest(weight, rounding)
        if stats is None or self.compensation == "none":
            return packed
        factor = stats.factor(self.damp, act_order=True, last=salient)
        for _ in range(self.passes):
            rounding.refit(weight, stats.hessian)
            compensate(weight, rounding, factor)
        rounding.refit(weight, stats.hessian)
        return rounding.pack(rounding.codes)

    def _count(self, in_features: int) -> int:
        """How many channels are salient: where that is many, whole words of 16 of both kinds."""
        unit = 16 if in_features >= 512 and in_features % 16 == 0 else 1
        return unit * round(self.ratio * in_features / unit)

    def _salient(self, weight: Tensor, stats: InputStats | None) -> Tensor:
        """[in] bool. Without statistics the inputs count as equally large, and |w| decides."""
        if stats is None:
            score = weight.abs().sum(0)
        else:
            score = stats.absmax if self.score == "max" else stats.absmean
            if not score.isfinite().all():
                raise SingularHessian("its activations are not finite (NaN or Inf)")
        order = score.argsort(descending=True, stable=True)
        return torch.zeros_like(score, dtype=torch.bool).index_fill_(0, order[: self._count(len(score))], True)


class _SalientColumns(PartlyBinary):
    """The same columns are salient in every row: they are a segment of their own. `codes` are those packed last."""

    def __init__(self, weight: Tensor, salient: Tensor, format: Format) -> None:
        super().__init__(weight, salient[None], BITS, None)
        self.format, self.salient = format, salient
        super().fit(0, weight.T, None)

    def fit(self, g: int, weight: Tensor, importance: Tensor | None) -> None:
        """The row is the one group, and is fitted before any column is compensated."""

    def refit(self, weight: Tensor, hessian: Tensor) -> None:
        """The least-squares scale and mean of each row for its codes.

        With signs b and ones n in the place of the other columns and t = w less the salient ones, they solve
        [bHb bHn; nHb nHn] (alpha, mu) = (bHt, nHt); a row whose signs are all the same stays as it is.
        """
        high = (self.codes - self.high.zero[0][:, None]).mul_(self.high.scale[0][:, None])
        t = torch.where(self.salient, weight - high, weight)  # [out, in]
        b = torch.where(self.salient, 0.0, 2.0 * (self.codes > 0) - 1)
        n = (~self.salient).float()
        Hb, Hn = b @ hessian, hessian @ n
        bb, bt = (Hb * b).sum(1).double(), (Hb * t).sum(1).double()  # [out]
        bn, nt, nn = (b @ Hn).double(), (t @ Hn).double(), (n @ Hn).double()
        determinant = bb * nn - bn.square()
        scale, mean = (bt * nn - nt * bn) / determinant, (nt * bb - bt * bn) / determinant
        solved = (determinant > 1e-6 * bb * nn) & (scale > 0)
        self.scale[0] = to_scale(torch.where(solved, scale.float(), self.scale[0]))
        self.mean[0] = to_scale(torch.where(solved, mean.float(), self.mean[0]))

    def pack(self, codes: Tensor) -> PackedWeight:
        self.codes = codes
        ints = {"codes": codes[:, self.salient], "scale": self.high.scale.T, "zero": self.high.zero.T}
        planes = {"bits": codes[:, ~self.salient][None] > 0, "scale": self.scale.T[None], "offset": self.mean.T}
        parts = [ints if isinstance(segment, Ints) else planes for segment in self.format.segments]
        transform = {
            "channel_order": self.salient,
            "scale": torch.ones(len(self.salient), dtype=torch.float32, device=codes.device),
        }
        return PackedWeight.encode(self.format, *parts, transform)
