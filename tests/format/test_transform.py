"""What inputs go through before a packed weight: T as a plain matrix, its bytes, its size, what it refuses."""

from __future__ import annotations

import json
from math import log2

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ultralowbit.checkpoint.size import Size
from ultralowbit.errors import FormatError
from ultralowbit.format.ints import Ints
from ultralowbit.format.outliers import IndexedOutliers, MaskedOutliers
from ultralowbit.format.planes import Planes
from ultralowbit.format.transform import InputTransform, block_hadamard
from ultralowbit.format.weight import Format, PackedWeight
from ultralowbit.kernels.packed_matmul import kernel_for, packed_matmul_ref
from ultralowbit.nn.linear import PackedLinear

EPS = torch.finfo(torch.float32).eps


def hadamard_matrix(columns: int, block: int | None) -> np.ndarray:
    """The docstring's, one element at a time, in fp64."""
    matrix, start = np.zeros((columns, columns)), 0
    while start < columns:
        size = block or 1
        while size > columns - start:
            size //= 2
        for i in range(size):
            for j in range(size):
                matrix[start + i, start + j] = (-1) ** (i & j).bit_count() / size**0.5
        start += size
    return matrix


def matrix_of(transform: InputTransform, parts: dict[str, Tensor]) -> np.ndarray:
    """T [columns, columns] fp64: T(x) = T x."""
    n = transform.columns
    mask = parts["channel_order"].tolist() if transform.channel_order else [True] * n
    order = [j for j in range(n) if mask[j]] + [j for j in range(n) if not mask[j]]
    scale = parts["scale"].double().numpy() if transform.column_scale else np.ones(n)
    return scale[:, None] * hadamard_matrix(n, transform.hadamard)[order]


def random_format(
    transform: InputTransform, first: int, outliers: IndexedOutliers | MaskedOutliers | None = None
) -> Format:
    rest = transform.columns - first
    return Format((Ints(first, 4), *([Planes(rest, 1, offset=True)] if rest else [])), outliers, transform)


def transform_parts(transform: InputTransform, first: int, generator: torch.Generator) -> dict[str, Tensor]:
    n, parts = transform.columns, {}
    if transform.channel_order:
        parts["channel_order"] = torch.rand(n, generator=generator).argsort() < first
    if transform.column_scale:
        parts["scale"] = torch.randn(n, generator=generator).half().float()
    return parts


def packed_with(
    transform: InputTransform, rows: int, first: int | None = None, seed: int = 0
) -> tuple[PackedWeight, dict[str, Tensor]]:
    """A random packed weight and the parts of its transform."""
    first = max(1, transform.columns // 3) if first is None else first
    generator = torch.Generator().manual_seed(seed)
    format, values = random_format(transform, first), transform_parts(transform, first, generator)
    ints = {
        "codes": torch.randint(16, (rows, first), generator=generator).to(torch.uint8),
        "scale": torch.rand(rows, 1, generator=generator).half().float(),
        "zero": torch.randint(16, (rows, 1), generator=generator).float(),
    }
    rest = transform.columns - first
    planes = {
        "bits": torch.randint(2, (1, rows, rest), generator=generator).bool(),
        "scale": torch.randn(1, rows, 1, generator=generator).half().float(),
        "offset": torch.randn(rows, 1, generator=generator).half().float(),
    }
    return PackedWeight.encode(format, ints, *([planes] if rest else []), values), values


def rounds(transform: InputTransform) -> float:
    """Roundings of fp32 on the way of one value through T."""
    return 3 + (log2(transform.hadamard) if transform.hadamard else 0)


@st.composite
def transforms(draw, largest: int = 300) -> InputTransform:
    columns = draw(st.integers(1, largest))
    flags = draw(st.tuples(st.booleans(), st.booleans(), st.sampled_from([None, 2, 8, 64, 512])).filter(any))
    return InputTransform(columns, *flags)


@settings(max_examples=60, deadline=None)
@given(transforms(), st.integers(1, 5), st.integers(0, 2**32))
def test_decode_is_the_stored_weight_times_the_matrix(transform, rows, seed):
    packed, parts = packed_with(transform, rows, seed=seed)
    stored = packed.format.untransformed.decode(packed.tensors).double().numpy()
    T = matrix_of(transform, parts)
    error = np.abs(packed.dequantize().double().numpy() - stored @ T)
    assert (error <= rounds(transform) * EPS * (np.abs(stored) @ np.abs(T))).all()


@settings(max_examples=60, deadline=None)
@given(transforms(), st.integers(0, 2**32))
def test_the_stored_weight_on_transformed_inputs_is_the_weight_on_inputs(transform, seed):
    packed, parts = packed_with(transform, 4, seed=seed)
    n, T = transform.columns, torch.from_numpy(matrix_of(transform, parts))
    x = torch.randn(2, 3, n, generator=torch.Generator().manual_seed(seed))
    moved = packed.format.transformed(packed.tensors, x)
    assert moved.shape == x.shape and moved.dtype == x.dtype
    assert ((moved.double() - x.double() @ T.T).abs() <= rounds(transform) * EPS * (x.double().abs() @ T.abs().T)).all()
    stored = packed.format.untransformed.decode(packed.tensors)
    product, expected = F.linear(moved, stored), F.linear(x, packed.dequantize())
    size = x.double().abs() @ T.abs().T @ stored.double().abs().T
    assert ((product - expected).abs() <= 2 * (n + rounds(transform)) * EPS * size).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_inputs_are_rounded_once_to_their_own_dtype(dtype, device):
    packed, _ = packed_with(InputTransform(100, True, True, 64), 3)
    tensors = {name: tensor.to(device) for name, tensor in packed.tensors.items()}
    x = torch.randn(5, 100, generator=torch.Generator().manual_seed(0)).to(device, dtype)
    exact = packed.format.transformed(tensors, x.float())
    assert torch.equal(packed.format.transformed(tensors, x), exact.to(dtype))


def test_channel_order_and_scale_alone_are_exact():
    transform = InputTransform(300, channel_order=True, column_scale=True)
    packed, parts = packed_with(transform, 7)
    stored = packed.format.untransformed.decode(packed.tensors) * parts["scale"]
    expected = torch.empty_like(stored)
    expected[:, parts["channel_order"]] = stored[:, :100]
    expected[:, ~parts["channel_order"]] = stored[:, 100:]
    assert torch.equal(packed.dequantize(), expected)


@pytest.mark.parametrize("columns", [1, 2, 7, 64, 100, 172, 352])
@pytest.mark.parametrize("block", [2, 32, 256])
def test_the_hadamard_matrix_is_orthonormal_and_its_own_inverse(columns, block):
    x = torch.randn(4, columns, generator=torch.Generator().manual_seed(0))
    assert torch.equal(block_hadamard(torch.eye(columns), block), block_hadamard(torch.eye(columns), block).T)
    torch.testing.assert_close(block_hadamard(block_hadamard(x, block), block), x, rtol=0, atol=1e-5)
    torch.testing.assert_close(block_hadamard(x, block).norm(dim=1), x.norm(dim=1))


def test_without_a_transform_inputs_stay_as_they_are():
    format, x = Format((Planes(8, 1),)), torch.randn(2, 8)
    assert format.transformed({}, x) is x
    assert format.untransformed == format


@settings(max_examples=40, deadline=None)
@given(transforms(), st.integers(2, 9), st.data())
def test_a_slice_of_the_rows_decodes_alone(transform, rows, data):
    low = data.draw(st.integers(0, rows - 1))
    high = data.draw(st.integers(low + 1, rows))
    packed, _ = packed_with(transform, rows)
    part = packed.format.rows(packed.tensors, slice(low, high))
    sliced = PackedWeight(packed.format, (high - low, transform.columns), part)
    assert torch.equal(sliced.dequantize(), packed.dequantize()[low:high])


def test_decoding_by_tiles_changes_nothing(monkeypatch):
    packed, _ = packed_with(InputTransform(300, True, True, 128), 23)
    whole = packed.dequantize()
    monkeypatch.setattr("ultralowbit.format.weight._TILE", 5 * 300)  # 5 rows at a time, 3 in the last
    assert torch.equal(packed.dequantize(), whole)
    assert torch.equal(packed.dequantize(torch.bfloat16), whole.bfloat16())


@pytest.mark.parametrize("outliers", [IndexedOutliers(30, 2, 10), MaskedOutliers(30, 4, 0.1)], ids=lambda o: o.summary)
def test_the_outliers_has_the_columns_of_the_segments(outliers):
    transform = InputTransform(30, channel_order=True, column_scale=True)
    plain, values = packed_with(transform, 4)
    mask = (
        (torch.arange(30) % 10 < 2).expand(4, 30)
        if isinstance(outliers, IndexedOutliers)
        else torch.arange(30) % 9 == 5
    )
    codes = torch.arange(120).view(4, 30).to(torch.uint8)
    parts = outliers.encode(mask.expand(4, 30), codes, torch.full((4,), 0.5), torch.zeros(4))
    tensors = plain.tensors | {f"weight_outliers{suffix}": tensor for suffix, tensor in parts.items()}
    packed = PackedWeight(random_format(transform, 10, outliers), (4, 30), tensors)
    stored = torch.where(mask, codes * 0.5, plain.format.untransformed.decode(plain.tensors)) * values["scale"]
    order = torch.cat([values["channel_order"].nonzero(), (~values["channel_order"]).nonzero()])[:, 0]
    assert torch.equal(packed.dequantize()[:, order], stored)


# --- the bytes of version 2 ------------------------------------------------------------------------------------------

GOLDEN = {
    "weight_input_channel_order": "12048200",  # columns 2, 8, 20 in word 0, columns 3 and 15 in word 1
    "weight_input_scale": "00bc00bb00ba00b900b800b600b400b0000000300034003600380039003a003b003c803c003d803d003e",
}


@pytest.mark.parametrize("hadamard", [None, 8])
def test_version_2_writes_and_reads_these_bytes(hadamard):
    marked = [2, 3, 8, 15, 20]
    transform = InputTransform(21, True, True, hadamard)
    parts = {"channel_order": torch.tensor([j in marked for j in range(21)]), "scale": (torch.arange(21) - 8) / 8}
    stored = {f"weight_input{name}": t.numpy().tobytes().hex() for name, t in transform.encode(**parts).items()}
    assert stored == GOLDEN
    specs = {f"weight_input{suffix}": spec for suffix, spec in transform.tensors(1).items()}
    tensors = {
        name: torch.frombuffer(bytearray.fromhex(GOLDEN[name]), dtype=spec.dtype).view(spec.shape)
        for name, spec in specs.items()
    }
    x = torch.arange(21.0)
    if hadamard is None:
        others = [j for j in range(21) if j not in marked]
        expected = torch.tensor([*marked, *others]) * parts["scale"]
        assert torch.equal(random_format(transform, 5).transformed(tensors, x), expected)
    else:  # sums and differences of 0..7 are exact, the first is their sum over the root of 8
        y = random_format(transform, 5).transformed(tensors, x)
        assert y[5].item() == pytest.approx(28 / 8**0.5 * -3 / 8, rel=4 * EPS)


def test_version_2_describes_itself_in_these_words():
    plane = {"kind": "planes", "columns": 5, "planes": 1, "group": None, "alphabet": "pm1", "offset": False}
    format = Format((Planes(5, 1),), IndexedOutliers(5, 2, 4), InputTransform(5, column_scale=True, hadamard=4))
    data = {
        "version": 2,
        "segments": [plane],
        "outliers": {"kind": "indexed_outliers", "columns": 5, "count": 2, "block": 4},
        "transform": {"kind": "input", "columns": 5, "channel_order": False, "column_scale": True, "hadamard": 4},
    }
    assert json.loads(json.dumps(format.to_dict())) == data
    assert Format.from_dict(data) == format
    del data["transform"]  # as releases before it wrote them
    assert Format.from_dict(data) == format.untransformed


# --- size --------------------------------------------------------------------------------------------------------


def test_bits_counted_by_hand():
    rows, n, first = 8, 4096, 1024
    packed, _ = packed_with(InputTransform(n, True, True, 64), rows, first)
    row = 4 * first + 16 + 4 + (n - first) + 32  # scale, zero point; scale, offset
    assert packed.bits_per_weight == pytest.approx((rows * (row + 4) + n + 16 * n) / (rows * n))  # a zero point a byte
    assert packed.format.claimed_bits == (4 * first + n - first) / n
    rotated, _ = packed_with(InputTransform(n, hadamard=64), rows, first)
    assert rotated.nbytes == packed.nbytes - n // 8 - 2 * n


def test_the_size_of_a_checkpoint_names_its_parts():
    packed, _ = packed_with(InputTransform(64, True, True), 8, 16)
    specs = {f"blocks.0.layer.{name}": spec for name, spec in packed.format.tensors(8, 64).items()}
    (layer,) = Size.of(specs, {"blocks.0.layer": packed.format}).layers
    assert layer.parts["input_channel_order"] == 8 and layer.parts["input_scale"] == 128
    assert layer.bytes == packed.nbytes


def test_formats_that_store_or_mean_something_else_have_other_summaries():
    by_summary = {}
    for flags in np.ndindex(2, 2, 3):
        transform = InputTransform(64, bool(flags[0]), bool(flags[1]), (None, 32, 64)[flags[2]]) if any(flags) else None
        format = Format((Ints(16, 4), Planes(48, 1)), None, transform)
        assert by_summary.setdefault(format.summary, format) == format
    assert len(by_summary) == 12
    assert "64" in Format((Planes(64, 1),), None, InputTransform(64, hadamard=64)).summary


# --- what it refuses -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda: InputTransform(8), "leave it out"),
        (lambda: InputTransform(0, True), "columns=0"),
        (lambda: InputTransform(8, 2), "input.channel_order is 2"),
        (lambda: InputTransform(8, column_scale="yes"), "input.column_scale is 'yes'"),
        (lambda: InputTransform(8, hadamard=1), "input.hadamard is 1, expected a power of two"),
        (lambda: InputTransform(8, hadamard=12), "input.hadamard is 12"),
        (
            lambda: Format((Planes(8, 1),), None, InputTransform(9, True)),
            "transform.columns is 9, the segments have 8",
        ),
    ],
)
def test_a_transform_without_a_layout_is_refused(make, named):
    with pytest.raises(FormatError) as error:
        make()
    assert named in str(error.value)


def test_a_channel_order_of_another_size_than_the_first_segment_is_refused():
    format = random_format(InputTransform(8, channel_order=True), 3)
    ints = {"codes": torch.zeros(2, 3, dtype=torch.uint8), "scale": torch.ones(2, 1), "zero": torch.zeros(2, 1)}
    planes = {"bits": torch.ones(1, 2, 5).bool(), "scale": torch.ones(1, 2, 1), "offset": torch.zeros(2, 1)}
    with pytest.raises(FormatError, match="marks 4 channels, the first segment has 3 columns"):
        format.encode(ints, planes, {"channel_order": torch.arange(8) < 4})


@pytest.mark.parametrize(
    "entry", [{"kind": "output", "columns": 5}, {"columns": 5}, {"kind": "input", "columns": 5, "rotation": 1}]
)
def test_a_transform_of_a_newer_release_is_refused(entry):
    with pytest.raises(FormatError, match="unknown transform in the packed format"):
        Format.from_dict({**Format((Planes(5, 1),)).to_dict(), "transform": entry})


# --- with the rest of the package ------------------------------------------------------------------------------------


@pytest.mark.parametrize("flags", [(True, True, None), (False, False, 32), (True, True, 16)], ids=str)
def test_a_packed_linear_multiplies_with_it_and_passes_gradients(flags):
    packed, _ = packed_with(InputTransform(48, *flags), 6)
    linear = PackedLinear(6, 48, packed.format, None)
    linear.fill(packed)
    x = torch.randn(3, 48, generator=torch.Generator().manual_seed(0), requires_grad=True)
    y = linear(x)
    torch.testing.assert_close(y, x @ packed.dequantize().T)
    y.sum().backward()
    torch.testing.assert_close(x.grad, packed.dequantize().sum(0).expand(3, 48))


def test_a_kernel_of_the_segments_alone_is_not_chosen(monkeypatch):
    kernel = object()
    choose = {"planes": kernel}.get
    monkeypatch.setattr(
        "ultralowbit.kernels.packed_matmul.KERNELS", {"cpu": lambda format, *case: choose(format.kinds)}
    )
    format = Format((Planes(8, 1),), None, InputTransform(8, hadamard=8))
    assert kernel_for(format.untransformed, "cpu") is kernel
    assert kernel_for(format, "cpu") is packed_matmul_ref
