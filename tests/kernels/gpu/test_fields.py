"""Products of packed fields against exact arithmetic on the same bytes."""

from __future__ import annotations

import pytest
import torch

from ultralowbit.format.ints import Ints
from ultralowbit.format.outliers import IndexedOutliers
from ultralowbit.format.planes import Planes, TiedPlanes
from ultralowbit.format.salient import SalientSplit
from ultralowbit.format.testing import SEGMENTS
from ultralowbit.format.transform import InputTransform
from ultralowbit.format.weight import Format
from ultralowbit.kernels.gpu.dispatch import product, read_tuning
from ultralowbit.kernels.gpu.fields import multiply
from ultralowbit.kernels.gpu.inputs import prologue, prologue_ref
from ultralowbit.kernels.gpu.matrix import matrices

TUNING = read_tuning("", processors=4)

CASES = [(segment, torch.float32) for segment in SEGMENTS] + [
    (segment, dtype) for segment in SEGMENTS[4::5] for dtype in (torch.float16, torch.bfloat16)
]
each_case = pytest.mark.parametrize(("segment", "dtype"), CASES, ids=lambda v: getattr(v, "summary", str(v)))


@each_case
def test_product(gpu, assert_product, segment, dtype):
    packed = gpu.packed(Format((segment,)), 37)
    x = gpu.x(3, segment.columns, dtype)
    launches, y = product(x, packed.tensors, packed.format, TUNING)
    gpu.run(launches, x, *packed.tensors.values())
    assert_product(y, x, packed.dequantize())


@pytest.mark.parametrize("subnormal", [True, False])
@pytest.mark.parametrize("segment", [Planes(1024, 1, 128), Ints(300, 3, 64), Ints(200, 8)], ids=lambda s: s.summary)
def test_both_ways_to_read_a_field(gpu, assert_product, segment, subnormal):
    packed = gpu.packed(Format((segment,)), 37)
    x = gpu.x(2, segment.columns)
    launches, y = product(x, packed.tensors, packed.format, TUNING, subnormal)
    gpu.run(launches, x, *packed.tensors.values())
    assert_product(y, x, packed.dequantize())


@pytest.mark.parametrize("tokens", [1, 8, 9, 33])
@pytest.mark.parametrize("out", [1, 130])
def test_tiles_of_tokens_and_rows(gpu, assert_product, tokens, out):
    packed = gpu.packed(Format((Ints(64, 4), Planes(600, 1, None, offset=True))), out)
    x = gpu.x(tokens, 664, torch.bfloat16)
    launches, y = product(x, packed.tensors, packed.format, TUNING)
    gpu.run(launches, x, *packed.tensors.values())
    assert y.shape == (tokens, out)
    assert_product(y, x, packed.dequantize())


@pytest.mark.parametrize("processors", [1, 3, 1000])
def test_any_number_of_splits(gpu, assert_product, processors):
    """From one program for all blocks to one for each, the tail's too."""
    packed = gpu.packed(Format((Planes(2048 + 384, 2, 128),)), 37)
    x = gpu.x(1, packed.shape[1])
    launches, y = product(x, packed.tensors, packed.format, read_tuning("", processors))
    gpu.run(launches, x, *packed.tensors.values())
    assert_product(y, x, packed.dequantize())


def test_twice_the_same_bits(gpu):
    packed = gpu.packed(Format((Planes(1536, 2, 128),)), 37)
    x = gpu.x(2, 1536)
    products = []
    for _ in range(2):
        launches, y = product(x, packed.tensors, packed.format, TUNING)
        gpu.run(launches, x, *packed.tensors.values())
        products.append(y)
    assert torch.equal(*products)


def test_strided_x(gpu, assert_product):
    packed = gpu.packed(Format((Ints(64, 4), Planes(96, 1))), 5)
    x = gpu.x(6, 160).T.contiguous().T[::2]
    launches, y = product(x, packed.tensors, packed.format, TUNING)
    gpu.run(launches, x, *packed.tensors.values())
    assert_product(y, x, packed.dequantize())


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of the interpreter
@pytest.mark.parametrize("value", [0.0, 1e-38, 1e-30, 1e30, torch.nan, torch.inf])
def test_extreme_inputs(gpu, value):
    """Sizes from subnormal to far above fp16's are kept, and what is not finite stays so, in its own token only."""
    packed = gpu.packed(Format((Planes(600, 1),)), 5)
    x = gpu.x(3, 600)
    x[1] *= value
    launches, y = product(x, packed.tensors, packed.format, TUNING)
    gpu.run(launches, x, *packed.tensors.values())
    exact = (x.double() @ packed.dequantize().double().T).float()
    torch.testing.assert_close(y[::2], exact[::2], rtol=1e-4, atol=1e-5)
    if exact[1].isfinite().all():
        torch.testing.assert_close(y[1], exact[1], rtol=1e-3, atol=1e-4 * value)
    else:
        assert not y[1].isfinite().any()


def multiplied(launches):
    """The arguments by name of each launch of `multiply`."""
    return [
        dict(zip(multiply.arg_names, launch.args, strict=False)) for launch in launches if launch.kernel is multiply
    ]


@pytest.mark.parametrize("tokens", [3, 9], ids=["by the programs", "by the prologue"])
@each_case
def test_inputs_are_their_reference(gpu, segment, dtype, tokens):
    x = gpu.x(tokens, segment.columns, dtype)
    x[1] = 0
    packed = gpu.packed(Format((segment,)), 2)
    launches, _ = product(x, packed.tensors, packed.format, TUNING)
    assert any(launch.kernel is prologue for launch in launches) == (tokens > TUNING.gemv_tokens)
    gpu.run(launches, x, *packed.tensors.values())
    digits = 1 + (dtype == torch.float32)
    for args, matrix in zip(multiplied(launches), matrices(packed.format), strict=True):
        x16, sums, units = prologue_ref(x, matrix, digits)
        assert torch.equal(args["x16"].view_as(x16), x16)
        assert torch.equal(args["units"].view_as(units), units)
        atol = 1e-5 * float(x.abs().max())
        torch.testing.assert_close(args["sums"].view_as(sums), sums, rtol=1e-5, atol=atol)


ONE_LAUNCH = [
    Format((Planes(1024, 1),)),
    Format((Planes(700, 2, 64, offset=True),)),
    Format((TiedPlanes(600, 2, 128),)),
    Format((Ints(640, 2, 128),)),
    Format((Planes(600, 1, None, offset=True),), IndexedOutliers(600, 10)),
    Format((Planes(1536, 1),), None, InputTransform(1536, hadamard=512)),
    Format((Ints(192, 4, 32),), None, InputTransform(192, hadamard=64, column_scale=True)),
    Format((Planes(4096, 1),), None, InputTransform(4096, hadamard=2048)),
    Format((Planes(96, 2),), None, InputTransform(96, column_scale=True)),
]


@pytest.mark.parametrize("tokens", [1, 8])
@pytest.mark.parametrize("format", ONE_LAUNCH, ids=lambda f: f.summary)
def test_one_launch_for_few_tokens(gpu, assert_product, format, tokens):
    """Transform and outliers included; it leaves its counters as they were, and the same bits every time."""
    packed = gpu.packed(format, 69 if tokens == 1 and format.in_features < 1024 else 21)
    x = gpu.x(tokens, format.in_features)
    launches, y = product(x, packed.tensors, format, TUNING)
    assert len(launches) == 1
    (args,) = multiplied(launches)
    products = []
    for _ in range(2):
        gpu.run(launches, x, *packed.tensors.values(), y)
        assert not args["arrived"].any()
        products.append(y.clone())
    assert torch.equal(*products)
    assert_product(y, x, packed.dequantize())


MORE_LAUNCHES = [
    (Format((Planes(512, 1),)), 9, 2),  # a prologue
    (Format((Ints(640, 3, 128),)), 1, 2),  # two matrices
    (Format((Ints(64, 4), Planes(96, 1)), None, InputTransform(160, channel_order=True)), 1, 3),
    (Format((Planes(600, 1),), None, InputTransform(600, hadamard=128)), 1, 5),  # blocks of 128, 64, 16 and 8
]


@pytest.mark.parametrize(("format", "tokens", "count"), MORE_LAUNCHES, ids=lambda v: getattr(v, "summary", str(v)))
def test_more_launches(gpu, assert_product, format, tokens, count):
    packed = gpu.packed(format, 37)
    x = gpu.x(tokens, format.in_features)
    launches, y = product(x, packed.tensors, format, TUNING)
    assert len(launches) == count
    gpu.run(launches, x, *packed.tensors.values())
    assert_product(y, x, packed.dequantize())


def test_what_is_no_sum_of_fields():
    assert matrices(Format((Planes(1024, 1, 96),))) is None  # a group ends inside a field
    assert matrices(Format((Planes(1024, 1, 768),))) is None  # or inside a block
    assert matrices(Format((Planes(8, 1), SalientSplit(128, 3)))) is None
