"""Finding the tiles of a GPU that `tuning.json` does not know: `ultralowbit bench kernels --tune`."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, replace

from ultralowbit.kernels.gpu.dispatch import Tile, Tuning

Cost = Callable[[Tuning, int], float]
"""Of a tuning with so many tokens; infinite where the GPU has no room for its tiles."""


def tune(cost: Cost, dense: Callable[[int], float], start: Tuning, say: Callable[[str], object] = print) -> Tuning:
    """The best tuning of a GPU by its cost: of the tiles of 8 and of 16 tokens, then of how many programs a product is
    split into, then up to how many tokens it is cheaper than `dense`, writing the weight out."""
    best = start
    for size in best.tiles:
        tiles = [Tile(rows, warps, stages) for rows in (64, 128, 256) for warps in (1, 2, 4) for stages in (2, 3, 4)]
        tried = [replace(best, tiles={**best.tiles, size: tile}) for tile in tiles]
        best = min([best, *tried], key=lambda t, size=size: cost(t, size))
        say(f"tiles of {size} tokens: {best.tiles[size]}")
    best = min([best, *(replace(best, programs=n) for n in (1, 2, 3, 4, 6, 8))], key=lambda t: cost(t, 1))
    say(f"programs for each multiprocessor: {best.programs}")
    upto = best.gemv_tokens
    for tokens in (16, 32, 48, 64, 96, 128, 192, 256):
        if cost(best, tokens) >= dense(tokens):
            break
        upto = tokens
    say(f"fields are multiplied as they are stored up to {upto} tokens")
    return replace(best, gemm_tokens=upto)


def entry(name: str, tuning: Tuning) -> str:
    """What `tuning.json` takes for the GPU of this name."""
    values = asdict(tuning)
    del values["processors"]
    return f"{json.dumps(name)}: {json.dumps(values, indent=2)}"
