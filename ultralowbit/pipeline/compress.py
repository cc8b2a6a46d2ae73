"""compress(): one block after another is read, measured, quantized, packed and committed.

Later blocks see what users will see: after a block is packed, its weights are what the packed bytes decode to, and its
outputs are the next block's inputs. Without the stages `preprocess` and `finetune` the model is never in memory as a
whole.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from ultralowbit.checkpoint.contents import LOCAL
from ultralowbit.checkpoint.files import hash_model
from ultralowbit.checkpoint.job import CARRIED, Follower, Job, difference
from ultralowbit.checkpoint.manifest import read_manifest
from ultralowbit.checkpoint.packed import named_tensors, packed_weight
from ultralowbit.checkpoint.storage import read_json, sha256_files
from ultralowbit.data.calibration import Calibration
from ultralowbit.data.corpora import public_name
from ultralowbit.errors import CheckpointError, naming_memory
from ultralowbit.format.weight import PackedWeight
from ultralowbit.format.words import VERSION
from ultralowbit.hub import resolve_model
from ultralowbit.methods.statistics import Need
from ultralowbit.nn.decoder import Decoder
from ultralowbit.nn.folding import give_folded
from ultralowbit.pipeline.allocate import allocated, expected_planes
from ultralowbit.pipeline.embed import dense_embedding, packed_embeddings
from ultralowbit.pipeline.memory import what_helps
from ultralowbit.pipeline.ranks import Ranks, check_agreement, check_same_files, machine_facts
from ultralowbit.pipeline.sensitivity import measure_predictions
from ultralowbit.pipeline.source import TextReader, open_decoder, open_folded, planned_formats
from ultralowbit.pipeline.stream import BlockStream
from ultralowbit.pipeline.write import carried_files, write_checkpoint
from ultralowbit.progress import Progress, Silent
from ultralowbit.recipe import Recipe
from ultralowbit.system import pick_device
from ultralowbit.training.finetune import finetune
from ultralowbit.training.preprocess import preprocess
from ultralowbit.training.shards import Shards


@dataclass(frozen=True)
class Compressed:
    """What `compress` leaves behind: the folder and its manifest."""

    folder: Path
    manifest: dict[str, Any]

    @property
    def fallbacks(self) -> dict[str, str]:
        """Linears that were rounded to nearest because their statistics failed, and why."""
        return {name: layer["fallback"] for name, layer in self.manifest["layers"].items() if layer["fallback"]}

    @property
    def peak_memory_bytes(self) -> int | None:
        """The largest resident set of the processes that made it; None where it was made elsewhere."""
        try:
            nbytes = read_json(self.folder / LOCAL).get("peak_memory_bytes")
        except CheckpointError:
            return None
        return nbytes if type(nbytes) is int and 0 < nbytes < 2**63 else None


def compress(
    model: str,
    recipe: Recipe,
    out: Path | str,
    *,
    device: str = "auto",
    restart: bool = False,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
    ranks: Ranks | None = None,
    on_texts: Callable[[Mapping[str, Calibration]], object] = lambda texts: None,
) -> Compressed:
    """Compress a local folder or hub model into the packed checkpoint `out`.

    Killed at any moment, the same call goes on from the last committed block and ends with the same bytes; once
    `out` is there it returns at once. ranks: the processes that share the work, by default this one alone; each calls
    this with the same arguments, and `out` lies where all of them see it. on_texts: told the windows that the stages
    read, by stage, before any work. Raises `InputError`, `CheckpointError`, `DiskFull` or `OutOfMemory` in one
    sentence; `out` is then untouched.
    """
    progress, ranks = progress or Silent(), ranks or Ranks()
    where, folder = pick_device(ranks.device(device)), resolve_model(model)
    decoder, recipe, rotation = open_folded(folder, where, recipe, trust_remote_code)
    formats = planned_formats(decoder, expected_planes(decoder, recipe))
    reader = TextReader(folder, decoder, trust_remote_code, progress)
    texts = _shared_texts(ranks, lambda: _read_texts(recipe, formats, reader))
    on_texts(texts)
    text = texts.get("calibration")
    fingerprint = _fingerprint(decoder, recipe, texts, _model_digests(ranks, decoder, progress), Path(out))
    job, original = _open_job(Path(out), fingerprint, rotation, restart, progress, ranks), decoder
    if job is None:
        return _finished(Path(out).expanduser().resolve(), progress)
    shapes = [shape for _, shape in formats.values()]
    helps = partial(what_helps, recipe, device=where, shapes=shapes, blocks=len(decoder.blocks))
    again = partial(compress, model, device=str(where), trust_remote_code=trust_remote_code, progress=progress)
    preprocessed = partial(_preprocess, job, recipe, texts, decoder, again, helps, trust_remote_code, progress)

    def finish() -> dict[str, Any]:
        manifest = write_checkpoint(job, model, folder, decoder, recipe, text)
        original.source.check_unchanged()
        job.publish()
        return manifest

    try:
        if recipe.preprocess is not None:
            decoder = open_decoder(Path(ranks.agree(preprocessed)), where, trust_remote_code, recipe.calibration)
        with naming_memory(f"running {folder} block by block", helps("blocks")):
            measure_predictions(job, decoder, recipe, text, progress, ranks)
            chosen = allocated(job, decoder, recipe)
        outside = packed_embeddings(job, decoder, recipe, text, progress, ranks)
        dense = partial(dense_embedding, decoder, outside)
        BlockStream(job, decoder, chosen, text, progress, ranks, dense, helps("blocks")).run()
        if recipe.finetune is not None:
            with naming_memory(f"fine-tuning {folder}", helps("finetune")), ranks.exchanging():
                _finetune(job, original, decoder, recipe, outside, texts, trust_remote_code, progress, ranks)
        manifest = ranks.agree(finish)
    finally:
        job.close()
    return Compressed(job.out, manifest)


def _finished(out: Path, progress: Progress) -> Compressed:
    progress.say(f"{out} is already what this command makes")
    return Compressed(out, read_manifest(out))


def _shared_texts(ranks: Ranks, read: Callable[[], dict[str, Calibration]]) -> dict[str, Calibration]:
    """The texts of all stages, which rank 0 reads."""
    texts = read() if ranks.is_first else {}
    heads = ranks.agree(lambda: {stage: [list(t.tokens.shape), t.source, t.seed] for stage, t in texts.items()})
    return {
        stage: Calibration(
            ranks.from_rank(0, texts[stage].tokens if texts else torch.empty(shape, dtype=torch.int64)), source, seed
        )
        for stage, (shape, source, seed) in heads.items()
    }


def _model_digests(ranks: Ranks, decoder: Decoder, progress: Progress) -> dict[str, str] | None:
    """Digests of the model's files; None where another rank of this machine makes them."""
    check_same_files(ranks, decoder.source.folder, decoder.source.files)
    is_local_first = int(os.environ.get("LOCAL_RANK", "0")) == 0
    return hash_model(decoder.source.folder, progress) if ranks.is_first or is_local_first else None


def _open_job(
    out: Path,
    fingerprint: dict[str, Any],
    rotation: dict[str, Any] | None,
    restart: bool,
    progress: Progress,
    ranks: Ranks,
) -> Job | None:
    """The job of all ranks, whose folder rank 0 writes; None if `out` is there already. Ranks that differ in anything
    that the result depends on are refused before. What there is to note of the rotation is said and kept."""
    check_agreement(ranks, fingerprint | {"machine": machine_facts()}, difference)
    job = Job.open(out, fingerprint, restart, progress) if ranks.is_first else None
    if job is not None and rotation is not None:
        job.state["rotation"] = rotation
        for note in rotation["notes"]:
            progress.say(note)
    place = ranks.agree(lambda: job and job.place)
    return job if ranks.is_first or place is None else Follower(place)


def _read_texts(recipe: Recipe, formats: Mapping[str, Any], reader: TextReader) -> dict[str, Calibration]:
    """The windows that each stage reads, by the stage's name; none where no stage reads text."""
    trained = {"preprocess": recipe.preprocess, "finetune": recipe.finetune}
    trained = {stage: spec for stage, spec in trained.items() if spec is not None}
    needs_data = recipe.stage_reads_text or any(recipe.method_for(n).needs is not Need.NOTHING for n in formats)
    if not needs_data:
        return {}
    whole = reader.read(recipe.calibration)
    texts = {"calibration": replace(whole, tokens=whole.tokens[: recipe.packed_windows])}
    for stage, spec in trained.items():
        texts[stage] = whole if spec.data is None else reader.read(spec.data)
    return texts


def _fingerprint(
    decoder: Decoder, recipe: Recipe, texts: Mapping[str, Calibration], model: dict[str, str] | None, out: Path
) -> dict[str, Any]:
    """All that the bytes of the result depend on: two runs with the same one write the same files."""
    folder = decoder.source.folder
    carried = sha256_files(folder / name for name in carried_files(folder, leave_out=Job.places(out)))
    products = {"products": "bfloat16"} if decoder.autocast else {}
    labels = {"name", "summary"} if texts else {"name", "summary", "calibration"}
    return {
        "model": model,
        CARRIED: {str(path.relative_to(folder)): digest for path, digest in carried.items()},
        "recipe": recipe.with_sources(public_name).model_dump(mode="json", exclude=labels),
        "calibration": {
            "sha256" if stage == "calibration" else f"{stage} sha256": text.sha256 for stage, text in texts.items()
        },
        "software": {"ultralowbit": version("ultralowbit"), "torch": torch.__version__, "format": VERSION},
        "compute": {"device": decoder.device.type, "dtype": str(decoder.dtype).removeprefix("torch.")} | products,
    }


def _preprocess(
    job: Job,
    recipe: Recipe,
    texts: Mapping[str, Calibration],
    decoder: Decoder,
    again: Callable[[Recipe, Path], Compressed],
    helps: Callable[[str], str],
    trust_remote_code: bool,
    progress: Progress,
) -> str:
    """The folder of the preprocessed model, in the work folder; `again` compresses the model with another recipe."""
    first = recipe.model_copy(update={"preprocess": None, "embeddings": None, "finetune": None})
    with naming_memory(f"training adapters of {decoder.source.folder}", helps("preprocess")):
        made, job.state["preprocess"], job.state["seconds"]["preprocess"] = preprocess(
            lambda folder: again(first, folder).folder, texts["preprocess"].tokens, recipe.preprocess,
            decoder.config.dtype or torch.float32, job.work / "preprocess", decoder.device, trust_remote_code, progress,
        )  # fmt: skip
    return str(made)


def _finetune(
    job: Job,
    original: Decoder,
    decoder: Decoder,
    recipe: Recipe,
    outside: Mapping[str, PackedWeight],
    texts: Mapping[str, Calibration],
    trust_remote_code: bool,
    progress: Progress,
    ranks: Ranks,
) -> None:
    """Train the packed model as a whole, with the original as teacher; its blocks are then written again.
    outside: the packed embedding and head, which are not trained."""
    state, started = job.state, time.perf_counter()
    if "finetune" in state:
        return
    blocks = {i: job.read_block(i) for i in range(len(decoder.blocks))}
    block_of = {name: i for i in blocks for name in decoder.shapes(i)}
    packed = {name: packed_weight(name, entry, blocks[block_of[name]]) for name, entry in state["layers"].items()}
    trained, plain, fitted = finetune(
        original.source.folder, original.stored_dtype,
        partial(give_folded, decoder=original) if original.folding else lambda model: None,
        lambda name: decoder.read([f"{name}.weight"])[f"{name}.weight"], packed, outside,
        texts["finetune"].tokens, recipe.finetune, job.work / "finetune.safetensors",
        decoder.device, trust_remote_code, progress,
        Shards(ranks.mesh(decoder.device)),
    )  # fmt: skip
    for name, p in trained.items():
        blocks[block_of[name]] |= named_tensors({name: p})
        state["layers"][name]["trained"] = True
    for i in blocks:
        blocks[i] |= {name: plain.pop(name) for name in blocks[i].keys() & plain.keys()}
    for i, tensors in blocks.items():
        job.write_block(i, tensors, "finetuned")
    if plain:
        job.write_outside(plain)
    state |= {"block_folder": "finetuned", "finetune": fitted.to_dict()}
    state["seconds"]["finetune"] = round(time.perf_counter() - started + fitted.earlier_seconds, 3)
    job.commit()
