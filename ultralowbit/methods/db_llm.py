"""DB-LLM: Chen et al.: DB-LLM: Accurate Dual-Binarization for Efficient LLMs, Findings of ACL 2024, arXiv 2402.11960.

Flexible dual binarization: w ~ a_1 b_1 + a_2 b_2 with b in {0, 1} and two scales for each row and group,

    b_1 = H(w - (a_1 + a_2) / 2),   b_2 = H(-(w - a_1 b_1 - a_2 / 2)),   H(x) = [x >= 0],

which is the nearest of the four levels a_2 < 0 < a_1 + a_2 < a_1. It starts from a 2-bit grid of step s, a_1 = 2 s and
a_2 = -s: the levels -s, 0, s, 2 s. The paper then trains the scales, end to end and with a frozen teacher, by its
deviation-aware distillation (the recipe's `finetune` stage, `blockwise/objectives.py`).

Where the paper is silent or differs: the authors published no code. s is the share of max |w| / 2, to a fortieth, that
leaves the least sum h (w - q)^2 (h from the Hessian where there is compensation, else 1), not all of it, which is far
too large. A group whose longer tail is the negative one takes the mirrored grid. `iterations` of alternating least
squares free the scales before any training, and `compensation` makes up for the error of each column in the later ones
as in GPTQ; both are ours and off by default.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from ultralowbit.format.planes import Planes
from ultralowbit.format.weight import Format, PackedWeight
from ultralowbit.format.words import to_scale
from ultralowbit.methods.base import MIN_SCALE, fields
from ultralowbit.methods.compensate import compensate, round_to_nearest
from ultralowbit.methods.rounding.alternating import AlternatingRounding, Levels
from ultralowbit.methods.statistics import InputStats, Need

_COARSE, _FINE = 8, 4
"""Steps of the grid that are tried evenly, and then on each side of the best one."""


@fields
class DBLLM:
    """group: columns that share two scales, null for the row; iterations: of the alternating fit, at most;
    compensation: none, or that of GPTQ; damp: as in GPTQ."""

    method: Literal["db_llm"] = "db_llm"
    group: Literal[32, 64, 128] | None = 64
    iterations: int = Field(0, ge=0)
    compensation: Literal["none", "gptq"] = "none"
    damp: float = Field(0.01, gt=0, le=1)

    @property
    def needs(self) -> Need:
        return Need.NOTHING if self.compensation == "none" else Need.HESSIAN

    def format(self, in_features: int) -> Format:
        return Format((Planes(in_features, 2, self.group, alphabet="01"),))

    def quantize(self, weight: Tensor, stats: InputStats | None) -> PackedWeight:
        rounding = DualRounding(*weight.shape, self.group, self.iterations, weight.device)
        if stats is None or self.compensation == "none":
            return round_to_nearest(weight, rounding)
        return compensate(weight, rounding, stats.factor(self.damp))


class DualRounding(AlternatingRounding):
    """Two 0/1 planes: the nearest of the levels 0, a_1, a_2, a_1 + a_2 of a group, started from the 2-bit grid."""

    def __init__(self, out: int, columns: int, group: int | None, iterations: int, device: torch.device) -> None:
        super().__init__(out, columns, 2, group, iterations, device)
        self.segment = Planes(columns, 2, group, alphabet="01")

    def plane(self, codes: Tensor, p: int) -> Tensor:
        return ((codes >> p) & 1).float()

    def _start(self, weight: Tensor, h: Tensor) -> Tensor:
        half = weight.abs().amax(0) / 2  # [out]
        best = torch.full_like(half, torch.inf)
        scale = weight.new_zeros(2, weight.shape[1])

        def attempt(s: Tensor, sign: Tensor | int) -> None:
            nonlocal best, scale
            s = to_scale(s).clamp_min_(MIN_SCALE) * sign
            q = (weight / s).round_().clamp_(-1, 2).mul_(s)
            error = h @ q.sub_(weight).square_()
            better = error < best
            best = torch.where(better, error, best)
            scale = torch.where(better, torch.stack([2 * s, -s]), scale)

        for i in range(1, _COARSE + 1):
            for sign in (1, -1):
                attempt(half * (i / _COARSE), sign)
        middle, sign = scale[1].abs(), scale[0].sign()
        for i in range(1, _FINE + 1):
            for side in (1, -1):
                attempt(middle + side * i / (_FINE + 1) * half / _COARSE, sign)
        return scale

    def _least_squares(self, codes: Tensor, weight: Tensor, h: Tensor) -> Tensor:
        return self._free(codes, weight, h)

    def _table(self, scale: Tensor) -> Levels:
        return Levels.of(scale, 0)
