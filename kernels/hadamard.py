"""Multiplying rows by a block Hadamard matrix: weights and activations into the basis of a rotated format, and back."""

from __future__ import annotations

import torch
from torch import Tensor

from ultralowbit.format import transform
from ultralowbit.kernels import cpu
from ultralowbit.kernels.packed_matmul import is_followed, triton_products

LARGEST = 1 << 15
"""Of the blocks that a program of a GPU holds."""


def block_hadamard(x: Tensor, block: int) -> Tensor:
    """x [..., columns] times the block matrix that `InputTransform` describes: what `format.transform.block_hadamard`
    returns, to the bit, by the device's kernels where they can."""
    if x.dtype != torch.float32 or not x.numel() or is_followed(x):
        return transform.block_hadamard(x, block)
    rows = x.reshape(-1, x.shape[-1])
    if x.device.type == "cpu" and cpu.runs_here():
        return cpu.block_hadamard(rows, block).view(x.shape)
    if x.device.type == "cuda" and 2 <= block <= LARGEST and triton_products():
        from ultralowbit.kernels.gpu import inputs as gpu

        return gpu.block_hadamard(rows, block).view(x.shape)
    return transform.block_hadamard(x, block)
