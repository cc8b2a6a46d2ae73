"""Norms and biases: what of a model is trained beside its packed weights, and is never packed.

They are a ten-thousandth of the weights, and cost next to no memory. As everywhere, values in training are at every
step those of the bytes that will be written: a parameter is trained in fp32, and the model computes with it as rounded
to the dtype in which its file has it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from ultralowbit.training.fake_quant.rounding import StoreAs


class Plain(NamedTuple):
    """A norm's weight or a bias: a vector of a module, with the kind that `training.lr` knows it by."""

    kind: str
    name: str
    """In the model, such as model.norm.weight."""
    module: nn.Module
    part: str
    """Of the module: the last part of the name."""


def plain_parameters(model: nn.Module) -> Iterator[Plain]:
    """Every bias, and every weight of a norm, in the order of the modules; one that two modules share is left out."""
    found = []
    for path, module in model.named_modules():
        held = dict(module.named_parameters(recurse=False))
        if is_parametrized(module):
            held |= {part: of.original for part, of in module.parametrizations.items()}
        is_norm = "norm" in type(module).__name__.lower()
        for part, p in held.items():
            kind = "bias" if part == "bias" else "norm" if is_norm else None
            if kind and p.ndim == 1 and p.is_floating_point():
                found.append((p, Plain(kind, f"{path}.{part}".lstrip("."), module, part)))
    uses = Counter(id(p) for p, _ in found)
    return (plain for p, plain in found if uses[id(p)] == 1)


class Rounded(nn.Module):
    """A parameter in fp32 as it is stored, made anew at every use."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype

    def forward(self, trained: Tensor) -> Tensor:
        return StoreAs.apply(trained, self.dtype)


class Own(NamedTuple):
    """What is trained in the place of a vector."""

    kind: str
    parameter: nn.Parameter
    """fp32, of the vector's shape."""
    dtype: torch.dtype
    """In which it is stored, and counts."""

    @property
    def stored(self) -> Tensor:
        return self.parameter.detach().to(self.dtype)


def make_trainable(model: nn.Module, kinds: Collection[str]) -> dict[str, Own]:
    """Give the model parameters of its own for its vectors of some kinds, by their names; a model that shares tensors
    with it keeps what it has. The model computes in fp32."""
    trained = {}
    for kind, name, module, part in plain_parameters(model):
        if kind not in kinds:
            continue
        held = module.parametrizations[part] if is_parametrized(module, part) else None
        stored = getattr(module, part) if held is None else held.original
        own = nn.Parameter(stored.detach().float().clone())
        if held is None:
            setattr(module, part, own)
        else:  # see `compute_in_fp32`
            held[0], held.original = Rounded(stored.dtype), own
        trained[name] = Own(kind, own, stored.dtype)
    return trained
