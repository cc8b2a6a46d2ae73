"""Rounding a block of columns: the compiled kernels against plain loops, to the bit where arithmetic is exact."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from ultralowbit.kernels import cpu
from ultralowbit.kernels.columns import nearest_of, round_block, round_block_ref

SHAPES = [(1, 1, 2, 1), (7, 3, 4, 1), (8, 16, 2, 2), (9, 17, 16, 3), (64, 33, 4, 2), (256, 40, 4, 1), (130, 5, 8, 5)]


@pytest.mark.parametrize("sweeps", [0, 1, 2, 5])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_it_is_the_plain_loop(column_block, isa, shape, sweeps):
    weight, rest, R, tables, which = column_block(*shape, exact=True)
    expected = round_block_ref(weight, rest, R, nearest_of(tables, which), sweeps)
    given = rest.clone()
    values, left = round_block(weight, rest, R, tables, which, sweeps)
    assert torch.equal(values, expected[0]) and torch.equal(left, expected[1])
    assert torch.equal(rest, given)  # what is given is not changed
    # e + R^T (w - q), as it says
    assert torch.equal(left, rest + R.T @ (weight - values))


@pytest.mark.parametrize("sweeps", [0, 4])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_any_numbers(column_block, isa, shape, sweeps):
    """A tie that sums in another order break differently changes a row; a mistake changes most of them."""
    weight, rest, R, tables, which = column_block(*shape, seed=1)
    values, left = round_block(weight, rest, R, tables, which, sweeps)
    expected, _ = round_block_ref(weight, rest, R, nearest_of(tables, which), sweeps)
    assert (values != expected).any(0).sum() <= 1 + shape[1] // 20
    exact = rest.double() + R.double().T @ (weight - values).double()
    torch.testing.assert_close(left.double(), exact, rtol=0, atol=2**-20 * shape[0] ** 0.5 * exact.abs().max().item())
    nearest = (values[None] - tables[which].transpose(0, 1)).abs().amin(0)  # every value is a level of its row
    assert torch.equal(nearest, torch.zeros_like(nearest))


def test_sweeps_lower_the_error_of_every_row(column_block, isa):
    weight, rest, R, tables, which = column_block(64, 50, 4, seed=2)
    errors = [round_block(weight, rest, R, tables, which, s)[1].square().sum(0) for s in (0, 1, 2, 4, 50)]
    for before, after in pairwise(errors):
        assert (after <= before * (1 + 1e-5)).all()
    assert errors[-1].sum() < 0.95 * errors[0].sum()


def test_rows_do_not_depend_on_their_neighbours(column_block, isa, monkeypatch):
    """However rows are cut into tiles and shared out to threads: ranks and threads write the same bytes."""
    weight, rest, R, tables, which = column_block(100, 77, 4, 2, seed=3)
    whole = round_block(weight, rest, R, tables, which, 3)
    for start, stop in ((0, 1), (1, 20), (19, 77)):
        part = round_block(weight[:, start:stop], rest[:, start:stop], R, tables[..., start:stop], which, 3)
        assert all(torch.equal(a[:, start:stop], b) for a, b in zip(whole, part, strict=True))
    monkeypatch.setattr(torch, "get_num_threads", lambda: 5)
    assert all(map(torch.equal, whole, round_block(weight, rest, R, tables, which, 3)))


def test_without_compiled_kernels_the_plain_loop_runs(column_block, monkeypatch):
    monkeypatch.setattr(cpu, "_isa", None)
    weight, rest, R, tables, which = column_block(20, 9, 4, exact=True)
    expected = round_block_ref(weight, rest, R, nearest_of(tables, which), 2)
    assert all(map(torch.equal, round_block(weight, rest, R, tables, which, 2), expected))
