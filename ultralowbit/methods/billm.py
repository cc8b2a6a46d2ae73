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

import math
from collections.abc import Callable
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from ultralowbit.format.salient import SalientSplit
from ultralowbit.format.weight import Format, PackedWeight
from ultralowbit.format.words import to_scale
from ultralowbit.methods.base import fields
from ultralowbit.methods.statistics import Factor, InputStats, Need

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
        return Format((SalientSplit(in_features, max(1, round(0.08 * in_features)), self.block, offset=True),))

    def quantize(self, weight: Tensor, stats: InputStats | None) -> PackedWeight:
        factor = None if stats is None else stats.factor(self.damp)
        return quantize_blocks(weight, factor, self.block, self.compensation == "exact", fit)


Parts = dict[str, Tensor]
"""Arguments of `SalientSplit.encode`, for some columns; those of consecutive blocks join on the last axis."""


def quantize_blocks(
    weight: Tensor, factor: Factor | None, block: int, exact: bool, fit: Callable[[Tensor, Tensor], Parts]
) -> PackedWeight:
    """fit(weight [out, columns], pivots U_jj [columns]) chooses a block at once; the columns after make up for it."""
    weight, columns = weight.clone(memory_format=torch.contiguous_format), weight.shape[1]
    blocks: list[Parts] = []
    for start in range(0, columns, block):
        stop = min(start + block, columns)
        part = weight[:, start:stop]
        if factor is None:
            blocks.append(fit(part, torch.ones_like(part[0])))
            continue
        U = factor.U[start:stop]
        blocks.append(fit(part, U[:, start:stop].diagonal()))
        error = part - _pack(blocks[-1:], block).dequantize()
        if exact:
            error = torch.linalg.solve_triangular(U[:, start:stop], error, upper=True, left=False)
        else:
            error /= U[:, start:stop].diagonal()
        weight[:, stop:].addmm_(error, U[:, stop:], alpha=-1)
    return _pack(blocks, block)


def _pack(blocks: list[Parts], block: int) -> PackedWeight:
    parts = {name: torch.cat([part[name] for part in blocks], -1) for name in blocks[0]}
    salient = parts["salient"]
    segment = SalientSplit(
        len(salient), int(salient.sum()), block, "third" in parts, "column" in parts, "offset" in parts
    )
    return PackedWeight.encode(Format((segment,)), parts)


def fit(weight: Tensor, pivots: Tensor) -> Parts:
    salient = salient_columns(weight, pivots)  # [columns]
    sparse = (weight.abs() >= break_of(sample(weight)[:, ~salient])) & ~salient
    second = sparse.float()
    others = [(~salient).float() - second, second]
    offsets, scales = zip(*(_binary(weight, mask) for mask in others), strict=True)
    mean = torch.lerp(offsets[0][:, None], offsets[1][:, None], second)

    kept = weight[:, salient]
    first_mean = kept.mean(1)
    first = kept - first_mean[:, None] + 0  # -0 is 0
    first_scale = to_scale(first.abs().mean(1))
    rest = first - torch.copysign(first_scale[:, None], first)
    rest_mean = rest.mean(1)
    rest -= rest_mean[:, None]
    rest_scale = to_scale(rest.abs().mean(1))

    bits = torch.stack([weight >= mean, sparse])
    bits[:, :, salient] = torch.stack([first >= 0, rest >= 0])
    return {
        "bits": bits,
        "salient": salient,
        "scale": torch.stack([*scales, first_scale, rest_scale])[..., None],
        "offset": torch.stack([*offsets, to_scale(first_mean + rest_mean)])[..., None],
    }


def _mean(values: Tensor, mask: Tensor) -> Tensor:
    """Mean of each row where a mask [out, columns] of 0 and 1 is 1; 0 where that is nowhere."""
    return (values * mask).sum(1) / mask.sum(1).clamp_min(1)


def _binary(weight: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and mean distance from it [out], as stored."""
    mean = to_scale(_mean(weight, mask))
    return mean, to_scale(_mean((weight - mean[:, None]).abs_(), mask))


def sample(weight: Tensor) -> Tensor:
    """Some rows of weight [out, columns], evenly spread: what is searched is one number for all of them."""
    return weight[:: max(1, len(weight) // SEARCH_ROWS)]


def _explained(sums: Tensor, distances: Tensor, counts: Tensor) -> Tensor:
    """How much of sum w^2 over a group a row's mean and mean distance from it explain: the error of B is what they
    leave. [rows, choices] each -> [choices], summed over the rows."""
    return ((sums.square() + distances.square()) / counts.clamp_min(1)).sum(0)


def _first_best(explained: Tensor) -> int:
    return int((explained == explained.max()).nonzero()[0])


def salient_columns(weight: Tensor, pivots: Tensor) -> Tensor:
    """[columns] bool."""
    order = (weight / pivots).square_().sum(0).argsort(descending=True, stable=True)
    most = min(MOST_SALIENT, len(order))
    ordered = sample(weight)[:, order].double()  # [rows, columns]
    counts = torch.arange(1, most + 1, device=weight.device)
    kept = counts[:, None] > torch.arange(len(order), device=weight.device)  # [choices, columns]
    sums = ordered.cumsum(1)[:, :most]  # [rows, choices]
    explained = torch.zeros(most, dtype=torch.float64, device=weight.device)
    for mask, total, count in ((kept, sums, counts), (~kept, ordered.sum(1, keepdim=True) - sums, len(order) - counts)):
        mean = (total / count.clamp_min(1)).float()
        distance = (ordered.float()[:, None] - mean[..., None]).abs_().mul_(mask).sum(2)  # [rows, choices]
        explained += _explained(total, distance, count)
    return torch.zeros_like(pivots, dtype=torch.bool).index_fill_(0, order[: _first_best(explained) + 1], True)


def break_of(weight: Tensor) -> Tensor | float:
    """The best p for |w| >= p, of weight [rows, columns]; infinite where there is none.

    All p are tried at once. In a sorted row, |w| < p are the places from `low` to `high`; with the sums C up to each
    place, their distances from any m add up to C_high - 2 C_k + C_low + m (2 k - low - high), k the place of m.
    """
    if not weight.numel():
        return math.inf
    rows = weight.sort(dim=1).values.double()  # [rows, columns]
    sizes = weight.abs().flatten().sort().values.double()
    places = torch.tensor([round(q * (len(sizes) - 1)) for q in QUANTILES], device=weight.device)
    p = sizes[places].expand(len(rows), -1).contiguous()  # [rows, choices]
    C = F.pad(rows.cumsum(1), (1, 0))  # [rows, columns + 1]
    low = torch.searchsorted(rows, -p, right=True)
    high = torch.searchsorted(rows, p).maximum(low)  # p = 0 has nothing below it
    start, end = torch.zeros_like(low), torch.full_like(low, rows.shape[1])

    def distance(m: Tensor, low: Tensor, high: Tensor) -> Tensor:
        k = torch.searchsorted(rows, m).clamp(low, high)
        return C.gather(1, high) - 2 * C.gather(1, k) + C.gather(1, low) + m * (2 * k - low - high)

    count = high - low
    total = C.gather(1, high) - C.gather(1, low)
    mean = total / count.clamp_min(1)
    explained = _explained(total, distance(mean, low, high), count)
    count, total = rows.shape[1] - count, C[:, -1:] - total
    mean = total / count.clamp_min(1)
    explained += _explained(total, distance(mean, start, end) - distance(mean, low, high), count)
    return p[0, _first_best(explained)].float()
