"""Stored tensors of the right shapes whose values nothing can have written are told from those that were."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from ultralowbit.errors import FormatError
from ultralowbit.format.ints import Ints
from ultralowbit.format.outliers import IndexedOutliers, MaskedOutliers
from ultralowbit.format.planes import Planes, TiedPlanes
from ultralowbit.format.salient import SalientSplit
from ultralowbit.format.testing import random_packed
from ultralowbit.format.transform import InputTransform
from ultralowbit.format.weight import Format
from ultralowbit.format.words import pack_fields

SPLIT = SalientSplit(70, 9, 32, third=True, column_scale=True, offset=True)
FORMATS = [
    Format((Planes(70, 3, 16, "pm1", offset=True),)),
    Format((Ints(33, 3, 8), TiedPlanes(37, 4, 16)), None, InputTransform(70, True, True, 8)),
    Format((SPLIT,)),
    Format((Planes(70, 1),), IndexedOutliers(70, 3, 32)),
    Format((Planes(70, 1),), MaskedOutliers(70, 5, 0.05)),
]
FLOATS = [
    (format, name) for format in FORMATS for name, spec in format.tensors(6, 70).items() if spec.dtype.is_floating_point
]


@pytest.mark.parametrize("format", FORMATS, ids=lambda format: format.summary)
@pytest.mark.parametrize("seed", range(3))
def test_random_weights_have_none(format, seed):
    packed = random_packed(format, 6, seed)
    format.check_values(packed.tensors)
    assert packed.dequantize().isfinite().all()
    assert torch.equal(random_packed(format, 6, seed).dequantize(), packed.dequantize())
    assert not torch.equal(random_packed(format, 6, seed + 9).dequantize(), packed.dequantize())


def test_random_weights_have_every_code_both_signs_and_padding():
    planes = random_packed(Format((Planes(5, 1, 1),)), 200).tensors
    assert len(planes["weight"].unique()) > 2**5  # 5 of 16 bits are columns
    assert (planes["weight_scale"] < 0).any() and (planes["weight_scale"] > 0).any()
    for bits in (2, 3, 4, 8):
        packed = random_packed(Format((Ints(500, bits),)), 40)
        scale = packed.tensors["weight_scale"].float().T
        codes = (packed.dequantize() / scale).round()
        assert len((codes - codes.amin(1, keepdim=True)).unique()) == 2**bits


@pytest.mark.parametrize(("format", "name"), FLOATS, ids=lambda v: v if isinstance(v, str) else v.summary)
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf], ids=str)
def test_a_scale_that_is_not_finite_is_named(format, name, value):
    tensors = random_packed(format, 6).tensors
    tensors[name].view(-1)[-1] = value
    with pytest.raises(FormatError, match=f"^{name} holds values that are not finite: .* copy it again$"):
        format.check_values(tensors)


def marks(count: int, columns: int = 70) -> Tensor:
    return pack_fields((torch.arange(columns) < count).to(torch.uint8), 1)


@pytest.mark.parametrize(
    ("format", "name", "change", "problem"),
    [
        (FORMATS[1], "weight_input_channel_order", lambda t: marks(32), "marks 32 channels, expected 33"),
        (FORMATS[1], "weight_input_channel_order", lambda t: marks(34), "marks 34 channels, expected 33"),
        (FORMATS[2], "weight_salient", lambda t: marks(8), "marks 8 columns, expected 9"),
        (FORMATS[2], "weight_salient", lambda t: marks(10), "marks 10 columns, expected 9"),
        (FORMATS[3], "weight_outliers_index", lambda t: t.flip(0), "does not rise below 32 in the columns from 0 on"),
        (FORMATS[3], "weight_outliers_index", lambda t: t.clone().fill_(3), "does not rise below 32"),
        (FORMATS[3], "weight_outliers_index", lambda t: set_(t, (2, 4), 32), "does not rise below 32 in the columns f"),
        (
            FORMATS[3],
            "weight_outliers_index",
            lambda t: set_(t, (6, 4), 6),
            "does not rise below 6 in the columns from 64",
        ),
        (
            FORMATS[4],
            "weight_outliers_mask",
            lambda t: set_(t, 3, marks(6)),
            "marks 6 weights of a row, expected at most",
        ),
    ],
)
def test_places_that_cannot_be_are_named(format: Format, name: str, change: Callable[[Tensor], Tensor], problem: str):
    tensors = random_packed(format, 6).tensors
    with pytest.raises(FormatError, match=f"^{name} {problem}"):
        format.check_values({**tensors, name: change(tensors[name])})


def set_(tensor: Tensor, where: object, value: object) -> Tensor:
    tensor = tensor.clone()
    tensor[where] = value
    return tensor


def test_bits_in_the_padding_of_marks_do_not_count():
    tensors = random_packed(FORMATS[2], 6).tensors
    tensors["weight_salient"][-1] |= torch.tensor(-(2**15), dtype=torch.int16)  # 70 columns end in 5 words of 14 bits
    FORMATS[2].check_values(tensors)
