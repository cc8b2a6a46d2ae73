"""PackedLinear: a Linear whose weight stays packed; buffers as the `Format` lists them, forward through the kernels."""

from __future__ import annotations

import json
from collections.abc import Callable

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ultralowbit.format.weight import Format, PackedWeight
from ultralowbit.kernels.packed_matmul import packed_matmul
from ultralowbit.nn.hf_names import onloaded


def linear_shape(module: nn.Module) -> tuple[int, int]:
    """(out_features, in_features) of a Linear, or of GPT-2's transposed Conv1D."""
    if isinstance(module, Conv1D):
        return module.nf, module.nx
    return module.out_features, module.in_features


def linear_weight(module: nn.Module) -> Tensor:
    """The weight [out, in] fp32 of a Linear, an expert's, or GPT-2's transposed Conv1D, without its gradient."""
    weight = module.weight.detach().float()
    return (weight.T if isinstance(module, Conv1D) else weight).contiguous()


class KeepsPacked(nn.Module):
    """Moves its packed tensors with the module but never casts them: `model.to(bfloat16)` must not round scales."""

    def _tensors(self) -> dict[str, Tensor]:
        """The packed tensors among the buffers."""
        raise NotImplementedError

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> KeepsPacked:
        kept = self._tensors()
        super()._apply(fn, recurse)
        for name, tensor in kept.items():
            moved = getattr(self, name)
            if moved.dtype != tensor.dtype:
                setattr(self, name, tensor.to(moved.device))
        return self


class PackedModule(KeepsPacked):
    """A module with one packed weight [out, in], whose state holds the packed tensors under their own names (`weight`,
    `weight_scale`, ...)."""

    def __init__(self, out_features: int, in_features: int, format: Format) -> None:
        super().__init__()
        self.out_features, self.in_features, self.format = out_features, in_features, format
        self._layout = json.dumps(format.to_dict())
        self._names = tuple(format.tensors(out_features, in_features))
        for name, spec in format.tensors(out_features, in_features).items():
            self.register_buffer(name, torch.empty(spec.shape, dtype=spec.dtype, device="meta"))

    @property
    def packed(self) -> PackedWeight:
        return PackedWeight(self.format, (self.out_features, self.in_features), self._tensors())

    def fill(self, packed: PackedWeight) -> None:
        """Take the tensors of a packed weight of this module's format and shape."""
        for name, tensor in packed.tensors.items():
            setattr(self, name, tensor)

    def dense(self, dtype: torch.dtype) -> nn.Module:
        """The module that it stands for, with the weight that the packed bytes mean."""
        raise NotImplementedError

    def _tensors(self) -> dict[str, Tensor]:
        return {name: getattr(self, name) for name in self._names}


class PackedLinear(PackedModule):
    """y = x @ decode(packed).T + bias, for x [..., in] and y [..., out].

    `transposed` remembers that the module stands for a Conv1D, whose dense weight is [in, out]. With `int8`, x may be
    rounded to 8 bits for the sake of speed; `kernel_for` says whether it is.
    """

    int8 = False

    def __init__(
        self, out_features: int, in_features: int, format: Format, bias: nn.Parameter | None, transposed: bool = False
    ) -> None:
        super().__init__(out_features, in_features, format)
        self.transposed = transposed
        self.register_parameter("bias", bias)

    @classmethod
    def replacing(cls, module: nn.Module, format: Format) -> PackedLinear:
        """A PackedLinear on meta in the place of a Linear or Conv1D, keeping its bias."""
        return cls(*linear_shape(module), format, module.bias, isinstance(module, Conv1D))

    def forward(self, x: Tensor) -> Tensor:
        y = packed_matmul(x, [getattr(self, name) for name in self._names], self._layout, self.int8)
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def dense(self, dtype: torch.dtype) -> nn.Module:
        with torch.device("meta"):
            module = (
                Conv1D(self.out_features, self.in_features)
                if self.transposed
                else nn.Linear(self.in_features, self.out_features, bias=self.bias is not None)
            )
        with onloaded(self):
            weight = self.packed.dequantize(dtype)
            module.weight = nn.Parameter(weight.T.contiguous() if self.transposed else weight, requires_grad=False)
            if self.bias is not None:
                module.bias = nn.Parameter(self.bias.to(dtype), requires_grad=False)
        return module

    def extra_repr(self) -> str:
        shape = f"in_features={self.in_features}, out_features={self.out_features}"
        return f"{shape}, format={self.format.summary}{', int8=True' if self.int8 else ''}"


def swap(model: nn.Module, name: str, module: nn.Module) -> None:
    """Put `module` where `name` is in `model`."""
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, module)
