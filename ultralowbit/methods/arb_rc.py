"""ARB-LLM_RC with its column-group bitmap. Li, Yan, Zhang, Qin, Xie, Tian, Shi, Kong, Zhang, Yang: ARB-LLM: Alternating
Refined Binarizations for Large Language Models, ICLR 2025, arXiv 2410.03129.

Blocks, salient columns, the break |w| < p and the compensation are BiLLM's (see `billm`); here the salient columns have
a break of their own (`cgb`), which makes four groups of weights. In each, with one scale a row, one a column, no mean,

    other columns     W ~ r_i u_j s_ij                         s = sign W
    salient columns   W ~ r_i u_j s_ij + q_i v_j t_ij          t = sign(W - r u s)

start   r_i = mean_j |w_ij|,  u_j = mean_i |w_ij / r_i|,  means over the group; q and v alike for what r u s leaves
repeat  r_i = sum_j y_ij u_j s_ij / sum_j u_j^2,  u_j = sum_i y_ij r_i s_ij / sum_i r_i^2,  y = W, or W - q v t;
        then t anew, and q and v alike for y = W - r u s.

The code was never released, so this follows the paper alone; it leaves open the order of the steps of the second term
(each follows the first here, in every iteration) and whether groups share their column scales (here each has its own).
Scales are rounded to the stored fp16: first those of the columns, then those of the rows, fitted to them once more.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from ultralowbit.format.salient import SalientSplit
from ultralowbit.format.weight import Format, PackedWeight
from ultralowbit.format.words import to_scale
from ultralowbit.methods.base import fields
from ultralowbit.methods.billm import Parts, break_of, quantize_blocks, salient_columns, sample
from ultralowbit.methods.statistics import InputStats, Need


@fields
class ARBRC:
    """iterations: of the alternation; cgb: a break for the salient columns too; the others: as in BiLLM."""

    needs: ClassVar[Need] = Need.HESSIAN
    method: Literal["arb_rc"] = "arb_rc"
    iterations: int = Field(15, ge=0)
    cgb: bool = True
    block: Literal[32, 64, 128, 256] = 128
    compensation: Literal["diagonal", "exact"] = "diagonal"
    damp: float = Field(0.01, gt=0, le=1)

    def format(self, in_features: int) -> Format:
        """How many columns are salient depends on data, and with `cgb` the size on how many: 8 % are expected."""
        salient = max(1, round(0.08 * in_features))
        return Format((SalientSplit(in_features, salient, self.block, third=self.cgb, column_scale=True),))

    def quantize(self, weight: Tensor, stats: InputStats | None) -> PackedWeight:
        factor = None if stats is None else stats.factor(self.damp)
        return quantize_blocks(weight, factor, self.block, self.compensation == "exact", self._fit)

    def _fit(self, weight: Tensor, pivots: Tensor) -> Parts:
        salient = salient_columns(weight, pivots)  # [columns]
        few, sizes, kept = sample(weight), weight.abs(), weight[:, salient]
        sparse = (sizes >= break_of(few[:, ~salient])) & ~salient
        if self.cgb:
            sparse[:, salient] = kept.abs() >= break_of(few[:, salient])
        second_group = sparse.float()
        masks = (1 - second_group, second_group)  # of both groups [out, columns], 1 or 0
        single = [_Term(weight, mask * ~salient) for mask in masks]
        for term in single:
            size = sizes * term.mask
            for _ in range(self.iterations):
                if not term.refine(size):
                    break
            term.store(size)

        masks = [mask[:, salient] for mask in (masks if self.cgb else masks[:1])]
        first = [_Term(kept, mask) for mask in masks]
        second = [_Term(kept - term.value, mask) for term, mask in zip(first, masks, strict=True)]
        for a, b in zip(first, second, strict=True):
            for _ in range(self.iterations):
                moved = a.refine(a.along(kept - b.value))
                rest = kept - a.value
                b.point(rest)
                if not (b.refine(b.along(rest)) or moved):
                    break
            a.store(a.along(kept - b.value))
            rest = kept - a.value
            b.point(rest)
            b.store(b.along(rest))

        column = torch.stack([term.column for term in single])  # [2, columns], 0 for the salient ones
        column[:, salient] = torch.stack([term.column for term in (first if self.cgb else first + second)])
        t = sum(term.sign for term in second) > 0
        parts = {
            "bits": torch.stack([weight >= 0, sparse]),
            "salient": salient,
            "scale": torch.stack([term.row for term in single + first + second])[..., None],
            "column": column,
        }
        if self.cgb:
            return parts | {"third": t, "third_column": torch.stack([term.column for term in second])}
        parts["bits"][1, :, salient] = t
        return parts


class _Term:
    """row_i column_j sign_ij on a group of the weights [out, columns]."""

    def __init__(self, weight: Tensor, mask: Tensor) -> None:
        """mask [out, columns] is 1 in the group, else 0."""
        self.mask = mask
        self.point(weight)
        size = self.along(weight)
        self.row = _ratio(size.sum(1), mask.sum(1))  # [out]
        self.column = _ratio(_ratio(size, self.row[:, None]).sum(0), mask.sum(0))  # [columns]

    @property
    def value(self) -> Tensor:
        return (self.row[:, None] * self.column).mul_(self.sign)

    def point(self, target: Tensor) -> None:
        """Take the signs of a target [out, columns], in the group, else 0."""
        self.sign = self.mask.copysign(target + 0)  # -0 is 0

    def along(self, target: Tensor) -> Tensor:
        """How far a target [out, columns] goes in the direction of the signs."""
        return target * self.sign

    def refine(self, size: Tensor) -> bool:
        """One alternation, for a target `along` the signs; whether it moved a column's scale, from which the next rows'
        follow, by more than fp16 can tell."""
        column = self.column
        self.row = _ratio(size @ column, self.mask @ column.square())
        self.column = _ratio(self.row @ size, self.row.square() @ self.mask)
        return bool(((self.column - column).abs() > 2**-12 * column.abs()).any())

    def store(self, size: Tensor) -> None:
        """Round the scales to those that are stored."""
        self.column = to_scale(self.column)
        self.row = to_scale(_ratio(size @ self.column, self.mask @ self.column.square()))


def _ratio(a: Tensor, b: Tensor) -> Tensor:
    """a / b, and 0 where both are: rows, columns and groups may be empty."""
    return a / b.clamp_min(torch.finfo(b.dtype).tiny)
