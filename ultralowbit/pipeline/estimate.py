"""What `compress` would write, need and take, before anything heavy: from headers, config.json and a second of timing.

The size is exact where formats are known before any data is seen, else what the method expects. Memory (memory.py) and
time (rates.py) are estimates for the pipeline as it is.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

import psutil
import torch

from ultralowbit.checkpoint.config import DIGEST, config_digest, vocabulary
from ultralowbit.checkpoint.merge import most_beside
from ultralowbit.checkpoint.names import expert_of, weight_name
from ultralowbit.checkpoint.size import Size
from ultralowbit.errors import InputError
from ultralowbit.format.weight import Format
from ultralowbit.format.words import TensorSpec
from ultralowbit.hub import resolve_model
from ultralowbit.methods.base import Method
from ultralowbit.methods.statistics import InputStats
from ultralowbit.nn.decoder import Decoder
from ultralowbit.pipeline.allocate import PLANES, expected_planes
from ultralowbit.pipeline.embed import planned_embeddings
from ultralowbit.pipeline.memory import Memory, saved_training, smaller_memory, stage_memory
from ultralowbit.pipeline.rates import measured_rates, random, seconds
from ultralowbit.pipeline.sharing import received_bytes, shared_seconds
from ultralowbit.pipeline.source import open_folded, planned_formats, smaller_batch
from ultralowbit.pipeline.workload import Workload
from ultralowbit.recipe import Recipe
from ultralowbit.system import available_memory, existing, pick_device
from ultralowbit.units import format_bytes, format_seconds

ACTIVATIONS = "activation files in memory"
"""Mapped pages of the activation files: the system takes them back under pressure, so they never make a run fail."""
DOING = {"preprocess": "training adapters", "blocks": "packing blocks", "finetune": "fine-tuning"}
"""What each stage does."""


@dataclass(frozen=True)
class Estimate:
    """size: what will be stored, headers left out; process: bytes that this process has already; mapped: bytes of the
    activation files while blocks are packed; stages: the peak of each stage beside these; smaller: by stage, settings
    with which it takes less, and how much it then takes; disk: part -> bytes; seconds: part -> s.
    """

    model: str
    recipe: str
    device: str
    dtype: str
    blocks: int
    size: Size
    process: int
    mapped: int
    stages: dict[str, Memory]
    smaller: dict[str, list[tuple[str, Memory]]]
    disk: dict[str, int]
    seconds: dict[str, float]
    available_memory: int
    available_device_memory: int
    available_disk: int
    notes: list[str] = field(default_factory=list)

    @property
    def memory(self) -> dict[str, int]:
        """Bytes by part of the stage that takes most, on the host."""
        stages = ({**stage.host, **self._files(name)} for name, stage in self.stages.items())
        return {"this process": self.process} | max(stages, key=lambda parts: sum(parts.values()))

    @property
    def device_memory(self) -> dict[str, int]:
        """Bytes by part of the stage that takes most, on the device; nothing on a CPU."""
        return max((stage.device for stage in self.stages.values()), key=lambda parts: sum(parts.values()))

    @property
    def peaks(self) -> dict[str, tuple[int, int]]:
        """Bytes of each stage on the host, this process included, and on the device."""
        return {
            name: (self.process + stage.total[0] + sum(self._files(name).values()), stage.total[1])
            for name, stage in self.stages.items()
        }

    def _files(self, stage: str) -> dict[str, int]:
        """The activation files, which are gone where a model is trained as a whole."""
        return {ACTIVATIONS: self.mapped} if self.mapped and stage == "blocks" else {}

    @property
    def warnings(self) -> list[str]:
        """One sentence for each thing that will not fit, with what makes it fit."""
        sentences = []
        places = ((f" on {self.device}", self.available_device_memory), ("", self.available_memory))
        for stage, needed in self.stages.items():
            for total, (place, free) in zip(reversed(needed.total), places, strict=True):
                if total > free:
                    sentences.append(
                        f"about {format_bytes(total)} of memory{place} are needed for {DOING[stage]}, "
                        f"{format_bytes(free)} are free: {self._remedy(stage, bool(place), free)}"
                    )
        total, free = sum(self.disk.values()), self.available_disk
        if total > free:
            there = f"about {format_bytes(total)} of disk are needed, {format_bytes(free)} are free"
            sentences.append(f"{there}: free some, or choose another --out")
        return sentences

    def _remedy(self, stage: str, on_device: bool, free: int) -> str:
        """What makes a stage fit into what is free on the host or on the device."""
        for settings, less in self.smaller.get(stage, ()):
            if less.total[on_device] <= free:
                left = less.total[on_device]
                return f"{settings} makes it fit ({format_bytes(left)})" if left else f"{settings} leaves it out"
        return f"no key of the recipe makes it fit: {'--device cpu' if on_device else 'close others'}"

    def to_dict(self) -> dict[str, Any]:
        """Everything in __str__, as JSON values."""
        plain = ("model", "recipe", "device", "dtype", "blocks", "memory", "device_memory", "peaks", "disk", "seconds")
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
        if len(self.stages) > 1:
            peaks = []
            for stage, (host, device) in self.peaks.items():
                beside = f" and {format_bytes(device)} on {self.device}" if device else ""
                peaks.append(f"{DOING[stage]} {format_bytes(host)}{beside}")
            lines.append(f"  peaks     {', '.join(peaks)}")
        lines.append(_line("disk", self.disk, self.available_disk))
        parts = ", ".join(f"{part} {format_seconds(s)}" for part, s in self.seconds.items())
        lines.append(f"  time      about {format_seconds(sum(self.seconds.values()))}: {parts}")
        lines += [f"  note      {note}" for note in self.notes]
        return "\n".join(lines + [f"  WARNING   {warning}" for warning in self.warnings])


def estimate(
    model: str,
    recipe: Recipe,
    device: str = "auto",
    trust_remote_code: bool = False,
    out: Path | str = ".",
    ranks: int = 1,
) -> Estimate:
    """What `compress` with the same arguments would do; takes seconds, reads no weight and writes nothing.

    ranks: the processes that would share the work; memory is that of one of them, seconds are those of the busiest,
    without what they wait for each other's bytes.
    Raises what `compress` raises for a model or recipe that it refuses.
    """
    where = pick_device(device)
    folder = resolve_model(model)
    decoder, recipe, rotation = open_folded(folder, where, recipe, trust_remote_code)
    recipe = expected_planes(decoder, recipe)
    formats = planned_formats(decoder, recipe)
    size = planned_size(decoder, {**formats, **planned_embeddings(decoder, recipe)})
    work = Workload(decoder, recipe, formats, ranks)
    notes = [] if rotation is None else list(rotation["notes"])
    notes += [] if recipe.allocate is None else ["which Linears get how many planes is decided on the text"]
    notes += [] if work.exact_groups else ["which Linears share an input is not known: one Hessian a Linear is assumed"]
    notes += [] if ranks == 1 else [_about_ranks(work)]
    notes += [] if (fewer := smaller_batch(recipe)) is None else [fewer]
    if any(_depends_on_data(method) for method in set(work.methods.values())):
        notes.append("with this recipe the size depends on data: bits and bytes are expected ones, not exact")
    if work.tokens:
        notes.append(
            f"getting and tokenising the calibration text ({recipe.calibration.named}) is not in the estimates"
        )
    return Estimate(
        model=model,
        recipe=recipe.name,
        device=str(where),
        dtype=str(decoder.dtype).removeprefix("torch."),
        blocks=len(decoder.blocks),
        size=size,
        process=psutil.Process().memory_info().rss,
        mapped=max(work.files * work.activations, work.depths),
        stages=stage_memory(work, recipe),
        smaller=smaller_memory(work, recipe),
        disk=needed_disk(work, recipe, size),
        seconds=shared_seconds(work, seconds(work, size, measured_rates(where))),
        available_memory=available_memory(),
        available_device_memory=torch.cuda.mem_get_info(where)[0] if where.type == "cuda" else 0,
        available_disk=shutil.disk_usage(existing(Path(out).expanduser())).free,
        notes=notes,
    )


def needed_disk(work: Workload, recipe: Recipe, size: Size) -> dict[str, int]:
    """Bytes by part of what lies on the disk, although not all of it at the same time."""
    decoder, ends = work.decoder, size.other["embeddings"] + size.other["head"]
    parts = {
        "packed blocks and the files they are merged into": 2 * size.total_bytes,
        "activation files": work.files * work.activations,
        "what enters every block": work.depths,
        "Fisher information of outputs": work.kept_outputs,
    }
    if recipe.preprocess is not None:
        merged = (decoder.config.dtype or torch.float32).itemsize * (work.outside + sum(work.forward.values()))
        outside = sum(decoder.specs[name].nbytes for name in decoder.names_outside_blocks())
        parts["the model quantized once"] = size.total_bytes - ends + outside
        parts["the model with its adapters merged"] = merged
    if recipe.finetune is not None:
        parts["fine-tuned blocks"] = size.total_bytes - ends
    stages = ((recipe.preprocess, 1), (recipe.blockwise, len(decoder.blocks)), (recipe.finetune, 1))
    parts["saved training"] = sum(saved_training(work, spec, n) for spec, n in stages if spec is not None)
    return {part: nbytes for part, nbytes in parts.items() if nbytes or part == "activation files"}


def bits_for_size(model: str, recipe: Recipe, nbytes: int, device: str, trust_remote_code: bool = False) -> float:
    """The bits a weight with which a recipe that allocates them writes files of at most `nbytes`, headers and an index
    included.

    Raises `InputError` where that is less than one plane for every Linear takes with all that is not packed, or more
    than as many planes as there can be.
    """
    decoder, recipe, _ = open_folded(resolve_model(model), pick_device(device), recipe, trust_remote_code)

    def planned(planes: int) -> tuple[Size, Callable[[int], int]]:
        """The size with so many planes for every Linear, and what headers take beside files of so many bytes."""
        alike = recipe.model_copy(update={"allocate": None, "quantize": replace(recipe.quantize, planes=planes)})
        formats = {**planned_formats(decoder, alike), **planned_embeddings(decoder, alike)}
        tensors, metadata = planned_tensors(decoder, formats), {DIGEST: config_digest({})}
        size = planned_size(decoder, formats)
        return size, lambda nbytes: most_beside(tensors, metadata, max(nbytes, size.total_bytes))

    def taken(size: Size, headers: Callable[[int], int]) -> int:
        """The smallest file that has room for itself: its headers grow with what they say of it."""
        nbytes = size.total_bytes
        while (more := size.total_bytes + headers(nbytes)) > nbytes:
            nbytes = more
        return nbytes

    (one, headers), (all_of_them, headers_of_all) = planned(PLANES[0]), planned(PLANES[-1])
    least, most = taken(one, headers), taken(all_of_them, headers_of_all)
    if nbytes < least:
        raise InputError(
            f"--size is {format_bytes(nbytes)}, and embeddings, head, norms and headers take "
            f"{format_bytes(least - one.linear_bytes)} of it, one plane for every Linear "
            f"{format_bytes(one.linear_bytes)}: ask for --size {least} at least"
        )
    if nbytes > most:
        raise InputError(
            f"--size is {format_bytes(nbytes)}, and {PLANES[-1]} planes for every Linear, which are the most, take "
            f"{format_bytes(most)} with all else: ask for --size {most} at most"
        )
    bits = 8 * (nbytes - headers(nbytes) - one.total_bytes + one.linear_bytes) / one.linear_weights
    return min(max(one.linear_bits_per_weight, bits), all_of_them.linear_bits_per_weight)


def planned_size(decoder: Decoder, formats: dict[str, tuple[Format, tuple[int, int]]]) -> Size:
    """What the tensors of the packed checkpoint will take."""
    tensors = planned_tensors(decoder, formats)
    untied = decoder.folding is not None and decoder.folding.untied
    named = {name: format for name, (format, _) in formats.items()}
    return Size.of(tensors, named, vocabulary(decoder.config), untied=untied)


def planned_tensors(decoder: Decoder, formats: dict[str, tuple[Format, tuple[int, int]]]) -> dict[str, TensorSpec]:
    """What the packed checkpoint will hold: the packed tensors of each Linear, all else as it is stored now."""
    packed = {weight_name(name) for name in formats}
    tensors = {name: spec for name, spec in decoder.specs.items() if name not in packed}
    stored = cache(Format.tensors)
    for name, (format, shape) in formats.items():
        tensors |= {f"{name}.{suffix}": spec for suffix, spec in stored(format, *shape).items()}
    in_the_place_of_all = {weight_name(name) for name in formats if expert_of(name)}
    return tensors | dict.fromkeys(in_the_place_of_all, TensorSpec(torch.uint8, (0,)))


def _depends_on_data(method: Method) -> bool:
    """Whether packed weights need other room than the method announced, tried on a random one."""
    n, m = 16, 256
    stats = InputStats(m, needs=method.needs)
    stats.add(random(2 * m, m, torch.device("cpu")))
    packed = method.quantize(random(n, m, torch.device("cpu")), stats)
    return packed.format.tensors(n, m) != method.format(m).tensors(n, m)


def _about_ranks(work: Workload) -> str:
    """What is to be known of several processes."""
    sums = f", in which it receives {format_bytes(received_bytes(work))} of sums" if work.hessians else ""
    return f"memory and time are those of one of {work.ranks} processes{sums}"


def _line(name: str, parts: dict[str, int], free: int) -> str:
    listed = ", ".join(f"{part} {format_bytes(n)}" for part, n in parts.items())
    return f"  {name:<10}{format_bytes(sum(parts.values()))} ({format_bytes(free)} free): {listed}"
