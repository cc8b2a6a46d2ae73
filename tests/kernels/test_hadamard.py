"""Block Hadamard matrices by the compiled kernels: the bits of the plain rounds of sums and differences."""

from __future__ import annotations

import pytest
import torch
from torch import func
from torch.autograd import forward_ad

from ultralowbit.format import transform
from ultralowbit.kernels.hadamard import block_hadamard


@pytest.mark.parametrize(
    ("rows", "columns", "block"),
    [(3, 1, 2), (5, 7, 4), (40, 15, 16), (70, 96, 32), (9, 100, 64), (33, 576, 64), (4, 1536, 512), (2, 40000, 32768)],
)
def test_it_is_the_reference_to_the_bit(isa, rows, columns, block):
    x = torch.randn(rows, columns, generator=torch.Generator().manual_seed(0)) * torch.logspace(-8, 8, columns)
    given = x.clone()
    assert torch.equal(block_hadamard(x, block), transform.block_hadamard(x, block))
    assert torch.equal(x, given)


@pytest.mark.parametrize("power", range(1, 17))
def test_every_size_of_block(isa, power):
    x = torch.randn(2, 1 << power, generator=torch.Generator().manual_seed(power))
    assert torch.equal(block_hadamard(x, 1 << power), transform.block_hadamard(x, 1 << power))


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_any_number_of_threads(isa, threads, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    x = torch.randn(50, 48, generator=torch.Generator().manual_seed(0))
    assert torch.equal(block_hadamard(x, 16), transform.block_hadamard(x, 16))


def test_what_the_kernels_do_not_take_is_what_the_reference_gives(isa):
    x = torch.randn(2, 3, 24, generator=torch.Generator().manual_seed(0))
    every_second = torch.randn(6, 48, generator=torch.Generator().manual_seed(1))[::2, ::2]
    for y in (x, every_second, x.double(), x[:0]):
        assert torch.equal(block_hadamard(y, 8), transform.block_hadamard(y, 8))
    x.requires_grad_()
    (gradient,) = torch.autograd.grad(block_hadamard(x, 8).square().sum(), x)
    torch.testing.assert_close(gradient, 2 * x.detach())  # the matrix is orthonormal


def test_derivatives_are_those_of_the_matrix(isa):
    x, v = torch.randn(2, 3, 24, generator=torch.Generator().manual_seed(0)).unbind(0)
    with forward_ad.dual_level():
        assert torch.equal(
            forward_ad.unpack_dual(block_hadamard(forward_ad.make_dual(x, v), 8)).tangent, block_hadamard(v, 8)
        )
    gradient = func.grad(lambda x: (block_hadamard(x, 8) * v).sum())
    assert torch.equal(gradient(x), block_hadamard(v, 8))
    torch.testing.assert_close(func.vmap(lambda x: block_hadamard(x, 8))(x), block_hadamard(x, 8))
