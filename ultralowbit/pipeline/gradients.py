"""Gradients of the model's predictions, block by block.

The model is never in memory as a whole: its blocks run forwards, what enters each is kept in one file, and then they
run backwards in turn. What is differentiated is log p(y), y drawn from the model's own predictions at every position:
the mean of g g^T over tokens, g the gradient at some place, is the Fisher information of what stands there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ultralowbit.checkpoint.activations import Activations, lanes_of
from ultralowbit.nn.calls import BlockCall, run_block
from ultralowbit.nn.decoder import Decoder
from ultralowbit.pipeline.ranks import Ranks, own_batches
from ultralowbit.progress import OnProgress, Progress

LOGITS = 1 << 24
"""Predictions that are made at a time, 64 MB each of what is made of them in fp32: for so many tokens at once that the
products with a large head are not much slower than for all."""

Seen = Callable[[str, Tensor, Tensor], None]
"""Is told of each Linear in turn its name, what enters it [..., in] and the gradient at what leaves it
[..., out]."""


class Depth(NamedTuple):
    """What enters one block: window k of it is [1, length, d]."""

    hidden: Activations
    block: int

    def __getitem__(self, k: int) -> Tensor:
        return self.hidden[k][self.block]


class Backwards(NamedTuple):
    """Block `index` of the original model, before it runs backwards."""

    index: int
    block: nn.Module
    call: BlockCall
    entering: Depth
    device: torch.device
    gradient: dict[int, Tensor]
    """By window, at what leaves the block; `run` replaces it."""

    def run(self, k: int, prefix: str, names: Iterable[str], seen: Seen) -> None:
        """Run the block, whose Linears' full names begin with `prefix`, forwards and backwards on window k."""

        def watch(name: str) -> Callable[..., None]:
            def after(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
                x = args[0].detach()
                if output.requires_grad:  # what does not depend on the hidden states carries nothing on
                    output.register_hook(lambda g: seen(name, x, g))

            return after

        with ExitStack() as hooks:
            for name in names:
                linear = self.block.get_submodule(name.removeprefix(prefix))
                hooks.callback(linear.register_forward_hook(watch(name)).remove)
            hidden = self.entering[k].to(self.device).clone().requires_grad_(True)  # a view of the file otherwise
            leaving = run_block(self.block, hidden, self.call)
            (before,) = torch.autograd.grad(leaving, hidden, self.gradient[k].to(self.device))
        self.gradient[k] = before.cpu()


def backwards(decoder: Decoder, tokens: Tensor, scratch: Path, progress: Progress, ranks: Ranks) -> Iterator[Backwards]:
    """The blocks from last to first; the caller runs each on all windows of this rank's lanes.

    tokens [windows, length] int64; scratch: the name of files for what enters the blocks, which are removed.
    """
    total, step = len(decoder.blocks), progress.counter("how much each Linear matters")
    lanes = lanes_of(len(tokens))
    own = own_batches(ranks.mine(len(lanes)), lanes)
    calls, hidden = _forwards(decoder, tokens, scratch, own, ranks, progress.counter("what enters the blocks"))
    gradient = _after_blocks(decoder, tokens, hidden, own, progress.counter("what the model predicts"))
    for i in reversed(range(total)):
        with decoder.filled_block(i) as (block, _):
            block.requires_grad_(False)
            yield Backwards(i, block, calls[i], Depth(hidden, i), decoder.device, gradient)
        step(total - i, total)
    ranks.wait()
    hidden.remove()


@torch.no_grad()
def _forwards(
    decoder: Decoder, tokens: Tensor, scratch: Path, own: Sequence[int], ranks: Ranks, step: OnProgress
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
        step(i + 1, depth)
    return calls, hidden


def _after_blocks(
    decoder: Decoder, tokens: Tensor, hidden: Activations, own: Sequence[int], step: OnProgress
) -> dict[int, Tensor]:
    """The gradient [1, length, d] of log p(y) with respect to what leaves the blocks, on the host, for y that the model
    draws at every position, by window."""
    generator = torch.Generator().manual_seed(0)
    few, gradients = max(1, LOGITS // decoder.config.get_text_config().vocab_size), {}
    with decoder.after_blocks() as logits:
        for k, window in enumerate(tokens):
            draw = torch.rand(len(window), 1, generator=generator, dtype=torch.float32).to(decoder.device)
            if k not in own:
                continue
            parts = (part.split(few) for part in (window.to(decoder.device), hidden[k][-1][0].to(decoder.device), draw))
            gradients[k] = torch.cat([_of_drawn(logits, *rows).cpu() for rows in zip(*parts, strict=True)], 1)
            step(len(gradients), len(own))
    return gradients


def _of_drawn(logits: Callable[[Tensor, Tensor], Tensor], tokens: Tensor, leaving: Tensor, draw: Tensor) -> Tensor:
    """The gradient [1, tokens, d] of log p(y), y drawn by numbers `draw` [tokens, 1] below 1, for some tokens of which
    `leaving` [tokens, d] leaves the blocks; no position looks at another there."""
    leaving = leaving[None].requires_grad_(True)
    z = logits(tokens[None], leaving)[0]  # [tokens, vocab]
    with torch.no_grad():
        p = z.float().log_softmax(-1).exp_()
        y = torch.searchsorted(p.cumsum(-1), draw).clamp_max(p.shape[-1] - 1)
        of_logits = p.neg_().scatter_add_(1, y, torch.ones_like(draw)).to(z.dtype)
    (gradient,) = torch.autograd.grad(z, leaving, of_logits)
    return gradient
