"""Which Linears share an input."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack, suppress
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ultralowbit.nn.decoder import BlockCall, Decoder, run_block


class InputGroup(NamedTuple):
    """Linears that are given the same tensor, and how often a forward pass calls the first of them."""

    names: list[str]
    calls: int


def input_groups(block: nn.Module, linears: dict[str, nn.Module], call: BlockCall, hidden: Tensor) -> list[InputGroup]:
    """Which Linears of a block share an input, in the order of use, seen by running it on hidden [batch, length, d]."""
    seen: list[tuple[Tensor, list[str]]] = []  # holding the tensors keeps their identities apart
    calls: Counter[str] = Counter()

    def note(name: str, x: Tensor) -> None:
        calls[name] += 1
        if calls[name] == 1:
            names = next((names for tensor, names in seen if tensor is x), None)
            if names is None:
                seen.append((x, [name]))
            else:
                names.append(name)

    with ExitStack() as hooks:
        for name, module in linears.items():
            handle = module.register_forward_pre_hook(lambda _, args, name=name: note(name, args[0]))
            hooks.callback(handle.remove)
        run_block(block, hidden, call)
    return [InputGroup(names, calls[names[0]]) for _, names in seen]


def shared_inputs(decoder: Decoder) -> dict[str, str] | None:
    """Linear -> the first one that is given the same input tensor, found by a forward pass on meta; None for a model
    whose forward needs values."""
    leaders: dict[int, str] = {}
    found: dict[str, str] = {}
    kept: list[Tensor] = []  # so that no id is used twice

    def hook(name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def before(module: nn.Module, args: tuple[Any, ...]) -> None:
            kept.append(args[0])
            found.setdefault(name, leaders.setdefault(id(args[0]), name))

        return before

    linears = {name: module for i in range(len(decoder.blocks)) for name, module in decoder.linears(i).items()}
    handles = [module.register_forward_pre_hook(hook(name)) for name, module in linears.items()]
    ids = torch.zeros(1, 8, dtype=torch.int64, device="meta")
    try:
        # most models read their mask's values unless it comes ready made
        for mask in (torch.zeros(1, 1, 8, 8, device="meta"), None):
            with suppress(Exception), torch.no_grad():
                decoder.model.base_model(input_ids=ids, attention_mask=mask, use_cache=False)
                return found
            leaders.clear()
            found.clear()
    finally:
        for handle in handles:
            handle.remove()
    return None
