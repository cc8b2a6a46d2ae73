"""What `compress` would write, need and take, before anything heavy: from headers, config.json and a second of timing.

The size is exact where formats are known before any data is seen, else what the method expects. Memory and time are
estimates for the pipeline as it is: `_memory` and `_seconds` follow pipeline.py, stats.py and methods/base.py.
"""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import psutil
import torch

from ultralowbit.checkpoint.size import Size
from ultralowbit.errors import InputError
from ultralowbit.format.weight import Format
from ultralowbit.hub import resolve_model
from ultralowbit.methods.base import Method
from ultralowbit.methods.statistics import InputStats
from ultralowbit.nn.decoder import Decoder
from ultralowbit.pipeline.allocate import expected_planes
from ultralowbit.pipeline.rates import random, seconds
from ultralowbit.pipeline.source import open_decoder, planned_formats, window_length
from ultralowbit.pipeline.workload import Workload
from ultralowbit.recipe import Recipe
from ultralowbit.system import available_memory, existing, pick_device
from ultralowbit.units import format_bytes, format_seconds

ACTIVATIONS = "activation files in memory"
"""Mapped pages of the activation files: the system takes them back under pressure, so they never make a run fail."""


@dataclass(frozen=True)
class Estimate:
    """size: what will be stored, headers left out; memory, device_memory, disk: part -> bytes; seconds: part -> s.

    On a CPU `device_memory` is empty: everything is in `memory`. Peaks are the sums of their parts.
    """

    model: str
    recipe: str
    device: str
    dtype: str
    blocks: int
    size: Size
    memory: dict[str, int]
    device_memory: dict[str, int]
    disk: dict[str, int]
    seconds: dict[str, float]
    available_memory: int
    available_device_memory: int
    available_disk: int
    notes: list[str] = field(default_factory=list)

    @property
    def warnings(self) -> list[str]:
        """One sentence for each thing that will not fit."""
        pinned = sum(size for part, size in self.memory.items() if part != ACTIVATIONS)
        base = self.memory.get("this process", 0)  # it has that already
        sentences = []
        for what, need, there, remedy in (
            (
                "memory",
                pinned - base,
                self.available_memory,
                "use fewer or shorter calibration samples, or close others",
            ),
            (
                f"memory on {self.device}",
                sum(self.device_memory.values()),
                self.available_device_memory,
                "--device cpu",
            ),
            ("disk", sum(self.disk.values()), self.available_disk, "free some, or choose another --out"),
        ):
            if need > there:
                needed, free = format_bytes(need), format_bytes(there)
                sentences.append(f"about {needed} of {what} are needed, {free} are free: {remedy}")
        return sentences

    def to_dict(self) -> dict[str, Any]:
        """Everything in __str__, as JSON values."""
        plain = ("model", "recipe", "device", "dtype", "blocks", "memory", "device_memory", "disk", "seconds")
        free = ("available_memory", "available_device_memory", "available_disk")
        return {
            **{name: getattr(self, name) for name in (*plain, *free, "notes", "warnings")},
            "peak_memory": sum(self.memory.values()),
            "peak_device_memory": sum(self.device_memory.values()),
            "disk_needed": sum(self.disk.values()),
            "seconds_total": sum(self.seconds.values()),
            "size": self.size.to_dict(),
        }

    def __str__(self) -> str:
        size = self.size
        lines = [
            f"{self.model} with {self.recipe}: {self.blocks} blocks on {self.device} in {self.dtype}",
            f"  linears   {size.linear_bits_per_weight:.4f} bits per weight (codes alone {size.claimed_bits:.4f}), "
            f"{len(size.layers)} Linears, {size.linear_weights:,} weights",
            f"  model     {size.model_bits_per_weight:.4f} bits per weight, {size.total_bytes:,} bytes, "
            f"{size.compression:.2f}x smaller than fp16",
            _line("memory", self.memory, self.available_memory),
        ]
        if self.device_memory:
            lines.append(_line("device", self.device_memory, self.available_device_memory))
        lines.append(_line("disk", self.disk, self.available_disk))
        parts = ", ".join(f"{part} {format_seconds(s)}" for part, s in self.seconds.items())
        lines.append(f"  time      about {format_seconds(sum(self.seconds.values()))}: {parts}")
        lines += [f"  note      {note}" for note in self.notes]
        return "\n".join(lines + [f"  WARNING   {warning}" for warning in self.warnings])


def estimate(
    model: str, recipe: Recipe, device: str = "auto", trust_remote_code: bool = False, out: Path | str = "."
) -> Estimate:
    """What `compress` with the same arguments would do; takes seconds, reads no weight and writes nothing.

    Raises what `compress` raises for a model or recipe that it refuses.
    """
    where = pick_device(device)
    folder = resolve_model(model)
    decoder = open_decoder(folder, where, trust_remote_code)
    recipe = expected_planes(decoder, recipe)
    formats = planned_formats(decoder, recipe)
    size = _size(decoder, formats)
    work = Workload(decoder, recipe, formats)
    notes = [] if recipe.allocate is None else ["which Linears get how many planes is decided on the text"]
    notes += [] if work.exact_groups else ["which Linears share an input is not known: one Hessian a Linear is assumed"]
    if any(_depends_on_data(method) for method in set(work.methods.values())):
        notes.append("with this recipe the size depends on data: bits and bytes are expected ones, not exact")
    if work.tokens:
        notes.append(
            f"getting and tokenising the calibration text ({recipe.calibration.source}) is not in the estimates"
        )
    memory, device_memory = _memory(work)
    return Estimate(
        model=model,
        recipe=recipe.name,
        device=str(where),
        dtype=str(decoder.dtype).removeprefix("torch."),
        blocks=len(decoder.blocks),
        size=size,
        memory=memory,
        device_memory=device_memory,
        disk={
            "packed checkpoint": 2 * size.total_bytes,  # the blocks, and what they are merged into
            "activation files": work.files * work.activations,
        },
        seconds=seconds(work, size),
        available_memory=available_memory(),
        available_device_memory=torch.cuda.mem_get_info(where)[0] if where.type == "cuda" else 0,
        available_disk=shutil.disk_usage(existing(Path(out).expanduser())).free,
        notes=notes,
    )


def bits_for_size(model: str, recipe: Recipe, nbytes: int, device: str, trust_remote_code: bool = False) -> float:
    """The bits a weight with which a recipe that allocates them writes a file of at most `nbytes`, headers included.

    Raises `InputError` where one plane for every Linear, with all that is not packed, is larger than that.
    """
    decoder = open_decoder(resolve_model(model), pick_device(device), trust_remote_code)
    least = recipe.model_copy(update={"allocate": None, "quantize": replace(recipe.quantize, planes=1)})
    size = _size(decoder, planned_formats(decoder, least))
    names = [f"{layer.name}.weight_{part}" for layer in size.layers for part in layer.parts]
    entry = {"dtype": "BF16", "shape": [10**7] * 3, "data_offsets": [nbytes] * 2}
    headers = len(json.dumps(dict.fromkeys([*names, *decoder.names_outside_blocks()], entry))) + (1 << 12)
    beside = size.total_bytes - size.linear_bytes + headers
    if beside + size.linear_bytes > nbytes:
        raise InputError(
            f"a file of {format_bytes(nbytes)} is asked for, and embeddings, head, norms and headers take "
            f"{format_bytes(beside)} of it, one plane for every Linear {format_bytes(size.linear_bytes)}: ask for "
            f"{format_bytes(1.01 * (beside + size.linear_bytes))} at least"
        )
    return max(size.linear_bits_per_weight, math.floor(8e4 * (nbytes - beside) / size.linear_weights) / 1e4)


def _size(decoder: Decoder, formats: dict[str, tuple[Format, tuple[int, int]]]) -> Size:
    """What the packed checkpoint will hold: the packed tensors of each Linear, all else as it is stored now."""
    tensors = {
        name: decoder.source.specs[key]
        for name, key in decoder.key_of.items()
        if name.removesuffix(".weight") not in formats
    }
    for name, (format, shape) in formats.items():
        tensors |= {f"{name}.{suffix}": spec for suffix, spec in format.tensors(*shape).items()}
    vocabulary = getattr(decoder.config.get_text_config(), "vocab_size", None)
    return Size.of(tensors, {name: format for name, (format, _) in formats.items()}, vocabulary)


def _depends_on_data(method: Method) -> bool:
    """Whether packed weights need other room than the method announced, tried on a random one."""
    n, m = 16, 256
    stats = InputStats(m, needs=method.needs)
    stats.add(random(2 * m, m, torch.device("cpu")))
    packed = method.quantize(random(n, m, torch.device("cpu")), stats)
    return packed.format.tensors(n, m) != method.format(m).tensors(n, m)


def _memory(work: Workload) -> tuple[dict[str, int], dict[str, int]]:
    """Peak bytes by part, on the host and, where it is not the host, on the device."""
    decoder, compute = work.decoder, work.decoder.dtype.itemsize

    def sizes(names: list[str]) -> tuple[int, int]:
        """Bytes as stored and as computed with."""
        specs = [decoder.source.specs[decoder.key_of[name]] for name in names]
        numbers = [math.prod(spec.shape) for spec in specs]
        return sum(n * s.dtype.itemsize for n, s in zip(numbers, specs, strict=True)), compute * sum(numbers)

    blocks = [sizes(decoder.names_of_block(i)) for i in range(len(decoder.blocks))]
    stored, computed = max(blocks)
    outside, outside_computed = sizes(decoder.names_outside_blocks())
    widest = max((m for block in work.hessians for m in block), default=0)
    hessians = 8 * widest**2 + 4 * work.outliers * widest  # one group at a time: fp32 sum, factor, tokens held back
    if work.paired:  # the sum against the original's inputs, a factor of its own, the residual's sum
        hessians += 8 * widest**2 + 4 * max(n * m for n, m in work.shapes.values())
    factorise = 5 * 4 * widest**2  # beside the sum: the fp64 matrix, its flipped copy or factor, a product of halves
    packing = (12 if compute == 4 else 16) * max(n * m for n, m in work.shapes.values())  # fp32 copies of one weight
    forward = work.batch * compute * (8 * work.hidden + 3 * max(max(shape) for shape in work.shapes.values()))
    gather = 4 * widest**2 + 8 * (work.outliers + work.batch) * widest * (work.outliers > 0)  # last group's; clipping
    process = {"this process": psutil.Process().memory_info().rss}
    mapped = {ACTIVATIONS: work.files * work.activations} if work.tokens else {}
    blockwise = {"block as stored": stored}
    on_device = {
        "block": computed * (2 if work.paired else 1),
        "Hessian and its factor": hessians,
        "working memory": forward + max(factorise, packing, gather),  # allocators keep the small pieces of a forward
    }
    entering = {"embeddings and block as stored": outside + stored}
    entering_on_device = {"embeddings and block": outside_computed + computed} if work.tokens else {}
    finishing = {"embeddings and head, and their file": 2 * outside}
    training = _training_memory(work)
    if decoder.device.type != "cpu":
        phases = [blockwise, entering if work.tokens else {}, finishing]
        host = max(phases, key=lambda parts: sum(parts.values()))
        on_device = max(on_device, entering_on_device, training, key=lambda parts: sum(parts.values()))
        return process | host | mapped, on_device
    phases = [blockwise | on_device, entering | entering_on_device if work.tokens else {}, finishing, training]
    return process | max(phases, key=lambda parts: sum(parts.values())) | mapped, {}


def _training_memory(work: Workload) -> dict[str, int]:
    """Peak bytes of the stage that trains most, all in fp32: weights beside their bits, of latent weights the gradient
    and two moments too, and what a batch leaves for the backward pass."""
    recipe, blocks = work.recipe, len(work.decoder.blocks)
    weights = sum(math.prod(shape) for shape in work.shapes.values())
    bits = max(format.claimed_bits for format in work.formats)
    width = 12 * work.hidden + 4 * max(
        sum(shape) for shape in work.shapes.values()
    )  # numbers a token leaves in a block
    stages: list[dict[str, int]] = [{}]
    for spec, depth in ((recipe.blockwise, 1), (recipe.finetune, blocks), (recipe.preprocess, blocks)):
        if spec is None:
            continue
        tokens = spec.training.batch * window_length(getattr(spec, "data", None) or recipe.calibration, work.decoder)
        share = weights * depth // blocks
        end_to_end = spec is not recipe.blockwise
        stages.append(
            {
                "weights and their bits": int(4 * share * (2 + bits)) + 4 * work.outside * end_to_end,
                "latent weights, gradients and moments": 16 * share * ("latent" in spec.training.lr),
                "a batch for the backward pass": 4 * tokens * (depth * width + 4 * work.vocabulary * end_to_end),
            }
        )  # fmt: skip
    return max(stages, key=lambda parts: sum(parts.values()))


def _line(name: str, parts: dict[str, int], free: int) -> str:
    listed = ", ".join(f"{part} {format_bytes(n)}" for part, n in parts.items())
    return f"  {name:<10}{format_bytes(sum(parts.values()))} ({format_bytes(free)} free): {listed}"
