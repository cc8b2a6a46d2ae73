"""Salient weights as integers, the others as signs."""

from __future__ import annotations

import torch
from torch import Tensor

from ultralowbit.format.words import group_count, to_scale
from ultralowbit.methods.rounding.ints import IntRounding


class PartlyBinary:
    """Salient weights as integers of `bits` bits between the ends of their whole row; the others of a group at their
    mean -+ their mean distance from it. salient: [out, in], or [1, in] where all rows have the same.

    A subclass says how the codes are packed; a code of a weight that is not salient is its sign, 0 or 1.
    """

    def __init__(self, weight: Tensor, salient: Tensor, bits: int, group: int | None) -> None:
        (out, columns), device = weight.shape, weight.device
        self.group = group
        self.low = (~salient.T).float(memory_format=torch.contiguous_format)  # [in, out or 1], 1 or 0
        self.high = IntRounding(out, columns, bits, None, False, False, device)
        self.high.fit(0, weight.T, None)
        groups = group_count(columns, group)
        self.mean = torch.zeros(groups, out, dtype=torch.float32, device=device)
        self.scale = torch.zeros(groups, out, dtype=torch.float32, device=device)

    def fit(self, g: int, weight: Tensor, importance: Tensor | None) -> None:
        start = g * (self.group or 0)
        low = self.low[start : start + len(weight)]  # [columns, out or 1]
        count = low.sum(0).clamp_min(1)
        self.mean[g] = mean = to_scale((weight * low).sum(0) / count)
        self.scale[g] = to_scale(((weight - mean).abs_() * low).sum(0) / count)

    def round(self, g: int, weight: Tensor, first: int = 0) -> tuple[Tensor, Tensor]:
        mean = self.mean[g]
        low = self.low[first] if weight.dim() == 1 else self.low[first : first + len(weight)]
        centred = weight - mean
        codes, values = self.high.round(0, weight)
        # lerp at 0 and 1 chooses, exactly, and in a fraction of the time of `where`
        value = torch.lerp(values, torch.copysign(self.scale[g], centred).add_(mean), low)
        return torch.lerp(codes, (centred >= 0).float(), low), value

    def table(self, g: int) -> None:
        """Columns of a group have different levels."""
