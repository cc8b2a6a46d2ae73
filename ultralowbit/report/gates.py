"""Whether a packed model is fit for use: limits that its user sets, signs of a collapse, and what to try."""

from __future__ import annotations

import math
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor, nn

from ultralowbit.eval.base import Measured
from ultralowbit.progress import OnProgress
from ultralowbit.recipe import Recipe
from ultralowbit.report.schema import Limits

REPEATS = 0.5
"""Where one token takes this share of a continuation, it says nothing."""

LADDER = ("sign-2", "gptq-3bit", "gptq-4bit")
"""Recipes that measured best at about 2, 3 and 4 bits: see "Measured" in the README."""

_COLUMNS = 4096


def exceeded(limits: Limits, original: Measured, packed: Measured) -> list[str]:
    """A sentence for each limit that does not hold on a text; one that cannot be checked counts as exceeded."""
    sentences = []
    before = {result.source: result for result in original.get("perplexity", ())}
    near = {result.source: result for result in packed.get("fidelity", ())}
    for after in packed.get("perplexity", ()):
        name = after.source
        if limits.ppl_ratio is not None:
            ratio = after.perplexity / before[name].perplexity if name in before else None
            if ratio is None:
                sentences.append(f"--max-ppl-ratio cannot be checked on {name}: the original was not measured")
            elif not ratio <= limits.ppl_ratio:  # nan too
                sentences.append(
                    f"perplexity on {name} is {ratio:.2f} times that of the original, --max-ppl-ratio allows "
                    f"{limits.ppl_ratio:g}"
                )
        if limits.kl is not None:
            kl = near[name].kl_mean if name in near else None
            if kl is None:
                sentences.append(f"--max-kl cannot be checked on {name}: the two models did not run side by side")
            elif not kl <= limits.kl:
                sentences.append(
                    f"the divergence from the original on {name} is {kl:.3g} nats per token, --max-kl allows "
                    f"{limits.kl:g}"
                )
    return sentences


def collapsed(measured: Measured, vocabulary: int | None) -> list[str]:
    """The texts on which a model predicts worse than one that guesses among its tokens."""
    worst = math.inf if vocabulary is None else vocabulary
    return [
        result.source
        for result in measured.get("perplexity", ())
        if not math.isfinite(result.perplexity) or result.perplexity > worst
    ]


@dataclass(frozen=True)
class Continuation:
    """What a model writes after the first tokens of a text, always taking the likeliest next one."""

    prompt: str
    text: str
    share: float
    """Share of the tokens of `text` that are the most frequent one."""

    @property
    def repeats(self) -> bool:
        """Whether one token takes so much of it that it says nothing."""
        return self.share >= REPEATS


@torch.no_grad()
def continuations(
    model: nn.Module,
    tokenizer: Any,
    starts: Sequence[Tensor],
    *,
    length: int = 24,
    progress: OnProgress | None = None,
) -> list[Continuation]:
    """Continue each start, tokens [n], by `length` more, also beyond an end token; by fewer in a short context."""
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None) or sys.maxsize
    starts = [start[: max(1, positions - length)] for start in starts]
    longest = max(map(len, starts))
    steps = min(length, positions - longest)
    ids = torch.zeros(len(starts), longest + steps, dtype=torch.int64, device=next(model.parameters()).device)
    for row, start in zip(ids, starts, strict=True):
        row[: len(start)] = start
    rows, ends = torch.arange(len(starts)), torch.tensor([len(start) for start in starts])
    for done in range(steps):  # what stands to the right of an end changes nothing before it
        logits = model(ids[:, : longest + done], use_cache=False).logits
        ids[rows, ends + done] = logits[rows, ends + done - 1].argmax(-1)
        if progress:
            progress(done + 1, steps)
    results = []
    for row, start in zip(ids.tolist(), starts, strict=True):
        written = row[len(start) : len(start) + steps]
        share = Counter(written).most_common(1)[0][1] / len(written)
        results.append(Continuation(tokenizer.decode(start.tolist()), tokenizer.decode(written), share))
    return results


def advice(recipe: Recipe) -> str:
    """Say in one sentence what to try where a model came out too bad, and what to type for it."""
    quantize = recipe.quantize
    smaller = lambda size: [s for s in (128, 64, 32) if size is None or s < size]  # noqa: E731
    steps: Sequence[tuple[str, str, Callable[[Any], Iterable[Any]]]] = (
        ("bits", "more bits", lambda bits: range(bits + 1, 9)),
        ("planes", "more sign planes", lambda planes: range(planes + 1, 9)),
        ("ratio", "a larger salient share", lambda ratio: [2 * ratio]),
        ("group", "smaller groups", smaller),
        ("block", "smaller blocks", smaller),
    )
    hints = []
    if recipe.allocate is not None:
        hints.append(f"more bits (--bits {recipe.allocate.bits + 0.5:g})")
    for key, words, values in steps:
        if hasattr(quantize, key) and not (key == "planes" and recipe.allocate is not None):
            value = next((v for v in values(getattr(quantize, key)) if _takes(quantize, key, v)), None)
            hints += [] if value is None else [f"{words} (--set quantize.{key}={value})"]
    if recipe.reads_text:
        hints.append(f"more calibration text (--samples {2 * recipe.calibration.samples})")
    if larger := _next_recipe(recipe):
        hints.append(f"another recipe (--recipe {larger})")
    return f"Try {', '.join(hints[:-1])} or {hints[-1]}." if hints[1:] else f"Try {hints[0]}." if hints else ""


def _takes(quantize: Any, key: str, value: Any) -> bool:
    try:
        replace(quantize, **{key: value})
    except ValidationError:
        return False
    return True


def _next_recipe(recipe: Recipe) -> str | None:
    """The first recipe of the ladder that stores clearly more bits than this one."""

    def bits(quantize: Any) -> float:
        return 8 * quantize.format(_COLUMNS).nbytes(_COLUMNS, _COLUMNS) / _COLUMNS**2

    enough = (bits(recipe.quantize) if recipe.allocate is None else recipe.allocate.bits) + 0.25
    return next((name for name in LADDER if bits(Recipe.load(name).quantize) > enough), None)
