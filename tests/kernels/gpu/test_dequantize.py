"""Weights written out, inputs transformed and outliers corrected for: against `Format` itself, to the bit where it is
exact."""

from __future__ import annotations

import pytest
import torch

from ultralowbit.format.ints import Ints
from ultralowbit.format.outliers import IndexedOutliers, MaskedOutliers
from ultralowbit.format.planes import Planes, TiedPlanes
from ultralowbit.format.salient import SalientSplit
from ultralowbit.format.transform import InputTransform
from ultralowbit.format.weight import Format
from ultralowbit.kernels.gpu import dispatch as triton_matmul
from ultralowbit.kernels.gpu.dequantize import dequantize
from ultralowbit.kernels.gpu.dispatch import dequantized, product, read_tuning
from ultralowbit.kernels.gpu.inputs import transformed
from ultralowbit.kernels.gpu.launch import INTERPRETED

TUNING = read_tuning("", processors=4)

FORMATS = [
    Format((Planes(600, 2, 128, offset=True),)),
    Format((Planes(45, 4, None, "01"),)),
    Format((Planes(600, 1, 96),)),  # a group that ends inside a field
    Format((Ints(40, 4), Planes(550, 1, None, offset=True))),
    Format((Ints(300, 2, 48), TiedPlanes(55, 2, 32))),
    Format((TiedPlanes(300, 4),)),
    Format((Ints(600, 3, 128),)),
    Format((Ints(545, 3, None, True),)),
    Format((Ints(70, 4, 7, True), Ints(33, 8, 32))),
    Format((SalientSplit(300, 17),)),
    Format((SalientSplit(600, 20, 128, third=True, offset=True),)),
    Format((SalientSplit(300, 30, 100, third=True, column_scale=True),)),
    Format((SalientSplit(300, 30, 64, column_scale=True, offset=True),)),
    Format((Planes(600, 1, None, offset=True),), IndexedOutliers(600, 25)),
    Format((Ints(20, 4), Planes(50, 1)), IndexedOutliers(70, 3, 16)),
    Format((Planes(600, 1, 64, offset=True),), MaskedOutliers(600, 90, 0.1)),
]
each_format = pytest.mark.parametrize("format", FORMATS, ids=lambda f: f.summary)


@each_format
def test_weight(gpu, format):
    packed = gpu.packed(format, 21)
    weight = torch.empty(packed.shape, device=gpu.device)
    gpu.run(list(dequantize(packed.tensors, format, 0, weight)), *packed.tensors.values())
    assert torch.equal(weight, packed.dequantize())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_some_rows_rounded_once(gpu, dtype):
    packed = gpu.packed(FORMATS[3], 21)
    weight = torch.empty(7, packed.shape[1], dtype=dtype, device=gpu.device)
    gpu.run(list(dequantize(packed.tensors, packed.format, 9, weight)), *packed.tensors.values())
    exact = packed.dequantize()[9:16]
    if INTERPRETED and dtype == torch.bfloat16:  # which cuts the last bits off
        exact = (exact.view(torch.int32) & ~0xFFFF).view(torch.float32)
    assert torch.equal(weight, exact.to(dtype))


TRANSFORMS = [
    InputTransform(1300, channel_order=True),
    InputTransform(1300, column_scale=True),
    InputTransform(1300, hadamard=64),
    InputTransform(1300, hadamard=1024),  # and of 256, 16 and 4
    InputTransform(1300, channel_order=True, column_scale=True, hadamard=256),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("transform", TRANSFORMS, ids=lambda t: t.summary)
def test_transform(gpu, transform, dtype):
    packed = gpu.packed(Format((Planes(300, 1), Planes(1000, 1)), transform=transform), 2)
    x = gpu.x(3, 1300, dtype).T.contiguous().T
    launches, moved = transformed(x, packed.tensors, packed.format, dtype)
    gpu.run(launches, x, *packed.tensors.values())
    assert torch.equal(moved, packed.format.transformed(packed.tensors, x))


OVERLAID = [
    (Format((Planes(600, 1, None, offset=True),), IndexedOutliers(600, 10)), 130, 1),
    (Format((Planes(300, 2, 64, "01"),), IndexedOutliers(300, 3, 70)), 5, 3),
    (Format((Planes(300, 1),), IndexedOutliers(300, 5), InputTransform(300, channel_order=True, hadamard=8)), 5, 1),
]


@pytest.mark.parametrize(("format", "out", "tokens"), OVERLAID, ids=lambda v: getattr(v, "summary", str(v)))
def test_product_under_an_outliers(gpu, assert_product, format, out, tokens):
    packed = gpu.packed(format, out)
    x = gpu.x(tokens, format.in_features)
    launches, y = product(x, packed.tensors, packed.format, TUNING)
    gpu.run(launches, x, *packed.tensors.values())
    assert_product(y, x, packed.dequantize())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_product_of_transformed_inputs(gpu, assert_product, dtype):
    """As PTQ1.61 stores a layer; the transformed inputs of a bf16 x are rounded to the 11 bits of fp16."""
    transform = InputTransform(700, channel_order=True, column_scale=True)
    packed = gpu.packed(Format((Ints(140, 4), Planes(560, 1, None, offset=True)), transform=transform), 37)
    x = gpu.x(2, 700, dtype)
    launches, y = product(x, packed.tensors, packed.format, TUNING)
    gpu.run(launches, x, *packed.tensors.values())
    if dtype == torch.float32:
        assert_product(y, x, packed.dequantize())
    else:
        exact = x.double() @ packed.dequantize().double().T
        size = x.double().abs() @ packed.dequantize().double().abs().T
        assert ((y.double() - exact).abs() <= 2.0**-7 * exact.abs() + 2.0**-11 * size).all()


@pytest.mark.parametrize("dense_weights", [1 << 26, 600 * 8])
def test_dequantized_product(gpu, assert_product, monkeypatch, dense_weights):
    """At once, and eight rows at a time."""
    monkeypatch.setattr(triton_matmul, "DENSE_WEIGHTS", dense_weights)
    transform = InputTransform(600, channel_order=True, hadamard=128)
    packed = gpu.packed(Format((SalientSplit(200, 30), Ints(400, 3, 48)), IndexedOutliers(600, 25), transform), 21)
    x = gpu.x(3, 600)
    assert_product(dequantized(x, packed.tensors, packed.format), x, packed.dequantize())
