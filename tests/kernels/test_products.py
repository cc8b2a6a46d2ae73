"""Sums of products over tokens, exact and by AMX tiles."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ultralowbit.kernels import cpu
from ultralowbit.kernels.products import add_products

amx = pytest.mark.skipif(not cpu.has_amx(), reason="this CPU has no AMX, or the kernels were compiled without it")
SHAPES = [(1, 1, 1), (31, 17, 33), (32, 32, 32), (100, 64, 96), (1025, 40, 7), (2100, 130, 200)]


def randn(*size: int, seed: int = 0) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed))


def total_of(n: int, m: int | None) -> Tensor:
    """What is added to: symmetric where it has to be."""
    total = randn(n, m or n, seed=2)
    return total + total.T if m is None else total


def check(x: Tensor, y: Tensor | None, half: bool, rounded) -> Tensor:
    """Sums of fp32 products are off by at most 2^-24 for each that is added, whatever the order."""
    m = None if y is None else y.shape[1]
    total = total_of(x.shape[1], m)
    given = total.double()
    add_products(total, x, y, half)
    left = rounded(x).double()
    right = left if y is None else rounded(y).double()
    bound = (left.abs().T @ right.abs() + given.abs()) * (len(x) + 2) * 2**-24
    assert ((total - given - left.T @ right).abs() <= bound).all()
    return total


@pytest.mark.parametrize("half", [False, pytest.param(True, marks=amx)])
@pytest.mark.parametrize(("tokens", "n", "m"), SHAPES)
def test_it_adds_the_products(tokens, n, m, half):
    x, y = randn(tokens, n), randn(tokens, m, seed=1)
    rounded = (lambda t: t.bfloat16()) if half else (lambda t: t)
    check(x, y, half, rounded)
    total = check(x, None, half, rounded)
    if half:
        assert torch.equal(total, total.T)


@amx
@pytest.mark.parametrize("together", [False, True])
def test_any_number_of_threads_gives_the_same_bits(monkeypatch, together):
    x, y, totals = randn(1500, 300), randn(1500, 70, seed=1), []
    for threads in (1, 2, 5):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        totals.append(total_of(300, None if together else 70))
        add_products(totals[-1], x, None if together else y, half=True)
    assert torch.equal(totals[0], totals[1]) and torch.equal(totals[0], totals[2])


@amx
def test_rounding_is_that_of_torch():
    """To even, far from the middle too, and zero where fp32 has no normal number."""
    x = torch.tensor([1 + 2**-8, 1 + 3 * 2**-8, 3.3e38, 1e-30, -7.0, 0.0])[None]
    total = torch.zeros(6, 6)
    add_products(total, torch.tensor([[1.0] * 6]), x, half=True)
    assert torch.equal(total, x.bfloat16().float().expand(6, 6))


@amx
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_is_not_hidden(bad):
    x = randn(64, 40)
    x[50, 3] = bad
    total = torch.zeros(40, 40)
    add_products(total, x, half=True)
    assert not total[3].isfinite().any() and total[:3, :3].isfinite().all()


@amx
def test_views_are_taken_as_they_are():
    x, y = randn(50, 80)[:, ::2], randn(100, 48)[::2]
    check(x, y, True, lambda t: t.bfloat16())
    whole = torch.zeros(48, 100)
    add_products(whole[:, :40], y, x, half=True)  # whose rows are not beside each other: in fp32
    assert torch.allclose(whole[:, :40], y.T @ x, atol=1e-4) and not whole[:, 40:].any()


@amx
def test_a_lesser_instruction_set_has_no_tiles(monkeypatch):
    monkeypatch.setattr(cpu, "_isa", cpu.instruction_sets().index("portable"))
    assert not cpu.has_amx()
    check(randn(50, 20), None, True, lambda t: t)
