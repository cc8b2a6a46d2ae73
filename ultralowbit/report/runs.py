"""Finished runs and measured models, read back from their folders."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ultralowbit.checkpoint.config import CONFIG
from ultralowbit.checkpoint.files import hash_model
from ultralowbit.checkpoint.manifest import MANIFEST, read_manifest
from ultralowbit.checkpoint.size import measure_size
from ultralowbit.checkpoint.storage import json_digest, sha256_file
from ultralowbit.errors import CheckpointError, InputError
from ultralowbit.eval.base import Readings
from ultralowbit.eval.metric import readings
from ultralowbit.eval.schema import Evaluation, ModelResults, read_file
from ultralowbit.progress import Silent
from ultralowbit.report.schema import REPORT, RunReport, SizeRecord


@dataclass(frozen=True)
class Model:
    """What tells a model from others."""

    name: str
    """Of its folder."""
    sha256: str | None
    """Of its config and weights; None where nobody has written it down."""

    def is_of(self, name: str, sha256: str | None) -> bool:
        """Whether it has this digest; without one, this name."""
        return sha256 == self.sha256 if sha256 else name == self.name

    def rows(self, evaluation: Evaluation) -> list[ModelResults]:
        """What was measured of it, or of a model that is called so."""
        return [row for row in evaluation.results if self.is_of(Path(row.model).resolve().name, row.sha256)]


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
        return _original(self.manifest).sha256

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
            inside = sorted(path.parent for path in folder.glob("**/" + MANIFEST) if not _is_work(path, folder))
        if not inside:
            raise InputError(f"{given} holds no {MANIFEST}: give folders that `ultralowbit compress` wrote")
        for path in inside:
            runs.setdefault(path.resolve(), read_run(path))
    return list(runs.values()), list(plain.values())


def _is_work(path: Path, folder: Path) -> bool:
    """Whether a path within a folder is of a job that is not done."""
    return any(part.endswith(".work") or part.startswith(".") for part in path.relative_to(folder).parts)


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
    original = _original(manifest)
    evaluated_here, evaluated_before = evaluated(folder, manifest)
    packed = {**evaluated_here, **readings(report.packed.metrics, original.name, original.sha256)}
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


def evaluated(folder: Path, manifest: dict[str, Any] | None = None) -> tuple[Readings, Readings]:
    """The columns that a folder's eval*.json fill for its model and for the original; see `evaluations`."""
    columns: tuple[Readings, Readings] = {}, {}
    for rows, into in zip(evaluations(folder, manifest), columns, strict=True):
        for row, base in rows:
            into |= row.readings(base.name, base.sha256)
    return columns


def evaluations(
    folder: Path, manifest: dict[str, Any] | None = None
) -> tuple[list[tuple[ModelResults, Model]], list[tuple[ModelResults, Model]]]:
    """What a folder's eval*.json, which `ultralowbit eval --json` writes, hold of its model and of the original that
    its manifest names, each with what it was compared with.

    Models go by the digests of their files. Those of an older release, which wrote none, go by the names of their
    folders; one that is alone in its file is of the folder where that lies. Raises `InputError` for a file of other
    models, or where names do not tell which model is which.
    """
    own: list[tuple[ModelResults, Model]] = []
    before: list[tuple[ModelResults, Model]] = []
    remedy = "measure again with `ultralowbit eval --json`, or remove it"
    files = {path: read_file(path, Evaluation, remedy) for path in sorted(folder.glob("eval*.json"))}
    is_said = any(row.sha256 for evaluation in files.values() for row in evaluation.results)
    here = Model(folder.resolve().name, _digest(folder, manifest) if is_said else None)
    original = _original(manifest) if manifest else Model("", None)
    for path, evaluation in files.items():
        rows = evaluation.results
        alone = len(rows) == 1 and rows[0].sha256 is None
        mine, theirs = (rows, []) if alone else (here.rows(evaluation), original.rows(evaluation))
        for guessed in ([row for row in found if row.sha256 is None] for found in (mine, theirs)):
            if len(guessed) > 1 or any(row in mine and row in theirs for row in guessed):
                raise InputError(f"{path} does not say which {Path(guessed[0].model).name} is which: {remedy}")
        if not mine:
            names = ", ".join(row.model for row in rows)
            raise InputError(f"{path} is of {names}, none of which is this folder as it is: {remedy}")
        base = _compared_with(evaluation, original)
        own += [(row, base) for row in mine]
        before += [(row, base) for row in theirs]
    return own, before


def _digest(folder: Path, manifest: dict[str, Any] | None) -> str:
    """The digest of a folder's files, which the manifest of a packed one holds."""
    if manifest is None:
        return json_digest(hash_model(folder, Silent()))
    hashes = manifest["files"].items()
    return json_digest({name: sha256 for name, sha256 in hashes if name == CONFIG or name.endswith(".safetensors")})


def _original(manifest: dict[str, Any]) -> Model:
    return Model(Path(manifest.get("model", "")).name, json_digest(manifest["fingerprint"]["model"]))


def _compared_with(evaluation: Evaluation, original: Model) -> Model:
    """What --fidelity named: the original, under the name that the manifest has for it, or another model."""
    named = evaluation.fidelity_to or ""
    digest = next((row.sha256 for row in evaluation.results if row.model == named), None)
    base = Model(Path(named).resolve().name, digest)
    return original if original.is_of(base.name, base.sha256) else base
