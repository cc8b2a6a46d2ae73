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
import time
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, fields
from datetime import datetime, timezone
from functools import cache
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel, StaticCache

from ultralowbit.format import Bitmap, Format, Overlay, PackedWeight, Planes, TiedPlanes, Zones, pack_fields
from ultralowbit.fused import fuse
from ultralowbit.hf import cache_name
from ultralowbit.kernels.packed_matmul import kernel_for, packed_matmul
from ultralowbit.linear import PackedLinear, swap
from ultralowbit.methods.pb_llm import PBLLM
from ultralowbit.methods.ptq161 import PTQ161
from ultralowbit.text import InputError

SHAPES = (
    (4096, 4096), (6144, 4096), (11008, 4096), (22016, 4096), (14336, 4096), (28672, 4096), (4096, 14336), (8192, 8192),
    (8192, 28672),
)  # fmt: skip
"""Linears of 7B to 70B Llamas as (out, in), also with q, k, v and gate, up in one."""
TOKENS = (1, 2, 4, 8, 16, 64, 256, 2048)
FORMATS: dict[str, Callable[[int], Format]] = {
    "1 plane": lambda k: Format((Planes(k, 1),)),
    "1 plane g128": lambda k: Format((Planes(k, 1, 128),)),
    "2 planes g128": lambda k: Format((Planes(k, 2, 128),)),
    "2 tied planes g128": lambda k: Format((TiedPlanes(k, 2, 128),)),
    "ptq161": PTQ161().format,
    "pb-llm": PBLLM().format,
}
"""What is timed -> its format for so many input columns."""
ERROR = {torch.bfloat16: 2.0**-7, torch.float16: 2.0**-9, torch.float32: 2.0**-17}
"""dtype of x -> the relative error that a product may have; transformed inputs are rounded to it once more."""


@dataclass(frozen=True)
class Row:
    """One product. us, us_alone: microseconds of the median call in a graph, and without one; spread: of nine tenths of
    the replays, relative to it; gbps: stored bytes a second; of_copy: that, relative to the bytes a second that a copy
    moves; x_: how many times as fast as the others; error: relative to the norm of the fp64 product."""

    out: int
    columns: int
    tokens: int
    format: str
    path: str
    bits: float
    us: float
    spread: float
    us_alone: float
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
    found = torch.device("cuda", torch.device(device).index or 0)
    torch.cuda.set_device(found)
    return found


# --- random weights --------------------------------------------------------------------------------------------------


def random_packed(format: Format, out: int, device: torch.device, seed: int = 0) -> PackedWeight:
    """Random bytes of every stored tensor, padding included; scales such that a row's sums stay near 1."""
    generator = torch.Generator(device).manual_seed(seed)
    tensors = {}
    for name, (dtype, shape) in format.tensors(out, format.in_features).items():
        if dtype == torch.float16:
            values = torch.randn(shape, generator=generator, device=device)
            tensors[name] = (values * format.in_features**-0.5).half()
        else:
            limits = torch.iinfo(dtype)
            sizes = {"generator": generator, "dtype": dtype, "device": device}
            tensors[name] = torch.randint(limits.min, limits.max + 1, shape, **sizes)
    return PackedWeight(format, (out, format.in_features), tensors | _places(format, out, generator))


def _places(format: Format, out: int, generator: torch.Generator) -> dict[str, Tensor]:
    """The tensors that say where something is, which cannot be any bytes."""

    def random(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator, device=generator.device)

    def marks(rows: int, columns: int, counts: Tensor | int) -> Tensor:  # words with so many bits set in each row
        order = random(rows, columns).argsort(1).argsort(1)
        return pack_fields((order < counts).to(torch.uint8), 1)

    found = {}
    for i, part in enumerate(format.segments):
        if isinstance(part, Zones):
            found[f"weight_{i}_salient" if i else "weight_salient"] = marks(1, part.columns, part.salient)[0]
    if isinstance(format.overlay, Overlay):
        chosen = [random(size, out).argsort(0)[:entries] for _, size, entries in format.overlay.blocks]
        found["weight_overlay_index"] = torch.cat([c.sort(0).values.to(torch.uint8) for c in chosen])
    if isinstance(format.overlay, Bitmap):
        counts = (random(out, 1) * (format.overlay.capacity + 1)).long()
        found["weight_overlay_mask"] = marks(out, format.in_features, counts)
    if format.transform is not None and format.transform.partition:
        found["weight_input_partition"] = marks(1, format.in_features, format.segments[0].columns)[0]
    return found


# --- timing ----------------------------------------------------------------------------------------------------------

Run = Callable[[], object]


def captured(calls: Sequence[Run], device: torch.device) -> Run:
    """What makes all the calls, one after the other: a replay of their CUDA graph, on a CPU just them."""
    if device.type != "cuda":
        return lambda: [call() for call in calls]
    stream = _side_stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):  # kernels are compiled, and libraries choose theirs, outside of the graph
        for call in calls[:2]:
            call()
    torch.cuda.current_stream(device).wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for call in calls:
            call()
    return graph.replay


@cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    """One for all captures: cuBLAS keeps a workspace for every stream, which would count as peak memory."""
    return torch.cuda.Stream(device)


def seconds(run: Run, device: torch.device) -> float:
    """Of one run on the device."""
    if device.type != "cuda":
        started = time.perf_counter()
        run()
        return time.perf_counter() - started
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    run()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3


def race(runs: Mapping[str, Run], device: torch.device, rounds: int) -> dict[str, list[float]]:
    """Seconds of each run, in rising order; they take turns, and a first round only warms up."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(rounds + 1):
        for name, run in runs.items():
            took = seconds(run, device)
            times[name] += [took] if turn else []
    return {name: sorted(found) for name, found in times.items()}


def cache_bytes(device: torch.device) -> int:
    """Of the L2 cache; 1 MB on a CPU, where only the tests run this."""
    if device.type != "cuda":
        return 1 << 20
    return getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 0) or 64 << 20


def copies(nbytes: int, device: torch.device) -> int:
    """How many weights of so many bytes are four times the cache, at least two."""
    return max(2, math.ceil(4 * cache_bytes(device) / nbytes))


# --- products --------------------------------------------------------------------------------------------------------


@dataclass
class Dense:
    """What a packed product is compared with in one shape: bf16 weights for cuBLAS."""

    weights: list[Tensor]

    @classmethod
    def random(cls, out: int, columns: int, device: torch.device) -> Dense:
        generator = torch.Generator(device).manual_seed(0)
        count = copies(2 * out * columns, device)
        sizes = {"generator": generator, "device": device, "dtype": torch.bfloat16}
        return cls([torch.randn(out, columns, **sizes) * columns**-0.5 for _ in range(count)])

    def calls(self, x: Tensor) -> list[Run]:
        x = x.bfloat16()
        return [lambda w=w: F.linear(x, w) for w in self.weights]


def copy_calls(nbytes: int, device: torch.device) -> list[Run]:
    """Copies that each read half of the bytes and write the other half."""
    half = max(1, nbytes // 2)
    pairs = [torch.zeros(2, half, dtype=torch.uint8, device=device) for _ in range(copies(nbytes, device))]
    return [lambda pair=pair: pair[0].copy_(pair[1]) for pair in pairs]


def gemlite_calls(format: Format, out: int, x: Tensor) -> list[Run]:
    """The same product in gemlite, of one to four planes in groups of 128 as integers; none where it cannot."""
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
    x = torch.randn(tokens, columns, generator=torch.Generator(device).manual_seed(1), device=device).bfloat16()
    layout = json.dumps(packed.format.to_dict())
    calls = [lambda w=w: packed_matmul(x, list(w.tensors.values()), layout) for w in weights]
    error = error_of(calls[0](), x, packed)
    if not error <= ERROR[x.dtype]:
        raise RuntimeError(f"{name} of [{out}, {columns}] with {tokens} tokens is wrong: relative error {error:.2g}")
    entries = {"packed": calls, "cublas": dense.calls(x), "copy": copy_calls(packed.nbytes, device)}
    runs = {entry: captured(found, device) for entry, found in entries.items()}
    try:
        if other := gemlite_calls(packed.format, out, x):
            runs |= {"gemlite": captured(other, device)}
            entries |= {"gemlite": other}
    except Exception as e:  # whatever a release of another package may raise, ours is timed all the same
        warnings.warn(f"gemlite is not timed: {e!r}", stacklevel=2)
    times = race(runs, device, rounds)
    one = {entry: statistics.median(found) / len(entries[entry]) for entry, found in times.items()}
    alone = statistics.median(race({"packed": calls[0]}, device, rounds)["packed"])
    ours = times["packed"]
    path = kernel_for(packed.format, device, x.dtype, tokens).__name__
    spread = (ours[-1 - len(ours) // 20] - ours[len(ours) // 20]) / statistics.median(ours)
    return Row(
        out, columns, tokens, name, path, packed.bits_per_weight, 1e6 * one["packed"], spread, 1e6 * alone,
        packed.nbytes / one["packed"] / 1e9, one["copy"] / one["packed"], one["cublas"] / one["packed"],
        one.get("gemlite", math.nan) / one["packed"], error,
    )  # fmt: skip


HEAD = (
    f"{'format':20} {'tokens':>6} {'path':>17} {'bits':>6} {'us':>9} {'spread':>6} {'alone':>9} {'GB/s':>7} "
    f"{'of copy':>7} {'x cuBLAS':>8} {'x gemlite':>9} {'error':>8}"
)


def line(row: Row) -> str:
    return (
        f"{row.format:20} {row.tokens:6} {row.path:>17} {row.bits:6.3f} {row.us:9.2f} {row.spread:6.0%} "
        f"{row.us_alone:9.2f} {row.gbps:7.0f} {row.of_copy:7.0%} {row.x_cublas:8.2f} "
        f"{'' if math.isnan(row.x_gemlite) else format(row.x_gemlite, '.2f'):>9} {row.error:8.1e}"
    )


def machine(device: torch.device) -> dict[str, str]:
    """What the rows were measured on."""
    found = {"date": datetime.now(timezone.utc).date().isoformat(), "device": device.type, "torch": torch.__version__}
    if device.type == "cuda":
        found |= {"device": torch.cuda.get_device_name(device), "cuda": str(torch.version.cuda)}
    with suppress(ImportError):
        import triton

        found["triton"] = triton.__version__
    return found


def columns_of(device: torch.device) -> list[str]:
    return [*machine(device), *(f.name for f in fields(Row))]


def check_csv(file: Path, device: torch.device) -> None:
    """`InputError` where the file has other columns than rows from this device."""
    if file.exists():
        with file.open(newline="", encoding="utf-8") as stream:
            found = next(csv.reader(stream), None)
        if found != columns_of(device):
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
    """Everything that a new GPU is asked: do its tensor cores take masked words, how fast are products, how fast is
    decoding. `InputError` for a format that is not in `FORMATS` or a `csv_file` of something else."""
    from ultralowbit.kernels.triton_matmul import subnormals_are_exact

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
        decode_bench(device, formats, say=say)


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
            made, first = random_packed(FORMATS[name](columns), out, device), len(rows)
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


# --- decoding --------------------------------------------------------------------------------------------------------

LLAMA_7B = {
    "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32,
    "num_key_value_heads": 32, "vocab_size": 32000,
}  # fmt: skip
BATCHES = (1, 8, 32)


def random_llama(
    config: LlamaConfig, device: torch.device, dtype: torch.dtype, format_of: Callable[[int], Format] | None
) -> PreTrainedModel:
    """A Llama of random weights whose blocks' Linears are packed as `format_of` says, or dense; made on the device, no
    dense weight of a packed Linear ever is. Linears that share an input are multiplied at once."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    if format_of is not None:
        linears = [name for name, m in model.model.layers.named_modules() if isinstance(m, nn.Linear)]
        for name in linears:
            linear = model.model.layers.get_submodule(name)
            swap(model.model.layers, name, PackedLinear.replacing(linear, format_of(linear.in_features)))
    model.to_empty(device=device)
    model.model.rotary_emb = type(model.model.rotary_emb)(config).to(device)  # its buffer is not random
    generator = torch.Generator(device).manual_seed(0)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "norm" in name:
                p.fill_(1)
            else:
                p.normal_(0, config.hidden_size**-0.5, generator=generator)
    shared: dict[Format, dict[str, Tensor]] = {}  # what is done to an input is the same for all Linears that have it
    for i, module in enumerate(m for m in model.modules() if isinstance(m, PackedLinear)):
        packed = random_packed(module.format, module.out_features, device, seed=i)
        common = {name: packed.tensors[name] for name in packed.format.shared}
        tensors = packed.tensors | shared.setdefault(packed.format, common)
        module.fill(PackedWeight(packed.format, packed.shape, tensors))
    fuse(model)
    return model.eval()


class Decoder:
    """Greedy decoding in which a step changes nothing but its own tensors, so that it can be captured.

    token [batch, 1]: the last one of each sequence; position [1]: where the next goes; both are on the device.
    """

    def __init__(self, model: PreTrainedModel, first: Tensor, length: int) -> None:
        self.model, self.token = model, first.clone()
        cache = StaticCache(config=model.config, max_cache_len=length)
        self.cache = {cache_name(model): cache}  # as the model's forward is given it
        self.position = torch.zeros(1, dtype=torch.int64, device=first.device)
        self.slots = torch.arange(length, device=first.device)

    @torch.no_grad()
    def step(self) -> None:
        mask = (self.slots <= self.position).expand(len(self.token), 1, 1, -1)
        found = self.model(
            input_ids=self.token, position_ids=self.position[None], attention_mask=mask, use_cache=True,
            **self.cache,
        )  # fmt: skip
        self.token.copy_(found.logits[:, -1].argmax(-1, keepdim=True))
        self.position += 1


def decode_speed(
    model: PreTrainedModel, batch: int, device: torch.device, steps: int = 64, rounds: int = 5
) -> list[float]:
    """Seconds that all sequences of the batch take for a token, fastest first; each of the rounds writes `steps`."""
    first = torch.ones(batch, 1, dtype=torch.int64, device=device)
    decoder = Decoder(model, first, (rounds + 2) * steps)
    decoder.step()  # which makes the cache's tensors
    replay = captured([decoder.step], device)

    def write() -> None:
        for _ in range(steps):
            replay()

    return [found / steps for found in race({"decode": write}, device, rounds)["decode"]]


def decode_bench(
    device: torch.device,
    formats: Iterable[str] = tuple(FORMATS),
    batches: Iterable[int] = BATCHES,
    config: LlamaConfig | None = None,
    steps: int = 64,
    rounds: int = 5,
    say: Callable[[str], object] = print,
) -> list[dict[str, float | int | str]]:
    """Tokens a second of a Llama with random weights, 7B's shape unless `config` has another: in bf16, then packed."""
    config = config or LlamaConfig(**LLAMA_7B, max_position_embeddings=4096, tie_word_embeddings=False)
    rows: list[dict[str, float | int | str]] = []
    base: dict[int, float] = {}
    batches = list(batches)
    say("")
    say(f"decoding, {config.num_hidden_layers} blocks of {config.hidden_size} x {config.intermediate_size}, CUDA graph")
    say(f"{'format':20} {'batch':>6} {'ms a step':>10} {'tokens/s':>9} {'x bf16':>7} {'peak memory':>12}")
    for name in ("bf16", *formats):
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        model = random_llama(config, device, torch.bfloat16, FORMATS.get(name))
        for batch in batches:
            one = statistics.median(decode_speed(model, batch, device, steps, rounds))
            base.setdefault(batch, one)
            peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0
            row = {
                "format": name, "batch": batch, "tokens_per_second": batch / one, "x_bf16": base[batch] / one,
                "peak_bytes": peak,
            }  # fmt: skip
            rows.append(row)
            say(
                f"{name:20} {batch:6} {1e3 * one:10.3f} {batch / one:9.1f} {base[batch] / one:7.2f} "
                f"{peak / 1e9:9.2f} GB"
            )
        del model
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
    return rows


# --- tuning ----------------------------------------------------------------------------------------------------------


def tune_bench(
    device: torch.device,
    shapes: Iterable[tuple[int, int]] = ((4096, 4096), (14336, 4096), (8192, 8192)),
    say: Callable[[str], object] = print,
) -> str:
    """The entry of `kernels/tuning.json` for the GPU, by the geometric mean of seconds over some shapes and formats."""
    from ultralowbit.kernels.triton_launch import OutOfResources
    from ultralowbit.kernels.triton_launch import run as launch
    from ultralowbit.kernels.triton_matmul import Tuning, dequantized, product, tuning_of
    from ultralowbit.kernels.triton_tune import entry, tune

    cases = []
    for out, columns in shapes:
        for name in ("1 plane", "1 plane g128", "2 tied planes g128"):
            made = random_packed(FORMATS[name](columns), out, device)
            count = copies(made.nbytes, device)
            cases.append((made.format, [{k: t.clone() for k, t in made.tensors.items()} for _ in range(count)]))

    def mean(tokens: int, call: Callable[[Tensor, dict[str, Tensor], Format], object]) -> float:
        logs = []
        for format, places in cases:
            x = torch.randn(tokens, format.in_features, device=device, dtype=torch.bfloat16)
            run = captured([lambda t=t, x=x, f=format: call(x, t, f) for t in places], device)
            logs.append(math.log(statistics.median(race({"": run}, device, 10)[""]) / len(places)))
        return math.exp(sum(logs) / len(logs))

    def cost(tuning: Tuning, tokens: int) -> float:
        def call(x: Tensor, tensors: dict[str, Tensor], format: Format) -> None:
            launch(product(x, tensors, format, tuning)[0], device)

        try:
            return mean(tokens, call)
        except OutOfResources:
            return math.inf

    found = tune(cost, lambda tokens: mean(tokens, dequantized), tuning_of(device), say)
    return entry(torch.cuda.get_device_name(device), found)
