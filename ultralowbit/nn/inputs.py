"""Which Linears share an input: those that a forward pass gives the very same tensor."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import ExitStack, suppress
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ultralowbit.checkpoint.names import expert_of
from ultralowbit.nn.calls import BlockCall, run_block
from ultralowbit.nn.decoder import Decoder
from ultralowbit.nn.experts import ExpertLinear


class InputGroup(NamedTuple):
    """Linears that are given the same tensor, and how often a forward pass calls the first of them."""

    names: list[str]
    calls: int


def watch_inputs(linears: Mapping[str, nn.Module], run: Callable[[], object]) -> list[InputGroup]:
    """The Linears that `run` calls, grouped by the tensor that each is first given, in the order of use."""
    seen: list[tuple[Tensor, list[str]]] = []  # holding the tensors keeps their identities apart
    calls: Counter[str] = Counter()

    def note(name: str, x: Tensor) -> None:
        calls[name] += 1
        if calls[name] > 1:
            return
        names = next((names for tensor, names in seen if tensor is x), None)
        if names is None:
            seen.append((x, [name]))
        else:
            names.append(name)

    with ExitStack() as hooks:
        for name, module in linears.items():
            handle = module.register_forward_pre_hook(lambda _, args, name=name: note(name, args[0]))
            hooks.callback(handle.remove)
        run()
    return [InputGroup(names, calls[names[0]]) for _, names in seen]


def input_groups(block: nn.Module, linears: dict[str, nn.Module], call: BlockCall, hidden: Tensor) -> list[InputGroup]:
    """The groups of a block's Linears, seen by running it on hidden [batch, length, d]; the experts of a layer are one
    group, of the name of their `Experts`."""
    experts = {expert_of(name)[0]: m.experts for name, m in linears.items() if isinstance(m, ExpertLinear)}
    others = {name: module for name, module in linears.items() if not isinstance(module, ExpertLinear)}
    groups = []
    for group in watch_inputs(others | experts, lambda: run_block(block, hidden, call)):
        names = [name for name in group.names if name not in experts]
        groups += [InputGroup(names, group.calls)] * bool(names)
        groups += [InputGroup([name], group.calls) for name in group.names if name in experts]
    return groups


def shared_inputs(decoder: Decoder) -> dict[str, str] | None:
    """Linear -> the first one of its group, seen by a forward pass on meta; None for a model whose forward needs
    values, as that of a mixture of experts does: where a token goes depends on them."""
    if decoder.experts:
        return None
    linears = {name: module for i in range(len(decoder.blocks)) for name, module in decoder.linears(i).items()}
    ids = torch.zeros(1, 8, dtype=torch.int64, device="meta")
    # most models read their mask's values unless it comes ready made
    for mask in (torch.zeros(1, 1, 8, 8, device="meta", dtype=torch.float32), None):
        with suppress(Exception), torch.no_grad():
            groups = watch_inputs(
                linears,
                lambda mask=mask: decoder.model.base_model(input_ids=ids, attention_mask=mask, use_cache=False),
            )
            return {name: group.names[0] for group in groups for name in group.names}
    return None
