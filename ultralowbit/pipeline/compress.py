"""compress(): one block after another is read, measured, quantized, packed and committed; never the whole model.

Later blocks see what users will see: after a block is packed, its weights are what the packed bytes decode to, and its
outputs are the next block's inputs.
"""

from __future__ import annotations

import json
import shutil
import time
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from ultralowbit.checkpoint.job import Job
from ultralowbit.checkpoint.manifest import MANIFEST
from ultralowbit.checkpoint.storage import write_tensors
from ultralowbit.format.weight import Format, PackedWeight
from ultralowbit.format.words import VERSION
from ultralowbit.hub import resolve_model
from ultralowbit.methods.statistics import Need
from ultralowbit.nn.decoder import Decoder
from ultralowbit.pipeline.source import TextReader, hash_model, open_decoder, packed_formats
from ultralowbit.pipeline.stream import BlockStream
from ultralowbit.pipeline.write import write_checkpoint
from ultralowbit.progress import Progress, Silent
from ultralowbit.recipe import Recipe
from ultralowbit.system import pick_device
from ultralowbit.training.finetune import finetune
from ultralowbit.training.preprocess import preprocess
from ultralowbit.training.specs import Finetune


@dataclass(frozen=True)
class Compressed:
    """What `compress` leaves behind: the folder and its manifest."""

    folder: Path
    manifest: dict[str, Any]

    @property
    def fallbacks(self) -> dict[str, str]:
        """Linears that were rounded to nearest because their statistics failed, and why."""
        return {name: layer["fallback"] for name, layer in self.manifest["layers"].items() if layer["fallback"]}


def compress(
    model: str,
    recipe: Recipe,
    out: Path | str,
    *,
    device: str = "auto",
    restart: bool = False,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> Compressed:
    """Compress a local folder or hub model into the packed checkpoint `out`.

    Killed at any moment, the same call goes on from the last committed block and ends with the same bytes; once
    `out` is there it returns at once. Raises `InputError`, `CheckpointError` or `DiskFull` in one sentence; `out` is
    then untouched.
    """
    progress = progress or Silent()
    where = pick_device(device)
    folder = resolve_model(model)
    decoder = open_decoder(folder, where, trust_remote_code)
    formats = packed_formats(decoder, recipe)
    stages = (recipe.preprocess, recipe.blockwise, recipe.finetune)
    needs_data = any(stages) or any(recipe.method_for(name).needs is not Need.NOTHING for name in formats)
    labels = {"name", "summary"} if needs_data else {"name", "summary", "calibration"}
    fingerprint = {
        "model": hash_model(decoder, progress),
        "recipe": recipe.model_dump(mode="json", exclude=labels),
        "calibration": {},
        "software": {"ultralowbit": version("ultralowbit"), "torch": torch.__version__, "format": VERSION},
        "compute": {"device": where.type, "dtype": str(decoder.dtype).removeprefix("torch.")},
    }
    texts = TextReader(folder, decoder, trust_remote_code, progress)
    data = texts.read(recipe.calibration) if needs_data else None
    if data is not None:
        fingerprint["calibration"] = {"sha256": data.sha256}
    training = {
        stage: data if spec.data is None else texts.read(spec.data)
        for stage, spec in (("preprocess", recipe.preprocess), ("finetune", recipe.finetune))
        if spec is not None
    }
    fingerprint["calibration"] |= {f"{stage} sha256": text.sha256 for stage, text in training.items()}

    job = Job.open(Path(out).expanduser(), fingerprint, restart)
    if job is None:
        target = Path(out).expanduser()
        progress.say(f"{target} is already what this command makes")
        return Compressed(target, json.loads((target / MANIFEST).read_text()))
    try:
        if recipe.preprocess is not None:
            first = recipe.model_copy(update={"preprocess": None, "finetune": None})
            options = {"device": device, "trust_remote_code": trust_remote_code, "progress": progress}
            started = time.perf_counter()
            prepared, job.state["preprocess"] = preprocess(
                lambda folder: compress(model, first, folder, **options).folder, training["preprocess"].tokens,
                recipe.preprocess, decoder.config.dtype, job.work / "preprocess", where, trust_remote_code, progress,
            )  # fmt: skip
            job.state["seconds"].setdefault("preprocess", round(time.perf_counter() - started, 3))
            decoder = open_decoder(prepared, where, trust_remote_code)
        BlockStream(job, decoder, recipe, data, progress).blocks()
        if recipe.finetune is not None:
            _finetune_packed(
                job, folder, decoder, recipe.finetune, training["finetune"].tokens, trust_remote_code, progress
            )
        manifest = write_checkpoint(job, model, folder, decoder, recipe, data)
        job.publish()
    finally:
        job.close()
    return Compressed(job.out, manifest)


def _finetune_packed(
    job: Job,
    folder: Path,
    decoder: Decoder,
    spec: Finetune,
    tokens: Tensor,
    trust_remote_code: bool,
    progress: Progress,
) -> None:
    """Train the packed model as a whole, with the model in `folder` as teacher; its shards are then written again."""
    distilled, state, started = job.work / "distilled", job.state, time.perf_counter()
    if "finetune" not in state:
        blocks = len(decoder.blocks)
        file_of = {name: job.shard_name(i, blocks + 1) for i in range(blocks) for name in decoder.linears(i)}
        stored = {file: load_file(job.shards / file) for file in dict.fromkeys(file_of.values())}
        packed = {}
        for name, layer in state["layers"].items():
            format, shape, tensors = Format.from_dict(layer["layout"]), tuple(layer["shape"]), stored[file_of[name]]
            packed[name] = PackedWeight(format, shape, {t: tensors[f"{name}.{t}"] for t in format.tensors(*shape)})
        weights = decoder.read([f"{name}.weight" for name in packed])
        trained, fitted = finetune(
            folder, {name: weights[f"{name}.weight"] for name in packed}, packed, tokens, spec,
            job.work / "finetune.safetensors", decoder.device, trust_remote_code, progress,
        )  # fmt: skip
        for name, p in trained.items():
            stored[file_of[name]] |= {f"{name}.{part}": t.cpu() for part, t in p.tensors.items()}
            state["layers"][name] |= {"error": None}
        shutil.rmtree(distilled, ignore_errors=True)
        distilled.mkdir()
        for file, tensors in stored.items():
            write_tensors(distilled / file, tensors)
        state["finetune"] = asdict(fitted)
        state["seconds"]["finetune"] = round(time.perf_counter() - started, 3)
        job.commit()
    for path in distilled.glob("*.safetensors"):  # a kill in between leaves the rest to the next run
        path.replace(job.shards / path.name)
