"""Products of many tokens against exact arithmetic on the weights of the reference."""

from __future__ import annotations

import pytest
import torch

from ultralowbit.format.ints import Ints
from ultralowbit.format.outliers import IndexedOutliers
from ultralowbit.format.planes import Planes
from ultralowbit.format.salient import SalientSplit
from ultralowbit.format.testing import SEGMENTS
from ultralowbit.format.transform import InputTransform
from ultralowbit.format.weight import Format
from ultralowbit.kernels.gpu.launch import INTERPRETED
from ultralowbit.kernels.gpu.unpacking import can_unpack, unpacking_product

GROUPS_INSIDE_BLOCKS = [Planes(1024, 2, 96), Ints(600, 2, 32, True), Ints(1152, 3, 128)]


def tiles(tokens: int = 16, rows: int = 32) -> dict[str, int]:
    return {"size": tokens, "rows": rows, "warps": 4, "stages": 2}


def cut(weight: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The weight as the kernel rounds it: the interpreter cuts bf16 off."""
    if INTERPRETED and dtype == torch.bfloat16:
        return (weight.view(torch.int32) & -65536).view(torch.float32)
    return weight.to(dtype)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("segment", [*SEGMENTS, *GROUPS_INSIDE_BLOCKS], ids=lambda s: s.summary)
def test_unpacking_product(gpu, assert_product, segment, dtype):
    packed = gpu.packed(Format((segment,)), 37)
    x = gpu.x(19, segment.columns, dtype)
    launches, y = unpacking_product(x, packed.tensors, packed.format, **tiles())
    gpu.run(launches, x, *packed.tensors.values())
    assert_product(y, x, cut(packed.dequantize(), dtype))


@pytest.mark.parametrize("tokens", [1, 16, 40])
@pytest.mark.parametrize("out", [1, 32, 70])
def test_tiles_of_tokens_and_rows(gpu, assert_product, tokens, out):
    packed = gpu.packed(Format((Planes(600, 2, 64, offset=True),)), out)
    x = gpu.x(tokens, 600, torch.float16)
    launches, y = unpacking_product(x, packed.tensors, packed.format, **tiles())
    gpu.run(launches, x, *packed.tensors.values())
    assert y.shape == (tokens, out)
    assert_product(y, x, packed.dequantize(torch.float16))


@pytest.mark.parametrize(
    "transform",
    [InputTransform(600, hadamard=8, column_scale=True), InputTransform(600, channel_order=True)],
    ids=["hadamard", "channel order"],
)
def test_transformed_inputs(gpu, assert_product, transform):
    """Rounded once to the dtype of x, by launches before."""
    packed = gpu.packed(Format((Planes(600, 1),), None, transform), 37)
    x = gpu.x(5, 600, torch.bfloat16)
    launches, y = unpacking_product(x, packed.tensors, packed.format, **tiles())
    gpu.run(launches, x, *packed.tensors.values())
    turned = launches[-1].args[0]
    exact = packed.format.transformed(packed.tensors, x.float())
    assert ((turned.float() - exact).abs() <= 2.0**-7 * exact.abs() + 1e-6 * x.float().norm(dim=1, keepdim=True)).all()
    weight = packed.format.untransformed.decode(packed.tensors, torch.float32)
    assert_product(y, turned, cut(weight, torch.bfloat16))


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_what_is_not_finite_stays_in_its_token(gpu, value):
    packed = gpu.packed(Format((Planes(600, 1),)), 5)
    x = gpu.x(3, 600, torch.float16)
    x[1] = value
    launches, y = unpacking_product(x, packed.tensors, packed.format, **tiles())
    gpu.run(launches, x, *packed.tensors.values())
    assert y[::2].isfinite().all() and not y[1].isfinite().any()


def test_what_it_knows():
    assert all(can_unpack(Format((segment,))) for segment in [*SEGMENTS, *GROUPS_INSIDE_BLOCKS])
    assert not can_unpack(Format((Planes(1024, 1, 80),)))  # a group ends inside a field
    assert not can_unpack(Format((Planes(1024, 1),), IndexedOutliers(1024, 10)))
    assert not can_unpack(Format((Planes(64, 1), Ints(64, 4))))
    assert not can_unpack(Format((SalientSplit(128, 3),)))
