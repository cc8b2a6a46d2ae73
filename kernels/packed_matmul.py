"""The one product of the package: activations with a packed weight.

`packed_matmul` is a single node for torch.compile and CUDA graphs, whatever runs inside. A fast path is a file
beside this one and a line in `KERNELS`; where there is none the reference runs, which is the meaning of the operation.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from ultralowbit.format import Format

Kernel = Callable[[Tensor, dict[str, Tensor], Format], Tensor]

KERNELS: dict[tuple[str, str], Kernel] = {}
"""(`Format.kinds`, device type) -> fast path; absence means `packed_matmul_ref`."""


def packed_matmul_ref(x: Tensor, tensors: dict[str, Tensor], format: Format) -> Tensor:
    """x [..., in] @ decode(tensors).T in x's dtype -> [..., out]: dequantize, then multiply."""
    return F.linear(x, format.decode(tensors, x.dtype))


def kernel_for(format: Format, device: str) -> Kernel:
    """The function that `packed_matmul` runs for this format on this device type."""
    return KERNELS.get((format.kinds, device), packed_matmul_ref)


@lru_cache(maxsize=4096)
def _parse(layout: str) -> tuple[Format, tuple[str, ...]]:
    format = Format.from_dict(json.loads(layout))
    return format, tuple(format.tensors(1, format.in_features))


@torch.library.custom_op("ultralowbit::packed_matmul", mutates_args=())
def _packed_matmul(x: Tensor, tensors: Sequence[Tensor], layout: str) -> Tensor:
    format, names = _parse(layout)
    return kernel_for(format, x.device.type)(x, dict(zip(names, tensors, strict=True)), format)


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
