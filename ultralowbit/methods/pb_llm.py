"""PB-LLM, its post-training form PB-GPTQ. Shang, Yuan, Wu, Dong: PB-LLM: Partially Binarized Large Language Models,
ICLR 2024, arXiv 2310.00034.

The salient share of the weights, by w_ij^2 / U_jj^2 or |w_ij|, is kept at 8 bits, asymmetric between the smallest and
largest weight of its row; the others are binarised for each row (and group):

    q = mu + alpha sign(w - mu),   mu = mean w,   alpha = mean |w - mu|,   means over the binarised weights.

Which weights are salient is fixed on the original weights; columns are then compensated as in GPTQ, for the errors of
both kinds.

Differences from the published code: its means count the salient weights as zeros and divide by all columns, which
shrinks mu and adds |mu| to alpha; the paper writes the salience with [H^-1]_jj^2, the code with U_jj^2, as here; scales
are rounded to the stored fp16 before the signs are chosen. The code, which stores nothing, takes as salient what
exceeds one order statistic of the whole matrix (or group of columns): that is `selection: threshold`, packed with a bit
a weight for the mask and as many bytes in each row as the fullest one needs. `count` takes the same share of every row
and 256 columns instead: a salient weight then costs 8 bits for its place and 8 for its value. The paper's 1.7 bits at
10 % leave the places out.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from ultralowbit.format.outliers import IndexedOutliers, MaskedOutliers
from ultralowbit.format.planes import Planes
from ultralowbit.format.weight import Format, PackedWeight
from ultralowbit.methods.base import fields
from ultralowbit.methods.compensate import compensate, round_to_nearest
from ultralowbit.methods.rounding.partly_binary import PartlyBinary
from ultralowbit.methods.statistics import Factor, InputStats, Need

BLOCK = 256
"""Columns in which `count` takes the same number of weights from every row: their places are bytes."""


@fields
class PBLLM:
    """ratio: share of the weights kept at 8 bits; salience, selection: which those are; group: columns that share a
    mean and scale, and with `threshold` an order statistic, null for the row; compensation: of GPTQ, or none, from
    where the paper's training mode starts; damp: as in GPTQ."""

    method: Literal["pb_llm"] = "pb_llm"
    ratio: float = Field(0.1, ge=0, le=1)
    salience: Literal["hessian", "magnitude"] = "hessian"
    selection: Literal["count", "threshold"] = "count"
    group: Literal[32, 64, 128] | None = None
    compensation: Literal["gptq", "none"] = "gptq"
    damp: float = Field(0.01, gt=0, le=1)

    @property
    def needs(self) -> Need:
        return Need.NOTHING if self.compensation == "none" and self.salience == "magnitude" else Need.HESSIAN

    def format(self, in_features: int) -> Format:
        """With `threshold` the fullest row is not known before: its share of salient weights is taken to be `ratio`."""
        if self.selection == "threshold":
            return self._format(in_features, math.ceil(self.ratio * in_features))
        return self._format(in_features, round(self.ratio * BLOCK))

    def _format(self, columns: int, count: int) -> Format:
        outliers = None
        if count:
            threshold = self.selection == "threshold"
            outliers = (
                MaskedOutliers(columns, count, self.ratio) if threshold else IndexedOutliers(columns, count, BLOCK)
            )
        return Format((Planes(columns, 1, self.group, offset=True),), outliers)

    def quantize(self, weight: Tensor, stats: InputStats | None) -> PackedWeight:
        factor = stats.factor(self.damp) if stats is not None and self.needs else None
        salient = self._salient(weight, factor)
        count = int(salient.sum(1).max()) if self.selection == "threshold" else round(self.ratio * BLOCK)
        rounding = _SomeSalient(weight, salient, self._format(weight.shape[1], count))
        if factor is None or self.compensation == "none":
            return round_to_nearest(weight, rounding)
        return compensate(weight, rounding, factor)

    def _salient(self, weight: Tensor, factor: Factor | None) -> Tensor:
        """Which weights [out, in] keep 8 bits."""
        score = weight.abs()
        if factor is not None and self.salience == "hessian":
            score *= factor.R.diagonal()  # 1 / U_jj; the root of w^2 / U_jj^2 orders the weights alike
        return self._above_threshold(score) if self.selection == "threshold" else self._largest(score)

    def _largest(self, score: Tensor) -> Tensor:
        """The `ratio` largest scores [out, in] of every row and block."""
        salient = torch.zeros_like(score, dtype=torch.bool)
        outliers = self.format(score.shape[1]).outliers
        for start, size, entries in outliers.blocks if outliers else ():
            largest = score[:, start : start + size].topk(entries, dim=1, sorted=False).indices
            salient[:, start : start + size].scatter_(1, largest, True)
        return salient

    def _above_threshold(self, score: Tensor) -> Tensor:
        """The scores [out, in] above the order statistic of their group of columns, taken over all rows."""
        salient = torch.zeros_like(score, dtype=torch.bool)
        group = self.group or score.shape[1]
        for start in range(0, score.shape[1], group):
            part = score[:, start : start + group]
            rank = int(part.numel() * (1 - self.ratio))
            if rank == 0:
                salient[:, start : start + group] = True
            elif rank < part.numel():
                salient[:, start : start + group] = part > part.flatten().kthvalue(rank).values
        return salient


class _SomeSalient(PartlyBinary):
    """Any weights may be salient: those of outliers over one plane."""

    def __init__(self, weight: Tensor, salient: Tensor, format: Format) -> None:
        super().__init__(weight, salient, 8, format.segments[0].group)
        self.format = format

    def pack(self, codes: Tensor) -> PackedWeight:
        low = self.low.T > 0
        parts = [{"bits": ((codes > 0) & low)[None], "scale": self.scale.T[None], "offset": self.mean.T}]
        if self.format.outliers is not None:
            parts.append({"mask": ~low, "codes": codes, "scale": self.high.scale[0], "zero": self.high.zero[0]})
        return PackedWeight.encode(self.format, *parts)
