"""The runs of `ultralowbit bench methods`: every recipe on every model with every seed, measured and asked tasks."""

from __future__ import annotations

import logging
import math
import re
import statistics
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any

from ultralowbit.errors import CheckpointError, DiskFull, FormatError, InputError, reason
from ultralowbit.eval import zeroshot
from ultralowbit.eval.base import Measured
from ultralowbit.eval.evaluate import Wanted, evaluate_models
from ultralowbit.eval.schema import Evaluation, ModelResults, read_file, write_file
from ultralowbit.progress import Progress
from ultralowbit.recipe import Recipe, at_bits
from ultralowbit.report.run import Texts, compress_and_measure
from ultralowbit.report.schema import Failure, RunReport

log = logging.getLogger(__name__)

TASKS = "eval-tasks.json"
"""What a run's folder holds of the tasks that it was asked."""


@dataclass(frozen=True)
class Methods:
    """What to run: every recipe on every model with every seed."""

    models: tuple[str, ...]
    recipes: tuple[str, ...]
    """By name or path; `ulb-fast:1.6` is one at so many bits."""
    seeds: tuple[int, ...] = (0,)
    settings: tuple[str, ...] = ()
    """Settings of every recipe, as `--set` takes them."""
    small: bool = False
    """Whether recipes take the values that they have for models of a few million parameters."""
    calibrations: tuple[str, ...] = ()
    """Texts, to train on too; the recipe's own unless given. With those after the first only the first seed is run, for
    the tracks."""
    texts: Texts = field(default_factory=Texts)
    with_tracks: bool = True
    tasks: Wanted | None = None
    """Tasks of lm-eval, which the original and each recipe's first seed are asked."""

    def recipe(self, entry: str, seed: int, calibration: str | None = None) -> Recipe:
        """A recipe with everything that was asked of it; `InputError` for bits where it does not share them out."""
        source = calibration or next(iter(self.calibrations), None)
        texts = {"seed": seed} | ({} if source is None else {"source": source})
        name, bits = re.fullmatch(r"(.+?)(?::([\d.]+))?", entry).groups()
        recipe = Recipe.load(name, self.settings, small=self.small, texts=texts)
        if bits is None:
            return recipe
        if recipe.allocate is None:
            raise InputError(
                f"{entry} asks for {bits} bits, but {name} does not share bits out among Linears: say {name}"
            )
        settings = (*self.settings, *at_bits(recipe.name, bits, f"{bits}bit"))
        return Recipe.load(name, settings, small=self.small, texts=texts)

    def runs(self, folder: Path) -> Iterator[tuple[int, str | None, Path]]:
        """Seed, other calibration text and folder of each run of one recipe on one model."""
        for seed in self.seeds:
            yield seed, None, folder / f"seed-{seed}"
        for source in self.calibrations[1:] if self.with_tracks else ():
            name = re.sub(r"[^\w.-]+", "-", Path(source).name)
            yield self.seeds[0], source, folder / f"calibrated-on-{name}"


@dataclass
class Results:
    """What one recipe gave on one model."""

    model: str
    """What the user called the original."""
    recipe: Recipe
    """As it is run with the first seed."""
    folders: list[Path] = field(default_factory=list)
    """One for each seed."""
    reports: list[RunReport] = field(default_factory=list)
    """Those of the folders."""
    recalibrated: dict[str, RunReport] = field(default_factory=dict)
    """Other calibration text -> report."""

    @property
    def seconds(self) -> float:
        """Mean over the seeds."""
        return statistics.fmean(report.packed.seconds for report in self.reports)

    def nll(self, source: str | None) -> list[float]:
        """Nats a token on a text, one for each seed."""
        measured = (result for report in self.reports for result in report.packed.metrics.get("perplexity", ()))
        return [result.nll for result in measured if result.source == source]

    def spread(self, source: str | None) -> float | None:
        """Standard deviation of it over the seeds: infinite where one of them broke the model, None of one seed."""
        nll = self.nll(source)
        if len(nll) < 2:
            return None
        return statistics.stdev(nll) if all(map(math.isfinite, nll)) else math.inf


@dataclass
class Sweep:
    """All runs of one command: where they lie, how they run, and what came of them."""

    wanted: Methods
    out: Path
    device: str
    restart: bool
    trust_remote_code: bool
    watch: Progress
    results: dict[str, dict[str, Results]] = field(default_factory=dict)
    """Model -> recipe -> results."""
    failed: list[Failure] = field(default_factory=list)

    def run(self, model: str, name: str, recipe: str, label: str) -> None:
        """Compress and measure one model with one recipe, with every seed; what fails is noted."""
        results = Results(model, self.wanted.recipe(recipe, self.wanted.seeds[0]))
        for seed, calibration, folder in self.wanted.runs(self.out / "runs" / name / label):
            if results.reports and results.reports[0].calibration is None:
                break  # it read no text: another seed, or text, changes nothing
            try:
                report = compress_and_measure(
                    model, self.wanted.recipe(recipe, seed, calibration), folder, self.wanted.texts,
                    restart=self.restart, known=self._known(name), device=self.device,
                    trust_remote_code=self.trust_remote_code, watch=self.watch,
                )  # fmt: skip
            except DiskFull:
                raise
            except Exception as error:  # one method's trouble is not to cost the others' results
                said = str(error) if isinstance(error, InputError | CheckpointError | FormatError) else reason(error)
                log.warning("%s, %s: %s", name, label, said)
                self.failed.append(Failure(model=name, label=f"{label}/{folder.name}", error=said))
                continue
            if calibration is None:
                results.folders.append(folder)
                results.reports.append(report)
            else:
                results.recalibrated[calibration] = report
        if results.reports:
            self.results[name][label] = results

    def _known(self, name: str) -> Measured:
        """What earlier runs measured of the original."""
        return next((one.reports[0].original.metrics for one in self.results[name].values()), {})

    def ask(self, questions: zeroshot.Tasks, runs: Iterable[Results]) -> None:
        """Leave what the original and the first seed of each recipe score in the run's folder; what is there stands."""
        wanted = self.wanted.tasks
        asked = {
            "tasks": list(wanted.tasks), "tasks_dir": wanted.tasks_dir and str(wanted.tasks_dir), "limit": wanted.limit,
            "lm_eval": version("lm_eval"), "dtype": wanted.dtype and str(wanted.dtype),
        }  # fmt: skip
        original: ModelResults | None = None

        def answers(model: str) -> ModelResults:
            evaluation = evaluate_models(
                [model], wanted, questions=questions, device=self.device, trust_remote_code=self.trust_remote_code,
                watch=self.watch,
            )  # fmt: skip
            return evaluation.results[0]

        for one in runs:
            file = one.folders[0] / TASKS
            key = {**asked, "manifest": one.reports[0].manifest.sha256}
            kept = _answered(file, key)
            original = original or (kept[1] if kept else answers(one.model))
            if not kept:
                now = datetime.now(timezone.utc).isoformat(timespec="seconds")
                packed = answers(str(one.folders[0]))
                write_file(file, Evaluation(created=now, asked=key, results=[packed, original]))


def _answered(file: Path, key: dict[str, Any]) -> list[ModelResults] | None:
    """What an earlier run has left of the packed model and of the original, if it asked the same."""
    try:
        kept = read_file(file, Evaluation, "it is asked again")
    except InputError:
        return None
    return kept.results if kept.asked == key and len(kept.results) == 2 else None
