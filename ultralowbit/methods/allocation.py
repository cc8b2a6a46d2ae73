"""Allocation: which Linear is packed with how many bits, so that all of them together fit a number of bytes.

The losses of several Linears are taken to add up. The greedy walk along the lower convex hull of each Linear's (bytes,
loss) is then the exact minimum wherever it stops on a step of the hull, and elsewhere off by less than the one step
that did not fit (Shoham, Gersho: Efficient bit allocation for an arbitrary set of quantizers, IEEE TASSP 36, 1988).
"""

from __future__ import annotations

from itertools import pairwise

from pydantic import Field
from torch import Tensor

from ultralowbit.errors import InputError
from ultralowbit.methods.base import fields


@fields
class Allocate:
    """bits: true bits a weight of all packed Linears together, scales included, never exceeded; each Linear gets as
    many planes as pay most. windows: of the calibration text, on which it is measured what pays."""

    bits: float = Field(gt=0, le=16)
    windows: int = Field(16, ge=1, le=4096)


def allocate(losses: Tensor, nbytes: Tensor, budget: int) -> list[int]:
    """The choice of each Linear, such as its number of planes, with the least sum of losses within the budget.

    losses [linears, choices]: what each choice costs in quality, of any unit; nbytes [linears, choices] int64: what it
    takes to store; budget: bytes of all Linears together, never exceeded. Raises `InputError` where even the smallest
    choices exceed it.
    """
    losses, nbytes = losses.double().tolist(), nbytes.tolist()
    hulls = [_hull(loss, size) for loss, size in zip(losses, nbytes, strict=True)]
    left = budget - sum(size[hull[0]] for size, hull in zip(nbytes, hulls, strict=True))
    if left < 0:
        raise InputError(
            f"the smallest formats take {budget - left} bytes, {budget} are asked for: ask for more bits, or leave "
            "Linears out of what is packed"
        )
    steps = []  # of all Linears; those of one fall in what they bring a byte
    for linear, hull in enumerate(hulls):
        for low, high in pairwise(hull):
            grown = nbytes[linear][high] - nbytes[linear][low]
            steps.append(((losses[linear][low] - losses[linear][high]) / grown, linear, high, grown))
    steps.sort(key=lambda step: (-step[0], step[1]))
    chosen, stopped = [hull[0] for hull in hulls], set()
    for _, linear, high, grown in steps:
        if linear in stopped or grown > left:
            stopped.add(linear)  # its later steps bring less a byte, and do not follow from here
            continue
        chosen[linear], left = high, left - grown
    return chosen


def _hull(losses: list[float], nbytes: list[int]) -> list[int]:
    """The choices on the lower convex hull, from the smallest: each falls in loss, and less a byte than the last."""
    hull: list[int] = []
    for choice in sorted(range(len(losses)), key=lambda c: (nbytes[c], losses[c])):
        if hull and losses[choice] >= losses[hull[-1]]:
            continue
        while len(hull) > 1 and _slope(hull[-2], hull[-1], losses, nbytes) <= _slope(hull[-1], choice, losses, nbytes):
            hull.pop()
        hull.append(choice)
    return hull


def _slope(low: int, high: int, losses: list[float], nbytes: list[int]) -> float:
    """What a step brings a byte."""
    return (losses[low] - losses[high]) / (nbytes[high] - nbytes[low])
