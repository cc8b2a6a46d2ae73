"""GPTQ against ten lines of fp64."""

from __future__ import annotations

import pytest
import torch

from ultralowbit.methods import compensate as base
from ultralowbit.methods.gptq import GPTQ
from ultralowbit.methods.rtn import RTN


def grid(bits: int, symmetric: bool, clip: bool = False):
    """How a group is fitted, in fp64 but for the fp16 scale."""
    top = 2**bits - 1

    def ranged(low, high):
        scale = ((high - low) / top).half().double()
        scale = scale.where(scale.abs() >= 2.0**-24, 2.0**-24)
        zero = torch.full_like(scale, 2 ** (bits - 1)) if symmetric else (-low / scale).round().clamp(0, top)
        return scale, zero

    def fit(weight, importance):
        low, high = weight.amin(1).clamp_max(0), weight.amax(1).clamp_min(0)
        if symmetric:
            high = torch.maximum(high, -low)
            low = -high
        shares = [1 - i / 100 for i in range(80 if clip else 1)]
        if symmetric and clip:
            shares += [-share for share in shares]
        tried = [ranged(low * share, high * share) for share in shares]
        errors = torch.stack(
            [
                (weight - (((weight / s[:, None]).round() + z[:, None]).clamp(0, top) - z[:, None]) * s[:, None])
                .abs()
                .pow(2.4)
                .sum(1)
                for s, z in tried
            ]
        )
        best = errors.argmin(0)
        rows = torch.arange(len(weight))
        scale, zero = (torch.stack(values)[best, rows] for values in zip(*tried, strict=True))
        return lambda w: (((w / scale).round() + zero).clamp(0, top) - zero) * scale

    return fit


@pytest.mark.parametrize("act_order", [False, True], ids=["left-to-right", "act-order"])
@pytest.mark.parametrize("symmetric", [False, True], ids=["asymmetric", "symmetric"])
@pytest.mark.parametrize("group", [32, 64, 128, None], ids=["g32", "g64", "g128", "row"])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_it_is_algorithm_1(layer, gptq_reference, differing_rows, bits, group, symmetric, act_order):
    problem = layer(24, 144, seed=bits)  # 144: the last group is ragged
    method = GPTQ(bits=bits, group=group, symmetric=symmetric, act_order=act_order)
    expected = gptq_reference(problem, grid(bits, symmetric), group, method.damp, act_order)
    assert differing_rows(method.quantize(problem.weight, problem.stats).dequantize(), expected) <= 1


@pytest.mark.parametrize("symmetric", [False, True], ids=["asymmetric", "symmetric"])
@pytest.mark.parametrize("group", [32, None], ids=["g32", "row"])
@pytest.mark.parametrize("bits", [2, 4])
def test_it_is_algorithm_1_with_clipped_ranges(layer, gptq_reference, differing_rows, bits, group, symmetric):
    problem = layer(24, 80, seed=bits)
    method = GPTQ(bits=bits, group=group, symmetric=symmetric, clip="mse")
    expected = gptq_reference(problem, grid(bits, symmetric, clip=True), group, method.damp)
    assert differing_rows(method.quantize(problem.weight, problem.stats).dequantize(), expected) <= 1


@pytest.mark.parametrize("columns", [1, 2, 15, 16, 17, 33, 47, 65, 129, 300])
@pytest.mark.parametrize("group", [32, None], ids=["g32", "row"])
def test_blocks_of_columns_reach_every_column(layer, gptq_reference, differing_rows, columns, group):
    problem = layer(24, columns, seed=columns)
    expected = gptq_reference(problem, grid(3, False), group, 0.01)
    quantized = GPTQ(bits=3, group=group).quantize(problem.weight, problem.stats).dequantize()
    assert differing_rows(quantized, expected) <= 1


@pytest.mark.parametrize("block", [1, 5, 16, 1000])
def test_the_size_of_a_block_changes_nothing(layer, monkeypatch, differing_rows, block):
    problem = layer(24, 150)
    method = GPTQ(bits=2, group=32, act_order=True)
    expected = method.quantize(problem.weight, problem.stats).dequantize()
    monkeypatch.setattr(base, "BLOCK", block)
    assert differing_rows(method.quantize(problem.weight, problem.stats).dequantize(), expected) <= 1


@pytest.mark.parametrize("damp", [1e-4, 0.1, 1.0])
def test_damping_is_a_share_of_the_mean_diagonal(layer, gptq_reference, differing_rows, damp):
    problem = layer(24, 60)
    expected = gptq_reference(problem, grid(3, False), None, damp)
    quantized = GPTQ(bits=3, group=None, damp=damp).quantize(problem.weight, problem.stats).dequantize()
    assert differing_rows(quantized, expected) <= 1


@pytest.mark.parametrize("act_order", [False, True], ids=["left-to-right", "act-order"])
@pytest.mark.parametrize(
    ("bits", "symmetric"),
    [(2, False), (3, False), (4, False), (3, True), (4, True)],
    ids=["2", "3", "4", "3-sym", "4-sym"],
)
def test_the_output_error_is_below_that_of_rounding(layer, bits, symmetric, act_order):
    """Not so for 2 symmetric bits: their grid clamps the largest positive weights, and compensation spreads that."""
    for seed in range(6):
        problem = layer(16, 96, seed=seed)
        rounded = RTN(bits=bits, group=32, symmetric=symmetric).quantize(problem.weight, None)
        solved = GPTQ(bits=bits, group=32, symmetric=symmetric, act_order=act_order)
        loss = problem.loss(solved.quantize(problem.weight, problem.stats).dequantize())
        assert loss < problem.loss(rounded.dequantize())


def test_without_statistics_it_rounds_to_nearest(layer):
    weight = layer(8, 70).weight
    for fields in ({"bits": 2, "group": 32}, {"bits": 3, "group": None, "symmetric": True}, {"bits": 4, "clip": "mse"}):
        assert torch.equal(
            GPTQ(**fields).quantize(weight, None).dequantize(), RTN(**fields).quantize(weight, None).dequantize()
        )


def test_uncorrelated_inputs_leave_nothing_to_compensate(layer):
    problem = layer(8, 64)
    stats = problem.stats
    stats._sum = torch.eye(64)
    quantized = GPTQ(bits=3, group=32).quantize(problem.weight, stats).dequantize()
    assert torch.equal(quantized, RTN(bits=3, group=32).quantize(problem.weight, None).dequantize())


def test_a_channel_without_input_is_rounded_and_not_erased(layer, gptq_reference, differing_rows):
    problem = layer(24, 40)
    problem.inputs[:, [3, 17]] = 0
    stats = problem.stats
    packed = GPTQ(bits=4, group=None).quantize(problem.weight, stats)
    assert stats.notes == ["2 of 40 input channels are zero on all calibration text"]
    scale = packed.tensors["weight_scale"].float().T
    dead = (packed.dequantize() - problem.weight)[:, [3, 17]].abs()
    assert (dead <= 0.51 * scale).float().mean() > 0.9
    expected = gptq_reference(problem, grid(4, False), None, 0.01)
    assert differing_rows(packed.dequantize(), expected) <= 1
