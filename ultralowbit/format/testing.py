"""Random packed weights in any format, for tests and benchmarks."""

from __future__ import annotations

import torch

from ultralowbit.format.segment import random_marks
from ultralowbit.format.weight import Format, PackedWeight


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
