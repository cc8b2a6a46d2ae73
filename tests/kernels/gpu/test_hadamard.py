"""Block Hadamard matrices on a GPU: the bits of the plain rounds of sums and differences."""

from __future__ import annotations

import pytest
import torch

from ultralowbit.format import transform
from ultralowbit.kernels.gpu.inputs import block_hadamard


@pytest.mark.parametrize(
    ("rows", "columns", "block"), [(1, 2, 2), (3, 100, 64), (5, 576, 64), (2, 1536, 512), (2, 2048, 2048)]
)
def test_it_is_the_reference_to_the_bit(gpu, rows, columns, block):
    x = gpu.x(rows, columns)
    assert torch.equal(block_hadamard(x, block), transform.block_hadamard(x, block))
    turned = gpu.x(columns, rows).T  # with other strides
    assert torch.equal(block_hadamard(turned, block), transform.block_hadamard(turned, block))
