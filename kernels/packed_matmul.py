"""The one product of the package: activations with a packed weight.

`packed_matmul` is a single node for torch.compile and CUDA graphs, whatever runs inside. A fast path is a file
beside this one and a line in `KERNELS`; where none takes a case the reference runs, which is the meaning of the
operation.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from functools import cache, lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from ultralowbit.format import Format

Kernel = Callable[[Tensor, dict[str, Tensor], Format], Tensor]
"""x [tokens, in] with any strides, the stored tensors by name, their format -> [tokens, out] in x's dtype."""

Chooser = Callable[[Format, torch.device, torch.dtype, int], Kernel | None]
"""The fast path for a format, a device, the dtype of x and a number of tokens, or None. Called for every product."""


@cache
def _triton() -> Chooser | None:
    """Its kernels' chooser, where Triton is installed."""
    try:
        from ultralowbit.kernels.triton_matmul import choose
    except ImportError:
        return None
    return choose


def _on_cuda(format: Format, device: torch.device, dtype: torch.dtype, tokens: int) -> Kernel | None:
    choose = _triton()
    return choose and choose(format, device, dtype, tokens)


KERNELS: dict[str, Chooser] = {"cuda": _on_cuda}
"""Device type -> what chooses among its fast paths."""


def packed_matmul_ref(x: Tensor, tensors: dict[str, Tensor], format: Format) -> Tensor:
    """x [..., in] @ decode(tensors).T in x's dtype -> [..., out]: dequantize, then multiply."""
    return F.linear(x, format.decode(tensors, x.dtype))


def kernel_for(
    format: Format, device: torch.device | str, dtype: torch.dtype = torch.float32, tokens: int = 1
) -> Kernel:
    """The function that `packed_matmul` runs for `tokens` rows of x in this format, device and dtype."""
    device = torch.device(device)
    choose = KERNELS.get(device.type)
    return (choose and choose(format, device, dtype, tokens)) or packed_matmul_ref


@lru_cache(maxsize=4096)
def _parse(layout: str) -> tuple[Format, tuple[str, ...]]:
    format = Format.from_dict(json.loads(layout))
    return format, tuple(format.tensors(1, format.in_features))


@torch.library.custom_op("ultralowbit::packed_matmul", mutates_args=())
def _packed_matmul(x: Tensor, tensors: Sequence[Tensor], layout: str) -> Tensor:
    format, names = _parse(layout)
    rows = x.reshape(-1, format.in_features)
    if not len(rows):
        return x.new_empty((*x.shape[:-1], tensors[0].shape[-2]))
    kernel = kernel_for(format, x.device, x.dtype, len(rows))
    return kernel(rows, dict(zip(names, tensors, strict=True)), format).reshape(*x.shape[:-1], -1)


@_packed_matmul.register_fake
def _(x: Tensor, tensors: Sequence[Tensor], layout: str) -> Tensor:
    return x.new_empty((*x.shape[:-1], tensors[0].shape[-2]))


def _backward(ctx, grad: Tensor):
    """The packed weight is a constant: only x has a gradient, so that adapters can be trained around it."""
    format, names = _parse(ctx.layout)
    weight = format.decode(dict(zip(names, ctx.saved_tensors, strict=True)), grad.dtype)
    return grad @ weight, [None] * len(names), None


def _save_for_backward(ctx, inputs, output) -> None:
    _, tensors, ctx.layout = inputs
    ctx.save_for_backward(*tensors)


_packed_matmul.register_autograd(_backward, setup_context=_save_for_backward)


def packed_matmul(x: Tensor, tensors: Sequence[Tensor], layout: str) -> Tensor:
    """x [..., in] times a packed weight [out, in] -> [..., out], in x's dtype and on x's device.

    tensors: the stored tensors in the order of `Format.tensors`; layout: `json.dumps(Format.to_dict())`.
    Differentiable in x.
    """
    return _packed_matmul(x, list(tensors), layout)
