"""Block types of llama.cpp: their bytes mean exactly the packed weight, and what does not fit is left to others."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from ultralowbit.export.gguf.blocks import BLOCK_TYPES, Multiples, exact_type
from ultralowbit.format.ints import Ints
from ultralowbit.format.outliers import IndexedOutliers
from ultralowbit.format.planes import Planes, TiedPlanes
from ultralowbit.format.testing import random_packed
from ultralowbit.format.transform import InputTransform
from ultralowbit.format.weight import Format, PackedWeight

gguf = pytest.importorskip("gguf")


def halves(data: np.ndarray) -> np.ndarray:
    return data.copy().view(np.float16).astype(np.float32)


def decode(kind, data: Tensor) -> Tensor:
    """What the bytes [out, row bytes] mean: by the gguf package where it knows the type, else by ggml's definition."""
    blocks = data.numpy().reshape(len(data), -1, kind.bytes)  # [out, blocks, bytes]
    if kind.name == "Q1_0":
        bits = np.unpackbits(blocks[..., 2:], axis=-1, bitorder="little").astype(np.float32)
        return torch.from_numpy((halves(blocks[..., :2]) * (2 * bits - 1)).reshape(len(data), -1))
    if kind.name == "Q2_0":
        codes = (blocks[..., 2:, None] >> np.array([0, 2, 4, 6], np.uint8)) & 3  # weight 4 b + i is bits 2 i of byte b
        return torch.from_numpy(
            (halves(blocks[..., :2]) * (codes.reshape(*blocks.shape[:2], 64).astype(np.float32) - 1)).reshape(
                len(data), -1
            )
        )
    number = gguf.GGMLQuantizationType(kind.number)
    assert gguf.GGML_QUANT_SIZES[number] == (kind.size, kind.bytes)
    return torch.from_numpy(gguf.quants.dequantize(data.numpy(), number))


def with_zeros(columns: int, bits: int, group: int, zero: int, scale: float | None = None) -> PackedWeight:
    """Asymmetric integers whose zero points are all the same."""
    packed = random_packed(Format((Ints(columns, bits, group),)), 5)
    groups = -(-columns // group)
    parts = {
        "codes": packed.format.segments[0].unpack_codes(packed.tensors["weight"]).to(torch.uint8),
        "scale": packed.tensors["weight_scale"].T.float() if scale is None else torch.full((5, groups), scale),
        "zero": torch.full((5, groups), zero),
    }
    return PackedWeight.encode(packed.format, parts)


EXACT = {
    "sign": (Format((Planes(384, 1, 128),)), "Q1_0"),
    "sign, one scale a row": (Format((Planes(256, 1),)), "Q1_0"),
    "sign, rows of one and a half blocks": (Format((Planes(192, 1, 128),)), "Q2_0"),
    "0 and 1": (Format((Planes(128, 1, 128, "01"),)), "Q2_0"),
    "2 bits": (Format((Ints(192, 2, 64, True),)), "Q2_0"),
    "2 bits, larger groups": (Format((Ints(320, 2, 128, True),)), "Q2_0"),
    "2 bits, groups of 32": (Format((Ints(192, 2, 32, True),)), "Q4_0"),
    "4 bits": (Format((Ints(96, 4, 32, True),)), "Q4_0"),
    "3 bits": (Format((Ints(96, 3, None, True),)), "Q4_0"),
    "2 bits with zero points": (Format((Ints(96, 2, 32),)), "Q4_0"),
    "two tied planes": (Format((TiedPlanes(96, 2, 32),)), "Q4_0"),
    "four tied planes": (Format((TiedPlanes(96, 4, 32),)), "Q8_0"),
    "8 bits": (Format((Ints(96, 8, 32, True),)), "Q8_0"),
}


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("format", "name"), EXACT.values(), ids=EXACT)
def test_the_smallest_type_that_holds_a_format_means_the_same(format, name, seed):
    packed = random_packed(format, 7, seed)  # every code, scales of both signs
    weight = Multiples.of(packed)
    kind = exact_type(weight)
    assert kind.name == name
    encoded = kind.encode(weight)
    assert encoded.dtype == torch.uint8 and encoded.nbytes == kind.bytes_of(packed.shape)
    assert torch.equal(decode(kind, encoded), packed.dequantize())


@pytest.mark.parametrize(
    ("packed", "name"),
    [
        (with_zeros(64, 2, 64, 1), "Q2_0"),  # the grid of Q2_0 as it is
        (with_zeros(64, 2, 64, 2), "Q2_0"),  # turned over
        (with_zeros(64, 2, 64, 0), "Q4_0"),
        (with_zeros(64, 2, 64, 3), "Q4_0"),
        (with_zeros(64, 4, 32, 8), "Q4_0"),
        (with_zeros(64, 4, 32, 7), "Q4_0"),
        (with_zeros(64, 4, 32, 3, 0.0625), "Q4_1"),  # fp16 holds 3 / 16
        (with_zeros(64, 4, 32, 15, 0.0625), "Q4_1"),
        (with_zeros(64, 4, 32, 3, 1 + 2**-10), "Q8_0"),  # and not 3 + 3 / 1024
        (with_zeros(64, 8, 32, 127), "Q8_0"),
    ],
)
def test_zero_points_decide(packed, name):
    weight = Multiples.of(packed)
    kind = exact_type(weight)
    assert kind.name == name
    assert torch.equal(decode(kind, kind.encode(weight)), packed.dequantize())


def test_each_group_may_lean_its_own_way():
    """Zero points of 1 and 2 side by side: one group as it is, the next with the opposite scale."""
    packed = with_zeros(128, 2, 64, 1)
    packed.tensors["weight_zero"] = packed.tensors["weight_zero"] & 0b0011 | 0b1000
    weight = Multiples.of(packed)
    assert exact_type(weight).name == "Q2_0"
    assert torch.equal(decode(exact_type(weight), exact_type(weight).encode(weight)), packed.dequantize())


@pytest.mark.parametrize(
    "format",
    [
        Format((Planes(128, 2, 128),)),
        Format((Planes(128, 1, 128, "pm1", True),)),
        Format((Planes(128, 1, 128),), IndexedOutliers(128, 4, 32)),
        Format((Planes(128, 1, 128),), transform=InputTransform(128, hadamard=128)),
        Format((Ints(64, 4, 32, True), Planes(128, 1, 128))),
    ],
    ids=lambda format: format.summary,
)
def test_what_is_no_product_of_integers_and_scales(format):
    assert Multiples.of(random_packed(format, 3)) is None


@pytest.mark.parametrize(
    "packed",
    [
        random_packed(Format((Ints(100, 4, None, True),)), 3),
        random_packed(Format((Ints(96, 4, 48, True),)), 3),
        random_packed(Format((Ints(96, 4, 16, True),)), 3),
        with_zeros(64, 8, 32, 3),
    ],
    ids=["rows", "groups", "small groups", "zero points of 8 bits"],
)
def test_what_fits_no_block_has_no_type(packed):
    assert exact_type(Multiples.of(packed)) is None


def test_types_are_listed_from_the_fewest_bits():
    assert [kind.bits for kind in BLOCK_TYPES] == [1.125, 2.25, 4.5, 5.0, 8.5]
