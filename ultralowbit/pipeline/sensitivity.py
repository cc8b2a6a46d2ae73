"""How much the model's predictions suffer from what packing a Linear loses, to second order in that loss.

With g the gradient of log p(y) with respect to the outputs of a Linear, y drawn from the model's own predictions, E[g
g^T] is the Fisher information of these outputs, and a weight that is off by D moves the predictions by

    KL ~ 1/2 mean (g^T D x)^2,

over tokens (Martens: New insights and perspectives on the natural gradient method, JMLR 2020, section 5). D is what the
method loses against the original's inputs: compensated errors lie where inputs are small, and those of rounding do not.

The model is never in memory as a whole: its blocks run forwards, what enters each is kept in one file, and then they
run backwards in turn.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ultralowbit.checkpoint.activations import Activations, lanes_of
from ultralowbit.format.transform import block_hadamard
from ultralowbit.format.weight import PackedWeight
from ultralowbit.methods.base import Method
from ultralowbit.methods.statistics import InputStats, Need, SingularHessian
from ultralowbit.nn.decoder import BlockCall, Decoder, run_block
from ultralowbit.nn.inputs import input_groups
from ultralowbit.nn.linear import linear_shape, linear_weight
from ultralowbit.pipeline.collect import collect
from ultralowbit.pipeline.experts import Mixture
from ultralowbit.pipeline.ranks import Ranks, own_batches
from ultralowbit.progress import OnProgress
from ultralowbit.recipe import Recipe


def sensitivities(
    decoder: Decoder, recipe: Recipe, methods: Mapping[str, Method], tokens: Tensor, scratch: Path, step: OnProgress,
    ranks: Ranks,
) -> dict[str, float]:  # fmt: skip
    """KL in nats a token that each Linear that is reached would cost alone, packed by its method.

    methods: by the full names of the Linears. tokens [windows, length] int64; scratch: the name of files for what
    enters the blocks, which are removed. Each rank runs the windows of its lanes. Calls `step(done, total)` after each
    of the two passes through a block.
    """
    total = 2 * len(decoder.blocks)
    lanes = lanes_of(len(tokens))
    own = own_batches(ranks.mine(len(lanes)), lanes)
    calls, hidden = _forwards(decoder, tokens, scratch, own, ranks, lambda i: step(i + 1, total))
    gradient = _after_blocks(decoder, tokens, hidden, own)
    losses: dict[str, float] = {}
    for i in reversed(range(len(decoder.blocks))):
        with decoder.filled_block(i) as (block, _):
            block.requires_grad_(False)
            wanted = {name: m for name, m in decoder.linears(i, recipe.ignore).items() if name in methods}
            prefix = f"{decoder.block_name(i)}."
            entering = _Depth(hidden, i)
            lost = _lost(block, prefix, wanted, methods, calls[i], entering, recipe, decoder.device, ranks)
            costs: dict[int, dict[str, float]] = {}
            for k in own:
                costs[k] = dict.fromkeys(lost, 0.0)
                here = entering[k].to(decoder.device)
                gradient[k] = _backwards(block, calls[i], here, gradient[k], prefix, lost, costs[k])
        of_windows = {int(k): cost for part in ranks.gather(costs) for k, cost in part.items()}
        for name in lost:
            losses[name] = sum(of_windows[k][name] for k in range(len(tokens))) / 2 / tokens.numel()
        step(total - i, total)
    ranks.wait()
    hidden.remove()
    return losses


class _Depth(NamedTuple):
    """What enters one block: window k of it is [1, length, d]."""

    hidden: Activations
    block: int

    def __getitem__(self, k: int) -> Tensor:
        return self.hidden[k][self.block]


@torch.no_grad()
def _forwards(
    decoder: Decoder, tokens: Tensor, scratch: Path, own: Sequence[int], ranks: Ranks, step: Callable[[int], object]
) -> tuple[list[BlockCall], Activations]:
    """How each block is called, and what enters it [windows, blocks + 1, 1, length, hidden]; last, what leaves them."""
    depth, width = len(decoder.blocks), decoder.config.get_text_config().hidden_size
    shape = (len(tokens), depth + 1, 1, tokens.shape[1], width)
    hidden = Activations(scratch, shape, decoder.dtype, ranks.mine(len(lanes_of(len(tokens)))))

    def sink(k: int, entering: Tensor) -> None:
        if own:
            hidden[own[k]][0].copy_(entering)

    calls = decoder.block_inputs(iter(tokens[own or [0], None]), sink)
    for i in range(depth):
        with decoder.filled_block(i) as (block, _):
            for k in own:
                hidden[k][i + 1].copy_(run_block(block, hidden[k][i].to(decoder.device), calls[i]))
        step(i)
    return calls, hidden


def _after_blocks(decoder: Decoder, tokens: Tensor, hidden: Activations, own: Sequence[int]) -> dict[int, Tensor]:
    """The gradient [1, length, d] of log p(y) with respect to what leaves the blocks, on the host, for y that the model
    draws at every position, by window."""
    generator = torch.Generator().manual_seed(0)
    gradients = {}
    with decoder.after_blocks() as logits:
        for k, window in enumerate(tokens):
            draw = torch.rand(len(window), 1, generator=generator, dtype=torch.float32).to(decoder.device)
            if k not in own:
                continue
            leaving = hidden[k][-1].to(decoder.device).requires_grad_(True)
            log_p = logits(window[None].to(decoder.device), leaving).float().log_softmax(-1)[0]  # [length, vocab]
            with torch.no_grad():
                y = torch.searchsorted(log_p.exp().cumsum(-1), draw).clamp_max(log_p.shape[-1] - 1)
            (gradient,) = torch.autograd.grad(log_p.gather(1, y).sum(), leaving)
            gradients[k] = gradient.cpu()
    return gradients


@torch.no_grad()
def _lost(
    block: nn.Module, prefix: str, linears: Mapping[str, nn.Module], methods: Mapping[str, Method], call: BlockCall,
    entering: _Depth, recipe: Recipe, device: torch.device, ranks: Ranks,
) -> dict[str, Tensor]:  # fmt: skip
    """D [out, in] of each Linear of a block, whose full names begin with `prefix`: what its method loses of the weight,
    in the basis of the inputs as they are."""
    lost = {}
    for stats in _statistics(block, prefix, linears, call, entering, recipe, device, ranks):
        rotated = {name: _rotated(linear_weight(linears[name]), one.hadamard) for name, one in stats.items()}

        def pack(
            name: str, stats: Mapping[str, InputStats] = stats, rotated: Mapping[str, Tensor] = rotated
        ) -> tuple[PackedWeight, None]:
            try:
                return methods[name].quantize(rotated[name], stats[name]), None
            except SingularHessian:
                return methods[name].quantize(rotated[name], None), None

        costs = {name: weight.numel() for name, weight in rotated.items()}
        for name, (packed, _) in ranks.solve(costs, pack, device).items():
            lost[name] = _rotated(rotated[name] - packed.dequantize(), stats[name].hadamard)
    return lost


def _statistics(
    block: nn.Module, prefix: str, linears: Mapping[str, nn.Module], call: BlockCall, entering: _Depth, recipe: Recipe,
    device: torch.device, ranks: Ranks,
) -> Iterator[dict[str, InputStats]]:  # fmt: skip
    """The inputs of a block's Linears, for those that share one at a time, or for experts."""
    lanes = entering.hidden.lanes

    def of(name: str) -> InputStats:
        _, columns = linear_shape(linears[name])
        return InputStats(columns, 0, device, Need.HESSIAN, recipe.hadamard(columns))

    for names, calls in ranks.agree(lambda: input_groups(block, dict(linears), call, entering[0].to(device))):
        local = names[0].removeprefix(prefix)
        if names[0] in linears:

            def gather(batches: range, stats: list[InputStats], local: str = local, calls: int = calls) -> None:
                collect(block, local, calls, call, entering, batches, *stats)

            (stats,) = ranks.sum_lanes(lanes, lambda name=names[0]: [of(name)], gather)
            yield dict.fromkeys(names, stats)
            continue
        mixture = Mixture(block, local, call, entering, lanes, ranks, device)
        for projection in mixture.experts.projections:
            members = mixture.members(projection, names[0], linears)
            for each in mixture.statistics(list(members), projection, lambda e, n=members: of(n[e]), None):
                yield {members[expert]: one for expert, one in each.items()}


def _rotated(weight: Tensor, hadamard: int | None) -> Tensor:
    """A weight [out, in] in the basis that a Hadamard matrix turns its inputs to, and back: it is its own inverse."""
    return block_hadamard(weight, hadamard) if hadamard else weight


def _backwards(
    block: nn.Module,
    call: BlockCall,
    hidden: Tensor,
    gradient: Tensor,
    prefix: str,
    lost: Mapping[str, Tensor],
    costs: dict[str, float],
) -> Tensor:
    """The gradient of what enters a block, hidden, from that of what leaves it; adds sum (g^T D x)^2 to the costs."""

    def watch(name: str) -> Callable[..., None]:
        def after(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            moved = (args[0].detach().float() @ lost[name].T).flatten(0, -2)  # [tokens, out]

            def arrived(g: Tensor) -> None:
                costs[name] += (g.flatten(0, -2).float() * moved).sum(1).square().sum().item()

            if output.requires_grad:  # what does not depend on the hidden states carries nothing on
                output.register_hook(arrived)

        return after

    with ExitStack() as hooks:
        for name in lost:
            linear = block.get_submodule(name.removeprefix(prefix))
            hooks.callback(linear.register_forward_hook(watch(name)).remove)
        hidden = hidden.clone().requires_grad_(True)  # a view of the file otherwise
        (before,) = torch.autograd.grad(run_block(block, hidden, call), hidden, gradient.to(hidden.device))
    return before.cpu()
