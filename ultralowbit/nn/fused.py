"""Linears that are given the same input, such as q, k and v, multiplied at once: one product in the place of several.

What the products of one input share is then done once: the transform and the tables of the activations, a launch on a
GPU, a call on a CPU. The numbers stay the same where kernels compute each row of a weight on its own; where the weight
is decoded and multiplied by BLAS, which cuts rows into blocks, they stay so up to rounding.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from ultralowbit.kernels.packed_matmul import packed_matmul
from ultralowbit.nn.inputs import watch_inputs
from ultralowbit.nn.linear import KeepsPacked, PackedLinear, swap


class Stack(KeepsPacked):
    """The packed weights of several Linears, one below the other.

    The first that is called with an x multiplies for all, the others find their rows of the product waiting. An x that
    is not the very same tensor is multiplied anew.
    """

    def __init__(self, members: Sequence[PackedLinear]) -> None:
        super().__init__()
        self.format = members[0].format
        self.sizes = [member.out_features for member in members]
        self._layout = json.dumps(self.format.to_dict())
        self._waiting: tuple[Tensor, list[Tensor | None]] | None = None
        tensors = self.format.stacked([member.packed.tensors for member in members])
        self._names = tuple(tensors)
        for name, tensor in tensors.items():
            self.register_buffer(name, tensor)

    def product(self, member: int, x: Tensor, int8: bool) -> Tensor:
        """The rows of x [..., in] times the stack that belong to a member: [..., out of it]."""
        # read once, since other threads may leave theirs there meanwhile
        seen, parts = self._waiting or (None, [])
        mine = parts[member] if seen is x else None
        if mine is None:
            parts = list(packed_matmul(x, list(self._tensors().values()), self._layout, int8).split(self.sizes, dim=-1))
            mine, self._waiting = parts[member], (x, parts)
        parts[member] = None
        if all(part is None for part in parts):
            self._waiting = None
        return mine

    def member(self, k: int) -> dict[str, Tensor]:
        """The stored tensors of a member: views, but for what all rows share."""
        start = sum(self.sizes[:k])
        return self.format.rows(self._tensors(), slice(start, start + self.sizes[k]))

    def _tensors(self) -> dict[str, Tensor]:
        return {name: getattr(self, name) for name in self._names}

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        """Nothing: the members save their rows."""

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        """Nothing: the members load their rows."""


class StackedLinear(PackedLinear):
    """A PackedLinear whose packed tensors are rows of a stack; it saves them under their own names all the same."""

    def __init__(self, linear: PackedLinear, stack: Stack, member: int) -> None:
        nn.Module.__init__(self)
        self.out_features, self.in_features = linear.out_features, linear.in_features
        self.format, self.transposed, self.int8 = linear.format, linear.transposed, linear.int8
        self._names, self._member = linear._names, member
        self._shared = (stack,)  # in a tuple it is no submodule: one of the members has it as such
        if member == 0:
            self.stack = stack
        self.register_parameter("bias", linear.bias)

    def forward(self, x: Tensor) -> Tensor:
        y = self._shared[0].product(self._member, x, self.int8)
        return y if self.bias is None else y + self.bias.to(y.dtype)

    @property
    def weight(self) -> Tensor:
        """Its rows of the stack's main tensor: others ask a Linear's weight for its device."""
        return self._tensors()["weight"]

    def _tensors(self) -> dict[str, Tensor]:
        return self._shared[0].member(self._member)

    def _apply(self, fn: Any, recurse: bool = True) -> StackedLinear:
        nn.Module._apply(self, fn, recurse)
        return self

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        nn.Module._save_to_state_dict(self, destination, prefix, keep_vars)
        destination.update({prefix + name: tensor.contiguous() for name, tensor in self._tensors().items()})

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        own = {f"{prefix}bias"} | {prefix + name for name in self._names}
        rest = {key: value for key, value in state_dict.items() if key == f"{prefix}bias"}
        nn.Module._load_from_state_dict(self, rest, prefix, local_metadata, strict, missing_keys, [], error_msgs)
        for name, mine in self._tensors().items():
            value = state_dict.get(prefix + name)
            if value is None:
                missing_keys.append(prefix + name)
            elif value.shape != mine.shape or value.dtype != mine.dtype:
                error_msgs.append(
                    f"{prefix + name} is {value.dtype} {list(value.shape)}, expected {mine.dtype} {list(mine.shape)}"
                )
            else:
                mine.copy_(value)  # into the rows of the stack
        if strict:
            stacked = f"{prefix}stack."
            unexpected_keys += [
                k for k in state_dict if k.startswith(prefix) and k not in own and not k.startswith(stacked)
            ]


@torch.no_grad()
def fuse(model: nn.Module) -> list[list[str]]:
    """Stack the packed Linears of a causal LM that share an input, as a forward pass of one token shows; in place.

    Those of one format, that agree in what is done to the input first; what accelerate has offloaded stays apart.
    Returns the names of each stack's members.
    """
    linears = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, PackedLinear)
        and not isinstance(module, StackedLinear)
        and not any(tensor.is_meta for tensor in module.state_dict(keep_vars=True).values())
    }
    if not linears:
        return []
    token = torch.zeros(1, 1, dtype=torch.int64, device=_entrance(model))
    stacked = []
    for group in watch_inputs(linears, lambda: model(token, use_cache=False)):
        rest = group.names
        while rest:
            first, *others = rest
            alike = [first, *(name for name in others if _stack(linears[first], linears[name]))]
            rest = [name for name in others if name not in alike]
            if len(alike) > 1:
                stack = Stack([linears[name] for name in alike])
                for k, name in enumerate(alike):
                    swap(model, name, StackedLinear(linears.pop(name), stack, k))
                stacked.append(alike)
    return stacked


def _entrance(model: nn.Module) -> torch.device:
    """The device of the first tensor of a model that is in memory: where it is given its tokens."""
    tensors = chain(model.parameters(), model.buffers())
    return next(tensor.device for tensor in tensors if not tensor.is_meta)


def _stack(a: PackedLinear, b: PackedLinear) -> bool:
    """Whether two Linears of one input can lie in one stack."""
    if a.format != b.format or a.transposed != b.transposed:
        return False
    mine, other = a.packed.tensors, b.packed.tensors
    same_device = all(mine[n].device == other[n].device for n in mine)
    return same_device and all(torch.equal(mine[n], other[n]) for n in a.format.shared)
