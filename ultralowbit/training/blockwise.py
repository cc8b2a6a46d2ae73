"""Block-wise training: the parameters of a block's packed Linears are fitted to what the original block puts out.

Two streams of activations, as in PTQ1.61 (arXiv 2502.13179): X of the original model, Xq of the packed one. With F the
original block and Q the packed one, Q(Xq) is brought near Y1 = F(X), which makes up for the errors of the blocks
before, and near Y2 = F(Xq), which asks for no more than this block can give.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ultralowbit.checkpoint.activations import Activations
from ultralowbit.errors import InputError
from ultralowbit.format.weight import PackedWeight
from ultralowbit.nn.calls import BlockCall, run_block
from ultralowbit.nn.linear import PackedLinear, swap
from ultralowbit.progress import Progress
from ultralowbit.training.fake_quant.linear import FakeQuantLinear, level_distances, parameter_groups, set_progress
from ultralowbit.training.loop import Fitted, fit
from ultralowbit.training.specs import Blockwise, Finetune


class Streams(NamedTuple):
    """What a block is trained on: how it is called, and X, Xq, Y1, Y2 [batches, batch, length, d], often mapped
    files."""

    call: BlockCall
    original: Activations | Tensor
    inputs: Activations | Tensor
    y1: Activations | Tensor
    y2: Activations | Tensor


def train_block(
    model: nn.Module,
    block: nn.Module,
    weights: Mapping[str, Tensor],
    packed: Mapping[str, PackedWeight],
    streams: Streams,
    spec: Blockwise,
    state: Path,
    progress: Progress,
) -> tuple[dict[str, PackedWeight], Fitted | None]:
    """Train the packed Linears of a block and return those that are better for it, with how the training went, which is
    None where the block has nothing to train.

    weights, packed: the original weights as their modules store them, and the packed ones, by names in `model`.
    state: the file that a killed run goes on from. The block itself is left as it was.
    """
    device = next(block.parameters()).device
    batches = range(len(streams.inputs))
    training, held_out = spec.split(batches)

    def loss(indices: Sequence[int]) -> Tensor:
        losses = []
        for k in indices:
            x, y1, y2 = (stream[k].to(device) for stream in (streams.inputs, streams.y1, streams.y2))
            losses.append(spec.objective(run_block(block, x, streams.call), y1, y2))
        return torch.stack(losses).mean()

    @torch.no_grad()
    def evaluate() -> float:
        return sum(loss([k]).item() for k in held_out) / len(held_out)

    with fake_quantized(model, packed, weights.__getitem__, spec) as linears:
        if not linears:
            return {}, None
        fitted = fit(
            parameter_groups(block), loss, spec.loop, len(training), evaluate, state=state, progress=progress,
            on_progress=lambda share: set_progress(block, share), sizes=level_distances(block),
        )  # fmt: skip
        return {name: linear.pack() for name, linear in linears.items()} if fitted.accepted else {}, fitted


@contextmanager
def fake_quantized(
    model: nn.Module,
    packed: Mapping[str, PackedWeight],
    weight: Callable[[str], Tensor],
    spec: Blockwise | Finetune,
    ready: Callable[[str], object] = lambda name: None,
) -> Iterator[dict[str, FakeQuantLinear]]:
    """Put fake-quantized Linears in the place of the named ones while the context lasts, and freeze all else.

    weight: the original weight of a Linear as its module stores it; asked for when its turn comes. ready: told the name
    of each once it is in its place. A Linear whose format has nothing of what is trained is packed instead.
    """
    required = {p: p.requires_grad for p in model.parameters()}
    replaced = {name: model.get_submodule(name) for name in packed}
    model.requires_grad_(False)
    dtype = spec.latent_dtype(sum(math.prod(stored.shape) for stored in packed.values()))
    linears: dict[str, FakeQuantLinear] = {}
    try:
        for name, module in replaced.items():
            device, stored = next(module.parameters()).device, packed[name]
            latent = weight(name).to(device)
            latent = latent.T if isinstance(module, Conv1D) else latent
            here = PackedWeight(stored.format, stored.shape, {n: t.to(device) for n, t in stored.tensors.items()})
            bias = None if module.bias is None else partial(getattr, module, "bias")
            try:
                linears[name] = linear = FakeQuantLinear(
                    here, spec.of_packed, latent=latent, bias=bias,
                    estimator=spec.estimator, scales=spec.scales, dtype=dtype,
                )  # fmt: skip
            except InputError:
                linear = PackedLinear(*stored.shape, stored.format, None, isinstance(module, Conv1D))
                linear.fill(here)
                if bias is not None:
                    linear.register_forward_hook(lambda _, args, y, bias=bias: y + bias().to(y.dtype))
            swap(model, name, linear)
            ready(name)
        yield linears
    finally:
        for name, module in replaced.items():
            swap(model, name, module)
        for p, grad in required.items():
            p.requires_grad_(grad)
