"""Whether a packed model is fit for use: limits that its user sets, signs of a collapse, and what to try."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor, nn

from ultralowbit.recipe import Recipe

REPEATS = 0.5
"""Share of a continuation that one token takes, from which on it says nothing."""

LADDER = ("sign-2", "gptq-3bit", "gptq-4bit")
"""Recipes that measured best at about 2, 3 and 4 bits: see "Measured" in the README."""

_COLUMNS = 4096


@dataclass(frozen=True)
class Limits:
    """What a compression may cost at most, on each text."""

    ppl_ratio: float | None = None
    """Perplexity of the packed model in those of the original."""
    kl: float | None = None
    """Mean KL divergence from the original, nats a token."""

    def __bool__(self) -> bool:
        return self.ppl_ratio is not None or self.kl is not None


def exceeded(limits: Limits, original: dict[str, Any], packed: dict[str, Any]) -> list[str]:
    """A sentence for each limit that a report's rows exceed; one that cannot be checked is exceeded."""
    found = []
    if limits.ppl_ratio is not None:
        before = {p["source"]: float(p["perplexity"]) for p in original["perplexity"]}
        for p in packed["perplexity"]:
            if p["source"] not in before:
                found.append(f"--max-ppl-ratio cannot be checked on {p['source']}: the original was not measured")
                continue
            ratio = float(p["perplexity"]) / before[p["source"]]
            if not ratio <= limits.ppl_ratio:  # nan too
                found.append(
                    f"perplexity on {p['source']} is {ratio:.2f} times the original's, --max-ppl-ratio allows "
                    f"{limits.ppl_ratio:g}"
                )
    if limits.kl is not None:
        divergence = {f["source"]: float(f["kl_mean"]) for f in packed["fidelity"]}
        for p in packed["perplexity"]:
            kl = divergence.get(p["source"])
            if kl is None:
                found.append(f"--max-kl cannot be checked on {p['source']}: the two did not run side by side")
            elif not kl <= limits.kl:
                found.append(
                    f"the divergence from the original on {p['source']} is {kl:.3g} nats a token, --max-kl allows "
                    f"{limits.kl:g}"
                )
    return found


@dataclass(frozen=True)
class Continuation:
    """What a model writes after the first tokens of a text, always taking the likeliest next one."""

    prompt: str
    text: str
    share: float
    """Of its tokens that are the most frequent one."""

    @property
    def repeats(self) -> bool:
        return self.share >= REPEATS

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "repeats": self.repeats}


@torch.no_grad()
def continuation(
    model: nn.Module,
    tokenizer: Any,
    tokens: Tensor,
    *,
    prompt: int = 16,
    length: int = 24,
    progress: Callable[[int, int], object] | None = None,
) -> Continuation:
    """Continue the first `prompt` of the tokens [n] by `length` more, past an end token too."""
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None) or len(tokens) + length
    start = tokens[: min(prompt, max(1, positions - length))]
    ids = start.to(next(model.parameters()).device)[None]  # [1, length so far]
    for done in range(min(length, positions - len(start))):
        ids = torch.cat([ids, model(ids, use_cache=False).logits[:, -1:].argmax(-1)], 1)
        if progress:
            progress(done + 1, length)
    written = ids[0, len(start) :].tolist()
    share = Counter(written).most_common(1)[0][1] / len(written)
    return Continuation(tokenizer.decode(start.tolist()), tokenizer.decode(written), share)


def advice(recipe: Recipe) -> str:
    """What to try where a model came out too bad, in one sentence that names what to type."""
    quantize = recipe.quantize
    smaller = lambda size: [s for s in (128, 64, 32) if size is None or s < size]  # noqa: E731
    steps: Sequence[tuple[str, str, Callable[[Any], Iterable[Any]]]] = (
        ("bits", "more bits", lambda bits: range(bits + 1, 9)),
        ("planes", "more sign planes", lambda planes: range(planes + 1, 9)),
        ("ratio", "a larger salient share", lambda ratio: [2 * ratio]),
        ("group", "smaller groups", smaller),
        ("block", "smaller blocks", smaller),
    )
    found = []
    for key, words, values in steps:
        if hasattr(quantize, key):
            value = next((v for v in values(getattr(quantize, key)) if _takes(quantize, key, v)), None)
            found += [] if value is None else [f"{words} (--set quantize.{key}={value})"]
    if recipe.reads_text:
        found.append(f"more calibration text (--samples {2 * recipe.calibration.samples})")
    if larger := _next_recipe(recipe):
        found.append(f"another recipe (--recipe {larger})")
    return f"Try {', '.join(found[:-1])} or {found[-1]}." if found[1:] else f"Try {found[0]}." if found else ""


def _takes(quantize: Any, key: str, value: Any) -> bool:
    try:
        replace(quantize, **{key: value})
    except ValidationError:
        return False
    return True


def _next_recipe(recipe: Recipe) -> str | None:
    """The first recipe of the ladder that stores clearly more bits than this one."""

    def bits(quantize: Any) -> float:
        specs = quantize.format(_COLUMNS).tensors(_COLUMNS, _COLUMNS).values()
        return 8 * sum(torch.Size(s.shape).numel() * s.dtype.itemsize for s in specs) / _COLUMNS**2

    enough = bits(recipe.quantize) + 0.25
    return next((name for name in LADDER if bits(Recipe.load(name).quantize) > enough), None)
