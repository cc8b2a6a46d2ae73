"""What `compress` would write, need and take, before anything heavy: from headers, config.json and a second of timing.

The size is exact where formats are known before any data is seen, else what the method expects. Memory and time are
estimates for the pipeline as it is: `_memory` and `_seconds` follow pipeline.py, stats.py and methods/base.py.
"""

from __future__ import annotations

import hashlib
import math
import shutil
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor, nn

from ultralowbit.eval.size import Size
from ultralowbit.format import Format
from ultralowbit.hub import resolve_model
from ultralowbit.linear import linear_shape
from ultralowbit.methods import Method, Need
from ultralowbit.model import Decoder
from ultralowbit.pipeline import BATCH_TOKENS, open_decoder, packed_formats, pick_device, window_length
from ultralowbit.recipe import Recipe
from ultralowbit.stats import InputStats

ACTIVATIONS = "activation files in memory"
"""Mapped pages of the activation files: the system takes them back under pressure, so they never make a run fail."""


@dataclass(frozen=True)
class Plan:
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
        found = []
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
                found.append(f"about {_bytes(need)} of {what} are needed, {_bytes(there)} are free: {remedy}")
        return found

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
        parts = ", ".join(f"{part} {_time(s)}" for part, s in self.seconds.items())
        lines.append(f"  time      about {_time(sum(self.seconds.values()))}: {parts}")
        lines += [f"  note      {note}" for note in self.notes]
        return "\n".join(lines + [f"  WARNING   {warning}" for warning in self.warnings])


def plan(
    model: str, recipe: Recipe, device: str = "auto", trust_remote_code: bool = False, out: Path | str = "."
) -> Plan:
    """What `compress` with the same arguments would do; takes seconds, reads no weight and writes nothing.

    Raises what `compress` raises for a model or recipe that it refuses.
    """
    where = pick_device(device)
    folder = resolve_model(model)
    decoder = open_decoder(folder, where, trust_remote_code)
    formats = packed_formats(decoder, recipe)
    size = _size(decoder, formats)
    work = _Work(decoder, recipe, formats)
    notes = [] if work.exact_groups else ["which Linears share an input is not known: one Hessian a Linear is assumed"]
    if any(_depends_on_data(method) for method in set(work.methods.values())):
        notes.append("with this recipe the size depends on data: bits and bytes are expected ones, not exact")
    if work.tokens:
        notes.append(
            f"getting and tokenising the calibration text ({recipe.calibration.source}) is not in the estimates"
        )
    memory, device_memory = _memory(work)
    return Plan(
        model=model,
        recipe=recipe.name,
        device=str(where),
        dtype=str(decoder.dtype).removeprefix("torch."),
        blocks=len(decoder.blocks),
        size=size,
        memory=memory,
        device_memory=device_memory,
        disk={"packed checkpoint": size.total_bytes, "activation files": work.files * work.activations},
        seconds=_seconds(work, size),
        available_memory=available_memory(),
        available_device_memory=torch.cuda.mem_get_info(where)[0] if where.type == "cuda" else 0,
        available_disk=shutil.disk_usage(_existing(Path(out).expanduser())).free,
        notes=notes,
    )


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


class _Work:
    """How much the pipeline has to do for a model and a recipe."""

    def __init__(self, decoder: Decoder, recipe: Recipe, formats: dict[str, tuple[Format, tuple[int, int]]]) -> None:
        self.decoder = decoder
        self.shapes = {name: shape for name, (_, shape) in formats.items()}
        self.methods = {name: recipe.method_for(name) for name in formats}
        self.solved = [name for name in formats if Need.HESSIAN in self.methods[name].needs]
        self.length = window_length(recipe.calibration, decoder)
        self.recipe, self.formats = recipe, [format for format, _ in formats.values()]
        outside = [decoder.source.specs[decoder.key_of[name]] for name in decoder.names_outside_blocks()]
        self.outside = sum(math.prod(spec.shape) for spec in outside)
        self.vocabulary = decoder.config.get_text_config().vocab_size
        measured = recipe.tune is not None or any(method.needs for method in self.methods.values())
        self.tokens = recipe.calibration.samples * self.length if measured else 0
        self.batch = min(self.tokens, max(BATCH_TOKENS, self.length))  # tokens that run at a time, at most
        clip = recipe.calibration.clip_tokens
        self.outliers = 0 if clip is None else int(self.tokens * (1 - clip)) + 1  # tokens held back by each Hessian
        self.hidden = decoder.config.get_text_config().hidden_size
        self.activations = self.tokens * self.hidden * decoder.dtype.itemsize  # bytes of one activation file
        self.files = 2 if recipe.tune is None else 5  # two for the packed model, two for the original, the targets
        leaders = shared_inputs(decoder) if self.solved else {}
        self.exact_groups = leaders is not None
        leader_of = {name: (leaders or {}).get(name, name) for name in self.solved}
        self.hessians = [  # of each block, `in` of each input group
            [self.shapes[name][1] for name in {leader_of[n]: n for n in linears if n in leader_of}.values()]
            for linears in (decoder.linears(i) for i in range(len(decoder.blocks)))
        ]
        # of all blocks, skipped Linears too: those run as well
        self.forward = [
            math.prod(linear_shape(m)) for i in range(len(decoder.blocks)) for m in decoder.linears(i).values()
        ]


def _depends_on_data(method: Method) -> bool:
    """Whether packed weights need other room than the method announced, tried on a random one."""
    n, m = 16, 256
    stats = InputStats(m, needs=method.needs)
    stats.add(_random(2 * m, m, torch.device("cpu")))
    packed = method.quantize(_random(n, m, torch.device("cpu")), stats)
    return packed.format.tensors(n, m) != method.format(m).tensors(n, m)


def shared_inputs(decoder: Decoder) -> dict[str, str] | None:
    """Linear -> the first one that is given the same input tensor, found by a forward pass on meta; None for a model
    whose forward needs values."""
    leaders: dict[int, str] = {}
    found: dict[str, str] = {}
    kept: list[Tensor] = []  # so that no id is used twice

    def hook(name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def before(module: nn.Module, args: tuple[Any, ...]) -> None:
            kept.append(args[0])
            found.setdefault(name, leaders.setdefault(id(args[0]), name))

        return before

    linears = {name: module for i in range(len(decoder.blocks)) for name, module in decoder.linears(i).items()}
    handles = [module.register_forward_pre_hook(hook(name)) for name, module in linears.items()]
    ids = torch.zeros(1, 8, dtype=torch.int64, device="meta")
    try:
        # most models read their mask's values unless it comes ready made
        for mask in (torch.zeros(1, 1, 8, 8, device="meta"), None):
            with suppress(Exception), torch.no_grad():
                decoder.model.base_model(input_ids=ids, attention_mask=mask, use_cache=False)
                return found
            leaders.clear()
            found.clear()
    finally:
        for handle in handles:
            handle.remove()
    return None


def _memory(work: _Work) -> tuple[dict[str, int], dict[str, int]]:
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
    factorise = 5 * 4 * widest**2  # beside the sum: the fp64 matrix, its flipped copy or factor, a product of halves
    solve = (12 if compute == 4 else 16) * max(n * m for n, m in work.shapes.values())  # fp32 copies of one weight
    forward = work.batch * compute * (8 * work.hidden + 3 * max(max(shape) for shape in work.shapes.values()))
    gather = 4 * widest**2 + 8 * (work.outliers + work.batch) * widest * (work.outliers > 0)  # last group's; clipping
    process = {"this process": psutil.Process().memory_info().rss}
    mapped = {ACTIVATIONS: work.files * work.activations} if work.tokens else {}
    blockwise = {"block as stored": stored}
    on_device = {
        "block": computed,
        "Hessian and its factor": hessians,
        "working memory": forward + max(factorise, solve, gather),  # allocators keep the small pieces of a forward
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


def _training_memory(work: _Work) -> dict[str, int]:
    """Peak bytes of the stage that trains most, all in fp32: weights beside their bits, of latent weights the gradient
    and two moments too, and what a batch leaves for the backward pass."""
    recipe, blocks = work.recipe, len(work.decoder.blocks)
    weights = sum(math.prod(shape) for shape in work.shapes.values())
    bits = max(format.claimed_bits for format in work.formats)
    width = 12 * work.hidden + 4 * max(
        sum(shape) for shape in work.shapes.values()
    )  # numbers a token leaves in a block
    found: list[dict[str, int]] = [{}]
    for spec, depth in ((recipe.tune, 1), (recipe.distill, blocks), (recipe.prepare, blocks)):
        if spec is None:
            continue
        tokens = spec.training.batch * window_length(getattr(spec, "data", None) or recipe.calibration, work.decoder)
        share = weights * depth // blocks
        end_to_end = spec is not recipe.tune
        found.append({
            "weights and their bits": int(4 * share * (2 + bits)) + 4 * work.outside * end_to_end,
            "latent weights, gradients and moments": 16 * share * ("latent" in spec.training.lr),
            "a batch for the backward pass": 4 * tokens * (depth * width + 4 * work.vocabulary * end_to_end),
        })  # fmt: skip
    return max(found, key=lambda parts: sum(parts.values()))


def _seconds(work: _Work, size: Size) -> dict[str, float]:
    """Estimated seconds by part, from rates measured here and now."""
    device = work.decoder.device
    folder = work.decoder.source.folder
    hashed = size.total_bytes + sum((folder / file).stat().st_size for file in work.decoder.source.files)
    chunk = bytes(1 << 22)
    columns = {}  # method -> seconds a column, seconds a weight
    for method in set(work.methods.values()):
        columns[method] = _column_seconds(method, device)
    rounding = sum(
        m * per_column + n * m * per_weight
        for name, (n, m) in work.shapes.items()
        for per_column, per_weight in [columns[work.methods[name]]]
    )
    parts = {
        "hashing": hashed / len(chunk) * _timed(lambda: hashlib.sha256(chunk), device),
        "rounding": rounding,
    }
    if not (work.tokens or work.recipe.distill or work.recipe.prepare):
        return parts
    attention = len(work.decoder.blocks) * work.length * work.hidden
    single, own = _product_rate(torch.float32, device), _product_rate(work.decoder.dtype, device)
    token = 2 * sum(work.forward) + 4 * attention  # flops of its forward pass
    parts = {"forward passes": 2 * work.tokens * token / own} | parts | _training_seconds(work, token / own)
    if not work.solved:
        return parts
    widths = [m for block in work.hessians for m in block]
    products = sum(n * m**2 for n, m in (work.shapes[name] for name in work.solved))
    return parts | {
        "Hessians": 2 * work.tokens * sum(m**2 for m in widths) / single,
        "factors": sum(m**3 for m in widths) * _factor_seconds(device),
        "updates": products / single,
        "output errors": 4 * products / single,
    }


def _training_seconds(work: _Work, token: float) -> dict[str, float]:
    """Of the stages that train, from the seconds of a token's forward pass; a backward pass takes two of them."""
    recipe, parts = work.recipe, {}
    for stage, spec in (("tuning", recipe.tune), ("distilling", recipe.distill), ("preparing", recipe.prepare)):
        if spec is None:
            continue
        source = getattr(spec, "data", None) or recipe.calibration
        trained = len(spec.split(range(source.samples))[0])
        training = spec.training
        windows = training.total_steps(trained) * training.batch * training.accumulation
        judged = (training.evaluations + 1) * (source.samples - trained)
        taught = windows + judged if stage == "distilling" and spec.objective.needs_teacher else 0
        parts[stage] = token * window_length(source, work.decoder) * (3 * windows + judged + taught)
    if recipe.prepare is not None:
        parts["preparing"] += parts.get("tuning", 0.0) + 2 * work.tokens * token  # the model is quantized twice
    return parts


def _timed(f: Callable[[], object], device: torch.device) -> float:
    """Seconds of the fastest of two calls, or of more while they take less than a twentieth of a second in all."""
    times: list[float] = []
    while len(times) < 2 or (sum(times) < 0.05 and len(times) < 10):
        started = time.perf_counter()
        f()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - started)
    return min(times)


def _random(rows: int, columns: int, device: torch.device) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(0)).to(device)


def _product_rate(dtype: torch.dtype, device: torch.device) -> float:
    """flops a second of a matrix product."""
    n = 1024 if device.type == "cpu" else 8192
    x = _random(n, n, device).to(dtype)
    return 2 * n**3 / _timed(lambda: x @ x, device)


def _factor_seconds(device: torch.device) -> float:
    """Seconds of one factorisation of an m x m Hessian, over m^3."""
    m = 1024 if device.type == "cpu" else 4096
    stats = InputStats(m, device=device)
    stats.add(_random(m, m, device))
    damps = iter(range(1, 100))  # another damping each time: factors are kept
    return _timed(lambda: stats.factor(float(next(damps))), device) / m**3


def _column_seconds(method: Method, device: torch.device) -> tuple[float, float]:
    """Seconds a column and seconds a weight that a method takes beside the large products, decoding included."""
    m, few, many = 128, 32, 2048
    stats = InputStats(m, device=device, needs=method.needs)
    stats.add(_random(2 * m, m, device))

    def run(n: int) -> float:
        weight = _random(n, m, device)
        return _timed(lambda: (packed := method.quantize(weight, stats)).dequantize() + packed.dequantize(), device)

    low, high = run(few), run(many)
    per_weight = max(0.0, high - low) / ((many - few) * m)
    return max(0.0, low - few * m * per_weight) / m, per_weight


def available_memory() -> int:
    """Bytes that this process can still take: of the machine, or of the container where that has less."""
    free = psutil.virtual_memory().available
    with suppress(OSError, ValueError):
        group = Path("/sys/fs/cgroup")
        free = min(free, int((group / "memory.max").read_text()) - int((group / "memory.current").read_text()))
    return max(0, free)


def _existing(path: Path) -> Path:
    """The folder on whose disk `path` will be."""
    path = path.absolute()
    return next(p for p in (path, *path.parents) if p.exists())


def _bytes(n: float) -> str:
    return f"{n / 1e9:.2f} GB" if n >= 1e8 else f"{n / 1e6:.2f} MB"


def _time(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def _line(name: str, parts: dict[str, int], free: int) -> str:
    listed = ", ".join(f"{part} {_bytes(n)}" for part, n in parts.items())
    return f"  {name:<10}{_bytes(sum(parts.values()))} ({_bytes(free)} free): {listed}"
