"""Everything in a packed checkpoint but the blocks."""

from __future__ import annotations

from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import torch

from ultralowbit.checkpoint.files import read_headers
from ultralowbit.checkpoint.job import Job
from ultralowbit.checkpoint.manifest import MANIFEST
from ultralowbit.checkpoint.storage import sha256_file, write_atomic, write_json, write_tensors
from ultralowbit.data.calibration import Calibration
from ultralowbit.format.weight import Format
from ultralowbit.nn.decoder import Decoder
from ultralowbit.nn.hf import UltraLowBitConfig
from ultralowbit.recipe import Recipe
from ultralowbit.system import environment

_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".gguf", ".onnx")


_NOT_CARRIED = {"config.json", "README.md", "model.safetensors.index.json", ".gitattributes"}


_MEASURED = ("eval*.json", "report.*")  # of the original, and not of what is made from it


def write_checkpoint(
    job: Job,
    model: str,
    folder: Path,
    decoder: Decoder,
    recipe: Recipe,
    data: Calibration | None,
) -> dict[str, Any]:
    """Everything but the blocks: the other tensors, index, config, tokenizer, recipe and manifest."""
    total = len(decoder.blocks) + 1
    shards = {i: job.shards / job.shard_name(i, total) for i in range(total)}
    write_tensors(shards[total - 1], decoder.read(decoder.names_outside_blocks()))
    weight_map, size = {}, 0
    for path in shards.values():
        for name, spec in read_headers([path]).items():
            weight_map[name] = path.name
            size += torch.Size(spec.shape).numel() * spec.dtype.itemsize
    write_json(
        job.shards / "model.safetensors.index.json", {"metadata": {"total_size": size}, "weight_map": weight_map}
    )
    config = decoder.config.to_dict()
    config.pop("_name_or_path", None)  # the same run writes the same bytes wherever its model lies
    config["quantization_config"] = UltraLowBitConfig.of(
        {name: Format.from_dict(layer["layout"]) for name, layer in job.state["layers"].items()}, recipe.name
    ).to_dict()
    config["architectures"] = config.get("architectures") or [type(decoder.model).__name__]
    write_json(job.shards / "config.json", config)
    for path in sorted(folder.iterdir()):
        left = path.name in _NOT_CARRIED or any(fnmatch(path.name, pattern) for pattern in _MEASURED)
        if path.is_file() and not left and not path.name.endswith(_WEIGHTS):
            write_atomic(job.shards / path.name, path.read_bytes())
    command = "# ultralowbit compress MODEL --recipe recipe.yaml --out DIR\n"  # no paths: the same run, the same bytes
    write_atomic(job.shards / "recipe.yaml", (command + recipe.to_yaml()).encode())
    manifest = {
        "fingerprint": job.state["fingerprint"],
        "model": model,
        "recipe": recipe.name,
        "calibration": None
        if data is None
        else {
            **recipe.calibration.model_dump(),
            "length": data.tokens.shape[1],
            "tokens": data.tokens.numel(),
            "sha256": data.sha256,
        },
        "layers": job.state["layers"],
        "block_seconds": job.state["seconds"],
        **{stage: job.state[stage] for stage in ("preprocess", "tuning", "finetune") if job.state.get(stage)},
        "left_out": decoder.unused_keys,
        "environment": environment(decoder.device),
        "files": {path.name: sha256_file(path) for path in sorted(job.shards.iterdir()) if path.name != MANIFEST},
    }
    write_json(job.shards / MANIFEST, manifest)
    return manifest
