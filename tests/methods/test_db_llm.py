"""Flexible dual binarization: the grid it starts from, the paper's rule for the bits, free scales."""

from __future__ import annotations

import pytest
import torch

from ultralowbit.format.words import unpack_fields
from ultralowbit.methods.db_llm import DBLLM, DualRounding


def parts(packed, columns: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(bits [2, out, in], scales [2, out, in]) in fp64."""
    bits = unpack_fields(packed.tensors["weight"], 1, columns).double()
    group = packed.format.segments[0].group or columns
    scale = packed.tensors["weight_scale"].double().transpose(1, 2).repeat_interleave(group, 2)[..., :columns]
    return bits, scale


@pytest.mark.parametrize("group", [32, 64, None])
@pytest.mark.parametrize("iterations", [0, 10])
def test_bits_follow_the_papers_rule(layer, group, iterations):
    """b1 = H(w - (a1 + a2) / 2), b2 = H(-(w - a1 b1 - a2 / 2)), mirrored where the longer tail is the negative one."""
    weight = layer(9, 100).weight
    packed = DBLLM(group=group, iterations=iterations).quantize(weight, None)
    bits, (a1, a2) = parts(packed, 100)
    flip = torch.where(a1 >= a2, 1.0, -1.0).double()
    w, a1, a2 = weight.double() * flip, a1 * flip, a2 * flip
    assert ((a2 <= 0) & (a1 + a2 >= 0)).all()
    b1 = (w >= (a1 + a2) / 2).double()
    b2 = (w <= a1 * b1 + a2 / 2).double()
    distance = torch.stack([(w - level).abs() for level in (a2, 0 * a2, a1 + a2, a1)]).sort(0).values
    clear = distance[1] - distance[0] > 1e-6 * a1  # a tie may fall to either side
    assert clear.float().mean() > 0.99
    assert torch.equal(bits[0][clear], b1[clear]) and torch.equal(bits[1][clear], b2[clear])


def test_without_iterations_it_is_the_2_bit_grid_with_a_step_about_the_best(layer):
    weight = layer(7, 64).weight
    packed = DBLLM(group=None).quantize(weight, None)
    a1, a2 = packed.tensors["weight_scale"].double()[:, 0]
    assert torch.equal(a1, -2 * a2)
    error = (packed.dequantize() - weight).square().sum(1)
    for share in torch.arange(1, 41) / 80:
        s = (weight.abs().amax(1) * share).half().double()
        for sign in (1, -1):
            levels = torch.stack([-s, 0 * s, s, 2 * s]) * sign  # [4, out]
            tried = (weight.double()[None] - levels[..., None]).square().amin(0).sum(1)
            assert (error <= tried * 1.02).all()


def test_free_scales_leave_less_error_than_tied_ones(layer):
    """What the paper's flexible scales are for, before any training."""
    for seed in range(3):
        weight = layer(16, 128, seed).weight
        tied, free = (DBLLM(group=64, iterations=n).quantize(weight, None).dequantize() for n in (0, 15))
        error = [(q - weight).square().sum(1) for q in (tied, free)]
        assert (error[1] <= error[0] * (1 + 1e-6)).all() and error[1].sum() < 0.98 * error[0].sum()


def test_compensation_lowers_the_error_of_the_outputs(layer):
    problem = layer(16, 128)
    plain, compensated = (
        DBLLM(iterations=10, compensation=how).quantize(problem.weight, problem.stats).dequantize()
        for how in ("none", "gptq")
    )
    assert problem.loss(compensated) < 0.8 * problem.loss(plain)


def test_a_mirrored_row_gives_the_mirrored_result():
    weight = torch.randn(5, 96, generator=torch.Generator().manual_seed(0)).exp() - 1
    one, other = (DBLLM(group=32).quantize(w, None).dequantize() for w in (weight, -weight))
    torch.testing.assert_close(one, -other)


def test_constant_and_empty_rows():
    weight = torch.stack([torch.full((64,), 0.5), torch.zeros(64), torch.full((64,), -0.25)])
    values = DBLLM(iterations=5).quantize(weight, None).dequantize()
    torch.testing.assert_close(values, weight, rtol=2**-11, atol=2**-24)
    rounding = DualRounding(3, 64, 64, 5, torch.device("cpu"))
    assert rounding.segment.alphabet == "01"
