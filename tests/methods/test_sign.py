"""Sign planes: closed forms, brute force on tiny rows, and the column loop in fp64."""

from __future__ import annotations

from itertools import pairwise, product

import pytest
import torch

from ultralowbit.methods.rounding.signs import SignRounding
from ultralowbit.methods.sign import Sign


def solved(method: Sign, weight: torch.Tensor, stats=None) -> torch.Tensor:
    return method.quantize(weight, stats).dequantize()


def fitted(weight: torch.Tensor, planes: int, h: torch.Tensor | None, iterations: int = 50) -> tuple[torch.Tensor, ...]:
    """(values, signs [K, out, in]) of one group of weight [out, in]."""
    rounding = SignRounding(*weight.shape, planes, None, iterations, weight.device)
    rounding.fit(0, weight.T.contiguous(), h)
    codes, values = rounding.round(0, weight.T.contiguous())
    return values.T, torch.stack([(codes.T >> p) & 1 for p in range(planes)]).double() * 2 - 1


def weighted(weight: torch.Tensor, values: torch.Tensor, h: torch.Tensor) -> torch.Tensor:
    return ((weight.double() - values.double()).square() * h.double()).sum(1)


def tiny(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(4, 6, generator=generator), torch.rand(6, generator=generator) + 0.05


@pytest.mark.parametrize("group", [32, 64, None], ids=["g32", "g64", "row"])
def test_one_plane_is_the_mean_magnitude_times_the_sign(layer, group):
    """The XNOR-Net scale; sign(0) is +1."""
    weight = layer(9, 100).weight
    weight[0, 5] = 0
    packed = Sign(planes=1, group=group).quantize(weight, None)
    n = group or 100
    scale = torch.stack([part.abs().mean(1) for part in weight.split(n, 1)], 1).half().float()
    b = torch.where(weight >= 0, 1.0, -1.0)
    torch.testing.assert_close(packed.dequantize(), b * scale.repeat_interleave(n, 1)[:, :100], rtol=2**-10, atol=0)
    assert torch.equal(packed.dequantize().sign(), b)


def test_one_plane_of_weighted_columns_has_the_weighted_mean():
    weight, h = tiny(0)
    values, _ = fitted(weight, 1, h)
    expected = (weight.abs() * h).sum(1) / h.sum()
    torch.testing.assert_close(values.abs(), expected[:, None].expand(4, 6), rtol=2**-10, atol=0)


@pytest.mark.parametrize("uniform", [True, False], ids=["uniform", "weighted"])
@pytest.mark.parametrize("planes", [1, 2, 3])
def test_no_choice_of_signs_and_scales_is_missed_by_much(planes, uniform):
    """Least squares over all (2^K)^6 sign patterns of a row is the best there is; alternating stays near it."""
    ratios = []
    patterns = torch.tensor(list(product([-1.0, 1.0], repeat=6))).double()
    choices = torch.combinations(torch.arange(len(patterns)), planes)  # none repeats: that is one plane less
    B = patterns[choices]  # [., K, 6]
    for seed in range(12 if planes < 3 else 2):
        weight, h = tiny(seed)
        h = torch.ones(6) if uniform else h
        ours = weighted(weight, fitted(weight, planes, None if uniform else h)[0], h)
        G = torch.einsum("mki,mli,i->mkl", B, B, h.double())
        for row, error in zip(weight.double(), ours, strict=True):
            b = torch.einsum("mki,i->mk", B, h * row)
            energy = torch.einsum("mk,mkl,ml->m", b, torch.linalg.pinv(G, hermitian=True), b).max()
            best = (h * row.square()).sum() - energy
            assert error >= best - 1e-9  # the scales are fp16: never below the optimum
            ratios.append(((error - best) / (h * row.square()).sum()).item())
    assert sum(ratios) / len(ratios) < (1e-5, 0.02, 0.02)[planes - 1]


@pytest.mark.parametrize("planes", [2, 3, 4])
def test_the_scales_are_least_squares_for_the_signs(layer, planes):
    weight = layer(10, 200).weight
    h = torch.rand(200, generator=torch.Generator().manual_seed(0)) + 0.05
    values, signs = fitted(weight, planes, h, iterations=500)
    error = weighted(weight, values, h)
    for r in range(10):
        root = h.double().sqrt()
        A, y = (signs[:, r] * root).T, weight[r].double() * root
        best = (A @ torch.linalg.lstsq(A, y).solution - y).square().sum()
        assert error[r] <= best * 1.001


@pytest.mark.parametrize("planes", [1, 2, 3, 4])
def test_every_weight_takes_the_nearest_level(layer, planes):
    packed = Sign(planes=planes, group=None).quantize(layer(7, 90).weight, None)
    scale = packed.tensors["weight_scale"].float()[:, 0]  # [K, out]
    signs = torch.tensor(list(product([-1.0, 1.0], repeat=planes)))
    levels = signs @ scale  # [2^K, out]
    weight = layer(7, 90).weight
    nearest = (weight[None] - levels[..., None]).abs().amin(0)
    torch.testing.assert_close((packed.dequantize() - weight).abs(), nearest, rtol=0, atol=1e-6)


@pytest.mark.parametrize("group", [64, None], ids=["g64", "row"])
def test_more_iterations_never_raise_the_error_of_a_row(layer, group):
    weight = layer(30, 128).weight
    for planes in (2, 3, 4):
        values = [solved(Sign(planes=planes, group=group, iterations=n), weight) for n in (0, 1, 2, 15)]
        errors = [(q - weight).square().view(30, -1, group or 128).sum(2) for q in values]
        for before, after in pairwise(errors):
            assert (after <= before * (1 + 1e-6)).all()
        assert errors[-1].sum() < 0.99 * errors[0].sum()


@pytest.mark.parametrize("data", [False, True], ids=["plain", "compensated"])
def test_every_plane_lowers_the_error(layer, data):
    problem = layer(20, 96, seed=1)
    stats = problem.stats if data else None
    values = [solved(Sign(planes=k), problem.weight, stats) for k in (1, 2, 3, 4)]
    losses = [problem.loss(q) if data else (q - problem.weight).square().sum().item() for q in values]
    assert all(after < 0.7 * before for before, after in pairwise(losses))


@pytest.mark.parametrize("planes", [1, 2])
@pytest.mark.parametrize("act_order", [False, True], ids=["left-to-right", "act-order"])
def test_compensation_lowers_the_output_error(layer, planes, act_order):
    for seed in range(6):
        problem = layer(16, 96, seed=seed)
        method = Sign(planes=planes, act_order=act_order)
        loss = problem.loss(solved(method, problem.weight, problem.stats))
        assert loss < problem.loss(solved(method, problem.weight))


@pytest.mark.parametrize("act_order", [False, True], ids=["left-to-right", "act-order"])
@pytest.mark.parametrize("group", [32, None], ids=["g32", "row"])
def test_one_plane_in_the_column_loop_is_algorithm_1(layer, gptq_reference, differing_rows, group, act_order):
    def fit(weight, h):
        scale = ((weight.abs() * h).sum(1) / h.sum()).half().double()
        return lambda w: torch.where(w >= 0, scale, -scale)

    problem = layer(24, 80, seed=2)
    method = Sign(planes=1, group=group, act_order=act_order)
    expected = gptq_reference(problem, fit, group, method.damp, act_order)
    assert differing_rows(solved(method, problem.weight, problem.stats), expected) <= 1


@pytest.mark.parametrize("act_order", [False, True], ids=["left-to-right", "act-order"])
def test_two_planes_in_the_column_loop_are_algorithm_1(layer, gptq_reference, differing_rows, act_order):
    """Residual start only (no iterations): the four levels are closed forms."""

    def fit(weight, h):
        a = ((weight.abs() * h).sum(1) / h.sum())[:, None]
        rest = weight - torch.where(weight >= 0, a, -a)
        a, b = a[:, 0].half().double(), ((rest.abs() * h).sum(1) / h.sum()).half().double()
        levels = torch.stack([a + b, a - b, b - a, -a - b])
        return lambda w: levels.gather(0, (levels - w).abs().argmin(0)[None])[0]

    problem = layer(24, 80, seed=3)
    method = Sign(planes=2, group=32, iterations=0, act_order=act_order)
    expected = gptq_reference(problem, fit, 32, method.damp, act_order)
    assert differing_rows(solved(method, problem.weight, problem.stats), expected) <= 1


def test_fitting_a_few_rows_at_a_time_changes_nothing(layer, monkeypatch):
    weight = layer(23, 64).weight
    whole = solved(Sign(planes=3), weight)
    monkeypatch.setattr("ultralowbit.methods.rounding.alternating._FIT", 64 * 5)
    assert torch.equal(solved(Sign(planes=3), weight), whole)
