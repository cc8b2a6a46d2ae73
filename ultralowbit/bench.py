"""What compressing, measuring and writing cost, against what they must cost: `bench pipeline`, `solve`, `tune`, `eval`
and `decode`."""

from __future__ import annotations

import json
import math
import platform
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from copy import deepcopy
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from ultralowbit.eval.fidelity import observe
from ultralowbit.eval.perplexity import batch_windows, perplexity
from ultralowbit.format import Format, Ints, PackedWeight, Planes, Segment, group_count
from ultralowbit.hf import UltraLowBitConfig
from ultralowbit.kernels import cpu
from ultralowbit.kernels.bench import bandwidth, processor, random_weight
from ultralowbit.linear import PackedLinear, swap
from ultralowbit.measure import open_model, pick_dtype
from ultralowbit.model import run_block
from ultralowbit.pipeline import _batched, compress, open_decoder, pick_device
from ultralowbit.recipe import Recipe
from ultralowbit.stats import InputStats, Need, _invert_upper
from ultralowbit.text import InputError
from ultralowbit.tune.view import TrainableLinear


@dataclass(frozen=True)
class Shape:
    """Of a Llama; the default is TinyLlama-1.1B's."""

    hidden: int = 2048
    inter: int = 5632
    heads: int = 32
    kv_heads: int = 4
    vocab: int = 32000

    @classmethod
    def wide(cls, hidden: int) -> Shape:
        """In the default's proportions; `InputError` where heads of 64 do not fill the width."""
        if hidden % 64:
            raise InputError(f"a block {hidden} wide has no whole number of heads: give a multiple of 64")
        return cls(hidden, hidden * 11 // 4, hidden // 64, max(1, hidden // 512))

    @property
    def linears(self) -> dict[str, tuple[int, int]]:
        """Linears of a block -> (out, in)."""
        kv = self.hidden // self.heads * self.kv_heads
        return {
            "self_attn.q_proj": (self.hidden, self.hidden),
            "self_attn.k_proj": (kv, self.hidden),
            "self_attn.v_proj": (kv, self.hidden),
            "self_attn.o_proj": (self.hidden, self.hidden),
            "mlp.gate_proj": (self.inter, self.hidden),
            "mlp.up_proj": (self.inter, self.hidden),
            "mlp.down_proj": (self.hidden, self.inter),
        }


def write_model(
    folder: Path, layers: int, shape: Shape = Shape(), seed: int = 0, segment: Callable[[int], Segment] | None = None
) -> Path:
    """A random Llama in bf16 with a tokenizer whose words are w0, w1, ...; one block is in memory at a time.

    With `segment`, which is told the columns, its Linears are packed: random words and scales, which no weight had.
    """
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, PreTrainedTokenizerFast

    folder.mkdir(parents=True, exist_ok=True)
    config = LlamaConfig(
        architectures=["LlamaForCausalLM"], dtype="bfloat16", hidden_size=shape.hidden, intermediate_size=shape.inter,
        num_hidden_layers=layers, num_attention_heads=shape.heads, num_key_value_heads=shape.kv_heads,
        vocab_size=shape.vocab, max_position_embeddings=2048, tie_word_embeddings=False,
    )  # fmt: skip
    if segment:
        formats = {
            f"model.layers.{i}.{name}": Format((segment(columns),))
            for i in range(layers)
            for name, (_, columns) in shape.linears.items()
        }
        config.quantization_config = UltraLowBitConfig.of(formats).to_dict()
    config.save_pretrained(folder)
    tokenizer = Tokenizer(models.WordLevel({f"w{i}": i for i in range(shape.vocab)}, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)

    generator = torch.Generator().manual_seed(seed)

    def random(rows: int, columns: int) -> Tensor:
        return torch.randn(rows, columns, generator=generator).div_(math.sqrt(columns)).bfloat16()

    def linear(rows: int, columns: int) -> dict[str, Tensor]:
        if segment is None:
            return {"weight": random(rows, columns)}
        return random_weight(Format((segment(columns),)), rows, seed).tensors

    def norm() -> Tensor:
        return torch.ones(shape.hidden, dtype=torch.bfloat16)

    weight_map = {}
    for i in range(layers + 1):
        if i < layers:
            block = f"model.layers.{i}"
            tensors = {
                f"{block}.{name}.{part}": tensor
                for name, size in shape.linears.items()
                for part, tensor in linear(*size).items()
            }
            tensors |= {f"{block}.{name}_layernorm.weight": norm() for name in ("input", "post_attention")}
        else:
            tensors = {"model.embed_tokens.weight": random(shape.vocab, shape.hidden), "model.norm.weight": norm()}
            tensors["lm_head.weight"] = random(shape.vocab, shape.hidden)
        file = f"model-{i + 1:05d}-of-{layers + 1:05d}.safetensors"
        save_file(tensors, folder / file, {"format": "pt"})
        weight_map |= dict.fromkeys(tensors, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def write_text(file: Path, words: int, vocab: int, seed: int = 0) -> Path:
    """Random words that the tokenizer of `write_model` knows, one token each."""
    ids = torch.randint(vocab, (words,), generator=torch.Generator().manual_seed(seed)).tolist()
    file.write_text(" ".join(f"w{i}" for i in ids))
    return file


def pipeline_bench(
    layers: Sequence[int] = (4, 22),
    samples: int = 16,
    length: int = 512,
    recipe: str = "gptq-2bit",
    out: Path | str | None = None,
    json_file: Path | str | None = None,
    shape: Shape = Shape(),
    say: Callable[[str], object] = print,
) -> dict[str, Any]:
    """Compress random models of a few depths, each in a fresh process, and set cost against unavoidable work.

    `out` is the folder for models and outputs, a temporary one unless given. Returns, and writes to `json_file`, what
    `say` is told: bytes, seconds, GB/s.
    """
    result: dict[str, Any] = {
        "shape": asdict(shape), "recipe": recipe, "samples": samples, "length": length, "torch": torch.__version__,
        "machine": platform.machine(), "threads": torch.get_num_threads(), "runs": {},
    }  # fmt: skip
    say(f"{recipe}, {samples} x {length} tokens, {result['threads']} threads, Llama of {shape}")
    with tempfile.TemporaryDirectory() if out is None else nullcontext(out) as folder:
        for depth in layers:
            run = _fresh_run(Path(folder), depth, samples, length, recipe, shape)
            result["runs"][depth] = run
            blocks = sorted(run["block_seconds"])
            say(
                f"{depth:>3} layers: peak memory {run['peak_bytes'] / 1e9:.2f} GB, {run['seconds']:.1f} s; a block "
                f"{statistics.median(blocks):.2f} s ({blocks[0]:.2f} to {blocks[-1]:.2f}), of which solving "
                f"{run['solving_seconds'] / depth:.2f} s; outside blocks {run['seconds'] - sum(blocks):.1f} s"
            )
            if run["unavoidable"]:
                parts = ", ".join(f"{part} {seconds:.2f} s" for part, seconds in run["unavoidable"].items())
                say(
                    f"           unavoidable {run['unavoidable_seconds']:.1f} s: {parts} a block; "
                    f"the run takes {run['ratio']:.2f} times that"
                )
    peaks = [run["peak_bytes"] for run in result["runs"].values()]
    medians = [statistics.median(run["block_seconds"]) for run in result["runs"].values()]
    say(
        f"between depths, peak memory differs by {(max(peaks) - min(peaks)) / 1e6:.0f} MB, the seconds of a block by "
        f"{max(medians) / min(medians) - 1:.0%}"
    )
    result["packing"] = packing_bench()
    say("one thread, GB of fp32 weights a second:")
    for row in result["packing"]:
        say(f"{row['what']:>24}: pack {row['pack']:5.2f}, unpack {row['unpack']:5.2f}")
    if json_file is not None:
        Path(json_file).write_text(json.dumps(result, indent=1) + "\n")
    return result


def _fresh_run(folder: Path, depth: int, samples: int, length: int, recipe: str, shape: Shape) -> dict[str, Any]:
    """Compress in a new process, whose peak memory is then the run's own."""
    model = write_model(folder / f"model-{depth}", depth, shape)
    text = write_text(folder / "text.txt", 2 * samples * length + 1, shape.vocab)
    packed = folder / f"packed-{depth}"
    shutil.rmtree(packed, ignore_errors=True)
    settings = [f"calibration.source={text}", f"calibration.samples={samples}", f"calibration.length={length}"]
    task = {"model": str(model), "out": str(packed), "recipe": recipe, "settings": settings, "shape": asdict(shape)}
    done = subprocess.run(
        [sys.executable, "-m", "ultralowbit.bench", json.dumps(task)], stdout=subprocess.PIPE, text=True, check=True
    )
    shutil.rmtree(model)
    shutil.rmtree(packed)
    return json.loads(done.stdout.splitlines()[-1])


def _run(task: dict[str, Any]) -> dict[str, Any]:
    """What the fresh process does: compress, note the peak, then time the bare products in the same process."""
    recipe = Recipe.load(task["recipe"], task["settings"])
    started = time.perf_counter()
    manifest = compress(task["model"], recipe, task["out"], device="cpu").manifest
    seconds = time.perf_counter() - started
    peak = peak_memory()
    blocks = list(manifest["block_seconds"].values())
    bare = {}
    if manifest["calibration"] is not None:
        bare = unavoidable(Shape(**task["shape"]), recipe.calibration.samples, recipe.calibration.length)
    total = len(blocks) * sum(bare.values())
    return {
        "peak_bytes": peak,
        "seconds": seconds,
        "block_seconds": blocks,
        "solving_seconds": sum(layer["seconds"] for layer in manifest["layers"].values()),
        "unavoidable": bare,
        "unavoidable_seconds": total,
        "ratio": seconds / total if total else None,
    }


def unavoidable(shape: Shape, samples: int, length: int) -> dict[str, float]:
    """Seconds of the large products of one block, as bare torch calls in the shapes in which `compress` makes them.

    Both forward passes, a Hessian for each input group, its factor, and the GPTQ updates as one large product a Linear.
    Softmax, norms, rounding, packing, measuring the error and files are not in it.
    """
    batches, rows, _ = _batched(torch.empty(samples, length)).shape
    tokens = rows * length

    def forward(out: int, m: int) -> float:
        x, weight = torch.randn(tokens, m), torch.randn(out, m)
        return 2 * batches * _best(lambda: F.linear(x, weight))

    def hessian(m: int) -> float:
        x, H = torch.randn(tokens, m), torch.zeros(m, m)
        return batches * _best(lambda: H.addmm_(x.T, x))

    def factor(m: int) -> float:
        H = torch.full((m, m), 1 / m, dtype=torch.float64)
        H.diagonal().add_(1)
        return _best(lambda: _invert_upper(torch.linalg.cholesky_ex(H).L.T))

    def update(out: int, m: int) -> float:
        # by halves: out * m^2 flops in all, half of them in the first product
        done, rest, U = torch.randn(m // 2, out), torch.randn(m // 2, out), torch.randn(m // 2, m // 2)
        return 2 * _best(lambda: rest.addmm_(U.T, done, alpha=-1))

    groups = [shape.hidden, shape.hidden, shape.hidden, shape.inter]  # of q/k/v, o, gate/up, down
    with torch.random.fork_rng(), torch.no_grad():
        return {
            "forward passes": _each(forward, shape.linears.values()),
            "Hessians": _each(hessian, [(m,) for m in groups]),
            "factors": _each(factor, [(m,) for m in groups]),
            "updates": _each(update, shape.linears.values()),
        }


def packing_bench(out: int = 2048, columns: int = 2048) -> list[dict[str, Any]]:
    """GB of fp32 weights a second that one thread packs (from codes) and unpacks, beside a plain copy."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        weight = torch.zeros(out, columns)
        gigabytes = weight.nbytes / 1e9
        copy = gigabytes / _best(weight.clone)
        rows = [{"what": "copy", "pack": copy, "unpack": copy}]
        segments = [Planes(columns, planes, group) for planes in (1, 2) for group in (None, 128)]
        for segment in (*segments, *(Ints(columns, bits, 128) for bits in (2, 3, 4, 8))):
            format = Format((segment,))
            parts = _random_parts(segment, out)
            packed = PackedWeight.encode(format, parts)
            pack = _best(lambda format=format, parts=parts: PackedWeight.encode(format, parts))
            unpack = _best(packed.dequantize)
            rows.append({"what": format.summary, "pack": gigabytes / pack, "unpack": gigabytes / unpack})
        return rows
    finally:
        torch.set_num_threads(threads)


SOLVED = ("gptq-2bit", "sign-1", "sign-2", "ptq161-gptq", "pb-llm", "billm", "arb-rc", "db-llm")
"""Recipes whose `solve` stage is timed; the first is what the others are compared with."""


def solve_bench(
    recipes: Sequence[str] = SOLVED,
    shape: Shape = Shape(),
    repeat: int = 2,
    json_file: Path | None = None,
    say: Callable[[str], object] = print,
) -> list[dict[str, Any]]:
    """Seconds in which the method of each recipe packs the Linears of one block, statistics given, factors included;
    the methods take turns, and the fastest of each counts, of one thread by its own clock."""
    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    generator = torch.Generator().manual_seed(0)
    weights = {name: torch.randn(size, generator=generator) / size[1] ** 0.5 for name, size in shape.linears.items()}
    inputs = {}  # Linears that see the same, by their first: a Hessian for each
    for leader, names in (("q", "qkv"), ("o", "o"), ("gate", ("gate", "up")), ("down", ("down",))):
        members = [name for name in weights if name.split(".")[1].removesuffix("_proj") in names]
        m = weights[members[0]].shape[1]
        inputs[leader] = InputStats(m, needs=Need.HESSIAN | Need.MAGNITUDES), members
        inputs[leader][0].add(torch.randn(2 * m, m, generator=generator) * torch.rand(m, generator=generator))
    methods = {name: Recipe.load(name).solve for name in recipes}
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
    if json_file is not None:
        Path(json_file).write_text(json.dumps({"shape": asdict(shape), "rows": rows}, indent=1) + "\n")
    return rows


class Tuned(NamedTuple):
    """What of a block's packed weights is trained."""

    segment: Callable[[int], Planes | Ints]  # of its columns
    train: set[str]
    scales: Literal["free", "analytic"] = "free"


TUNED: dict[str, Tuned] = {
    "one plane: scale, offset, row": Tuned(lambda m: Planes(m, 1, None, offset=True), {"scale", "offset", "row"}),
    "two planes: scale": Tuned(lambda m: Planes(m, 2), {"scale"}),
    "2-bit integers, g128: scale": Tuned(lambda m: Ints(m, 2, 128), {"scale"}),
    "dual planes, g64: scale": Tuned(lambda m: Planes(m, 2, 64, "01"), {"scale"}),
    "one plane: latent": Tuned(lambda m: Planes(m, 1, None, offset=True), {"latent"}, "analytic"),
    "two planes: latent, scale": Tuned(lambda m: Planes(m, 2), {"latent", "scale"}),
}


def tune_bench(
    length: int = 512,
    batch: int = 2,
    repeat: int = 5,
    shape: Shape = Shape(),
    device: str = "cpu",
    json_file: Path | None = None,
    say: Callable[[str], object] = print,
) -> list[dict[str, Any]]:
    """Seconds of a step of tuning one block, AdamW included, beside a forward and backward pass of the block as it is,
    which makes the gradients of all its weights. Both take turns; the median of the ratios of neighbours counts."""
    where, rows = pick_device(device), []
    with tempfile.TemporaryDirectory() as folder:
        decoder = open_decoder(write_model(Path(folder), 1, replace(shape, vocab=256)), where)
        seen: list[Tensor] = []
        tokens = torch.randint(256, (batch, length), generator=torch.Generator().manual_seed(0))
        (call,) = decoder.block_inputs(iter([tokens]), lambda _, hidden: seen.append(hidden))
        say(
            f"one block of {shape}, {batch} x {length} tokens, {str(decoder.dtype).removeprefix('torch.')} on "
            f"{where.type}, {torch.get_num_threads()} threads"
        )
        with decoder.filled_block(0) as (block, _):
            target = -seen[0]

            def step(block: nn.Module, optimizer: torch.optim.Optimizer | None) -> float:
                started = _now(where)
                for p in block.parameters():
                    p.grad = None
                F.mse_loss(run_block(block, seen[0], call), target).backward()
                if optimizer is not None:
                    optimizer.step()
                return _now(where) - started

            for name, tuned in TUNED.items():
                student = _student(block, tuned)
                trained = [p for p in student.parameters() if p.requires_grad]
                optimizer = torch.optim.AdamW(trained, 1e-5, weight_decay=0, fused=True)
                block.requires_grad_(True)
                step(block, None), step(student, optimizer)
                times = [(step(block, None), step(student, optimizer)) for _ in range(repeat)]
                plain, seconds = (statistics.median(column) for column in zip(*times, strict=True))
                ratio = statistics.median(b / a for a, b in times)
                rows.append({"what": name, "seconds": seconds, "plain": plain, "ratio": ratio})
                say(f"{name:>30}: {seconds:7.3f} s a step, {ratio:.2f} times the plain {plain:.3f} s")
                del student, trained, optimizer
            block.requires_grad_(False)
            for p in block.parameters():
                p.grad = None
    if json_file is not None:
        settings = {"shape": asdict(shape), "length": length, "batch": batch, "device": where.type}
        Path(json_file).write_text(json.dumps(settings | {"rows": rows}, indent=1) + "\n")
    return rows


def _student(block: nn.Module, tuned: Tuned) -> nn.Module:
    """A copy of the block with trainable views of its Linears, packed without care: nothing of it is timed."""
    student = deepcopy(block).requires_grad_(False)
    for name, module in [(name, m) for name, m in student.named_modules() if isinstance(m, nn.Linear)]:
        weight = module.weight.float()
        segment = tuned.segment(module.in_features)
        scale = weight.abs().mean(1, keepdim=True).expand(-1, group_count(segment.columns, segment.group))
        parts = {n: t.to(weight.device) for n, t in _random_parts(segment, module.out_features).items()}
        if isinstance(segment, Ints):
            parts["scale"] = scale
        else:
            factors = (2, -1) if segment.alphabet == "01" else (1, 0.5)
            parts["scale"] = torch.stack([f * scale for f in factors[: segment.planes]])
        if isinstance(segment, Planes) and segment.offset:
            parts["offset"] = torch.zeros_like(scale)
        packed = PackedWeight.encode(Format((segment,)), parts)
        swap(student, name, TrainableLinear(packed, tuned.train, latent=weight, scales=tuned.scales))
    return student


def _now(device: torch.device) -> float:
    """Seconds, with all that the device was asked to do done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def eval_bench(
    model: Path | str | None = None,
    layers: int = 4,
    context: int = 2048,
    tokens: int = 8192,
    repeat: int = 3,
    device: str = "auto",
    json_file: Path | str | None = None,
    shape: Shape = Shape(),
    say: Callable[[str], object] = print,
) -> dict[str, Any]:
    """Perplexity, and divergence between two models, beside the bare forward passes over the same batches.

    `model` is a checkpoint folder, packed or not; without one, a random Llama. Tokens are random; each batch is run
    `repeat` times in turns, and the fastest of each counts. Returns, and writes to `json_file`, what `say` is told.
    """
    where = pick_device(device)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(model) if model else write_model(Path(folder) / "model", layers, shape)
        net = open_model(path, where, pick_dtype(path, where))
    config = net.config.get_text_config()
    context = min(context, config.max_position_embeddings or context)
    count = max(context, tokens // context * context)
    windows = torch.randint(config.vocab_size, (count,), generator=torch.Generator().manual_seed(0)).view(-1, context)

    def timed(f: Callable[[], object]) -> float:
        started = _now(where)
        f()
        return _now(where) - started

    def bare(batch: Tensor, passes: int) -> None:
        with torch.no_grad():
            for _ in range(passes):
                net(batch, use_cache=False)

    seconds = dict.fromkeys(("forward", "perplexity", "two forwards", "divergence"), 0.0)
    for batch in windows.split(batch_windows(context)):
        there, stream = batch.to(where), batch.flatten()
        runs = {
            "forward": partial(bare, there, 1),
            "perplexity": partial(perplexity, net, stream, context=context),
            "two forwards": partial(bare, there, 2),
            "divergence": partial(observe, net, [net], stream, context=context),
        }
        rounds = [{what: timed(run) for what, run in runs.items()} for _ in range(repeat)]
        for what in seconds:
            seconds[what] += min(times[what] for times in rounds)
    result: dict[str, Any] = {
        "model": str(model or f"random Llama of {layers} layers, {shape}"), "tokens": count, "context": context,
        "dtype": str(net.dtype).removeprefix("torch."), "device": str(where), "threads": torch.get_num_threads(),
        "torch": torch.__version__, "seconds": seconds,
        "perplexity_ratio": seconds["perplexity"] / seconds["forward"],
        "divergence_ratio": seconds["divergence"] / seconds["two forwards"],
    }  # fmt: skip
    say(f"{result['model']}: {count} tokens in windows of {context}, {result['dtype']} on {where}")
    say(f"forward passes {seconds['forward']:.2f} s; perplexity takes {result['perplexity_ratio']:.3f} times that")
    say(
        f"forward passes of two models {seconds['two forwards']:.2f} s; their perplexities and divergence take "
        f"{result['divergence_ratio']:.3f} times that"
    )
    if json_file is not None:
        Path(json_file).write_text(json.dumps(result, indent=1) + "\n")
    return result


DECODED: dict[str, Callable[[int], Segment]] = {
    "sign-1": lambda columns: Planes(columns, 1),
    "sign-2-g128": lambda columns: Planes(columns, 2, 128),
    "gptq-2bit": lambda columns: Ints(columns, 2, 128),
}
"""The segments that a recipe of this name makes of a weight."""


def decode_bench(
    layers: int = 22,
    tokens: int = 8,
    rounds: int = 4,
    threads: int = 1,
    shape: Shape = Shape(),
    json_file: Path | str | None = None,
    say: Callable[[str], object] = print,
) -> dict[str, Any]:
    """Tokens a second that random models write on the CPU: in bf16, and packed, exactly and with activations of 8 bits.
    Linears that share an input are multiplied at once.

    The models write `tokens` in turns, `rounds` times after one that warms up; the fastest counts, by the thread's own
    clock where there is one. Peak memory is that of a new process which loads one model and writes.
    """
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
            folders = {name: write_model(Path(temporary) / name, layers, shape, segment=DECODED.get(name))
                       for name in ("bf16", *DECODED)}  # fmt: skip
            peaks = {name: _fresh_peak(folder, threads) for name, folder in folders.items()}
            bytes_of = {name: sum(f.stat().st_size for f in d.glob("*.safetensors")) for name, d in folders.items()}
            nets = {
                name: open_model(folder, torch.device("cpu"), torch.bfloat16, fuse=True)
                for name, folder in folders.items()
            }
        runs = [("bf16", False), *((name, int8) for name in DECODED for int8 in (False, True))]
        seconds: dict[tuple[str, bool], list[float]] = {run: [] for run in runs}
        for turn in range(rounds + 1):
            for name, int8 in runs:
                for module in nets[name].modules():
                    if isinstance(module, PackedLinear):
                        module.int8 = int8
                found = _seconds_a_token(nets[name], tokens, clock)
                seconds[name, int8] += [found] if turn else []
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
            f"{result['read_gbps']:.1f} GB/s would allow; file {bytes_of[name] / 1e6:.0f} MB, peak memory "
            f"{peaks[name] / 1e6:.0f} MB"
        )
    if json_file is not None:
        Path(json_file).write_text(json.dumps(result, indent=1) + "\n")
    return result


def _read_bytes(model: nn.Module) -> int:
    """Bytes of weights that a token reads: all but the embeddings, of which it takes a row."""
    embeddings = {id(p) for p in model.get_input_embeddings().parameters()}
    return sum(t.nbytes for t in (*model.parameters(), *model.buffers()) if id(t) not in embeddings)


def _seconds_a_token(model: nn.Module, tokens: int, clock: Callable[[], float]) -> float:
    """Of `generate` after a prompt of one token."""
    prompt = torch.tensor([[1]])
    fixed = {"do_sample": False, "pad_token_id": 0, "attention_mask": torch.ones_like(prompt)}
    started = clock()
    model.generate(prompt, max_new_tokens=tokens, min_new_tokens=tokens, **fixed)
    return (clock() - started) / tokens


def _fresh_peak(folder: Path, threads: int) -> int:
    """Bytes of the largest resident set of a process that loads a model and writes two tokens."""
    script = (
        "import sys, time, torch; from pathlib import Path; from transformers.utils import logging\n"
        "from ultralowbit import bench\n"
        "logging.disable_progress_bar()\n"
        "torch.set_num_threads(int(sys.argv[2]))\n"
        "model = bench.open_model(Path(sys.argv[1]), torch.device('cpu'), torch.bfloat16, fuse=True)\n"
        "bench._seconds_a_token(model, 2, time.perf_counter)\n"
        "print(bench.peak_memory())"
    )
    command = [sys.executable, "-c", script, str(folder), str(threads)]
    return int(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout.split()[-1])


def _random_parts(segment: Segment, out: int) -> dict[str, Tensor]:
    """What `encode` takes."""
    generator = torch.Generator().manual_seed(0)
    groups = group_count(segment.columns, segment.group)
    if isinstance(segment, Planes):
        bits = torch.randint(2, (segment.planes, out, segment.columns), generator=generator, dtype=torch.uint8)
        return {"bits": bits.bool(), "scale": torch.ones(segment.planes, out, groups)}
    codes = torch.randint(2**segment.bits, (out, segment.columns), generator=generator, dtype=torch.uint8)
    return {"codes": codes, "scale": torch.ones(out, groups), "zero": torch.ones(out, groups)}


def _each(seconds: Callable[..., float], shapes: Iterable[tuple[int, ...]]) -> float:
    """The sum over shapes; each distinct one is timed once."""
    return sum(count * seconds(*shape) for shape, count in Counter(shapes).items())


def _best(f: Callable[[], object], repeat: int = 3) -> float:
    """Seconds of the fastest of a few calls: the others were disturbed."""
    times = []
    for _ in range(repeat):
        started = time.perf_counter()
        f()
        times.append(time.perf_counter() - started)
    return min(times)


def forget_peak_memory() -> bool:
    """Let `peak_memory` count from now on; False where the system cannot."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def peak_memory() -> int:
    """Bytes of this process's largest resident set so far, pages of mapped files included."""
    try:  # unlike getrusage, which starts at the size of the process that forked this one
        status = Path("/proc/self/status").read_text()
        return 1024 * int(re.search(r"VmHWM:\s+(\d+) kB", status)[1])
    except OSError:
        import resource

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else 1024 * peak


if __name__ == "__main__":
    print(json.dumps(_run(json.loads(sys.argv[1]))))
