"""Rotation: blocks, the weight that it means, and statistics in its basis."""

from __future__ import annotations

import re

import pytest
import torch

from ultralowbit.format.transform import block_hadamard
from ultralowbit.methods import METHODS, Need
from ultralowbit.methods.rotation import Rotate, rotated_format, rotated_weight
from ultralowbit.methods.statistics import InputStats


@pytest.mark.parametrize(
    ("columns", "block"),
    [(576, 64), (1536, 512), (4096, 512), (32, 32), (96, 32), (100, 64), (99, 64), (3, 2), (2, 2), (1, None)],
)
def test_a_block_divides_the_columns_where_one_of_some_size_does(columns, block):
    assert Rotate().block(columns) == block


@pytest.mark.parametrize(
    ("columns", "said"),
    [(576, None), (32, None), (1, None), (99, "99 inputs: .* in blocks of 64, the last 35 in smaller ones"),
     (1100, "1100 inputs: .* in blocks of 512, the last 76 in")],
)  # fmt: skip
def test_columns_that_no_block_divides_are_told(columns, said):
    note = Rotate().about(columns)
    assert re.search(said, note) if said else note is None


@pytest.mark.parametrize("columns", [64, 100])
@pytest.mark.parametrize("name", METHODS)
def test_every_method_packs_a_rotated_weight(layer, name, columns):
    """y = stored @ (R x) = decoded @ x, and the format announced is the one that is written."""
    problem, block = layer(12, columns), Rotate().block(columns)
    stats = InputStats(columns, needs=Need.MAGNITUDES | Need.HESSIAN, hadamard=block)
    stats.add(problem.inputs)
    method = METHODS[name]()
    packed = method.quantize(block_hadamard(problem.weight, block), stats)
    rotated = rotated_weight(packed, block)
    assert rotated.nbytes == packed.nbytes
    assert rotated.format.transform.hadamard == block
    expected = method.format(columns)
    if packed.format == expected:
        assert rotated.format == rotated_format(expected, block)
    x = problem.inputs[:20]
    y = x.double() @ rotated.dequantize().double().T
    outputs = block_hadamard(x.double(), block) @ packed.dequantize().double().T
    # the stored weight is rotated in fp32: an element is off by 2^-23 for each of log2(block) + 1 roundings
    bound = 10 * 2**-23 * x.double().norm(dim=1, keepdim=True) * packed.dequantize().double().norm(dim=1)
    assert ((y - outputs).abs() <= bound).all()


def test_statistics_are_of_the_rotated_inputs(layer):
    x = layer(3, 96).inputs
    stats = InputStats(96, needs=Need.MAGNITUDES | Need.HESSIAN, hadamard=32)
    for part in x.split(50):
        stats.add(part)
    R = block_hadamard(torch.eye(96, dtype=torch.float64), 32)
    rotated = x.double() @ R
    torch.testing.assert_close(stats.hessian.double(), rotated.T @ rotated, rtol=1e-4, atol=1e-2)
    torch.testing.assert_close(stats.absmax.double(), rotated.abs().amax(0), rtol=1e-5, atol=1e-5)


def test_rotation_pays_where_a_few_channels_are_large(layer):
    """Integers with one scale for a group: the step is then set by no single weight."""
    problem = layer(16, 128)
    weight = problem.weight.clone()
    weight[:, ::32] *= 20
    method = METHODS["rtn"](bits=4, group=128)
    plain = method.quantize(weight, None).dequantize()
    rotated = rotated_weight(method.quantize(block_hadamard(weight, 128), None), 128).dequantize()
    assert (rotated - weight).norm() < 0.8 * (plain - weight).norm()
