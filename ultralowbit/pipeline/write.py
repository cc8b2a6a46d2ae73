"""The finished checkpoint: the blocks' files merged, everything else beside them, and the manifest."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from ultralowbit.checkpoint.config import CONFIG, DIGEST, config_digest
from ultralowbit.checkpoint.contents import LOCAL, files_in
from ultralowbit.checkpoint.job import EMBEDDINGS, STATE, Job
from ultralowbit.checkpoint.manifest import MANIFEST
from ultralowbit.checkpoint.merge import merge_tensors
from ultralowbit.checkpoint.storage import sha256_files, write_atomic, write_json, write_tensors
from ultralowbit.data.calibration import Calibration
from ultralowbit.data.corpora import public_name
from ultralowbit.format.weight import Format
from ultralowbit.nn.decoder import Decoder
from ultralowbit.nn.quantizer import UltraLowBitConfig
from ultralowbit.recipe import Recipe
from ultralowbit.system import environment, peak_memory

_TOKENIZER = (
    "tokenizer*", "special_tokens_map.json", "added_tokens.json", "*vocab*", "merges*", "encoder.json",
    "normalizer.json", "emoji.json", "tekken.json", "dict.txt", "*.model", "*.tiktoken", "*.spm", "*.bpe", "*.codes",
    "*.jinja", "chat_template*", "generation_config.json",
)  # fmt: skip
_LICENCES = ("*license*", "*licence*", "notice*", "copying*", "use_policy*")
_CODE = "*.py"
_RECORDED = (
    "rotation",
    "preprocess",
    "allocation",
    "outputs",
    "embeddings",
    "blockwise",
    "finetune",
)  # what stages note of themselves

log = logging.getLogger(__name__)


def write_checkpoint(
    job: Job,
    model: str,
    folder: Path,
    decoder: Decoder,
    recipe: Recipe,
    data: Calibration | None,
) -> dict[str, Any]:
    """Write the finished checkpoint into the job's work folder; returns its manifest.

    folder: of the original, whose tokenizer, licence and code are carried over. data: the calibration text, if any.
    """
    out = job.new_checkpoint()
    config = _config(job, decoder, recipe)
    write_json(out / CONFIG, config)
    outside = job.work / "outside.safetensors"
    embeddings = job.state.get("embeddings", {})
    plain = [name for name in decoder.names_outside_blocks() if name.removesuffix(".weight") not in embeddings]
    write_tensors(outside, decoder.read(plain) | job.read_outside())
    parts = [job.block_file(i) for i in range(len(decoder.blocks))]
    parts += [job.work / EMBEDDINGS] if embeddings else []
    merge_tensors([*parts, outside], out, {DIGEST: config_digest(config)})
    for name in carried_files(folder, leave_out=(job.out, job.work)):
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        write_atomic(out / name, (folder / name).read_bytes())
    shown = recipe.with_sources(public_name)
    command = "# ultralowbit compress MODEL --recipe recipe.yaml --out DIR\n"  # no paths: the same run, the same bytes
    write_atomic(out / "recipe.yaml", (command + shown.to_yaml()).encode())
    manifest = _manifest(job, model, decoder, shown, data)
    digests = sha256_files(out / name for name in sorted(files_in(out)))
    manifest["files"] = {str(path.relative_to(out)): digest for path, digest in digests.items()}
    write_json(out / MANIFEST, manifest)
    texts = {  # by stage: two may read texts of one name in different folders
        stage: {public_name(text): str(path.absolute()) for text in spec.shares if (path := _path(text)).exists()}
        for stage, spec in recipe.texts.items()
    }
    job.note_memory(peak_memory())
    local = {"model": _place(model), "texts": texts, "peak_memory_bytes": job.state["peak_memory_bytes"]}
    write_json(out / LOCAL, local)
    return manifest


def _config(job: Job, decoder: Decoder, recipe: Recipe) -> dict[str, Any]:
    """config.json: the original's, naming the class that loads the result, and how each Linear is packed."""
    config = decoder.config.to_dict()
    config.pop("_name_or_path", None)  # the same run writes the same bytes wherever its model lies
    config["architectures"] = [type(decoder.model).__name__]
    packed = {**job.state["layers"], **job.state.get("embeddings", {})}
    formats = {name: Format.from_dict(entry["layout"]) for name, entry in packed.items()}
    config["quantization_config"] = UltraLowBitConfig.of(formats, recipe.name).to_dict()
    return config


def _manifest(job: Job, model: str, decoder: Decoder, recipe: Recipe, data: Calibration | None) -> dict[str, Any]:
    left_out = decoder.left_out()
    for part, (tensors, weights) in left_out.items():
        log.warning("left out: %s, %d tensors with %s weights, for which %s has no place",
                    part, tensors, f"{weights:,}", type(decoder.model).__name__)  # fmt: skip
    calibration = None
    if data is not None:
        samples, length = data.tokens.shape
        windows = {"samples": samples, "length": length, "tokens": samples * length, "sha256": data.sha256}
        calibration = {**recipe.calibration.model_dump(), "source": recipe.calibration.named, **windows}
    return {
        "fingerprint": job.state["fingerprint"],
        "model": public_name(model),
        "recipe": recipe.name,
        "calibration": calibration,
        "layers": job.state["layers"],
        "block_seconds": job.state["seconds"],
        **{stage: job.state[stage] for stage in _RECORDED if job.state.get(stage)},
        "left_out": {part: {"tensors": n, "weights": weights} for part, (n, weights) in left_out.items()},
        "environment": environment(decoder.device),
    }


def carried_files(folder: Path, leave_out: Sequence[Path]) -> Iterator[str]:
    """Names of the files that a packed checkpoint takes over from the original: tokenizer, chat templates, licence, and
    code where the config names some. No hidden files, nothing of packed checkpoints, work folders or folders to leave
    out, and nothing that a link renames: another folder's files may be linked to under their own names."""
    code = [_CODE] if any(_names_code(folder / name) for name in (CONFIG, "tokenizer_config.json")) else []
    for place, folders, names in os.walk(folder):
        here = Path(place)
        inside = [here / name for name in sorted(folders) if not name.startswith((".", "_"))]
        inside = [path for path in inside if path.resolve() not in leave_out]
        inside = [path for path in inside if not any((path / mark).exists() for mark in (MANIFEST, STATE))]
        folders[:] = [path.name for path in inside]
        wanted = [*_TOKENIZER, *_LICENCES, *code] if here == folder else ["*.jinja", *code]
        for name in sorted(names):
            is_wanted = any(fnmatchcase(name.lower(), pattern) for pattern in wanted)
            if is_wanted and not name.startswith(".") and _is_own(here / name, folder):
                yield str((here / name).relative_to(folder))


def _names_code(config: Path) -> bool:
    return config.is_file() and '"auto_map"' in config.read_text(encoding="utf-8", errors="replace")


def _is_own(path: Path, folder: Path) -> bool:
    """Whether a path is a file of this name, here or where a link leads; or one of the hub's cache, whose snapshots are
    links to its blobs."""
    target = Path(os.path.realpath(path))  # unlike Path's, for links in a circle
    of_cache = folder.resolve().parent.name == "snapshots" and folder.resolve().parents[1] / "blobs" == target.parent
    return target.is_file() and (target.name == path.name or of_cache)


def _path(source: str) -> Path:
    return Path(source).expanduser()


def _place(model: str) -> str:
    """Where a model lies on this machine, or its name on the hub."""
    folder = _path(model)
    return str(folder.absolute()) if folder.is_dir() else model
