"""The columns of a comparison and how their numbers are printed."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from itertools import groupby

from ultralowbit.eval.base import Column
from ultralowbit.report.markdown import escape, table
from ultralowbit.report.schema import ComparedRow, PackedLinear, Section
from ultralowbit.units import format_quantity

FIXED = (
    Column("linear_bits", "bits per weight", "linear", "bits", "lower"),
    Column("claimed_bits", "bits per weight", "claimed", "claimed"),
    Column("model_bits", "bits per weight", "model", "bits", "lower"),
    Column("file_bytes", "size", "file", "bytes", "lower"),
    Column("compression", "size", "below fp16", "times", "higher"),
    Column("seconds", "cost", "time", "seconds", "lower"),
    Column("peak_memory", "cost", "peak memory", "bytes", "lower"),
)
"""What is counted, and stands beside what is measured."""


def cell(row: ComparedRow, column: Column) -> str:
    """A number of a table, with its spread over seeds where it was measured for several."""
    value = row.metrics.get(column.key)
    if value is None:
        return "-"
    text = format_quantity(value.mean, column.unit)
    if value.std and column.metric is not None:
        if column.unit == "percent":
            std = format_quantity(value.std, "percent")
        elif column.unit == "perplexity":
            std = f"{value.std:.{len(text.partition('.')[2])}f}"
        else:
            std = f"{value.std:.2g}"
        text = f"{text.removesuffix(' %')} ± {std}"
    return text


def sort_key(row: ComparedRow, column: Column) -> str:
    """What a browser sorts a cell by: a number as JavaScript reads it, or nothing."""
    mean = row.mean(column.key)
    return "" if math.isnan(mean) else repr(mean).replace("inf", "Infinity")


def header(columns: Sequence[Column]) -> list[tuple[str, int]]:
    """The upper line of a table's head: each group of neighbouring columns, and how many they are."""
    return [(group, len(list(members))) for group, members in groupby(columns, lambda column: column.group)]


def section_table(section: Section) -> str:
    """The rows and columns of a section as a Markdown table."""
    titles = [escape(f"{column.group}, {column.title}") for column in section.columns]
    lines = []
    for row in section.rows:
        label = escape(row.label)
        lines.append([f"**{label}**" if row.on_front else label, *(cell(row, column) for column in section.columns)])
    return table(["", *titles], lines)


def how_measured(columns: Sequence[Column], notes: Sequence[str]) -> list[str]:
    """How what is drawn and accuracies were measured, where no note says it; windows are described once."""
    lines: list[str] = []
    told = {""}
    for column in columns:
        if not (column.drawn or column.group == "accuracy") or any(column.protocol in note for note in notes):
            continue
        text, _, _ = column.windows.rpartition(": ")
        seen = column.windows if column.windows in told else ""
        lines.append(column.protocol.replace(seen, f"the same windows of {text}") if seen else column.protocol)
        told.add(column.windows)
    return lines


def measured(layers: Sequence[PackedLinear]) -> str:
    """How many of the Linears have a measured error, where not all of them have one, and how many were measured before
    they were trained: "5 of 6 measured, 4 before they were trained"."""
    count = sum(layer.error is not None for layer in layers)
    trained = sum(layer.error is not None and layer.trained for layer in layers)
    parts = [f"{count} of {len(layers)} measured"] * (count < len(layers))
    parts += [f"{'all' if trained == len(layers) else trained} before they were trained"] * (trained > 0)
    return ", ".join(parts)


def slug(name: str) -> str:
    """A name in small letters, digits and hyphens, for files and anchors."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-") or "model"


def place(name: str) -> tuple[int, str]:
    """Block and name within it: model.layers.3.mlp.up_proj -> 3, mlp.up_proj."""
    match = re.search(r"(?:^|\.)(\d+)\.(.+)$", name)
    return (int(match[1]), match[2]) if match else (0, name)
