"""The blocks of one job, one after another."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import asdict
from functools import reduce
from operator import or_
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ultralowbit.checkpoint.activations import Activations
from ultralowbit.checkpoint.job import Job
from ultralowbit.data.calibration import Calibration
from ultralowbit.errors import CheckpointError, FormatError, naming_memory
from ultralowbit.format.weight import PackedWeight
from ultralowbit.methods.statistics import InputStats, Need
from ultralowbit.nn.decoder import BlockCall, Decoder, run_block
from ultralowbit.nn.inputs import InputGroup, input_groups
from ultralowbit.nn.linear import linear_shape
from ultralowbit.pipeline.collect import Original, collect, residual_writers
from ultralowbit.pipeline.quantize import give_weight, quantize_linear
from ultralowbit.pipeline.source import batched
from ultralowbit.progress import OnProgress, Progress
from ultralowbit.recipe import Recipe
from ultralowbit.system import peak_memory, return_free_memory
from ultralowbit.training.blockwise import Streams, train_block

log = logging.getLogger(__name__)


class BlockStream:
    """The blocks of one job: activations take turns in two files, a block is committed when both are on disk.

    With block-wise training or error correction a second stream of activations is that of the original model.
    """

    def __init__(
        self, job: Job, decoder: Decoder, recipe: Recipe, data: Calibration | None, progress: Progress
    ) -> None:
        self.job, self.decoder, self.recipe, self.data, self.progress = job, decoder, recipe, data, progress
        spec = recipe.blockwise
        most = None if spec is None else spec.training.batch  # a block is trained on a batch at a time
        self.tokens = None if data is None else batched(data.tokens, most)  # [batches, batch, length]
        paired = spec is not None or recipe.error_correction is not None
        self.streams = ("activations", "original") if paired and data is not None else ("activations",)
        self.steps = 0 if spec is None else spec.steps(len(self.tokens))  # optimizer steps of a block

    def run(self) -> None:
        """Pack and commit the blocks that no earlier run has committed."""
        state, total = self.job.state, len(self.decoder.blocks)
        self.progress.start("blocks" if self.steps == 0 else "blocks, by steps", total * (1 + self.steps))
        if state["blocks"]:
            self.progress.say(f"going on after block {state['blocks'] - 1}, where the last run stopped")
            self.progress.step(state["blocks"] * (1 + self.steps))
        calls = self._enter() if self.tokens is not None and state["blocks"] < total else None
        for i in range(state["blocks"], total):
            started = time.perf_counter()
            self._block(i, calls and calls[i])
            self._commit(i, time.perf_counter() - started)
            return_free_memory()
            self.progress.step()

    def _commit(self, i: int, seconds: float) -> None:
        """Make block i, and what enters the one after it, what a resumed job starts from."""
        self.decoder.source.check_unchanged()
        state = self.job.state
        state["blocks"] = i + 1
        state["seconds"][self.decoder.block_name(i)] = round(seconds, 3)
        if self.tokens is not None:
            self.job.forget(self._file(i, stream) for stream in self.streams)
            if i + 1 < len(self.decoder.blocks):
                self.job.record(self._file(i + 1, stream) for stream in self.streams)
        self.job.note_memory(peak_memory())
        self.job.commit()

    def _file(self, i: int, stream: str) -> Path:
        return self.job.work / f"{stream}-{i % 2}.bin"

    def _activations(self, i: int, create: bool = False, stream: str = "activations") -> Activations:
        """What enters block i in a stream; its two files take turns."""
        shape = (*self.tokens.shape, self.decoder.config.get_text_config().hidden_size)
        return Activations(self._file(i, stream), shape, self.decoder.dtype, create)

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
        with (
            naming_memory(f"packing {decoder.block_name(i)} of {decoder.source.folder}"),
            decoder.filled_block(i) as (block, stored),
        ):
            linears = decoder.linears(i, self.recipe.ignore)
            tensors = {name: tensor for name, tensor in stored.items() if name.removesuffix(".weight") not in linears}
            inputs = None if call is None else self._activations(i).tensor
            original = self._activations(i, stream="original").tensor if len(self.streams) == 2 else None
            streams = None if self.recipe.blockwise is None else self._streams(i, block, call, inputs, original)
            if original is not None and streams is None and i + 1 < len(decoder.blocks):
                self._run_through(block, call, original, self._activations(i + 1, True, "original"))
            packed = self._pack(i, block, linears, call, inputs, original)
            if streams is not None:
                packed |= self._train(i, block, linears, stored, packed, streams)
            tensors |= {f"{name}.{part}": t.cpu() for name, p in packed.items() for part, t in p.tensors.items()}
            self.job.write_block(i, tensors)
            if inputs is not None and i + 1 < len(decoder.blocks):
                self._run_through(block, call, inputs, self._activations(i + 1, create=True))
            name = decoder.block_name(i)
            layers = {n: state["layers"][n] for n in linears}
            self.progress.say(_block_line(name, layers, state["blockwise"].get(name)))

    @torch.no_grad()
    def _pack(
        self,
        i: int,
        block: nn.Module,
        linears: dict[str, nn.Module],
        call: BlockCall | None,
        inputs: Tensor | None,
        original: Tensor | None,
    ) -> dict[str, PackedWeight]:
        """Pack the Linears of a block in the order of their use; they then hold what the packed bytes mean."""
        packed, recipe = {}, self.recipe
        for name, stats in self._statistics(i, block, linears, call, inputs, original):
            linear, method = linears[name], recipe.method_for(name)
            block_size = recipe.hadamard(linear_shape(linear)[1])
            try:
                packed[name], result = quantize_linear(linear, method, stats, block_size, recipe.error_correction)
            except FormatError as e:
                raise CheckpointError(f"{name} in {self.decoder.source.folder} cannot be packed: {e}") from e
            self.job.state["layers"][name] = result
            if result["fallback"]:
                log.warning("%s: rounded to nearest, because %s", name, result["fallback"])
        return packed

    def _streams(self, i: int, block: nn.Module, call: BlockCall, inputs: Tensor, original: Tensor) -> Streams:
        """What the unpacked block puts out: for the original's activations, and for those of the packed model."""
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

    def _train(
        self,
        i: int,
        block: nn.Module,
        linears: dict[str, nn.Module],
        stored: dict[str, Tensor],
        packed: dict[str, PackedWeight],
        streams: Streams,
    ) -> dict[str, PackedWeight]:
        """Block-wise training; returns the packed weights that it has made better."""
        name, state = self.decoder.block_name(i), self.job.state
        file = self.job.work / f"blockwise-{i}.safetensors"
        weights = {n: stored[f"{n}.weight"] for n in packed}
        within = SubStage(self.progress, self.steps)
        trained, fitted = train_block(
            self.decoder.model, block, weights, packed, streams, self.recipe.blockwise, file, within
        )
        within.step(within.left)  # where training has ended early
        for n, p in trained.items():
            give_weight(linears[n], p.dequantize())
            # the error was that of the codes and scales before
            state["layers"][n] |= {"error": None}
        if fitted is not None:
            state["blockwise"][name] = asdict(fitted)
        for done in self.job.work.glob("blockwise-*.safetensors"):
            if done != file:  # this one a run that is killed before the commit still needs
                done.unlink()
        return trained

    def _statistics(
        self,
        i: int,
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
        early = [g for g in groups if original is not None and self._needs(g) == Need.MAGNITUDES]
        known = {group.names[0]: self._gather(i, block, group, call, original, None) for group in early}
        beside = None if original is None else self._beside(i, block, groups, call, original)
        for group in groups:
            stats = known.get(group.names[0])
            if stats is None and self._needs(group):
                stats = self._gather(i, block, group, call, inputs, beside)
            for name in group.names:
                yield name, stats
        reached = {name for group in groups for name in group.names}
        yield from ((name, None) for name in linears if name not in reached)

    def _beside(
        self, i: int, block: nn.Module, groups: list[InputGroup], call: BlockCall, original: Tensor
    ) -> Original | None:
        """The original block, as `block` still is, where errors are corrected."""
        correction = self.recipe.error_correction
        if correction is None or not any(Need.HESSIAN in self._needs(group) for group in groups):
            return None
        names = [self._local(i, name) for group in groups for name in group.names]
        first = original[0].to(self.decoder.device)
        writers = residual_writers(block, names, call, first) if correction.residual else {}
        return Original(deepcopy(block), original, writers)

    def _gather(
        self, i: int, block: nn.Module, group: InputGroup, call: BlockCall, source: Tensor, beside: Original | None
    ) -> InputStats:
        """What enters the Linears of a group, where `source` enters the block."""
        name = self._local(i, group.names[0])
        linear, needs = block.get_submodule(name), self._needs(group)
        if beside is not None and Need.HESSIAN in needs:
            needs |= Need.ORIGINAL
        width = linear_shape(linear)[1]
        stats = InputStats(width, self._outliers(), linear.weight.device, needs, self.recipe.hadamard(width))
        return collect(block, name, group.calls, call, source, stats, beside)

    def _local(self, i: int, name: str) -> str:
        """The name of a Linear within its block."""
        return name.removeprefix(f"{self.decoder.block_name(i)}.")

    def _needs(self, group: InputGroup) -> Need:
        return reduce(or_, (self.recipe.method_for(name).needs for name in group.names))

    def _outliers(self) -> int:
        clip = self.recipe.calibration.clip_tokens
        return 0 if clip is None else int(self.data.tokens.numel() * (1 - clip))


class SubStage:
    """A stage that is part of another one, in which it has so many steps `left`."""

    def __init__(self, outer: Progress, left: int) -> None:
        self.outer, self.left = outer, left

    def start(self, what: str, total: int) -> None: ...

    def step(self, n: int = 1) -> None:
        self.left -= n
        self.outer.step(n)

    def say(self, line: str) -> None:
        self.outer.say(line)

    def counter(self, what: str) -> OnProgress:
        return self.outer.counter(what)


def _block_line(name: str, layers: dict[str, dict[str, Any]], tuned: dict[str, Any] | None = None) -> str:
    if not layers:
        return f"{name}: all its Linears are skipped"
    errors = [layer["error"] for layer in layers.values() if layer["error"] is not None]
    bits = sum(v["bits_per_weight"] * v["shape"][0] * v["shape"][1] for v in layers.values())
    weights = sum(v["shape"][0] * v["shape"][1] for v in layers.values())
    seconds = sum(layer["seconds"] for layer in layers.values())
    error = f"output error {sum(errors) / len(errors):.2%} mean, {max(errors):.2%} worst, " if errors else ""
    line = f"{name}: {len(layers)} Linears, {error}{bits / weights:.3f} bits per weight, {seconds:.1f} s quantizing"
    return line if tuned is None else f"{line}, tuned from {tuned['before']:.4g} to {tuned['after']:.4g}"
