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

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path

import torch
from torch import Tensor, nn

from ultralowbit.checkpoint.activations import Activations
from ultralowbit.format.transform import block_hadamard
from ultralowbit.methods.base import Method
from ultralowbit.methods.statistics import InputStats, Need, SingularHessian
from ultralowbit.nn.decoder import BlockCall, Decoder, run_block
from ultralowbit.nn.inputs import input_groups
from ultralowbit.nn.linear import linear_shape, linear_weight
from ultralowbit.pipeline.collect import collect
from ultralowbit.progress import OnProgress
from ultralowbit.recipe import Recipe


def sensitivities(
    decoder: Decoder, recipe: Recipe, methods: Mapping[str, Method], tokens: Tensor, scratch: Path, step: OnProgress
) -> dict[str, float]:
    """KL in nats a token that each Linear that is reached would cost alone, packed by its method.

    methods: by the full names of the Linears. tokens [windows, length] int64; scratch: a file for what enters the
    blocks, which is removed. Calls `step(done, total)` after each of the two passes through a block.
    """
    total = 2 * len(decoder.blocks)
    calls, hidden = _forwards(decoder, tokens, scratch, lambda i: step(i + 1, total))
    gradient = _after_blocks(decoder, tokens, hidden[-1])
    losses: dict[str, float] = {}
    for i in reversed(range(len(decoder.blocks))):
        with decoder.filled_block(i) as (block, _):
            block.requires_grad_(False)
            wanted = {name: m for name, m in decoder.linears(i, recipe.ignore).items() if name in methods}
            prefix = f"{decoder.block_name(i)}."
            lost = _lost(block, prefix, wanted, methods, calls[i], hidden[i], recipe, decoder.device)
            costs = dict.fromkeys(lost, 0.0)
            for k in range(len(tokens)):
                entering = hidden[i, k].to(decoder.device)
                gradient[k] = _backwards(block, calls[i], entering, gradient[k], prefix, lost, costs)
        losses |= {name: cost / 2 / tokens.numel() for name, cost in costs.items()}
        step(total - i, total)
    scratch.unlink()
    return losses


@torch.no_grad()
def _forwards(
    decoder: Decoder, tokens: Tensor, scratch: Path, step: Callable[[int], object]
) -> tuple[list[BlockCall], Tensor]:
    """How each block is called, and what enters it [blocks + 1, windows, 1, length, hidden]; last, what leaves them."""
    depth, width = len(decoder.blocks), decoder.config.get_text_config().hidden_size
    hidden = Activations(scratch, (depth + 1, len(tokens), 1, tokens.shape[1], width), decoder.dtype, True).tensor

    def sink(k: int, entering: Tensor) -> None:
        hidden[0, k] = entering.cpu()

    calls = decoder.block_inputs(iter(tokens[:, None]), sink)
    for i in range(depth):
        with decoder.filled_block(i) as (block, _):
            for k in range(len(tokens)):
                hidden[i + 1, k] = run_block(block, hidden[i, k].to(decoder.device), calls[i]).cpu()
        step(i)
    return calls, hidden


def _after_blocks(decoder: Decoder, tokens: Tensor, hidden: Tensor) -> Tensor:
    """The gradient of log p(y) with respect to hidden [windows, 1, length, d], on the host, for y that the model draws
    at every position."""
    generator = torch.Generator().manual_seed(0)
    gradients = []
    with decoder.after_blocks() as logits:
        for k in range(len(tokens)):
            leaving = hidden[k].to(decoder.device).requires_grad_(True)
            log_p = logits(tokens[k : k + 1].to(decoder.device), leaving).float().log_softmax(-1)[0]  # [length, vocab]
            draw = torch.rand(len(log_p), 1, generator=generator, dtype=torch.float32).to(log_p.device)
            with torch.no_grad():
                y = torch.searchsorted(log_p.exp().cumsum(-1), draw).clamp_max(log_p.shape[-1] - 1)
            (gradient,) = torch.autograd.grad(log_p.gather(1, y).sum(), leaving)
            gradients.append(gradient.cpu())
    return torch.stack(gradients)


@torch.no_grad()
def _lost(
    block: nn.Module, prefix: str, linears: Mapping[str, nn.Module], methods: Mapping[str, Method], call: BlockCall,
    entering: Tensor, recipe: Recipe, device: torch.device,
) -> dict[str, Tensor]:  # fmt: skip
    """D [out, in] of each Linear of a block, whose full names begin with `prefix`: what its method loses of the weight,
    in the basis of the inputs as they are, where `entering` [windows, 1, length, d] enters the block."""
    lost = {}
    for group in input_groups(block, dict(linears), call, entering[0].to(device)):
        columns = linear_shape(linears[group.names[0]])[1]
        hadamard = recipe.hadamard(columns)
        stats = InputStats(columns, 0, device, Need.HESSIAN, hadamard)
        collect(block, group.names[0].removeprefix(prefix), group.calls, call, entering, stats)
        for name in group.names:
            weight = linear_weight(linears[name])
            rotated = block_hadamard(weight, hadamard) if hadamard else weight
            try:
                packed = methods[name].quantize(rotated, stats)
            except SingularHessian:
                packed = methods[name].quantize(rotated, None)
            off = rotated - packed.dequantize()
            lost[name] = block_hadamard(off, hadamard) if hadamard else off
    return lost


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
