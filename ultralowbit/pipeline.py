"""compress(): one block after another is read, measured, quantized, packed and committed; never the whole model.

Later blocks see what users will see: after a block is packed, its weights are what the packed bytes decode to, and its
outputs are the next block's inputs.
"""

from __future__ import annotations

import ctypes
import gc
import json
import platform
import shutil
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass
from fnmatch import fnmatch
from functools import cached_property, reduce
from importlib.metadata import version
from operator import or_
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ultralowbit.calibration import Calibration, calibrate
from ultralowbit.checkpoint import MANIFEST, Activations, Job, sha256_file, write_atomic, write_json, write_tensors
from ultralowbit.format import VERSION, Format, FormatError, PackedWeight
from ultralowbit.hf import CheckpointError, UltraLowBitConfig, read_headers
from ultralowbit.hub import open_tokenizer, resolve_model
from ultralowbit.linear import linear_shape
from ultralowbit.methods import Method, Need
from ultralowbit.model import BlockCall, Decoder, run_block
from ultralowbit.progress import Progress, Silent
from ultralowbit.recipe import CalibrationSpec, Distill, Recipe
from ultralowbit.stats import InputStats, SingularHessian, relative_error
from ultralowbit.text import InputError
from ultralowbit.tune.block import Streams, tune_block
from ultralowbit.tune.distill import distill
from ultralowbit.tune.prepare import prepare

BATCH_TOKENS = 2048
"""Tokens that run through a block at a time: enough to keep the products busy, little enough to keep them in memory."""

_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".gguf", ".onnx")
_NOT_CARRIED = {"config.json", "README.md", "model.safetensors.index.json", ".gitattributes"}
_MEASURED = ("eval*.json", "report.*")  # of the original, and not of what is made from it


@dataclass(frozen=True)
class Compressed:
    """What `compress` leaves behind: the folder and its manifest."""

    folder: Path
    manifest: dict[str, Any]

    @property
    def fallbacks(self) -> dict[str, str]:
        """Linears that were rounded to nearest because their statistics failed, and why."""
        return {name: layer["fallback"] for name, layer in self.manifest["layers"].items() if layer["fallback"]}


def pick_device(device: str) -> torch.device:
    """`auto` is cuda where there is one; raises `InputError` for a device that torch cannot use here."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        found = torch.device(device)
        torch.empty(0, device=found)
    except (RuntimeError, AssertionError) as e:
        raise InputError(f"device {device!r} cannot be used here ({str(e).splitlines()[0]}): try --device cpu") from e
    return found


def open_decoder(folder: Path, device: torch.device, trust_remote_code: bool = False) -> Decoder:
    """The model on meta, ready to stream; blocks run in fp32 on a CPU and in the checkpoint's dtype elsewhere."""
    decoder = Decoder(folder, torch.float32, device, trust_remote_code)
    if device.type != "cpu":
        decoder = Decoder(folder, decoder.config.dtype or torch.float32, device, trust_remote_code)
    return decoder


def window_length(spec: CalibrationSpec, decoder: Decoder) -> int:
    """The length of windows that is asked for, cut to the model's positions."""
    positions = getattr(decoder.config.get_text_config(), "max_position_embeddings", None)
    return min(spec.length, positions or spec.length)


def packed_formats(decoder: Decoder, recipe: Recipe) -> dict[str, tuple[Format, tuple[int, int]]]:
    """Format and (out, in) of every Linear that the recipe packs, as expected before any data is seen: where the choice
    of weights depends on data, the packed result may need more room."""
    found = {}
    for i in range(len(decoder.blocks)):
        for name, module in decoder.linears(i, recipe.skip).items():
            shape = linear_shape(module)
            found[name] = (recipe.method_for(name).format(shape[1]), shape)
    if not found:
        raise InputError(f"recipe {recipe.name} skips every Linear of the model: nothing would be compressed")
    for override in recipe.overrides:
        if not any(recipe.method_for(name) is override.solve for name in found):
            raise InputError(
                f"the override {override.match!r} matches no Linear of the model, such as {next(iter(found))}"
            )
    return found


def compress(
    model: str,
    recipe: Recipe,
    out: Path | str,
    *,
    device: str = "auto",
    restart: bool = False,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> Compressed:
    """Compress a local folder or hub model into the packed checkpoint `out`.

    Killed at any moment, the same call goes on from the last committed block and ends with the same bytes; once
    `out` is there it returns at once. Raises `InputError`, `CheckpointError` or `DiskFull` in one sentence; `out` is
    then untouched.
    """
    progress = progress or Silent()
    where = pick_device(device)
    folder = resolve_model(model)
    decoder = open_decoder(folder, where, trust_remote_code)
    formats = packed_formats(decoder, recipe)
    stages = (recipe.prepare, recipe.tune, recipe.distill)
    needs_data = any(stages) or any(recipe.method_for(name).needs is not Need.NOTHING for name in formats)
    labels = {"name", "summary"} if needs_data else {"name", "summary", "calibration"}
    fingerprint = {
        "model": _hash_model(decoder, progress),
        "recipe": recipe.model_dump(mode="json", exclude=labels),
        "calibration": {},
        "software": {"ultralowbit": version("ultralowbit"), "torch": torch.__version__, "format": VERSION},
        "compute": {"device": where.type, "dtype": str(decoder.dtype).removeprefix("torch.")},
    }
    texts = _Texts(folder, decoder, trust_remote_code, progress)
    data = texts.read(recipe.calibration) if needs_data else None
    if data is not None:
        fingerprint["calibration"] = {"sha256": data.sha256}
    training = {
        stage: data if spec.data is None else texts.read(spec.data)
        for stage, spec in (("prepare", recipe.prepare), ("distill", recipe.distill))
        if spec is not None
    }
    fingerprint["calibration"] |= {f"{stage} sha256": text.sha256 for stage, text in training.items()}

    job = Job.open(Path(out).expanduser(), fingerprint, restart)
    if job is None:
        target = Path(out).expanduser()
        progress.say(f"{target} is already what this command makes")
        return Compressed(target, json.loads((target / MANIFEST).read_text()))
    try:
        if recipe.prepare is not None:
            first = recipe.model_copy(update={"prepare": None, "distill": None})
            options = {"device": device, "trust_remote_code": trust_remote_code, "progress": progress}
            started = time.perf_counter()
            prepared, job.state["prepare"] = prepare(
                lambda folder: compress(model, first, folder, **options).folder, training["prepare"].tokens,
                recipe.prepare, decoder.config.dtype, job.work / "prepare", where, trust_remote_code, progress,
            )  # fmt: skip
            job.state["seconds"].setdefault("prepare", round(time.perf_counter() - started, 3))
            decoder = open_decoder(prepared, where, trust_remote_code)
        _Run(job, decoder, recipe, data, progress).blocks()
        if recipe.distill is not None:
            _distill(job, folder, decoder, recipe.distill, training["distill"].tokens, trust_remote_code, progress)
        manifest = _finish(job, model, folder, decoder, recipe, data)
        job.publish()
    finally:
        job.close()
    return Compressed(job.out, manifest)


def _hash_model(decoder: Decoder, progress: Progress) -> dict[str, str]:
    folder = decoder.source.folder
    names = ["config.json", *decoder.source.files]
    progress.start("hashing the model", sum((folder / name).stat().st_size for name in names))
    return {name: sha256_file(folder / name, progress.step) for name in names}


class _Texts:
    """Reads texts in the tokens of a model, with the tokenizer opened once."""

    def __init__(self, folder: Path, decoder: Decoder, trust_remote_code: bool, progress: Progress) -> None:
        self.folder, self.decoder, self.progress = folder, decoder, progress
        self.trust_remote_code = trust_remote_code

    @cached_property
    def tokenizer(self) -> Any:
        return open_tokenizer(self.folder, self.trust_remote_code)

    def read(self, spec: CalibrationSpec) -> Calibration:
        """The windows that a recipe asks for; `InputError` where text, tokenizer and model do not go together."""
        length = window_length(spec, self.decoder)
        if length < spec.length:
            self.progress.say(f"windows of {spec.source} cut from {spec.length} to the model's {length} positions")
        tokenizer = self.tokenizer
        self.progress.start(f"reading {spec.source}", 1)
        done = 0

        def step(now: int, total: int) -> None:
            nonlocal done
            if not done:
                self.progress.start(f"text from {spec.source}", total)
            self.progress.step(now - done)
            done = now

        data = calibrate(
            spec.source, tokenizer, samples=spec.samples, length=length, seed=spec.seed, model_path=self.folder,
            device=self.decoder.device, progress=step,
        )  # fmt: skip
        rows = self.decoder.model.get_input_embeddings().weight.shape[0]
        if data.tokens.max() >= rows:
            raise InputError(
                f"the tokenizer makes token {data.tokens.max().item()}, the model has {rows}: put the tokenizer files "
                "that belong to the model into its folder"
            )
        return data


class _Run:
    """The blocks of one job: activations ping-pong between two files, a block is committed when both are on disk.

    With block-wise tuning a second stream of activations is that of the original model.
    """

    def __init__(
        self, job: Job, decoder: Decoder, recipe: Recipe, data: Calibration | None, progress: Progress
    ) -> None:
        self.job, self.decoder, self.recipe, self.data, self.progress = job, decoder, recipe, data, progress
        most = None if recipe.tune is None else recipe.tune.training.batch  # a block is tuned on a batch at a time
        self.tokens = None if data is None else _batched(data.tokens, most)  # [batches, batch, length]
        self.streams = ("activations",) if recipe.tune is None else ("activations", "original")
        self.tuning = 0 if recipe.tune is None else recipe.tune.steps(len(self.tokens))  # steps a block

    def blocks(self) -> None:
        state, total = self.job.state, len(self.decoder.blocks)
        self.progress.start("blocks" if self.tuning == 0 else "blocks, by steps", total * (1 + self.tuning))
        if state["blocks"]:
            self.progress.say(f"going on after block {state['blocks'] - 1}, where the last run stopped")
            self.progress.step(state["blocks"] * (1 + self.tuning))
        calls = self._enter() if self.tokens is not None and state["blocks"] < total else None
        for i in range(state["blocks"], total):
            started = time.perf_counter()
            self._block(i, calls and calls[i])
            state["blocks"] = i + 1
            state["seconds"][self.decoder.block_name(i)] = round(time.perf_counter() - started, 3)
            self.job.commit()
            _return_free_memory()
            self.progress.step()

    def _activations(self, i: int, create: bool = False, stream: str = "activations") -> Activations:
        """What enters block i in a stream; its two files take turns."""
        hidden = self.decoder.config.get_text_config().hidden_size
        shape = (*self.tokens.shape, hidden)
        return Activations(self.job.work / f"{stream}-{i % 2}.bin", shape, self.decoder.dtype, create)

    def _enter(self) -> list[BlockCall]:
        """How blocks are called; on a fresh start also what enters block 0."""
        fresh = self.job.state["blocks"] == 0
        into = [self._activations(0, True, stream).tensor for stream in self.streams] if fresh else []
        batches = self.tokens if fresh else self.tokens[:1]

        def sink(k: int, hidden: Tensor) -> None:
            for stream in into:
                stream[k] = hidden.cpu()

        return self.decoder.block_inputs(iter(batches), sink)

    def _block(self, i: int, call: BlockCall | None) -> None:
        decoder, state = self.decoder, self.job.state
        with decoder.filled_block(i) as (block, stored):
            linears = decoder.linears(i, self.recipe.skip)
            tensors = {name: tensor for name, tensor in stored.items() if name.removesuffix(".weight") not in linears}
            inputs = None if call is None else self._activations(i).tensor
            streams = None if self.recipe.tune is None else self._streams(i, block, call, inputs)
            packed = self._solve(block, linears, call, inputs, streams and streams.original)
            if streams is not None:
                packed = self._tune(i, block, linears, stored, packed, streams)
            tensors |= {f"{name}.{part}": t.cpu() for name, p in packed.items() for part, t in p.tensors.items()}
            write_tensors(self.job.shards / self.job.shard_name(i, len(decoder.blocks) + 1), tensors)
            if inputs is not None and i + 1 < len(decoder.blocks):
                outputs = self._activations(i + 1, create=True)
                self._run_through(block, call, inputs, outputs)
            name = decoder.block_name(i)
            tuned = state["tuning"].get(name)
            self.progress.say(_block_line(name, {n: state["layers"][n] for n in linears}, tuned))

    @torch.no_grad()
    def _solve(
        self,
        block: nn.Module,
        linears: dict[str, nn.Module],
        call: BlockCall | None,
        inputs: Tensor | None,
        original: Tensor | None,
    ) -> dict[str, PackedWeight]:
        """Pack the Linears of a block in the order of their use; they then hold what the packed bytes mean."""
        found = {}
        for name, stats in self._statistics(block, linears, call, inputs, original):
            try:
                found[name], result = quantize_linear(linears[name], self.recipe.method_for(name), stats)
            except FormatError as e:
                raise CheckpointError(f"{name} in {self.decoder.source.folder} cannot be packed: {e}") from e
            self.job.state["layers"][name] = result
            if result["fallback"]:
                self.progress.say(f"WARNING {name}: rounded to nearest, because {result['fallback']}")
        return found

    def _streams(self, i: int, block: nn.Module, call: BlockCall, inputs: Tensor) -> Streams:
        """What the unpacked block puts out: for the original's activations, and for those of the packed model."""
        original = self._activations(i, stream="original").tensor
        y1 = self._activations(i + 1, True, "original")
        self._run_through(block, call, original, y1)
        y2 = self._activations(0, True, "targets")
        self._run_through(block, call, inputs, y2)
        return Streams(call, original, inputs, y1.tensor, y2.tensor)

    @torch.no_grad()
    def _run_through(self, block: nn.Module, call: BlockCall, inputs: Tensor, outputs: Activations) -> None:
        for k, batch in enumerate(inputs):
            outputs.tensor[k] = run_block(block, batch.to(self.decoder.device), call).cpu()
        outputs.sync()

    def _tune(
        self,
        i: int,
        block: nn.Module,
        linears: dict[str, nn.Module],
        stored: dict[str, Tensor],
        packed: dict[str, PackedWeight],
        streams: Streams,
    ) -> dict[str, PackedWeight]:
        name, state = self.decoder.block_name(i), self.job.state
        file = self.job.work / f"tuning-{i}.safetensors"
        weights = {n: stored[f"{n}.weight"] for n in packed}
        within = _Within(self.progress, self.tuning)
        tuned, fitted = tune_block(self.decoder.model, block, weights, packed, streams, self.recipe.tune, file, within)
        within.step(within.left)  # where training has ended early
        for n, p in tuned.items():
            give_weight(linears[n], p.dequantize())
            # the error was that of the codes and scales before
            state["layers"][n] |= {"error": None}
        state["tuning"][name] = asdict(fitted)
        for done in self.job.work.glob("tuning-*.safetensors"):
            if done != file:  # this one a run that is killed before the commit still needs
                done.unlink()
        return packed | tuned

    def _statistics(
        self,
        block: nn.Module,
        linears: dict[str, nn.Module],
        call: BlockCall | None,
        inputs: Tensor | None,
        original: Tensor | None,
    ) -> Iterator[tuple[str, InputStats | None]]:
        """The Linears in the order of their use, each with what enters it: the caller has packed the ones before.

        Magnitudes alone, of which no error is made up for, are those of the original model where it runs along.
        """
        groups = [] if inputs is None else input_groups(block, linears, call, inputs[0].to(self.decoder.device))

        def gather(group: InputGroup, source: Tensor) -> InputStats:
            return collect(
                block, linears[group.names[0]], group.calls, call, source, self._needs(group), self._outliers()
            )

        early = [g for g in groups if original is not None and self._needs(g) == Need.MAGNITUDES]
        known = {group.names[0]: gather(group, original) for group in early}
        for group in groups:
            stats = known.get(group.names[0])
            if stats is None and self._needs(group):
                stats = gather(group, inputs)
            for name in group.names:
                yield name, stats
        reached = {name for group in groups for name in group.names}
        yield from ((name, None) for name in linears if name not in reached)

    def _needs(self, group: InputGroup) -> Need:
        return reduce(or_, (self.recipe.method_for(name).needs for name in group.names))

    def _outliers(self) -> int:
        clip = self.recipe.calibration.clip_tokens
        return 0 if clip is None else int(self.data.tokens.numel() * (1 - clip))


class _Within:
    """A stage that is part of another one, in which it has so many steps `left`."""

    def __init__(self, outer: Progress, left: int) -> None:
        self.outer, self.left = outer, left

    def start(self, what: str, total: int) -> None: ...

    def step(self, n: int = 1) -> None:
        self.left -= n
        self.outer.step(n)

    def say(self, line: str) -> None:
        self.outer.say(line)


def _return_free_memory() -> None:
    """Give freed pages back to the system: glibc keeps those of blocks below 32 MB, and fragments would add up over the
    layers."""
    gc.collect()
    with suppress(OSError, AttributeError):  # another C library
        ctypes.CDLL(None).malloc_trim(0)


def _batched(tokens: Tensor, most: int | None = None) -> Tensor:
    """[samples, length] -> [batches, batch, length], all batches of one shape: blocks are called alike for each. `most`
    is in samples, by default what makes `BATCH_TOKENS`."""
    samples, length = tokens.shape
    fits = most or max(1, BATCH_TOKENS // length)
    batch = max(b for b in range(1, min(fits, samples) + 1) if samples % b == 0)
    return tokens.view(-1, batch, length)


class InputGroup(NamedTuple):
    """Linears that are given the same tensor, and how often a forward pass calls the first of them."""

    names: list[str]
    calls: int


def input_groups(block: nn.Module, linears: dict[str, nn.Module], call: BlockCall, hidden: Tensor) -> list[InputGroup]:
    """Which Linears of a block share an input, in the order of use, seen by running it on hidden [batch, length, d]."""
    seen: list[tuple[Tensor, list[str]]] = []  # holding the tensors keeps their identities apart
    calls: Counter[str] = Counter()

    def note(name: str, x: Tensor) -> None:
        calls[name] += 1
        if calls[name] == 1:
            names = next((names for tensor, names in seen if tensor is x), None)
            if names is None:
                seen.append((x, [name]))
            else:
                names.append(name)

    with ExitStack() as hooks:
        for name, module in linears.items():
            handle = module.register_forward_pre_hook(lambda _, args, name=name: note(name, args[0]))
            hooks.callback(handle.remove)
        run_block(block, hidden, call)
    return [InputGroup(names, calls[names[0]]) for _, names in seen]


class _Enough(Exception):
    """The Linear has seen its input: the rest of the forward pass is not needed."""


def collect(
    block: nn.Module,
    linear: nn.Module,
    calls: int,
    call: BlockCall,
    inputs: Tensor,
    needs: Need = Need.HESSIAN,
    outliers: int = 0,
) -> InputStats:
    """What is needed to know of that which enters a Linear, of a block that is run on inputs [batches, batch, length,
    d] up to that Linear.

    It is gathered when the Linears before it are packed, as `true_sequential` does in GPTQ's code: since each pass ends
    at the Linear, all of a block's groups together cost little more than one whole forward pass.
    """
    device = linear.weight.device
    stats = InputStats(linear_shape(linear)[1], outliers, device, needs)
    left = 0

    def before(module: nn.Module, args: tuple[Any, ...]) -> None:
        nonlocal left
        stats.add(args[0])
        left -= 1
        if left == 0:
            raise _Enough

    handle = linear.register_forward_pre_hook(before)
    try:
        for batch in inputs:
            left = calls
            with suppress(_Enough):
                run_block(block, batch.to(device), call)
    finally:
        handle.remove()
    return stats


def quantize_linear(module: nn.Module, method: Method, stats: InputStats | None) -> tuple[PackedWeight, dict[str, Any]]:
    """Pack one Linear and give it the weight that the packed bytes mean.

    Statistics that cannot be used, or none where some are needed, fall back to round-to-nearest, and that is said in
    the result's `fallback`. `error` is known where there is a Hessian.
    """
    started = time.perf_counter()
    weight = module.weight.detach().float()
    weight = weight.T.contiguous() if isinstance(module, Conv1D) else weight
    fallback = None
    if method.needs and (stats is None or stats.count == 0):
        fallback, stats = "no calibration token reached it", None
    try:
        packed = method.quantize(weight, stats)
    except SingularHessian as e:
        fallback = str(e)
        packed = method.quantize(weight, None)
    dense = packed.dequantize()
    measured = stats and Need.HESSIAN in stats.needs and not fallback
    error = relative_error(weight, dense, stats.hessian) if measured else None
    give_weight(module, dense)
    return packed, {
        "shape": list(packed.shape),
        "format": packed.format.summary,
        "layout": packed.format.to_dict(),
        "bits_per_weight": packed.bits_per_weight,
        "error": error,
        "fallback": fallback,
        "notes": list(stats.notes) if stats else [],
        "seconds": round(time.perf_counter() - started, 3),
    }


@torch.no_grad()
def give_weight(module: nn.Module, dense: Tensor) -> None:
    """Put a weight [out, in] into a Linear or Conv1D."""
    module.weight.copy_(dense.T if isinstance(module, Conv1D) else dense)


def _block_line(name: str, layers: dict[str, dict[str, Any]], tuned: dict[str, Any] | None = None) -> str:
    if not layers:
        return f"{name}: all its Linears are skipped"
    errors = [layer["error"] for layer in layers.values() if layer["error"] is not None]
    bits = sum(v["bits_per_weight"] * v["shape"][0] * v["shape"][1] for v in layers.values())
    weights = sum(v["shape"][0] * v["shape"][1] for v in layers.values())
    seconds = sum(layer["seconds"] for layer in layers.values())
    error = f"output error {sum(errors) / len(errors):.2%} mean, {max(errors):.2%} worst, " if errors else ""
    found = f"{name}: {len(layers)} Linears, {error}{bits / weights:.3f} bits per weight, {seconds:.1f} s solving"
    return found if tuned is None else f"{found}, tuned from {tuned['before']:.4g} to {tuned['after']:.4g}"


def _distill(
    job: Job,
    folder: Path,
    decoder: Decoder,
    spec: Distill,
    tokens: Tensor,
    trust_remote_code: bool,
    progress: Progress,
) -> None:
    """Train the packed model as a whole, with the model in `folder` as teacher; its shards are then written again."""
    distilled, state, started = job.work / "distilled", job.state, time.perf_counter()
    if "distill" not in state:
        blocks = len(decoder.blocks)
        file_of = {name: job.shard_name(i, blocks + 1) for i in range(blocks) for name in decoder.linears(i)}
        stored = {file: load_file(job.shards / file) for file in dict.fromkeys(file_of.values())}
        packed = {}
        for name, layer in state["layers"].items():
            format, shape, tensors = Format.from_dict(layer["layout"]), tuple(layer["shape"]), stored[file_of[name]]
            packed[name] = PackedWeight(format, shape, {t: tensors[f"{name}.{t}"] for t in format.tensors(*shape)})
        weights = decoder.read([f"{name}.weight" for name in packed])
        trained, fitted = distill(
            folder, {name: weights[f"{name}.weight"] for name in packed}, packed, tokens, spec,
            job.work / "distill.safetensors", decoder.device, trust_remote_code, progress,
        )  # fmt: skip
        for name, p in trained.items():
            stored[file_of[name]] |= {f"{name}.{part}": t.cpu() for part, t in p.tensors.items()}
            state["layers"][name] |= {"error": None}
        shutil.rmtree(distilled, ignore_errors=True)
        distilled.mkdir()
        for file, tensors in stored.items():
            write_tensors(distilled / file, tensors)
        state["distill"] = asdict(fitted)
        state["seconds"]["distill"] = round(time.perf_counter() - started, 3)
        job.commit()
    for path in distilled.glob("*.safetensors"):  # a kill in between leaves the rest to the next run
        path.replace(job.shards / path.name)


def _finish(
    job: Job,
    model: str,
    folder: Path,
    decoder: Decoder,
    recipe: Recipe,
    data: Calibration | None,
) -> dict[str, Any]:
    """Everything but the blocks: the other tensors, index, config, tokenizer, recipe and manifest."""
    total = len(decoder.blocks) + 1
    shards = {i: job.shards / job.shard_name(i, total) for i in range(total)}
    write_tensors(shards[total - 1], decoder.read(decoder.names_outside_blocks()))
    weight_map, size = {}, 0
    for path in shards.values():
        for name, spec in read_headers([path]).items():
            weight_map[name] = path.name
            size += torch.Size(spec.shape).numel() * spec.dtype.itemsize
    write_json(
        job.shards / "model.safetensors.index.json", {"metadata": {"total_size": size}, "weight_map": weight_map}
    )
    config = decoder.config.to_dict()
    config.pop("_name_or_path", None)  # the same run writes the same bytes wherever its model lies
    config["quantization_config"] = UltraLowBitConfig.of(
        {name: Format.from_dict(layer["layout"]) for name, layer in job.state["layers"].items()}, recipe.name
    ).to_dict()
    config["architectures"] = config.get("architectures") or [type(decoder.model).__name__]
    write_json(job.shards / "config.json", config)
    for path in sorted(folder.iterdir()):
        left = path.name in _NOT_CARRIED or any(fnmatch(path.name, pattern) for pattern in _MEASURED)
        if path.is_file() and not left and not path.name.endswith(_WEIGHTS):
            write_atomic(job.shards / path.name, path.read_bytes())
    command = "# ultralowbit compress MODEL --recipe recipe.yaml --out DIR\n"  # no paths: the same run, the same bytes
    write_atomic(job.shards / "recipe.yaml", (command + recipe.to_yaml()).encode())
    manifest = {
        "fingerprint": job.state["fingerprint"],
        "model": model,
        "recipe": recipe.name,
        "calibration": None
        if data is None
        else {
            **recipe.calibration.model_dump(),
            "length": data.tokens.shape[1],
            "tokens": data.tokens.numel(),
            "sha256": data.sha256,
        },
        "layers": job.state["layers"],
        "block_seconds": job.state["seconds"],
        **{stage: job.state[stage] for stage in ("prepare", "tuning", "distill") if job.state.get(stage)},
        "left_out": decoder.unused_keys,
        "environment": environment(decoder.device),
        "files": {path.name: sha256_file(path) for path in sorted(job.shards.iterdir()) if path.name != MANIFEST},
    }
    write_json(job.shards / MANIFEST, manifest)
    return manifest


def environment(device: torch.device) -> dict[str, Any]:
    """Versions and hardware that a result may depend on."""
    packages = ("ultralowbit", "torch", "transformers", "safetensors", "accelerate", "numpy")
    return {
        "python": sys.version.split()[0],
        "platform": platform.platform(),
        "machine": platform.machine(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "threads": torch.get_num_threads(),
        **{name: version(name) for name in packages},
    }
