"""`ultralowbit compare`: finished runs side by side on one page, and apart what does not compare."""

from __future__ import annotations

import json
import math
import os
import re
import statistics
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import datetime, timezone
from hashlib import sha256
from itertools import groupby
from pathlib import Path
from typing import Any

from ultralowbit import plots
from ultralowbit.checkpoint import MANIFEST, sha256_file, write_atomic, write_json
from ultralowbit.console import clock, human
from ultralowbit.eval.size import measure as measure_size
from ultralowbit.plots import Plot, Point
from ultralowbit.report import SCHEMA_VERSION, number, protocol, render, strict
from ultralowbit.text import InputError, reason

ORIGINAL = "original"
_BUDGET = ("sign planes", "integer codes", "salient values", "scales and offsets", "masks and indices",
           "head", "embeddings", "other")  # fmt: skip


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


@dataclass(frozen=True, eq=False)
class Run:
    """A folder that `compress` wrote."""

    folder: Path
    report: dict[str, Any]
    manifest: dict[str, Any]
    sha256: str
    """Of its manifest.json."""
    readings: Readings
    original: Readings

    @property
    def recipe(self) -> str:
        return self.report["recipe"]["name"]

    @property
    def seed(self) -> int:
        return self.report["recipe"]["calibration"]["seed"]

    @property
    def base(self) -> str:
        """Digest of the original's files."""
        return _digest(self.manifest["fingerprint"]["model"])

    @property
    def but_for_the_seed(self) -> str:
        """Digest of all that its bytes depend on, except the seed of the texts that it reads."""
        fingerprint = self.manifest["fingerprint"]
        recipe = dict(fingerprint["recipe"])
        if "calibration" in recipe:  # not of those that read no text
            recipe["calibration"] = {**recipe["calibration"], "seed": None}
        for stage in ("prepare", "distill"):
            if (recipe.get(stage) or {}).get("data"):
                recipe[stage] = {**recipe[stage], "data": {**recipe[stage]["data"], "seed": None}}
        return _digest([{**fingerprint, "recipe": recipe, "calibration": None}, self.recipe])


@dataclass(frozen=True, eq=False)
class Reference:
    """A model to draw beside the runs, which is not one of them."""

    folder: Path
    label: str
    size: dict[str, Any]
    readings: Readings
    run: Run | None = None


def find_runs(folders: Iterable[Path | str]) -> tuple[list[Run], list[Reference]]:
    """The runs in the folders, each one itself or a folder of some, and the plain models among them.

    Raises `InputError` for a folder that holds neither, or a run that was not measured.
    """
    runs: dict[Path, Run] = {}
    plain: dict[Path, Reference] = {}
    for given in map(Path, folders):
        folder = given.expanduser()
        if not folder.is_dir():
            raise InputError(f"there is no such folder {str(given)!r}: give folders that `ultralowbit compress` wrote")
        if (folder / MANIFEST).exists():
            inside = [folder]
        elif (folder / "config.json").exists():
            plain[folder.resolve()] = read_plain(folder)
            continue
        else:
            inside = sorted(path.parent for path in folder.glob("**/" + MANIFEST) if ".work" not in str(path))
        if not inside:
            raise InputError(f"{given} holds no {MANIFEST}: give folders that `ultralowbit compress` wrote")
        for found in inside:
            runs.setdefault(found.resolve(), read_run(found))
    return list(runs.values()), list(plain.values())


def read_run(folder: Path) -> Run:
    """Raises `InputError` where the run was not measured, or its report is of another checkpoint."""
    again = "run the `ultralowbit compress` command that made it once more, which measures what is there"
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        digest = sha256_file(folder / MANIFEST)
        _ = manifest["fingerprint"]["model"], {**manifest["fingerprint"]["recipe"]}
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise InputError(f"{folder / MANIFEST} is not one that `ultralowbit compress` wrote: copy it again") from e
    try:
        report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as e:
        raise InputError(f"{folder} has no readable report.json, so nothing in it is measured: {again}") from e
    try:
        if report["schema_version"] != SCHEMA_VERSION or "budget" not in report["packed"]["size"]:
            raise InputError(f"{folder / 'report.json'} was written by another release: {again}")
        if report["manifest"]["sha256"] != digest:
            raise InputError(f"{folder / 'report.json'} is of another checkpoint than the {MANIFEST} there: {again}")
    except (KeyError, TypeError) as e:
        raise InputError(f"{folder / 'report.json'} is not one that `ultralowbit compress` wrote: {again}") from e
    readings, original = map(_readings, evaluated(folder, Path(report["model"]).name))
    for row, into in (("packed", readings), (ORIGINAL, original)):
        for stored in report[row]["perplexity"]:
            into |= _perplexity(stored)
    for stored in report["packed"].get("fidelity", ()):
        readings |= _fidelity(stored, report["model"])
    return Run(folder, report, manifest, digest, readings, original)


def read_plain(folder: Path) -> Reference:
    """An unpacked model, measured by `ultralowbit eval`."""
    readings = _readings(evaluated(folder)[0])
    if not readings:
        raise InputError(
            f"{folder} is no compressed model and holds no eval.json: measure it first with "
            f"`ultralowbit eval {folder} --ppl TEXT --json {folder / 'eval.json'}`"
        )
    return Reference(folder, folder.resolve().name, measure_size(folder).to_dict(), readings)


# --- what was measured -----------------------------------------------------------------------------------------------


def evaluated(folder: Path, original: str | None = None) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """What the eval*.json in a folder, which `ultralowbit eval --json` writes, hold of its model and of the original.

    Rows of their "results", each with the "base" of its divergences. A file with one model is of the folder's, whatever
    its name; in one with several they go by their folders' names. Raises `InputError` for other files.
    """
    own: list[dict[str, Any]] = []
    before: list[dict[str, Any]] = []
    here = folder.resolve().name
    for path in sorted(folder.glob("eval*.json")):
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            rows = [{**row, "base": found["fidelity_to"]} for row in found["results"]]
            names = [Path(row["model"]).resolve().name for row in rows]
            _readings(rows)
        except (OSError, ValueError, KeyError, TypeError) as e:
            raise InputError(
                f"{path} is not what `ultralowbit eval --json` writes ({reason(e)}): measure again, or remove it"
            ) from e
        if len({*names}) > 1 and here not in names:
            raise InputError(f"{path} is of {', '.join(names)}, none of which is this folder: put it into theirs")
        for name, row in zip(names, rows, strict=True):
            if name == here or len({*names}) == 1:
                own.append(row)
            elif name == original:
                before.append(row)
    return own, before


def _readings(rows: Iterable[dict[str, Any]]) -> Readings:
    found: Readings = {}
    for row in rows:
        for stored in row["perplexity"]:
            found |= _perplexity(stored)
        for stored in row["fidelity"]:
            found |= _fidelity(stored, row["base"])
        for stored in row["noise_floor"]:  # the original's own distance from itself, when it is rounded
            found |= _fidelity({**stored, "dtype": stored["base_dtype"]}, row["base"])
        if row["tasks"]:
            found |= _tasks(row["tasks"])
    return found


def _perplexity(stored: dict[str, Any]) -> Readings:
    """It compares where the tokens in the windows agree, and the arithmetic."""
    key = f"perplexity:{stored['sha256'][:16]}:{stored['dtype']}:{stored['bos']}"
    name = Path(stored["source"]).name
    how = f"perplexity, {protocol([stored])[0]}"
    column = Column(key, "perplexity", name, "perplexity", "lower", how, f"perplexity on {name}")
    return {key: (column, float(stored["perplexity"]))}


def _fidelity(stored: dict[str, Any], base: str) -> Readings:
    of = Path(base).resolve().name
    how = f"{protocol([stored])[0]}, against {of} in {stored['base_dtype']}"
    window = f"{of}:{stored['sha256'][:16]}:{stored['dtype']}:{stored['base_dtype']}:{stored['bos']}"
    name = Path(stored["source"]).name
    group, drawn = f"fidelity on {name}", f"KL divergence on {name}, nats"
    columns = [
        Column(f"kl_mean:{window}", group, "KL, nats", "nats", "lower", f"KL divergence, {how}", drawn),
        Column(f"kl_median:{window}", group, "median", "nats", "lower", f"median KL divergence, {how}"),
        Column(f"kl_p99:{window}", group, "p99", "nats", "lower", f"99th percentile of the KL divergence, {how}"),
        Column(f"top1:{window}", group, "same top-1", "percent", "higher", f"share of equal likeliest tokens, {how}"),
    ]
    return {column.key: (column, float(stored[column.key.partition(":")[0]])) for column in columns}


def _tasks(stored: dict[str, Any]) -> Readings:
    found: Readings = {}
    for score in stored["scores"]:
        if score["metric"].partition(",")[0] in ("acc", "acc_norm"):
            chance = "" if score["chance"] is None else f", chance {score['chance']:.1%}"
            asked = f"{score['documents']} of {score['of']} documents, {score['shots'] or 0} shots"
            how = f"accuracy, {score['task']} {score['metric']}, version {score['version']}, {asked}{chance}"
            title = f"{score['task']} {score['metric']}"
            column = Column(f"task:{how}", "accuracy", title, "percent", "higher", how)
            found[column.key] = (column, score["value"])
    for average in stored["averages"]:
        names = ", ".join(f"{task} {metric}" for task, metric in average["metrics"].items())
        documents = "; ".join(sorted(key for key in found if any(t in key for t in average["metrics"])))
        key = f"tasks:{_digest([names, documents])[:16]}"
        how = f"mean accuracy over {names}"
        column = Column(key, "accuracy", "mean", "percent", "higher", how, "mean accuracy")
        found[key] = (column, average["value"])
    return found


# --- what compares ---------------------------------------------------------------------------------------------------


def compare(
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
        section["slug"] = _slug(name if names[name] == 1 else f"{name}-{digest[:6]}")
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
    return sorted(found, key=lambda layer: _place(layer["name"])[0])


def _place(name: str) -> tuple[int, str]:
    """Block and name within it: model.layers.3.mlp.up_proj -> 3, mlp.up_proj."""
    found = re.search(r"(?:^|\.)(\d+)\.(.+)$", name)
    return (int(found[1]), found[2]) if found else (0, name)


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


# --- pictures --------------------------------------------------------------------------------------------------------


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
    return [Plot(_slug(axis), f"{axis[0].upper()}{axis[1:]}, against size", caption, draw)]


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
                block, kind = _place(layer["name"])
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
            "error-by-linear", "In which Linears it is lost",
            "The same by kind of Linear, the mean over the blocks.",
            plots.dots(by_kind, labels, lost),
        ),
    ]  # fmt: skip


def budget(row: dict[str, Any]) -> dict[str, int]:
    """The bytes of a row in the few kinds that are drawn."""
    found = dict.fromkeys(_BUDGET, 0)
    for kind, count in row["budget"].items():
        found[kind if kind in found else "other"] += count
    return found


def _spent(section: dict[str, Any]) -> list[Plot]:
    rows = [row for row in section["rows"] if row["linear_weights"]]
    unit, name = _unit(max(_mean(row, "file_bytes") for row in rows))
    stored = ("sign planes", "integer codes", "salient values", "scales and offsets", "masks and indices")
    linear = [
        (row["label"], {k: 8 * row["budget"][k] / row["linear_weights"] for k in stored}
         | {"other": 8 * sum(row["budget"][k] for k in ("input transform", "other parts")) / row["linear_weights"]})
        for row in rows
    ]  # fmt: skip
    whole = [(row["label"], {kind: count / unit for kind, count in budget(row).items()}) for row in rows]
    panels = [("bits a linear weight", linear), (f"file, {name}", whole)]
    caption = "What a weight of the packed Linears costs, and the whole file, embeddings and head included."
    return [Plot("bit-budget", "What the bits are spent on", caption, plots.stacked(panels, _BUDGET, "{:.2f}"))]


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


# --- writing ---------------------------------------------------------------------------------------------------------


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


_FORMATS: dict[str, Callable[[float], str]] = {
    "perplexity": number,
    "bits": "{:.3f}".format,
    "claimed": "{:.2f}".format,
    "bytes": human,
    "times": "{:.2f} x".format,
    "seconds": lambda seconds: f"{seconds:.1f} s" if seconds < 20 else clock(seconds),
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


def _slug(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-") or "model"


def _digest(value: Any) -> str:
    return sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
