"""A block of columns on a GPU against the plain loops, to the bit where arithmetic is exact."""

from __future__ import annotations

import pytest
import torch

from ultralowbit.kernels.columns import nearest_of, round_block_ref
from ultralowbit.kernels.gpu.columns import compensation, round_block, search


@pytest.mark.parametrize("sweeps", [0, 1, 4])
@pytest.mark.parametrize("shape", [(1, 1, 2, 1), (7, 3, 4, 1), (9, 17, 16, 3), (33, 40, 4, 2)], ids=str)
def test_it_is_the_plain_loop(gpu, column_block, shape, sweeps):
    weight, rest, R, tables, which = (t.to(gpu.device) for t in column_block(*shape, exact=True))
    expected = round_block_ref(weight, rest, R, nearest_of(tables, which), sweeps)
    given = rest.clone()
    for got, want in zip(round_block(weight, rest, R, tables, which, sweeps), expected, strict=True):
        assert torch.equal(got, want)
    assert torch.equal(rest, given)


def test_every_value_is_written(gpu, column_block):
    weight, rest, R, tables, which = (t.to(gpu.device) for t in column_block(20, 37, 4, 2, exact=True))
    values, which = torch.empty_like(weight), which.int()
    gpu.run([compensation(weight, R, tables, which, rest, values)], weight, R, tables, rest)
    assert values.isfinite().all() and rest.isfinite().all()
    gpu.run([search(R @ R.T, tables, which, values, R @ rest, 2)], tables, values, R)
    assert values.isfinite().all()


def test_any_numbers(gpu, column_block):
    """A tie that sums in another order break differently changes a row; a mistake changes most of them."""
    weight, rest, R, tables, which = (t.to(gpu.device) for t in column_block(48, 24, 4, seed=1))
    values, left = round_block(weight, rest, R, tables, which, 3)
    expected, _ = round_block_ref(weight, rest, R, nearest_of(tables, which), 3)
    assert (values != expected).any(0).sum() <= 2
    exact = rest.double() + R.double().T @ (weight - values).double()
    torch.testing.assert_close(left.double(), exact, rtol=0, atol=2**-18 * exact.abs().max().item())
