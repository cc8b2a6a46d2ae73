"""Tables and frames that commands print."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich import box
from rich.panel import Panel
from rich.table import Table

from ultralowbit.checkpoint.names import expert_of
from ultralowbit.cli.console import cell, out, say

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from ultralowbit.checkpoint.size import LayerSize, Size
    from ultralowbit.eval.schema import Evaluation
    from ultralowbit.report.schema import Comparison, Row, RunReport


def show(report: RunReport, folder: Path) -> None:
    """Print the table of a report, and below it what nobody may miss; `folder` is where it lies."""
    from ultralowbit.eval.metric import protocols, sentences
    from ultralowbit.report.tables import sparsity_lines, unlike_lines

    original, packed = report.original, report.packed
    out.print(rows_table([original, packed]))
    for line in [*protocols(packed.metrics), *sentences(packed.metrics), *sparsity_lines(packed)]:
        say(line, "dim")
    for line in unlike_lines(report.unlike):
        say(line, "yellow")
    if original.not_measured:
        say(f"original {original.not_measured}", "yellow")
    for source in report.hopeless:
        shout(
            "THE ORIGINAL GUESSES",
            f"On {source} the original itself predicts worse than a guess among the {report.vocabulary} tokens of its "
            "vocabulary: figures of it say nothing. Give a text that it was made for (--eval), or check the model.",
        )
    for source in report.collapsed:
        shout(
            "COLLAPSED",
            f"On {source} the packed model predicts worse than a guess among the {report.vocabulary} tokens of its "
            f"vocabulary: it is not usable. {report.advice}",
        )
    written = report.continuation
    if written and written.repeats:
        shout(
            "COLLAPSED",
            f"After {written.prompt!r} the packed model writes {written.text!r}: it is not usable. {report.advice}",
        )
    if report.fallbacks:
        lines = [f"{name}: {why}" for name, why in report.fallbacks.items()]
        more = [f"and {len(lines) - 5} more, see report.md"] if len(lines) > 5 else []
        shout(
            f"{len(lines)} OF {len(report.layers)} LINEARS FELL BACK TO ROUND-TO-NEAREST", "\n".join(lines[:5] + more)
        )
    if report.exceeded:
        shout("QUALITY GATE FAILED", "\n".join([*(f"{line}." for line in report.exceeded), report.advice]))
    say(f"{folder}  README.md, report.md, report.json")


def rows_table(rows: Sequence[Row]) -> Table:
    """The models of a report, for a terminal of 80 columns."""
    from ultralowbit.report.tables import grid

    headers, *lines = grid(rows)
    table = new_table(*(header.replace(" ", "\n", 1) for header in headers), left=1)
    for column in table.columns:
        column.max_width = 18
    for line in lines:
        table.add_row(*map(cell, line))
    return table


def shout(title: str, text: str) -> None:
    """Print what nobody may miss, in a frame."""
    width = min(out.width, 100)
    out.print(Panel(cell(text), title=title, border_style="bold red", title_align="left", width=width))


def layer_table(size: Size) -> Table:
    """A row for each packed weight, or for a projection of all experts of a layer: its shape and format, bytes, bits
    per weight, and the bits a paper would claim."""
    table = new_table("layer", "shape", "format", "bytes", "bits", "claimed")
    for name, layers in layer_groups([*size.layers, *size.outside]).items():
        count, formats = len(layers), sorted({layer.format for layer in layers})
        nbytes, weights = sum(layer.bytes for layer in layers), sum(layer.weights for layer in layers)
        claimed = sum(layer.claimed_bits * layer.weights for layer in layers) / weights
        shape = "x".join(map(str, layers[0].shape if count == 1 else (count, *layers[0].shape)))
        more = f" and {len(formats) - 1} more" if len(formats) > 1 else ""
        table.add_row(
            cell(name), shape, cell(formats[0] + more), f"{nbytes:,}", f"{8 * nbytes / weights:.3f}", f"{claimed:.2f}"
        )
    return table


def layer_groups(layers: Sequence[LayerSize]) -> dict[str, list[LayerSize]]:
    """The rows of a table of packed weights, by name: the experts of one projection are `experts.*`."""
    groups: dict[str, list[LayerSize]] = {}
    for layer in layers:
        place = expert_of(layer.name)
        groups.setdefault(layer.name if place is None else ".*.packed_".join(place), []).append(layer)
    return groups


def size_table(size: Size) -> Table:
    """The bytes of a whole checkpoint, by what they are spent on."""
    table = new_table("stored", "", "bytes", "in fp16", "bits per weight", "claimed", left=1)
    if size.layers:
        table.add_row(
            "packed linears", str(len(size.layers)), f"{size.linear_bytes:,}", f"{2 * size.linear_weights:,}",
            f"{size.linear_bits_per_weight:.3f}", f"{size.claimed_bits:.2f}",
        )  # fmt: skip
    for kind, count in size.other.items():
        if count:
            table.add_row(kind, "", f"{count:,}")
    table.add_row("headers of the files", "", f"{size.header_bytes:,}")
    table.add_section()
    bits = f"{size.model_bits_per_weight:.3f}"
    table.add_row("whole model", "", f"{size.file_bytes:,}", f"{size.fp16_bytes:,}", bits)
    if size.outside:
        table.add_row("with 16 bits for embedding and head", "", "", "", f"{size.model_bits_before:.3f}")
    return table


def new_table(*headers: str, left: int = 3) -> Table:
    """A table whose first `left` columns are text and the others numbers."""
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False)
    for i, header in enumerate(headers):
        table.add_column(cell(header), justify="left" if i < left else "right", overflow="fold")
    return table


def show_evaluation(evaluation: Evaluation) -> None:
    """Print the tables of `ultralowbit eval`."""
    from ultralowbit.report.tables import average_notes, evaluation_grids

    for model in evaluation.results:
        if model.tasks:
            say(f"{model.model}, lm-eval {model.tasks.version}:")
            say(model.tasks.table)
    for headers, *lines in evaluation_grids(evaluation):
        table = new_table(*headers, left=2)
        for line in lines:
            table.add_row(*map(cell, line))
        out.print(table)
    for line in average_notes(evaluation):
        say(line, "dim")


def show_comparison(comparison: Comparison) -> None:
    """Print the columns of a comparison that a terminal has room for, and why something stands apart."""
    from ultralowbit.report.columns import cell as cell_of
    from ultralowbit.report.columns import how_measured

    for section in comparison.sections:
        if len(comparison.sections) > 1:
            say(section.model.name, "bold")
        columns = [c for c in section.columns if c.drawn or c.key in ("linear_bits", "file_bytes", "seconds")]
        table = new_table("", *(f"{c.group}\n{c.title}" for c in columns), left=1)
        for row in section.rows:
            label = cell(row.label, "bold" if row.on_front else "")
            table.add_row(label, *(cell_of(row, column) for column in columns))
        out.print(table)
        for line in [*section.notes, *how_measured(columns, section.notes)]:
            say(line, "dim")
