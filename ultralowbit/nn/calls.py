"""How a decoder calls its blocks, as its own forward pass shows, and calling them alike."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from copy import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass
class BlockCall:
    """What the model passes to one block beside the hidden states; whether its products are made in bfloat16."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    autocast: bool = False


def products(hidden: Tensor, autocast: bool) -> AbstractContextManager[None]:
    """Where products with hidden states are made in bfloat16, or as they would be anyway."""
    return torch.autocast(hidden.device.type, torch.bfloat16) if autocast else nullcontext()


def run_block(block: nn.Module, hidden: Tensor, call: BlockCall) -> Tensor:
    """hidden [batch, length, hidden] -> the same, through the block."""
    with products(hidden, call.autocast):
        output = block(hidden, *call.args, **call.kwargs)
    return output if isinstance(output, Tensor) else output[0]


class Reached(Exception):
    """The hidden states have reached the first block: the rest of the forward is not needed."""


class CallSpy:
    """Stands in for the forward of every block. In the first pass it notes how each is called, runs block 0 and lets
    the hidden states pass the others as if they had run; in the second, on other text, it looks whether they are
    called alike; later passes end at block 0."""

    def __init__(self, first: nn.Module, blocks: nn.ModuleList, may_share: bool) -> None:
        """may_share: what a block leaves in a mapping that it is passed may be for the blocks after it."""
        self.calls: list[BlockCall] = []
        self.hidden: Tensor | None = None  # what entered block 0 last
        self.alike, self._may_share = True, may_share
        self._blocks, self._run_first = blocks, first.forward
        self._passes = self._seen = 0
        for block in blocks:
            # the instance's attribute shadows the method, so that the model still finds all else on its block
            block.forward = self._pass
        first.forward = self._enter

    def _enter(self, *args: Any, **kwargs: Any) -> Any:
        self._passes += 1
        self.hidden, call = _split_call(args, kwargs)
        if self._passes > 2:
            raise Reached
        self._note(call)
        if self._passes == 1:
            own = {key: copy(value) if isinstance(value, Mapping) else value for key, value in kwargs.items()}
            output = self._run_first(*args, **own)
            if self._may_share:
                self.alike &= _alike(BlockCall((), own), BlockCall((), kwargs))
            # blocks return hidden states bare, or first in a tuple
            bare = isinstance(output, Tensor)
            self.returned = (lambda hidden: hidden) if bare else lambda hidden: (hidden, *output[1:])
            return output
        return self.returned(self.hidden)

    def _pass(self, *args: Any, **kwargs: Any) -> Any:
        hidden, call = _split_call(args, kwargs)
        self._note(call)
        return self.returned(hidden)

    def _note(self, call: BlockCall) -> None:
        if self._passes == 1:
            self.calls.append(call)
        else:
            self.alike &= _alike(call, self.calls[self._seen % len(self.calls)])
        self._seen += 1

    def leave(self) -> None:
        for block in self._blocks:
            block.__dict__.pop("forward", None)


def _split_call(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, BlockCall]:
    if args:
        return args[0], BlockCall(args[1:], kwargs)
    rest = dict(kwargs)
    return rest.pop("hidden_states"), BlockCall((), rest)


def _alike(a: BlockCall, b: BlockCall) -> bool:
    """Whether two calls pass the same tensors beside the hidden states."""
    mine, theirs = list(_tensors([a.args, a.kwargs])), list(_tensors([b.args, b.kwargs]))
    return len(mine) == len(theirs) and all(torch.equal(x, y) for x, y in zip(mine, theirs, strict=True))


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping | list | tuple):
        for part in value.values() if isinstance(value, Mapping) else value:
            yield from _tensors(part)
