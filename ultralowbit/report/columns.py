"""The columns of a comparison and how their numbers are printed."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from ultralowbit.units import format_bytes, format_number, format_seconds


@dataclass(frozen=True)
class Column:
    """One measured quantity: all its numbers compare. `key` names it in report.json."""

    key: str
    group: str
    title: str
    unit: str
    better: str | None = None
    """lower, higher, or None for what is neither"""
    protocol: str | None = None
    """How it was measured; None for what is counted."""
    drawn: str = ""
    """Its name on the axis of a plot against size; nothing for what is not drawn."""


Readings = dict[str, tuple[Column, float]]
"""What was measured of one model, by the columns' keys."""


FIXED = (
    Column("linear_bits", "bits a weight", "linear", "bits", "lower"),
    Column("claimed_bits", "bits a weight", "claimed", "claimed"),
    Column("model_bits", "bits a weight", "model", "bits", "lower"),
    Column("file_bytes", "size", "file", "bytes", "lower"),
    Column("compression", "size", "below fp16", "times", "higher"),
    Column("seconds", "cost", "time", "seconds", "lower"),
    Column("peak_memory", "cost", "peak memory", "bytes", "lower"),
)


_FORMATS: dict[str, Callable[[float], str]] = {
    "perplexity": format_number,
    "bits": "{:.3f}".format,
    "claimed": "{:.2f}".format,
    "bytes": format_bytes,
    "times": "{:.2f} x".format,
    "seconds": lambda seconds: f"{seconds:.1f} s" if seconds < 20 else format_seconds(seconds),
    "percent": lambda share: f"{100 * share:.1f} %",
    "nats": "{:.3g}".format,
}


def cell_text(value: float, unit: str) -> str:
    return _FORMATS[unit](value)


def cell(row: dict[str, Any], column: dict[str, Any]) -> str:
    """A number of a table, with its spread over seeds where it was measured for several."""
    value = row["metrics"].get(column["key"])
    if value is None:
        return "-"
    text = cell_text(float(value["mean"]), column["unit"])
    if value["std"] and column["unit"] in ("perplexity", "percent", "nats"):
        std = cell_text(value["std"], column["unit"])
        if column["unit"] == "perplexity":
            std = f"{value['std']:.{len(text.partition('.')[2])}f}"
        elif column["unit"] == "nats":
            std = f"{value['std']:.2g}"
        text = f"{text.removesuffix(' %')} ± {std}"
    return text


def sort_key(row: dict[str, Any], column: dict[str, Any]) -> str:
    """What a browser sorts a cell by: a number, or nothing."""
    value = row["metrics"].get(column["key"])
    return "" if value is None else repr(float(value["mean"]))


def header(columns: Sequence[dict[str, Any]]) -> list[tuple[str, int]]:
    """The upper line of a table's head: each group of neighbouring columns, and how many they are."""
    return [(group, len(list(found))) for group, found in groupby(columns, lambda column: column["group"])]


def markdown_table(section: dict[str, Any]) -> str:
    columns = section["columns"]
    titles = [f"{column['group']}, {column['title']}" for column in columns]
    lines = [["", *titles], ["---", *["---:"] * len(columns)]]
    for row in section["rows"]:
        label = row["label"].replace("|", "\\|")
        lines.append([f"**{label}**" if row["on_front"] else label, *(cell(row, column) for column in columns)])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def slug(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-") or "model"


def place(name: str) -> tuple[int, str]:
    """Block and name within it: model.layers.3.mlp.up_proj -> 3, mlp.up_proj."""
    found = re.search(r"(?:^|\.)(\d+)\.(.+)$", name)
    return (int(found[1]), found[2]) if found else (0, name)
