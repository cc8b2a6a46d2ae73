"""Models that take less memory and compute the same numbers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import register_parametrization
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from ultralowbit.nn.decoder import find_blocks


class InFp32(nn.Module):
    """Parameters in fp32, made anew at every use. `multiplies`: all that they do, so that they may stay in a dtype to
    which autocast would round them again."""

    def __init__(self, multiplies: bool) -> None:
        super().__init__()
        self.multiplies = multiplies

    def forward(self, stored: Tensor) -> Tensor:
        kind = stored.device.type
        if self.multiplies and torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind) == stored.dtype:
            return stored
        return stored.float()


def compute_in_fp32(model: nn.Module) -> None:
    """Let a model whose weights have another dtype compute in fp32; one module has its weights in fp32 at a time."""
    for module in list(model.modules()):
        for name, p in list(module.named_parameters(recurse=False)):
            if p.is_floating_point() and p.dtype != torch.float32:
                register_parametrization(module, name, InFp32(isinstance(module, nn.Linear)), unsafe=True)
        for name, buffer in list(module.named_buffers(recurse=False)):
            if buffer.is_floating_point():
                setattr(module, name, buffer.float())


def checkpoint_blocks(model: PreTrainedModel, generator: torch.Generator | None = None) -> None:
    """Let each decoder block keep its input alone for the backward pass, which runs the block again, with the same
    numbers of the generator that it draws from."""
    _, blocks = find_blocks(model, model.config)
    for block in blocks:
        block.forward = partial(
            checkpoint, block.forward, use_reentrant=False, preserve_rng_state=False,
            context_fn=lambda: (nullcontext(), _from(generator, generator and generator.get_state())),
        )  # fmt: skip


@contextmanager
def _from(generator: torch.Generator | None, state: Tensor | None) -> Iterator[None]:
    """Numbers of the generator from a state on, while the context lasts."""
    if generator is None:
        yield
        return
    later = generator.get_state()
    generator.set_state(state)
    try:
        yield
    finally:
        generator.set_state(later)
