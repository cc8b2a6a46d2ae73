"""Statistics of what enters a Linear."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack, suppress
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from ultralowbit.methods.statistics import InputStats, Need
from ultralowbit.nn.calls import BlockCall, run_block


class Batches(Protocol):
    """What enters a block, by batch [batch, length, d]."""

    def __getitem__(self, k: int) -> Tensor: ...


class Original(NamedTuple):
    """The original model beside the packed one, of which a Linear is to make up for the errors so far.

    block: the same block as it was; inputs: what enters it there; writers: the Linears that
    are to make up for the errors in the residual stream too, as `residual_writers` has them.
    """

    block: nn.Module
    inputs: Batches
    writers: Mapping[str, bool]


class Enough(Exception):
    """What is observed has been seen: the rest of the forward pass is not needed."""


def observe(
    block: nn.Module, name: str, calls: int, call: BlockCall, hidden: Tensor, silent: Sequence[str] = ()
) -> tuple[list[Tensor], Tensor | None]:
    """What enters the Linear `name` of a block that is run on hidden [batch, length, d], at each of its calls.

    The run ends there; or, with Linears that are `silent`, whose outputs count as zero, it goes on, and what the block
    then puts out [batch, length, d] is the second value: what the outputs of the first of them are added to.
    """
    inputs: list[Tensor] = []

    def before(module: nn.Module, args: tuple[Any, ...]) -> None:
        inputs.append(args[0])
        if not silent and len(inputs) == calls:
            raise Enough

    residual = None
    with ExitStack() as hooks:
        hooks.callback(block.get_submodule(name).register_forward_pre_hook(before).remove)
        for other in silent:
            handle = block.get_submodule(other).register_forward_hook(lambda module, args, out: torch.zeros_like(out))
            hooks.callback(handle.remove)
        with suppress(Enough):
            residual = run_block(block, hidden, call)
    return inputs, residual


def collect(
    block: nn.Module,
    name: str,
    calls: int,
    call: BlockCall,
    inputs: Batches,
    batches: Iterable[int],
    stats: InputStats,
    original: Original | None = None,
) -> None:
    """Add to `stats` what enters a Linear of a block that is run on some batches of inputs, each [batch, length, d], up
    to it; with `Need.ORIGINAL` beside what enters it in the original model.

    It is gathered when the Linears before it are packed, as `true_sequential` does in GPTQ's code: since each pass ends
    at the Linear, all of a block's groups together cost little more than one whole forward pass.
    """
    device = block.get_submodule(name).weight.device
    paired = Need.ORIGINAL in stats.needs
    writers = list(original.writers) if paired else []
    is_writer = name in writers
    silent = writers[writers.index(name) :] if is_writer and not original.writers[name] else ()
    for k in batches:
        batch = inputs[k]
        seen, stream = observe(block, name, calls, call, batch.to(device), silent)
        if not paired:
            for x in seen:
                stats.add(x)
            continue
        expected, target = observe(original.block, name, calls, call, original.inputs[k].to(device), silent)
        if [x.shape for x in seen] != [x.shape for x in expected]:
            expected = seen  # an expert that is given other tokens there: there is nothing to compare with
        if is_writer and not silent:
            stream, target = batch, original.inputs[k]
        moved = None if stream is None else target.to(device, torch.float32) - stream.to(device, torch.float32)
        for x, x_o in zip(seen, expected, strict=True):
            stats.add(x, x_o, moved)


def residual_writers(block: nn.Module, names: Sequence[str], call: BlockCall, hidden: Tensor) -> dict[str, bool]:
    """Of Linears in the order of their use, those whose outputs the block adds to its residual stream as they are; and
    whether that stream is still what enters the block.

    Seen by running the block on hidden [batch, length, d], with the output of one set to zero and those of the writers
    after it too: what the block puts out then misses exactly that output. After a norm or a factor it would not.
    """
    writers: dict[str, bool] = {}
    for name in reversed(names):
        outputs: list[Tensor] = []
        later = list(writers)
        linear = block.get_submodule(name)
        handle = linear.register_forward_hook(lambda module, args, out, outputs=outputs: outputs.append(out))
        try:
            whole = observe(block, name, 1, call, hidden, later)[1] if later else run_block(block, hidden, call)
        finally:
            handle.remove()
        if len(outputs) != 1 or outputs[0].shape != whole.shape or not outputs[0].any():
            continue
        _, without = observe(block, name, 1, call, hidden, [name, *later])
        parts = whole.float(), without.float(), outputs[0].float()
        coarsest = max(torch.finfo(dtype).eps for dtype in (whole.dtype, outputs[0].dtype))  # with autocast they differ
        rounding = 8 * coarsest * sum(part.abs() for part in parts)
        if ((parts[0] - parts[1] - parts[2]).abs() <= rounding).all():
            writers = {name: torch.equal(without, hidden)} | writers
    return writers
