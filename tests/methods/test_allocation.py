"""Allocation against all choices there are."""

from __future__ import annotations

from itertools import product

import pytest
import torch

from ultralowbit.errors import InputError
from ultralowbit.methods.allocation import allocate


def problem(seed: int, linears: int = 5, choices: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    """Losses that fall, not always along a convex curve, and bytes that rise."""
    generator = torch.Generator().manual_seed(seed)
    losses = torch.rand(linears, choices, generator=generator).cumsum(1).flip(1)
    nbytes = torch.randint(1, 40, (linears, choices), generator=generator).cumsum(1)
    return losses, nbytes


def total(values: torch.Tensor, chosen: tuple[int, ...] | list[int]) -> float:
    return sum(row[c] for row, c in zip(values.tolist(), chosen, strict=True))


@pytest.mark.parametrize("seed", range(8))
def test_it_is_the_least_loss_within_the_budget_but_for_one_step(seed):
    losses, nbytes = problem(seed)
    low, high = int(nbytes.amin(1).sum()), int(nbytes.amax(1).sum())
    largest_step = (losses[:, :1] - losses[:, -1:]).max().item()  # no step of a hull brings more
    exact = 0
    for budget in range(low, high + 5, 3):
        chosen = allocate(losses, nbytes, budget)
        assert total(nbytes, chosen) <= budget
        fits = [c for c in product(range(4), repeat=5) if total(nbytes, c) <= budget]
        best = min(total(losses, c) for c in fits)
        assert best - 1e-9 <= total(losses, chosen) <= best + largest_step
        exact += total(losses, chosen) <= best + 1e-9
    assert exact > 0
    assert allocate(losses, nbytes, high) == losses.argmin(1).tolist()


@pytest.mark.parametrize("seed", range(4))
def test_on_a_step_of_the_hull_it_is_exact(seed):
    """Where the budget is what a Lagrangian minimum takes, nothing within it is better."""
    losses, nbytes = problem(seed)
    for price in (0.001, 0.01, 0.03, 0.1):
        chosen = (losses + price * nbytes).argmin(1).tolist()
        ours = allocate(losses, nbytes, int(total(nbytes, chosen)))
        assert total(losses, ours) == pytest.approx(total(losses, chosen), abs=1e-9)


def test_what_stores_more_and_loses_more_is_never_chosen():
    losses, nbytes = torch.tensor([[3.0, 4.0, 1.0]]), torch.tensor([[10, 20, 30]])
    assert [allocate(losses, nbytes, budget) for budget in (10, 25, 30, 99)] == [[0], [0], [2], [2]]


def test_too_small_a_budget_is_refused():
    losses, nbytes = problem(0)
    least = int(nbytes.amin(1).sum())
    with pytest.raises(InputError, match=f"the smallest formats take {least} bytes, {least - 1} are asked for"):
        allocate(losses, nbytes, least - 1)
