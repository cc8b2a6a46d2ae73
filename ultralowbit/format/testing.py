"""Random packed weights in any format, and segments of every kind, for tests and benchmarks."""

from __future__ import annotations

import torch

from ultralowbit.format.ints import Ints
from ultralowbit.format.planes import Planes, TiedPlanes
from ultralowbit.format.segment import random_marks
from ultralowbit.format.weight import Format, PackedWeight

SEGMENTS = [
    Planes(1024, 1),
    Planes(512, 1, 128),
    Planes(1024, 1, 512),
    Planes(1100, 1, 1024),  # a group of two blocks, and one that ends in the tail
    Planes(700, 1, 64, offset=True),  # 12 lanes in the tail, three groups in it
    Planes(512 + 384, 2, 128),  # groups that end inside the fields of the tail
    Planes(172, 3, None, "01"),
    Planes(33, 4, 32, "01", offset=True),
    Planes(544, 2, 32),
    TiedPlanes(600, 2, 128),
    TiedPlanes(172, 4),
    Ints(512, 2, 128),
    Ints(600, 2, 128, True),
    Ints(172, 2),
    Ints(640, 3, 128),
    Ints(129, 3, None, True),
    Ints(300, 4, 64),
    Ints(896, 4, 256, True),
    Ints(1, 4),
    Ints(200, 8, 128),
    Ints(96, 8, 32, True),
]
"""Planes and integers, whose groups end where fields or blocks do, with tails of any length."""


def random_packed(format: Format, out: int, seed: int = 0, device: torch.device | str = "cpu") -> PackedWeight:
    """A weight [out, in] whose every stored byte is random, padding included: all codes, scales of both signs, such
    that the sums of a row stay near 1."""
    generator = torch.Generator(device).manual_seed(seed)
    tensors = {
        prefix + suffix: tensor
        for prefix, _, part in format.parts
        for suffix, tensor in part.random(out, generator).items()
    }
    if format.transform is not None and format.transform.channel_order:
        marks = random_marks(1, format.in_features, format.segments[0].columns, generator)
        tensors["weight_input_channel_order"] = marks[0]
    return PackedWeight(format, (out, format.in_features), tensors)
