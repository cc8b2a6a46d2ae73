"""Refinement of sign planes and integer codes: every step against what it minimises, in fp64."""

from __future__ import annotations

from itertools import product

import pytest
import torch

from ultralowbit.format.weight import PackedWeight
from ultralowbit.format.words import unpack_fields
from ultralowbit.methods import refine as refinement
from ultralowbit.methods.gptq import GPTQ
from ultralowbit.methods.refine import refine
from ultralowbit.methods.rounding.signs import SignRounding
from ultralowbit.methods.sign import Sign
from ultralowbit.methods.statistics import InputStats

DAMP = 0.01
SHAPES = [(9, 100, 1, 32), (5, 70, 2, None), (3, 64, 3, 64), (1, 40, 2, None), (4, 1, 1, None)]


def damped(hessian: torch.Tensor) -> torch.Tensor:
    H = hessian.double().clone()
    H.diagonal().add_(DAMP * H.diagonal().mean())
    return H


def errors(weight: torch.Tensor, values: torch.Tensor, H: torch.Tensor) -> torch.Tensor:
    """(w - q) H (w - q)^T of each row."""
    rest = weight.double() - values.double()
    return ((rest @ H) * rest).sum(1)


def refined(problem, planes: int, group: int | None, rounds: int) -> PackedWeight:
    """The compensated weight after so many rounds of refinement; 0 is before any."""
    rounding = SignRounding(*problem.weight.shape, planes, group, 15, problem.weight.device)
    return rounding.pack(refine(problem.weight, rounding, problem.stats.factor(DAMP), rounds))


@pytest.mark.parametrize("shape", SHAPES)
def test_no_round_over_all_columns_raises_the_error_of_a_row(layer, shape):
    out, columns, planes, group = shape
    problem = layer(out, columns)
    H = damped(problem.stats.hessian)
    plain, before = (errors(problem.weight, refined(problem, planes, group, n).dequantize(), H) for n in (0, 1))
    assert before.sum() <= plain.sum() * (1 + 1e-5)  # not of each row: later blocks start elsewhere
    for rounds in (2, 3, 6):
        after = errors(problem.weight, refined(problem, planes, group, rounds).dequantize(), H)
        assert (after <= before * (1 + 1e-5)).all()  # the sums are in fp32 there
        before = after


@pytest.mark.parametrize("planes", [1, 2])
def test_it_pays_where_inputs_are_correlated(layer, planes):
    problem = layer(32, 128)
    H = damped(problem.stats.hessian)
    plain, searched, better = (refined(problem, planes, None, rounds).dequantize() for rounds in (0, 1, 3))
    assert errors(problem.weight, searched, H).sum() < 0.97 * errors(problem.weight, plain, H).sum()
    assert errors(problem.weight, better, H).sum() < 0.95 * errors(problem.weight, plain, H).sum()
    assert torch.equal(
        Sign(planes=planes, refine=3, damp=DAMP).quantize(problem.weight, problem.stats).dequantize(), better
    )


@pytest.mark.parametrize("shape", SHAPES[:3])
def test_scales_are_the_joint_least_squares(layer, shape, monkeypatch):
    """Of the signs that are stored: each row of V [K groups, in] is a plane within a group."""
    out, columns, planes, group = shape
    problem = layer(out, columns)
    monkeypatch.setattr(refinement._Fit, "fit_codes", lambda self: None)
    weight, packed = problem.weight, refined(problem, planes, group, 2)
    values = packed.dequantize()
    signs = unpack_fields(packed.tensors["weight"], 1, columns).double() * 2 - 1  # [K, out, in]
    H, width = damped(problem.stats.hessian), group or columns
    for row in range(out):
        V = torch.zeros(planes, -(-columns // width), columns, dtype=torch.float64)
        for g in range(V.shape[1]):
            V[:, g, g * width : (g + 1) * width] = signs[:, row, g * width : (g + 1) * width]
        V = V.flatten(0, 1)
        A = V @ H @ V.T
        best = torch.linalg.lstsq(A, V @ H @ weight[row].double()).solution @ V
        least = errors(weight[row, None], best[None], H).item()
        # an fp16 scale is off by 2^-11 of itself at most, and so is the row's output by that share of its own
        allowed = (least**0.5 + 2**-11 * (best @ H @ best).item() ** 0.5) ** 2
        assert errors(weight[row, None], values[row, None], H).item() <= allowed * (1 + 1e-4)


@pytest.mark.parametrize("planes", [1, 2])
def test_no_single_code_is_left_that_lowers_the_error(layer, planes, monkeypatch):
    """After enough sweeps over the one block: the codes are a minimum in every coordinate."""
    problem = layer(6, 48)
    monkeypatch.setattr(refinement, "SWEEPS", 100)
    weight, packed = problem.weight, refined(problem, planes, None, 1)
    H = damped(problem.stats.hessian)
    values, scale = packed.dequantize(), packed.tensors["weight_scale"].float()[:, 0]  # [K, out]
    signs = torch.tensor(list(product([-1.0, 1.0], repeat=planes)))
    base = errors(weight, values, H)
    for j in range(48):
        for level in signs @ scale:  # [out]
            tried = values.clone()
            tried[:, j] = level
            assert (errors(weight, tried, H) >= base * (1 - 1e-4)).all()


INTS = [(2, 64, True), (2, None, False), (4, 32, True), (3, 32, False)]


def refined_ints(problem, bits: int, group: int | None, symmetric: bool, rounds: int) -> PackedWeight:
    method = GPTQ(bits=bits, group=group, symmetric=symmetric, clip="mse" if symmetric else None, refine=rounds)
    return method.quantize(problem.weight, problem.stats)


@pytest.mark.parametrize("ints", INTS)
def test_no_round_raises_the_error_of_a_row_of_integers(layer, ints):
    problem = layer(9, 100)
    H = damped(problem.stats.hessian)
    plain = errors(problem.weight, refined_ints(problem, *ints, 0).dequantize(), H)
    before = errors(problem.weight, refined_ints(problem, *ints, 1).dequantize(), H)
    assert (before / plain).mean() < 0.97  # not of each row: later blocks start elsewhere
    for rounds in (2, 3, 6):
        after = errors(problem.weight, refined_ints(problem, *ints, rounds).dequantize(), H)
        assert (after <= before * (1 + 1e-5)).all()
        before = after
    assert (before / plain).mean() < 0.95


def test_searched_integers_are_a_minimum_in_every_coordinate(layer, monkeypatch):
    problem = layer(6, 48)
    monkeypatch.setattr(refinement, "SWEEPS", 100)
    weight, packed = problem.weight, refined_ints(problem, 2, None, True, 1)
    H = damped(problem.stats.hessian)
    values, scale = packed.dequantize(), packed.tensors["weight_scale"].float()[0]  # [out]
    base = errors(weight, values, H)
    for j in range(48):
        for number in range(-2, 2):
            tried = values.clone()
            tried[:, j] = number * scale
            assert (errors(weight, tried, H) >= base * (1 - 1e-4)).all()


def test_so_is_the_scale_of_integers(layer, monkeypatch):
    """But for its rounding to fp16: the error is a parabola in it."""
    problem = layer(6, 48)
    monkeypatch.setattr(refinement._Fit, "fit_codes", lambda self: None)
    weight, packed = problem.weight, refined_ints(problem, 2, None, True, 2)
    H = damped(problem.stats.hessian)
    values, scale = packed.dequantize(), packed.tensors["weight_scale"].float()[0]  # [out]
    base = errors(weight, values, H)
    for nearby in (scale * (1 - 2**-9), scale * (1 + 2**-9)):
        assert (errors(weight, values / scale[:, None] * nearby[:, None], H) >= base).all()


@pytest.mark.parametrize("group", [32, None])
def test_fitting_a_few_rows_at_a_time_changes_nothing(layer, monkeypatch, group):
    problem = layer(23, 64)
    whole = refined(problem, 2, group, 2)
    monkeypatch.setattr("ultralowbit.methods.refine._ROWS", 5)
    # the sums of other shapes may be in another order: a tie may fall to the other side in a row
    differ = (whole.dequantize() != refined(problem, 2, group, 2).dequantize()).any(1)
    assert differ.sum() <= 1


def test_edges(layer):
    constant = layer(4, 64)
    weight = torch.full((4, 64), 0.5)
    packed = Sign(damp=DAMP, refine=2).quantize(weight, constant.stats)
    assert torch.equal(packed.dequantize(), weight)
    packed = GPTQ(bits=2, group=None, symmetric=True, clip="mse", refine=2).quantize(weight, constant.stats)
    assert torch.equal(packed.dequantize(), weight)
    nothing = torch.zeros(4, 64)
    packed = Sign(planes=2, damp=DAMP, refine=2).quantize(nothing, constant.stats)
    assert torch.equal(packed.dequantize(), nothing)


@pytest.mark.parametrize("alive", [0, 3, 128], ids=["none", "a few", "one group"])
@pytest.mark.parametrize(
    "method",
    [Sign(planes=2, refine=1), Sign(refine=1), GPTQ(bits=2, symmetric=True, refine=1)],
    ids=["two planes", "one plane", "integers"],
)
def test_inputs_that_are_always_zero_are_no_error(method, alive):
    x = torch.randn(64, 256, generator=torch.Generator().manual_seed(0))
    x[:, alive:] = 0
    stats = InputStats(256, needs=method.needs)
    stats.add(x)
    weight = torch.randn(32, 256, generator=torch.Generator().manual_seed(1))
    assert method.quantize(weight, stats).dequantize().isfinite().all()


def test_strong_channels_that_are_nearly_equal_can_be_refined():
    """The Gram matrix of their block is next to singular."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(256, 64, generator=generator)
    x[:, 10:14] = 1e4 * x[:, 10, None] + torch.randn(256, 4, generator=generator)
    stats = InputStats(64)
    stats.add(x)
    weight = torch.randn(16, 64, generator=generator)
    H = stats.hessian.double()
    H.diagonal().add_(1e-7 * H.diagonal().mean())
    plain, once, more = (
        errors(weight, Sign(planes=2, refine=rounds, damp=1e-7, act_order=True).quantize(weight, stats).dequantize(), H)
        for rounds in (0, 1, 4)
    )
    eps = len(x) ** 0.5 * torch.finfo(torch.float32).eps  # of H, whose entries are sums over tokens
    rounding = eps * errors(weight, torch.zeros_like(weight), H)
    assert (more <= once * (1 + 1e-3) + rounding).all() and once.sum() < plain.sum()
