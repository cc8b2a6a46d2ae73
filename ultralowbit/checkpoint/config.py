"""What config.json says of a checkpoint: the model, how its weights are packed, and a digest that ties the two."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ultralowbit.checkpoint.storage import json_digest, read_json, why_missing
from ultralowbit.errors import CheckpointError, NoCheckpoint
from ultralowbit.format.weight import Format

QUANT_METHOD = "ultralowbit"
CONFIG = "config.json"
DIGEST = "config_sha256"
"""The key in a safetensors file's metadata under which the digest of its config.json is stored."""
TENSORS_DIGEST = "tensors_sha256"
"""The same of what the file's header says of its tensors, in files that `compress` wrote."""

_VOLATILE = {"_name_or_path", "transformers_version", "use_cache", "architectures"}
"""Keys that change nothing in what the weights mean, and that saving a loaded model writes anew."""


def read_config_json(folder: Path) -> dict[str, Any]:
    """config.json of a checkpoint folder as it stands; raises `NoCheckpoint` where there is none, `CheckpointError` for
    one that cannot be read."""
    if why := why_missing(folder, CONFIG):
        raise NoCheckpoint(f"{folder} is not the folder of a checkpoint ({why}): give the folder that holds one")
    return read_json(folder / CONFIG, "give the folder of a whole checkpoint")


def text_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The part of a config.json that is about the text decoder."""
    inner = config.get("text_config")
    return inner if isinstance(inner, Mapping) else config


def positions(config: Any) -> int | None:
    """How many positions a model of this transformers config has, whatever its family calls them in config.json; None
    where it names no number."""
    return _number(config, "max_position_embeddings")


def vocabulary(config: Any) -> int | None:
    """How many tokens a model of this transformers config knows; None where it names no number."""
    return _number(config, "vocab_size")


def _number(config: Any, key: str) -> int | None:
    named = getattr(config.get_text_config(), key, None)
    return named if isinstance(named, int) and named > 0 else None


def packed_formats(config: Mapping[str, Any]) -> dict[str, Format]:
    """The format of each packed Linear by its name in a config.json; empty for a model that is not packed.

    Raises `CheckpointError` for a quantization_config that is malformed, `FormatError` for one of another release.
    """
    quantization = config.get("quantization_config")
    if not isinstance(quantization, Mapping) or quantization.get("quant_method") != QUANT_METHOD:
        return {}
    return module_formats(quantization.get("modules"), quantization.get("formats"))


def module_formats(modules: Any, formats: Any) -> dict[str, Format]:
    """The format of each module, from `modules` (name -> key) and `formats` (key -> `Format.to_dict()`)."""
    if not isinstance(modules, Mapping) or not isinstance(formats, Mapping):
        raise malformed("modules and formats must be objects")
    try:
        by_key = {key: Format.from_dict(value) for key, value in formats.items()}
        return {name: by_key[key] for name, key in modules.items()}
    except (KeyError, TypeError, AttributeError, RecursionError) as e:
        raise malformed(repr(e)) from e


def malformed(reason: str) -> CheckpointError:
    """The error for a quantization_config that cannot be understood."""
    return CheckpointError(
        f"the quantization_config is malformed ({reason}): the config.json was edited or cut, copy it again"
    )


def config_digest(config: Mapping[str, Any]) -> str:
    """Hex digest of what a config.json says of the model, without what saving it again changes.

    It is stored with the weights: a config.json that was edited then no longer fits them, and loading says so.
    """
    lasting = {key: value for key, value in config.items() if key not in _VOLATILE and value is not None}
    return json_digest(lasting)


def tensors_digest(header: Mapping[str, Any]) -> str:
    """Hex digest of the header of a safetensors file, its metadata left out.

    With it a dtype that was edited is told from what was written: fp16 and bf16 have the same size.
    """
    return json_digest({name: entry for name, entry in header.items() if name != "__metadata__"})
