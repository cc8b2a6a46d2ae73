"""What several processes share of a compression, and what they send each other for it; ranks.py says how.

Forward passes and sums over tokens are shared by lanes of calibration batches: more ranks than lanes share no more.
Linears that have their input in common are solved at once, by a rank each: a block whose largest Linear stands alone
takes at least the time of that one. The experts of a mixture are hundreds, which share well. Whole models are trained
by all ranks; adapters and blocks by rank 0.
"""

from __future__ import annotations

import math
from collections import Counter

from ultralowbit.checkpoint.activations import lanes_of
from ultralowbit.pipeline.ranks import dealt
from ultralowbit.pipeline.workload import Workload

BY_LANES = {"forward passes", "Hessians"}
"""Parts of an estimate (rates.py) that are shared by lanes."""
BY_LINEARS = {"rounding", "updates", "output errors"}
"""Those that are shared by Linears."""


def shared_seconds(work: Workload, parts: dict[str, float]) -> dict[str, float]:
    """The seconds of one process, by part -> those of the rank that has most to do."""
    if work.ranks == 1:
        return parts
    shares = {
        **dict.fromkeys(BY_LANES, lanes_share(work)),
        **dict.fromkeys(BY_LINEARS, linears_share(work)),
        # each window is a batch of its own, and every Linear is packed once more
        "what matters": max(lanes_share(work), linears_share(work)),
        "factors": factors_share(work),
        "finetune": 1 / work.ranks,
    }
    return {part: seconds * shares.get(part, 1.0) for part, seconds in parts.items()}


def lanes_share(work: Workload) -> float:
    """The share of the calibration text that the busiest rank runs."""
    lanes = [len(batches) for batches in lanes_of(max(1, work.tokens // max(1, work.batch)))]
    return max(sum(lanes[rank :: work.ranks]) for rank in range(min(work.ranks, len(lanes)))) / sum(lanes)


def linears_share(work: Workload) -> float:
    """The share of the weights that are packed while others wait or do as much."""
    busiest = 0
    for costs in work.solved.values():
        load: Counter[int] = Counter()
        for name, rank in dealt(costs, work.ranks).items():
            load[rank] += costs[name]
        busiest += max(load.values())
    return busiest / sum(sum(costs.values()) for costs in work.solved.values())


def factors_share(work: Workload) -> float:
    """The share of the factors that the busiest rank makes: one for an input group, by each rank that needs it."""
    sizes = [len(costs) for costs in work.solved.values()]
    return sum(math.ceil(n / work.ranks) for n in sizes) / sum(sizes) if work.decoder.experts else 1.0


def received_bytes(work: Workload) -> int:
    """What a rank receives from others of sums over tokens, while blocks are packed: its share of each lane's sum, and
    the totals of the others' shares. Packed weights and training are not in it."""
    if work.ranks == 1:
        return 0
    lanes = len(lanes_of(max(1, work.tokens // max(1, work.batch))))
    numbers = sum(m**2 for m, _ in work.hessians) * (2 if work.paired else 1)
    return int(4 * numbers * (1 - 1 / work.ranks) * (1 + lanes / work.ranks))
