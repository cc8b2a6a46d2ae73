"""Perplexity by the protocol of the published tables: one token stream, windows that do not overlap."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ultralowbit.eval.base import Bos, Metric, Quantity, Result
from ultralowbit.eval.windows import chunk_rows, measure


@dataclass(frozen=True, kw_only=True)
class Perplexity(Result):
    """exp(nll). The loss is always computed in fp32 and summed in fp64, whatever the model's dtype."""

    perplexity: float
    nll: float
    """Mean negative log-likelihood, nats per token."""

    def __str__(self) -> str:
        return (
            f"{self.source or 'text'}: perplexity {self.perplexity:.4f} ({self.windows} windows of {self.context}, "
            f"{self.tokens} tokens, {self.dtype}, bos {self.bos})"
        )


class _Losses:
    """The loss, in nats, of each predicted token so far; it stays where the logits are."""

    def __init__(self) -> None:
        self.losses: list[Tensor] = []

    def add(self, tokens: Tensor, logits: Tensor, original: Tensor | None) -> None:
        rows, following = chunk_rows(logits), tokens.roll(-1, dims=1).flatten()
        parts = zip(logits.flatten(0, 1).split(rows), following.split(rows), strict=True)
        losses = torch.cat([F.cross_entropy(part.float(), ids, reduction="none") for part, ids in parts])
        self.losses.append(losses.view(tokens.shape)[:, :-1])  # the last token of a window predicts none

    def result(self, how: Result) -> Perplexity:
        nll = torch.cat(self.losses).cpu().double().sum().item() / how.tokens
        return Perplexity(**vars(how), perplexity=_exp(nll), nll=nll)


class PerplexityMetric(Metric):
    """Token perplexity, which is not the word perplexity of lm-eval's wikitext."""

    name = "perplexity"
    result = Perplexity
    quantities = (Quantity("perplexity", "token perplexity", "perplexity", "lower", "perplexity", drawn=True),)

    def start(self) -> _Losses:
        return _Losses()

    def loss(self, before: Perplexity, after: Perplexity) -> str:
        if not math.isfinite(after.nll):
            return ": the model is broken"
        added = after.nll - before.nll
        return f": {100 * math.expm1(added):+.3g} %, {added:+.3f} nats per token"


def perplexity(
    model: nn.Module,
    tokens: Tensor,
    *,
    context: int,
    max_tokens: int | None = None,
    batch_size: int | None = None,
    source: str = "",
    bos: Bos = "text",
    progress: Callable[[int, int], object] | None = None,
) -> Perplexity:
    """Perplexity of a causal LM on the stream tokens [n]; the arguments and errors are those of `windows.measure`.

    A collapsed model gives nan or inf.
    """
    (results,) = measure(
        [model], tokens, {"perplexity": PerplexityMetric()}, context=context, max_tokens=max_tokens,
        batch_size=batch_size, source=source, bos=bos, progress=progress,
    )  # fmt: skip
    return results["perplexity"]


def _exp(nll: float) -> float:
    try:
        return math.exp(nll)
    except OverflowError:
        return math.inf
