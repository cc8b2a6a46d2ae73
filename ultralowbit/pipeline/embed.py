"""The stage `embeddings`: the embedding and the head are packed before the blocks, which then see what users will see.

What the head reads is gathered from the original model, whose blocks run once for it. Rows are packed a part at a time:
each has scales and codes of its own, so that a vocabulary of any size needs little memory.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from ultralowbit.checkpoint.activations import lanes_of
from ultralowbit.checkpoint.job import EMBEDDINGS, Job
from ultralowbit.checkpoint.packed import named_tensors, packed_weight
from ultralowbit.checkpoint.storage import write_tensors
from ultralowbit.data.calibration import Calibration
from ultralowbit.errors import CheckpointError, FormatError, naming_memory
from ultralowbit.format.weight import Format, PackedWeight
from ultralowbit.methods.rotation import rotated_format
from ultralowbit.methods.statistics import InputStats, Need, output_energy
from ultralowbit.nn.calls import run_block
from ultralowbit.nn.decoder import Decoder
from ultralowbit.nn.embedding import find_ends
from ultralowbit.pipeline.collect import Enough
from ultralowbit.pipeline.quantize import quantize_weight
from ultralowbit.pipeline.ranks import Ranks, own_batches
from ultralowbit.pipeline.source import batched
from ultralowbit.progress import Progress
from ultralowbit.recipe import Recipe

HEAD_TOKENS = 1 << 14
"""Tokens of the calibration text, at most, that the head is fitted to: several for each of its columns."""
ROWS = 1 << 13
"""Rows that are packed at a time."""


def planned_embeddings(decoder: Decoder, recipe: Recipe) -> dict[str, tuple[Format, tuple[int, int]]]:
    """Format and (rows, columns) of the embedding and of a head with a weight of its own, by their names; nothing where
    the recipe leaves them as they are. Raises `InputError` for those that cannot be packed."""
    if recipe.embeddings is None:
        return {}
    planned = {}
    for name in find_ends(decoder.model).names:
        rows, columns = decoder.model.get_submodule(name).weight.shape
        format, block = recipe.embeddings.quantizer.format(columns), recipe.hadamard(name, columns)
        planned[name] = (rotated_format(format, block) if block else format, (rows, columns))
    return planned


def packed_embeddings(
    job: Job, decoder: Decoder, recipe: Recipe, text: Calibration | None, progress: Progress, ranks: Ranks
) -> dict[str, PackedWeight]:
    """The packed embedding, and the head where it has a weight of its own, by their names; packed by all ranks and
    committed by rank 0 where no earlier run has done so."""
    if recipe.embeddings is None:
        return {}
    file = job.work / EMBEDDINGS
    if "embeddings" not in job.state:
        started = time.perf_counter()
        tokens = None if text is None else batched(text.tokens)  # [batches, batch, length]
        with naming_memory(f"packing the embeddings of {decoder.source.folder}"):
            packed, entries = _pack(decoder, recipe, tokens, progress, ranks)

        def keep() -> dict[str, Any]:
            write_tensors(file, named_tensors(packed))
            job.record([file])
            job.state["embeddings"] = entries
            job.state["seconds"]["embeddings"] = round(time.perf_counter() - started, 3)
            job.commit()
            return entries

        job.state["embeddings"] = ranks.agree(keep)
    with naming_memory(f"reading {file}"):
        tensors = load_file(file)
    return {name: packed_weight(name, entry, tensors) for name, entry in job.state["embeddings"].items()}


def dense_embedding(decoder: Decoder, packed: Mapping[str, PackedWeight]) -> dict[str, Tensor]:
    """What a packed embedding means [rows, columns], by its weight's name: the blocks' inputs are made of it."""
    name = find_ends(decoder.model).embedding if packed else None
    return {} if name is None else {f"{name}.weight": packed[name].dequantize(decoder.dtype)}


def _pack(
    decoder: Decoder, recipe: Recipe, tokens: Tensor | None, progress: Progress, ranks: Ranks
) -> tuple[dict[str, PackedWeight], dict[str, dict[str, Any]]]:
    """Each packed weight, and what the manifest says of it; parts of rows are packed by different ranks."""
    ends, method, device = find_ends(decoder.model), recipe.embeddings.quantizer, decoder.device
    weights = decoder.read([f"{name}.weight" for name in ends.names])
    block = recipe.hadamard(ends.embedding, weights[f"{ends.embedding}.weight"].shape[1])
    read = None
    if tokens is not None and method.needs:
        read = _read_by_head(decoder, tokens, method.needs, block, progress, ranks)
    stats = {name: read if ends.head in (None, name) else None for name in ends.names}
    parts = {(name, k): rows for name in ends.names for k, rows in enumerate(weights[f"{name}.weight"].split(ROWS))}
    progress.start("packing the embeddings", len(parts))

    def pack(part: str) -> tuple[PackedWeight, dict[str, Any]]:
        name, _, k = part.rpartition(" ")
        try:
            return quantize_weight(parts[name, int(k)].to(device).float(), method, stats[name], block)
        except FormatError as e:
            raise CheckpointError(f"{name} in {decoder.source.folder} cannot be packed: {e}") from e
        finally:
            progress.step()

    solved = ranks.solve({f"{name} {k}": rows.numel() for (name, k), rows in parts.items()}, pack, device)
    packed, entries = {}, {}
    for name in ends.names:
        of_name = [(rows, *solved[f"{name} {k}"]) for (n, k), rows in parts.items() if n == name]
        packed[name], entries[name] = _joined(of_name, stats[name])
        if tokens is not None and name == ends.embedding:
            entries[name]["lookup_error"] = _lookup_error(weights[f"{name}.weight"], packed[name], tokens)
    return packed, entries


def _joined(
    parts: Sequence[tuple[Tensor, PackedWeight, dict[str, Any]]], stats: InputStats | None
) -> tuple[PackedWeight, dict[str, Any]]:
    """One weight of its rows, packed a part at a time, and what is said of them together."""
    weights, packed, entries = zip(*parts, strict=True)
    format = packed[0].format
    whole = PackedWeight(
        format, (sum(map(len, weights)), format.in_features), format.stacked([p.tensors for p in packed])
    )
    errors, error = [entry["error"] for entry in entries], None
    if None not in errors:
        H = stats.hessian
        energy = torch.stack([output_energy(stats.rotated(w.to(H.device)), H) for w in weights])
        error = (energy @ energy.new_tensor(errors) / energy.sum()).item() if energy.sum() > 0 else 0.0
    shape = {"shape": list(whole.shape), "bits_per_weight": whole.bits_per_weight, "error": error, "least_error": None}
    return whole, {**entries[0], **shape, "seconds": round(sum(entry["seconds"] for entry in entries), 3)}


def _lookup_error(weight: Tensor, packed: PackedWeight, tokens: Tensor) -> float:
    """sum_t n_t |w_t - q_t|^2 / sum_t n_t |w_t|^2 over the tokens t that occur n_t times: the share of the energy of
    what enters the first block that is lost."""
    at, n = tokens.unique(return_counts=True)
    rows = weight[at].float()
    lost = rows - packed.format.decode(packed.format.rows(packed.tensors, at.to(packed.tensors["weight"].device))).cpu()
    n = n.double()
    return (n @ lost.double().square().sum(1) / (n @ rows.double().square().sum(1))).item()


@torch.no_grad()
def _read_by_head(
    decoder: Decoder, tokens: Tensor, needs: Need, hadamard: int | None, progress: Progress, ranks: Ranks
) -> InputStats:
    """Statistics of what the head of the original model reads, on some batches of tokens [batches, batch, length], of
    which each rank runs those of its lanes."""
    tokens = tokens[: max(1, HEAD_TOKENS // tokens[0].numel())]
    lanes, head = lanes_of(len(tokens)), decoder.model.get_output_embeddings()
    own = own_batches(ranks.mine(len(lanes)), lanes)
    progress.start("what the head reads", len(decoder.blocks))
    hidden: dict[int, Tensor] = {}
    calls = decoder.block_inputs(
        iter(tokens[own or [0]]), lambda k, entering: hidden.update({(own or [0])[k]: entering})
    )
    for i, call in enumerate(calls):
        with decoder.filled_block(i) as (block, _):
            for k in own:
                hidden[k] = run_block(block, hidden[k].to(decoder.device), call).cpu()
        progress.step()

    def new() -> list[InputStats]:
        return [InputStats(head.weight.shape[1], 0, decoder.device, needs, hadamard, half=decoder.autocast)]

    def gather(batches: range, stats: list[InputStats]) -> None:
        def before(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            stats[0].add(args[0])
            raise Enough  # the logits are not needed

        handle = head.register_forward_pre_hook(before)
        try:
            for k in batches:
                with suppress(Enough):
                    logits(tokens[k].to(decoder.device), hidden[k].to(decoder.device))
        finally:
            handle.remove()

    with decoder.after_blocks() as logits:
        (stats,) = ranks.sum_lanes(lanes, new, gather)
    return stats
