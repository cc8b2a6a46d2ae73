"""Statistics of what enters a Linear."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

from torch import Tensor, nn

from ultralowbit.methods.statistics import InputStats, Need
from ultralowbit.nn.decoder import BlockCall, run_block
from ultralowbit.nn.linear import linear_shape


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
