"""How long the parts of a compression take, from the rates of a machine."""

from __future__ import annotations

import hashlib
import math
import os
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from functools import cache, partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn import Parameter

from ultralowbit.checkpoint.size import Size
from ultralowbit.errors import InputError
from ultralowbit.format.weight import PackedWeight
from ultralowbit.methods.base import Method
from ultralowbit.methods.output_feedback import ROWS
from ultralowbit.methods.rotation import rotated_weight
from ultralowbit.methods.statistics import InputStats
from ultralowbit.pipeline.embed import HEAD_TOKENS, planned_embeddings
from ultralowbit.pipeline.embed import ROWS as AT_A_TIME
from ultralowbit.pipeline.source import window_length
from ultralowbit.pipeline.workload import Workload
from ultralowbit.system import multiplies_bf16
from ultralowbit.training.fake_quant.linear import FakeQuantLinear
from ultralowbit.training.loop import adamw
from ultralowbit.training.objectives import divergence
from ultralowbit.training.specs import EndToEnd, FakeQuantized


class Rates(NamedTuple):
    """How fast a machine is. single, half: flops a second of products in fp32 and in 16 bits; factor: seconds
    of a factorisation of an m x m Hessian, over m^3; hashing: bytes a second; rounding: of a method, seconds a column
    and seconds a weight that it takes beside the large products; training: of a stage, a dtype of latent weights and a
    packed weight, seconds a weight that it takes to make a weight of what is trained, and those of a step, with the
    gradients and AdamW; logits: of a vocabulary, with a teacher or without, seconds a logit of the objective, and those
    with its gradient."""

    single: float
    half: float
    factor: float
    hashing: float
    rounding: Callable[[Method], tuple[float, float]]
    training: Callable[[FakeQuantized, torch.dtype, PackedWeight], tuple[float, float]] = lambda *_: (0.0, 0.0)
    logits: Callable[[int, bool], tuple[float, float]] = lambda *_: (0.0, 0.0)

    def products(self, half: bool) -> float:
        return self.half if half else self.single


def measured_rates(device: torch.device) -> Rates:
    """The rates here and now of a device."""
    chunk, single = bytes(1 << 22), _product_rate(torch.float32, device)
    half = _product_rate(torch.bfloat16, device) if multiplies_bf16(device) else single
    return Rates(
        single, half, _factor_seconds(device),
        len(chunk) / _timed(lambda: hashlib.sha256(chunk), device), cache(partial(_column_seconds, device=device)),
        partial(_step_seconds, device=device), partial(_logit_seconds, device=device),
    )  # fmt: skip


def seconds(work: Workload, size: Size, rates: Rates) -> dict[str, float]:
    """Estimated seconds of one process, by part."""
    folder, files = work.decoder.source.folder, work.decoder.source.files
    # files are hashed at the same time, by a core each
    together = min(len(files), os.cpu_count() or 1)
    hashed = size.total_bytes + sum((folder / file).stat().st_size for file in files) / together
    single, own, summed = rates.single, rates.products(work.runs_in_half), rates.products(work.sums_in_half)
    alike = Counter((work.methods[name], shape) for name, shape in work.shapes.items())
    feedback = work.recipe.output_feedback

    def rounding(rows_together: bool) -> float:
        """Seconds; where rows make up for each other's errors, those of each part go through the columns on their
        own."""
        return sum(
            count * (m * per_column * (-(-n // ROWS) * feedback.parts if rows_together else 1) + n * m * per_weight)
            for (method, (n, m)), count in alike.items()
            for per_column, per_weight in [rates.rounding(method)]
        )

    parts = {"hashing": hashed / rates.hashing, "rounding": rounding(feedback is not None)}
    parts |= _embedding_seconds(work, rates)
    if not (work.tokens or work.recipe.finetune or work.recipe.preprocess):
        return parts
    attention = len(work.decoder.blocks) * work.length * work.hidden
    # flops of its forward pass
    token = 2 * sum(n * work.reached(name) for name, n in work.forward.items()) + 4 * attention
    # up to each input, and the whole; with correction in two models
    passes = 5 if work.paired else 2
    parts = (
        {"forward passes": work.tokens * (passes * token + 2 * work.again) / own}
        | parts
        | _training_seconds(work, token, rates)
    )
    if not work.with_hessian:
        return parts
    sums = sum(share * m**2 for m, share in work.hessians)
    products = sum(n * m**2 for n, m in (work.shapes[name] for name in work.with_hessian))
    factors, updates = sum(m**3 for m, _ in work.hessians) * rates.factor, products / single
    if work.backwards:
        # forwards, forwards and backwards; the head and its gradient
        measuring = work.backwards * (4 * token + 6 * work.hidden * work.vocabulary) / own
        shapes = [work.shapes[name] for name in work.with_hessian]
        measuring += 2 * work.heard * sum(n * min(n, ROWS) for n, _ in shapes) / summed
        # every Linear packed once more, against what enters it on all windows; what it loses is multiplied on some
        packing = work.backwards * (token / own + 2 * sums / summed) + rounding(False) + factors + updates
        packing += 2 * work.costed * sum(n * m for n, m in shapes) / single
        parts["what matters"] = measuring + packing * (work.costed > 0)
    if work.heard:  # H_O is factorised to see what it gains and to use it, and rows are multiplied with those before
        together = [(min(n, ROWS), m, -(-n // ROWS)) for n, m in (work.shapes[name] for name in work.with_hessian)]
        updates += sum(k * (2 * r**3 * rates.factor + r**2 * m / single) for r, m, k in together)
    return parts | {
        "Hessians": (4 if work.paired else 2) * work.tokens * sums / summed,  # with those of both models together
        "factors": factors,
        "updates": updates,
        "output errors": 4 * products / single,
    }


def _embedding_seconds(work: Workload, rates: Rates) -> dict[str, float]:
    """Of packing the embedding and the head, rows by rows, and of running the blocks once for what the head reads."""
    planned = planned_embeddings(work.decoder, work.recipe)
    if not planned:
        return {}
    quantizer = work.recipe.embeddings.quantizer
    per_column, per_weight = rates.rounding(quantizer)
    total = sum(n * m * per_weight + -(-n // AT_A_TIME) * m * per_column for _, (n, m) in planned.values())
    if quantizer.needs:
        total += 2 * min(work.tokens, HEAD_TOKENS) * sum(work.forward.values()) / rates.products(work.runs_in_half)
    return {"embeddings": total}


def _training_seconds(work: Workload, flops: float, rates: Rates) -> dict[str, float]:
    """Of the stages that train, from the flops of a token's forward pass through the blocks; a backward pass takes two
    of them, and one more where blocks run again for it."""
    recipe, parts, weights = work.recipe, {}, sum(map(math.prod, work.shapes.values()))
    for stage, spec in (
        ("blockwise", recipe.blockwise),
        ("finetune", recipe.finetune),
        ("preprocess", recipe.preprocess),
    ):
        if spec is None:
            continue
        source, training = getattr(spec, "data", None) or recipe.calibration, spec.training
        trained = len(spec.split(range(source.samples))[0])
        passes = training.total_steps(trained) * training.accumulation
        windows, judged = passes * training.batch, (training.evaluations + 1) * (source.samples - trained)
        has_teacher = stage == "finetune" and spec.objective.needs_teacher
        taught = (windows + judged) * has_teacher
        length, products = window_length(source, work.decoder), rates.products(work.autocasts(spec))
        again = isinstance(spec, EndToEnd) and spec.is_checkpointed(weights)
        parts[stage] = length * flops * ((3 + again) * windows + judged + taught) / products
        if isinstance(spec, EndToEnd):  # the head is not trained
            head, (forward, both) = 2 * work.hidden * work.vocabulary, rates.logits(work.vocabulary, has_teacher)
            parts[stage] += length * head * (2 * windows + judged + taught) / products
            parts[stage] += length * work.vocabulary * (both * windows + forward * judged)
        if isinstance(spec, FakeQuantized):
            whole = stage == "finetune"
            judged = judged if whole else judged / training.batch  # at a time
            dtype = spec.latent_dtype(weights if whole else weights // len(work.decoder.blocks))
            for packed, count in _kinds(work):
                forward, both = rates.training(spec, dtype, packed)
                parts[stage] += count * (both * passes + forward * judged)
    if recipe.preprocess is not None:
        again = 2 * work.tokens * flops / rates.products(work.runs_in_half)  # the model is quantized twice
        parts["preprocess"] += parts.get("blockwise", 0.0) + again
    return parts


def _kinds(work: Workload) -> Iterator[tuple[PackedWeight, int]]:
    """A packed weight for each method of a recipe, of random numbers, and how many weights of the model it packs."""
    weights: Counter[Method] = Counter()
    for name, shape in work.shapes.items():
        weights[work.methods[name]] += math.prod(shape)
    size = 1024  # larger than caches with all that is made of it
    block = None if work.recipe.rotate is None else work.recipe.rotate.block(size)
    for method, count in weights.items():
        packed = method.quantize(random(size, size, torch.device("cpu")), None)
        yield rotated_weight(packed, block) if block else packed, count


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


def random(rows: int, columns: int, device: torch.device) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(0), dtype=torch.float32).to(device)


def _product_rate(dtype: torch.dtype, device: torch.device) -> float:
    """flops a second of a matrix product."""
    n = 1024 if device.type == "cpu" else 8192
    x = random(n, n, device).to(dtype)
    return 2 * n**3 / _timed(lambda: x @ x, device)


def _factor_seconds(device: torch.device) -> float:
    """Seconds of one factorisation of an m x m Hessian, over m^3."""
    m = 1024 if device.type == "cpu" else 4096
    stats = InputStats(m, device=device)
    stats.add(random(m, m, device))
    damps = iter(range(1, 100))  # another damping each time: factors are kept
    return _timed(lambda: stats.factor(float(next(damps))), device) / m**3


def _column_seconds(method: Method, device: torch.device) -> tuple[float, float]:
    """Seconds a column and seconds a weight that a method takes beside the large products, decoding included."""
    m, few, many = 128, 32, 2048
    stats = InputStats(m, device=device, needs=method.needs)
    stats.add(random(2 * m, m, device))

    def run(n: int) -> float:
        weight = random(n, m, device)
        return _timed(lambda: (packed := method.quantize(weight, stats)).dequantize() + packed.dequantize(), device)

    low, high = run(few), run(many)
    per_weight = max(0.0, high - low) / ((many - few) * m)
    return max(0.0, low - few * m * per_weight) / m, per_weight


def _step_seconds(
    spec: FakeQuantized, dtype: torch.dtype, packed: PackedWeight, device: torch.device
) -> tuple[float, float]:
    """Seconds a weight that it takes to make a weight of what is trained, and those with its gradients and AdamW."""
    there = PackedWeight(packed.format, packed.shape, {name: t.to(device) for name, t in packed.tensors.items()})
    latent = random(*packed.shape, device)
    try:
        linear = FakeQuantLinear(
            there, spec.of_packed, latent=latent, estimator=spec.estimator, scales=spec.scales, dtype=dtype
        )
    except InputError:  # it has nothing of what is trained, and stays packed
        return 0.0, 0.0
    by_dtype: dict[torch.dtype, list[Parameter]] = defaultdict(list)
    for p in linear.parameters():
        by_dtype[p.dtype].append(p)
    optimizers = [adamw(dtype, [{"params": ps}], spec.training) for dtype, ps in by_dtype.items()]

    def step() -> None:
        linear.zero_grad()
        linear.dense().backward(latent)
        for optimizer in optimizers:
            optimizer.step()

    with torch.no_grad():
        forward = _timed(linear.dense, device)
    return forward / latent.numel(), _timed(step, device) / latent.numel()


def _logit_seconds(vocabulary: int, has_teacher: bool, device: torch.device) -> tuple[float, float]:
    """Seconds a logit of the objective of a model as a whole, and those with its gradient."""
    student, teacher = random(64, vocabulary, device).requires_grad_(), random(64, vocabulary, device)
    tokens = torch.zeros(64, dtype=torch.long, device=device)

    def loss() -> Tensor:
        return divergence(student, teacher).mean() if has_teacher else F.cross_entropy(student, tokens)

    with torch.no_grad():
        forward = _timed(loss, device)
    return forward / student.numel(), _timed(lambda: loss().backward(), device) / student.numel()
