"""Is a packed checkpoint still what `compress` wrote, and does its run, repeated, write the same again?"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ultralowbit.checkpoint.check import by_module, weight_mismatches
from ultralowbit.checkpoint.config import packed_formats, read_config_json
from ultralowbit.checkpoint.contents import LOCAL
from ultralowbit.checkpoint.files import read_headers
from ultralowbit.checkpoint.manifest import MANIFEST, changed_files, read_manifest
from ultralowbit.checkpoint.storage import read_json, sha256_file
from ultralowbit.errors import CheckpointError, FormatError, InputError
from ultralowbit.format.words import TensorSpec
from ultralowbit.hub import resolve_model
from ultralowbit.pipeline.compress import compress
from ultralowbit.progress import Progress, Silent
from ultralowbit.recipe import Recipe

MAX_THREADS = 4096
"""More than any machine has: a larger number in a manifest is damage."""


def verify(folder: Path | str, progress: Callable[[int], object] | None = None) -> list[str]:
    """What is wrong with a packed checkpoint, one sentence a problem; nothing if it is as it was written.

    Every file that manifest.json lists is hashed again (`progress` gets the bytes of each read), every safetensors file
    must be listed, and each packed weight must have the tensors, dtypes and shapes that config.json and the manifest
    promise. Other files added later, such as report.md, are no problem. Raises `CheckpointError` if there is no
    readable manifest.
    """
    folder = Path(folder)
    manifest = read_manifest(folder)
    changed = changed_files(folder, manifest, progress)
    problems = [f"{name} {problem}: copy it again" for name, problem in changed.items()]
    readable = not any(name.endswith(".safetensors") and "missing" in why for name, why in changed.items())
    shards = sorted(folder.glob("*.safetensors"))
    problems += [
        f"{path.name} is not in the manifest, nobody should load it: remove it"
        for path in shards
        if path.name not in manifest["files"]
    ]
    stored: dict[str, TensorSpec] = {}
    for path in shards:
        try:
            stored |= read_headers([path])
        except CheckpointError as e:
            problems.append(str(e))
            readable = False
    # the tensors of a lost shard would only repeat that it is lost
    return problems + _broken_promises(folder, manifest, stored) if readable else problems


@dataclass(frozen=True)
class Rerun:
    """What a repeated run wrote otherwise than the first, and what may be the reason."""

    different: dict[str, str]
    """File -> how it differs."""
    reasons: list[str]


def rerun(
    folder: Path | str,
    model: str | None = None,
    *,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> Rerun:
    """Compress again from recipe.yaml, into a temporary folder beside `folder`, and compare every file's bytes.

    `model` is where the original lies now, if not where the manifest says. The device and the number of threads are
    those of the first run. Raises `InputError` if the original is another, or what the run needs is not here.
    """
    folder, progress = Path(folder), progress or Silent()
    manifest = read_manifest(folder)
    try:
        first, environment = manifest["fingerprint"], manifest["environment"]
        device, hashes, threads = first["compute"]["device"], first["model"], int(environment["threads"])
        if not 0 < threads <= MAX_THREADS:
            raise ValueError(f"{threads} threads")
        source = _original(folder, model, manifest)
    except (KeyError, TypeError, ValueError) as e:
        if isinstance(e, InputError):
            raise
        raise CheckpointError(f"{folder / MANIFEST} does not say how the run was made: copy it again") from e
    progress.start("hashing the original", sum(_size(source / name) for name in hashes))
    changed = [name for name, digest in hashes.items() if _digest(source / name, progress) != digest]
    if changed:
        raise InputError(
            f"{source} is not the model that {folder} was made from ({changed[0]} differs): give that with --model"
        )
    recipe = Recipe.load(folder / "recipe.yaml")
    for stage, places in _places(folder)["texts"].items():
        recipe = recipe.with_sources(lambda name, places=places: places.get(name, name), stage)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with tempfile.TemporaryDirectory(prefix=f"{folder.resolve().name}-rerun-", dir=folder.resolve().parent) as work:
            second = compress(
                str(source), recipe, Path(work) / "out", device=device, trust_remote_code=trust_remote_code,
                progress=progress,
            ).manifest  # fmt: skip
    finally:
        torch.set_num_threads(before)
    return _compared(manifest, second, recipe.calibration.named)


def _compared(first: dict[str, Any], second: dict[str, Any], text: str) -> Rerun:
    old, new = first["files"], second["files"]
    different = {
        name: "was not written again" if name not in new else "is new" if name not in old else "has other bytes"
        for name in sorted({*old, *new})
        if old.get(name) != new.get(name)
    }
    environment = first["environment"]
    reasons = [
        f"{key} was {environment.get(key)}, is {value}"
        for key, value in second["environment"].items()
        if environment.get(key) != value
    ]
    if first["fingerprint"]["calibration"] != second["fingerprint"]["calibration"]:
        reasons.append(f"the calibration text {text} gives other tokens")
    noted, again = ((manifest.get("finetune") or {}).get("notes", []) for manifest in (first, second))
    reasons += [f"the model was {note}" for note in noted if note not in again and note.startswith("trained by")]
    return Rerun(different, reasons)


def _original(folder: Path, model: str | None, manifest: dict[str, Any]) -> Path:
    """The folder of the original: where the user says, where it lay, or what the manifest calls it."""
    return resolve_model(model or _places(folder)["model"] or manifest["model"])


def _places(folder: Path) -> dict[str, Any]:
    """Where the model and, by stage, the texts of the run lay on this machine; nothing where that was not kept. What
    an earlier version has kept is of all stages: None."""
    try:
        places = read_json(folder / LOCAL)
    except CheckpointError:  # a checkpoint that came from elsewhere
        places = {}
    model, texts = places.get("model"), places.get("texts")
    stages = {None: texts, **texts} if isinstance(texts, dict) else {}
    return {
        "model": model if isinstance(model, str) else None,
        "texts": {
            stage: {name: path for name, path in kept.items() if isinstance(path, str)}
            for stage, kept in stages.items()
            if isinstance(kept, dict)
        },
    }


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else 0


def _digest(path: Path, progress: Progress) -> str | None:
    return sha256_file(path, progress.step) if path.is_file() else None


def _broken_promises(folder: Path, manifest: dict[str, Any], stored: dict[str, TensorSpec]) -> list[str]:
    """How the stored tensors differ from the formats in config.json and the shapes in the manifest."""
    try:
        formats = packed_formats(read_config_json(folder))
    except (CheckpointError, FormatError) as e:
        return [str(e)]
    if not formats:
        return ["config.json does not say how the weights are packed: copy it again"]
    layers, modules = {**manifest["layers"], **manifest.get("embeddings", {})}, by_module(stored)
    problems = [
        f"{name} is packed according to {one} but not to {other}: copy both again"
        for one, other, names in (
            ("config.json", MANIFEST, formats.keys() - layers.keys()),
            (MANIFEST, "config.json", layers.keys() - formats.keys()),
        )
        for name in sorted(names)
    ]
    for name in sorted(formats.keys() & layers.keys()):
        format, layer = formats[name], layers[name]
        if layer["format"] != format.summary or layer["shape"][1] != format.in_features:
            problems.append(
                f"{name} is {layer['shape']} in {layer['format']} according to {MANIFEST}, config.json says "
                f"{format.summary}: copy both again"
            )
            continue
        problems += [
            f"{mismatch}: copy the shards again"
            for mismatch in weight_mismatches(name, format, layer["shape"][0], modules.get(name, {}))
        ]
    return problems
