"""BiLLM. Huang, Liu, Qin, Li, Zhang, Liu, Magno, Qi: BiLLM: Pushing the Limit of Post-Training Quantization for LLMs,
ICML 2024, arXiv 2402.04291.

Block after block of 128 columns W, as compensated so far, with s_ij = w_ij^2 / U_jj^2:

    salient columns   the c with the largest sum_i |s_ij|, 1 <= c < 50, c by the error of binarising both parts (eq. 5);
                      W ~ B(W) + B(W - B(W)) with B(W) = mu + a sign(W - mu), mu = mean, a = mean |W - mu| of a row
    other columns     B of |w| < p and B of |w| >= p apart, each with a row's own mu and a; p is the best of 81
                      quantiles of |w| from 0.1 to 0.9
    the columns after W' -= E U[block, after],   E = (W - Q) / diag U

A sign and a bit that says which side of p a weight is on are two bits for every weight; the salient columns use the
second for their residual. With 7 fp16 for each row and block of 128 that is 2.875 bits, and one bit a column; the 1.08
of the paper are the signs and the residuals.

Differences from the published code: it chooses c and p by the errors on s, here it is W as in the paper, and binarises
all columns twice while it searches c; it keeps the two mu of a salient row apart, only their sum matters; quantiles
here are elements of |w|, not between them; of more than 256 rows a sample chooses c and p. E is the paper's and the
code's, which leaves the block's own columns out: `compensation: exact` is E = (W - Q) U_bb^-1, what column after column
would have come to.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from ultralowbit.format import Format, PackedWeight, Zones, to_scale
from ultralowbit.methods.base import Need, fields
from ultralowbit.stats import Factor, InputStats

MOST_SALIENT = 49
QUANTILES = tuple(q / 100 for q in range(10, 91))
SEARCH_ROWS = 128
"""About so many rows choose c and p, which are the same for all of them."""


@fields
class BiLLM:
    """block: columns that are chosen together and share their scales; compensation: see above; damp: as in GPTQ."""

    needs: ClassVar[Need] = Need.HESSIAN
    method: Literal["billm"] = "billm"
    block: Literal[32, 64, 128, 256] = 128
    compensation: Literal["diagonal", "exact"] = "diagonal"
    damp: float = Field(0.01, gt=0, le=1)

    def format(self, in_features: int) -> Format:
        """The bits are those of any number of salient columns."""
        return Format((Zones(in_features, max(1, round(0.08 * in_features)), self.block, offset=True),))

    def quantize(self, weight: Tensor, stats: InputStats | None) -> PackedWeight:
        factor = None if stats is None else stats.factor(self.damp)
        return quantize_blocks(weight, factor, self.block, self.compensation == "exact", fit)


Parts = dict[str, Tensor]
"""Arguments of `Zones.encode`, for some columns; those of consecutive blocks join on the last axis."""


def quantize_blocks(
    weight: Tensor, factor: Factor | None, block: int, exact: bool, fit: Callable[[Tensor, Tensor], Parts]
) -> PackedWeight:
    """fit(weight [out, columns], pivots U_jj [columns]) chooses a block at once; the columns after make up for it."""
    weight, columns = weight.clone(memory_format=torch.contiguous_format), weight.shape[1]
    found: list[Parts] = []
    for start in range(0, columns, block):
        stop = min(start + block, columns)
        part = weight[:, start:stop]
        if factor is None:
            found.append(fit(part, torch.ones_like(part[0])))
            continue
        U = factor.U[start:stop]
        found.append(fit(part, U[:, start:stop].diagonal()))
        error = part - _pack(found[-1:], block).dequantize()
        if exact:
            error = torch.linalg.solve_triangular(U[:, start:stop], error, upper=True, left=False)
        else:
            error /= U[:, start:stop].diagonal()
        weight[:, stop:].addmm_(error, U[:, stop:], alpha=-1)
    return _pack(found, block)


def _pack(blocks: list[Parts], block: int) -> PackedWeight:
    parts = {name: torch.cat([part[name] for part in blocks], -1) for name in blocks[0]}
    salient = parts["salient"]
    segment = Zones(len(salient), int(salient.sum()), block, "third" in parts, "column" in parts, "offset" in parts)
    return PackedWeight.encode(Format((segment,)), parts)


def fit(weight: Tensor, pivots: Tensor) -> Parts:
    salient = salient_columns(weight, pivots)  # [columns]
    sparse = torch.zeros_like(weight, dtype=torch.bool)
    sparse[:, ~salient] = beyond_break(weight[:, ~salient])
    others = [~salient & ~sparse, ~salient & sparse]
    offsets, scales = zip(*(_binary(weight, zone) for zone in others), strict=True)
    mean = torch.where(sparse, offsets[1][:, None], offsets[0][:, None])

    first_mean = _mean(weight, salient)
    first = weight - first_mean[:, None]
    first_scale = to_scale(_mean(first.abs(), salient))
    rest = first - torch.where(first >= 0, first_scale[:, None], -first_scale[:, None])
    rest_mean = _mean(rest, salient)
    rest -= rest_mean[:, None]
    rest_scale = to_scale(_mean(rest.abs(), salient))

    return {
        "bits": torch.stack([torch.where(salient, first, weight - mean) >= 0, torch.where(salient, rest >= 0, sparse)]),
        "salient": salient,
        "scale": torch.stack([*scales, first_scale, rest_scale])[..., None],
        "offset": torch.stack([*offsets, to_scale(first_mean + rest_mean)])[..., None],
    }


def _mean(values: Tensor, zone: Tensor) -> Tensor:
    """Mean of each row over the zone, [columns] or [out, columns]; 0 where it is empty."""
    return (values * zone).sum(1) / zone.sum(-1).clamp_min(1)


def _binary(weight: Tensor, zone: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and mean distance from it [out], as stored."""
    mean = to_scale(_mean(weight, zone))
    return mean, to_scale(_mean((weight - mean[:, None]).abs_(), zone))


def _explained(weight: Tensor, zone: Tensor) -> Tensor:
    """How much of sum w^2 over the zone a row's mean and mean distance explain: the error of B is what they leave."""
    mean = _mean(weight, zone)
    distance = _mean((weight - mean[:, None]).abs_(), zone)
    return ((mean.square() + distance.square()) * zone.sum(-1)).sum(dtype=torch.float64)


def _sample(weight: Tensor) -> Tensor:
    """Some rows of weight [out, columns], evenly spread: what is searched is one number for all of them."""
    return weight[:: max(1, len(weight) // SEARCH_ROWS)]


def salient_columns(weight: Tensor, pivots: Tensor) -> Tensor:
    """[columns] bool."""
    order = (weight / pivots).square_().sum(0).argsort(descending=True, stable=True)
    best, chosen, weight = -1.0, None, _sample(weight)
    for count in range(1, min(MOST_SALIENT, len(order)) + 1):
        salient = torch.zeros_like(pivots, dtype=torch.bool).index_fill_(0, order[:count], True)
        explained = (_explained(weight, salient) + _explained(weight, ~salient)).item()
        if explained > best:
            best, chosen = explained, salient
    return chosen


def beyond_break(weight: Tensor) -> Tensor:
    """|w| >= p [out, columns], with the best p."""
    sample = _sample(weight)
    size = sample.abs()
    ordered = size.flatten().sort().values
    best, p = -1.0, torch.inf
    for q in QUANTILES if len(ordered) else ():
        tried = ordered[round(q * (len(ordered) - 1))]
        sparse = size >= tried
        explained = (_explained(sample, sparse) + _explained(sample, ~sparse)).item()
        if explained > best:
            best, p = explained, tried
    return weight.abs() >= p
