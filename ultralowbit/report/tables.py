"""Tables and lines of reports, for terminals and Markdown."""

from __future__ import annotations

import json
import shlex
import statistics
from collections.abc import Sequence
from importlib.resources import files
from typing import Any

from jinja2 import Environment, StrictUndefined

from ultralowbit.eval.base import Measured, without_original
from ultralowbit.eval.metric import METRICS, protocols, sentences
from ultralowbit.eval.schema import Evaluation, ModelResults
from ultralowbit.eval.scores import Average
from ultralowbit.report.columns import measured, place
from ultralowbit.report.markdown import code, escape, table
from ultralowbit.report.schema import Layer, Row
from ultralowbit.units import format_bytes, format_number, format_seconds


def render(template: str, **values: Any) -> str:
    """Fill one of the package's templates; in a page of HTML every value is escaped.

    In Markdown, `md` escapes text, `code` makes a code span of it, `quoted` makes it one word of a shell command.
    """
    environment = Environment(
        undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True,
        autoescape=template.endswith(".html.j2"),
    )  # fmt: skip
    environment.filters |= {
        "human": format_bytes,
        "clock": format_seconds,
        "percent": "{:.2%}".format,
        "md": escape,
        "code": code,
        "quoted": shlex.quote,
        "python": json.dumps,
        "sentence": lambda line: line[:1].upper() + line[1:],
    }
    environment.globals |= {
        "markdown": markdown, "protocols": protocols, "sentences": sentences, "sparsity_lines": sparsity_lines,
        "unlike_lines": unlike_lines, "bits_map": bits_map, "mean_times_bound": mean_times_bound, "measured": measured,
    }  # fmt: skip
    text = (files("ultralowbit.report") / "templates" / template).read_text(encoding="utf-8")
    return environment.from_string(text).render(values)


def grid(rows: Sequence[Row]) -> list[list[str]]:
    """Headers and cells of a table of models: what was measured of each alone, then what was counted.

    Columns that say nothing of any row are left out.
    """
    measured: list[tuple[str, str]] = []
    for name in without_original(METRICS):
        measured += dict.fromkeys((name, result.source) for row in rows for result in row.metrics.get(name, ()))
    headers = [f"{METRICS[name].quantities[0].said} {source}" for name, source in measured]
    lines = [["", *headers, "linear bits", "claimed bits", "model bits", "file", "time", "peak memory"]]
    for row in rows:
        cells = {
            (name, result.source): METRICS[name].cells(result)[0]
            for name in without_original(METRICS)
            for result in row.metrics.get(name, ())
        }
        size = row.size
        lines.append(
            [
                row.label, *(cells.get(key, "-") for key in measured), f"{size.bits:.3f}",
                "-" if size.claimed_bits is None else f"{size.claimed_bits:.2f}", f"{size.model_bits_per_weight:.3f}",
                format_bytes(size.file_bytes), "-" if row.seconds is None else format_seconds(row.seconds),
                "-" if row.peak_memory_bytes is None else format_bytes(row.peak_memory_bytes),
            ]
        )  # fmt: skip
    columns = zip(*lines, strict=True)
    return [list(line) for line in zip(*(c for c in columns if set(c[1:]) != {"-"}), strict=True)]


def markdown(rows: Sequence[Row]) -> str:
    """The grid as a Markdown table."""
    headers, *lines = grid(rows)
    return table([escape(header) for header in headers], [[escape(cell) for cell in line] for line in lines])


def unlike_lines(source: str | None) -> list[str]:
    """That a text which stood in for one to be named is of another kind; no line where it is not."""
    return [f"measured on {source}, which is not the calibration's kind of text: give --eval"] if source else []


def sparsity_lines(packed: Row) -> list[str]:
    """How many bits of 0/1 planes are 0, which a product can skip; one line where there are such planes."""
    shares = packed.plane_sparsity
    planes = ", ".join(f"{share:.1%} of plane {plane}" for plane, share in enumerate(shares, 1))
    return [f"zeros among the bits: {planes}, {sum(shares) / len(shares):.1%} of all"] if shares else []


Grid = list[list[str]]
"""Headers, then cells."""


def mean_times_bound(layers: Sequence[Layer]) -> float:
    """How many times the rate-distortion bound Linears lose, the mean over those where that is known."""
    return statistics.fmean(times for layer in layers if (times := layer.times_bound) is not None)


def bits_map(layers: Sequence[Layer]) -> list[str]:
    """A line for each kind of Linear with the true bits of each block, in a digit where one says it; no lines where all
    are alike."""
    whole = all(abs(layer.bits_per_weight - round(layer.bits_per_weight)) < 0.2 for layer in layers)
    kinds: dict[str, dict[int, str]] = {}
    for layer in layers:
        block, kind = place(layer.name)
        kinds.setdefault(kind, {})[block] = f"{layer.bits_per_weight:.{0 if whole else 1}f}"
    texts = {text for blocks in kinds.values() for text in blocks.values()}
    if len(texts) < 2:
        return []
    width, depth = max(map(len, kinds)), 1 + max(block for blocks in kinds.values() for block in blocks)
    wide = max(map(len, texts))
    gap = " " if wide > 1 else ""
    return [
        f"{kind:<{width}}  {gap.join(blocks.get(block, '').rjust(wide) for block in range(depth))}".rstrip()
        for kind, blocks in sorted(kinds.items())
    ]


def evaluation_grids(evaluation: Evaluation) -> list[Grid]:
    """The tables of `ultralowbit eval`: one for each metric that was measured, and one of the tasks."""
    grids = [_metric_grid(name, evaluation.results) for name in METRICS]
    return [lines for lines in (*grids, _task_grid(evaluation.results)) if len(lines) > 1]


def _metric_grid(name: str, models: Sequence[ModelResults]) -> Grid:
    """A line for each model and text, and above it what rounding the original costs."""
    metric = METRICS[name]
    lines = [["model", "text", *(q.title for q in metric.quantities), "windows", "context", "tokens", "dtype"]]

    def add(label: str, measured: Measured) -> None:
        for r in measured.get(name, ()):
            how = [str(r.windows), str(r.context), f"{r.tokens:,}", r.precision]
            lines.append([label, r.source, *metric.cells(r), *how])

    for model in models:
        add(f"noise floor: {model.model}", model.noise_floor)
        add(model.model, model.metrics)
    return lines


def _task_grid(models: Sequence[ModelResults]) -> Grid:
    """A line for each metric of each task, and for each average; a column for each model."""
    asked = [model for model in models if model.tasks]
    lines = [["task", "metric", "documents", "chance", *(model.model for model in asked)]]
    for scores in zip(*(model.tasks.scores for model in asked), strict=True):
        s = scores[0]
        documents = f"{s.documents:,}" if s.documents == s.of else f"{s.documents:,} of {s.of:,}"
        cells = [_score(score.value, score.stderr) for score in scores]
        lines.append([s.task, s.metric, documents, _chance(s.chance), *cells])
    for means in zip(*(model.tasks.averages for model in asked), strict=True):
        mean = means[0]
        name, count = _name(mean), f"{len(mean.metrics)} tasks"
        lines.append(["average", name, count, _chance(mean.chance), *(_score(m.value, m.stderr) for m in means)])
        if mean.corrected is not None:
            cells = [_score(m.corrected, m.corrected_stderr) for m in means]
            lines.append(["average above chance", name, count, "", *cells])
    return lines


def average_notes(evaluation: Evaluation) -> list[str]:
    """Which metric of which task each average is over."""
    first = next((model.tasks for model in evaluation.results if model.tasks), None)
    return [
        f"average {_name(mean)}: {', '.join(f'{task} {metric}' for task, metric in mean.metrics.items())}"
        for mean in (first.averages if first else ())
    ]


def _name(mean: Average) -> str:
    return " / ".join(sorted({*mean.metrics.values()}, reverse=True))


def _score(value: float, stderr: float | None) -> str:
    text = f"{value:.4f}" if abs(value) < 1 else format_number(value)
    return text if stderr is None else f"{text} ±{stderr:.4f}" if stderr < 1 else f"{text} ±{format_number(stderr)}"


def _chance(chance: float | None) -> str:
    return "" if chance is None else f"{chance:.3f}"
