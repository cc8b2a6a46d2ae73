"""How much memory each stage of the pipeline takes at its peak, by part, and what would take less.

The formulas follow the code: `_blocks` is stream.py, statistics.py and methods/base.py; `_training` is training/.
`ultralowbit bench pipeline` measures the same stages beside them.
"""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Iterable, Iterator, Mapping
from copy import copy
from dataclasses import replace
from typing import NamedTuple

import torch

from ultralowbit.format.ints import Ints
from ultralowbit.format.planes import Planes
from ultralowbit.format.weight import Format
from ultralowbit.pipeline.embed import ROWS
from ultralowbit.pipeline.experts import at_once
from ultralowbit.pipeline.gradients import LOGITS
from ultralowbit.pipeline.source import BATCH_TOKENS, window_length
from ultralowbit.pipeline.workload import Workload
from ultralowbit.recipe import Recipe
from ultralowbit.training.specs import Blockwise, EndToEnd, FakeQuantized, Finetune, Preprocess, Trained

TRAINING = "training."
LIGHT = {"scale": 2e-4, "norm": 2e-4}
"""Rates of fine-tuning without latent weights."""


class Memory(NamedTuple):
    """Bytes of a stage by part, on the host and, where that is another place, on the device."""

    host: dict[str, int]
    device: dict[str, int]

    @property
    def total(self) -> tuple[int, int]:
        return sum(self.host.values()), sum(self.device.values())


def stage_memory(work: Workload, recipe: Recipe) -> dict[str, Memory]:
    """The peak of each stage of a recipe that has the workload's formats."""
    stages = {"blocks": _blocks(work, recipe)}
    if recipe.preprocess is not None:
        stages = {"preprocess": _preprocess(work, recipe.preprocess, recipe)} | stages
    if recipe.finetune is not None:
        stages["finetune"] = _finetune(work, recipe.finetune, recipe)
    return stages


def smaller_memory(work: Workload, recipe: Recipe) -> dict[str, list[tuple[str, Memory]]]:
    """By stage, what to set so that it takes less memory, from what costs least on; each with the peak that is left."""
    options: dict[str, list[tuple[str, Memory]]] = {}
    for stage, key, changes in _changes(recipe, work.shapes.values(), len(work.decoder.blocks)):
        spec, less = getattr(recipe, key), None
        if changes is not None:
            training = {name.removeprefix(TRAINING): v for name, v in changes.items() if name.startswith(TRAINING)}
            update = {name: v for name, v in changes.items() if not name.startswith(TRAINING)}
            less = spec.model_copy(update=update | {"training": replace(spec.training, **training)})
        left = stage_memory(work, recipe.model_copy(update={key: less})).get(stage, Memory({}, {}))
        options.setdefault(stage, []).append((_settings(key, changes), left))
    if work.length > BATCH_TOKENS:  # shorter windows run several at a time
        shorter = copy(work)
        shorter.batch = BATCH_TOKENS
        left = stage_memory(shorter, recipe)["blocks"]
        options["blocks"] = [(f"--length {BATCH_TOKENS}", left), *options.get("blocks", [])]
    return options


def what_helps(recipe: Recipe, stage: str, device: torch.device, shapes: Iterable[tuple[int, int]], blocks: int) -> str:
    """What to do where memory ran out in a stage of a model with so many blocks, whose packed Linears have these
    shapes; as the end of a sentence."""
    settings = [_settings(key, changes) for where, key, changes in _changes(recipe, shapes, blocks) if where == stage]
    options = [*settings[-2:], "a smaller --length"]
    if settings and recipe.allocate is not None:
        options.append("--effort fast")
    if device.type != "cpu":
        options.append("--device cpu")
    return "free some and run the same command to go on, or begin again with --restart and " + " or ".join(options)


def _settings(key: str, changes: Mapping[str, object] | None) -> str:
    """Changes of a part of the recipe, or none of it at all, as options."""
    if changes is None:
        return f"--set {key}=null"
    values = {name: json.dumps(value).replace('"', "") for name, value in changes.items()}
    settings = (f"{key}.{name}={value}" for name, value in values.items())
    return " ".join(f"--set {shlex.quote(setting)}" for setting in settings)


def _changes(
    recipe: Recipe, shapes: Iterable[tuple[int, int]], blocks: int
) -> Iterator[tuple[str, str, dict[str, object] | None]]:
    """Stage, key of the recipe, and what to change there, None for no such stage; from what costs least on. What is so
    already, by the recipe or by the size of the model, is not among them."""
    weights = sum(map(math.prod, shapes))
    for stage, key in (("preprocess", "preprocess"), ("blocks", "blockwise"), ("finetune", "finetune")):
        spec = getattr(recipe, key)
        if spec is None:
            continue
        changes: dict[str, object] = {}
        if isinstance(spec, EndToEnd) and not spec.is_checkpointed(weights):
            changes["checkpointing"] = True
            yield stage, key, dict(changes)
        latent = "latent" in spec.training.lr
        at_once = weights // (blocks if key == "blockwise" else 1)
        if isinstance(spec, FakeQuantized) and latent and spec.latent_dtype(at_once) != torch.bfloat16:
            changes["latents"] = "bf16"
            yield stage, key, dict(changes)
        if spec.training.batch > 1:
            rest = spec.training.batch * spec.training.accumulation  # the same steps
            changes |= {f"{TRAINING}batch": 1, f"{TRAINING}accumulation": rest}
            yield stage, key, dict(changes)
        if isinstance(spec, Finetune) and latent and "scale" in spec.training.lr:
            changes.pop("latents", None)
            yield stage, key, changes | {f"{TRAINING}lr": LIGHT}
        yield stage, key, None


def _blocks(work: Workload, recipe: Recipe) -> Memory:
    """Of packing one block after another, of block-wise training, and of what comes before and after."""
    decoder, compute = work.decoder, work.decoder.dtype.itemsize
    blocks = [_sizes(work, decoder.names_of_block(i)) for i in range(len(decoder.blocks))]
    stored, computed = max(blocks)
    outside, outside_computed = _sizes(work, decoder.names_outside_blocks())
    widest = max((m for m, _ in work.hessians), default=0)
    hessians = 8 * widest**2 + 4 * work.outliers * widest  # one group at a time: fp32 sum, factor, tokens held back
    if work.paired:  # the sum against the original's inputs, a factor of its own, the residual's sum
        hessians += 8 * widest**2 + 4 * max(n * m for n, m in work.shapes.values())
    if decoder.experts:  # of many at a time, and of one lane beside all
        most = min(at_once(widest, work.paired), max(mixture.count for mixture in decoder.experts.values()))
        hessians = max(hessians, most * 8 * widest**2 * (2 if work.paired else 1))
    factorise = 5 * 4 * widest**2  # beside the sum: the fp64 matrix, its flipped copy or factor, a product of halves
    packing = (12 if compute == 4 else 16) * max(n * m for n, m in work.shapes.values())  # fp32 copies of one weight
    forward = work.batch * compute * (8 * work.hidden + 3 * max(max(shape) for shape in work.shapes.values()))
    gather = 4 * widest**2 + 8 * (work.outliers + work.batch) * widest * (work.outliers > 0)  # last group's; clipping
    as_stored = {"block as stored": stored}
    on_device = {
        "block": computed * (2 if work.paired else 1),
        "Hessian and its factor": hessians,
        "working memory": forward + max(factorise, packing, gather),  # allocators keep the small pieces of a forward
    }
    packed = recipe.embeddings is not None
    entering = Memory(
        {"embeddings and block as stored": outside + stored, "what packed embeddings mean": outside_computed * packed},
        {"embeddings and block": outside_computed},
    )
    phases = [Memory(as_stored, on_device), Memory({"embeddings and head, and their file": 2 * outside}, {})]
    phases += [entering] if work.tokens else []
    if packed:
        rows = {"rows that are packed": 12 * 4 * ROWS * work.hidden + 48 * work.hidden**2}  # as for a Linear
        phases.append(Memory({"embeddings and head as stored, and packed": 2 * outside}, rows))
    if work.backwards:
        phases += _measuring(
            work,
            as_stored,
            computed,
            Memory(
                {"embeddings and head as stored": outside},
                {
                    "embeddings and head": outside_computed,
                },
            ),
        )
    if recipe.blockwise is not None:
        parts = {"block": computed} | _training(work, recipe.blockwise, recipe, len(blocks))
        phases.append(Memory(as_stored, parts))
    return _largest(work, phases)


def _measuring(work: Workload, as_stored: dict[str, int], block: int, ends: Memory) -> list[Memory]:
    """Of what the model's predictions tell (gradients.py): their gradient at what leaves the blocks, a few tokens at a
    time, and the blocks that run backwards, a window at a time."""
    compute, blocks = work.decoder.dtype.itemsize, len(work.decoder.blocks)
    few = min(work.length, max(1, LOGITS // work.vocabulary))
    # as they are, and two of: in fp32, their softmax, its sum
    predicted = {"predictions of a few tokens": few * work.vocabulary * (compute + 8)}
    kept = {"gradients by window": work.backwards * work.hidden * compute}
    backwards = {
        "block": block,
        "a window for the backward pass": work.length * compute * _width(work),
        "what packing loses": 4 * (work.costed > 0) * sum(math.prod(shape) for shape in work.shapes.values()) // blocks,
        "Fisher information of outputs": 2 * work.kept_outputs // blocks,  # of all Linears; it is summed by lanes
    }
    return [Memory(kept | ends.host, predicted | ends.device), Memory(kept | as_stored, backwards)]


def _finetune(work: Workload, spec: Finetune, recipe: Recipe) -> Memory:
    """Of the original, which is the teacher, and of the student, which shares all with it but the packed Linears."""
    decoder = work.decoder
    dtype = decoder.stored_dtype
    teacher = dtype.itemsize * sum(math.prod(spec.shape) for spec in decoder.specs.values())
    head = 4 * work.vocabulary * work.hidden if dtype != torch.float32 else 0  # in fp32, for the backward pass too
    on_device = {"the original": teacher, "its head in fp32": head} | _training(work, spec, recipe, 1)
    return _largest(work, [Memory({"packed blocks": _packed(work)}, on_device)])


def _preprocess(work: Workload, spec: Preprocess, recipe: Recipe) -> Memory:
    """Of the packed model with its adapters; it is quantized before like any other."""
    adapted = [shape for name, shape in work.shapes.items() if spec.adapts(name)]
    tokens = spec.training.batch * window_length(spec.data or recipe.calibration, work.decoder)
    again, depth = spec.is_checkpointed(sum(math.prod(shape) for shape in adapted)), len(work.decoder.blocks)
    inputs = 3 * sum(m for _, m in adapted) // (depth if again else 1)  # of each adapter: what was dropped, and which
    backward = _backward(work, spec, tokens, depth, again) + 4 * tokens * inputs
    packed = {"packed blocks": _packed(work), "the rest in fp32": 4 * work.outside}
    parts = packed | {
        "adapters, gradients and moments": 16 * spec.rank * sum(n + m for n, m in adapted),
        "a weight and its gradient in fp32": 8 * max(math.prod(shape) for shape in work.shapes.values()),
        "a batch for the backward pass": backward,
    }
    stored = (work.decoder.config.dtype or torch.float32).itemsize
    merged = packed | {"the merged model": stored * sum(work.forward.values())}
    return _largest(work, [Memory({}, parts), Memory({}, merged)])


def _training(work: Workload, spec: Blockwise | Finetune, recipe: Recipe, parts: int) -> dict[str, int]:
    """Of fake-quantized Linears, of one of so many `parts` of the model, while they are trained."""
    weights = sum(math.prod(shape) for shape in work.shapes.values()) // parts
    end_to_end, latent = isinstance(spec, Finetune), "latent" in spec.training.lr
    again = end_to_end and spec.is_checkpointed(weights)
    per_weight, gathered = (16, 8) if spec.latent_dtype(weights) == torch.float32 else (6, 4)
    depth = len(work.decoder.blocks) if end_to_end else 1
    dense = _number(work, spec) * (weights // depth if again else weights)
    kept = [_kept(f, shape, latent) for f, shape in zip(work.formats, work.shapes.values(), strict=True)]
    codes, scales = (sum(numbers) // parts for numbers in zip(*kept, strict=True))
    ranks = work.ranks if end_to_end else 1
    batch = min(spec.training.batch, math.ceil(spec.training.batch * spec.training.accumulation / ranks))
    tokens = batch * window_length(getattr(spec, "data", None) or recipe.calibration, work.decoder)
    latents = per_weight * weights // ranks + (gathered * weights // depth if ranks > 1 else 0)  # one block's are whole
    return {
        "latent weights, gradients and moments": latents * latent,
        "codes, and scales with moments": codes + 16 * scales,
        "weights of the forward pass": dense,
        "a batch for the backward pass": _backward(work, spec, tokens, depth, again),
    }


def _number(work: Workload, spec: Trained) -> int:
    """Bytes of each number that products are made of."""
    return 2 if work.autocasts(spec) else 4


def _backward(work: Workload, spec: Trained, tokens: int, depth: int, again: bool) -> int:
    """What so many tokens leave for the backward pass."""
    number = _number(work, spec)
    width = _width(work)
    blocks = number * (depth * work.hidden + width) if again else number * depth * width
    ends = 3 * 4 * work.hidden if isinstance(spec, Blockwise) else 4 * 4 * work.vocabulary  # targets; logits of two
    return tokens * (blocks + ends)


def _width(work: Workload) -> int:
    """Numbers that a token leaves in a block for the backward pass."""
    return 12 * work.hidden + 4 * max(sum(shape) for shape in work.shapes.values())


def saved_training(work: Workload, spec: Trained, parts: int = 1) -> int:
    """Bytes of the files that a stage which trains one of so many `parts` of the model goes on from: parameters with
    their moments, and the best ones; each while the next is written beside it."""
    if isinstance(spec, Preprocess):
        return 32 * spec.rank * sum(sum(shape) for name, shape in work.shapes.items() if spec.adapts(name))
    weights = sum(math.prod(shape) for shape in work.shapes.values()) // parts
    each = 16 if spec.latent_dtype(weights) == torch.float32 else 6  # with two moments of 32 or of 8 bits
    scales = sum(_kept(f, shape, True)[1] for f, shape in zip(work.formats, work.shapes.values(), strict=True))
    return 2 * (each * weights * ("latent" in spec.training.lr) + 16 * scales // parts)


def _kept(format: Format, shape: tuple[int, int], latent: bool) -> tuple[int, int]:
    """Bytes of the codes that a fake-quantized weight keeps, and its scales and offsets."""
    out, _ = shape
    codes = 0 if format.outliers is None else 5 * math.prod(shape)
    for segment in format.segments:
        if not latent:
            codes += out * segment.columns * {Planes: getattr(segment, "planes", 0), Ints: 2}.get(type(segment), 4)
    tensors = format.tensors(*shape)
    scales = sum(math.prod(spec.shape) for name, spec in tensors.items() if name.endswith(("_scale", "_offset")))
    return codes, scales


def _packed(work: Workload) -> int:
    """Bytes of the packed blocks."""
    return sum(f.nbytes(*shape) for f, shape in zip(work.formats, work.shapes.values(), strict=True))


def _sizes(work: Workload, names: list[str]) -> tuple[int, int]:
    """Bytes as stored and as computed with."""
    specs = [work.decoder.specs[name] for name in names]
    computed = work.decoder.dtype.itemsize * sum(math.prod(spec.shape) for spec in specs)
    return sum(spec.nbytes for spec in specs), computed


def _largest(work: Workload, phases: list[Memory]) -> Memory:
    """The phase that takes most; on a CPU everything is on the host."""
    if work.decoder.device.type == "cpu":
        phases = [Memory(phase.host | phase.device, {}) for phase in phases]
        return max(phases, key=lambda phase: phase.total)
    host = max((phase.host for phase in phases), key=lambda parts: sum(parts.values()))
    return Memory(host, max((phase.device for phase in phases), key=lambda parts: sum(parts.values())))
