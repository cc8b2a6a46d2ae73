"""Speed of packed products on a GPU, and of decoding with them: `ultralowbit bench kernels` where there is one.

A call is a node of a CUDA graph in which every call has a weight of its own, together four times what the L2 cache
holds: as when a model decodes, weights come from memory and no Python is in between. Graphs are replayed in turns, all
in one process: the packed product, `F.linear` in bf16 (cuBLAS), a copy on the device that moves as many bytes as the
packed weight has, and gemlite where it is installed and knows the format. Medians count, ratios are between medians of
the same turns. Before it is timed, each product is compared with fp64.
"""

from __future__ import annotations

import csv
import gc
import json
import math
import statistics
import warnings
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, fields
from datetime import datetime, timezone
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from ultralowbit.bench.decode import decode_bench_gpu
from ultralowbit.bench.models import FORMATS
from ultralowbit.bench.timing import Call, captured, copies, race
from ultralowbit.errors import InputError
from ultralowbit.format.planes import Planes, TiedPlanes
from ultralowbit.format.testing import random_packed
from ultralowbit.format.weight import Format, PackedWeight
from ultralowbit.kernels.packed_matmul import kernel_for, packed_matmul
from ultralowbit.nn.linear import PackedLinear

SHAPES = (
    (4096, 4096), (6144, 4096), (11008, 4096), (22016, 4096), (14336, 4096), (28672, 4096), (4096, 14336), (8192, 8192),
    (8192, 28672),
)  # fmt: skip
"""Linears of 7B to 70B Llamas as (out, in), also with q, k, v and gate, up in one."""

TOKENS = (1, 2, 4, 8, 16, 64, 256, 2048)

ERROR = {torch.bfloat16: 2.0**-7, torch.float16: 2.0**-9, torch.float32: 2.0**-17}
"""dtype of x -> the relative error that a product may have; transformed inputs are rounded to it once more."""


@dataclass(frozen=True)
class Row:
    """The speed of one product.

    us, us_alone: microseconds of the median call in a graph, and of a PackedLinear called by Python; us_cublas_alone:
    of `F.linear` called by Python; spread: the range of nine tenths of the
    replays, as a share of the median; gbps: stored bytes read in a second, in 1e9; of_copy: gbps as a share of what a
    copy moves; x_: how many times as fast as the others; error: relative to the norm of the fp64 product.
    """

    out: int
    columns: int
    tokens: int
    format: str
    path: str
    bits: float
    us: float
    spread: float
    us_alone: float
    us_cublas_alone: float
    gbps: float
    of_copy: float
    x_cublas: float
    x_gemlite: float
    error: float


def need_gpu(device: str) -> torch.device:
    """The device; `InputError` where torch has no GPU."""
    if not torch.cuda.is_available():
        raise InputError(
            f"--device is {device}, and torch {torch.__version__} finds no GPU: run this where "
            "torch.cuda.is_available() is true, or leave --device out to time the CPU"
        )
    gpu = torch.device("cuda", torch.device(device).index or 0)
    torch.cuda.set_device(gpu)
    return gpu


@dataclass
class Dense:
    """The bf16 weights of one shape, with which cuBLAS multiplies for comparison."""

    weights: list[Tensor]

    @classmethod
    def random(cls, out: int, columns: int, device: torch.device) -> Dense:
        generator = torch.Generator(device).manual_seed(0)
        count = copies(2 * out * columns, device)
        sizes = {"generator": generator, "device": device, "dtype": torch.bfloat16}
        return cls([torch.randn(out, columns, **sizes) * columns**-0.5 for _ in range(count)])

    def calls(self, x: Tensor) -> list[Call]:
        x = x.bfloat16()
        return [lambda w=w: F.linear(x, w) for w in self.weights]


def copy_calls(nbytes: int, device: torch.device) -> list[Call]:
    """Copies that each read half of the bytes and write the other half."""
    half = max(1, nbytes // 2)
    pairs = [torch.zeros(2, half, dtype=torch.uint8, device=device) for _ in range(copies(nbytes, device))]
    return [lambda pair=pair: pair[0].copy_(pair[1]) for pair in pairs]


def gemlite_calls(format: Format, out: int, x: Tensor) -> list[Call]:
    """The product in gemlite, with one to four planes in groups of 128 as integers; no calls where it cannot."""
    (part,) = format.segments if len(format.segments) == 1 else (None,)
    if not isinstance(part, Planes | TiedPlanes) or part.group != 128 or part.planes not in (1, 2, 4):
        return []
    try:
        from gemlite.core import DType, GemLiteLinear
    except ImportError:
        return []
    columns, generator = part.columns, torch.Generator(x.device).manual_seed(0)
    made = []
    for _ in range(copies(out * columns * part.planes // 8, x.device)):
        codes = torch.randint(1 << part.planes, (out, columns), generator=generator, dtype=torch.uint8, device=x.device)
        scale = torch.full((out * columns // 128, 1), 0.01, dtype=torch.float16, device=x.device)
        layer = GemLiteLinear(
            part.planes, group_size=128, in_features=columns, out_features=out, input_dtype=DType.FP16,
            output_dtype=DType.FP16,
        )  # fmt: skip
        layer.pack(codes, scale, scale, None)
        made.append(layer)
    x = x.half()
    return [lambda layer=layer: layer(x) for layer in made]


def error_of(y: Tensor, x: Tensor, packed: PackedWeight) -> float:
    """The norm of y - x W^T, relative to that of x W^T, in fp64; some rows at a time."""
    wrong = total = 0.0
    step = max(1, (1 << 27) // packed.shape[1])
    for row in range(0, packed.shape[0], step):
        rows = slice(row, min(row + step, packed.shape[0]))
        exact = x.double() @ packed.format.decode(packed.format.rows(packed.tensors, rows)).double().T
        wrong += (y[:, rows].double() - exact).square().sum().item()
        total += exact.square().sum().item()
    return math.sqrt(wrong / total)


def measure_product(
    name: str, weights: Sequence[PackedWeight], dense: Dense, tokens: int, device: torch.device, rounds: int = 20
) -> Row:
    """Time x [tokens, in] in bf16 times `weights`, which are the same product in other places of the memory."""
    packed, (out, columns) = weights[0], weights[0].shape
    x = torch.randn(
        tokens, columns, generator=torch.Generator(device).manual_seed(1), dtype=torch.float32, device=device
    ).bfloat16()
    layout = json.dumps(packed.format.to_dict())
    calls = [lambda w=w: packed_matmul(x, list(w.tensors.values()), layout) for w in weights]
    error = error_of(calls[0](), x, packed)
    if not error <= ERROR[x.dtype]:
        raise RuntimeError(f"{name} of [{out}, {columns}] with {tokens} tokens is wrong: relative error {error:.2g}")
    entries = {"packed": calls, "cublas": dense.calls(x), "copy": copy_calls(packed.nbytes, device)}
    runs = {entry: captured(calls, device) for entry, calls in entries.items()}
    try:
        if other := gemlite_calls(packed.format, out, x):
            runs |= {"gemlite": captured(other, device)}
            entries |= {"gemlite": other}
    except Exception as e:  # whatever a release of another package may raise, ours is timed all the same
        warnings.warn(f"gemlite is not timed: {e!r}", stacklevel=2)
    times = race(runs, device, rounds)
    one = {entry: statistics.median(replays) / len(entries[entry]) for entry, replays in times.items()}
    linear = PackedLinear(out, columns, packed.format, None)
    linear.fill(packed)
    by_python = {"packed": lambda: linear(x), "cublas": entries["cublas"][0]}
    with torch.no_grad():
        alone = {entry: statistics.median(calls) for entry, calls in race(by_python, device, rounds).items()}
    ours = times["packed"]
    path = kernel_for(packed.format, device, x.dtype, tokens).__name__
    spread = (ours[-1 - len(ours) // 20] - ours[len(ours) // 20]) / statistics.median(ours)
    return Row(
        out, columns, tokens, name, path, packed.bits_per_weight, 1e6 * one["packed"], spread, 1e6 * alone["packed"],
        1e6 * alone["cublas"], packed.nbytes / one["packed"] / 1e9, one["copy"] / one["packed"],
        one["cublas"] / one["packed"], one.get("gemlite", math.nan) / one["packed"], error,
    )  # fmt: skip


HEAD = (
    f"{'format':20} {'tokens':>6} {'path':>17} {'bits':>6} {'us':>9} {'spread':>6} {'alone':>9} {'cuBLAS':>9} "
    f"{'GB/s':>7} {'of copy':>7} {'x cuBLAS':>8} {'x gemlite':>9} {'error':>8}"
)


def line(row: Row) -> str:
    return (
        f"{row.format:20} {row.tokens:6} {row.path:>17} {row.bits:6.3f} {row.us:9.2f} {row.spread:6.0%} "
        f"{row.us_alone:9.2f} {row.us_cublas_alone:9.2f} {row.gbps:7.0f} {row.of_copy:7.0%} {row.x_cublas:8.2f} "
        f"{'' if math.isnan(row.x_gemlite) else format(row.x_gemlite, '.2f'):>9} {row.error:8.1e}"
    )


def machine(device: torch.device) -> dict[str, str]:
    """The machine and software that rows are measured on, as columns of a CSV file."""
    columns = {"date": datetime.now(timezone.utc).date().isoformat(), "device": device.type, "torch": torch.__version__}
    if device.type == "cuda":
        columns |= {"device": torch.cuda.get_device_name(device), "cuda": str(torch.version.cuda)}
    with suppress(ImportError):
        import triton

        columns["triton"] = triton.__version__
    return columns


def columns_of(device: torch.device) -> list[str]:
    return [*machine(device), *(f.name for f in fields(Row))]


def check_csv(file: Path, device: torch.device) -> None:
    """`InputError` where the file has other columns than rows from this device."""
    if file.exists():
        with file.open(newline="", encoding="utf-8") as stream:
            head = next(csv.reader(stream), None)
        if head != columns_of(device):
            raise InputError(f"{file} has other columns than the rows of this benchmark: name another file")


def append(file: Path, rows: Sequence[Row], device: torch.device) -> None:
    """Add the rows to a CSV file, each with what it was measured on."""
    about, new = machine(device), not file.exists()
    with file.open("a", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, columns_of(device), lineterminator="\n")
        if new:
            writer.writeheader()
        for row in rows:
            values = {k: f"{v:.4g}" if isinstance(v, float) else v for k, v in asdict(row).items()}
            writer.writerow(about | values)


def gpu_bench(
    device: torch.device,
    shapes: Iterable[tuple[int, int]],
    tokens: Iterable[int],
    formats: Iterable[str],
    rounds: int = 20,
    csv_file: Path | None = None,
    decode: bool = True,
    say: Callable[[str], object] = print,
) -> None:
    """Measure all that there is to know of a new GPU: if its tensor cores take masked words, and how fast products and
    decoding are. `InputError` for a format that is not in `FORMATS` or a `csv_file` of something else."""
    from ultralowbit.kernels.gpu.dispatch import subnormals_are_exact

    formats = list(formats)
    if unknown := [name for name in formats if name not in FORMATS]:
        raise InputError(f"--format is {unknown[0]!r}, expected one of {', '.join(FORMATS)}")
    if csv_file is not None:
        check_csv(csv_file, device)
    say(", ".join(f"{key} {value}" for key, value in machine(device).items()))
    exact = subnormals_are_exact(device)
    say("its tensor cores multiply fp16 subnormals " + ("exactly" if exact else "INEXACTLY: a slower way is taken"))
    product_bench(device, shapes, tokens, formats, rounds, csv_file, say)
    if decode:
        decode_bench_gpu(device, formats, say=say)


def product_bench(
    device: torch.device,
    shapes: Iterable[tuple[int, int]] = SHAPES,
    tokens: Iterable[int] = TOKENS,
    formats: Iterable[str] = tuple(FORMATS),
    rounds: int = 20,
    csv_file: Path | None = None,
    say: Callable[[str], object] = print,
) -> list[Row]:
    """Time every product; `say` is told a table as it grows, `csv_file` gets the rows of a format when it is done."""
    rows: list[Row] = []
    tokens, formats = list(tokens), list(formats)
    for out, columns in shapes:
        say("")
        say(f"[{out}, {columns}]")
        say(HEAD)
        dense = Dense.random(out, columns, device)
        for name in formats:
            made, first = random_packed(FORMATS[name](columns), out, device=device), len(rows)
            places = [made]
            for _ in range(1, copies(made.nbytes, device)):
                moved = {key: tensor.clone() for key, tensor in made.tensors.items()}
                places.append(PackedWeight(made.format, made.shape, moved))
            for count in tokens:
                rows.append(measure_product(name, places, dense, count, device, rounds))
                say(line(rows[-1]))
            del made, places
            if csv_file is not None:
                append(csv_file, rows[first:], device)
        del dense
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
    return rows
