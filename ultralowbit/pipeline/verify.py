"""Is a packed checkpoint still what `compress` wrote, and does its run, repeated, write the same again?"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ultralowbit.checkpoint.config import QUANT_METHOD
from ultralowbit.checkpoint.files import read_headers
from ultralowbit.checkpoint.manifest import MANIFEST, read_manifest
from ultralowbit.checkpoint.storage import sha256_file
from ultralowbit.errors import CheckpointError, FormatError, InputError
from ultralowbit.format.words import TensorSpec
from ultralowbit.hub import resolve_model
from ultralowbit.nn.hf import UltraLowBitConfig
from ultralowbit.pipeline.compress import compress
from ultralowbit.progress import Progress, Silent
from ultralowbit.recipe import Recipe


def verify(folder: Path | str, progress: Callable[[int], object] | None = None) -> list[str]:
    """What is wrong with a packed checkpoint, one sentence a problem; nothing if it is as it was written.

    Every file that manifest.json lists is hashed again (`progress` gets the bytes of each read), every safetensors file
    must be listed, and each packed weight must have the tensors, dtypes and shapes that config.json and the manifest
    promise. Other files added later, such as report.md, are no problem. Raises `CheckpointError` if there is no
    readable manifest.
    """
    folder = Path(folder)
    manifest = read_manifest(folder)
    problems = []
    readable = True
    for name, digest in sorted(manifest["files"].items()):
        path = folder / name
        if not path.is_file():
            problems.append(f"{name} is missing: copy it again")
            readable &= path.suffix != ".safetensors"
        elif sha256_file(path, progress) != digest:
            problems.append(f"{name} has changed since it was written: copy it again")
    shards = sorted(folder.glob("*.safetensors"))
    problems += [
        f"{path.name} is not in the manifest, nobody should load it: remove it"
        for path in shards
        if path.name not in manifest["files"]
    ]
    found: dict[str, TensorSpec] = {}
    for path in shards:
        try:
            found |= read_headers([path])
        except CheckpointError as e:
            problems.append(str(e))
            readable = False
    # the tensors of a lost shard would only repeat that it is lost
    return problems + _broken_promises(folder, manifest, found) if readable else problems


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
        source = resolve_model(model or manifest["model"])
        device, hashes = first["compute"]["device"], first["model"]
    except (KeyError, TypeError) as e:
        raise CheckpointError(f"{folder / MANIFEST} does not say how the run was made: copy it again") from e
    progress.start("hashing the original", sum(_size(source / name) for name in hashes))
    changed = [name for name, digest in hashes.items() if _digest(source / name, progress) != digest]
    if changed:
        raise InputError(
            f"{source} is not the model that {folder} was made from ({changed[0]} differs): give that with --model"
        )
    recipe = Recipe.load(folder / "recipe.yaml")
    threads = torch.get_num_threads()
    torch.set_num_threads(environment["threads"])
    try:
        with tempfile.TemporaryDirectory(prefix=f"{folder.name}-rerun-", dir=folder.resolve().parent) as work:
            second = compress(
                str(source), recipe, Path(work) / "out", device=device, trust_remote_code=trust_remote_code,
                progress=progress,
            ).manifest  # fmt: skip
    finally:
        torch.set_num_threads(threads)
    old, new = manifest["files"], second["files"]
    different = {
        name: "was not written again" if name not in new else "is new" if name not in old else "has other bytes"
        for name in sorted({*old, *new})
        if old.get(name) != new.get(name)
    }
    reasons = [
        f"{key} was {environment.get(key)}, is {value}"
        for key, value in second["environment"].items()
        if environment.get(key) != value
    ]
    if first["calibration"] != second["fingerprint"]["calibration"]:
        reasons.append(f"the calibration text {recipe.calibration.source} gives other tokens")
    return Rerun(different, reasons)


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else 0


def _digest(path: Path, progress: Progress) -> str | None:
    return sha256_file(path, progress.step) if path.is_file() else None


def _broken_promises(folder: Path, manifest: dict[str, Any], found: dict[str, TensorSpec]) -> list[str]:
    """How the tensors found differ from the formats in config.json and the shapes in the manifest."""
    try:
        quantization = json.loads((folder / "config.json").read_text(encoding="utf-8"))["quantization_config"]
        if quantization["quant_method"] != QUANT_METHOD:
            raise ValueError(f"quant_method is {quantization['quant_method']!r}")
        formats = UltraLowBitConfig(**quantization).module_formats()
    except FormatError as e:
        return [str(e)]
    except (OSError, ValueError, KeyError, TypeError) as e:
        return [f"config.json does not say how the weights are packed ({e!r}): copy it again"]
    layers = manifest["layers"]
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
        for suffix, spec in format.tensors(*layer["shape"]).items():
            stored = found.get(f"{name}.{suffix}")
            if stored is None:
                problems.append(f"{name}.{suffix} is in no file, {format.summary} has one: copy the shards again")
            elif stored != spec:
                problems.append(
                    f"{name}.{suffix} is {stored.dtype} {list(stored.shape)}, {format.summary} has {spec.dtype} "
                    f"{list(spec.shape)}: copy the shards again"
                )
    return problems
