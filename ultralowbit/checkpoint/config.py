"""What config.json says of a checkpoint."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ultralowbit.errors import CheckpointError

QUANT_METHOD = "ultralowbit"


def read_config_json(folder: Path) -> dict[str, Any]:
    """config.json of a checkpoint folder as it stands; raises `CheckpointError` where there is none."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as e:
        raise CheckpointError(f"{folder} has no readable config.json ({e}): give the folder of a checkpoint") from e
    if not isinstance(config, dict):
        raise CheckpointError(
            f"{folder}/config.json holds a {type(config).__name__}, expected an object: copy it again"
        )
    return config
