"""manifest.json: what a packed checkpoint was made from and how, and the hash of every file in it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from ultralowbit.checkpoint.storage import read_json, sha256_file
from ultralowbit.errors import CheckpointError

MANIFEST = "manifest.json"


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a packed checkpoint; raises `CheckpointError` where there is none that `compress` wrote."""
    manifest = read_json(folder / MANIFEST, "give a folder that `ultralowbit compress` wrote")
    try:
        whole = all(Path(name).name and isinstance(sha, str) for name, sha in manifest["files"].items())
        whole &= all(_is_layer(layer) for layer in manifest["layers"].values())
        whole &= isinstance(manifest["fingerprint"], dict)
    except (AttributeError, KeyError, TypeError):
        whole = False
    if not whole or not all(_is_inside(name) for name in manifest["files"]):
        raise CheckpointError(f"{folder / MANIFEST} is not one that `ultralowbit compress` wrote: copy it again")
    return manifest


def changed_files(
    folder: Path, manifest: dict[str, Any], progress: Callable[[int], object] | None = None
) -> dict[str, str]:
    """Files of the manifest that are not as they were written -> "is missing" or "has changed since it was written".

    `progress` gets the bytes of each read.
    """
    problems = {}
    for name, digest in sorted(manifest["files"].items()):
        if not (folder / name).is_file():
            problems[name] = "is missing"
        elif sha256_file(folder / name, progress) != digest:
            problems[name] = "has changed since it was written"
    return problems


def _is_layer(layer: Any) -> bool:
    shape = layer["shape"]
    return isinstance(layer["format"], str) and len(shape) == 2 and all(isinstance(n, int) and n > 0 for n in shape)


def _is_inside(name: str) -> bool:
    """Whether a name stays inside the folder: no absolute path and no way up."""
    path = Path(name)
    return not path.is_absolute() and ".." not in path.parts
