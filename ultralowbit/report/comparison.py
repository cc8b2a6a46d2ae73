"""`ultralowbit compare`: finished runs side by side on one page, and apart what does not compare."""

from __future__ import annotations

import json
import math
import os
import re
import statistics
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from ultralowbit.checkpoint.manifest import MANIFEST
from ultralowbit.checkpoint.storage import write_atomic
from ultralowbit.errors import InputError
from ultralowbit.eval.base import Column, Readings
from ultralowbit.eval.fidelity import Depth
from ultralowbit.eval.metric import METRICS
from ultralowbit.eval.schema import write_file
from ultralowbit.report import style
from ultralowbit.report.columns import FIXED, cell, header, how_measured, place, section_table, slug, sort_key
from ultralowbit.report.figures import pictures
from ultralowbit.report.runs import Reference, Run, find_runs
from ultralowbit.report.schema import (
    ORIGINAL,
    REPORT,
    ComparedLayer,
    ComparedModel,
    ComparedRow,
    Comparison,
    Failure,
    PackedLinear,
    Provenance,
    Section,
    SizeRecord,
    Value,
)
from ultralowbit.report.tables import render
from ultralowbit.report.told import Told


def write_comparison(
    folders: Sequence[Path | str],
    out: Path | str,
    references: Sequence[Path | str] = (),
    *,
    told: Sequence[Path] = (),
    command: str | None = None,
    failed: Sequence[Failure] = (),
    title: str | None = None,
    tracks: dict[str, Any] | None = None,
) -> Comparison:
    """Write report.html, report.md, report.json and the plots of the runs in `folders` into `out`.

    `told` are YAML files of results without a folder, see `Told`; `failed` are runs that gave no result; `tracks` are
    those of `bench methods`. Returns what report.json holds, see `collect`. Raises `InputError` for runs that cannot be
    read, or where `out` holds something else.
    """
    out = Path(out).expanduser()
    may_write(out)
    style.require()
    sections = collect(folders, out, references, [Told.read(path) for path in told])
    comparison = Comparison(
        created=datetime.now(timezone.utc).isoformat(timespec="seconds"), command=command,
        title=title or " and ".join(section.model.name for section in sections), sections=sections,
        failed=list(failed), tracks=tracks,
    )  # fmt: skip
    write(out, comparison)
    return comparison


def collect(
    folders: Sequence[Path | str], out: Path, references: Sequence[Path | str] = (), told: Sequence[Told] = ()
) -> list[Section]:
    """A section for each original, with a column for each quantity and a row for each run.

    Runs that differ only in the seed are one row. A measured number compares with others on the very same windows, in
    the same dtype, and has a column with them alone. A reference, which may be of another original, stands in each
    section that was measured alike, and is refused if none was; so does what is told. Links start at the folder `out`.
    """
    runs, plain = find_runs(folders)
    more, more_plain = find_runs(references)
    if not runs:
        raise InputError("no compressed model to compare: give folders that `ultralowbit compress` wrote")
    others = [*plain, *more_plain, *map(_as_reference, more)]
    _check_references(others, runs)
    by_base: dict[str, list[Run]] = defaultdict(list)
    for run in runs:
        by_base[run.base].append(run)
    sections = [_section(base, group, others, out, told) for base, group in by_base.items()]
    for file in told:
        file.refuse_unknown(column.drawn for section in sections for column in section.columns if column.drawn)
    names = Counter(section.model.name for section in sections)
    for section in sections:
        name, digest = section.model.name, section.model.sha256
        section.slug = slug(name if names[name] == 1 else f"{name}-{digest[:6]}")
    return sections


def may_write(out: Path) -> None:
    """Raise `InputError` if `out` holds something that the comparison would replace."""
    try:
        there = json.loads((out / REPORT).read_bytes())
    except FileNotFoundError:
        there = {"kind": "comparison"}
    except (OSError, ValueError, RecursionError):
        there = None
    if (out / MANIFEST).exists() or not isinstance(there, dict) or there.get("kind") != "comparison":
        raise InputError(f"{out} holds a report of something else: choose another --out")


def _check_references(others: Sequence[Reference], runs: Sequence[Run]) -> None:
    """Raise `InputError` for a reference that was measured as no run was."""
    known = {key for run in runs for key in run.readings}
    for other in others:
        if not known & other.readings.keys():
            theirs = "; ".join(column.protocol for column, _ in other.readings.values()) or "nothing"
            raise InputError(
                f"{other.folder} was measured in other ways than every run ({theirs}), so no number of it compares: "
                "measure both with one `ultralowbit eval` command, and --json into a file eval.json in each folder"
            )


def _as_reference(run: Run) -> Reference:
    return Reference(run.folder, f"{_model_name(run)}, {run.recipe}", run.report.packed.size, run.readings, run)


def _model_name(run: Run) -> str:
    name = Path(run.report.model.partition("@")[0]).name
    return name if name not in ("", "..") else f"model {run.base[:8]}"


def _section(base: str, runs: list[Run], others: Sequence[Reference], out: Path, told: Sequence[Told]) -> Section:
    """All that compares with one original."""
    groups, notes = _groups(runs)
    before: Readings = {}
    for run in runs:
        before = {**run.original, **before}
    measured = {key: column for run in runs for key, (column, _) in run.readings.items()}
    first = runs[0].report
    size = first.original.size
    written = {s.prompt: s.original for run in runs for s in run.report.samples if s.original is not None}
    rows = [_row(ORIGINAL, ORIGINAL, [_metrics(before, size)], size, written=written)]
    labelled = zip(_labels(groups), groups, strict=True)
    run_rows = [_run_row(label, group, out) for label, group in labelled]
    rows += sorted(run_rows, key=lambda row: -row.mean("file_bytes"))
    for other in others:
        readings = {key: reading for key, reading in other.readings.items() if key in measured}
        if readings:
            runs_of = [_provenance(other.run, out)] if other.run else []
            rows.append(_row(other.label, "reference", [_metrics(readings, other.size)], other.size, runs=runs_of))
    present = {key for row in rows for key in row.metrics}
    order = [*METRICS, "tasks"]
    in_order = sorted(measured.values(), key=lambda column: order.index(column.metric))
    columns = _told_apart([column for column in [*in_order, *FIXED] if column.key in present])
    for file in told:
        if more := file.compared(columns):
            rows += more
            notes.append(file.note(more))
    _mark_front(rows, columns)
    notes += _split(columns, rows)
    if not before:
        notes.append(f"The original was {first.original.not_measured or 'not measured'}.")
    model = ComparedModel(
        name=_model_name(runs[0]), sha256=base, weights=size.total_weights, fp16_bytes=size.fp16_bytes,
        vocabulary=first.vocabulary,
    )  # fmt: skip
    return Section(model=model, columns=columns, rows=rows, notes=notes)


def _groups(runs: Sequence[Run]) -> tuple[list[list[Run]], list[str]]:
    """Runs that differ only in the seed, and a note for each that is there twice."""
    groups: dict[str, list[Run]] = defaultdict(list)
    notes = []
    for run in runs:
        group = groups[run.but_for_the_seed]
        twin = next((r for r in group if r.seed == run.seed), None)
        if twin is None:
            group.append(run)
        else:
            notes.append(f"{run.folder} is the same run as {twin.folder} and is left out.")
    return list(groups.values()), notes


def _told_apart(columns: list[Column]) -> list[Column]:
    """Columns of one title get numbers."""
    titles = [(column.group, column.title) for column in columns]
    counts = Counter(titles)
    numbered = []
    for i, (column, title) in enumerate(zip(columns, titles, strict=True)):
        if counts[title] > 1:
            number = f" ({titles[: i + 1].count(title)})"
            column = replace(column, title=column.title + number, drawn=column.drawn and column.drawn + number)
        numbered.append(column)
    return numbered


def _split(columns: Sequence[Column], rows: Sequence[ComparedRow]) -> list[str]:
    """Why one text has several columns."""
    notes = []
    for column in columns:
        if column.drawn and re.search(r" \(\d+\)$", column.title):
            owners = [row.label for row in rows if row.kind == "run" and column.key in row.metrics]
            who = ", ".join(owners) if len(owners) < 5 else f"{len(owners)} runs"
            notes.append(f"{column.drawn[0].upper()}{column.drawn[1:]} is of {who}: {column.protocol}.")
    if notes:
        notes.insert(0, "One text was measured in several ways that do not compare, each in columns of its own.")
    return notes


def _labels(groups: list[list[Run]]) -> list[str]:
    """The recipe's name, and where several groups have it, as much of the folder as tells them apart."""
    names = [group[0].recipe for group in groups]
    paths = [(g[0].folder.resolve() if len(g) == 1 else g[0].folder.resolve().parent).parts for g in groups]
    labels = []
    for name, path in zip(names, paths, strict=True):
        rivals = [p for n, p in zip(names, paths, strict=True) if n == name and p is not path]
        if not rivals:
            labels.append(name)
            continue
        tail = next((k for k in range(1, len(path)) if all(p[-k:] != path[-k:] for p in rivals)), len(path))
        labels.append("/".join(path[-tail:]) if name in path[-tail] else f"{name} ({'/'.join(path[-tail:])})")
    return labels


def _value(values: Sequence[float]) -> Value:
    finite = all(math.isfinite(v) for v in values)
    return Value(
        mean=statistics.fmean(values) if finite else next(v for v in values if not math.isfinite(v)),
        std=statistics.stdev(values) if finite and len(values) > 1 else None, values=list(values),
    )  # fmt: skip


def _metrics(readings: Readings, size: SizeRecord) -> dict[str, float | None]:
    """Numbers of one model by the keys of the columns."""
    return {
        **{key: value for key, (_, value) in readings.items()},
        "linear_bits": size.bits,
        "claimed_bits": size.claimed_bits,
        "model_bits": size.model_bits_per_weight,
        "file_bytes": size.file_bytes,
        "compression": size.compression,
    }


def _row(
    label: str, kind: str, measured: Sequence[Mapping[str, float | None]], size: SizeRecord, **more: Any
) -> ComparedRow:
    """`measured` are the numbers of each seed, not all of which need have them all."""
    keys = dict.fromkeys(key for m in measured for key, value in m.items() if value is not None)
    return ComparedRow(
        label=label, kind=kind, budget=size.budget, linear_weights=size.linear_weights,
        metrics={key: _value([m[key] for m in measured if m.get(key) is not None]) for key in keys}, **more,
    )  # fmt: skip


def _run_row(label: str, group: Sequence[Run], out: Path) -> ComparedRow:
    measured = []
    for run in group:
        packed = run.report.packed
        cost = {"seconds": packed.seconds, "peak_memory": packed.peak_memory_bytes}
        measured.append({**_metrics(run.readings, packed.size), **cost})
    return _row(
        label, "run", measured, group[0].report.packed.size, layers=_layers(group), by_depth=_by_depth(group),
        written={sample.prompt: sample.packed for sample in group[0].report.samples},
        runs=[_provenance(run, out) for run in group],
    )  # fmt: skip


def _by_depth(group: Sequence[Run]) -> Depth | None:
    """The divergence by depth, the mean over the seeds that were measured on the windows of the first."""
    measured = [depth for run in group if (depth := run.report.packed.divergence_by_depth)]
    if not measured:
        return None
    first = measured[0]
    alike = [d for d in measured if (d.sha256, d.dtype, len(d.kl)) == (first.sha256, first.dtype, len(first.kl))]
    return replace(first, kl=tuple(statistics.fmean(block) for block in zip(*(d.kl for d in alike), strict=True)))


def _layers(group: Sequence[Run]) -> list[ComparedLayer]:
    """Each Linear with its errors, means over seeds, in the order of the model."""
    reports = [{layer.name: layer for layer in run.report.layers} for run in group]
    layers = []
    for name in group[0].manifest["layers"]:
        if name in reports[0]:
            first = reports[0][name].model_dump(include={*PackedLinear.model_fields} - {"error", "least_error"})
            means = {}
            for key in ("error", "least_error"):
                values = [getattr(report[name], key) for report in reports if name in report]
                means[key] = None if None in values else statistics.fmean(values)
            layers.append(ComparedLayer(**first, **means))
    return sorted(layers, key=lambda layer: place(layer.name)[0])


def _provenance(run: Run, out: Path) -> Provenance:
    """What every number of a run can be traced to."""
    report = run.report
    return Provenance(
        folder=os.path.relpath(run.folder.resolve(), out.resolve()), manifest=MANIFEST, sha256=run.sha256,
        model=report.model, recipe=report.recipe.described, seed=run.seed, command=report.command,
        calibration=report.calibration, environment=report.environment, collapsed=report.collapsed,
        fallbacks=report.fallbacks,
    )  # fmt: skip


def _mark_front(rows: Sequence[ComparedRow], columns: Sequence[Column]) -> None:
    """Note in each row on which fronts it stands: the pairs of a quality and a size that no other beats in both."""
    for quality in (column for column in columns if column.drawn):
        for size in ("file_bytes", "linear_bits"):
            points = {
                i: (row.mean(size), row.mean(quality.key))
                for i, row in enumerate(rows)
                if math.isfinite(row.mean(quality.key)) and math.isfinite(row.mean(size))
            }
            if sum(rows[i].kind != ORIGINAL for i in points) < 2:
                continue  # there is nothing to choose from
            for i in front(points, higher=quality.better == "higher"):
                rows[i].on_front.append((quality.key, size))


def front(points: dict[int, tuple[float, float]], higher: bool = False) -> list[int]:
    """Which of the points (size, quality) no other one beats: is as good in both, and better in one."""
    sign = -1 if higher else 1
    return [
        i
        for i, (x, y) in points.items()
        if not any(a <= x and sign * b <= sign * y and (a, b) != (x, y) for a, b in points.values())
    ]


def _prompts(section: Section) -> list[str]:
    """What the models of a section were asked to continue."""
    return list(dict.fromkeys(prompt for row in section.rows for prompt in row.written))


def write(out: Path, comparison: Comparison) -> None:
    """Write the page, the Markdown, the JSON, and a folder of plots; report.html is whole in itself."""
    folder = out / "plots"
    folder.mkdir(parents=True, exist_ok=True)
    drawn = []
    for section in comparison.sections:
        prefix = f"{section.slug}-" if len(comparison.sections) > 1 else ""
        figures = []
        for plot in pictures(section):
            plot = replace(plot, name=prefix + plot.name)
            figures.append(
                {"name": plot.name, "title": plot.title, "caption": plot.caption, **style.save(plot, folder)}
            )
        drawn.append(figures)
        section.plots = [f"plots/{figure['name']}.{suffix}" for figure in figures for suffix in ("png", "svg")]
    shown = {
        **dict(comparison), "drawn": drawn, "colours": style.COLOURS, "cell": cell, "sort_key": sort_key,
        "header": header, "how_measured": how_measured, "section_table": section_table, "prompts": _prompts,
    }  # fmt: skip
    write_file(out / REPORT, comparison)
    write_atomic(out / "report.md", render("compare.md.j2", **shown).encode())
    write_atomic(out / "report.html", render("compare.html.j2", **shown).encode())
