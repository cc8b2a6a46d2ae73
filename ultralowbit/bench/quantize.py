"""Seconds in which methods pack one block, as a multiple of GPTQ's."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from ultralowbit.bench.models import Shape
from ultralowbit.bench.timing import best_of
from ultralowbit.methods.statistics import InputStats, Need
from ultralowbit.recipe import Recipe

QUANTIZED = (
    "gptq-2bit", "sign-1", "sign-1-refined", "sign-2", "sign-2-refined", "ptq161-gptq", "pb-llm", "billm", "arb-rc",
    "db-llm",
)  # fmt: skip
"""Recipes whose `quantize` stage is timed; the first is what the others are compared with."""
TOKENS = 2048
"""Of which the statistics are timed: a batch of a calibration."""


def quantize_bench(
    recipes: Sequence[str] = QUANTIZED,
    shape: Shape | None = None,
    repeat: int = 2,
    json_file: Path | None = None,
    say: Callable[[str], object] = print,
) -> list[dict[str, Any]]:
    """Time how long the method of each recipe takes to pack the Linears of one block.

    Statistics are given, factors are included. The methods take turns, `repeat` times; the fastest turn counts, by the
    thread's own clock where there is one. Returns a row for each recipe: its seconds, and their ratio to the first's.
    What the statistics of `TOKENS` tokens take is said beside them, with products in fp32 and in bfloat16.
    """
    shape = shape or Shape()
    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    generator = torch.Generator().manual_seed(0)
    weights = {
        name: torch.randn(size, generator=generator, dtype=torch.float32) / size[1] ** 0.5
        for name, size in shape.linears.items()
    }
    inputs = {}  # Linears that see the same, by their first: a Hessian for each
    for leader, names in (("q", "qkv"), ("o", "o"), ("gate", ("gate", "up")), ("down", ("down",))):
        members = [name for name in weights if name.split(".")[1].removesuffix("_proj") in names]
        m = weights[members[0]].shape[1]
        inputs[leader] = InputStats(m, needs=Need.HESSIAN | Need.MAGNITUDES), members
        inputs[leader][0].add(
            torch.randn(2 * m, m, generator=generator, dtype=torch.float32)
            * torch.rand(m, generator=generator, dtype=torch.float32)
        )
    methods = {name: Recipe.load(name).quantize for name in recipes}
    seconds = dict.fromkeys(methods, math.inf)
    for _ in range(repeat):
        for name, method in methods.items():
            started = clock()
            for stats, members in inputs.values():
                stats.forget_factors()
                for member in members:
                    method.quantize(weights[member], stats if method.needs else None)
            seconds[name] = min(seconds[name], clock() - started)
    base = seconds[recipes[0]]
    rows = [{"recipe": name, "seconds": s, "ratio": s / base} for name, s in seconds.items()]
    say(f"Linears of one block of {shape}, {torch.get_num_threads()} threads")
    for row in rows:
        say(f"{row['recipe']:>14}: {row['seconds']:6.2f} s, {row['ratio']:.2f} times {recipes[0]}")
    statistics = _statistics_seconds([stats.features for stats, _ in inputs.values()], repeat)
    fp32, half = statistics.values()
    say(f"statistics of {TOKENS:,} tokens: {fp32:.3f} s, in bfloat16 {half:.3f} s, {fp32 / half:.1f} times as fast")
    if json_file is not None:
        written = {"shape": asdict(shape), "rows": rows, "statistics": {"tokens": TOKENS} | statistics}
        Path(json_file).write_text(json.dumps(written, indent=1) + "\n")
    return rows


def _statistics_seconds(widths: Sequence[int], repeat: int) -> dict[str, float]:
    """Seconds of the Hessians of inputs of these widths, by the dtype of their products."""
    inputs = [torch.randn(TOKENS, m, generator=torch.Generator().manual_seed(m), dtype=torch.float32) for m in widths]

    def add(half: bool) -> None:
        for x in inputs:
            InputStats(x.shape[1], half=half).add(x)

    return {dtype: best_of(lambda half=dtype == "bfloat16": add(half), repeat) for dtype in ("float32", "bfloat16")}
