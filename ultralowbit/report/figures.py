"""The plots of a comparison."""

from __future__ import annotations

import math
import statistics
import sys
from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from typing import Any

from ultralowbit.report import plots
from ultralowbit.report.columns import Column, cell_text, place, slug
from ultralowbit.report.plots import Plot, Point
from ultralowbit.report.runs import ORIGINAL

BUDGET = (
    "sign planes", "integer codes", "salient values", "scales and offsets", "masks and indices", "head", "embeddings",
    "other",
)  # fmt: skip


def pictures(section: dict[str, Any]) -> list[Plot]:
    """The plots of a section, those that there is something to draw for."""
    columns = [Column(**column) for column in section["columns"]]
    found = [plot for column in columns if column.drawn for plot in _quality(section, column)]
    found += [*_divergence(section), *_errors(section), *_spent(section), *_cost(section)]
    names = [plot.name for plot in found]
    return [
        replace(plot, name=f"{name}-{i}") if name in names[:i] else plot
        for i, (plot, name) in enumerate(zip(found, names, strict=True))
    ]


def _mean(row: dict[str, Any], key: str) -> float:
    return row["metrics"].get(key, {"mean": math.nan})["mean"]


def _quality(section: dict[str, Any], column: Column) -> list[Plot]:
    """One quantity against both sizes; runs that collapsed stand at the edge, where they squeeze nothing."""
    rows = [row for row in section["rows"] if row["kind"] != ORIGINAL and column.key in row["metrics"]]
    limit = (section["model"]["vocabulary"] or math.inf) if column.unit == "perplexity" else sys.float_info.max
    gone = {r["label"]: _mean(r, column.key) for r in rows if not _mean(r, column.key) <= limit}
    if len(gone) == len(rows):
        return []
    original = _mean(section["rows"][0], column.key)
    level = (f"{ORIGINAL} {cell_text(original, column.unit)}", original)
    if not math.isfinite(original) or column.unit == "nats":  # of which the original has none but that of rounding
        level = None
    unit, name = _unit(max(_mean(row, "file_bytes") for row in rows))
    panels = []
    for size, label, scale in (("file_bytes", f"file, {name}", unit), ("linear_bits", "true bits a linear weight", 1)):
        points = []
        for row in rows:
            values = row["metrics"][column.key]["values"]
            mean, beyond = _mean(row, column.key), row["label"] in gone
            on_front = not beyond and [column.key, size] in row["on_front"]
            kind = "beyond" if beyond else "reference" if row["kind"] == "reference" else "run"
            points.append(Point(row["label"], _mean(row, size) / scale, mean, min(values), max(values), on_front, kind))
        panels.append((label, points))
    caption = "Filled marks on the line are the Pareto front: nothing here is both smaller and better."
    if any(len(row["runs"]) > 1 for row in rows):
        caption += " A line through a mark spans its seeds."
    if any(row["kind"] == "reference" for row in rows):
        caption += " Diamonds are references."
    if column.unit == "nats" and math.isfinite(original):
        caption += f" Rounding the original's own weights costs {cell_text(original, column.unit)}."
    if gone:
        off = ", ".join(f"{label} ({cell_text(value, column.unit)})" for label, value in gone.items())
        caption += f" Triangles at the edge are off the scale: {off}."
    axis = column.drawn
    draw = plots.scatter(panels, axis, level, percent=column.unit == "percent")
    return [Plot(slug(axis), f"{axis[0].upper()}{axis[1:]}, against size", caption, draw)]


def _divergence(section: dict[str, Any]) -> list[Plot]:
    """How it builds up along the blocks: a plot for each set of windows that runs were measured on."""
    by_windows: dict[tuple[Any, ...], list[dict[str, Any]]] = defaultdict(list)
    for row in section["rows"]:
        if row["by_depth"]:
            by_windows[tuple(row["by_depth"][key] for key in ("sha256", "dtype"))].append(row)
    found = []
    for rows in by_windows.values():
        first = rows[0]["by_depth"]
        series = [(row["label"], [kl or math.nan for kl in row["by_depth"]["kl"]]) for row in rows]
        if any(math.isfinite(kl) for _, line in series for kl in line):
            name = Path(first["source"]).name
            caption = (
                f"KL divergence, on the first {first['tokens']} predictions of {name}, of the original with its first "
                "blocks replaced by the packed ones: up to block 0, up to block 1, and so on."
            )
            axis = "KL divergence, nats"
            plot = plots.lines([line for line in series if any(map(math.isfinite, line[1]))], "last packed block", axis)
            found.append(Plot("divergence-by-depth", "Where the predictions come apart", caption, plot))
    return found


def _errors(section: dict[str, Any]) -> list[Plot]:
    """Of the Linears' outputs, by depth and by kind."""
    depth: list[tuple[str, list[float]]] = []
    kinds: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for row in section["rows"]:
        blocks: dict[int, list[float]] = defaultdict(list)
        for layer in row["layers"]:
            if layer["error"]:  # 0 has no place on a logarithmic axis
                block, kind = place(layer["name"])
                blocks[block].append(layer["error"])
                kinds[kind][row["label"]].append(layer["error"])
        if blocks:
            last = max(blocks)
            depth.append((row["label"], [statistics.fmean(blocks.get(i) or [math.nan]) for i in range(last + 1)]))
    if not depth:
        return []
    labels = [label for label, _ in depth]
    by_kind = [
        (kind, [statistics.fmean(values.get(label) or [math.nan]) for label in labels])
        for kind, values in kinds.items()
    ]
    lost = "share of the output lost"
    return [
        Plot(
            "error-by-depth", "Where in the model it is lost",
            "The energy of the Linears' outputs that is lost on the calibration text, the mean of each block.",
            plots.lines(depth, "block", lost, percent=True),
        ),
        Plot(
            "error-by-linear", "In which Linears it is lost", "The same by kind of Linear, the mean over the blocks.",
            plots.dots(by_kind, labels, lost),
        ),
    ]  # fmt: skip


def budget(row: dict[str, Any]) -> dict[str, int]:
    """The bytes of a row in the few kinds that are drawn."""
    found = dict.fromkeys(BUDGET, 0)
    for kind, count in row["budget"].items():
        found[kind if kind in found else "other"] += count
    return found


def _spent(section: dict[str, Any]) -> list[Plot]:
    rows = [row for row in section["rows"] if row["linear_weights"]]
    unit, name = _unit(max(_mean(row, "file_bytes") for row in rows))
    stored = ("sign planes", "integer codes", "salient values", "scales and offsets", "masks and indices")
    linear = [
        (
            row["label"],
            {k: 8 * row["budget"][k] / row["linear_weights"] for k in stored}
            | {"other": 8 * sum(row["budget"][k] for k in ("input transform", "other parts")) / row["linear_weights"]},
        )
        for row in rows
    ]  # fmt: skip
    whole = [(row["label"], {kind: count / unit for kind, count in budget(row).items()}) for row in rows]
    panels = [("bits a linear weight", linear), (f"file, {name}", whole)]
    caption = "What a weight of the packed Linears costs, and the whole file, embeddings and head included."
    return [Plot("bit-budget", "What the bits are spent on", caption, plots.stacked(panels, BUDGET, "{:.2f}"))]


def _cost(section: dict[str, Any]) -> list[Plot]:
    panels = []
    for key, label in (("seconds", "seconds on the blocks"), ("peak_memory", "peak memory, GB")):
        rows = [row for row in section["rows"] if key in row["metrics"]]
        scale = 1e9 if key == "peak_memory" else 1
        if rows:
            unit = "seconds" if key == "seconds" else "bytes"
            panels.append((label, [(r["label"], _mean(r, key) / scale, cell_text(_mean(r, key), unit)) for r in rows]))
    if not panels:
        return []
    caption = (
        "Of the machine that each run was made on, see the runs below; times of different machines do not compare."
    )
    return [Plot("cost", "What compressing costs", caption, plots.bars(panels))]


def _unit(largest: float) -> tuple[float, str]:
    return (1e9, "GB") if largest >= 1e9 else (1e6, "MB") if largest >= 1e6 else (1e3, "kB")
