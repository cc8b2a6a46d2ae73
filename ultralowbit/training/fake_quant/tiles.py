"""A weight made some rows at a time, with a gradient that makes it again."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

_TILE = 1 << 18  # weights made at a time on a CPU: what they pass through on the way stays in a core's L2


class Tiled(torch.autograd.Function):
    """turn(weight(tensors)) for some rows at a time: tensors have their rows first. The gradient computes each tile
    again, so that what a weight passes through never lies in memory as a whole; but not what `turn` makes of it, which
    multiplies rows by a symmetric matrix."""

    @staticmethod
    def forward(
        ctx: Any,
        weight: Callable[[Mapping[str, Tensor]], Tensor],
        turn: Callable[[Tensor], Tensor],
        shape: tuple[int, int],
        dtype: torch.dtype,
        names: tuple[str, ...],
        *tensors: Tensor,
    ) -> Tensor:
        ctx.weight, ctx.turn, ctx.shape, ctx.names = weight, turn, shape, names
        ctx.save_for_backward(*tensors)
        dense = torch.empty(shape, dtype=dtype, device=tensors[0].device)
        for rows in row_tiles(shape, dense.device):
            dense[rows] = turn(weight(take_rows(dict(zip(names, tensors, strict=True)), rows)))
        return dense

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        tensors = dict(zip(ctx.names, ctx.saved_tensors, strict=True))
        trained = [name for name, t in tensors.items() if t.requires_grad]
        grads = {name: torch.zeros_like(tensors[name]) for name in trained}
        for rows in row_tiles(ctx.shape, grad.device):
            part = {name: t.detach() for name, t in take_rows(tensors, rows).items()}
            leaves = [part[name].requires_grad_() for name in trained]
            with torch.enable_grad():
                gradients = torch.autograd.grad(ctx.weight(part), leaves, ctx.turn(grad[rows].float()))
            for name, g in zip(trained, gradients, strict=True):
                take_rows(grads, rows)[name].add_(g)
        return None, None, None, None, None, *(grads.get(name) for name in ctx.names)


def row_tiles(shape: tuple[int, int], device: torch.device) -> list[slice]:
    """The rows that are taken at a time: all of them where memory is fast and kernels are slow to start."""
    rows, columns = shape
    step = max(1, _TILE // columns) if device.type == "cpu" else rows
    return [slice(row, min(row + step, rows)) for row in range(0, rows, step)]


def take_rows(tensors: Mapping[str, Tensor], rows: slice) -> dict[str, Tensor]:
    """Some rows of the tensors, and all of what belongs to the input."""
    return {name: t if name.startswith("input.") else t[rows] for name, t in tensors.items()}


def under(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors whose names begin with the prefix, without it."""
    return {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}
