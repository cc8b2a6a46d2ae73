"""Round to nearest against the formula, element by element."""

from __future__ import annotations

import math

import pytest
import torch

from ultralowbit.errors import FormatError
from ultralowbit.methods.rtn import RTN
from ultralowbit.methods.statistics import Need

MIN_SCALE = 2.0**-24


def half(value: float) -> float:
    return torch.tensor(value).half().item()


def slow_rtn(row: list[float], bits: int, symmetric: bool) -> list[float]:
    """One group of one row: q = clamp(round(w / s) + z, 0, 2^b - 1), its range widened to include 0."""
    top = 2**bits - 1
    low, high = min(*row, 0.0), max(*row, 0.0)
    if symmetric:
        high = max(high, -low)
        low = -high
    scale = max(half((high - low) / top), MIN_SCALE)
    zero = 2 ** (bits - 1) if symmetric else min(max(round(-low / scale), 0), top)
    return [(min(max(round(w / scale) + zero, 0), top) - zero) * scale for w in row]


@pytest.mark.parametrize("symmetric", [False, True], ids=["asymmetric", "symmetric"])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize(
    ("columns", "group"), [(96, 32), (100, 32), (70, 64), (130, 128), (77, None), (20, 128), (1, None)]
)
def test_every_weight_is_the_nearest_of_its_grid(layer, columns, group, bits, symmetric):
    weight = layer(12, columns, seed=columns + bits).weight
    quantized = RTN(bits=bits, group=group, symmetric=symmetric).quantize(weight, None).dequantize()
    step = group or columns
    expected = torch.tensor(
        [
            [q for g in range(0, columns, step) for q in slow_rtn([*row[g : g + step], 0.0], bits, symmetric)[:-1]]
            for row in weight.tolist()
        ]
    )
    # fp32 and fp64 may break a tie differently
    assert ((quantized - expected).abs() > 1e-6 * expected.abs()).float().mean() < 1e-3


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_weights_on_a_grid_are_kept(bits):
    """A whole range of codes times an fp16 scale: nothing to lose."""
    codes = torch.arange(2**bits).float()
    for zero in (0, 1, 2 ** (bits - 1), 2**bits - 1):
        weight = ((codes - zero) * 0.125).repeat(3, 1)
        assert torch.equal(RTN(bits=bits, group=None).quantize(weight, None).dequantize(), weight)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_the_error_is_at_most_half_a_step(layer, bits):
    weight = layer(20, 128).weight
    packed = RTN(bits=bits, group=64).quantize(weight, None)
    scale = packed.tensors["weight_scale"].float().T.repeat_interleave(64, 1)
    # fp16 moves the ends of the range by 2^-11 of it, and the zero point is rounded too: the outermost code may clamp
    assert ((packed.dequantize() - weight).abs() <= scale * (1 + 2**bits * 2**-11)).all()
    assert ((packed.dequantize() - weight).abs() <= scale * 0.501).float().mean() > 0.9


@pytest.mark.parametrize("symmetric", [False, True], ids=["asymmetric", "symmetric"])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_clipping_never_raises_what_it_searches_over(layer, bits, symmetric):
    def error(clip):
        packed = RTN(bits=bits, group=32, symmetric=symmetric, clip=clip).quantize(weight, None)
        return (packed.dequantize() - weight).abs().pow(2.4).view(len(weight), -1, 32).sum(2)

    weight = layer(30, 96).weight
    clipped, whole = error("mse"), error(None)
    assert (clipped <= whole * (1 + 1e-6)).all()
    assert bits == 8 or clipped.sum() < 0.95 * whole.sum()


@pytest.mark.parametrize("bits", [2, 4])
def test_clipping_finds_the_best_of_its_80_ranges(layer, bits):
    weight = layer(4, 400, seed=3).weight
    weight[:2, 7] = weight[:2].abs().amax(1) * torch.tensor([2, 3])  # ranges cut to less than half
    quantized = RTN(bits=bits, group=None, clip="mse").quantize(weight, None).dequantize()
    for row, q in zip(weight.tolist(), quantized, strict=True):
        low, high = min(*row, 0.0), max(*row, 0.0)
        errors = []
        for i in range(80):
            scale = half((high - low) * (1 - i / 100) / (2**bits - 1))
            zero = min(max(round(-low * (1 - i / 100) / scale), 0), 2**bits - 1)
            values = [(min(max(round(w / scale) + zero, 0), 2**bits - 1) - zero) * scale for w in row]
            errors.append(sum(abs(w - v) ** 2.4 for w, v in zip(row, values, strict=True)))
        error = sum(abs(w - v) ** 2.4 for w, v in zip(row, q.tolist(), strict=True))
        assert math.isclose(error, min(errors), rel_tol=1e-4)


def test_rows_do_not_know_of_one_another(layer):
    weight = layer(10, 70).weight
    whole = RTN(bits=2, group=32).quantize(weight, None).dequantize()
    assert torch.equal(RTN(bits=2, group=32).quantize(weight[3:5], None).dequantize(), whole[3:5])


def test_it_needs_no_data():
    assert RTN().needs is Need.NOTHING


def test_a_weight_beyond_fp16_scales_is_refused():
    with pytest.raises(FormatError, match="does not fit fp16"):
        RTN(bits=2, group=None).quantize(torch.tensor([[1.0, 3e5]]), None)
