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

from ultralowbit.checkpoint.config import positions
from ultralowbit.eval.base import Measured
from ultralowbit.progress import OnProgress
from ultralowbit.recipe import Recipe
from ultralowbit.report.schema import Limits

REPEATS = 0.5
"""Where one token takes this share of a continuation, it says nothing."""

OURS_TO = 4
"""Bits a weight up to which `--bits` measured best: see "Measured" in the README."""


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
    most = positions(model.config) or sys.maxsize
    starts = [start[: max(1, most - length)] for start in starts]
    longest = max(map(len, starts))
    steps = min(length, most - longest)
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


def advice(recipe: Recipe, bits: float, columns: int) -> str:
    """Say in one sentence what to try where a model came out too bad, and what to type for it.

    bits: true ones of a packed weight; columns: of the narrowest one.
    """
    hints = _about_ours(recipe) if recipe.allocate is not None else _about_others(recipe, bits, columns)
    if recipe.reads_text:
        hints.append(f"more calibration text (--samples {2 * recipe.calibration.samples})")
    return f"Try {', '.join(hints[:-1])} or {hints[-1]}." if hints[1:] else f"Try {hints[0]}." if hints else ""


def _about_ours(recipe: Recipe) -> list[str]:
    """What helps where planes are shared out among Linears."""
    bits, hints = recipe.allocate.bits, []
    if recipe.finetune is None:
        hints.append(f"a short training (--bits {bits:g} --effort default)")
    if bits < OURS_TO:
        hints.append(f"more bits (--bits {min(bits + 0.5, OURS_TO):g})")
    return hints


def _about_others(recipe: Recipe, bits: float, columns: int) -> list[str]:
    """What helps where each Linear is packed alike."""
    quantize, hints = recipe.quantize, []
    smaller = lambda size: [s for s in (128, 64, 32) if s < min(size or columns, columns)]  # noqa: E731
    steps: Sequence[tuple[str, str, Callable[[Any], Iterable[Any]]]] = (
        ("bits", "more bits", lambda bits: range(bits + 1, 9)),
        ("planes", "more sign planes", lambda planes: range(planes + 1, 9)),
        ("ratio", "a larger salient share", lambda ratio: [2 * ratio]),
        ("group", "smaller groups", smaller),
        ("block", "smaller blocks", smaller),
    )
    for key, words, values in steps:
        if hasattr(quantize, key):
            value = next((v for v in values(getattr(quantize, key)) if _takes(quantize, key, v)), None)
            hints += [] if value is None else [f"{words} (--set quantize.{key}={value})"]
    if bits < OURS_TO:
        trains = any((recipe.preprocess, recipe.blockwise, recipe.finetune))
        alike = f"--bits {math.ceil(10 * bits) / 10:g}{'' if trains else ' --effort fast'}"
        hints.append(f"our best at about as many bits ({alike})")
    return hints


def _takes(quantize: Any, key: str, value: Any) -> bool:
    try:
        replace(quantize, **{key: value})
    except ValidationError:
        return False
    return True
