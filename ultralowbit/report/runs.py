"""Finished runs and measured models, read back from their folders."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from ultralowbit.checkpoint.manifest import MANIFEST
from ultralowbit.checkpoint.size import measure_size
from ultralowbit.checkpoint.storage import sha256_file
from ultralowbit.errors import InputError, reason
from ultralowbit.report.columns import Column, Readings
from ultralowbit.report.schema import SCHEMA_VERSION
from ultralowbit.report.tables import protocol

ORIGINAL = "original"


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
        return digest_of(self.manifest["fingerprint"]["model"])

    @property
    def but_for_the_seed(self) -> str:
        """Digest of all that its bytes depend on, except the seed of the texts that it reads."""
        fingerprint = self.manifest["fingerprint"]
        recipe = dict(fingerprint["recipe"])
        if "calibration" in recipe:  # not of those that read no text
            recipe["calibration"] = {**recipe["calibration"], "seed": None}
        for stage in ("preprocess", "finetune"):
            if (recipe.get(stage) or {}).get("data"):
                recipe[stage] = {**recipe[stage], "data": {**recipe[stage]["data"], "seed": None}}
        return digest_of([{**fingerprint, "recipe": recipe, "calibration": None}, self.recipe])


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
        key = f"tasks:{digest_of([names, documents])[:16]}"
        how = f"mean accuracy over {names}"
        column = Column(key, "accuracy", "mean", "percent", "higher", how, "mean accuracy")
        found[key] = (column, average["value"])
    return found


def digest_of(value: Any) -> str:
    return sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
