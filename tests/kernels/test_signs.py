"""Weights of sign planes and their gradients: the compiled kernels against torch, and both against the definition."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from ultralowbit.kernels.signs import Signs, gradients, gradients_ref, nearest_signs, slope, weight, weight_ref

SHAPES = [(1, 1, 1, 1, 0), (20, 64, 64, 2, 64), (33, 70, 32, 3, 0), (7, 513, 100, 4, 512), (7, 33, 5, 2, 32)]
"""rows, columns, group, planes, Hadamard block"""


@pytest.fixture
def poisoned():
    """Memory that is not written yet is NaN."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


class Case:
    """Random latent weights, some of them exactly at a threshold, under scales of which each is `fall` times the one
    before or thereabouts: from 0.5 on, levels of three planes are no longer in the order of their first signs."""

    def __init__(
        self, shape: tuple[int, ...], offset: bool, dtype: torch.dtype = torch.float32, seed: int = 0, fall: float = 0.4
    ):
        rows, columns, group, planes, block = shape
        generator = torch.Generator().manual_seed(seed)
        groups = -(-columns // group)

        def normal(*size: int) -> Tensor:
            return torch.randn(size, generator=generator)

        scale = (normal(rows, planes, groups).abs() + 0.5) * 0.02 * fall ** torch.arange(planes)[:, None]
        self.centre = 0.01 * normal(rows, groups) if offset else None
        self.latent = (0.02 * normal(rows, columns)).to(dtype)
        self.latent[:, ::3] = 0.0
        self.signs = Signs(scale, self.centre, group, block)
        self.stored = scale * (1 + 0.01 * normal(*scale.shape))
        self.offset = None if self.centre is None else self.centre.half().float()
        self.units = normal(rows, planes, 1).abs() + 0.01
        self.grad = normal(rows, columns)


@pytest.mark.parametrize("offset", [False, True])
@pytest.mark.parametrize("latent", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("fall", [0.4, 0.9])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_kernels_are_the_reference(isa, poisoned, shape, fall, dtype, latent, offset):
    case = Case(shape, offset, latent, fall=fall)
    made = weight(case.latent, case.stored, case.offset, case.signs, dtype)
    assert made.dtype == dtype
    assert torch.equal(made, weight_ref(case.latent, case.stored, case.offset, case.signs, dtype))

    s = slope(case.stored, case.units, case.signs.scale)
    grad = case.grad.to(dtype)
    (own, sums), (expected, expected_sums) = (
        f(grad, case.latent, s, offset, case.signs) for f in (gradients, gradients_ref)
    )
    assert own.dtype == latent and torch.equal(own, expected)
    # sums of a group in another order: each addition rounds, by half a step of at most the sum of sizes
    size = gradients_ref(grad.abs(), case.latent, s, True, case.signs._replace(block=0))[1][:, -1:] * 8
    assert ((sums - expected_sums).abs() <= 2.0**-24 * shape[2] * size).all()


def test_threads_change_nothing(isa, monkeypatch):
    case, seen = Case((50, 100, 32, 2, 64), True), []
    for threads in (1, 2, 3):
        monkeypatch.setattr(torch, "get_num_threads", lambda n=threads: n)
        s = slope(case.stored, case.units, case.signs.scale)
        made = weight(case.latent, case.stored, case.offset, case.signs, torch.float32)
        seen.append((made, *gradients(case.grad, case.latent, s, True, case.signs)))
    assert all(torch.equal(a, b) for other in seen[1:] for a, b in zip(seen[0], other, strict=True))


def defined(case: Case, latent: Tensor, stored: Tensor, offset: Tensor | None) -> Tensor:
    """W by the formulas, one group and plane after the other, with gradients that autograd finds."""
    scale, centre, group, block = case.signs
    parts = []
    for g, x in enumerate(latent.split(group, dim=1)):
        x = x if centre is None else x - centre[:, g : g + 1]
        W = torch.zeros_like(x) if offset is None else offset[:, g : g + 1].expand_as(x)
        every = torch.tensor(
            [*itertools.product((-1.0, 1.0), repeat=stored.shape[1])], dtype=x.dtype
        )  # [codes, planes]
        levels, order = (scale[:, :, g] @ every.T).sort(
            -1, descending=True
        )  # [rows, codes], of equals the first counts
        nearest = (x[..., None] - levels[:, None]).abs().argmin(-1)  # [rows, columns]
        signs = every[order.gather(1, nearest)]  # [rows, columns, planes]
        for p in range(stored.shape[1]):
            straight = x / case.units[:, p]
            b = signs[..., p].detach() + straight - straight.detach()
            W = W + b * stored[:, p, g : g + 1]
            x = x - b * scale[:, p, g : g + 1]
        parts.append(W)
    W = torch.cat(parts, dim=1)
    assert not block
    return W


@pytest.mark.parametrize("offset", [False, True])
@pytest.mark.parametrize("fall", [0.4, 0.9])
@pytest.mark.parametrize("shape", [s for s in SHAPES if not s[-1]] + [(6, 40, 16, 4, 0)], ids=str)
def test_gradients_are_those_of_the_definition(shape, fall, offset):
    case = Case(shape, offset, fall=fall)
    leaves = [t.double().requires_grad_() for t in (case.latent, case.stored, case.offset) if t is not None]
    case.units = case.units.double()
    case.signs = case.signs._replace(
        scale=case.signs.scale.double(), centre=None if case.centre is None else case.centre.double()
    )
    W = defined(case, *leaves, *[None] * (3 - len(leaves)))
    exact = torch.autograd.grad(W, leaves, case.grad.double())

    case = Case(shape, offset, fall=fall)
    leaves = [t.requires_grad_() for t in (case.latent, case.stored, case.offset) if t is not None]
    made = nearest_signs(case.latent, case.stored, case.offset, case.units, case.signs, torch.float32)
    torch.testing.assert_close(made.double(), W.detach(), rtol=1e-5, atol=1e-7)
    for got, want in zip(torch.autograd.grad(made, leaves, case.grad), exact, strict=True):
        # products of up to P quotients, which nearly cancel where a' and a are equal: by the largest of a row
        torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=1e-5 * want.abs().max().item())


def test_a_rotated_weight_has_the_gradients_of_the_turned_one(isa):
    case = Case((6, 64, 64, 2, 32), True)
    leaves = [t.requires_grad_() for t in (case.latent, case.stored, case.offset)]
    plain = nearest_signs(*leaves, case.units, case.signs._replace(block=0), torch.float32)
    H = weight_ref(
        torch.eye(64) - 0.5,  # signs of a unit matrix: 2 I - 1
        torch.full((64, 1, 1), 0.5),
        torch.full((64, 1), 0.5),
        Signs(torch.full((64, 1, 1), 0.5), None, 64, 32),
        torch.float32,
    )
    torch.testing.assert_close(H @ H, torch.eye(64))
    expected = torch.autograd.grad(plain @ H, leaves, case.grad)
    made = nearest_signs(*leaves, case.units, case.signs, torch.float32)
    torch.testing.assert_close(made, (plain @ H).detach(), rtol=1e-4, atol=1e-6)
    for got, want in zip(torch.autograd.grad(made, leaves, case.grad), expected, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
