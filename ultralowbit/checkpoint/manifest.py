"""manifest.json: what a packed checkpoint was made from and how, and the hash of every file in it."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, PositiveInt, ValidationError

from ultralowbit.checkpoint.storage import read_json, sha256_files, why_missing
from ultralowbit.errors import CheckpointError, NoCheckpoint

MANIFEST = "manifest.json"
UNTIED = "the head, which was tied to the embedding, has a weight of its own"
"""A note of the rotation: the checkpoint stores more weights than the original has."""


class _Layer(BaseModel):
    """What is read of a Linear's entry."""

    model_config = ConfigDict(strict=True)

    shape: Annotated[list[PositiveInt], Field(min_length=2, max_length=2)]
    format: str
    error: float | None = None
    fallback: str | None = None
    notes: list[str] = []
    seconds: float = 0


class _Fingerprint(BaseModel):
    """What is read of the fingerprint."""

    model_config = ConfigDict(strict=True)

    model: dict[str, str]
    recipe: dict[str, Any]
    calibration: dict[str, str]
    compute: dict[str, str]


class _LeftOut(BaseModel):
    """How much of a part of the original has no place in the packed model."""

    model_config = ConfigDict(strict=True)

    tensors: int
    weights: int


class _Manifest(BaseModel):
    """The keys that programs read, and their types; a manifest may hold more."""

    model_config = ConfigDict(strict=True)

    files: dict[str, str]
    layers: dict[str, _Layer]
    embeddings: dict[str, _Layer] = {}
    fingerprint: _Fingerprint
    model: str = ""
    calibration: dict[str, Any] | None = None
    block_seconds: dict[str, float]
    environment: dict[str, Any]
    left_out: dict[str, _LeftOut] = {}


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a packed checkpoint; raises `NoCheckpoint` where there is none, `CheckpointError` where it is
    not one that `compress` wrote."""
    if why := why_missing(folder, MANIFEST):
        raise NoCheckpoint(
            f"{folder} is not a folder that `ultralowbit compress` wrote ({why}): give one that it wrote"
        )
    manifest = read_json(folder / MANIFEST, "give a folder that `ultralowbit compress` wrote")
    try:
        _Manifest.model_validate(manifest)
    except ValidationError as e:
        mistake = e.errors()[0]
        place, what = ".".join(map(str, mistake["loc"])), mistake["msg"]
        raise CheckpointError(
            f"{folder / MANIFEST} is not one that `ultralowbit compress` wrote ({place}: {what}): copy it again"
        ) from e
    outside = [name for name in manifest["files"] if not _is_inside(name)]
    if outside:
        raise CheckpointError(
            f"{folder / MANIFEST} names {outside[0]!r}, which is no file of its folder: copy it again"
        )
    return manifest


def is_untied(folder: Path) -> bool:
    """Whether a checkpoint's manifest says that its head shared the embedding's weight in the original."""
    try:
        rotation = read_json(folder / MANIFEST).get("rotation")
    except CheckpointError:  # none that can be read: a checkpoint that is not packed, or damage
        return False
    notes = rotation.get("notes") if isinstance(rotation, dict) else None
    return isinstance(notes, list) and UNTIED in notes


def changed_files(
    folder: Path, manifest: dict[str, Any], progress: Callable[[int], object] | None = None
) -> dict[str, str]:
    """Files of the manifest that are not as they were written -> "is missing" or "has changed since it was written".

    `progress` gets the bytes of each read.
    """
    names = sorted(manifest["files"])
    there = [name for name in names if os.path.isfile(folder / name)]  # unlike Path's, for any name
    digests = sha256_files((folder / name for name in there), progress)
    problems = {}
    for name in names:
        digest = digests.get(folder / name)
        if digest is None:
            problems[name] = "is missing"
        elif digest != manifest["files"][name]:
            problems[name] = "has changed since it was written"
    return problems


def _is_inside(name: str) -> bool:
    """Whether a name stays inside the folder: no absolute path and no way up."""
    path = Path(name)
    return bool(path.name) and not path.is_absolute() and ".." not in path.parts
