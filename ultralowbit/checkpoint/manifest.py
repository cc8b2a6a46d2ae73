"""manifest.json: what a packed checkpoint was made from, and the hash of every file in it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ultralowbit.errors import CheckpointError

MANIFEST = "manifest.json"


def read_manifest(folder: Path) -> dict[str, Any]:
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError) as e:
        raise CheckpointError(
            f"{folder} has no readable {MANIFEST} ({e}), so nothing says what it should hold: "
            "give a folder that `ultralowbit compress` wrote"
        ) from e
    try:
        whole = all(Path(name).name == name and isinstance(sha, str) for name, sha in manifest["files"].items())
        whole &= all(len(layer["shape"]) == 2 and layer["format"] for layer in manifest["layers"].values())
    except (AttributeError, KeyError, TypeError):
        whole = False
    if not whole:
        raise CheckpointError(f"{folder / MANIFEST} is not one that `ultralowbit compress` wrote: copy it again")
    return manifest
