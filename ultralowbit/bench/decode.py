"""Tokens a second that packed models write."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, PreTrainedModel, StaticCache

from ultralowbit.bench.kernels_cpu import bandwidth, processor
from ultralowbit.bench.models import FORMATS, LLAMA_7B, Shape, random_llama, write_model
from ultralowbit.bench.timing import Call, captured, race
from ultralowbit.eval.runner import open_model
from ultralowbit.format.ints import Ints
from ultralowbit.format.planes import Planes
from ultralowbit.format.segment import Segment
from ultralowbit.kernels import cpu
from ultralowbit.nn.hf_names import cache_name
from ultralowbit.nn.linear import PackedLinear
from ultralowbit.system import release
from ultralowbit.units import format_bytes

DECODED: dict[str, Callable[[int], Segment]] = {
    "sign-1": lambda columns: Planes(columns, 1),
    "sign-2-g128": lambda columns: Planes(columns, 2, 128),
    "gptq-2bit": lambda columns: Ints(columns, 2, 128),
}
"""Name of a recipe -> the segment that it makes for a number of columns."""


def decode_bench(
    layers: int = 22,
    tokens: int = 8,
    rounds: int = 4,
    threads: int = 1,
    shape: Shape | None = None,
    json_file: Path | str | None = None,
    say: Callable[[str], object] = print,
) -> dict[str, Any]:
    """Measure how many tokens a second random models write on the CPU: in bf16, and packed, exactly and in int8.

    Linears that share an input are multiplied at once. In int8, packed Linears round their inputs to 8 bits.
    The models write `tokens` in turns, `rounds` times after one that warms up; the fastest counts, by the thread's own
    clock where there is one. Peak memory is that of a new process which loads one model and writes.
    """
    shape = shape or Shape()
    clock = time.thread_time if threads == 1 else time.perf_counter
    result: dict[str, Any] = {
        "shape": asdict(shape), "layers": layers, "threads": threads, "torch": torch.__version__, "isa": cpu.isa(),
        "processor": processor(), "models": {},
    }  # fmt: skip
    say(f"{processor()}, {cpu.isa()}, {threads} thread{'s' if threads > 1 else ''}, Llama of {layers} x {shape}")
    kept = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        result["read_gbps"] = max(bandwidth(clock))
        with tempfile.TemporaryDirectory() as temporary:
            folders = {
                name: write_model(Path(temporary) / name, layers, shape, segment=DECODED.get(name))
                for name in ("bf16", *DECODED)
            }  # fmt: skip
            peaks = {name: _fresh_peak(folder, threads) for name, folder in folders.items()}
            bytes_of = {name: sum(f.stat().st_size for f in d.glob("*.safetensors")) for name, d in folders.items()}
            nets = {
                name: open_model(folder, torch.device("cpu"), torch.bfloat16, fuse=True)
                for name, folder in folders.items()
            }
        seconds = _take_turns(nets, tokens, rounds, clock)
    finally:
        torch.set_num_threads(kept)
    base = min(seconds["bf16", False])
    for (name, int8), times in seconds.items():
        label = name + (" int8" if int8 else "")
        best = min(times)
        result["models"][label] = {
            "tokens_per_second": 1 / best, "ratio": base / best, "spread": max(times) / best - 1,
            "file_bytes": bytes_of[name], "peak_bytes": peaks[name],
            "share": _read_bytes(nets[name]) / best / 1e9 / result["read_gbps"],
        }  # fmt: skip
        say(
            f"{label:>18}: {1 / best:7.2f} tokens a second (slowest turn {max(times) / best - 1:.0%} more), "
            f"{base / best:5.2f} times bf16, {result['models'][label]['share']:.0%} of what memory's "
            f"{result['read_gbps']:.1f} GB/s would allow; file {format_bytes(bytes_of[name])}, peak memory "
            f"{format_bytes(peaks[name])}"
        )
    if json_file is not None:
        Path(json_file).write_text(json.dumps(result, indent=1) + "\n")
    return result


def _take_turns(
    nets: dict[str, nn.Module], tokens: int, rounds: int, clock: Callable[[], float]
) -> dict[tuple[str, bool], list[float]]:
    """Seconds a token of each model, and of packed ones also with 8-bit activations, in `rounds` turns after one that
    warms up."""
    runs = [("bf16", False), *((name, int8) for name in DECODED for int8 in (False, True))]
    seconds: dict[tuple[str, bool], list[float]] = {run: [] for run in runs}
    for turn in range(rounds + 1):
        for name, int8 in runs:
            for module in nets[name].modules():
                if isinstance(module, PackedLinear):
                    module.int8 = int8
            taken = _seconds_a_token(nets[name], tokens, clock)
            seconds[name, int8] += [taken] if turn else []
    return seconds


def _read_bytes(model: nn.Module) -> int:
    """Bytes of weights that a token reads: all but the embeddings, of which it takes a row."""
    embeddings = {id(p) for p in model.get_input_embeddings().parameters()}
    return sum(t.nbytes for t in (*model.parameters(), *model.buffers()) if id(t) not in embeddings)


def _seconds_a_token(model: nn.Module, tokens: int, clock: Callable[[], float]) -> float:
    """Time `generate` after a prompt of one token."""
    prompt = torch.tensor([[1]])
    fixed = {"do_sample": False, "pad_token_id": 0, "attention_mask": torch.ones_like(prompt)}
    started = clock()
    model.generate(prompt, max_new_tokens=tokens, min_new_tokens=tokens, **fixed)
    return (clock() - started) / tokens


def _fresh_peak(folder: Path, threads: int) -> int:
    """Bytes of the largest resident set of a process that loads a model and writes two tokens."""
    script = (
        "import sys, time, torch; from pathlib import Path; from transformers.utils import logging\n"
        "from ultralowbit.bench import decode\n"
        "from ultralowbit.system import peak_memory\n"
        "logging.disable_progress_bar()\n"
        "torch.set_num_threads(int(sys.argv[2]))\n"
        "model = decode.open_model(Path(sys.argv[1]), torch.device('cpu'), torch.bfloat16, fuse=True)\n"
        "decode._seconds_a_token(model, 2, time.perf_counter)\n"
        "print(peak_memory())"
    )
    command = [sys.executable, "-c", script, str(folder), str(threads)]
    return int(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout.split()[-1])


BATCHES = (1, 8, 32)
WAYS = ("eager", "graph", "compiled")
"""How a step runs: by Python, which launches every kernel; as a CUDA graph of the same kernels; as a CUDA graph of what
`torch.compile` makes of it, as a model of `load(..., compile=True)` does."""


class Decoder:
    """Greedy decoding in which a step changes nothing but its own tensors, so that it can be captured.

    token [batch, 1]: the last one of each sequence; position [1]: where the next goes; both are on the device.
    """

    def __init__(self, model: PreTrainedModel, first: Tensor, length: int, compiled: bool = False) -> None:
        self.token = first.clone()
        cache = StaticCache(config=model.config, max_cache_len=length)
        self.cache = {cache_name(model): cache}  # the keyword of the model's forward
        self.position = torch.zeros(1, dtype=torch.int64, device=first.device)
        self.slots = torch.arange(length, device=first.device)
        self.forward = torch.compile(model, fullgraph=True, dynamic=False) if compiled else model

    @torch.no_grad()
    def step(self) -> None:
        mask = (self.slots <= self.position).expand(len(self.token), 1, 1, -1)
        output = self.forward(
            input_ids=self.token, position_ids=self.position[None], attention_mask=mask, use_cache=True, **self.cache,
        )  # fmt: skip
        self.token.copy_(output.logits[:, -1].argmax(-1, keepdim=True))
        self.position += 1


def decoding_step(model: PreTrainedModel, batch: int, device: torch.device, length: int, way: str) -> Call:
    """A step of `batch` sequences of at most `length` tokens, two of which are written, in one of `WAYS`."""
    first = torch.ones(batch, 1, dtype=torch.int64, device=device)
    decoder = Decoder(model, first, length, way == "compiled")
    decoder.step()  # which makes the cache's tensors
    decoder.step()  # which compiles, with those
    return decoder.step if way == "eager" else captured([decoder.step], device)


def decode_speed(
    model: PreTrainedModel, batch: int, device: torch.device, steps: int = 64, rounds: int = 5, way: str = "graph"
) -> list[float]:
    """Seconds that all sequences of the batch take for a token, fastest first; each of the rounds writes `steps`."""
    step = decoding_step(model, batch, device, (rounds + 2) * steps + 4, way)

    def write() -> None:
        for _ in range(steps):
            step()

    return [seconds / steps for seconds in race({"decode": write}, device, rounds)["decode"]]


def decode_bench_gpu(
    device: torch.device,
    formats: Iterable[str] = tuple(FORMATS),
    batches: Iterable[int] = BATCHES,
    config: LlamaConfig | None = None,
    steps: int = 64,
    rounds: int = 5,
    ways: Iterable[str] = ("graph",),
    say: Callable[[str], object] = print,
) -> list[dict[str, float | int | str]]:
    """Measure how many tokens a second a random Llama writes on a GPU, in bf16 and packed; 7B's shape by default.

    Returns a row for each format, way (of `WAYS`) and batch; `x_bf16` compares with bf16 in the same way and batch.
    """
    config = config or LlamaConfig(**LLAMA_7B, max_position_embeddings=4096, tie_word_embeddings=False)
    rows: list[dict[str, float | int | str]] = []
    base: dict[tuple[str, int], float] = {}
    batches, ways = list(batches), list(ways)
    say("")
    say(f"decoding, {config.num_hidden_layers} blocks of {config.hidden_size} x {config.intermediate_size}")
    say(f"{'format':20} {'step':>8} {'batch':>6} {'ms a step':>10} {'tokens/s':>9} {'x bf16':>7} {'peak memory':>12}")
    for name in ("bf16", *formats):
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        model = random_llama(config, device, torch.bfloat16, FORMATS.get(name))
        for way, batch in product(ways, batches):
            one = statistics.median(decode_speed(model, batch, device, steps, rounds, way))
            base.setdefault((way, batch), one)
            peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0
            row = {
                "layers": config.num_hidden_layers, "format": name, "way": way, "batch": batch, "ms": 1e3 * one,
                "tokens_per_second": batch / one, "x_bf16": base[way, batch] / one, "peak_bytes": peak,
            }  # fmt: skip
            rows.append(row)
            say(
                f"{name:20} {way:>8} {batch:6} {1e3 * one:10.3f} {batch / one:9.1f} {base[way, batch] / one:7.2f} "
                f"{format_bytes(peak):>12}"
            )
        del model
        torch.compiler.reset()  # what was compiled holds the model
        release(device)
    return rows
