"""`ultralowbit compare`: finished runs side by side on one page, and apart what does not compare."""

from __future__ import annotations

import json
import math
import os
import re
import statistics
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import asdict, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from ultralowbit.checkpoint.manifest import MANIFEST
from ultralowbit.checkpoint.storage import write_atomic, write_json
from ultralowbit.errors import InputError
from ultralowbit.report import plots
from ultralowbit.report.columns import FIXED, Column, Readings, cell, header, markdown_table, place, slug, sort_key
from ultralowbit.report.figures import pictures
from ultralowbit.report.runs import ORIGINAL, Reference, Run, find_runs
from ultralowbit.report.schema import SCHEMA_VERSION, strict
from ultralowbit.report.tables import render


def write_comparison(
    folders: Sequence[Path | str],
    out: Path | str,
    references: Sequence[Path | str] = (),
    *,
    command: str | None = None,
    failed: Sequence[dict[str, str]] = (),
    title: str | None = None,
    tracks: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Write report.html, report.md, report.json and the plots of the runs in `folders` into `out`.

    `failed` are runs that gave no result: {"label", "model", "error"}; `tracks` are those of `bench methods`. Returns
    what report.json holds, see `collect`.
    """
    out = Path(out).expanduser()
    may_write(out)
    plots.require()
    sections = collect(folders, out, references)
    comparison = {
        "schema_version": SCHEMA_VERSION,
        "kind": "comparison",
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": command,
        "title": title or " and ".join(section["model"]["name"] for section in sections),
        "sections": sections,
        "failed": list(failed),
        "tracks": tracks,
    }
    write(out, comparison)
    return comparison


def collect(folders: Sequence[Path | str], out: Path, references: Sequence[Path | str] = ()) -> list[dict[str, Any]]:
    """A section for each original, with a column for each quantity and a row for each run.

    Runs that differ only in the seed are one row; a perplexity compares with others on the very same windows, in the
    same dtype, and has a column with them alone. A reference, which may be of another original, stands in each section
    that was measured alike, and is refused if none was. Links are from the folder `out`.
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
    sections = [_section(base, group, others, out) for base, group in by_base.items()]
    names = Counter(section["model"]["name"] for section in sections)
    for section in sections:
        name, digest = section["model"]["name"], section["model"]["sha256"]
        section["slug"] = slug(name if names[name] == 1 else f"{name}-{digest[:6]}")
    return sections


def may_write(out: Path) -> None:
    """Raise `InputError` if `out` holds something that the report would replace."""
    try:
        there = json.loads((out / "report.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        there = None
    if (out / MANIFEST).exists() or (isinstance(there, dict) and there.get("kind") != "comparison"):
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
    return Reference(run.folder, f"{_model_name(run)}, {run.recipe}", run.report["packed"]["size"], run.readings, run)


def _model_name(run: Run) -> str:
    name = Path(run.report["model"].partition("@")[0]).name
    return name if name not in ("", "..") else f"model {run.base[:8]}"


def _section(base: str, runs: list[Run], others: Sequence[Reference], out: Path) -> dict[str, Any]:
    """All that compares with one original."""
    groups: dict[str, list[Run]] = defaultdict(list)
    notes = []
    for run in runs:
        group = groups[run.but_for_the_seed]
        twin = next((r for r in group if r.seed == run.seed), None)
        if twin is None:
            group.append(run)
        else:
            notes.append(f"{run.folder} is the same run as {twin.folder} and is left out.")
    labels = _labels(list(groups.values()))
    before: Readings = {}
    for run in runs:
        before = {**run.original, **before}
    measured = {key: column for run in runs for key, (column, _) in run.readings.items()}
    others = [other for other in others if measured.keys() & other.readings.keys()]
    original = runs[0].report[ORIGINAL]
    rows = [_row(ORIGINAL, ORIGINAL, [_metrics(before, original["size"])], original["size"])]
    run_rows = [_run_row(label, group, out) for label, group in zip(labels, groups.values(), strict=True)]
    rows += sorted(run_rows, key=lambda row: -row["metrics"]["file_bytes"]["mean"])
    for other in others:
        readings = {key: reading for key, reading in other.readings.items() if key in measured}
        runs_of = [_provenance(other.run, out)] if other.run else []
        rows.append(_row(other.label, "reference", [_metrics(readings, other.size)], other.size, runs=runs_of))
    present = {key for row in rows for key in row["metrics"]}
    in_order = sorted(measured.values(), key=lambda c: ("perplexity", "fidelity", "accuracy").index(c.group.split()[0]))
    columns = _told_apart([column for column in [*in_order, *FIXED] if column.key in present])
    _mark_front(rows, columns)
    notes += _split(columns, rows)
    if not before:
        notes.append(f"The original was {original['not_measured'] or 'not measured'}.")
    model = {"name": _model_name(runs[0]), "sha256": base, "weights": original["size"]["total_weights"]}
    return {
        "model": {**model, "fp16_bytes": original["size"]["fp16_bytes"], "vocabulary": runs[0].report["vocabulary"]},
        "columns": [asdict(column) for column in columns],
        "rows": rows,
        "notes": notes,
    }


def _told_apart(columns: list[Column]) -> list[Column]:
    """Columns of one title get numbers."""
    titles = [(column.group, column.title) for column in columns]
    counts = Counter(titles)
    found = []
    for i, (column, title) in enumerate(zip(columns, titles, strict=True)):
        if counts[title] > 1:
            number = f" ({titles[: i + 1].count(title)})"
            column = replace(column, title=column.title + number, drawn=column.drawn and column.drawn + number)
        found.append(column)
    return found


def _split(columns: Sequence[Column], rows: Sequence[dict[str, Any]]) -> list[str]:
    """Why one text has several columns."""
    notes = []
    for column in columns:
        if column.drawn and re.search(r" \(\d+\)$", column.title):
            owners = [row["label"] for row in rows if row["kind"] == "run" and column.key in row["metrics"]]
            who = ", ".join(owners) if len(owners) < 5 else f"{len(owners)} runs"
            notes.append(f"{column.drawn.capitalize()} is of {who}: {column.protocol}.")
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


def _value(values: Sequence[float]) -> dict[str, Any]:
    finite = all(math.isfinite(v) for v in values)
    return {
        "mean": statistics.fmean(values) if finite else next(v for v in values if not math.isfinite(v)),
        "std": statistics.stdev(values) if finite and len(values) > 1 else None,
        "values": list(values),
    }


def _metrics(readings: Readings, size: dict[str, Any]) -> dict[str, float | None]:
    linear = size["linear_bits_per_weight"]
    return {
        **{key: value for key, (_, value) in readings.items()},
        # an unpacked checkpoint stores all its weights alike
        "linear_bits": size["model_bits_per_weight"] if linear is None else linear,
        "claimed_bits": size["claimed_bits"],
        "model_bits": size["model_bits_per_weight"],
        "file_bytes": size["file_bytes"],
        "compression": size["compression"],
    }


def _row(
    label: str, kind: str, measured: Sequence[dict[str, float | None]], size: dict[str, Any], **more: Any
) -> dict[str, Any]:
    """`measured` are the metrics of each seed, not all of which need have them all."""
    keys = dict.fromkeys(key for m in measured for key, value in m.items() if value is not None)
    return {
        "label": label,
        "kind": kind,
        "on_front": [],
        "metrics": {key: _value([m[key] for m in measured if m.get(key) is not None]) for key in keys},
        "budget": size["budget"],
        "linear_weights": size["linear_weights"],
        "layers": [],
        "by_depth": None,
        "runs": [],
        **more,
    }


def _run_row(label: str, group: Sequence[Run], out: Path) -> dict[str, Any]:
    measured = []
    for run in group:
        packed = run.report["packed"]
        cost = {"seconds": packed["seconds"], "peak_memory": packed["peak_memory_bytes"]}
        measured.append({**_metrics(run.readings, packed["size"]), **cost})
    size = group[0].report["packed"]["size"]
    return _row(
        label, "run", measured, size, layers=_layers(group), by_depth=_by_depth(group),
        runs=[_provenance(run, out) for run in group],
    )  # fmt: skip


def _by_depth(group: Sequence[Run]) -> dict[str, Any] | None:
    """The divergence by depth, the mean over the seeds that were measured on the windows of the first."""
    found = [depth for run in group if (depth := run.report["packed"].get("divergence_by_depth"))]
    alike = [d for d in found if (d["sha256"], d["dtype"]) == (found[0]["sha256"], found[0]["dtype"])]
    kl = [statistics.fmean(map(float, block)) for block in zip(*(d["kl"] for d in alike), strict=True)]
    return {**found[0], "kl": kl} if found else None


def _layers(group: Sequence[Run]) -> list[dict[str, Any]]:
    """Each Linear with its error, the mean over seeds, in the order of the model."""
    reports = [{layer["name"]: layer for layer in run.report["layers"]} for run in group]
    found = []
    for name in group[0].manifest["layers"]:
        errors = [layers[name]["error"] for layers in reports if name in layers]
        keys = ("name", "shape", "format", "bits_per_weight", "fallback")
        layer = {key: reports[0][name][key] for key in keys}
        found.append({**layer, "error": None if None in errors else statistics.fmean(errors)})
    return sorted(found, key=lambda layer: place(layer["name"])[0])


def _provenance(run: Run, out: Path) -> dict[str, Any]:
    """What every number of a run can be traced to."""
    report = run.report
    return {
        "folder": os.path.relpath(run.folder.resolve(), out.resolve()),
        "manifest": MANIFEST,
        "sha256": run.sha256,
        "model": report["model"],
        "recipe": run.recipe,
        "seed": run.seed,
        "command": report["command"],
        "calibration": report["calibration"],
        "environment": report["environment"],
        "collapsed": report["collapsed"],
        "fallbacks": report["fallbacks"],
    }


def _mark_front(rows: Sequence[dict[str, Any]], columns: Sequence[Column]) -> None:
    """Note in each row on which fronts it stands: the pairs of a quality and a size that no other beats in both."""
    for quality in (column for column in columns if column.drawn):
        for size in ("file_bytes", "linear_bits"):
            points = {
                i: (row["metrics"][size]["mean"], row["metrics"][quality.key]["mean"])
                for i, row in enumerate(rows)
                if quality.key in row["metrics"] and math.isfinite(row["metrics"][quality.key]["mean"])
            }
            for i in front(points, higher=quality.better == "higher"):
                rows[i]["on_front"].append([quality.key, size])


def front(points: dict[int, tuple[float, float]], higher: bool = False) -> list[int]:
    """Which of the points (size, quality) no other one beats: is as good in both, and better in one."""
    sign = -1 if higher else 1
    return [
        i
        for i, (x, y) in points.items()
        if not any(a <= x and sign * b <= sign * y and (a, b) != (x, y) for a, b in points.values())
    ]


def write(out: Path, comparison: dict[str, Any]) -> None:
    """The page, the markdown, the JSON, and a folder of plots; report.html is whole in itself."""
    folder = out / "plots"
    folder.mkdir(parents=True, exist_ok=True)
    drawn = []
    for section in comparison["sections"]:
        prefix = f"{section['slug']}-" if len(comparison["sections"]) > 1 else ""
        figures = []
        for plot in pictures(section):
            plot = replace(plot, name=prefix + plot.name)
            said = {"name": plot.name, "title": plot.title, "caption": plot.caption}
            figures.append({**said, **plots.save(plot, folder)})
        drawn.append(figures)
        section["plots"] = [f"plots/{figure['name']}.{suffix}" for figure in figures for suffix in ("png", "svg")]
    functions = {"cell": cell, "sort_key": sort_key, "header": header, "markdown_table": markdown_table}
    shown = {**comparison, **functions, "drawn": drawn, "colours": plots.COLOURS}
    write_json(out / "report.json", strict(comparison))
    write_atomic(out / "report.md", render("compare.md.j2", shown).encode())
    write_atomic(out / "report.html", render("compare.html.j2", shown).encode())
