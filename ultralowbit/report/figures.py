"""The plots of a comparison."""

from __future__ import annotations

import math
import statistics
import sys
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from ultralowbit.eval.base import Column
from ultralowbit.report import plots
from ultralowbit.report.columns import measured, place, slug
from ultralowbit.report.labels import Point
from ultralowbit.report.schema import ORIGINAL, ComparedLayer, ComparedRow, Section
from ultralowbit.report.style import Plot
from ultralowbit.units import format_quantity

BUDGET = (
    "sign planes", "integer codes", "salient values", "scales and offsets", "masks and indices", "head", "embeddings",
    "other",
)  # fmt: skip


def pictures(section: Section) -> list[Plot]:
    """The plots of a section, those that there is something to draw for."""
    pictures = [plot for column in section.columns if column.drawn for plot in _quality(section, column)]
    pictures += [*_divergence(section), *_errors(section), *_bits(section), *_spent(section), *_cost(section)]
    names = [plot.name for plot in pictures]
    return [
        replace(plot, name=f"{name}-{i}") if name in names[:i] else plot
        for i, (plot, name) in enumerate(zip(pictures, names, strict=True))
    ]


def _quality(section: Section, column: Column) -> list[Plot]:
    """One quantity against both sizes; runs that collapsed stand at the edge, where they squeeze nothing."""
    rows = [row for row in section.rows if row.kind != ORIGINAL and column.key in row.metrics]
    guess = section.model.vocabulary if column.unit == "perplexity" else None
    limit = guess or sys.float_info.max
    gone = {row.label: row.mean(column.key) for row in rows if not row.mean(column.key) <= limit}
    if len(gone) == len(rows):
        return []
    original = section.rows[0].mean(column.key)
    level = None
    if math.isfinite(original) and not column.relative:
        level = (f"{ORIGINAL} {format_quantity(original, column.unit)}", original)
    unit, name = _unit(max(row.mean("file_bytes") for row in rows if "file_bytes" in row.metrics))
    panels = []
    for size, label, scale in (
        ("file_bytes", f"file, {name}", unit),
        ("linear_bits", "true bits per Linear weight", 1),
    ):
        points = []
        for row in (row for row in rows if size in row.metrics):
            values, beyond = row.metrics[column.key].values, row.label in gone
            on_front = not beyond and (column.key, size) in row.on_front
            kind = "beyond" if beyond else row.kind
            points.append(
                Point(row.label, row.mean(size) / scale, row.mean(column.key), min(values), max(values), on_front, kind)
            )
        panels.append((label, points))
    axis = column.drawn
    draw = plots.scatter(panels, axis, level, percent=column.unit == "percent")
    return [
        Plot(slug(axis), f"{axis[0].upper()}{axis[1:]}, against size", _caption(column, rows, original, gone), draw)
    ]


def _caption(column: Column, rows: Sequence[ComparedRow], original: float, gone: Mapping[str, float]) -> str:
    """What the marks of a plot of quality mean; `gone` are runs that are off its scale."""
    caption = ""
    if any(key == column.key for row in rows for key, _ in row.on_front):
        caption += " Filled marks on the line are the Pareto front: nothing here is both smaller and better."
    if any(len(row.runs) > 1 for row in rows):
        caption += " A line through a mark spans its seeds."
    if any(row.kind == "reference" for row in rows):
        caption += " Diamonds are references."
    if any(row.kind == "told" for row in rows):
        caption += " Squares are told by others: nothing here has measured them, and their sizes are nominal."
    if column.relative and math.isfinite(original):
        caption += f" Rounding the original's own weights costs {format_quantity(original, column.unit)}."
    if gone:
        off = ", ".join(f"{label} ({format_quantity(value, column.unit)})" for label, value in gone.items())
        caption += f" Triangles at the edge are off the scale: {off}."
    return caption.strip()


def _divergence(section: Section) -> list[Plot]:
    """How it builds up along the blocks: a plot for each set of windows that runs were measured on."""
    by_windows: dict[tuple[str, str], list[ComparedRow]] = defaultdict(list)
    for row in section.rows:
        if row.by_depth:
            by_windows[row.by_depth.sha256, row.by_depth.dtype].append(row)
    drawn = []
    for rows in by_windows.values():
        first = rows[0].by_depth
        series = [(row.label, [kl or math.nan for kl in row.by_depth.kl]) for row in rows]
        series = [line for line in series if any(map(math.isfinite, line[1]))]
        if series:
            caption = (
                f"KL divergence from the original on the first {first.tokens} predictions of {first.source}, where the "
                "original has its first blocks replaced by the packed ones: up to block 0, up to block 1, and so on."
            )
            plot = plots.lines(series, "last packed block", "KL divergence, nats")
            drawn.append(Plot("divergence-by-depth", "Where the predictions come apart", caption, plot))
    return drawn


def _errors(section: Section) -> list[Plot]:
    """Errors of the outputs of the Linears, by depth and by kind, and how far they are from what is possible."""
    depth, by_kind, labels = _layer_means(section, lambda layer: layer.error or None)  # 0 has no place on a log axis
    if not depth:
        return []
    lost = "share of the output lost"
    fewer = [(row.label, measured(row.layers)) for row in section.rows if row.label in labels]
    noted = "".join(f" Of {label}, {of}." for label, of in fewer if of)
    drawn = [
        Plot(
            "error-by-depth", "Where in the model it is lost",
            "Share of the energy of the Linears' outputs that is lost on the calibration text: the mean of a block."
            + noted,
            plots.lines(depth, "block", lost, percent=True),
        ),
        Plot(
            "error-by-linear", "In which Linears it is lost", "The same share: the mean of a kind of Linear." + noted,
            plots.dots(by_kind, labels, lost),
        ),
    ]  # fmt: skip
    _, by_kind, labels = _layer_means(section, lambda layer: layer.times_bound)
    if by_kind:
        caption = (
            "What the Linears lose, divided by the least that any code of as many bits can lose, scales included: the "
            f"rate-distortion bound of their inputs for Gaussian weights. The mean of a kind of Linear.{noted}"
        )
        plot = plots.dots(by_kind, labels, "times the bound", percent=False)
        drawn.append(Plot("error-beside-the-bound", "How far it is from the limit", caption, plot))
    return drawn


def _bits(section: Section) -> list[Plot]:
    """Where the bits are, of runs that give Linears different numbers of them."""
    uneven = [row for row in section.rows if len({layer.format for layer in row.layers}) > 1]
    depth, by_kind, labels = _layer_means(section, lambda layer: layer.bits_per_weight, uneven)
    if not depth:
        return []
    bits = "true bits a weight"
    return [
        Plot("bits-by-depth", "Where the bits are", "The mean of a block.", plots.lines(depth, "block", bits)),
        Plot(
            "bits-by-linear", "Which Linears have them", "The mean of a kind of Linear.",
            plots.dots(by_kind, labels, bits, percent=False),
        ),
    ]  # fmt: skip


def _layer_means(
    section: Section, value: Callable[[ComparedLayer], float | None], rows: Sequence[ComparedRow] | None = None
) -> tuple[list[tuple[str, list[float]]], list[tuple[str, list[float]]], list[str]]:
    """Means over Linears of a value that some of them have: of each run by block, and of each kind by run, with the
    labels of the runs."""
    depth: list[tuple[str, list[float]]] = []
    kinds: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for row in section.rows if rows is None else rows:
        blocks: dict[int, list[float]] = defaultdict(list)
        for layer in row.layers:
            if (number := value(layer)) is not None:
                block, kind = place(layer.name)
                blocks[block].append(number)
                kinds[kind][row.label].append(number)
        if blocks:
            depth.append((row.label, [statistics.fmean(blocks.get(i) or [math.nan]) for i in range(max(blocks) + 1)]))
    labels = [label for label, _ in depth]
    by_kind = [
        (kind, [statistics.fmean(values.get(label) or [math.nan]) for label in labels])
        for kind, values in kinds.items()
    ]
    return depth, by_kind, labels


def budget(row: ComparedRow) -> dict[str, int]:
    """The bytes of a row in the few kinds that are drawn."""
    drawn = dict.fromkeys(BUDGET, 0)
    for kind, count in row.budget.items():
        drawn[kind if kind in drawn else "other"] += count
    return drawn


def _spent(section: Section) -> list[Plot]:
    rows = [row for row in section.rows if row.linear_weights]
    if not rows:
        return []
    unit, name = _unit(max(row.mean("file_bytes") for row in rows))
    stored = ("sign planes", "integer codes", "salient values", "scales and offsets", "masks and indices")
    linear = [
        (
            row.label,
            {k: 8 * row.budget.get(k, 0) / row.linear_weights for k in stored}
            | {"other": 8 * sum(row.budget.get(k, 0) for k in ("input transform", "other parts")) / row.linear_weights},
        )
        for row in rows
    ]  # fmt: skip
    whole = [(row.label, {kind: count / unit for kind, count in budget(row).items()}) for row in rows]
    panels = [("bits per Linear weight", linear), (f"file, {name}", whole)]
    caption = "What is stored for a weight of the packed Linears, and in the whole file with its embeddings and head."
    return [Plot("bit-budget", "What the bits are spent on", caption, plots.stacked(panels, BUDGET, "{:.2f}"))]


def _cost(section: Section) -> list[Plot]:
    panels = []
    for key, label in (("seconds", "seconds on the blocks"), ("peak_memory", "peak memory, GB")):
        rows = [row for row in section.rows if key in row.metrics]
        scale = 1e9 if key == "peak_memory" else 1
        if rows:
            unit = "seconds" if key == "seconds" else "bytes"
            panels.append((label, [(r.label, r.mean(key) / scale, format_quantity(r.mean(key), unit)) for r in rows]))
    if not panels:
        return []
    caption = "Each run was timed where it was made, as is said below; times of different machines do not compare."
    return [Plot("cost", "What compressing costs", caption, plots.bars(panels))]


def _unit(largest: float) -> tuple[float, str]:
    return (1e9, "GB") if largest >= 1e9 else (1e6, "MB") if largest >= 1e6 else (1e3, "kB")
