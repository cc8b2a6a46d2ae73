"""The parts of `ultralowbit bench gpu`, each run in a process of its own: `python -m ultralowbit.bench.gpu_parts`.

A part is given its task and `Keep`, to which it hands what it has measured so far, as often as it likes. On a CPU the
same parts run at sizes for tests.
"""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as xml
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile
from transformers import LlamaConfig

from ultralowbit.bench import kernels_gpu
from ultralowbit.bench.decode import WAYS, decode_bench_gpu, decoding_step
from ultralowbit.bench.eval import eval_bench
from ultralowbit.bench.gpu import Task
from ultralowbit.bench.models import FORMATS, LLAMA_7B, Shape, random_llama, write_model, write_text
from ultralowbit.bench.training import training_bench
from ultralowbit.bench.tuning import tune_bench
from ultralowbit.checkpoint.storage import write_json
from ultralowbit.errors import InputError
from ultralowbit.pipeline.compress import compress
from ultralowbit.progress import Silent
from ultralowbit.recipe import Recipe, shipped
from ultralowbit.report.run import Texts, compress_and_measure
from ultralowbit.system import pick_device

Keep = Callable[[dict[str, Any]], None]
SMOLLM2 = Shape(hidden=576, inter=1536, heads=9, kv_heads=3, vocab=49152)
TRAINING = ("preprocess", "blockwise", "finetune")


@dataclass(frozen=True)
class Sizes:
    """How much of everything a device is asked for."""

    shapes: tuple[tuple[int, int], ...]
    tokens: tuple[int, ...]
    rounds: int
    decoded: LlamaConfig
    """Of the whole model; steps of `depths` blocks are timed, from which follows what the whole takes."""
    depths: tuple[int, int]
    formats: tuple[str, ...]
    batches: tuple[int, ...]
    steps: int
    small: Shape
    small_layers: int
    deep: Shape
    deep_layers: tuple[int, int]
    """Blocks that are compressed, and blocks of the whole model."""
    windows: tuple[int, int]
    """Calibration windows, and the tokens of each."""
    measured: int
    """Tokens to measure on, in windows of `context`."""
    context: int
    tests: tuple[str, ...]
    """What pytest is told."""
    best: tuple[str, ...]
    """What `compress` is told beside the model, the bits and the texts."""
    rungs: tuple[str, ...]
    """At which bits, the first ones first."""


def _llama(**sizes: Any) -> LlamaConfig:
    return LlamaConfig(**sizes, max_position_embeddings=4096, tie_word_embeddings=False)


CARD = Sizes(
    shapes=((8192, 28672), (4096, 4096), (14336, 4096)), tokens=kernels_gpu.TOKENS, rounds=10,
    decoded=_llama(**LLAMA_7B), depths=(1, 9), formats=("1 plane", "2 tied planes g128"), batches=(1, 8), steps=32,
    small=SMOLLM2, small_layers=30, deep=Shape(), deep_layers=(4, 22), windows=(64, 512), measured=40_960, context=512,
    tests=("tests", "-k", "cuda", "-n", "12", "-m", "not campaign"), best=("--context", "512", "--max-tokens", "16384"),
    rungs=("2.05", "3.1", "2.6", "1.6", "1.05"),
)  # fmt: skip
TINY = Shape(hidden=64, inter=128, heads=4, kv_heads=2, vocab=96)
HOST = Sizes(
    shapes=((48, 512),), tokens=(1, 3), rounds=2,
    decoded=_llama(
        hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=96,
    ),
    depths=(1, 2), formats=("1 plane",), batches=(1,), steps=2, small=TINY, small_layers=2, deep=TINY,
    deep_layers=(1, 3), windows=(4, 16), measured=256, context=32, tests=("tests/test_recipe.py",),
    best=("--small", "--samples", "4", "--length", "16", "--set", "finetune.training.steps=2", "--max-tokens", "256",
          "--set", "finetune.data.samples=4", "--set", "finetune.data.length=16"),
    rungs=("2.2",),
)  # fmt: skip


def sizes_of(device: torch.device) -> Sizes:
    return CARD if device.type == "cuda" else HOST


def kernels(task: Task, device: torch.device, folder: Path, keep: Keep) -> None:
    """Every format in every shape with every number of tokens, in kernels.csv too."""
    from ultralowbit.kernels.gpu.dispatch import subnormals_are_exact

    sizes, rows = sizes_of(device), []
    exact = subnormals_are_exact(device) if device.type == "cuda" else None
    file = folder / "kernels.csv"
    file.unlink(missing_ok=True)
    for shape in sizes.shapes:
        for name in ("1 plane", "1 plane g128", "2 tied planes g128", "2 planes g128"):
            for row in kernels_gpu.product_bench(device, [shape], sizes.tokens, [name], sizes.rounds, file):
                rows.append({key: None if value != value else value for key, value in asdict(row).items()})  # nan
            keep({"subnormals_are_exact": exact, "rows": rows})


def decode(task: Task, device: torch.device, folder: Path, keep: Keep) -> None:
    """Steps of two depths, and what follows for the whole model: all blocks cost the same."""
    sizes, result = sizes_of(device), {"rows": [], "whole": []}
    for way in reversed(WAYS):  # what the targets ask for comes first
        timed = []
        for depth in sizes.depths:
            config = LlamaConfig(**sizes.decoded.to_dict() | {"num_hidden_layers": depth})
            timed.append(decode_bench_gpu(device, sizes.formats, sizes.batches, config, sizes.steps, 4, [way]))
            result["rows"] += timed[-1]
            keep(result)
        result["whole"] += _whole(*timed, sizes)
        keep(result)


def _whole(few: list[dict[str, Any]], more: list[dict[str, Any]], sizes: Sizes) -> list[dict[str, Any]]:
    """Rows for all blocks, from those of a few and of some more."""
    layers, (first, second) = sizes.decoded.num_hidden_layers, sizes.depths
    rows = []
    for short, long in zip(few, more, strict=True):
        ms = long["ms"] + (long["ms"] - short["ms"]) / (second - first) * (layers - second)
        same = next((r for r in rows if r["format"] == "bf16" and r["batch"] == long["batch"]), {"ms": ms})
        kept = {key: long[key] for key in ("format", "way", "batch")}
        rows.append({"layers": layers, **kept, "ms": ms, "x_bf16": same["ms"] / ms})
    return rows


def solve(task: Task, device: torch.device, folder: Path, keep: Keep) -> None:
    """Compress as a user does, and measure what became of the model."""
    sizes = sizes_of(device)
    with tempfile.TemporaryDirectory() as scratch:
        model, text = _small_model(task, sizes, Path(scratch))
        calibration, evaluation = task.calibration or text, task.evaluation or task.calibration or text
        recipe = Recipe.load("gptq-2bit", _windows(calibration, sizes))
        began = time.perf_counter()
        texts = Texts((evaluation,), sizes.context, sizes.measured)
        report = compress_and_measure(
            model, recipe, Path(scratch) / "packed", texts, device=str(device), watch=Silent()
        )
        seconds = time.perf_counter() - began
    metrics = {row.label: row.metrics["perplexity"][0].perplexity for row in (report.original, report.packed)}
    keep({
        "model": report.model, "recipe": recipe.name, "seconds": seconds, "blocks_seconds": report.packed.seconds,
        "solving_seconds": sum(layer.seconds or 0 for layer in report.layers), "perplexity": metrics,
    })  # fmt: skip


def deep(task: Task, device: torch.device, folder: Path, keep: Keep) -> None:
    """Compress some blocks of a model, and say what follows for all of them."""
    sizes = sizes_of(device)
    done, whole = sizes.deep_layers
    with tempfile.TemporaryDirectory() as scratch:
        model = write_model(Path(scratch) / "model", done, sizes.deep)
        recipe = Recipe.load("sign-2-refined", _windows(_random_text(scratch, sizes, sizes.deep), sizes))
        began = time.perf_counter()
        manifest = compress(str(model), recipe, Path(scratch) / "packed", device=str(device)).manifest
        seconds = time.perf_counter() - began
    blocks = list(manifest["block_seconds"].values())
    keep({
        "recipe": recipe.name, "shape": asdict(sizes.deep), "layers": done, "seconds": seconds, "block_seconds": blocks,
        "whole_layers": whole, "whole_seconds": seconds - sum(blocks) + whole * statistics.median(blocks),
    })  # fmt: skip


def trained(task: Task, device: torch.device, folder: Path, keep: Keep) -> None:
    """A few steps of every recipe that trains; then a step of block-wise training beside the block's own passes."""
    result: dict[str, Any] = {"recipes": {}}
    with tempfile.TemporaryDirectory() as scratch:
        model = write_model(Path(scratch) / "model", 2, TINY)
        recipes = filter(None, (_brief(name, _random_text(scratch, HOST, TINY)) for name in shipped()))
        for recipe in recipes:
            began, wrong = time.perf_counter(), None
            try:
                compress(str(model), recipe, Path(scratch) / recipe.name, device=str(device))
            except Exception as error:  # which the others are to run after
                wrong = f"{type(error).__name__}: {error}"
            print(f"{recipe.name}: {wrong or 'done'}", flush=True)
            result["recipes"][recipe.name] = {"seconds": time.perf_counter() - began, "error": wrong}
            keep(result)
    failed = [name for name, outcome in result["recipes"].items() if outcome["error"]]
    keep(result | {"failed": len(failed)})
    shape = TINY if device.type == "cpu" else Shape.wide(1024)
    steps = training_bench(sizes_of(device).context, 1, 3, shape, str(device))
    keep(result | {"failed": len(failed), "steps": steps})
    if failed:
        raise RuntimeError(f"{len(failed)} recipes fail: {', '.join(failed)}")


def _brief(name: str, text: str) -> Recipe | None:
    """A shipped recipe with two steps of each of its trained stages; None where it has none."""
    recipe, settings = Recipe.load(name, small=True), _windows(text, HOST)
    stages = {stage: getattr(recipe, stage) for stage in TRAINING if getattr(recipe, stage) is not None}
    for stage, spec in stages.items():
        settings += [f"{stage}.training.steps=2", f"{stage}.held_out=0.25"]
        settings += [f"{stage}.data=null"] * (getattr(spec, "data", None) is not None)
    return Recipe.load(name, settings, small=True) if stages else None


def measuring(task: Task, device: torch.device, folder: Path, keep: Keep) -> None:
    """Perplexity and divergence beside the bare forward passes."""
    sizes = sizes_of(device)
    keep(eval_bench(task.model, sizes.small_layers, sizes.context, sizes.measured, 3, str(device), None, sizes.small))


def profiled(task: Task, device: torch.device, folder: Path, keep: Keep) -> None:
    """What decoding steps, and the solving of a block, spend their time on: tables of torch's profiler as text."""
    sizes, files = sizes_of(device), []

    def note(name: str, run: Callable[[], object]) -> None:
        file = folder / f"profile-{name}.txt"
        file.write_text(profile_table(run, device))
        files.append(file.name)
        keep({"files": files})

    config = LlamaConfig(**sizes.decoded.to_dict() | {"num_hidden_layers": 2})
    model = random_llama(config, device, torch.bfloat16, FORMATS["1 plane"])
    for way in WAYS:
        note(f"decode-{way}", decoding_step(model, 1, device, 64, way))
    del model
    with tempfile.TemporaryDirectory() as scratch:
        source = write_model(Path(scratch) / "model", 1, sizes.small)
        text = _random_text(scratch, sizes, sizes.small)
        for name in ("gptq-2bit", "sign-2-refined"):
            recipe = Recipe.load(name, _windows(text, sizes))
            out = Path(scratch) / name
            note(f"solve-{name}", lambda recipe=recipe, out=out: compress(str(source), recipe, out, device=str(device)))


def profile_table(run: Callable[[], object], device: torch.device, rows: int = 25) -> str:
    """The kernels and operators that a run spends the most time in, by the device's own time."""
    there = device.type == "cuda"
    activities = [ProfilerActivity.CPU, ProfilerActivity.CUDA] if there else [ProfilerActivity.CPU]
    with profile(activities=activities) as seen:
        run()
        if there:
            torch.cuda.synchronize(device)
    key = "self_cuda_time_total" if there else "self_cpu_time_total"
    return seen.key_averages().table(sort_by=key, row_limit=rows, max_name_column_width=60)


def suite(task: Task, device: torch.device, folder: Path, keep: Keep) -> None:
    """The tests that need the device, in some processes; stopped, it counts those that were done."""
    root, file = Path(__file__).resolve().parents[2], folder / "tests.xml"
    if not (root / "tests").is_dir():
        raise InputError(f"{root} has no tests: run this in a checkout")
    for package in ("pytest", "xdist"):
        if importlib.util.find_spec(package) is None:
            raise InputError(f"{package} is not installed: run `pip install 'ultralowbit[dev]'`")
    options = ["-q", "-p", "no:cacheprovider", f"--junitxml={file}"]
    file.unlink(missing_ok=True)
    began = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, "-m", "pytest", *sizes_of(device).tests, *options],
        cwd=root,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    try:
        process.wait()
    except KeyboardInterrupt:
        process.send_signal(signal.SIGINT)  # upon which pytest writes what it has
        process.wait(8)
        if file.exists():
            keep({"stopped": _counted(file)})
        raise
    keep(_counted(file) | {"seconds": time.perf_counter() - began})
    if process.returncode:
        raise RuntimeError(f"pytest left with exit code {process.returncode}")


def _counted(file: Path) -> dict[str, Any]:
    """How many tests ran and failed, and the names of those that failed, of pytest's XML."""
    cases = list(xml.parse(file).getroot().iter("testcase"))
    bad = [case for case in cases if case.find("failure") is not None or case.find("error") is not None]
    skipped = sum(case.find("skipped") is not None for case in cases)
    names = [f"{case.get('classname')}::{case.get('name')}" for case in bad]
    return {"tests": len(cases), "skipped": skipped, "failed": len(bad), "names": names}


def tune(task: Task, device: torch.device, folder: Path, keep: Keep) -> None:
    """The best tiles that can be found in the part's time."""
    if device.type != "cuda":
        keep({"entry": None})
        print(f"there are no tiles to tune on {device}")
        return
    tune_bench(device, task.seconds - 15, keep=lambda entry: keep({"entry": entry}))


def best(task: Task, device: torch.device, folder: Path, keep: Keep) -> None:
    """`ulb-best` at one number of bits after the other, by the command that a user would give; its folders stay."""
    sizes, rows = sizes_of(device), []
    texts = ["--calib", task.calibration] if task.calibration else []
    texts += ["--eval", task.evaluation] if task.evaluation else []
    for bits in sizes.rungs:
        out = folder / f"best-{bits}"
        command = [
            sys.executable, "-P", "-m", "ultralowbit", "compress", str(task.model), "--bits", bits, "--effort", "best",
            "--out", str(out), "--device", str(device), *texts, *sizes.best,
        ]  # fmt: skip
        begins, began = not any(folder.glob(f"{out.name}*")), time.perf_counter()
        subprocess.run(command, check=True)
        seconds = time.perf_counter() - began if begins else None  # one that goes on takes less
        report = json.loads((out / "report.json").read_text())
        metrics = {label: report[label]["metrics"] for label in ("original", "packed")}
        rows.append({"bits": bits, "seconds": seconds, "metrics": metrics})
        keep({"rows": rows})


def _small_model(task: Task, sizes: Sizes, scratch: Path) -> tuple[str, str]:
    """The model to compress and a text for it: the user's, or a random one that knows the words of the text."""
    if task.model is not None:
        return task.model, "python-docs"
    model = write_model(scratch / "model", sizes.small_layers, sizes.small)
    return str(model), _random_text(scratch, sizes, sizes.small)


def _random_text(scratch: Path | str, sizes: Sizes, shape: Shape) -> str:
    samples, length = sizes.windows
    words = max(2 * samples * length, sizes.measured) + 1
    return str(write_text(Path(scratch) / "text.txt", words, shape.vocab))


def _windows(source: str, sizes: Sizes) -> list[str]:
    samples, length = sizes.windows
    return [f"calibration.{k}={v}" for k, v in {"source": source, "samples": samples, "length": length}.items()]


RUNS: dict[str, Callable[[Task, torch.device, Path, Keep], None]] = {
    "kernels": kernels, "decode": decode, "compress": solve, "deep": deep, "trained": trained, "eval": measuring,
    "profile": profiled, "tests": suite, "tune": tune, "best": best,
}  # fmt: skip
"""Name of a part of `gpu.PARTS` -> what runs it: (task, device, folder, keep)."""


def main(name: str, folder: str, task: str) -> None:
    """Run a part; a part that is told to end by SIGTERM leaves as one that is interrupted does."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.default_int_handler)
    given = Task(**json.loads(task))
    device = pick_device(given.device)
    try:
        RUNS[name](given, device, Path(folder), lambda result: write_json(Path(folder) / f"{name}.json", result))
    except InputError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main(*sys.argv[1:])
