"""Embeddings and the head in few bits, by row. Residual binary planes for embeddings are those of BEBR: Gan, Ge et al.:
Binary Embedding-based Retrieval at Tencent, KDD 2023, arXiv 2302.08714.

A head is a Linear, and loses the least against the H = sum x x^T of what it reads: E = tr((W - Q) H (W - Q)^T). Of an
embedding, a row is read as it is: E = sum_t n_t |w_t - q_t|^2, token t occurring n_t times. Each row has scales and
codes of its own, so that n_t changes nothing in what is best for it. Where one weight is both, E is the sum, and the
embedding's part is a share of the identity in H: `damp`. On SmolLM2-135M (tied, WikiText-2, 4 bits in groups of 64,
rotated) rounding to nearest costs 12 % of perplexity, H with 0.01 of the identity 2.5 %, with 0.003 2.2 %; with a share
that follows n_t it is 2.2 % too, which is why rows are not told apart. On novel-4m, tied and not rotated, the same 4
bits cost at most 1 %, four planes 2 %, 8 bits nothing (recipes/README.md).
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from ultralowbit.methods.base import Method, fields
from ultralowbit.methods.gptq import GPTQ
from ultralowbit.methods.rtn import RTN
from ultralowbit.methods.sign import Sign

REFINE = 2
"""Rounds of `refine.py` after the compensation."""


@fields
class IntEmbeddings:
    """bits: 8, rounded to nearest, or 4, fitted to what the head reads; group: columns that share a scale, null for the
    row; symmetric: without zero points (in groups of 32 they are llama.cpp's Q8_0 and Q4_0); damp: share of mean(diag
    H) added to the diagonal."""

    method: Literal["ints"] = "ints"
    bits: Literal[4, 8] = 8
    group: Literal[32, 64, 128] | None = None
    symmetric: bool = False
    damp: float = Field(0.003, gt=0, le=1)

    @property
    def quantizer(self) -> Method:
        """What packs the embeddings and the head."""
        if self.bits == 8:
            return RTN(bits=8, group=self.group, symmetric=self.symmetric)
        return GPTQ(bits=4, group=self.group, symmetric=self.symmetric, damp=self.damp, clip="mse", refine=REFINE)


@fields
class PlaneEmbeddings:
    """planes: sign planes with free scales; group, damp: as for `ints`."""

    method: Literal["planes"] = "planes"
    planes: int = Field(4, ge=3, le=8)
    group: Literal[32, 64, 128] | None = None
    damp: float = Field(0.003, gt=0, le=1)

    @property
    def quantizer(self) -> Method:
        """What packs the embeddings and the head."""
        return Sign(planes=self.planes, group=self.group, damp=self.damp, refine=REFINE)


EMBEDDINGS: dict[str, type] = {"ints": IntEmbeddings, "planes": PlaneEmbeddings}
"""What recipes call it -> its class."""
