"""What `ultralowbit eval --json` writes, as a schema, and how files that follow a schema are written and read."""

from __future__ import annotations

import math
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, SerializeAsAny, TypeAdapter, ValidationError

from ultralowbit.checkpoint.storage import write_json
from ultralowbit.errors import InputError
from ultralowbit.eval.base import Readings, Result
from ultralowbit.eval.metric import METRICS, readings
from ultralowbit.eval.scores import task_readings
from ultralowbit.eval.zeroshot import ZeroShot

SCHEMA_VERSION = 2
"""Of every JSON file that this release writes; files of another one are refused in one sentence."""


class Record(BaseModel):
    """A part of a JSON file: unknown keys are refused, and wrong types are named with their place."""

    model_config = ConfigDict(extra="forbid", protected_namespaces=())


class File(Record):
    """A whole JSON file."""

    schema_version: Literal[2] = SCHEMA_VERSION


@cache
def _adapter(result: type[Result]) -> TypeAdapter[Result]:
    return TypeAdapter(result)


def _parse(value: Any) -> Any:
    """Results as the dataclasses of their metrics; a metric that this release does not know is a mistake."""
    if not isinstance(value, dict):
        raise ValueError("expected an object with a list for each metric")
    parsed = {}
    for name, results in value.items():
        if name not in METRICS:
            raise ValueError(f"{name} is no metric of this release, which has {', '.join(METRICS)}")
        if not isinstance(results, list | tuple):
            raise ValueError(f"{name}: expected a list")
        kind = METRICS[name].result
        try:
            parsed[name] = [r if isinstance(r, kind) else _adapter(kind).validate_python(r) for r in results]
        except ValidationError as error:
            first = error.errors()[0]
            place = ".".join(map(str, (name, *first["loc"])))
            raise ValueError(f"{place}: {first['msg']}") from error
    return parsed


Results = Annotated[dict[str, list[SerializeAsAny[Result]]], BeforeValidator(_parse)]
"""`base.Measured` in a schema."""


class ModelResults(Record):
    """What was measured of one model."""

    model: str
    """As it was named to the command."""
    sha256: str | None = None
    """Digest of its config and weights, see `hash_model`; older releases did not write it."""
    metrics: Results = {}
    noise_floor: Results = {}
    """Of the original in another precision, against itself."""
    tasks: ZeroShot | None = None

    def readings(self, original: str, digest: str | None) -> Readings:
        """The columns of `compare` that it stands in, see `Metric.readings`."""
        floor = {
            name: [result.__class__(**{**vars(result), "dtype": result.original_dtype}) for result in results]
            for name, results in self.noise_floor.items()
        }  # stands in the column of what is measured in the original's own precision
        tasks = task_readings(self.tasks.scores, self.tasks.averages) if self.tasks else {}
        return {**readings(floor, original, digest), **readings(self.metrics, original, digest), **tasks}


class Evaluation(File):
    """eval.json: some models on the same texts and tasks."""

    kind: Literal["evaluation"] = "evaluation"
    created: str
    command: str | None = None
    environment: dict[str, Any] = {}
    fidelity_to: str | None = None
    """The model that the others were compared with."""
    asked: dict[str, Any] | None = Field(None, description="what `bench methods` asked of its tasks")
    results: list[ModelResults]


AnyFile = TypeVar("AnyFile", bound=File)


def to_json(record: BaseModel) -> dict[str, Any]:
    """The record in strict JSON values."""
    return strict(record.model_dump(mode="python"))


def strict(value: Any) -> Any:
    """The same value in strict JSON, which has no nan and no inf: they become the strings "nan" and "inf"."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, dict):
        return {key: strict(inner) for key, inner in value.items()}
    return [strict(inner) for inner in value] if isinstance(value, list | tuple) else value


def write_file(path: Path, record: File) -> None:
    """Write a JSON file atomically."""
    write_json(path, to_json(record))


def read_file(path: Path, schema: type[AnyFile], remedy: str) -> AnyFile:
    """Read a JSON file that `write_file` wrote.

    Raises `InputError`, which names the file and the key and ends with `remedy`, for one that is damaged, of another
    kind or of another release.
    """
    try:
        text = path.read_bytes()
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}): {remedy}") from error
    try:
        return schema.model_validate_json(text)
    except ValidationError as error:
        problems = error.errors(include_url=False)
        other = next((e for e in problems if e["loc"] == ("schema_version",)), None)
        if other is not None:
            said = repr(other["input"])[:40]
            raise InputError(
                f"{path} was written by another release (schema_version {said}, expected {SCHEMA_VERSION}): {remedy}"
            ) from error
        raise InputError(f"{path} is damaged, or of something else ({first_mistake(error)}): {remedy}") from error


def first_mistake(error: ValidationError) -> str:
    """The key of the first mistake and what is wrong with its value, on one line."""
    first = error.errors(include_url=False)[0]
    key = ".".join(map(str, first["loc"])) or "the file"
    return f"{key}: {' '.join(first['msg'].removeprefix('Value error, ').split())[:200]}"
