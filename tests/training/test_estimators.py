"""Gradients of the sign: each against finite differences of the surrogate it names, and the units they act in."""

from __future__ import annotations

import math

import pytest
import torch
from pydantic import TypeAdapter, ValidationError
from torch import Tensor

from ultralowbit.training.estimators import ESTIMATORS, STE, BiPer, Clip, ReSTE, binarize

ALL = [cls() for cls in ESTIMATORS.values()]
PROGRESS = [0.0, 0.3, 1.0]


def gradient(x: Tensor, unit: Tensor, estimator, progress: float = 0.0) -> Tensor:
    x = x.clone().requires_grad_()
    binarize(x, unit, estimator, progress).sum().backward()
    return x.grad


def row(*values: float) -> Tensor:
    return torch.tensor([values], dtype=torch.float64)


@pytest.mark.parametrize("estimator", ALL, ids=ESTIMATORS)
def test_forward_is_the_sign_and_zero_is_positive(estimator):
    x = torch.tensor([[-2.0, -1e-38, -0.0, 0.0, 1e-38, 5.0]])
    b = binarize(x, estimator.unit(x), estimator, 0.5)
    assert torch.equal(b, torch.tensor([[-1.0, -1, 1, 1, 1, 1]])) and b.dtype == x.dtype


@pytest.mark.parametrize("progress", PROGRESS)
@pytest.mark.parametrize("estimator", [*ALL, Clip(t=1.5), ReSTE(o_end=5), BiPer(quantile=0.5)], ids=str)
def test_the_gradient_is_the_derivative_of_the_surrogate(estimator, progress):
    """Away from the corners at the guards; x is of the size of a model's weights."""
    z = torch.linspace(-4, 4, 4001, dtype=torch.float64)[None]
    corners = {"clip": ["t"], "reste": ["m", "t"]}.get(estimator.kind, [])
    far = torch.ones_like(z, dtype=torch.bool)
    for corner in corners:
        far &= (z.abs() - getattr(estimator, corner)).abs() > 1e-3
    unit = torch.tensor([[0.02]], dtype=torch.float64)
    step = 1e-6
    slope = (estimator.surrogate(z + step, progress) - estimator.surrogate(z - step, progress)) / (2 * step)
    measured = gradient(z * unit, unit, estimator, progress) * unit
    torch.testing.assert_close(measured[far], slope[far], rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("estimator", ALL, ids=ESTIMATORS)
def test_surrogates_are_odd_and_start_as_the_identity(estimator):
    z = torch.linspace(0, 1, 50, dtype=torch.float64)
    assert torch.equal(estimator.surrogate(-z, 0.4), -estimator.surrogate(z, 0.4))
    torch.testing.assert_close(estimator.surrogate(z[:2], 0), z[:2], rtol=1e-3, atol=0)


def test_reste_is_the_papers_rule():
    """Identity at the start; at the end the cube root, with the chord below m and nothing above t."""
    assert [ReSTE().power(p) for p in (0, 1)] == [1, pytest.approx(3)]
    assert ReSTE().power(0.5) == pytest.approx(1 + 2 * (1 - math.cos(math.pi / 4)))
    unit = row(1.0)
    assert torch.equal(gradient(row(0.0, 0.05, 0.7, 1.5, 1.6), unit, ReSTE(), 0), row(1, 1, 1, 1, 0))
    third = ReSTE().slope(row(0.0, 0.1, -0.1, 0.11, 1.0, -1.5, 1.51), 1)
    guard = 0.1 ** (1 / 3 - 1)
    expected = row(guard, guard, guard, 0.11 ** (-2 / 3) / 3, 1 / 3, 1.5 ** (-2 / 3) / 3, 0)
    torch.testing.assert_close(third, expected)


def test_clip_leaves_far_weights_alone():
    assert torch.equal(gradient(row(-1.1, -1, 0, 1, 1.1), row(1.0), Clip()), row(0, 1, 1, 1, 0))


def test_biper_pulls_weights_back_to_the_crest():
    estimator = BiPer()
    x = torch.arange(1, 101, dtype=torch.float64)[None] * 1e-3
    unit = estimator.unit(x)
    assert unit.item() == pytest.approx(0.095 / (math.pi / 2))  # the crest is at the 95th of 100
    slope = gradient(x, unit, estimator) * unit
    assert slope[0, 94].abs() < 1e-12 and (slope[0, :94] > 0).all() and (slope[0, 95:] < 0).all()
    far = gradient(row(0.19, 0.3, 5.0), unit, estimator) * unit
    torch.testing.assert_close(far, row(-1, -1, -1))


@pytest.mark.parametrize("estimator", ALL, ids=ESTIMATORS)
def test_each_row_has_its_own_size(estimator):
    """A row times c has the same signs, and the gradient that the chain rule gives: the constants mean the same."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(6, 50, generator=generator, dtype=torch.float64)
    c = torch.tensor([1e-4, 1e-2, 0.5, 1, 7, 300], dtype=torch.float64)[:, None]
    torch.testing.assert_close(estimator.unit(c * x), c * estimator.unit(x))
    plain = gradient(x, estimator.unit(x), estimator, 0.7)
    torch.testing.assert_close(gradient(c * x, estimator.unit(c * x), estimator, 0.7), plain / c)


@pytest.mark.parametrize("estimator", ALL, ids=ESTIMATORS)
def test_units_look_only_at_what_is_kept(estimator):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(5, 40, generator=generator)
    keep = torch.rand(5, 40, generator=generator) < 0.6
    keep[4] = False
    unit = estimator.unit(x.masked_fill(~keep, 1e4), keep)
    for r in range(4):
        torch.testing.assert_close(unit[r : r + 1], estimator.unit(x[r : r + 1, keep[r]]))
    assert unit[4] > 0 and unit.isfinite().all()
    assert (estimator.unit(torch.zeros(2, 3)) > 0).all()


def test_the_straight_through_gradient_keeps_no_weight():
    x = torch.randn(3, 4, generator=torch.Generator().manual_seed(0), requires_grad=True)
    assert [t.numel() for t in binarize(x, STE().unit(x), STE()).grad_fn.saved_tensors] == [3]


def test_recipes_name_estimators_by_kind():
    for kind, cls in ESTIMATORS.items():
        assert cls().kind == kind
        assert TypeAdapter(cls).validate_python({"kind": kind}) == cls()
    for wrong in ({"t": 0}, {"tt": 1}, {"m": -1}):
        with pytest.raises(ValidationError):
            TypeAdapter(ReSTE).validate_python(wrong)
