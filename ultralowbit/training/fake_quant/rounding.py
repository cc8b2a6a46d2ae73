"""Roundings that pass gradients, and what all fake-quantized segments share."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ultralowbit.format.segment import Segment


class StoreFp16(torch.autograd.Function):
    """Rounding to fp16, and away from 0 to `low` or -`low`, with the gradient passed straight through."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, low: float | None) -> Tensor:
        stored = values.half().float()
        return stored if low is None else stored.abs().clamp_min_(low).copysign(stored)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


class StoreAs(torch.autograd.Function):
    """Rounding to the values of a dtype with the gradient passed straight through."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, dtype: torch.dtype) -> Tensor:
        return values.to(dtype).float()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


class RoundSTE(torch.autograd.Function):
    """Rounding to whole numbers with the gradient passed straight through."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.round()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


class Permute(torch.autograd.Function):
    """x [rows, columns] with its columns in another order; the gradient is ordered back, indexing would add it up."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(inverse)
        return x.index_select(1, order)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return grad.index_select(1, *ctx.saved_tensors), None, None


def decoded(segment: Segment, parts: Mapping[str, Tensor]) -> Tensor:
    """What the stored tensors of a segment mean, [out, columns] fp32."""
    weight = torch.empty(parts[""].shape[-2], segment.columns, device=parts[""].device, dtype=torch.float32)
    segment.decode(parts, weight)
    return weight


def moved_to_code(
    latent: Tensor, value: Tensor, coded: Callable[[Tensor], Tensor], dtype: torch.dtype, near: bool = True
) -> Tensor:
    """The latent weight in a dtype where `coded` says that it has the packed code in it. Elsewhere it is moved towards
    the packed value, whose code that is: `near` its own, so that training can soon take it back, or all the way."""
    latent = latent.to(dtype).float()
    low, high = torch.zeros_like(latent), torch.ones_like(latent)  # shares of the way from the value to the latent
    kept = coded(latent)
    for _ in range(4 if near else 0):
        middle = (low + high) / 2
        inside = coded(value.lerp(latent, middle))
        low, high = torch.where(inside, middle, low), torch.where(inside, high, middle)
    moved = value.lerp(latent, 0.9 * low).to(dtype).float()
    return torch.where(kept, latent, torch.where(coded(moved), moved, value)).to(dtype)


def ungrouped(x: Tensor, columns: int) -> Tensor:
    """The inverse: [rows, groups, group] -> [rows, columns]."""
    return x.flatten(1)[:, :columns]


def own_tensors(module: nn.Module) -> dict[str, Tensor]:
    """The parameters and buffers of a module without those of its children."""
    return {**dict(module.named_parameters(recurse=False)), **dict(module.named_buffers(recurse=False))}


def register(module: nn.Module, name: str, value: Tensor | None, train: bool) -> None:
    """A parameter where it is trained, else a buffer."""
    if value is None or not train:
        module.register_buffer(name, value)
    else:
        module.register_parameter(name, nn.Parameter(value.clone(memory_format=torch.contiguous_format)))


def stored_scale(values: Tensor, row: Tensor | None) -> Tensor:
    """Scales or offsets [rows, ..., groups] as they are stored."""
    return StoreFp16.apply(values if row is None else values * row.view(-1, *[1] * (values.dim() - 1)), None)
