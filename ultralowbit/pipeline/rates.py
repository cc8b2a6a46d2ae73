"""How long the parts of a compression take, from rates measured here and now."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable

import torch
from torch import Tensor

from ultralowbit.checkpoint.size import Size
from ultralowbit.methods.base import Method
from ultralowbit.methods.output_feedback import ROWS
from ultralowbit.methods.statistics import InputStats
from ultralowbit.pipeline.source import window_length
from ultralowbit.pipeline.workload import Workload


def seconds(work: Workload, size: Size) -> dict[str, float]:
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
    if not (work.tokens or work.recipe.finetune or work.recipe.preprocess):
        return parts
    attention = len(work.decoder.blocks) * work.length * work.hidden
    single, own = _product_rate(torch.float32, device), _product_rate(work.decoder.dtype, device)
    token = 2 * sum(work.forward) + 4 * attention  # flops of its forward pass
    # up to each input, and the whole; with correction in two models
    passes = 5 if work.paired else 2
    parts = {"forward passes": passes * work.tokens * token / own} | parts | _training_seconds(work, token / own)
    if not work.with_hessian:
        return parts
    widths = [m for block in work.hessians for m in block]
    products = sum(n * m**2 for n, m in (work.shapes[name] for name in work.with_hessian))
    factors, updates = sum(m**3 for m in widths) * _factor_seconds(device), products / single
    if work.backwards:
        # forwards, forwards and backwards; the head and its gradient
        measuring = work.backwards * (4 * token + 6 * work.hidden * work.vocabulary) / own
        heights = [n for n, _ in (work.shapes[name] for name in work.with_hessian)]
        measuring += 2 * work.heard * sum(n * min(n, ROWS) for n in heights) / single
        # every Linear packed once more
        packing = 2 * work.costed * sum(m**2 for m in widths) / single + rounding + factors + updates
        parts["what matters"] = measuring + packing * (work.costed > 0)
    return parts | {
        "Hessians": 2 * work.tokens * sum(m**2 for m in widths) / single,
        "factors": factors,
        "updates": updates,
        "output errors": 4 * products / single,
    }


def _training_seconds(work: Workload, token: float) -> dict[str, float]:
    """Of the stages that train, from the seconds of a token's forward pass; a backward pass takes two of them."""
    recipe, parts = work.recipe, {}
    for stage, spec in (
        ("blockwise", recipe.blockwise),
        ("finetune", recipe.finetune),
        ("preprocess", recipe.preprocess),
    ):
        if spec is None:
            continue
        source = getattr(spec, "data", None) or recipe.calibration
        trained = len(spec.split(range(source.samples))[0])
        training = spec.training
        windows = training.total_steps(trained) * training.batch * training.accumulation
        judged = (training.evaluations + 1) * (source.samples - trained)
        taught = windows + judged if stage == "finetune" and spec.objective.needs_teacher else 0
        parts[stage] = token * window_length(source, work.decoder) * (3 * windows + judged + taught)
    if recipe.preprocess is not None:
        parts["preprocess"] += parts.get("blockwise", 0.0) + 2 * work.tokens * token  # the model is quantized twice
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
