"""The one product of the package: activations with a packed weight.

`packed_matmul` is a single node for torch.compile and CUDA graphs, whatever runs inside. A fast path is a file
beside this one and a line in `KERNELS`; where none takes a case the reference runs, which is the meaning of the
operation.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Sequence
from functools import cache, lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad

from ultralowbit.format.weight import Format
from ultralowbit.format.words import TensorSpec
from ultralowbit.kernels import cpu

Kernel = Callable[[Tensor, dict[str, Tensor], Format], Tensor]
"""x [tokens, in] with any strides, the stored tensors by name, their format -> [tokens, out] in x's dtype."""

Chooser = Callable[[Format, torch.device, torch.dtype, int], Kernel | None]
"""The fast path for a format, a device, the dtype of x and a number of tokens, or None. Called for every product."""


@cache
def triton_products() -> Chooser | None:
    """Its kernels' chooser, where Triton is installed and can run."""
    try:
        from ultralowbit.kernels.gpu.dispatch import choose
    except ImportError:
        return None
    if torch.cuda.is_available():
        from triton.runtime import driver

        try:
            driver.active.utils  # noqa: B018 - Triton compiles its launcher here, which needs a C compiler
        except Exception as e:  # each of its steps fails in its own way
            reason = str(e).strip().partition("\n")[0]
            warnings.warn(
                f"Triton cannot run here ({type(e).__name__}: {reason}), so its products run the slow reference: "
                "install a C compiler and Python's headers",
                stacklevel=2,
            )
            return None
    return choose


def _on_cuda(format: Format, device: torch.device, dtype: torch.dtype, tokens: int) -> Kernel | None:
    choose = triton_products()
    return choose and choose(format, device, dtype, tokens)


KERNELS: dict[str, Chooser] = {"cpu": cpu.choose, "cuda": _on_cuda}
"""Device type -> what chooses among its fast paths."""

INT8_KERNELS: dict[str, Chooser] = {"cpu": cpu.choose_int8}
"""The same, asked first where the caller accepts activations rounded to 8 bits."""


def packed_matmul_ref(x: Tensor, tensors: dict[str, Tensor], format: Format) -> Tensor:
    """x [..., in] @ decode(tensors).T in x's dtype -> [..., out]: dequantize, then multiply."""
    return F.linear(x, format.decode(tensors, x.dtype))


def kernel_for(
    format: Format,
    device: torch.device | str,
    dtype: torch.dtype = torch.float32,
    tokens: int = 1,
    int8: bool = False,
) -> Kernel:
    """The function that `packed_matmul` runs for `tokens` rows of x in this format, device and dtype."""
    device = torch.device(device)
    for table in (INT8_KERNELS, KERNELS) if int8 else (KERNELS,):
        choose = table.get(device.type)
        kernel = choose and choose(format, device, dtype, tokens)
        if kernel:
            return kernel
    return packed_matmul_ref


@lru_cache(maxsize=4096)
def _parse(layout: str) -> tuple[Format, tuple[str, ...]]:
    format = Format.from_dict(json.loads(layout))
    return format, tuple(format.tensors(1, format.in_features))


@lru_cache(maxsize=4096)
def _specs(layout: str, out_features: int) -> tuple[tuple[str, TensorSpec], ...]:
    format, _ = _parse(layout)
    return tuple(format.tensors(out_features, format.in_features).items())


def _check(x: Tensor, tensors: Sequence[Tensor], layout: str) -> None:
    """Raise `RuntimeError` for what kernels, which are given addresses, would read elsewhere or past its end."""
    device, (format, _) = x.device, _parse(layout)
    if x.shape[-1:] != (format.in_features,):
        raise RuntimeError(
            f"x is {list(x.shape)}, expected [..., {format.in_features}]: the weight has so many columns"
        )
    if not x.is_floating_point():
        raise RuntimeError(
            f"x is {x.dtype}, expected floating point: leave a layer unpacked whose model casts to its weight's dtype"
        )
    for (name, spec), tensor in zip(_specs(layout, int(tensors[0].shape[-2])), tensors, strict=True):
        if tensor.device != device:
            raise RuntimeError(f"x is on {device}, {name} of the packed weight on {tensor.device}: move one of them")
        if tensor.dtype is not spec.dtype or tensor.shape != spec.shape:
            found = TensorSpec(tensor.dtype, tuple(tensor.shape))
            raise RuntimeError(f"{name} of the packed weight is {found}, expected {spec} of {format.summary}")


OP = "ultralowbit::packed_matmul"

# defined by its parts: `torch.library.custom_op` with a gradient costs 20 times as much a call
torch.library.define(OP, "(Tensor x, Tensor[] tensors, str layout, bool int8=False) -> Tensor")


def _product(x: Tensor, tensors: Sequence[Tensor], layout: str, int8: bool = False) -> Tensor:
    _check(x, tensors, layout)
    format, names = _parse(layout)
    rows = x if x.dim() == 2 else x.reshape(-1, format.in_features)
    if not len(rows):
        return x.new_empty((*x.shape[:-1], tensors[0].shape[-2]))
    kernel = kernel_for(format, x.device, x.dtype, len(rows), int8)
    y = kernel(rows, dict(zip(names, tensors, strict=True)), format)
    return y if x.dim() == 2 else y.reshape(*x.shape[:-1], -1)


torch.library.impl(OP, "CompositeExplicitAutograd", _product)


@torch.library.register_fake(OP)
def _(x: Tensor, tensors: Sequence[Tensor], layout: str, int8: bool = False) -> Tensor:
    _check(x, tensors, layout)
    return x.new_empty((*x.shape[:-1], tensors[0].shape[-2]))


class _Differentiable(torch.autograd.Function):
    """The packed weight is a constant: only x has a gradient, so that adapters can be trained around it."""

    @staticmethod
    def forward(x: Tensor, layout: str, int8: bool, *tensors: Tensor) -> Tensor:
        return torch.ops.ultralowbit.packed_matmul(x, tensors, layout, int8)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, ctx.layout, _, *tensors = inputs
        ctx.save_for_backward(*tensors)
        ctx.save_for_forward(*tensors)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        format, names = _parse(ctx.layout)
        weight = format.decode(dict(zip(names, ctx.saved_tensors, strict=True)), grad.dtype)
        return grad @ weight, None, None, *[None] * len(names)

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, *_: None) -> Tensor:
        return packed_matmul(tangent, ctx.saved_tensors, ctx.layout)

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[int | None, ...], x: Tensor, layout: str, int8: bool, *tensors: Tensor
    ) -> tuple[Tensor, int]:
        of_x, _, _, *of_tensors = in_dims
        if all(dim is None for dim in of_tensors):
            return packed_matmul(x.movedim(of_x, 0), tensors, layout, int8), 0
        weights = zip(
            *(_along(t, dim, info.batch_size) for t, dim in zip(tensors, of_tensors, strict=True)), strict=True
        )
        inputs = _along(x, of_x, info.batch_size)
        return torch.stack([packed_matmul(x, w, layout, int8) for x, w in zip(inputs, weights, strict=True)]), 0


def _along(tensor: Tensor, dim: int | None, count: int) -> Sequence[Tensor]:
    return [tensor] * count if dim is None else tensor.unbind(dim)


def packed_matmul(x: Tensor, tensors: Sequence[Tensor], layout: str, int8: bool = False) -> Tensor:
    """x [..., in] times a packed weight [out, in] -> [..., out] on x's device, in the dtype of `F.linear`: x's, or that
    of autocast where it is on.

    tensors: the stored tensors in the order of `Format.tensors`; layout: `json.dumps(Format.to_dict())`; int8: x may be
    rounded to 8 bits where that is faster. Differentiable in x, forwards and backwards, and under `torch.func`. Raises
    `RuntimeError` for tensors of other shapes, dtypes or devices.
    """
    kind = x.device.type
    if not x.is_meta and x.dtype != torch.float64 and torch.is_autocast_enabled(kind):
        with torch.autocast(kind, enabled=False):  # kernels choose dtypes of their own
            return packed_matmul(x.to(torch.get_autocast_dtype(kind)), tensors, layout, int8)
    if is_followed(x):
        return _Differentiable.apply(x, layout, int8, *tensors)
    if _unwatched(x):
        return _product(x, tensors, layout, int8)
    return torch.ops.ultralowbit.packed_matmul(x, list(tensors), layout, int8)


def is_followed(x: Tensor) -> bool:
    """Whether something differentiates or maps what is done to x: autograd, backwards or forwards, or `torch.func`."""
    if torch.is_grad_enabled() and x.requires_grad:
        return True
    return forward_ad._current_level >= 0 or (
        not torch.compiler.is_compiling() and torch._C._functorch.peek_interpreter_stack() is not None
    )


def _unwatched(x: Tensor) -> bool:
    """Whether no compiler or mode would see the operation: then the dispatcher, which takes a third of the time of an
    eager call, is left out."""
    return (
        not torch.compiler.is_compiling()
        and type(x) is Tensor
        and torch._C._len_torch_dispatch_stack() == 0
        and torch._C._get_tracing_state() is None
    )
