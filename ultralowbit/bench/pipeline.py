"""The cost of compressing, beside the work that cannot be avoided."""

from __future__ import annotations

import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ultralowbit.bench.models import Shape, write_model, write_text
from ultralowbit.bench.timing import best_of, sum_over
from ultralowbit.format.ints import Ints
from ultralowbit.format.planes import Planes
from ultralowbit.format.weight import Format, PackedWeight
from ultralowbit.format.words import group_count
from ultralowbit.methods.statistics import invert_upper
from ultralowbit.pipeline.compress import compress
from ultralowbit.pipeline.estimate import estimate
from ultralowbit.pipeline.ranks import Ranks
from ultralowbit.pipeline.source import batched
from ultralowbit.progress import Silent
from ultralowbit.recipe import Recipe
from ultralowbit.system import forget_peak_memory, peak_memory
from ultralowbit.units import format_bytes


def pipeline_bench(
    layers: Sequence[int] = (4, 22),
    samples: int = 16,
    length: int = 512,
    recipe: str = "gptq-2bit",
    ranks: Sequence[int] = (1,),
    out: Path | str | None = None,
    json_file: Path | str | None = None,
    shape: Shape | None = None,
    say: Callable[[str], object] = print,
) -> dict[str, Any]:
    """Compress random models of a few depths, each in fresh processes, and set cost against unavoidable work.

    ranks: numbers of processes that share a compression; all have as many threads as there are for the most of them.
    `out` is the folder for models and outputs, a temporary one unless given. Returns, and writes to `json_file`, what
    `say` is told: bytes, seconds, GB/s.
    """
    shape = shape or Shape()
    threads = max(1, torch.get_num_threads() // max(ranks))
    result: dict[str, Any] = {
        "shape": asdict(shape), "recipe": recipe, "samples": samples, "length": length, "torch": torch.__version__,
        "machine": platform.machine(), "threads": threads, "runs": {},
    }  # fmt: skip
    say(f"{recipe}, {samples} x {length} tokens, threads of a process: {threads}, Llama of {shape}")
    with tempfile.TemporaryDirectory() if out is None else nullcontext(out) as folder:
        for depth in layers:
            runs = _fresh_runs(Path(folder), depth, samples, length, recipe, shape, ranks, threads)
            result["runs"][depth] = runs
            for n, run in runs.items():
                _say_run(run, depth, n, say)
                if n != ranks[0]:
                    _say_shared(run, n, runs[ranks[0]], ranks[0], say)
    first = [runs[ranks[0]] for runs in result["runs"].values()]
    peaks = [run["peak_bytes"] for run in first]
    medians = [statistics.median(run["block_seconds"]) for run in first]
    say(
        f"between depths, peak memory differs by {format_bytes(max(peaks) - min(peaks))}, the seconds of a block by "
        f"{max(medians) / min(medians) - 1:.0%}"
    )
    result["packing"] = packing_bench()
    say("one thread, GB of fp32 weights a second:")
    for row in result["packing"]:
        say(f"{row['what']:>24}: pack {row['pack']:5.2f}, unpack {row['unpack']:5.2f}")
    if json_file is not None:
        Path(json_file).write_text(json.dumps(result, indent=1) + "\n")
    return result


def _say_run(run: dict[str, Any], depth: int, ranks: int, say: Callable[[str], object]) -> None:
    blocks = sorted(run["block_seconds"])
    processes = f", {ranks} processes" if ranks > 1 else ""
    say(
        f"{depth:>3} layers{processes}: peak memory {format_bytes(run['peak_bytes'])}, {run['seconds']:.1f} s; a block "
        f"{statistics.median(blocks):.2f} s ({blocks[0]:.2f} to {blocks[-1]:.2f}), of which methods "
        f"take {run['quantizing_seconds'] / depth:.2f} s; outside blocks {run['seconds'] - sum(blocks):.1f} s"
    )
    for stage, peak in run["stage_peaks"].items():
        say(
            f"           {stage}: peak memory {format_bytes(peak['measured'])}, predicted "
            f"{format_bytes(peak['predicted'])} ({peak['predicted'] / peak['measured'] - 1:+.0%})"
        )
    if run["unavoidable"] and ranks == 1:
        parts = ", ".join(f"{part} {seconds:.2f} s" for part, seconds in run["unavoidable"].items())
        say(
            f"           unavoidable {run['unavoidable_seconds']:.1f} s: {parts} a block; "
            f"the run takes {run['ratio']:.2f} times that"
        )


def _say_shared(
    run: dict[str, Any], ranks: int, first: dict[str, Any], fewer: int, say: Callable[[str], object]
) -> None:
    """What `ranks` processes bring beside the first number of them."""
    same = "the same bytes" if run["sha256"] == first["sha256"] else "OTHER BYTES"
    block, before = (statistics.median(r["block_seconds"]) for r in (run, first))
    say(
        f"           {before / block:.2f} times as fast a block as {fewer}, predicted "
        f"{first['predicted_seconds'] / run['predicted_seconds']:.2f} times for the whole; a rank received "
        f"{format_bytes(run['received_bytes'])} from others; {same}"
    )


def _fresh_runs(
    folder: Path, depth: int, samples: int, length: int, recipe: str, shape: Shape, ranks: Sequence[int], threads: int
) -> dict[int, dict[str, Any]]:
    """Compress in new processes, whose peak memory is then the run's own; by how many they are."""
    model = write_model(folder / f"model-{depth}", depth, shape)
    text = write_text(folder / "text.txt", 2 * samples * length + 1, shape.vocab)
    packed = folder / f"packed-{depth}"
    settings = [f"calibration.source={text}", f"calibration.samples={samples}", f"calibration.length={length}"]
    task = {"model": str(model), "out": str(packed), "recipe": recipe, "settings": settings, "shape": asdict(shape)}
    runs = {}
    for n in ranks:
        shutil.rmtree(packed, ignore_errors=True)
        start = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(n)] if n > 1 else []
        done = subprocess.run(
            [sys.executable, *start, "-m", "ultralowbit.bench.pipeline", json.dumps(task)],
            stdout=subprocess.PIPE,
            env={**os.environ, "OMP_NUM_THREADS": str(threads)},
            text=True,
            check=True,
        )
        runs[n] = json.loads(done.stdout.splitlines()[-1])
    shutil.rmtree(model)
    shutil.rmtree(packed)
    return runs


STAGES = {
    "training adapters": "preprocess", "blocks": "blocks", "blocks, by steps": "blocks",
    "models to fine-tune": "finetune", "fine-tuning": "finetune",
}  # fmt: skip
"""What `compress` tells whoever watches it when a stage begins -> the stage's name in an estimate."""


class _Peaks(Silent):
    """Notes the peak memory of each stage of `compress`."""

    def __init__(self) -> None:
        self.peaks, self.stage = dict.fromkeys(STAGES.values(), 0), "blocks"
        forget_peak_memory()

    def start(self, what: str, total: int) -> None:
        self.note()
        self.stage = STAGES.get(what, self.stage)

    def note(self) -> None:
        self.peaks[self.stage] = max(self.peaks[self.stage], peak_memory())
        forget_peak_memory()


def _run(task: dict[str, Any], ranks: Ranks) -> dict[str, Any]:
    """Compress, note the peaks, then time the bare products in the same process, which is a fresh one."""
    recipe = Recipe.load(task["recipe"], task["settings"])
    planned = estimate(task["model"], recipe, "cpu", out=task["out"], ranks=ranks.size)
    ranks.wait()
    watch, started = _Peaks(), time.perf_counter()
    manifest = compress(task["model"], recipe, task["out"], device="cpu", progress=watch, ranks=ranks).manifest
    seconds = time.perf_counter() - started
    watch.note()
    watched = ranks.gather(watch.peaks)
    peaks = {stage: max(peaks[stage] for peaks in watched) for stage in watch.peaks}
    blocks = list(manifest["block_seconds"].values())
    bare = {}
    if manifest["calibration"] is not None and ranks.size == 1:
        bare = unavoidable(Shape(**task["shape"]), recipe.calibration.samples, recipe.calibration.length)
    total = len(blocks) * sum(bare.values())
    return {
        "peak_bytes": max(peaks.values()),
        "stage_peaks": {s: {"measured": peaks[s], "predicted": host} for s, (host, _) in planned.peaks.items()},
        "seconds": seconds,
        "predicted_seconds": sum(planned.seconds.values()),
        "block_seconds": blocks,
        "quantizing_seconds": sum(layer["seconds"] for layer in manifest["layers"].values()),
        "received_bytes": max(ranks.gather(ranks.received)),
        "sha256": manifest["files"]["model.safetensors"],
        "unavoidable": bare,
        "unavoidable_seconds": total,
        "ratio": seconds / total if total else None,
    }


def unavoidable(shape: Shape, samples: int, length: int) -> dict[str, float]:
    """Seconds of the large products of one block, as bare torch calls in the shapes in which `compress` makes them.

    Both forward passes, a Hessian for each input group, its factor, and the GPTQ updates as one large product a Linear.
    Softmax, norms, rounding, packing, measuring the error and files are not in it.
    """
    batches, rows, _ = batched(torch.empty(samples, length, dtype=torch.float32)).shape
    tokens = rows * length

    def forward(out: int, m: int) -> float:
        x, weight = torch.randn(tokens, m, dtype=torch.float32), torch.randn(out, m, dtype=torch.float32)
        return 2 * batches * best_of(lambda: F.linear(x, weight))

    def hessian(m: int) -> float:
        x, H = torch.randn(tokens, m, dtype=torch.float32), torch.zeros(m, m, dtype=torch.float32)
        return batches * best_of(lambda: H.addmm_(x.T, x))

    def factor(m: int) -> float:
        H = torch.full((m, m), 1 / m, dtype=torch.float64)
        H.diagonal().add_(1)
        return best_of(lambda: invert_upper(torch.linalg.cholesky_ex(H).L.T))

    def update(out: int, m: int) -> float:
        # by halves: out * m^2 flops in all, half of them in the first product
        done, rest, U = (
            torch.randn(m // 2, out, dtype=torch.float32),
            torch.randn(m // 2, out, dtype=torch.float32),
            torch.randn(m // 2, m // 2, dtype=torch.float32),
        )
        return 2 * best_of(lambda: rest.addmm_(U.T, done, alpha=-1))

    groups = [shape.hidden, shape.hidden, shape.hidden, shape.inter]  # of q/k/v, o, gate/up, down
    with torch.random.fork_rng(), torch.no_grad():
        return {
            "forward passes": sum_over(forward, shape.linears.values()),
            "Hessians": sum_over(hessian, [(m,) for m in groups]),
            "factors": sum_over(factor, [(m,) for m in groups]),
            "updates": sum_over(update, shape.linears.values()),
        }


def packing_bench(out: int = 2048, columns: int = 2048) -> list[dict[str, Any]]:
    """GB of fp32 weights a second that one thread packs (from codes) and unpacks, beside a plain copy."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        weight = torch.zeros(out, columns, dtype=torch.float32)
        gigabytes = weight.nbytes / 1e9
        copy = gigabytes / best_of(weight.clone)
        rows = [{"what": "copy", "pack": copy, "unpack": copy}]
        segments = [Planes(columns, planes, group) for planes in (1, 2) for group in (None, 128)]
        for segment in (*segments, *(Ints(columns, bits, 128) for bits in (2, 3, 4, 8))):
            format = Format((segment,))
            parts = _random_codes(segment, out)
            packed = PackedWeight.encode(format, parts)
            pack = best_of(lambda format=format, parts=parts: PackedWeight.encode(format, parts))
            unpack = best_of(packed.dequantize)
            rows.append({"what": format.summary, "pack": gigabytes / pack, "unpack": gigabytes / unpack})
        return rows
    finally:
        torch.set_num_threads(threads)


def _random_codes(segment: Planes | Ints, out: int) -> dict[str, Tensor]:
    """Random input for the segment's `encode`: bits or codes, and scales of one."""
    generator = torch.Generator().manual_seed(0)
    groups = group_count(segment.columns, segment.group)
    if isinstance(segment, Planes):
        bits = torch.randint(2, (segment.planes, out, segment.columns), generator=generator, dtype=torch.uint8)
        return {"bits": bits.bool(), "scale": torch.ones(segment.planes, out, groups, dtype=torch.float32)}
    codes = torch.randint(2**segment.bits, (out, segment.columns), generator=generator, dtype=torch.uint8)
    return {
        "codes": codes,
        "scale": torch.ones(out, groups, dtype=torch.float32),
        "zero": torch.ones(out, groups, dtype=torch.float32),
    }


if __name__ == "__main__":
    with Ranks.join() as together:
        measured = _run(json.loads(sys.argv[1]), together)
        if together.is_first:
            print(json.dumps(measured))
