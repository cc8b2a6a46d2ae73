"""Refinement of sign planes: every step against what it minimises, in fp64."""

from __future__ import annotations

import pytest
import torch

from ultralowbit.errors import FormatError
from ultralowbit.format.weight import PackedWeight
from ultralowbit.format.words import unpack_fields
from ultralowbit.methods.gptq import GPTQ
from ultralowbit.methods.refine import refine
from ultralowbit.methods.sign import Sign

DAMP = 0.01
SHAPES = [(9, 100, 1, 32), (5, 70, 2, None), (3, 64, 3, 64), (1, 40, 2, None), (4, 1, 1, None)]


def damped(hessian: torch.Tensor) -> torch.Tensor:
    H = hessian.double().clone()
    H.diagonal().add_(DAMP * H.diagonal().mean())
    return H


def errors(weight: torch.Tensor, values: torch.Tensor, H: torch.Tensor) -> torch.Tensor:
    """(w - q) H (w - q)^T of each row."""
    rest = weight.double() - values.double()
    return ((rest @ H) * rest).sum(1)


def start(layer, shape) -> tuple[torch.Tensor, torch.Tensor, PackedWeight]:
    out, columns, planes, group = shape
    found = layer(out, columns)
    packed = Sign(planes=planes, group=group, damp=DAMP).quantize(found.weight, found.stats)
    return found.weight, found.stats.hessian, packed


@pytest.mark.parametrize("shape", SHAPES)
def test_no_round_raises_the_error_of_a_row(layer, shape):
    weight, hessian, packed = start(layer, shape)
    H = damped(hessian)
    before = errors(weight, packed.dequantize(), H)
    for rounds in (1, 2, 4):
        found = refine(packed, weight, hessian, DAMP, rounds)
        assert found.format == packed.format
        after = errors(weight, found.dequantize(), H)
        assert (after <= before * (1 + 1e-5)).all()  # the sums are in fp32 there
        before = after


def test_it_pays_where_inputs_are_correlated(layer):
    weight, hessian, packed = start(layer, (32, 128, 1, None))
    H = damped(hessian)
    found = refine(packed, weight, hessian, DAMP, 3)
    assert errors(weight, found.dequantize(), H).sum() < 0.95 * errors(weight, packed.dequantize(), H).sum()
    refined = Sign(refine=3, damp=DAMP).quantize(weight, layer(32, 128).stats)
    assert torch.equal(refined.dequantize(), found.dequantize())


@pytest.mark.parametrize("shape", SHAPES[:3])
def test_scales_are_the_joint_least_squares(layer, shape):
    """Of the signs that are stored: each row of V [K groups, in] is a plane within a group."""
    weight, hessian, packed = start(layer, shape)
    out, columns, planes, group = shape
    found = refine(packed, weight, hessian, DAMP, 1)
    signs = unpack_fields(found.tensors["weight"], 1, columns).double() * 2 - 1  # [K, out, in]
    H, width = damped(hessian), group or columns
    for row in range(out):
        V = torch.zeros(planes, -(-columns // width), columns, dtype=torch.float64)
        for g in range(V.shape[1]):
            V[:, g, g * width : (g + 1) * width] = signs[:, row, g * width : (g + 1) * width]
        V = V.flatten(0, 1)
        A = V @ H @ V.T
        best = torch.linalg.lstsq(A, V @ H @ weight[row].double()).solution @ V
        least = errors(weight[row, None], best[None], H).item()
        # an fp16 scale is off by 2^-11 of itself at most, and so is the row's output by that share of its own
        allowed = (least**0.5 + 2**-11 * (best @ H @ best).item() ** 0.5) ** 2
        assert errors(weight[row, None], found.dequantize()[row, None], H).item() <= allowed * (1 + 1e-4)


def test_no_single_code_is_left_that_lowers_the_error(layer):
    """After enough rounds: the codes are a minimum in every coordinate."""
    weight, hessian, packed = start(layer, (6, 48, 2, None))
    H = damped(hessian)
    found = refine(packed, weight, hessian, DAMP, 50)
    values, scale = found.dequantize(), found.tensors["weight_scale"].float()[:, 0]  # [K, out]
    signs = torch.tensor([[1.0, 1], [1, -1], [-1, 1], [-1, -1]])
    base = errors(weight, values, H)
    for j in range(48):
        for level in signs @ scale:  # [out]
            tried = values.clone()
            tried[:, j] = level
            assert (errors(weight, tried, H) >= base * (1 - 1e-4)).all()


def test_edges(layer):
    constant = layer(4, 64)
    weight = torch.full((4, 64), 0.5)
    packed = Sign(damp=DAMP, refine=2).quantize(weight, constant.stats)
    assert torch.equal(packed.dequantize(), weight)
    nothing = torch.zeros(4, 64)
    packed = Sign(planes=2, damp=DAMP, refine=2).quantize(nothing, constant.stats)
    assert torch.equal(packed.dequantize(), nothing)


def test_other_formats_are_refused(layer):
    found = layer(4, 64)
    packed = GPTQ(bits=2).quantize(found.weight, found.stats)
    with pytest.raises(FormatError, match=r"int2.* cannot be refined: expected one segment"):
        refine(packed, found.weight, found.stats.hessian, DAMP, 1)
