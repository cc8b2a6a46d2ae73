"""What the model's predictions tell of its Linears, in one pass backwards (gradients.py).

How much they suffer from what packing a Linear loses: with g the gradient at its outputs, E[g g^T] is the Fisher
information of these, and a weight that is off by D moves the predictions by

    KL ~ 1/2 mean (g^T D x)^2,

over tokens (Martens: New insights and perspectives on the natural gradient method, JMLR 2020, section 5). D is what the
method loses against the original's inputs: compensated errors lie where inputs are small, and those of rounding do not.

And which errors of its outputs make up for each other, H_O = E[g g^T] itself, for output_feedback.py.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from ultralowbit.checkpoint.activations import lanes_of
from ultralowbit.checkpoint.job import Job
from ultralowbit.checkpoint.names import natural
from ultralowbit.checkpoint.storage import write_tensors
from ultralowbit.data.calibration import Calibration
from ultralowbit.format.weight import PackedWeight
from ultralowbit.kernels.hadamard import block_hadamard
from ultralowbit.methods.base import Method
from ultralowbit.methods.output_feedback import ROWS
from ultralowbit.methods.statistics import InputStats, Need, SingularHessian
from ultralowbit.nn.calls import products
from ultralowbit.nn.decoder import Decoder
from ultralowbit.nn.inputs import input_groups
from ultralowbit.nn.linear import linear_shape, linear_weight
from ultralowbit.pipeline.collect import collect
from ultralowbit.pipeline.experts import Mixture
from ultralowbit.pipeline.gradients import Backwards, backwards
from ultralowbit.pipeline.ranks import Ranks
from ultralowbit.pipeline.source import packed_linears
from ultralowbit.progress import Progress
from ultralowbit.recipe import Recipe

MEASURED = 2
"""Planes with which sensitivities are measured; others count in proportion to what they lose of a Gaussian weight."""


class Outputs(NamedTuple):
    """What is to become of H_O: `keep(i, matrices)` is called for each block i with those of its Linears that are
    named, by their full names: one after the other of at most ROWS outputs. Measured on the first `windows`."""

    names: Collection[str]
    windows: int
    keep: Callable[[int, dict[str, list[Tensor]]], object]


def measure_predictions(
    job: Job, decoder: Decoder, recipe: Recipe, text: Calibration | None, progress: Progress, ranks: Ranks
) -> None:
    """Put into the job what `allocate` and `output_feedback` need to know, where it is not there yet: measured on the
    first windows of the calibration text."""
    spec, feedback, state = recipe.allocate, recipe.output_feedback, job.state
    costed = 0 if spec is None or "allocation" in state else spec.windows
    heard = 0 if feedback is None or "outputs" in state else feedback.windows
    if not costed and not heard:
        return
    started, linears = time.perf_counter(), packed_linears(decoder, recipe)
    methods, gains, files = {}, {}, []
    if costed:
        method = replace(recipe.quantize, planes=MEASURED, refine=0)
        methods = {name: method for name in linears if recipe.is_allocated(name)}

    def keep(i: int, matrices: dict[str, list[Tensor]]) -> None:
        files.append(_outputs_file(job, i))
        gains.update({name: feedback.gain(parts) for name, parts in matrices.items()})
        if ranks.is_first:
            named = {f"{name}.{k}": H for name, parts in matrices.items() for k, H in enumerate(parts)}
            write_tensors(files[-1], named)

    def kept() -> None:
        job.record(files)

    losses = sensitivities(
        decoder, recipe, methods, text.tokens[: max(costed, heard)], job.work / "allocation",
        progress, ranks, costed,
        Outputs(linears, heard, keep) if heard else None,
    )  # fmt: skip
    if heard:
        state["outputs"] = gains
        ranks.agree(kept)
    if costed:
        state["allocation"] = {"planes": MEASURED, "kl": losses}
    state["seconds"]["allocate"] = round(time.perf_counter() - started, 3)
    job.commit()


def read_outputs(job: Job, i: int) -> dict[str, list[Tensor]]:
    """H_O of the Linears of block i as `Outputs.keep` was given them; nothing where they are not measured."""
    if "outputs" not in job.state:
        return {}
    stored, outputs = load_file(_outputs_file(job, i)), {}
    for key in sorted(stored, key=natural):
        outputs.setdefault(key.rpartition(".")[0], []).append(stored[key])
    return outputs


def _outputs_file(job: Job, i: int) -> Path:
    return job.work / f"outputs-{i}.safetensors"


def sensitivities(
    decoder: Decoder, recipe: Recipe, methods: Mapping[str, Method], tokens: Tensor, scratch: Path,
    progress: Progress, ranks: Ranks, costed: int | None = None, outputs: Outputs | None = None,
) -> dict[str, float]:  # fmt: skip
    """KL in nats a token that each Linear that is reached would cost alone, packed by its method.

    methods: by the full names of the Linears. tokens [windows, length] int64; scratch: the name of files for what
    enters the blocks, which are removed. costed: windows, the first ones, on which this is measured; all by default.
    Each rank runs the windows of its lanes.
    """
    lanes = lanes_of(len(tokens))
    counted = tokens[:costed]
    losses: dict[str, float] = {}
    for one in backwards(decoder, tokens, scratch, progress, ranks):
        linears, prefix = decoder.linears(one.index, recipe.ignore), f"{decoder.block_name(one.index)}."
        wanted = {name: m for name, m in linears.items() if name in methods}
        lost = _lost(one, prefix, wanted, methods, recipe, scratch, ranks) if wanted else {}
        heard = {n: linear_shape(m)[0] for n, m in linears.items() if outputs is not None and n in outputs.names}
        gathered = _Gathered(one, prefix, lost, len(counted), heard, 0 if outputs is None else outputs.windows, {})
        totals = ranks.sum_lanes(lanes, gathered.new, gathered.gather)
        if heard:
            outputs.keep(
                one.index, {n: [part.hessian for part in parts] for n, parts in gathered.by_name(totals).items()}
            )
        of_windows = {int(k): cost for part in ranks.gather(gathered.costs) for k, cost in part.items()}
        for name in lost:
            losses[name] = sum(of_windows[k][name] for k in range(len(counted))) / 2 / counted.numel()
    return losses


class _Gathered(NamedTuple):
    """What is gathered while one block runs backwards: on the first `costed` windows what each Linear costs that loses
    `lost` [out, in], on the first `listened` those of H_O that are `heard`, of so many outputs; by their full names."""

    one: Backwards
    prefix: str
    lost: Mapping[str, Tensor]
    costed: int
    heard: Mapping[str, int]
    listened: int
    costs: dict[int, dict[str, float]]
    """By window, sum (g^T D x)^2 over its tokens."""

    def new(self) -> list[InputStats]:
        """For H_O, of at most ROWS outputs each: what arrives there counts as the inputs of a Linear do."""
        counts = [len(rows) for out in self.heard.values() for rows in torch.arange(out).split(ROWS)]
        return [InputStats(count, 0, self.one.device, Need.HESSIAN, half=self.one.call.autocast) for count in counts]

    def by_name(self, parts: Iterable[InputStats]) -> dict[str, list[InputStats]]:
        """What `new` has made, by the names of the Linears."""
        parts = iter(parts)
        return {name: list(islice(parts, -(-out // ROWS))) for name, out in self.heard.items()}

    def gather(self, windows: range, parts: list[InputStats]) -> None:
        """Run the block backwards on some windows."""
        stats = self.by_name(parts)
        for k in windows:
            costs = self.costs[k] = dict.fromkeys(self.lost, 0.0) if k < self.costed else {}

            def arrived(name: str, x: Tensor, g: Tensor, k: int = k, costs: dict[str, float] = costs) -> None:
                g = g.flatten(0, -2).float()  # [tokens, out]
                if name in costs:
                    with products(x, self.one.call.autocast):
                        moved = x.float() @ self.lost[name].T
                    costs[name] += (g * moved.flatten(0, -2)).sum(1).square().sum().item()
                if name in stats and k < self.listened:
                    for part, rows in zip(stats[name], g.split(ROWS, 1), strict=True):
                        part.add(rows)

            self.one.run(k, self.prefix, {*self.lost, *self.heard}, arrived)


@torch.no_grad()
def _lost(
    one: Backwards, prefix: str, linears: Mapping[str, nn.Module], methods: Mapping[str, Method], recipe: Recipe,
    scratch: Path, ranks: Ranks,
) -> dict[str, Tensor]:  # fmt: skip
    """D [out, in] of each Linear of a block, whose full names begin with `prefix`: what its method loses of the weight,
    in the basis of the inputs as they are."""
    lost = {}
    for stats in _statistics(one, prefix, linears, recipe, scratch, ranks):
        rotated = {name: _rotated(linear_weight(linears[name]), s.hadamard) for name, s in stats.items()}

        def pack(
            name: str, stats: Mapping[str, InputStats] = stats, rotated: Mapping[str, Tensor] = rotated
        ) -> tuple[PackedWeight, None]:
            try:
                return methods[name].quantize(rotated[name], stats[name]), None
            except SingularHessian:
                return methods[name].quantize(rotated[name], None), None

        costs = {name: weight.numel() for name, weight in rotated.items()}
        for name, (packed, _) in ranks.solve(costs, pack, one.device).items():
            lost[name] = _rotated(rotated[name] - packed.dequantize(), stats[name].hadamard)
    return lost


def _statistics(
    one: Backwards, prefix: str, linears: Mapping[str, nn.Module], recipe: Recipe, scratch: Path, ranks: Ranks
) -> Iterator[dict[str, InputStats]]:
    """The inputs of a block's Linears, for those that share one at a time, or for experts."""
    block, call, entering, device = one.block, one.call, one.entering, one.device
    lanes = entering.hidden.lanes

    def of(name: str) -> InputStats:
        _, columns = linear_shape(linears[name])
        return InputStats(columns, 0, device, Need.HESSIAN, recipe.hadamard(name, columns), half=call.autocast)

    for names, calls in ranks.agree(lambda: input_groups(block, dict(linears), call, entering[0].to(device))):
        local = names[0].removeprefix(prefix)
        if names[0] in linears:

            def gather(batches: range, stats: list[InputStats], local: str = local, calls: int = calls) -> None:
                collect(block, local, calls, call, entering, batches, *stats)

            (stats,) = ranks.sum_lanes(lanes, lambda name=names[0]: [of(name)], gather)
            yield dict.fromkeys(names, stats)
            continue
        mixture = Mixture(
            block, local, call, entering, lanes, ranks, device, scratch.with_name(f"{scratch.name}.experts")
        )
        for projection in mixture.experts.projections:
            members = mixture.members(projection, names[0], linears)
            for each in mixture.statistics(list(members), projection, lambda e, n=members: of(n[e])):
                yield {members[expert]: stats for expert, stats in each.items()}
        mixture.remove()


def _rotated(weight: Tensor, hadamard: int | None) -> Tensor:
    """A weight [out, in] in the basis that a Hadamard matrix turns its inputs to, and back: it is its own inverse."""
    return block_hadamard(weight, hadamard) if hadamard else weight
