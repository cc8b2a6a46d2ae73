"""The tracks of the runs of a sweep: what their reports lack of them is measured, and kept in the runs' folders."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from ultralowbit.checkpoint.config import read_config_json
from ultralowbit.checkpoint.manifest import read_manifest
from ultralowbit.data.corpora import read_text
from ultralowbit.errors import InputError
from ultralowbit.eval.perplexity import Perplexity
from ultralowbit.eval.runner import open_model, pick_dtype, too_large
from ultralowbit.eval.schema import File, ModelResults, read_file, write_file
from ultralowbit.eval.scores import ACCURACIES
from ultralowbit.eval.tracks import Observed, Track, across, robustness, speed, tracks
from ultralowbit.eval.windows import token_stream
from ultralowbit.hub import open_tokenizer, resolve_model
from ultralowbit.report.runs import evaluations
from ultralowbit.report.sweep_runs import Results, Sweep
from ultralowbit.system import pick_device, release

ROBUSTNESS_TOKENS = 16_384
PROMPT_TOKENS = 128

Accuracies = dict[str, tuple[float, float]]
"""Task -> accuracy and level of chance."""


class TracksFile(File):
    """tracks.json in a run's folder."""

    kind: Literal["tracks"] = "tracks"
    key: dict[str, Any]
    """All that the numbers depend on."""
    measured: dict[Literal["original", "packed"], dict[str, dict[str, float]]]
    """Model -> "robustness" and "speed", as `eval.tracks` measures them."""
    missing: dict[str, str]
    """Track -> why it is not there."""


def sweep_tracks(sweep: Sweep) -> dict[str, Any]:
    """The tracks of every recipe on every model, and across the families of models, as JSON values."""
    models = []
    families: dict[str, dict[str, list[dict[str, Track]]]] = defaultdict(lambda: defaultdict(list))
    for name, of_model in sweep.results.items():
        if not of_model:
            continue
        seconds = {label: results.seconds for label, results in of_model.items()}
        rows, originals = [], {}
        for label, results in of_model.items():
            observer = _Observer(sweep, results, originals)
            ratios = tracks(*observer.observed(min(seconds.values()), seconds[label]))
            for track, why in observer.missing.items():
                ratios[track].missing[track] = why
            family = str(read_config_json(observer.original).get("model_type", "unknown"))
            families[label][family].append(ratios)
            rows.append({"label": label, "tracks": {track: value.to_dict() for track, value in ratios.items()}})
        models.append({"model": name, "fastest": min(seconds, key=seconds.get), "rows": rows})
    several = len({family for of_label in families.values() for family in of_label}) > 1
    rows = [{"label": label, "track": across(of_label).to_dict()} for label, of_label in families.items()]
    return {"models": models, "across": rows if several else []}


@dataclass
class _Observer:
    """What the tracks need to know of a run, in its reports and beside them."""

    sweep: Sweep
    results: Results
    originals: dict[str, dict[str, float]]
    """Digest of a text -> robustness of the original on it; shared by all recipes of a model."""
    missing: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.original = resolve_model(self.results.model)
        self.device = pick_device(self.sweep.device)
        self.dtype = pick_dtype(self.original, self.device)

    def observed(self, fastest: float, seconds: float) -> tuple[Observed, Observed]:
        """The original and the packed model; `fastest` are the seconds of the fastest recipe."""
        report = self.results.reports[0]
        before = {p.source: p.nll for p in report.original.metrics.get("perplexity", ())}
        after = {p.source: statistics.fmean(self.results.nll(p.source)) for p in self._perplexities()}
        first = next(iter(after), None)
        extra = self._extra() if first else {"original": {}, "packed": {}}
        again = {
            Path(source).name: p.nll
            for source, other in self.results.recalibrated.items()
            for p in other.packed.metrics.get("perplexity", ())
            if p.source == first
        }
        accuracy = task_accuracies(self.results.folders[0])
        bits = {"linear": report.packed.size.bits, "model": report.packed.size.model_bits_per_weight}
        original = Observed(
            nll=before, accuracy=accuracy[1], recalibrated=dict.fromkeys(again, before.get(first)), seconds=fastest,
            spread=0.0, bits=dict.fromkeys(bits, 16.0), **extra["original"],
        )  # fmt: skip
        packed = Observed(
            nll=after, accuracy=accuracy[0], recalibrated=again, seconds=seconds, bits=bits,
            spread=self.results.spread(first), **extra["packed"],
        )  # fmt: skip
        return original, packed

    def _perplexities(self) -> list[Perplexity]:
        return self.results.reports[0].packed.metrics.get("perplexity", [])

    def _extra(self) -> dict[str, dict[str, Any]]:
        """Robustness and speed of both models, on the first text."""
        first, folder = self._perplexities()[0], self.results.folders[0]
        key = {
            "manifest": self.results.reports[0].manifest.sha256, "text": first.sha256, "context": first.context,
            "dtype": str(self.dtype), "device": self.device.type,
        }  # fmt: skip
        file = folder / "tracks.json"
        try:
            kept = read_file(file, TracksFile, "it is measured again")
        except InputError:
            kept = None
        if kept is None or kept.key != key:
            kept = TracksFile(key=key, measured=self._measure(first), missing=self.missing)
            write_file(file, kept)
        self.missing |= kept.missing
        return kept.measured

    def _measure(self, first: Perplexity) -> dict[str, dict[str, Any]]:
        """Run both models on the text that `first` was measured on."""
        watch, trust = self.sweep.watch, self.sweep.trust_remote_code
        folders = {"original": self.original, "packed": self.results.folders[0]}
        if why := too_large([(folder, self.dtype) for folder in folders.values()], self.device):
            self.missing |= dict.fromkeys(("robustness", "inference"), f"running both models {why}")
            return {"original": {}, "packed": {}}
        models = {which: open_model(folder, self.device, self.dtype, trust) for which, folder in folders.items()}
        tokenizer = open_tokenizer(self.original, trust)
        text = read_text(self.sweep.wanted.texts.for_recipe(self.results.recipe).sources[0], "test").text
        measured: dict[str, dict[str, Any]] = {}
        tokens = max(first.context, min(first.tokens + first.windows, ROBUSTNESS_TOKENS))
        for which, model in models.items():
            known = self.originals.get(first.sha256) if which == "original" else None
            progress = watch.counter(f"{folders[which].name}: corrupted text")
            measured[which] = {
                "robustness": known
                or robustness(model, tokenizer, text, context=first.context, max_tokens=tokens, progress=progress)
            }
        self.originals[first.sha256] = measured["original"]["robustness"]
        watch.start("speed", 1)
        prompt = token_stream(tokenizer, text)[: min(PROMPT_TOKENS, first.context // 2)]
        rates = speed([*models.values()], prompt, new_tokens=min(32, first.context // 2))
        for which, rate in zip(models, rates, strict=True):
            measured[which]["speed"] = rate
        watch.step()
        del models, model
        release(self.device)
        return measured


def task_accuracies(folder: Path) -> tuple[Accuracies, Accuracies]:
    """Accuracies of a run's model and of the original, where `ultralowbit eval --tasks` left them in its folder."""
    own, before = evaluations(folder, read_manifest(folder))
    return _best(row for row, _ in own), _best(row for row, _ in before)


def _best(rows: Iterable[ModelResults]) -> Accuracies:
    best: Accuracies = {}
    for score in (score for row in rows if row.tasks for score in row.tasks.scores):
        # acc_norm, which comes after acc, where a task has it
        if score.metric in ACCURACIES and score.chance is not None:
            best[score.task] = (score.value, score.chance)
    return best
