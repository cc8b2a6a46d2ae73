"""Finding the tiles of a GPU that `tuning.json` does not know: `ultralowbit bench kernels --tune`."""

from __future__ import annotations

import json
import math
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ultralowbit.bench.models import FORMATS
from ultralowbit.bench.timing import captured, copies, race
from ultralowbit.format.testing import random_packed
from ultralowbit.format.weight import Format
from ultralowbit.units import format_seconds

if TYPE_CHECKING:
    from ultralowbit.kernels.gpu.dispatch import Tuning
    from ultralowbit.kernels.gpu.launch import Launch

TUNED_SHAPES = ((4096, 4096), (8192, 8192))
TUNED_FORMATS = ("1 plane", "2 tied planes g128")

PROGRAMS = (1, 2, 3, 4, 6, 8, 12)
ROWS, WARPS, STAGES = (64, 128, 256), (1, 2, 4, 8), (2, 3, 4)
UNPACKED_ROWS, UNPACKED_WARPS = (64, 128), (4, 8)
TOKENS = (16, 32, 48, 64, 96, 128, 192, 256, 384, 512, 1024, 2048, 4096)
"""At which the three ways to multiply are compared."""


class Search:
    """The best tuning of a GPU so far; `run` tries one value after the other, what promises most first.

    fields(tuning, tokens): seconds with that many tokens, infinite where the GPU has no room for the tiles;
    unpacking(tuning, tokens): the same where programs unpack weights; dense(tokens): seconds of writing the weight out.
    `say` is told of each try how it went, and how long the rest may take.
    """

    def __init__(
        self,
        fields: Callable[[Tuning, int], float],
        unpacking: Callable[[Tuning, int], float],
        dense: Callable[[int], float],
        start: Tuning,
        say: Callable[[str], object] = print,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.best, self._say, self._clock = start, say, clock
        self._fields, self._unpacking, self._dense = fields, unpacking, dense
        self._known: dict[tuple[Any, ...], float] = {}
        self._tries = len(PROGRAMS) + len(TOKENS) + len(start.tiles) * len((*ROWS, *WARPS, *STAGES))
        self._tries += len(start.unpacked_tiles) * len((*UNPACKED_ROWS, *UNPACKED_WARPS, *STAGES))
        self._done = 0

    def run(self, seconds: float = math.inf) -> bool:
        """Search for at most so long, and a try more; False where that did not suffice. `best` holds at any moment."""
        began = self._clock()
        for what in self._steps():
            spent, self._done = self._clock() - began, self._done + 1
            left = spent / self._done * (self._tries - self._done)
            self._say(f"{self._done:3}/{self._tries} {what}; about {format_seconds(left)} left")
            if spent >= seconds and self._done < self._tries:
                self._say(f"stopped after {format_seconds(spent)}: what was not tried is as it was")
                return False
        return True

    def _steps(self) -> Iterator[str]:
        """Make one try after the other; yields what came out of each."""
        for programs in PROGRAMS:
            what = f"{programs} programs for each multiprocessor"
            yield self._try(what, replace(self.best, programs=programs), self._fields, 1)
        yield from self._tiles("tiles", self._fields, ROWS, WARPS)
        yield from self._tiles("unpacked_tiles", self._unpacking, UNPACKED_ROWS, UNPACKED_WARPS)
        yield from self._thresholds()

    def _tiles(
        self, kind: str, cost: Callable[[Tuning, int], float], rows: Sequence[int], warps: Sequence[int]
    ) -> Iterator[str]:
        for size in getattr(self.best, kind):
            for name, values in (("rows", rows), ("warps", warps), ("stages", STAGES)):
                for value in values:
                    tiles = getattr(self.best, kind)
                    tried = replace(self.best, **{kind: {**tiles, size: replace(tiles[size], **{name: value})}})
                    yield self._try(f"{kind.replace('_', ' ')} of {size} tokens, {value} {name}", tried, cost, size)

    def _thresholds(self) -> Iterator[str]:
        """Up to how many tokens fields are the cheapest of three ways, and from there on programs that unpack."""
        fields_upto = unpacked_upto = self.best.gemv_tokens
        fields_hold = unpacked_hold = True
        for tokens in TOKENS:  # what has lost once is not tried with more
            fields = self._seconds(self.best, self._fields, tokens) if fields_hold else math.inf
            unpacked = self._seconds(self.best, self._unpacking, tokens) if unpacked_hold else math.inf
            dense = self._dense(tokens)
            fields_hold &= fields < min(unpacked, dense)
            unpacked_hold &= fields_hold or unpacked < dense
            fields_upto = tokens if fields_hold else fields_upto
            unpacked_upto = tokens if unpacked_hold else unpacked_upto
            # what is known of more tokens holds until a number of them says otherwise
            self.best = replace(
                self.best,
                gemm_tokens=max(self.best.gemm_tokens, fields_upto) if fields_hold else fields_upto,
                unpacked_tokens=max(self.best.unpacked_tokens, unpacked_upto) if unpacked_hold else unpacked_upto,
            )
            ways = {"fields": fields, "unpacked": unpacked, "the weight written out": dense}
            ways = [f"{way} {1e6 * seconds:.1f} us" for way, seconds in ways.items() if seconds < math.inf]
            yield f"{tokens} tokens: {', '.join(ways)}"

    def _try(self, what: str, tuning: Tuning, cost: Callable[[Tuning, int], float], tokens: int) -> str:
        """Take the tuning for the best if it is; returns what to say of it."""
        before, seconds = self._seconds(self.best, cost, tokens), self._seconds(tuning, cost, tokens)
        if seconds < before:
            self.best = tuning
        return f"{what}: {1e6 * seconds:.1f} us, best {1e6 * min(before, seconds):.1f} us"

    def _seconds(self, tuning: Tuning, cost: Callable[[Tuning, int], float], tokens: int) -> float:
        key = repr(tuning), cost, tokens
        if key not in self._known:
            self._known[key] = cost(tuning, tokens)
        return self._known[key]


def entry(name: str, tuning: Tuning) -> str:
    """What `tuning.json` takes for the GPU of this name."""
    values = asdict(tuning)
    del values["processors"]
    return f"{json.dumps(name)}: {json.dumps(values, indent=2)}"


def tune_bench(
    device: torch.device,
    seconds: float = math.inf,
    shapes: Iterable[tuple[int, int]] = TUNED_SHAPES,
    formats: Sequence[str] = TUNED_FORMATS,
    keep: Callable[[str], object] = lambda entry: None,
    say: Callable[[str], object] = print,
) -> None:
    """Search for the entry of tuning.json for the GPU, by the geometric mean of seconds over some shapes and formats.

    `keep` gets the entry in the end: also where the search was interrupted, or lasted longer than `seconds`.
    """
    from ultralowbit.kernels.gpu.dispatch import dequantized, product, tuning_of, unpacking
    from ultralowbit.kernels.gpu.launch import OutOfResources
    from ultralowbit.kernels.gpu.launch import run as launch

    cases = []
    for out, columns in shapes:
        for name in formats:
            made = random_packed(FORMATS[name](columns), out, device=device)
            count = copies(made.nbytes, device)
            cases.append((made.format, [{k: t.clone() for k, t in made.tensors.items()} for _ in range(count)]))

    def mean(tokens: int, call: Callable[[Tensor, dict[str, Tensor], Format], object]) -> float:
        logs = []
        for format, places in cases:
            x = torch.randn(tokens, format.in_features, device=device, dtype=torch.bfloat16)
            run = captured([lambda t=t, x=x, f=format: call(x, t, f) for t in places], device)
            logs.append(math.log(statistics.median(race({"": run}, device, 10)[""]) / len(places)))
        return math.exp(sum(logs) / len(logs))

    def cost(launches: Callable[..., tuple[list[Launch], Tensor]]) -> Callable[[Tuning, int], float]:
        def seconds(tuning: Tuning, tokens: int) -> float:
            def call(x: Tensor, tensors: dict[str, Tensor], format: Format) -> None:
                launch(launches(x, tensors, format, tuning)[0], device)

            try:
                return mean(tokens, call)
            except OutOfResources:
                return math.inf

        return seconds

    search = Search(cost(product), cost(unpacking), lambda tokens: mean(tokens, dequantized), tuning_of(device), say)
    try:
        search.run(seconds)
    finally:
        keep(entry(torch.cuda.get_device_name(device), search.best))
