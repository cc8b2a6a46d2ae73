"""What lm-eval's tasks gave: scores with the level of chance, their averages, and the columns they stand in."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from hashlib import sha256
from statistics import fmean

from ultralowbit.eval.base import Column, Readings

ACCURACIES = ("acc", "acc_norm")


@dataclass(frozen=True)
class Score:
    """One metric of a task, or of a group of tasks that lm-eval averages itself."""

    task: str
    metric: str
    """As lm-eval names it, with its filter behind a comma where it has one."""
    value: float
    stderr: float | None
    chance: float | None
    """What guessing among the choices of these documents gives, 0 where the answer is free; None if that is not known
    or the metric is no accuracy."""
    documents: int
    of: int
    """Documents that the task has; a limit asks the first of them."""
    shots: int | None
    version: str
    higher_is_better: bool | None


@dataclass(frozen=True)
class Average:
    """The plain mean over tasks, each of which counts once."""

    metrics: dict[str, str]
    """Task -> the metric of it that is averaged."""
    value: float
    stderr: float | None
    """Of the mean, the tasks being independent."""
    chance: float | None
    corrected: float | None
    """Mean of (value - chance) / (1 - chance): 0 for a guess, 1 for no mistake; None where a guess cannot be wrong."""
    corrected_stderr: float | None


def averages(scores: Iterable[Score]) -> list[Average]:
    """Average over tasks: acc, and in a second average acc_norm where a task has it. There are none of a single task,
    and no second one where no task has acc_norm."""
    tasks: dict[str, dict[str, Score]] = {}
    for score in scores:
        if score.metric in ACCURACIES:
            tasks.setdefault(score.task, {})[score.metric] = score
    plain = [by_metric["acc"] for by_metric in tasks.values() if "acc" in by_metric]
    normed = [by_metric.get("acc_norm") or by_metric["acc"] for by_metric in tasks.values()]
    return [_average(chosen) for chosen in ([plain] if plain == normed else [plain, normed]) if len(chosen) > 1]


def _average(scores: Sequence[Score]) -> Average:
    def stderr(errors: Iterable[float | None]) -> float | None:
        known = [*errors]
        return None if None in known else math.sqrt(sum(e * e for e in known)) / len(known)

    chances = [score.chance for score in scores]
    corrected = corrected_stderr = None
    if None not in chances and max(chances) < 1:
        corrected = fmean((s.value - s.chance) / (1 - s.chance) for s in scores)
        corrected_stderr = stderr(None if s.stderr is None else s.stderr / (1 - s.chance) for s in scores)
    return Average(
        metrics={score.task: score.metric for score in scores},
        value=fmean(score.value for score in scores),
        stderr=stderr(score.stderr for score in scores),
        chance=None if None in chances else fmean(chances),
        corrected=corrected,
        corrected_stderr=corrected_stderr,
    )


def task_readings(scores: Iterable[Score], means: Iterable[Average]) -> Readings:
    """The columns of `compare` for accuracies and their averages; two compare where they are of the same documents."""
    readings: Readings = {}
    asked: dict[tuple[str, str], str] = {}
    for score in scores:
        if score.metric.partition(",")[0] in ACCURACIES:
            chance = "" if score.chance is None else f", chance {score.chance:.1%}"
            documents = f"{score.documents} of {score.of} documents, {score.shots or 0} shots"
            title = f"{score.task} {score.metric}"
            how = asked[score.task, score.metric] = f"accuracy, {title}, version {score.version}, {documents}{chance}"
            column = Column(f"task:{how}", "accuracy", title, "percent", "higher", how, metric="tasks")
            readings[column.key] = column, score.value
    for mean in means:
        over = "; ".join(sorted(asked.get(which, "") for which in mean.metrics.items()))
        how = f"mean accuracy over {', '.join(f'{task} {metric}' for task, metric in mean.metrics.items())}"
        normed = ", normed by length" if "acc_norm" in mean.metrics.values() else ""
        column = Column(
            f"tasks:{sha256(over.encode()).hexdigest()[:16]}", "accuracy", f"mean{normed}", "percent", "higher", how,
            drawn=f"mean accuracy{normed}", metric="tasks",
        )  # fmt: skip
        readings[column.key] = column, mean.value
    return readings
