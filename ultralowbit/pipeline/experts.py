"""What enters the experts of one layer: of each the tokens that the router gives it.

An expert that gets too few of them is measured on all tokens, as if the router gave it every one: with a Hessian of
fewer tokens than it has rows the damping would decide how it is rounded.

The statistics of all experts of a layer need not fit at once. What enters the experts does not change while they are
packed, so that the block is run once, and what they are given is kept in files. Run for every few experts instead, with
DeepSeek-V3 28 times, it would take from a hundredth of all time, on an H200, to more than half, on a CPU (from flops).
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ultralowbit.checkpoint.activations import Activations
from ultralowbit.checkpoint.names import expert_linear
from ultralowbit.methods.statistics import InputStats, Need
from ultralowbit.nn.calls import BlockCall, run_block
from ultralowbit.nn.experts import Experts
from ultralowbit.pipeline.collect import Batches, Enough, Original
from ultralowbit.pipeline.ranks import Ranks, own_batches

FEWEST = 0.25
"""Tokens that an expert needs for statistics of its own, for each channel of its input."""
AT_ONCE = 4 << 30
"""Bytes of statistics that are gathered at a time."""


class Given:
    """What the experts `name` of a block are given where `inputs` enter the block, of some lanes of the batches.

    path: of the files that the tokens are kept in, removed by `remove`. Raises `DiskFull`.
    """

    def __init__(
        self, block: nn.Module, name: str, call: BlockCall, inputs: Batches, lanes: list[range], own: Sequence[int],
        device: torch.device, path: Path,
    ) -> None:  # fmt: skip
        self._device = device
        self.routed: dict[int, Tensor] = {}
        """By batch, the experts of each token [tokens, k]."""
        self._hidden: Activations | None = None  # [batches, tokens, d], in the dtype that the experts are given
        for k in own_batches(own, lanes):
            hidden, routed = self._run(block.get_submodule(name), block, inputs[k].to(device), call)
            if self._hidden is None:
                self._hidden = Activations(path, (lanes[-1].stop, *hidden.shape), hidden.dtype, own)
            self._hidden[k].copy_(hidden)
            self.routed[k] = routed.cpu()

    def __getitem__(self, k: int) -> tuple[Tensor, Tensor]:
        """The tokens of batch k [tokens, d] and the experts of each [tokens, k], on the device."""
        return self._hidden[k].to(self._device), self.routed[k].to(self._device)

    def remove(self) -> None:
        """Remove the files."""
        if self._hidden is not None:
            self._hidden.remove()

    @staticmethod
    def _run(experts: nn.Module, block: nn.Module, batch: Tensor, call: BlockCall) -> tuple[Tensor, Tensor]:
        """A batch through the block, up to the experts."""
        given: list[Tensor] = []

        def before(module: nn.Module, args: tuple[Any, ...]) -> None:
            given.extend(args[:2])
            raise Enough

        handle = experts.register_forward_pre_hook(before)
        try:
            with suppress(Enough):
                run_block(block, batch, call)
        finally:
            handle.remove()
        hidden, routed = given
        return hidden, routed


class Mixture:
    """The experts `name` of a block, where `inputs` enter the block: how many tokens each is given, and which.

    lanes: of the batches, all of them; every rank runs those that it owns. scratch: of files, which `remove` removes;
    original: where errors are corrected. Raises `DiskFull`.
    """

    def __init__(
        self, block: nn.Module, name: str, call: BlockCall, inputs: Batches, lanes: list[range], ranks: Ranks,
        device: torch.device, scratch: Path, original: Original | None = None,
    ) -> None:  # fmt: skip
        self.experts: Experts = block.get_submodule(name)
        self._lanes, self._ranks = lanes, ranks
        own = ranks.mine(len(lanes))
        self._given, self._expected = Given(block, name, call, inputs, lanes, own, device, scratch), None
        if original is not None:
            beside = scratch.with_name(f"{scratch.name}.original")
            self._expected = Given(original.block, name, call, original.inputs, lanes, own, device, beside)
            self._beside: Experts = original.block.get_submodule(name)
        self.routed, self.tokens = self._count()

    def remove(self) -> None:
        """Remove the files of what the experts are given."""
        self._given.remove()
        if self._expected is not None:
            self._expected.remove()

    def is_starved(self, expert: int) -> bool:
        """Whether an expert is given too few tokens for statistics of its own."""
        return self.routed[expert] < FEWEST * self.experts.linear(expert, self.experts.projections[0]).in_features

    def seen(self, expert: int) -> int:
        """How many tokens the statistics of an expert are of."""
        return self.tokens if self.is_starved(expert) else self.routed[expert]

    def notes(self, expert: int) -> list[str]:
        """What is to be said of an expert's statistics."""
        few = f"the router gave it {self.routed[expert]} of {self.tokens} calibration tokens: measured on all of them"
        return [few] if self.is_starved(expert) else []

    def members(self, projection: str, name: str, linears: Container[str]) -> dict[int, str]:
        """The experts whose Linear of a projection is among `linears`, and its full name; `name` is that of all
        experts."""
        names = {e: f"{name}.{expert_linear(e, projection)}" for e in range(self.experts.count)}
        return {e: full for e, full in names.items() if full in linears}

    def statistics(
        self, members: Sequence[int], projection: str, new: Callable[[int], InputStats]
    ) -> Iterator[dict[int, InputStats]]:
        """What enters a projection of some experts, as many at a time as fit `AT_ONCE`; the caller has packed the
        projections before. `new` makes an expert's statistics, which stay empty where it is given no token."""
        if not members:
            return
        width = self.experts.linear(members[0], projection).in_features
        most = at_once(width, self._expected is not None)
        for first in range(0, len(members), most):
            some = members[first : first + most]
            stats = self._ranks.sum_lanes(
                self._lanes,
                lambda some=some: [new(expert) for expert in some],
                lambda batches, parts, some=some: self._gather(some, projection, batches, parts),
            )
            for expert, one in zip(some, stats, strict=True):
                one.notes += self.notes(expert)
            yield dict(zip(some, stats, strict=True))

    def _gather(self, members: Sequence[int], projection: str, batches: range, stats: Sequence[InputStats]) -> None:
        """Add what enters a projection to the statistics of each of the experts, of some batches."""
        for k in batches:
            hidden, routed = self._given[k]
            expected = None if self._expected is None else self._expected[k][0]
            for expert, one in zip(members, stats, strict=True):
                everyone = self.is_starved(expert)
                tokens = slice(None) if everyone else (routed == expert).any(-1).nonzero().squeeze(-1)
                x = self.experts.entering(expert, projection, hidden[tokens])
                if Need.ORIGINAL in one.needs:  # of the same tokens, wherever the original's router sends them
                    one.add(x, self._beside.entering(expert, projection, expected[tokens]))
                else:
                    one.add(x)

    def _count(self) -> tuple[list[int], int]:
        """How many tokens the router gives each expert, and how many there are."""
        counts = torch.zeros(self.experts.count, dtype=torch.int64)
        tokens = 0
        for routed in self._given.routed.values():
            counts += routed.reshape(-1).bincount(minlength=len(counts))[: len(counts)]
            tokens += len(routed)
        every = self._ranks.gather([counts.tolist(), tokens])
        return [sum(parts) for parts in zip(*(part for part, _ in every), strict=True)], sum(n for _, n in every)


def at_once(width: int, paired: bool) -> int:
    """Of how many experts statistics are gathered at a time, of inputs [tokens, width]; paired: beside the original's,
    as errors are corrected. Of each there is a sum of all tokens and one of a lane."""
    return max(1, AT_ONCE // (2 * 4 * width * width * (2 if paired else 1)))
