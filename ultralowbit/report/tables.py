"""Tables and lines of reports, for terminals and Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined
from rich import box
from rich.table import Table

from ultralowbit.eval import zeroshot
from ultralowbit.units import format_bytes, format_number, format_seconds


def render(template: str, values: dict[str, Any]) -> str:
    """One of the package's templates, filled; in a page of HTML every value is escaped."""
    environment = Environment(
        undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True,
        autoescape=template.endswith(".html.j2"),
    )  # fmt: skip
    environment.filters |= {
        "human": format_bytes,
        "clock": format_seconds,
        "number": format_number,
        "percent": "{:.2%}".format,
    }
    environment.globals |= {
        "markdown": markdown, "protocol": protocol, "divergence_lines": divergence_lines,
        "sparsity_lines": sparsity_lines,
    }  # fmt: skip
    text = (files("ultralowbit.report") / "templates" / template).read_text(encoding="utf-8")
    return environment.from_string(text).render(values)


def grid(rows: Sequence[dict[str, Any]]) -> list[list[str]]:
    """Headers and cells of the table of `rows`, which are reports' "original" and "packed"; no column is empty."""
    sources = dict.fromkeys(p["source"] for row in rows for p in row["perplexity"])
    texts = [f"perplexity {Path(source).name}" for source in sources]
    lines = [["", *texts, "linear bits", "claimed bits", "model bits", "file", "time", "peak memory"]]
    for row in rows:
        size = row["size"]
        measured = {p["source"]: format_number(p["perplexity"]) for p in row["perplexity"]}
        linear, claimed = size["linear_bits_per_weight"], size["claimed_bits"]
        lines.append(
            [
                row["label"], *(measured.get(source, "-") for source in sources),
                # an unpacked checkpoint stores all its weights alike
                f"{size['model_bits_per_weight'] if linear is None else linear:.3f}",
                "-" if claimed is None else f"{claimed:.2f}", f"{size['model_bits_per_weight']:.3f}",
                format_bytes(size["file_bytes"]), "-" if row["seconds"] is None else format_seconds(row["seconds"]),
                "-" if row["peak_memory_bytes"] is None else format_bytes(row["peak_memory_bytes"]),
            ]
        )  # fmt: skip
    columns = zip(*lines, strict=True)
    return [list(line) for line in zip(*(c for c in columns if set(c[1:]) != {"-"}), strict=True)]


def table(rows: Sequence[dict[str, Any]]) -> Table:
    """The grid for a terminal of 80 columns."""
    headers, *lines = grid(rows)
    found = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False)
    for i, header in enumerate(headers):
        found.add_column(header.replace(" ", "\n", 1), justify="right" if i else "left", overflow="fold", max_width=18)
    for line in lines:
        found.add_row(*line)
    return found


def markdown(rows: Sequence[dict[str, Any]]) -> str:
    """The grid as a markdown table."""
    headers, *lines = grid(rows)
    rule = ["---", *["---:"] * (len(headers) - 1)]
    return "\n".join(f"| {' | '.join(line)} |" for line in [headers, rule, *lines])


def divergence_lines(measured: Iterable[dict[str, Any]]) -> list[str]:
    """How far the packed model's predictions are from the original's, one line a text."""
    return [
        f"divergence from the original on {Path(f['source']).name}: {float(f['kl_mean']):.3g} nats a token "
        f"(median {float(f['kl_median']):.3g}, 99th percentile {float(f['kl_p99']):.3g}), "
        f"the same likeliest token at {f['top1']:.1%} of positions"
        for f in measured
    ]


def sparsity_lines(packed: dict[str, Any]) -> list[str]:
    """How many bits of 0/1 planes are 0, which a product can skip; one line where there are such planes."""
    shares = packed.get("plane_sparsity", ())
    planes = ", ".join(f"{share:.1%} of plane {plane}" for plane, share in enumerate(shares, 1))
    return [f"zeros among the bits: {planes}, {sum(shares) / len(shares):.1%} of all"] if shares else []


def protocol(measured: Iterable[dict[str, Any]]) -> list[str]:
    """How the perplexities were measured, one line a text: two numbers compare only where these lines agree."""
    return [
        f"{p['source']}: {p['windows']} windows of {p['context']} tokens that do not overlap, "
        f"{p['tokens']:,} predicted, {p['dtype']}, sha256 {p['sha256'][:12]}"
        for p in measured
    ]


Grid = list[list[str]]
"""Headers, then cells."""


def perplexity_grid(rows: Sequence[dict[str, Any]]) -> Grid:
    lines = [["model", "text", "token perplexity", "windows", "context", "tokens", "dtype"]]
    for row in rows:
        for p in row["perplexity"]:
            cells = [
                Path(p.source).name,
                format_number(p.perplexity),
                str(p.windows),
                str(p.context),
                f"{p.tokens:,}",
                p.dtype,
            ]
            lines.append([row["model"], *cells])
    return lines


def fidelity_grid(rows: Sequence[dict[str, Any]]) -> Grid:
    lines = [["model", "text", "KL mean, nats", "median", "p99", "same top-1", "dtype"]]
    for row in rows:
        for label, found in ((f"noise floor: {row['model']}", row["noise_floor"]), (row["model"], row["fidelity"])):
            for f in found:
                numbers = [f"{kl:.3g}" for kl in (f.kl_mean, f.kl_median, f.kl_p99)]
                dtypes = f.dtype if f.dtype == f.base_dtype else f"{f.dtype} against {f.base_dtype}"
                lines.append([label, Path(f.source).name, *numbers, f"{f.top1:.2%}", dtypes])
    return lines


def task_grid(rows: Sequence[dict[str, Any]]) -> Grid:
    """A line for each metric of each task, and for each average; a column for each model."""
    asked = [row for row in rows if row["tasks"]]
    lines = [["task", "metric", "documents", "chance", *(row["model"] for row in asked)]]
    for scores in zip(*(row["tasks"].scores for row in asked), strict=True):
        s = scores[0]
        documents = f"{s.documents:,}" if s.documents == s.of else f"{s.documents:,} of {s.of:,}"
        cells = [_cell(score.value, score.stderr) for score in scores]
        lines.append([s.task, s.metric, documents, _share(s.chance), *cells])
    for means in zip(*(row["tasks"].averages for row in asked), strict=True):
        mean = means[0]
        name, count = _name(mean), f"{len(mean.metrics)} tasks"
        lines.append(["average", name, count, _share(mean.chance), *(_cell(m.value, m.stderr) for m in means)])
        if mean.corrected is not None:
            cells = [_cell(m.corrected, m.corrected_stderr) for m in means]
            lines.append(["average above chance", name, count, "", *cells])
    return lines


def average_notes(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Which metric of which task each average is over."""
    first = next((row["tasks"] for row in rows if row["tasks"]), None)
    return [
        f"average {_name(mean)}: {', '.join(f'{task} {metric}' for task, metric in mean.metrics.items())}"
        for mean in (first.averages if first else ())
    ]


def _name(mean: zeroshot.Average) -> str:
    return " / ".join(sorted({*mean.metrics.values()}, reverse=True))


def _cell(value: float, stderr: float | None) -> str:
    text = f"{value:.4f}" if abs(value) < 1 else format_number(value)
    return text if stderr is None else f"{text} ±{stderr:.4f}" if stderr < 1 else f"{text} ±{format_number(stderr)}"


def _share(chance: float | None) -> str:
    return "" if chance is None else f"{chance:.3f}"
