"""A product that is worked out once for all calls of one shape.

To work out launches and to hand them to Triton takes 100 us of Python, a multiple of what the GPU needs. Nothing of
that depends on values, and only addresses change from call to call: a `Plan` keeps compiled kernels, their grids and
numbers, and a call fills the addresses in.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from triton.runtime import driver

from ultralowbit.kernels.gpu.launch import Launch

ALIGNMENT = 16
"""Bytes at which Triton's kernels expect every tensor to begin."""
_APART = 256
"""Bytes at which the tensors of a workspace begin, as those of torch's allocator do."""
_RESERVE = 1 << 20
"""Counters of a device for the launches of CUDA graphs, 4 MiB."""


@dataclass(frozen=True)
class _Stored:
    """A tensor as Triton's compiler sees it: its dtype, and where it begins, of which only the alignment matters."""

    dtype: torch.dtype
    offset: int

    def data_ptr(self) -> int:
        return self.offset


@dataclass(frozen=True)
class _Step:
    """One launch: `call(*args, stream=...)`, where args[place] is the address of a base and an offset in bytes."""

    call: Callable[..., None]
    args: tuple[Any, ...]
    addresses: tuple[tuple[int, int, int], ...]  # (place, base, offset)


class Plan:
    """The launches that make y of x and the stored tensors, all on meta, for tensors of their shapes on a device."""

    def __init__(
        self, launches: Sequence[Launch], x: Tensor, tensors: Sequence[Tensor], y: Tensor, device: torch.device
    ) -> None:
        self._shape, self._device, self._counters = y.shape, device, 0
        self._bases = {_key(tensor): base for base, tensor in enumerate((x, y, *tensors), 2)}
        self._offsets: dict[int, int] = {}
        self._room = 0
        self._steps = [self._step(launch) for launch in launches]

    def __call__(self, x: Tensor, tensors: Sequence[Tensor]) -> Tensor:
        """y [tokens, out] in x's dtype; x and the tensors contiguous, at addresses that 16 divides."""
        index = self._device.index
        if index is not None and driver.active.get_current_device() != index:  # on which Triton launches
            with torch.cuda.device(index):
                return self(x, tensors)
        stream = driver.active.get_current_stream(index)
        y = x.new_empty(self._shape)
        room = x.new_empty(self._room, dtype=torch.uint8)
        counters = counters_of(self._device, stream, self._counters)
        bases = [room.data_ptr(), counters.data_ptr(), x.data_ptr(), y.data_ptr(), *[t.data_ptr() for t in tensors]]
        for step in self._steps:
            args = list(step.args)
            for place, base, offset in step.addresses:
                args[place] = bases[base] + offset
            step.call(*args, stream=stream)
        return y

    def _step(self, launch: Launch) -> _Step:
        """Compile a launch, and note where its tensors are."""
        names, args, addresses = launch.kernel.arg_names, list(launch.args), []
        for place, arg in enumerate(launch.args):
            if isinstance(arg, Tensor):
                base, offset = self._place(arg, names[place])
                addresses.append((place, base, offset))
                args[place] = _Stored(arg.dtype, offset)
        compiled = launch.kernel.warmup(*args, grid=launch.grid, **launch.constants, **launch.options)
        grid = (*launch.grid, 1, 1)[:3]
        everything = (*args, *(launch.constants[name] for name in names[len(args) :]))
        return _Step(compiled[grid], everything, tuple(addresses))

    def _place(self, tensor: Tensor, name: str) -> tuple[int, int]:
        """The base of a tensor, 0 for the workspace and 1 for the counters, and how many bytes after it that begins."""
        if name == "arrived":
            self._counters = max(self._counters, tensor.numel())
            return 1, 0
        key, inside = _key(tensor), tensor.storage_offset() * tensor.itemsize
        if key in self._bases:
            return self._bases[key], inside
        if key not in self._offsets:
            self._offsets[key] = self._room
            self._room += -(-tensor.untyped_storage().nbytes() // _APART) * _APART
        return 0, self._offsets[key] + inside


def _key(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


_OF_STREAM: dict[tuple[torch.device, int], Tensor] = {}
_OF_GRAPHS: dict[torch.device, list[Tensor]] = {}


def counters_of(device: torch.device, stream: int, count: int) -> Tensor:
    """At least so many zeros int32, in which the kernels of one stream count and that they leave as zeros.

    A launch that a CUDA graph captures has its own, since graphs may be replayed on any stream, several at a time.
    """
    if torch.cuda.is_current_stream_capturing():
        reserve = _OF_GRAPHS.get(device, [])
        if not reserve or len(reserve[0]) < count:
            return torch.zeros(count, dtype=torch.int32, device=device)  # at the price of a fill in the graph
        mine, reserve[0] = reserve[0][:count], reserve[0][count:]
        return mine
    if device not in _OF_GRAPHS:
        _OF_GRAPHS[device] = [torch.zeros(_RESERVE, dtype=torch.int32, device=device)]
    zeros = _OF_STREAM.get((device, stream))
    if zeros is None or len(zeros) < count:
        zeros = _OF_STREAM[device, stream] = torch.zeros(max(count, 1024), dtype=torch.int32, device=device)
    return zeros
