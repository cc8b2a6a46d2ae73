"""What is left of a model, track by track: the scheme of BiBench (arXiv:2301.11233), for packed language models.

Every measurement becomes a ratio to the same one of the original: 1 is as good, 0 is nothing, more than 1 is better. A
track is the ratios of one kind, and three means of them; tracks are not folded into one number.

    language     NLL of the original / NLL, a text each. Not the ratio of perplexities, which has no scale once a model
                 collapses
    tasks        accuracy above chance, a' = max(0, (a - c) / (1 - c)):  a' / a' of the original, a task each
    robustness   typos, casing, whitespace: what the corruption of a text adds to its NLL, in nats per byte since it
                 changes the tokens too:  d of the original / d, neither below a floor. A model that has little left has
                 little to lose: to be read beside the language track
                 long windows: the share of what windows four times as long gain that the model gains too
                 calibration on X: NLL / NLL of the model that was calibrated on X instead
    cost         time: seconds of the fastest method / seconds;  seeds: NLL / (NLL + its standard deviation over seeds)
    complexity   16 / true bits, of the packed Linears and of the whole model
    inference    tokens a second / those of the original, decoding one by one and reading a prompt

BiBench takes the quadratic mean, which forgives a track's bad entries for its good ones; the geometric mean and the
minimum stand beside it. Its architecture track, `across`, is a method's mean ratio of language and tasks in each family
of models.
"""

from __future__ import annotations

import math
import random
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from statistics import fmean
from typing import Any

import torch
from torch import Tensor, nn

from ultralowbit.eval.perplexity import perplexity
from ultralowbit.eval.windows import token_stream
from ultralowbit.nn.hf_names import cache_name

FLOOR = 0.01
"""Nats: what a corruption costs, or a long window gains, below this is nothing."""
RATE = 0.1
"""Share of the words, or of the spaces, that a corruption changes."""
CORRUPTIONS = ("typos", "casing", "whitespace")


@dataclass(frozen=True)
class Observed:
    """What was measured of one model. What its own maker could not measure of the original has the value that costs
    nothing: no spread, the seconds of the fastest method, 16 bits."""

    nll: Mapping[str, float] = field(default_factory=dict)
    """Text -> nats per token."""
    accuracy: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    """Task -> accuracy and chance level."""
    robustness: Mapping[str, float] = field(default_factory=dict)
    """As `robustness` measures it."""
    recalibrated: Mapping[str, float] = field(default_factory=dict)
    """Other calibration text -> nats per token of the first text of `nll`."""
    seconds: float | None = None
    spread: float | None = None
    """Standard deviation over seeds of the NLL of the first text."""
    bits: Mapping[str, float] = field(default_factory=dict)
    """"linear", "model" -> true bits per weight."""
    speed: Mapping[str, float] = field(default_factory=dict)
    """"decoding", "prompt" -> tokens a second."""


@dataclass(frozen=True)
class Track:
    """Ratios to the original by name, and why one that was looked for is not there."""

    ratios: dict[str, float]
    missing: dict[str, str] = field(default_factory=dict)

    @property
    def quadratic(self) -> float:
        """Root of the mean square, BiBench's overall metric."""
        return math.sqrt(fmean(r * r for r in self.ratios.values()))

    @property
    def geometric(self) -> float:
        values = self.ratios.values()
        return math.exp(fmean(map(math.log, values))) if min(values) > 0 else 0.0

    @property
    def minimum(self) -> float:
        return min(self.ratios.values())

    def to_dict(self) -> dict[str, Any]:
        """Fields and means, as JSON values; no means of no ratio."""
        means = ("quadratic", "geometric", "minimum") if self.ratios else ()
        return {**asdict(self), **{name: getattr(self, name) for name in means}}


def tracks(original: Observed, packed: Observed) -> dict[str, Track]:
    """The tracks of a packed model; one that nothing was measured for has no ratios."""
    first = next(iter(packed.nll), None)
    tasks, robust = Track({}), Track({})
    for task, (accuracy, chance) in packed.accuracy.items():
        if task in original.accuracy:
            base = _above(*original.accuracy[task])
            if base > 0:
                tasks.ratios[task] = _above(accuracy, chance) / base
            else:
                tasks.missing[task] = "the original does no better than a guess"
    a, b = original.robustness, packed.robustness
    for kind in CORRUPTIONS:
        if kind in a and kind in b:
            robust.ratios[kind] = _ratio(_added(a, kind), _added(b, kind))
    if "short" in a and "short" in b:
        gain = a["short"] - a["long"]
        if not math.isfinite(b["short"] - b["long"]):
            robust.ratios["long windows"] = 0.0
        elif gain >= FLOOR:
            robust.ratios["long windows"] = max(0.0, b["short"] - b["long"]) / gain
        else:
            robust.missing["long windows"] = "the original gains nothing from them"
    for source, nll in packed.recalibrated.items():
        robust.ratios[f"calibration on {source}"] = _ratio(packed.nll[first], nll)
    cost = {}
    if original.seconds is not None and packed.seconds is not None:
        cost["time"] = _ratio(original.seconds, packed.seconds)
    if packed.spread is not None:
        cost["seeds"] = _ratio(packed.nll[first], packed.nll[first] + packed.spread)
    return {
        "language": Track(
            {text: _ratio(original.nll[text], n) for text, n in packed.nll.items() if text in original.nll}
        ),
        "tasks": tasks,
        "robustness": robust,
        "cost": Track(cost),
        "complexity": Track({what: _ratio(original.bits[what], bits) for what, bits in packed.bits.items()}),
        "inference": Track({what: _ratio(rate, original.speed[what]) for what, rate in packed.speed.items()}),
    }


def across(families: Mapping[str, Sequence[Mapping[str, Track]]]) -> Track:
    """The architecture track of one method: family of models -> the tracks of its models."""
    means = {}
    for family, models in families.items():
        ratios = [r for of_model in models for name in ("language", "tasks") for r in of_model[name].ratios.values()]
        if ratios:
            means[family] = fmean(ratios)
    return Track(means)


def _above(accuracy: float, chance: float) -> float:
    return max(0.0, (accuracy - chance) / (1 - chance)) if chance < 1 else 0.0


def _ratio(a: float, b: float) -> float:
    """a / b; nothing is left where b is not finite."""
    return a / b if math.isfinite(b) and b > 0 else 0.0


def _added(seen: Mapping[str, float], kind: str) -> float:
    """Nats a byte that a corruption adds; all of them where the model is broken."""
    added = seen[kind] - seen["clean"]
    return max(FLOOR, added) if math.isfinite(added) else math.inf


# --- measuring -------------------------------------------------------------------------------------------------------


def corrupt(text: str, kind: str, seed: int = 0) -> str:
    """The text with a tenth of its words misspelt ("typos") or in other case ("casing"), or a tenth of its spaces
    doubled, lost or a tab ("whitespace"); the same for the same seed."""
    rng = random.Random(f"{kind} {seed}")
    change, pattern = {
        "typos": (_misspell, r"[^\W\d_]{3,}"),
        "casing": (_recase, r"[^\W\d_]+"),
        "whitespace": (_respace, r" +"),
    }[kind]
    return re.sub(pattern, lambda match: change(match[0], rng) if rng.random() < RATE else match[0], text)


def _misspell(word: str, rng: random.Random) -> str:
    """Two letters swapped, one lost, doubled or another."""
    i = rng.randrange(len(word) - 1)
    letter = rng.choice("etaoinshrdlu")
    return rng.choice(
        (
            word[:i] + word[i + 1] + word[i] + word[i + 2 :],
            word[:i] + word[i + 1 :],
            word[:i] + word[i] + word[i:],
            word[:i] + letter + word[i + 1 :],
        )
    )


def _recase(word: str, rng: random.Random) -> str:
    return rng.choice((word.upper(), word.lower(), word.swapcase(), word.capitalize()))


def _respace(space: str, rng: random.Random) -> str:
    return rng.choice(("", 2 * space, "\t"))


def robustness(
    model: nn.Module,
    tokenizer: Any,
    text: str,
    *,
    context: int,
    max_tokens: int | None = None,
    seed: int = 0,
    progress: Callable[[int, int], object] | None = None,
) -> dict[str, float]:
    """What a model makes of a text (of some `max_tokens` tokens) that is corrupted, or read in shorter windows.

    "clean" and each of CORRUPTIONS in nats per byte of its own text; "long" and "short", windows of `context` and of a
    quarter of it, in nats per token of the clean text. Raises `InputError` for a text shorter than a window.
    """
    ids = token_stream(tokenizer, text)
    if max_tokens is not None and len(ids) > max_tokens:
        text = text[: len(text) * max_tokens // len(ids)]
    nats = {}
    stages = ("clean", *CORRUPTIONS)
    for done, kind in enumerate(stages, 1):
        read = text if kind == "clean" else corrupt(text, kind, seed)
        ids = token_stream(tokenizer, read)
        measured = perplexity(model, ids, context=context)
        nats[kind] = measured.nll * len(ids) / len(read.encode())
        if kind == "clean":
            nats["long"] = measured.nll
            if context >= 8:
                # of the same tokens, that the windows drop as few as the long ones do
                nats["short"] = perplexity(model, ids[: len(ids) // context * context], context=context // 4).nll
        if progress:
            progress(done, len(stages))
    return nats


@torch.no_grad()
def speed(
    models: Sequence[nn.Module], prompt: Tensor, *, new_tokens: int = 32, repeats: int = 3
) -> list[dict[str, float]]:
    """Tokens a second of models on a prompt [n]: "prompt", reading it, and "decoding", one token after another.

    The models take turns, and the fastest of a few turns counts: the others were disturbed.
    """
    best = [{"prompt": math.inf, "decoding": math.inf} for _ in models]
    for _ in range(repeats + 1):  # the first turn prepares kernels and caches, and is as good as the others
        for model, seconds in zip(models, best, strict=True):
            ids = prompt[None].to(model.device)
            cache, name, clock = None, cache_name(model), time.perf_counter
            for part, steps in (("prompt", 1), ("decoding", new_tokens)):
                _wait(model)
                started = clock()
                for _ in range(steps):
                    output = model(input_ids=ids, use_cache=True, **{name: cache})
                    cache, ids = output[name], output.logits[:, -1:].argmax(-1)
                _wait(model)
                seconds[part] = min(seconds[part], clock() - started)
    return [{"prompt": len(prompt) / s["prompt"], "decoding": new_tokens / s["decoding"]} for s in best]


def _wait(model: nn.Module) -> None:
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)
