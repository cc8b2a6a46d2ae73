"""Sign planes with several scales: the words of the docstring one weight at a time, their size, what they refuse."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ultralowbit.errors import FormatError
from ultralowbit.format.planes import Planes
from ultralowbit.format.salient import SalientSplit
from ultralowbit.format.weight import Format, PackedWeight


def random_parts(split: SalientSplit, rows: int, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    blocks = -(-split.columns // split.block)

    def bits(*shape: int) -> Tensor:
        return torch.randint(2, shape, generator=generator).bool()

    def scale(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).half().float()

    salient = torch.zeros(split.columns, dtype=torch.bool)
    salient[torch.randperm(split.columns, generator=generator)[: split.salient]] = True
    parts = {"bits": bits(2, rows, split.columns), "salient": salient}
    parts["scale"] = scale(6 if split.third else 4, rows, blocks)
    if split.third:
        parts["third"] = bits(rows, split.salient)
    if split.offset:
        parts["offset"] = scale(4 if split.third else 3, rows, blocks)
    if split.column_scale:
        parts["column"] = scale(2, split.columns)
        if split.third:
            parts["third_column"] = scale(2, split.salient)
    return parts


def meaning(split: SalientSplit, parts: dict[str, Tensor]) -> np.ndarray:
    """The docstring, one weight at a time, in fp32."""
    rows, columns = parts["bits"].shape[1:]
    p = {name: part.numpy() for name, part in parts.items()}
    a, one = p["scale"], np.float32(1)
    weight = np.zeros((rows, columns), np.float32)
    rank = p["salient"].cumsum() - 1
    for i in range(rows):
        for j in range(columns):
            block, k = j // split.block, rank[j]
            s = np.float32(2 * int(p["bits"][0, i, j]) - 1)
            second = int(p["bits"][1, i, j])
            u = p["column"][:, j] if split.column_scale else (one, one)
            if not p["salient"][j]:
                value, zone = a[second, i, block] * u[second] * s, second
            elif not split.third:
                value = a[2, i, block] * u[0] * s + a[3, i, block] * u[1] * np.float32(2 * second - 1)
                zone = 2
            else:
                t = np.float32(2 * int(p["third"][i, k]) - 1)
                v = p["third_column"][:, k] if split.column_scale else (one, one)
                value = a[2 + second, i, block] * u[second] * s + a[4 + second, i, block] * v[second] * t
                zone = 2 + second
            weight[i, j] = value + (p["offset"][zone, i, block] if split.offset else np.float32(0))
    return weight


@st.composite
def split(draw, largest: int = 600) -> SalientSplit:
    columns, third = draw(st.integers(1, largest)), draw(st.booleans())
    salient = draw(st.integers(1 if third else 0, columns))
    block, flags = draw(st.sampled_from([1, 32, 100, 128])), draw(st.tuples(st.booleans(), st.booleans()))
    return SalientSplit(columns, salient, block, third, *flags)


@settings(max_examples=60, deadline=None)
@given(split(), st.integers(1, 3), st.integers(0, 2**32))
def test_decode_returns_exactly_what_was_encoded(split, rows, seed):
    parts = random_parts(split, rows, seed)
    packed = PackedWeight.encode(Format((split,)), parts)
    assert packed.shape == (rows, split.columns)
    assert np.array_equal(packed.dequantize().numpy(), meaning(split, parts))


@settings(max_examples=40, deadline=None)
@given(split(), st.integers(2, 9), st.data())
def test_a_slice_of_the_rows_decodes_alone(split, rows, data):
    low = data.draw(st.integers(0, rows - 1))
    high = data.draw(st.integers(low + 1, rows))
    packed = PackedWeight.encode(Format((split,)), random_parts(split, rows))
    part = packed.format.rows(packed.tensors, slice(low, high))
    sliced = PackedWeight(packed.format, (high - low, split.columns), part)
    assert torch.equal(sliced.dequantize(), packed.dequantize()[low:high])


def test_beside_other_segments_and_by_tiles(monkeypatch):
    split, plane = SalientSplit(300, 20, third=True, column_scale=True), Planes(70, 1)
    generator = torch.Generator().manual_seed(0)
    bits = torch.randint(2, (1, 23, 70), generator=generator).bool()
    parts = random_parts(split, 23)
    packed = PackedWeight.encode(Format((plane, split)), {"bits": bits, "scale": torch.ones(1, 23, 1)}, parts)
    expected = torch.cat([bits[0] * 2.0 - 1, torch.from_numpy(meaning(split, parts))], 1)
    assert torch.equal(packed.dequantize(), expected)
    monkeypatch.setattr("ultralowbit.format.weight._TILE", 5 * 370)  # 5 rows at a time, 3 in the last
    assert torch.equal(packed.dequantize(), expected)
    assert torch.equal(packed.dequantize(torch.bfloat16), expected.bfloat16())


# --- the bytes of version 2 ------------------------------------------------------------------------------------------

GOLDEN = {
    SalientSplit(21, 3, 16, offset=True): {
        "weight": "a603ae01aa0147011707a50386008403",
        "weight_salient": "02048000",
        "weight_scale": "00b0003900b400b400360034000000b000340038003a00b4003000b8000000b8",
        "weight_offset": "003a00b6003800b00038003a003400340030000000b40036",
    },
    SalientSplit(21, 3, 16, third=True, column_scale=True): {
        "weight": "a603ae01aa0147011707a50386008403",
        "weight_salient": "02048000",
        "weight_scale": "00b0003900b400b400360034000000b000340038003a00b4003000b8000000b8"
        "003a00b6003800b00038003a00340034",
        "weight_third": "04000200",
        "weight_column": "0039003000380000003000b00036003a003400b800b4003800b6003400b800b800b60036003800b4003900b6"
        "0034003400b400b600b400b800b6003a00b80039003a00b600b000b6003900b600300038003a0030",
        "weight_third_column": "003900380039003400300034",
    },
}


def golden_parts(split: SalientSplit) -> dict[str, Tensor]:
    """Made by a rule that is written here in full: a golden byte depends on no random generator."""
    x = 1

    def run(*shape: int, modulo: int) -> Tensor:
        nonlocal x
        values = []
        for _ in range(int(np.prod(shape))):
            x = (1103515245 * x + 12345) % 2**31
            values.append((x >> 16) % modulo)
        return torch.tensor(values).view(shape)

    salient = torch.zeros(21, dtype=torch.bool)
    salient[[2, 15, 20]] = True
    parts = {"bits": run(2, 2, 21, modulo=2).bool(), "salient": salient}
    parts["scale"] = (run(6 if split.third else 4, 2, 2, modulo=11) - 4) / 8
    if split.third:
        parts |= {"third": run(2, 3, modulo=2).bool(), "third_column": (run(2, 3, modulo=11) - 4) / 8}
    if split.offset:
        parts["offset"] = (run(3, 2, 2, modulo=11) - 4) / 8
    if split.column_scale:
        parts["column"] = (run(2, 21, modulo=11) - 4) / 8
    return parts


@pytest.mark.parametrize("split", GOLDEN, ids=lambda z: z.summary)
def test_version_2_writes_and_reads_these_bytes(split):
    packed = PackedWeight.encode(Format((split,), version=2), golden_parts(split))
    assert {name: t.numpy().tobytes().hex() for name, t in packed.tensors.items()} == GOLDEN[split]
    tensors = {
        name: torch.frombuffer(bytearray.fromhex(GOLDEN[split][name]), dtype=spec.dtype).view(spec.shape)
        for name, spec in packed.format.tensors(2, 21).items()
    }
    read = PackedWeight(packed.format, (2, 21), tensors).dequantize()
    assert np.array_equal(read.numpy(), meaning(split, golden_parts(split)))


def test_version_2_describes_itself_in_these_words():
    format = Format((SalientSplit(9, 2, 4, third=True, column_scale=True),))
    data = {"kind": "salient_split", "columns": 9, "salient": 2, "block": 4}
    data |= {"third": True, "column_scale": True, "offset": False}
    assert json.loads(json.dumps(format.to_dict())) == {"version": 2, "segments": [data]}
    assert Format.from_dict(format.to_dict()) == format


# --- size and refusals -----------------------------------------------------------------------------------------------


def test_bits_counted_by_hand():
    """4096 columns of which 320 are salient, 8 rows, blocks of 128."""
    rows, shared = 8, 4096 // 8  # a bit a column

    def stored(split: SalientSplit) -> float:
        packed = PackedWeight.encode(Format((split,)), random_parts(split, rows))
        assert packed.format.claimed_bits == 1 + 320 / 4096
        return packed.bits_per_weight

    assert stored(SalientSplit(4096, 320, offset=True)) == 2 + 7 * 16 / 128 + 8 * shared / (rows * 4096)
    columns = 2 * 2 * (4096 + 320)
    third = SalientSplit(4096, 320, third=True, column_scale=True)
    assert stored(third) == 2 + 320 / 4096 + 6 * 16 / 128 + 8 * (shared + columns) / (rows * 4096)


def test_formats_that_store_other_tensors_have_other_summaries():
    by_summary = {}
    for n in (64, 100):
        for salient in (3, 4):
            for block in (32, 128):
                for flags in np.ndindex(2, 2, 2):
                    split = SalientSplit(n, salient, block, *map(bool, flags))
                    assert by_summary.setdefault(split.summary, split) == split
    assert len(by_summary) == 64


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"columns": 0}, "columns=0"),
        ({"salient": 10}, "salient_split.salient is 10, expected 0 to 9"),
        ({"salient": -1}, "salient_split.salient is -1"),
        ({"salient": 0, "third": True}, "salient_split.salient is 0, expected 1 to 9"),
        ({"block": 0}, "salient_split.block is 0"),
        ({"third": 2}, "salient_split.third is 2"),
    ],
)
def test_a_salient_split_without_a_layout_is_refused(change, named):
    with pytest.raises(FormatError) as error:
        SalientSplit(**{"columns": 9, "salient": 2} | change)
    assert named in str(error.value)
