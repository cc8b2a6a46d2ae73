"""`ultralowbit bench methods`: recipes on models and seeds, in one table, and what is left of each model by tracks."""

from __future__ import annotations

import json
import logging
import re
import statistics
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from itertools import product
from pathlib import Path
from typing import Any

from ultralowbit.checkpoint.config import read_config_json
from ultralowbit.checkpoint.storage import write_json
from ultralowbit.data.corpora import read_text
from ultralowbit.errors import CheckpointError, DiskFull, FormatError, InputError, reason
from ultralowbit.eval import zeroshot
from ultralowbit.eval.evaluate import Wanted, evaluate_models, to_json
from ultralowbit.eval.perplexity import Perplexity, token_stream
from ultralowbit.eval.runner import open_model, pick_dtype, too_large
from ultralowbit.eval.tracks import Observed, Track, across, robustness, speed, tracks
from ultralowbit.hub import open_tokenizer, resolve_model
from ultralowbit.progress import Progress
from ultralowbit.recipe import Recipe
from ultralowbit.report import plots
from ultralowbit.report.comparison import may_write, write_comparison
from ultralowbit.report.run import Texts, compress_and_measure
from ultralowbit.report.runs import evaluated
from ultralowbit.report.schema import stored_perplexity, strict
from ultralowbit.system import pick_device, release

log = logging.getLogger(__name__)

ROBUSTNESS_TOKENS = 16_384
PROMPT_TOKENS = 128
TASKS = "eval-tasks.json"
"""What a run's folder holds of the tasks that it was asked."""


@dataclass(frozen=True)
class Methods:
    """What to run: every recipe on every model with every seed."""

    models: tuple[str, ...]
    recipes: tuple[str, ...]
    seeds: tuple[int, ...] = (0,)
    settings: tuple[str, ...] = ()
    """Of every recipe, as `--set` takes them."""
    small: bool = False
    """With the values that recipes have for models of a few million parameters."""
    calibrations: tuple[str, ...] = ()
    """Texts, to train on too; the recipe's own unless given. With those after the first only the first seed is run, for
    the tracks."""
    texts: Texts = field(default_factory=Texts)
    with_tracks: bool = True
    tasks: Wanted | None = None
    """lm-eval's, that the original and each recipe's first seed are asked."""

    def recipe(self, name: str, seed: int, calibration: str | None = None) -> Recipe:
        source = calibration or next(iter(self.calibrations), None)
        texts = {"seed": seed} | ({} if source is None else {"source": source})
        return Recipe.load(name, self.settings, small=self.small, texts=texts)


@dataclass
class _Results:
    """Of one recipe on one model."""

    folders: list[Path] = field(default_factory=list)
    """A seed each."""
    found: list[dict[str, Any]] = field(default_factory=list)
    """Their reports."""
    recalibrated: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Other calibration text -> report."""

    @property
    def seconds(self) -> float:
        return statistics.fmean(report["packed"]["seconds"] for report in self.found)

    def nll(self, source: str) -> list[float]:
        return [float(p["nll"]) for r in self.found for p in r["packed"]["perplexity"] if p["source"] == source]


def run_sweep(
    wanted: Methods,
    out: Path,
    *,
    device: str = "auto",
    restart: bool = False,
    trust_remote_code: bool = False,
    watch: Progress,
    command: str | None = None,
) -> dict[str, Any]:
    """Run all, into folders of `out/runs`, and write the comparison of `compare` with the tracks into `out`.

    What is there already is not run again. A recipe that fails on a model is noted in the table, and the others go on;
    one that reads no text is run with one seed, since others would give the same bytes. Returns the comparison.
    """
    plots.require()
    out = out.expanduser()
    may_write(out)
    if wanted.tasks:
        zeroshot.require()
        questions = zeroshot.read_tasks(wanted.tasks.tasks, wanted.tasks.tasks_dir, watch.counter)
    loaded = {name: wanted.recipe(name, wanted.seeds[0]).name for name in wanted.recipes}
    names = [_name(model) for model in wanted.models]
    for what, labels in (("models", names), ("recipes", [*loaded.values()])):
        twice = next((label for label in labels if labels.count(label) > 1), None)
        if twice:
            raise InputError(f"two of the {what} are called {twice}: rename one, their results could not be told apart")
    options: dict[str, Any] = {"device": device, "trust_remote_code": trust_remote_code, "watch": watch}
    results: dict[str, dict[str, _Results]] = {name: {} for name in names}
    failed: list[dict[str, str]] = []
    total = len(names) * len(loaded)
    for i, ((model, name), (recipe, label)) in enumerate(
        product(zip(wanted.models, names, strict=True), loaded.items())
    ):
        watch.say(f"{name}, {label} ({i + 1} of {total})")
        one = _Results()
        for seed, calibration, folder in _runs(wanted, out / "runs" / name / label):
            if one.found and one.found[0]["calibration"] is None:
                break  # it read no text: another seed, or text, changes nothing
            try:
                chosen = wanted.recipe(recipe, seed, calibration)
                known = _originals(results[name].values())
                report = compress_and_measure(
                    model, chosen, folder, wanted.texts, restart=restart, known=known, **options
                )
            except DiskFull:
                raise
            except Exception as error:  # one method's trouble is not to cost the others' results
                said = str(error) if isinstance(error, InputError | CheckpointError | FormatError) else reason(error)
                log.warning("%s, %s: %s", name, label, said)
                failed.append({"model": name, "label": f"{label}/{folder.name}", "error": said})
                continue
            if calibration is None:
                one.folders.append(folder)
                one.found.append(report)
            else:
                one.recalibrated[calibration] = report
        if one.found:
            results[name][label] = one
    folders = [folder for of_model in results.values() for one in of_model.values() for folder in one.folders]
    if not folders:
        raise InputError(f"every run failed, the first one with: {failed[0]['error']}")
    if wanted.tasks:
        for of_model in results.values():
            _ask(wanted.tasks, questions, of_model.values(), options)
    found = _tracks(wanted, results, options) if wanted.with_tracks else None
    title = f"{len(loaded)} recipes on {', '.join(names)}"
    return write_comparison(folders, out, command=command, failed=failed, title=title, tracks=found)


def _name(model: str) -> str:
    folder = Path(model).expanduser()
    return folder.resolve().name if folder.is_dir() else model.partition("@")[0].replace("/", "-")


def _runs(wanted: Methods, folder: Path) -> Iterator[tuple[int, str | None, Path]]:
    """Seed, other calibration text and folder of each run of one recipe on one model."""
    for seed in wanted.seeds:
        yield seed, None, folder / f"seed-{seed}"
    for source in wanted.calibrations[1:] if wanted.with_tracks else ():
        name = re.sub(r"[^\w.-]+", "-", Path(source).name)
        yield wanted.seeds[0], source, folder / f"calibrated-on-{name}"


def _originals(there: Iterable[_Results]) -> list[Perplexity]:
    """What is known of the original already."""
    for one in there:
        return [stored_perplexity(p) for p in one.found[0]["original"]["perplexity"]]
    return []


def _ask(wanted: Wanted, questions: zeroshot.Tasks, runs: Iterable[_Results], options: dict[str, Any]) -> None:
    """Leave what the original and the first seed of each recipe score in the run's folder; what is there stands."""
    asked = {
        "tasks": list(wanted.tasks), "tasks_dir": wanted.tasks_dir and str(wanted.tasks_dir), "limit": wanted.limit,
        "lm_eval": version("lm_eval"),
    }  # fmt: skip
    original: dict[str, Any] | None = None

    def ask(model: str) -> dict[str, Any]:
        found = evaluate_models([model], wanted, questions=questions, **options)
        return to_json(found)["results"][0]

    for one in runs:
        report, file = one.found[0], one.folders[0] / TASKS
        key = {**asked, "manifest": report["manifest"]["sha256"]}
        packed, before = _asked(file, key)
        original = original or before or ask(report["model"])
        if packed is None:
            packed = ask(str(one.folders[0]))
            write_json(file, {"asked": key, "fidelity_to": None, "results": [packed, original]})


def _asked(file: Path, key: dict[str, Any]) -> tuple[Any, Any]:
    """What an earlier run has left of the packed model and of the original, None each where it asked otherwise."""
    try:
        kept = json.loads(file.read_text(encoding="utf-8"))
        return tuple(kept["results"]) if kept["asked"] == key and len(kept["results"]) == 2 else (None, None)
    except (OSError, ValueError, KeyError, TypeError):
        return None, None


# --- tracks ----------------------------------------------------------------------------------------------------------


def _tracks(wanted: Methods, results: dict[str, dict[str, _Results]], options: dict[str, Any]) -> dict[str, Any]:
    """The tracks of every recipe on every model, and across the families of models."""
    models = []
    families: dict[str, dict[str, list[dict[str, Track]]]] = defaultdict(lambda: defaultdict(list))
    for name, of_model in results.items():
        if not of_model:
            continue
        seconds = {
            label: statistics.fmean(r["packed"]["seconds"] for r in one.found) for label, one in of_model.items()
        }
        rows, shared = [], {}
        for label, one in of_model.items():
            model = one.found[0]["model"]
            seen = _Seen(model, one, options, shared)
            found = tracks(*seen.observed(min(seconds.values()), seconds[label]))
            for track, why in seen.missing.items():
                found[track].missing[track] = why
            family = read_config_json(resolve_model(model)).get("model_type", "unknown")
            families[label][family].append(found)
            rows.append({"label": label, "tracks": {track: value.to_dict() for track, value in found.items()}})
        models.append({"model": name, "fastest": min(seconds, key=seconds.get), "rows": rows})
    several = len({family for of_label in families.values() for family in of_label}) > 1
    rows = [{"label": label, "track": across(found).to_dict()} for label, found in families.items()] if several else []
    return {"models": models, "across": rows}


class _Seen:
    """What the tracks need to know of a run beside its report; kept in its folder's tracks.json."""

    def __init__(self, model: str, one: _Results, options: dict[str, Any], shared: dict[str, dict[str, float]]) -> None:
        """`shared` holds, for all recipes of a model, what a text makes of the original."""
        self.original, self.one, self.options, self.shared = resolve_model(model), one, options, shared
        self.device = pick_device(options["device"])
        self.dtype = pick_dtype(self.original, self.device)
        self.missing: dict[str, str] = {}

    def observed(self, fastest: float, seconds: float) -> tuple[Observed, Observed]:
        """Of the original and of the packed model."""
        one = self.one
        report = one.found[0]
        before = {p["source"]: float(p["nll"]) for p in report["original"]["perplexity"]}
        after = {p["source"]: statistics.fmean(one.nll(p["source"])) for p in report["packed"]["perplexity"]}
        first = next(iter(after), None)
        extra = self._extra(report["packed"]["perplexity"]) if first else {"original": {}, "packed": {}}
        again = {
            Path(source).name: float(p["nll"])
            for source, found in one.recalibrated.items()
            for p in found["packed"]["perplexity"]
            if p["source"] == first
        }
        tasks = self._tasks(Path(report["model"]).name)
        size = report["packed"]["size"]
        bits = {"linear": size["linear_bits_per_weight"], "model": size["model_bits_per_weight"]}
        spread = statistics.stdev(one.nll(first)) if first and len(one.found) > 1 else None
        original = Observed(
            nll=before, accuracy=tasks[1], recalibrated=dict.fromkeys(again, before.get(first)), seconds=fastest,
            spread=0.0, bits=dict.fromkeys(bits, 16.0), **extra["original"],
        )  # fmt: skip
        packed = Observed(
            nll=after, accuracy=tasks[0], recalibrated=again, seconds=seconds, spread=spread, bits=bits,
            **extra["packed"],
        )  # fmt: skip
        return original, packed

    def _tasks(self, original: str) -> tuple[dict[str, tuple[float, float]], dict[str, tuple[float, float]]]:
        """Accuracies with their chance levels, where `ultralowbit eval --tasks` left them in the run's folder."""
        found = []
        for rows in evaluated(self.one.folders[0], original):
            best: dict[str, tuple[float, float]] = {}
            for score in (score for row in rows if row["tasks"] for score in row["tasks"]["scores"]):
                # acc_norm, which comes after acc, where a task has it
                if score["metric"] in ("acc", "acc_norm") and score["chance"] is not None:
                    best[score["task"]] = (score["value"], score["chance"])
            found.append(best)
        return found[0], found[1]

    def _extra(self, measured: Sequence[dict[str, Any]]) -> dict[str, dict[str, Any]]:
        """Robustness and speed of both models, on the first text."""
        first, folder = measured[0], self.one.folders[0]
        key = {
            "manifest": self.one.found[0]["manifest"]["sha256"], "text": first["sha256"], "context": first["context"],
            "dtype": str(self.dtype), "device": self.device.type,
        }  # fmt: skip
        file = folder / "tracks.json"
        try:
            kept = json.loads(file.read_text(encoding="utf-8"))
            if kept["key"] == key:
                self.missing |= kept["missing"]
                return {w: {p: _floats(v) for p, v in parts.items()} for w, parts in kept["found"].items()}
        except (OSError, ValueError, KeyError, TypeError):
            pass
        found = self._measure(first)
        write_json(file, {"key": key, "found": strict(found), "missing": self.missing})
        return found

    def _measure(self, first: dict[str, Any]) -> dict[str, dict[str, Any]]:
        watch, trust = self.options["watch"], self.options["trust_remote_code"]
        folders = {"original": self.original, "packed": self.one.folders[0]}
        if why := too_large([(folder, self.dtype) for folder in folders.values()], self.device):
            self.missing |= dict.fromkeys(("robustness", "inference"), f"running both models {why}")
            return {"original": {}, "packed": {}}
        models = {which: open_model(folder, self.device, self.dtype, trust) for which, folder in folders.items()}
        tokenizer = open_tokenizer(self.original, trust)
        text = read_text(first["source"], "test").text
        found: dict[str, dict[str, Any]] = {}
        tokens = max(first["context"], min(first["tokens"] + first["windows"], ROBUSTNESS_TOKENS))
        for which, model in models.items():
            if which == "original" and first["sha256"] in self.shared:
                found[which] = {"robustness": self.shared[first["sha256"]]}
                continue
            progress = watch.counter(f"{folders[which].name}: corrupted text")
            robust = robustness(model, tokenizer, text, context=first["context"], max_tokens=tokens, progress=progress)
            found[which] = {"robustness": robust}
        self.shared[first["sha256"]] = found["original"]["robustness"]
        watch.start("speed", 1)
        prompt = token_stream(tokenizer, text)[: min(PROMPT_TOKENS, first["context"] // 2)]
        rates = speed([*models.values()], prompt, new_tokens=min(32, first["context"] // 2))
        for which, rate in zip(models, rates, strict=True):
            found[which]["speed"] = rate
        watch.step()
        del models, model
        release(self.device)
        return found


def _floats(stored: dict[str, Any]) -> dict[str, float]:
    """nan and inf are strings in JSON."""
    return {key: float(value) for key, value in stored.items()}
