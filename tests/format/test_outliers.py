"""Single weights at 8 bits on top of the segments: their bytes read one at a time, their size, what they refuse."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ultralowbit.errors import FormatError
from ultralowbit.format.ints import Ints
from ultralowbit.format.outliers import IndexedOutliers, MaskedOutliers
from ultralowbit.format.planes import Planes
from ultralowbit.format.weight import Format, PackedWeight
from ultralowbit.format.words import word_count
from ultralowbit.kernels.packed_matmul import kernel_for, packed_matmul_ref
from ultralowbit.nn.linear import PackedLinear


def chosen(outliers: IndexedOutliers | MaskedOutliers, rows: int, generator: torch.Generator) -> Tensor:
    """A mask that these outliers can hold."""
    score = torch.rand(rows, outliers.columns, generator=generator)
    mask = torch.zeros_like(score, dtype=torch.bool)
    if isinstance(outliers, MaskedOutliers):
        for row in range(rows):
            taken = torch.randint(outliers.capacity + 1, (), generator=generator) if row else outliers.capacity
            mask[row, score[row].argsort()[:taken]] = True
        return mask
    for start in range(0, outliers.columns, outliers.block):
        part = score[:, start : start + outliers.block]
        entries = -(-outliers.count * part.shape[1] // outliers.block)
        mask[:, start : start + outliers.block] = part.argsort(1).argsort(1) < entries
    return mask


def random_parts(outliers: IndexedOutliers | MaskedOutliers, rows: int, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "mask": chosen(outliers, rows, generator),
        "codes": torch.randint(256, (rows, outliers.columns), generator=generator).to(torch.uint8),
        "scale": torch.randn(rows, generator=generator).half().float(),
        "zero": torch.randint(256, (rows,), generator=generator).float(),
    }


def base_parts(columns: int, rows: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    bits = torch.randint(2, (1, rows, columns), generator=generator).bool()
    return {"bits": bits, "scale": torch.full((1, rows, 1), 0.5), "offset": torch.full((rows, 1), 0.25)}


def packed_with(outliers: IndexedOutliers | MaskedOutliers, rows: int, seed: int = 0) -> tuple[PackedWeight, Tensor]:
    """A packed weight and what it was asked to mean."""
    base, parts = base_parts(outliers.columns, rows), random_parts(outliers, rows, seed)
    format = Format((Planes(outliers.columns, 1, offset=True),), outliers)
    values = (parts["codes"].float() - parts["zero"][:, None]) * parts["scale"][:, None]
    meaning = torch.where(parts["mask"], values, torch.where(base["bits"][0], 0.75, -0.25))
    return PackedWeight.encode(format, base, parts), meaning


@st.composite
def outliers(draw) -> IndexedOutliers | MaskedOutliers:
    columns = draw(st.integers(1, 700))
    if draw(st.booleans()):
        return MaskedOutliers(columns, draw(st.integers(1, columns)), draw(st.floats(0, 1)))
    block = draw(st.integers(1, 256))
    return IndexedOutliers(columns, draw(st.integers(1, block)), block)


@settings(max_examples=60, deadline=None)
@given(outliers(), st.integers(1, 5), st.integers(0, 2**32))
def test_decode_returns_exactly_what_was_encoded(outliers, rows, seed):
    packed, meaning = packed_with(outliers, rows, seed)
    assert torch.equal(packed.dequantize(), meaning)


@settings(max_examples=40, deadline=None)
@given(outliers(), st.integers(2, 9), st.data())
def test_a_slice_of_the_rows_decodes_alone(outliers, rows, data):
    low = data.draw(st.integers(0, rows - 1))
    high = data.draw(st.integers(low + 1, rows))
    packed, meaning = packed_with(outliers, rows)
    part = packed.format.rows(packed.tensors, slice(low, high))
    assert torch.equal(
        PackedWeight(packed.format, (high - low, outliers.columns), part).dequantize(), meaning[low:high]
    )


@settings(max_examples=20, deadline=None)
@given(outliers(), st.integers(1, 3), st.integers(0, 2**32))
def test_the_bytes_mean_what_the_documentation_says(outliers, rows, seed):
    """One element at a time, from the words of the docstrings."""
    packed, _ = packed_with(outliers, rows, seed)
    stored = {name.removeprefix("weight_outliers_"): t.tolist() for name, t in packed.tensors.items()}
    weight = Format(packed.format.segments).decode(packed.tensors).numpy()
    for r in range(rows):
        if isinstance(outliers, MaskedOutliers):
            words = stored["mask"][r]
            places = [j for j in range(outliers.columns) if is_set(words, j, outliers.columns)]
        else:
            blocks = range(0, outliers.columns, outliers.block)
            counts = [-(-outliers.count * min(outliers.block, outliers.columns - b) // outliers.block) for b in blocks]
            starts = [b for b, count in zip(blocks, counts, strict=True) for _ in range(count)]
            places = [start + index[r] for start, index in zip(starts, stored["index"], strict=True)]
        assert places == sorted(set(places))
        for entry, j in enumerate(places):
            code = stored["value"][entry][r] - stored["zero"][0][r]
            weight[r, j] = np.float32(code) * np.float32(stored["scale"][0][r])
    assert np.array_equal(packed.dequantize().numpy(), weight)


def is_set(words: list[int], column: int, columns: int) -> bool:
    start = column // 512 * 512
    lanes = 32 if start + 512 <= columns else -(-(columns - start) // 16)
    return bool(words[start // 16 + (column - start) % lanes] >> (column - start) // lanes & 1)


def test_decoding_by_tiles_changes_nothing(monkeypatch):
    for outliers in (IndexedOutliers(300, 7, 64), MaskedOutliers(300, 40, 0.1)):
        packed, meaning = packed_with(outliers, 23)
        monkeypatch.setattr("ultralowbit.format.weight._TILE", 5 * 300)  # 5 rows at a time, 3 in the last
        assert torch.equal(packed.dequantize(), meaning)
        assert torch.equal(packed.dequantize(torch.bfloat16), meaning.bfloat16())


def test_it_lies_over_all_segments():
    """Blocks of outliers do not care where segments end."""
    outliers, segments = IndexedOutliers(30, 2, 8), (Ints(11, 4), Planes(19, 2))
    generator = torch.Generator().manual_seed(0)
    ints = {
        "codes": torch.randint(16, (3, 11), generator=generator).to(torch.uint8),
        "scale": torch.ones(3, 1),
        "zero": torch.zeros(3, 1),
    }
    planes = {"bits": torch.randint(2, (2, 3, 19), generator=generator).bool(), "scale": torch.ones(2, 3, 1)}
    plain = PackedWeight.encode(Format(segments), ints, planes).dequantize()
    parts = random_parts(outliers, 3)
    values = (parts["codes"].float() - parts["zero"][:, None]) * parts["scale"][:, None]
    decoded = PackedWeight.encode(Format(segments, outliers), ints, planes, parts).dequantize()
    assert torch.equal(decoded, torch.where(parts["mask"], values, plain))


# --- the bytes of version 2 ------------------------------------------------------------------------------------------

MASK = "1000000100 0000000011 0100100000"  # of the first row; the second has its columns in reverse
GOLDEN = {
    IndexedOutliers(30, 2, 10): {
        "index": "000507080800090101020409",
        "value": "000f037e9ac8bfed09847887",
        "scale": "00380034",
        "zero": "8003",
    },
    MaskedOutliers(30, 7, 0.2): {
        "mask": "0112080630082440",
        "value": "000f037e9ac8bfed098478870000",
        "scale": "00380034",
        "zero": "8003",
    },
}


def golden(outliers: IndexedOutliers | MaskedOutliers) -> PackedWeight:
    """Written by a rule that depends on no random generator."""
    row = torch.tensor([c == "1" for c in MASK.replace(" ", "")])
    codes = (torch.arange(60) * 37 % 256).view(2, 30).to(torch.uint8)
    parts = {
        "mask": torch.stack([row, row.flip(0)]),
        "codes": codes,
        "scale": torch.tensor([0.5, 0.25]),
        "zero": torch.tensor([128.0, 3.0]),
    }
    return PackedWeight.encode(Format((Planes(30, 1, offset=True),), outliers), base_parts(30, 2), parts)


@pytest.mark.parametrize("outliers", GOLDEN, ids=lambda o: o.summary)
def test_version_2_writes_these_bytes(outliers):
    stored = {
        name.removeprefix("weight_outliers_"): t.numpy().tobytes().hex()
        for name, t in golden(outliers).tensors.items()
        if "outliers" in name
    }
    assert stored == GOLDEN[outliers]


@pytest.mark.parametrize("outliers", GOLDEN, ids=lambda o: o.summary)
def test_version_2_reads_these_bytes(outliers):
    packed = golden(outliers)
    tensors = {
        name: torch.frombuffer(
            bytearray.fromhex(GOLDEN[outliers][name.removeprefix("weight_outliers_")]), dtype=t.dtype
        )
        .view(t.shape)
        .clone()
        if "outliers" in name
        else t
        for name, t in packed.tensors.items()
    }
    assert torch.equal(PackedWeight(packed.format, (2, 30), tensors).dequantize(), packed.dequantize())


def test_version_2_describes_itself_in_these_words():
    plane = {"kind": "planes", "columns": 5, "planes": 1, "group": None, "alphabet": "pm1", "offset": False}
    described = {
        None: {"version": 2, "segments": [plane]},
        IndexedOutliers(5, 2, 4): {
            "version": 2,
            "segments": [plane],
            "outliers": {"kind": "indexed_outliers", "columns": 5, "count": 2, "block": 4},
        },
        MaskedOutliers(5, 2, 0.1): {
            "version": 2,
            "segments": [plane],
            "outliers": {"kind": "masked_outliers", "columns": 5, "capacity": 2, "ratio": 0.1},
        },
    }
    for outliers, data in described.items():
        format = Format((Planes(5, 1),), outliers)
        assert json.loads(json.dumps(format.to_dict())) == data
        assert Format.from_dict(data) == format


# --- size --------------------------------------------------------------------------------------------------------


def test_bits_counted_by_hand():
    rows, columns = 8, 4096
    base = 1 + 32 / columns
    packed, _ = packed_with(IndexedOutliers(columns, 26), rows)
    assert packed.bits_per_weight == base + 26 / 256 * 16 + 24 / columns
    assert packed.format.claimed_bits == 26 / 256 * 8 + 230 / 256
    packed, _ = packed_with(MaskedOutliers(columns, 500, 0.1), rows)
    assert packed.bits_per_weight == base + 1 + 500 * 8 / columns + 24 / columns
    assert packed.format.claimed_bits == pytest.approx(0.1 * 8 + 0.9)


@pytest.mark.parametrize("columns", [1, 100, 256, 300, 768])
def test_a_shorter_last_block_has_proportionally_fewer_rounded_up(columns):
    outliers = IndexedOutliers(columns, 26)
    full, rest = divmod(columns, 256)
    entries = 26 * full + -(-26 * rest // 256)
    assert outliers.tensors(3)["_index"].shape == (entries, 3)
    assert outliers.share == entries / columns


def test_formats_that_store_other_tensors_have_other_summaries():
    by_summary = {}
    for n in (64, 300):
        counted = (IndexedOutliers(n, c, b) for c in (2, 3) for b in (32, 64))
        for outliers in (None, *counted, *(MaskedOutliers(n, c, 0.1) for c in (2, 3))):
            format = Format((Planes(n, 1),), outliers)
            assert by_summary.setdefault(format.summary, format) == format
    assert len(by_summary) == 14


# --- what it refuses -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda: IndexedOutliers(8, 0), "indexed_outliers.count is 0, expected 1 to 256"),
        (lambda: IndexedOutliers(8, 5, 4), "indexed_outliers.count is 5, expected 1 to 4"),
        (lambda: IndexedOutliers(8, 1, 257), "indexed_outliers.block is 257, expected 1 to 256"),
        (lambda: IndexedOutliers(0, 1), "columns=0"),
        (lambda: MaskedOutliers(8, 0, 0.1), "masked_outliers.capacity is 0, expected 1 to 8"),
        (lambda: MaskedOutliers(8, 9, 0.1), "masked_outliers.capacity is 9, expected 1 to 8"),
        (lambda: MaskedOutliers(8, 1, 1.5), "masked_outliers.ratio is 1.5"),
        (lambda: Format((Planes(8, 1),), IndexedOutliers(9, 1)), "outliers.columns is 9, the segments have 8"),
    ],
)
def test_outliers_without_a_layout_are_refused(make, named):
    with pytest.raises(FormatError) as error:
        make()
    assert named in str(error.value)


@pytest.mark.parametrize(
    "entry",
    [{"kind": "patch", "columns": 5}, {"columns": 5}, {"kind": "indexed_outliers", "columns": 5, "count": 1, "x": 0}],
)
def test_outliers_of_a_newer_release_are_refused(entry):
    with pytest.raises(FormatError, match="unknown outliers in the packed format"):
        Format.from_dict({**Format((Planes(5, 1),)).to_dict(), "outliers": entry})


def test_a_mask_that_does_not_fit_is_refused():
    parts = random_parts(IndexedOutliers(20, 2, 10), 3)
    parts["mask"][1, 10:] = False
    with pytest.raises(FormatError, match="2of10xint8 holds 2 weights in columns 10 to 19"):
        IndexedOutliers(20, 2, 10).encode(**parts)
    parts["mask"][2] = True
    with pytest.raises(FormatError, match="holds 4 weights a row, a row of the mask has 20"):
        MaskedOutliers(20, 4, 0.2).encode(**parts)


# --- with the rest of the package ------------------------------------------------------------------------------------


@pytest.mark.parametrize("outliers", [IndexedOutliers(48, 5, 20), MaskedOutliers(48, 9, 0.1)], ids=lambda o: o.summary)
def test_a_packed_linear_multiplies_with_them(outliers):
    packed, meaning = packed_with(outliers, 6)
    linear = PackedLinear(6, 48, packed.format, None)
    linear.fill(packed)
    x = torch.randn(3, 48, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(linear(x), x @ meaning.T)


def test_a_kernel_of_the_segments_alone_is_not_chosen(monkeypatch):
    kernel = object()
    choose = lambda format, device, dtype, tokens: kernel if format.kinds == "planes" else None  # noqa: E731
    monkeypatch.setattr("ultralowbit.kernels.packed_matmul.KERNELS", {"cpu": choose})
    assert kernel_for(Format((Planes(8, 1),)), "cpu") is kernel
    assert kernel_for(Format((Planes(8, 1),), IndexedOutliers(8, 1)), "cpu") is packed_matmul_ref


def test_the_mask_uses_the_one_word_layout():
    assert MaskedOutliers(1000, 3, 0.1).tensors(2)["_mask"].shape == (2, word_count(1000, 1))
