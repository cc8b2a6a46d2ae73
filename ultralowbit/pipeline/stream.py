"""The blocks of one job, one after another."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from copy import deepcopy
from functools import reduce
from operator import or_
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ultralowbit.checkpoint.activations import Activations, lanes_of
from ultralowbit.checkpoint.job import Job
from ultralowbit.checkpoint.names import expert_of, weight_name
from ultralowbit.checkpoint.packed import named_tensors
from ultralowbit.data.calibration import Calibration
from ultralowbit.errors import CheckpointError, FormatError, naming_memory
from ultralowbit.format.weight import PackedWeight
from ultralowbit.methods.statistics import InputStats, Need
from ultralowbit.nn.calls import BlockCall, run_block
from ultralowbit.nn.decoder import Decoder
from ultralowbit.nn.inputs import InputGroup, input_groups
from ultralowbit.nn.linear import linear_shape, linear_weight
from ultralowbit.pipeline.collect import Original, collect, residual_writers
from ultralowbit.pipeline.experts import Mixture
from ultralowbit.pipeline.quantize import give_weight, quantize_weight
from ultralowbit.pipeline.ranks import Ranks, own_batches
from ultralowbit.pipeline.sensitivity import read_outputs
from ultralowbit.pipeline.source import batched, smaller_batch
from ultralowbit.progress import OnProgress, Progress
from ultralowbit.recipe import Recipe
from ultralowbit.system import peak_memory, return_free_memory
from ultralowbit.training.blockwise import Streams, train_block

log = logging.getLogger(__name__)

Statistics = dict[str, InputStats | None]
"""What enters Linears, by their full names; None where it is not measured."""


class BlockStream:
    """The blocks of one job: activations take turns in two files, a block is committed when both are on disk.

    With block-wise training or error correction a second stream of activations is that of the original model. Each of
    several ranks keeps the activations of its lanes.
    """

    def __init__(
        self, job: Job, decoder: Decoder, recipe: Recipe, data: Calibration | None, progress: Progress, ranks: Ranks,
        instead: Callable[[], Mapping[str, Tensor]], helps: str,
    ) -> None:  # fmt: skip
        """instead: makes what the packed model has in the place of tensors before its blocks, by their state names;
        helps: what to do where memory runs out, see `what_helps`."""
        self.job, self.decoder, self.recipe, self.data, self.progress = job, decoder, recipe, data, progress
        self.ranks, self.instead, self.helps = ranks, instead, helps
        spec = recipe.blockwise
        most = None if spec is None else spec.training.batch  # a block is trained on a batch at a time
        self.tokens = None if data is None else batched(data.tokens, most)  # [batches, batch, length]
        paired = spec is not None or recipe.error_correction is not None
        self.streams = ("activations", "original") if paired and data is not None else ("activations",)
        self.lanes = [] if data is None else lanes_of(len(self.tokens))
        self.own_lanes = ranks.mine(len(self.lanes))
        self.steps = 0 if spec is None else spec.steps(len(self.tokens))  # optimizer steps of a block

    def run(self) -> None:
        """Pack and commit the blocks that no earlier run has committed."""
        state, total = self.job.state, len(self.decoder.blocks)
        if note := smaller_batch(self.recipe):
            self.progress.say(note)
        self.progress.start("blocks" if self.steps == 0 else "blocks, by steps", total * (1 + self.steps))
        if state["blocks"]:
            self.progress.say(f"going on after block {state['blocks'] - 1}, where the last run stopped")
            self.progress.step(state["blocks"] * (1 + self.steps))
        calls = self._enter() if self.tokens is not None and state["blocks"] < total else None
        for i in range(state["blocks"], total):
            started, self.earlier_seconds = time.perf_counter(), 0.0
            self._block(i, calls and calls[i])
            self._commit(i, time.perf_counter() - started + self.earlier_seconds)
            return_free_memory()
            self.progress.step()

    def _commit(self, i: int, seconds: float) -> None:
        """Make block i, and what enters the one after it, what a resumed job starts from."""
        self.decoder.source.check_unchanged()
        state = self.job.state
        state["blocks"] = i + 1
        state["seconds"][self.decoder.block_name(i)] = round(seconds, 3)
        if self.tokens is not None:
            self.job.forget(self._files(i, range(len(self.lanes))))
            if i + 1 < len(self.decoder.blocks):
                for entries in self.ranks.gather(self.job.describe(self._files(i + 1, self.own_lanes))):
                    self.job.state["files"] |= entries
        for nbytes in self.ranks.gather(peak_memory()):
            self.job.note_memory(nbytes)
        self.job.commit()
        self.ranks.wait()  # until then no file is replaced that the last commit names

    def _files(self, i: int, lanes: Iterable[int]) -> list[Path]:
        """The files of some lanes of what enters block i."""
        return [self._activations(i, stream=stream).file(lane) for stream in self.streams for lane in lanes]

    def _activations(self, i: int, create: bool = False, stream: str = "activations") -> Activations:
        """What enters block i in a stream; its two places take turns. With `create`, this rank's lanes of it anew."""
        shape = (*self.tokens.shape, self.decoder.config.get_text_config().hidden_size)
        lanes = self.own_lanes if create else ()
        return Activations(self.job.work / f"{stream}-{i % 2}", shape, self.decoder.dtype, lanes)

    def _enter(self) -> list[BlockCall]:
        """How blocks are called; on a fresh start also what enters block 0."""
        fresh = self.job.state["blocks"] == 0
        own = own_batches(self.own_lanes, self.lanes) if fresh else []
        packed, original = self.streams[:1], self.streams[1:]
        changed = self.instead()
        runs = [(packed, changed), (original, {})] if changed and original else [(self.streams, changed)]
        for streams, instead in runs:
            into = [self._activations(0, True, stream) for stream in streams] if own else []

            def sink(k: int, hidden: Tensor, into: Sequence[Activations] = into) -> None:
                for stream in into:
                    stream[own[k]].copy_(hidden)

            calls = self.decoder.block_inputs(iter(self.tokens[own or [0]]), sink, instead)
        self.ranks.wait()  # rank 0 looks into the first lane of all
        return calls

    def _block(self, i: int, call: BlockCall | None) -> None:
        decoder, state = self.decoder, self.job.state
        with (
            naming_memory(
                f"packing {decoder.block_name(i)} of {decoder.source.folder}",
                self.helps,
            ),
            decoder.filled_block(i) as (block, stored),
        ):
            linears = decoder.linears(i, self.recipe.ignore)
            weights = {weight_name(name) for name in linears}
            tensors = {name: tensor for name, tensor in stored.items() if name not in weights}
            inputs = None if call is None else self._activations(i)
            original = self._activations(i, stream="original") if len(self.streams) == 2 else None
            streams = None if self.recipe.blockwise is None else self._streams(i, block, call, inputs, original)
            if original is not None and streams is None and i + 1 < len(decoder.blocks):
                self._run_through(block, call, original, self._activations(i + 1, True, "original"))
            packed = self._pack(i, block, linears, call, inputs, original)
            if streams is not None:
                packed |= self._train(i, block, linears, stored, packed, streams)
            tensors |= named_tensors(packed)
            # under the names of what is packed: transformers without this package then stops at their shapes, instead
            # of making up the experts' weights
            tensors |= {weight_name(name): torch.empty(0, dtype=torch.uint8) for name in packed if expert_of(name)}
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
        inputs: Activations | None,
        original: Activations | None,
    ) -> dict[str, PackedWeight]:
        """Pack the Linears of a block in the order of their use; they then hold what the packed bytes mean."""
        packed: dict[str, PackedWeight] = {}
        outputs = read_outputs(self.job, i)
        for stats in self._statistics(i, block, linears, call, inputs, original):

            def pack(name: str, stats: Statistics = stats) -> tuple[PackedWeight, dict[str, Any]]:
                return self._pack_linear(name, linears[name], stats[name], outputs.get(name, ()))

            costs = {name: math.prod(linear_shape(linears[name])) for name in stats}
            for name, (weight, result) in self.ranks.solve(costs, pack, self.decoder.device).items():
                give_weight(linears[name], weight.dequantize())
                packed[name] = weight
                self.job.state["layers"][name] = result
                if result["fallback"]:
                    log.warning("%s: rounded to nearest, because %s", name, result["fallback"])
        return packed

    def _pack_linear(
        self, name: str, linear: nn.Module, stats: InputStats | None, outputs: Sequence[Tensor]
    ) -> tuple[PackedWeight, dict[str, Any]]:
        recipe = self.recipe
        block_size = recipe.hadamard(name, linear_shape(linear)[1])
        try:
            weight, method = linear_weight(linear), recipe.method_for(name)
            heard = outputs if stats is not None else ()
            return quantize_weight(
                weight, method, stats, block_size, recipe.error_correction, recipe.output_feedback, heard
            )
        except FormatError as e:
            raise CheckpointError(f"{name} in {self.decoder.source.folder} cannot be packed: {e}") from e

    def _streams(
        self, i: int, block: nn.Module, call: BlockCall, inputs: Activations, original: Activations
    ) -> Streams:
        """What the unpacked block puts out: for the original's activations, and for those of the packed model."""
        y1 = self._activations(i + 1, True, "original")
        self._run_through(block, call, original, y1)
        y2 = self._activations(0, True, "targets")
        self._run_through(block, call, inputs, y2)
        return Streams(call, original, inputs, y1, y2)

    @torch.no_grad()
    def _run_through(self, block: nn.Module, call: BlockCall, inputs: Activations, outputs: Activations) -> None:
        """What leaves the block, of this rank's lanes; all ranks have theirs on disk when it returns."""
        for k in own_batches(self.own_lanes, self.lanes):
            outputs[k].copy_(run_block(block, inputs[k].to(self.decoder.device), call))
        outputs.sync()
        self.ranks.wait()

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
        trained: dict[str, PackedWeight] = {}

        def train() -> tuple[dict[str, Any], float] | None:
            better, fitted = train_block(
                self.decoder.model, block, weights, packed, streams, self.recipe.blockwise, file, within
            )
            trained.update(better)
            return fitted and (fitted.to_dict(), fitted.earlier_seconds)

        fitted = self.ranks.agree(train)
        trained = self.ranks.hand_out(trained, self.decoder.device)
        within.step(within.left)  # where training has ended early
        for n, p in trained.items():
            give_weight(linears[n], p.dequantize())
            state["layers"][n]["trained"] = True
        if fitted is not None:
            state["blockwise"][name], self.earlier_seconds = fitted
        for done in self.job.work.glob("blockwise-*.safetensors"):
            if self.ranks.is_first and done != file:  # this one a run that is killed before the commit still needs
                done.unlink()
        return trained

    def _statistics(
        self,
        i: int,
        block: nn.Module,
        linears: dict[str, nn.Module],
        call: BlockCall | None,
        inputs: Activations | None,
        original: Activations | None,
    ) -> Iterator[Statistics]:
        """The Linears in the order of their use, with what enters them: those that share an input at a time, or a
        projection of a layer's experts. The caller has packed the ones before.

        Magnitudes alone, of which no error is made up for, are those of the original model where it runs along, but
        for experts.
        """
        in_order = [] if inputs is None else self._groups(block, linears, call, inputs)
        mixtures = {group.names[0] for group in in_order} - linears.keys()
        groups = [group for group in in_order if group.names[0] not in mixtures]
        early = [g for g in groups if original is not None and self._needs(g) == Need.MAGNITUDES]
        known = {group.names[0]: self._gather(i, block, group, call, original, None) for group in early}
        beside = None if original is None else self._beside(i, block, groups, call, original)
        reached: set[str] = set()
        for group in in_order:
            name = group.names[0]
            if name in mixtures:
                for experts in self._expert_statistics(i, block, name, linears, call, inputs, beside):
                    reached |= experts.keys()
                    yield experts
                continue
            stats = known.get(name)
            if stats is None and self._needs(group):
                stats = self._gather(i, block, group, call, inputs, beside)
            reached |= {*group.names}
            yield dict.fromkeys(group.names, stats)
        yield dict.fromkeys(name for name in linears if name not in reached)

    def _expert_statistics(
        self,
        i: int,
        block: nn.Module,
        name: str,
        linears: dict[str, nn.Module],
        call: BlockCall,
        inputs: Activations,
        beside: Original | None,
    ) -> Iterator[Statistics]:
        """The same of the experts `name` of a block, a projection at a time."""
        mixture = Mixture(
            block, self._local(i, name), call, inputs, self.lanes, self.ranks, self.decoder.device,
            self.job.work / "experts", beside,
        )  # fmt: skip
        if starved := [expert for expert in range(mixture.experts.count) if mixture.is_starved(expert)]:
            self.progress.say(f"{name}: too few tokens for {_listed(starved)}, measured on all tokens")
        for projection in mixture.experts.projections:
            names = mixture.members(projection, name, linears)
            needs = {e: self.recipe.method_for(n).needs for e, n in names.items()}
            yield {names[e]: None for e in names if not needs[e]}

            def new(expert: int, names: dict[int, str] = names, needs: dict[int, Need] = needs) -> InputStats:
                _, width = linear_shape(linears[names[expert]])
                corrected = beside is not None and Need.HESSIAN in needs[expert]
                return InputStats(
                    width, self._outliers(mixture.seen(expert)), self.decoder.device,
                    needs[expert] | Need.ORIGINAL if corrected else needs[expert],
                    self.recipe.hadamard(names[expert], width), half=self.decoder.autocast,
                )  # fmt: skip

            measured = [e for e in names if needs[e]]
            for stats in mixture.statistics(measured, projection, new):
                yield {names[e]: one for e, one in stats.items()}
        mixture.remove()

    def _groups(
        self, block: nn.Module, linears: dict[str, nn.Module], call: BlockCall, inputs: Activations
    ) -> list[InputGroup]:
        """Which Linears share an input, as rank 0 sees it on the first batch."""
        device = self.decoder.device
        groups = self.ranks.agree(lambda: input_groups(block, linears, call, inputs[0].to(device)))
        return [InputGroup(*group) for group in groups]

    def _beside(
        self, i: int, block: nn.Module, groups: list[InputGroup], call: BlockCall, original: Activations
    ) -> Original | None:
        """The original block, as `block` still is, where errors are corrected."""
        correction = self.recipe.error_correction
        if correction is None or not any(Need.HESSIAN in self._needs(group) for group in groups):
            return None
        names = [self._local(i, name) for group in groups for name in group.names]

        def writers_of() -> dict[str, bool]:
            return residual_writers(block, names, call, original[0].to(self.decoder.device))

        writers = self.ranks.agree(writers_of) if correction.residual else {}
        return Original(deepcopy(block), original, writers)

    def _gather(
        self, i: int, block: nn.Module, group: InputGroup, call: BlockCall, source: Activations, beside: Original | None
    ) -> InputStats:
        """What enters the Linears of a group, where `source` enters the block."""
        name = self._local(i, group.names[0])
        linear, needs = block.get_submodule(name), self._needs(group)
        if beside is not None and Need.HESSIAN in needs:
            needs |= Need.ORIGINAL
        out, width = linear_shape(linear)
        writes = out if Need.ORIGINAL in needs and name in beside.writers else 0

        def new() -> list[InputStats]:
            outliers, hadamard = self._outliers(self.data.tokens.numel()), self.recipe.hadamard(group.names[0], width)
            half = self.decoder.autocast
            return [InputStats(width, outliers, self.decoder.device, needs, hadamard, writes, half)]

        def gather(batches: range, stats: list[InputStats]) -> None:
            collect(block, name, group.calls, call, source, batches, *stats, beside)

        (stats,) = self.ranks.sum_lanes(self.lanes, new, gather)
        return stats

    def _local(self, i: int, name: str) -> str:
        """The name of a Linear within its block."""
        return name.removeprefix(f"{self.decoder.block_name(i)}.")

    def _needs(self, group: InputGroup) -> Need:
        return reduce(or_, (self.recipe.method_for(name).needs for name in group.names))

    def _outliers(self, tokens: int) -> int:
        """How many of so many tokens are clipped."""
        clip = self.recipe.calibration.clip_tokens
        return 0 if clip is None else int(tokens * (1 - clip))


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


def _listed(experts: list[int]) -> str:
    """Experts by their numbers, not more than a line holds."""
    shown = ", ".join(map(str, experts[:8]))
    more = f" and {len(experts) - 8} more" if len(experts) > 8 else ""
    return f"expert{'s' if len(experts) > 1 else ''} {shown}{more}"


def _block_line(name: str, layers: dict[str, dict[str, Any]], tuned: dict[str, Any] | None = None) -> str:
    if not layers:
        return f"{name}: all its Linears are skipped"
    errors = [layer["error"] for layer in layers.values() if layer["error"] is not None]
    bits = sum(v["bits_per_weight"] * v["shape"][0] * v["shape"][1] for v in layers.values())
    weights = sum(v["shape"][0] * v["shape"][1] for v in layers.values())
    seconds = sum(layer["seconds"] for layer in layers.values())
    error = f"output error {sum(errors) / len(errors):.2%} mean, {max(errors):.2%} worst, " if errors else ""
    error += f"{len(errors)} of {len(layers)} measured, " if 0 < len(errors) < len(layers) else ""
    line = f"{name}: {len(layers)} Linears, {error}{bits / weights:.3f} bits per weight, {seconds:.1f} s quantizing"
    return line if tuned is None else f"{line}, tuned from {tuned['before']:.4g} to {tuned['after']:.4g}"
