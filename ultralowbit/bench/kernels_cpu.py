"""Speed of products with packed weights on a CPU, beside torch's own: `ultralowbit bench kernels`.

Everything is timed in one process, in turns. Each call has another copy of the weight, so that it comes from memory and
not from a cache, as in a model. One thread is timed by its own clock, which leaves out what other programs take of its
core. Ratios are between fastest calls; the spread says how much longer the slowest tenth took. Errors are against fp64.
"""

from __future__ import annotations

import csv
import os
import platform
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from datetime import datetime, timezone
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ultralowbit.format.ints import Ints
from ultralowbit.format.planes import Planes
from ultralowbit.format.testing import random_packed
from ultralowbit.format.weight import Format
from ultralowbit.kernels import cpu
from ultralowbit.kernels.packed_matmul import kernel_for

Clock = Callable[[], float]

SHAPES = ("4096x4096", "11008x4096")

TOKENS = (1, 4, 16)


def formats(columns: int) -> list[Format]:
    """The formats to time: a plane with scales per row or per 128 columns, two planes, and integers."""
    segments = (Planes(columns, 1), *(Planes(columns, planes, 128) for planes in (1, 2)))
    return [Format((s,)) for s in (*segments, *(Ints(columns, bits, 128) for bits in (2, 4)))]


@dataclass(frozen=True)
class Row:
    """The speed of one product.

    us: microseconds of the fastest call; spread: how much longer the slowest tenth takes, as a share; gbps: stored
    bytes read in a second, in 1e9; share: gbps over the bandwidth measured in the same run; error: the largest,
    relative to the largest output; x_: how many times as fast as torch's product in that dtype.
    """

    out: int
    columns: int
    tokens: int
    product: str
    path: str
    bits: float
    us: float
    spread: float
    gbps: float
    share: float
    error: float
    x_bf16: float
    x_fp32: float
    x_int4: float


class Case(NamedTuple):
    product: str
    path: str
    bits: float
    nbytes: int
    error: float
    calls: Sequence[Callable[[], Tensor]]  # the same product, with the weight in different places


def cache_bytes() -> int:
    """Bytes of the last-level cache; 64 MB where the system does not tell."""
    sizes = Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")
    units = {"K": 1 << 10, "M": 1 << 20}
    return max((int(t[:-1]) * units[t[-1]] for t in (s.read_text().strip() for s in sizes)), default=64 << 20)


def bandwidth(clock: Clock, repeat: int = 10) -> tuple[float, float]:
    """GB/s that this thread reads, and that it copies (bytes read and written), from memory."""
    source = torch.ones(1 << 25, dtype=torch.float32)  # 128 MB
    target = torch.empty_like(source)
    read = min(_seconds(source.sum, clock) for _ in range(repeat))
    copy = min(_seconds(lambda: target.copy_(source), clock) for _ in range(repeat))
    return source.nbytes / read / 1e9, 2 * source.nbytes / copy / 1e9


def _seconds(call: Callable[[], object], clock: Clock) -> float:
    started = clock()
    call()
    return clock() - started


def _error(y: Tensor, weight: Tensor, x: Tensor) -> float:
    """The largest difference to the fp64 product of a few rows, relative to its largest value."""
    expected = x.double() @ weight.double().T
    return ((y[:, : len(weight)].double() - expected).abs().max() / expected.abs().max()).item()


def _copies(tensors: Sequence[Tensor], enough: int) -> list[list[Tensor]]:
    """The tensors in so many places that together they do not fit a cache."""
    count = max(2, -(-enough // sum(t.nbytes for t in tensors)))
    return [[t.clone() for t in tensors] for _ in range(count)]


def _dense(out: int, columns: int, x: Tensor, dtype: torch.dtype, enough: int) -> Case:
    weight = (torch.randn(out, columns, generator=torch.Generator().manual_seed(0), dtype=torch.float32) * 0.02).to(
        dtype
    )
    x = x.to(dtype)
    calls = [lambda w=w: F.linear(x, w) for (w,) in _copies([weight], enough)]
    name = "F.linear " + {torch.float32: "fp32", torch.bfloat16: "bf16"}[dtype]
    error = _error(F.linear(x, weight), weight[:64], x)
    return Case(name, "torch", 8.0 * weight.itemsize, weight.nbytes, error, calls)


def _int4(out: int, columns: int, x: Tensor, enough: int) -> Case:
    """torch's own kernel for 4-bit integers in groups of 128, bf16 scales and zero points."""
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(16, (out, columns), generator=generator, dtype=torch.int32)
    scale_zero = torch.rand(columns // 128, out, 2, generator=generator, dtype=torch.float32).mul_(0.02).bfloat16()
    words = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 2)
    x = x.bfloat16()
    multiply = torch.ops.aten._weight_int4pack_mm_for_cpu
    calls = [lambda w=w, s=s: multiply(x, w, 128, s) for w, s in _copies([words, scale_zero], enough)]
    scale, zero = scale_zero[:, :64].double().repeat_interleave(128, 0).unbind(-1)  # [columns, 64]
    error = _error(calls[0](), ((codes[:64].double().T - 8) * scale + zero).T, x)
    nbytes = words.nbytes + scale_zero.nbytes
    return Case("torch int4 g128", "torch", 8 * nbytes / (out * columns), nbytes, error, calls)


def _packed(format: Format, out: int, x: Tensor, int8: bool, enough: int) -> Case:
    packed = random_packed(format, out)
    kernel = kernel_for(format, x.device, x.dtype, len(x), int8)
    names = list(packed.tensors)
    calls = [
        lambda t=t: kernel(x, dict(zip(names, t, strict=True)), format)
        for t in _copies(list(packed.tensors.values()), enough)
    ]
    weight = format.decode(format.rows(packed.tensors, slice(0, 64)))
    error = _error(kernel(x, packed.tensors, format), weight, x)
    return Case(format.summary, kernel.__name__, packed.bits_per_weight, packed.nbytes, error, calls)


def cases(out: int, columns: int, tokens: int, enough: int) -> list[Case]:
    """torch's products first, then each format exactly and with activations of 8 bits."""
    x = torch.randn(tokens, columns, generator=torch.Generator().manual_seed(1), dtype=torch.float32).bfloat16()
    cases = [_dense(out, columns, x, dtype, enough) for dtype in (torch.bfloat16, torch.float32)]
    cases.append(_int4(out, columns, x, enough))
    return cases + [_packed(f, out, x, int8, enough) for f in formats(columns) for int8 in (False, True)]


def timed(products: Sequence[Case], rounds: int, clock: Clock) -> list[list[float]]:
    """Seconds of each case's calls, fastest first; the cases take turns."""
    times: list[list[float]] = [[] for _ in products]
    for i in range(-1, rounds):
        for case, seconds in zip(products, times, strict=True):
            took = _seconds(case.calls[i % len(case.calls)], clock)
            if i >= 0:  # the first round only warms up
                seconds.append(took)
    return [sorted(seconds) for seconds in times]


def kernel_bench(
    shapes: Iterable[str] = SHAPES,
    tokens: Iterable[int] = TOKENS,
    rounds: int = 30,
    threads: int = 1,
    csv_file: Path | str | None = None,
    say: Callable[[str], object] = print,
) -> list[Row]:
    """Time products with packed weights on the CPU for every shape and number of tokens, x in bf16.

    shapes: the weights, as "OUTxIN"; IN is a multiple of 128, the group of torch's integers. `say` is told a table;
    its rows are returned, and appended to `csv_file` with the machine they were measured on.
    """
    kept = torch.get_num_threads()
    torch.set_num_threads(threads)
    clock = time.thread_time if threads == 1 else time.perf_counter
    try:
        read, copy = bandwidth(clock)
        say(f"{processor()}, {cpu.isa()}, torch {torch.__version__}, {threads} thread{'s' if threads > 1 else ''}")
        say(f"memory: reads {read:.1f} GB/s, copies {copy:.1f} GB/s; share is of the faster of the two")
        rows = []
        for out, columns in (map(int, shape.split("x")) for shape in shapes):
            for m in tokens:
                say("")
                say(f"[{m}, {columns}] x [{out}, {columns}]")
                say(_HEAD)
                products = cases(out, columns, m, 2 * cache_bytes())
                best = {}
                for case, seconds in zip(products, timed(products, rounds, clock), strict=True):
                    us = best[case.product, case.path] = 1e6 * seconds[0]
                    spread = seconds[-1 - len(seconds) // 10] / seconds[0] - 1
                    gbps = case.nbytes / seconds[0] / 1e9
                    ratios = [best[name, "torch"] / us for name in _TORCH if (name, "torch") in best]
                    ratios += [float("nan")] * (len(_TORCH) - len(ratios))
                    row = Row(
                        out, columns, m, case.product, case.path, case.bits, us, spread, gbps, gbps / max(read, copy),
                        case.error, *ratios,
                    )  # fmt: skip
                    rows.append(row)
                    say(_line(row))
                del products
    finally:
        torch.set_num_threads(kept)
    if csv_file is not None:
        _append(Path(csv_file), rows, threads, read, copy)
    return rows


_TORCH = ("F.linear bf16", "F.linear fp32", "torch int4 g128")

_HEAD = (
    f"{'':24} {'path':>14} {'bits':>6} {'us':>8} {'spread':>7} {'GB/s':>6} {'share':>6} {'error':>8} "
    f"{'x bf16':>7} {'x fp32':>7} {'x int4':>7}"
)


def _line(row: Row) -> str:
    return (
        f"{row.product:24} {row.path:>14} {row.bits:6.3f} {row.us:8.1f} {row.spread:7.0%} {row.gbps:6.1f} "
        f"{row.share:6.0%} {row.error:8.1e} {row.x_bf16:7.2f} {row.x_fp32:7.2f} {row.x_int4:7.2f}"
    )


def processor() -> str:
    """The CPU's name as the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _append(file: Path, rows: Sequence[Row], threads: int, read: float, copy: float) -> None:
    machine = {
        "date": datetime.now(timezone.utc).date().isoformat(), "device": processor(), "cores": os.cpu_count(),
        "isa": cpu.isa(), "torch": torch.__version__, "threads": threads, "read_gbps": round(read, 2),
        "copy_gbps": round(copy, 2),
    }  # fmt: skip
    new = not file.exists()
    with file.open("a", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, [*machine, *(f.name for f in fields(Row))], lineterminator="\n")
        if new:
            writer.writeheader()
        for row in rows:
            values = {k: f"{v:.4g}" if isinstance(v, float) else v for k, v in asdict(row).items()}
            writer.writerow(machine | values)
