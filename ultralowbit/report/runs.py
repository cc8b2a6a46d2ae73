"""Finished runs and measured models, read back from their folders."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ultralowbit.checkpoint.manifest import MANIFEST, read_manifest
from ultralowbit.checkpoint.size import measure_size
from ultralowbit.checkpoint.storage import json_digest, sha256_file
from ultralowbit.errors import CheckpointError, InputError
from ultralowbit.eval.base import Readings
from ultralowbit.eval.metric import readings
from ultralowbit.eval.schema import Evaluation, ModelResults, read_file
from ultralowbit.report.schema import REPORT, RunReport, SizeRecord


@dataclass(frozen=True, eq=False)
class Run:
    """A folder that `compress` wrote."""

    folder: Path
    report: RunReport
    manifest: dict[str, Any]
    sha256: str
    """Of its manifest.json."""
    readings: Readings
    """What was measured of the packed model."""
    original: Readings
    """What was measured of the original."""

    @property
    def recipe(self) -> str:
        """Name of the recipe."""
        return self.report.recipe.name

    @property
    def seed(self) -> int:
        """Seed of the calibration text."""
        return self.report.recipe.calibration.seed

    @property
    def base(self) -> str:
        """Digest of the original's files."""
        return json_digest(self.manifest["fingerprint"]["model"])

    @property
    def but_for_the_seed(self) -> str:
        """Digest of all that its bytes depend on, except the seed of the texts that it reads."""
        fingerprint = self.manifest["fingerprint"]
        recipe = fingerprint["recipe"]
        texts = {"calibration": _seedless(recipe.get("calibration"))}
        for stage in ("preprocess", "finetune"):
            if isinstance(recipe.get(stage), dict):
                texts[stage] = {**recipe[stage], "data": _seedless(recipe[stage].get("data"))}
        recipe = {**recipe, **texts}
        return json_digest([{**fingerprint, "recipe": recipe, "calibration": None}, self.recipe])


def _seedless(text: Any) -> Any:
    return {**text, "seed": None} if isinstance(text, dict) else text


@dataclass(frozen=True, eq=False)
class Reference:
    """A model to draw beside the runs, which is not one of them."""

    folder: Path
    label: str
    size: SizeRecord
    readings: Readings
    run: Run | None = None


def find_runs(folders: Iterable[Path | str]) -> tuple[list[Run], list[Reference]]:
    """The runs in the folders, each of which is a run or holds some, and the plain models among them.

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
        for path in inside:
            runs.setdefault(path.resolve(), read_run(path))
    return list(runs.values()), list(plain.values())


def read_run(folder: Path) -> Run:
    """Read a run; raises `InputError` where it was not measured, or its report is of another checkpoint."""
    again = "run the `ultralowbit compress` command that made it once more, which measures what is there"
    try:
        manifest = read_manifest(folder)
    except CheckpointError as error:
        raise InputError(str(error)) from error
    if not (folder / REPORT).is_file():
        raise InputError(f"{folder} has no {REPORT}, so nothing in it is measured: {again}")
    report, digest = read_file(folder / REPORT, RunReport, again), sha256_file(folder / MANIFEST)
    if report.manifest.sha256 != digest:
        raise InputError(f"{folder / REPORT} is of another checkpoint than the {MANIFEST} there: {again}")
    evaluated_here, evaluated_before = evaluated(folder, Path(report.model).name)
    packed = {**evaluated_here, **readings(report.packed.metrics, Path(report.model).name)}
    return Run(folder, report, manifest, digest, packed, {**evaluated_before, **readings(report.original.metrics)})


def read_plain(folder: Path) -> Reference:
    """Read an unpacked model, measured by `ultralowbit eval`."""
    own, _ = evaluated(folder)
    if not own:
        raise InputError(
            f"{folder} is no compressed model and holds no eval.json: measure it first with "
            f"`ultralowbit eval {folder} --ppl TEXT --json {folder / 'eval.json'}`"
        )
    size = SizeRecord.model_validate(measure_size(folder))
    return Reference(folder, folder.resolve().name, size, own)


def evaluated(folder: Path, original: str | None = None) -> tuple[Readings, Readings]:
    """The columns that a folder's eval*.json, which `ultralowbit eval --json` writes, fill for its model and for the
    original; see `evaluations`."""
    own, before = evaluations(folder, original)
    columns: tuple[Readings, Readings] = {}, {}
    for rows, into in zip((own, before), columns, strict=True):
        for row, base in rows:
            into |= row.readings(base)
    return columns


def evaluations(
    folder: Path, original: str | None = None
) -> tuple[list[tuple[ModelResults, str]], list[tuple[ModelResults, str]]]:
    """What a folder's eval*.json hold of its model and of the original, each with what it was compared with.

    A file with one model is of the folder's, whatever its name; in one with several they go by the names of their
    folders. Raises `InputError` for other files.
    """
    own: list[tuple[ModelResults, str]] = []
    before: list[tuple[ModelResults, str]] = []
    here = folder.resolve().name
    for path in sorted(folder.glob("eval*.json")):
        evaluation = read_file(path, Evaluation, "measure again with `ultralowbit eval --json`, or remove it")
        base = Path(evaluation.fidelity_to or "").resolve().name
        names = [Path(row.model).resolve().name for row in evaluation.results]
        if len({*names}) > 1 and here not in names:
            raise InputError(f"{path} is of {', '.join(names)}, none of which is this folder: put it into theirs")
        for name, row in zip(names, evaluation.results, strict=True):
            if name == here or len({*names}) == 1:
                own.append((row, base))
            elif name == original:
                before.append((row, base))
    return own, before
