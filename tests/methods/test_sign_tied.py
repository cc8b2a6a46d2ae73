"""Sign planes with tied scales: the one scale is fitted, and what is stored is what was rounded to."""

from __future__ import annotations

import pytest
import torch
from pydantic import ValidationError

from ultralowbit.format.planes import TiedPlanes
from ultralowbit.methods.sign import Sign


@pytest.mark.parametrize("planes", [2, 4])
def test_the_scale_is_least_squares_for_the_codes(layer, planes):
    made = layer(10, 200)
    weight = made.weight
    packed = Sign(planes=planes, tied=True, group=64, iterations=50).quantize(weight, None)
    for part, q in zip(weight.split(64, 1), packed.dequantize().split(64, 1), strict=True):
        best = (part * q).sum(1) / q.square().sum(1)  # a factor that would make q fit better
        torch.testing.assert_close(best, torch.ones(10), rtol=2**-9, atol=0)
        scale = q.abs().amin(1, keepdim=True)
        odd = torch.arange(1 - 2**planes, 2**planes, 2) * scale[..., None]
        nearest = (part[..., None] - odd).abs().amin(-1)
        assert ((part - q).abs() <= nearest + 1e-6).float().mean() > 0.99  # a row may use few of the codes


def test_two_tied_planes_lose_little_to_free_ones():
    weight = torch.randn(64, 512, generator=torch.Generator().manual_seed(0))
    tied, free = (
        (weight - Sign(planes=2, tied=tied).quantize(weight, None).dequantize()).square().mean()
        for tied in (True, False)
    )
    assert free < tied < 1.03 * free and tied < 0.125


def test_compensation_uses_the_values_that_are_stored(layer):
    """Also where scales are so small that fp16 stores them inexactly."""
    made = layer(6, 96)
    for size in (1.0, 1e-5):
        packed = Sign(planes=2, tied=True, group=32).quantize(made.weight * size, made.stats)
        assert isinstance(packed.format.segments[0], TiedPlanes)
        plain = Sign(planes=2, tied=True, group=32).quantize(made.weight * size, None)
        assert made.loss(packed.dequantize() / size) < made.loss(plain.dequantize() / size)


@pytest.mark.parametrize("fields", [{"planes": 1}, {"planes": 3}, {"planes": 2, "refine": 1}], ids=str)
def test_what_cannot_be_tied_is_refused(fields):
    with pytest.raises(ValidationError, match="tied planes are 2 or 4 planes without refine"):
        Sign(tied=True, **fields)
