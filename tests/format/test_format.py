"""The packed format: bytes against a slow reading of its definition, and everything it must refuse."""

from __future__ import annotations

import json
import struct

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from ultralowbit.errors import FormatError
from ultralowbit.format.ints import Ints
from ultralowbit.format.planes import Planes
from ultralowbit.format.testing import random_packed
from ultralowbit.format.weight import Format, PackedWeight
from ultralowbit.format.words import VERSION, pack_fields, to_scale, unpack_fields, word_count

COLUMNS = [1, 7, 16, 17, 31, 32, 33, 64, 172, 352, 511, 512, 513, 1000, 1024, 11008]
WIDTHS = [1, 2, 4, 8]
INTS = [2, 3, 4, 8]


# --- a second implementation, one element at a time ---------------------------------------------------------------


def place(column: int, columns: int, width: int) -> tuple[int, int]:
    """(word, lowest bit) of a column: word c, field f <-> column f * 32 + c of a super-block; the last one is short."""
    fields = 16 // width
    block = fields * 32
    start = column // block * block
    lanes = 32 if start + block <= columns else -(-(columns - start) // fields)
    inside = column - start
    return start // fields + inside % lanes, inside // lanes * width


def read_code(words: list[int], column: int, columns: int, width: int) -> int:
    word, bit = place(column, columns, width)
    return (words[word] & 0xFFFF) >> bit & ((1 << width) - 1)


def slow_decode(format: Format, tensors: dict[str, torch.Tensor]) -> np.ndarray:
    """The weight that the tensors mean, from the words of the documentation alone; fp32 sums in order of the planes."""
    stored = {name: t.tolist() for name, t in tensors.items()}
    rows = tensors["weight"].shape[-2]
    weight = np.zeros((rows, format.in_features), np.float32)
    first = 0
    for i, segment in enumerate(format.segments):
        name = f"weight_{i}" if i else "weight"
        n = segment.columns
        for r in range(rows):
            for j in range(n):
                g = 0 if segment.group is None else j // segment.group
                if isinstance(segment, Planes):
                    value = np.float32(0)
                    for p in range(segment.planes):
                        b = read_code(stored[name][p][r], j, n, 1)
                        b = 2 * b - 1 if segment.alphabet == "pm1" else b
                        value += np.float32(b) * np.float32(stored[f"{name}_scale"][p][g][r])
                    if segment.offset:
                        value += np.float32(stored[f"{name}_offset"][g][r])
                else:
                    words = stored[name][r]
                    if segment.bits == 3:
                        low = word_count(n, 2)
                        code = read_code(words[:low], j, n, 2) + 4 * read_code(words[low:], j, n, 1)
                    else:
                        code = read_code(words, j, n, segment.bits)
                    zero = 2 ** (segment.bits - 1)
                    if not segment.symmetric:
                        width = 4 if segment.bits == 3 else segment.bits
                        byte = stored[f"{name}_zero"][g // (8 // width)][r]
                        zero = byte >> (g % (8 // width) * width) & ((1 << width) - 1)
                    value = np.float32(code - zero) * np.float32(stored[f"{name}_scale"][g][r])
                weight[r, first + j] = value
        first += n
    return weight


def random_parts(segment: Planes | Ints, rows: int, generator: torch.Generator) -> dict[str, torch.Tensor | None]:
    """What `segment.encode` takes, over the full range of codes and zero points."""
    groups = 1 if segment.group is None else -(-segment.columns // segment.group)

    def scale(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).half().float()

    if isinstance(segment, Planes):
        bits = torch.randint(2, (segment.planes, rows, segment.columns), generator=generator).bool()
        parts = {"bits": bits, "scale": scale(segment.planes, rows, groups)}
        return parts | ({"offset": scale(rows, groups)} if segment.offset else {})
    codes = torch.randint(2**segment.bits, (rows, segment.columns), generator=generator).to(torch.uint8)
    top = 2 ** (4 if segment.bits == 3 else segment.bits)
    zero = None if segment.symmetric else torch.randint(top, (rows, groups), generator=generator).float()
    return {"codes": codes, "scale": scale(rows, groups), "zero": zero}


def meaning(segment: Planes | Ints, parts: dict[str, torch.Tensor | None]) -> torch.Tensor:
    """The weight that `encode` was asked to store."""

    def spread(values: torch.Tensor) -> torch.Tensor:  # [..., groups] -> [..., columns]
        return values.repeat_interleave(segment.group or segment.columns, -1)[..., : segment.columns]

    scale = spread(parts["scale"])
    if isinstance(segment, Planes):
        b = parts["bits"].float()
        b = b * 2 - 1 if segment.alphabet == "pm1" else b
        weight = torch.zeros(b.shape[1:])
        for p in range(segment.planes):
            weight += b[p] * scale[p]
        return weight + spread(parts["offset"]) if segment.offset else weight
    zero = 2.0 ** (segment.bits - 1) if parts["zero"] is None else spread(parts["zero"])
    return (parts["codes"].float() - zero) * scale


def segments(columns: int) -> list[Planes | Ints]:
    return [
        Planes(columns, 1),
        Planes(columns, 2, 32, "01"),
        Planes(columns, 3, 48, "pm1", offset=True),
        Planes(columns, 4, None, "01", offset=True),
        *(Ints(columns, bits, 40) for bits in INTS),
        *(Ints(columns, bits, None, symmetric=True) for bits in INTS),
    ]


def name_of(segment: Planes | Ints) -> str:
    return segment.summary


@st.composite
def formats(draw, largest: int = 1100) -> Format:
    drawn = []
    for _ in range(draw(st.integers(1, 3))):
        columns = draw(st.integers(1, largest))
        group = draw(st.none() | st.integers(1, columns + 40))
        if draw(st.booleans()):
            alphabet = draw(st.sampled_from(["pm1", "01"]))
            drawn.append(Planes(columns, draw(st.integers(1, 4)), group, alphabet, draw(st.booleans())))
        else:
            drawn.append(Ints(columns, draw(st.sampled_from(INTS)), group, draw(st.booleans())))
    return Format(tuple(drawn))


# --- words ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("columns", COLUMNS)
def test_unpacking_words_gives_back_every_code(columns, width, device):
    codes = torch.arange(3 * columns).remainder(2**width).to(torch.uint8).view(3, columns).to(device)
    words = pack_fields(codes, width)
    assert words.shape == (3, word_count(columns, width))
    assert words.dtype == torch.int16
    assert torch.equal(unpack_fields(words, width, columns), codes.short())


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("columns", [1, 7, 17, 64, 352, 512, 513, 1000])
def test_each_column_lies_where_the_layout_says(columns, width):
    top = 2**width - 1
    for column in {0, 1, columns // 3, columns // 2, columns - 2, columns - 1} & set(range(columns)):
        codes = torch.zeros(columns, dtype=torch.uint8)
        codes[column] = top
        word, bit = place(column, columns, width)
        expected = np.zeros(word_count(columns, width), np.uint16)
        expected[word] = top << bit
        assert pack_fields(codes, width).numpy().view(np.uint16).tolist() == expected.tolist()


@given(st.integers(1, 5000), st.sampled_from(WIDTHS))
def test_padding_is_zero_and_shorter_than_a_word(columns, width):
    assert 0 <= word_count(columns, width) * 16 // width - columns < 16 // width
    words = pack_fields(torch.full((columns,), 2**width - 1, dtype=torch.uint8), width)
    ones = sum(int(w).bit_count() for w in words.numpy().view(np.uint16))
    assert ones == columns * width


# --- segments ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [1, 5])
@pytest.mark.parametrize("columns", COLUMNS)
def test_decode_returns_exactly_what_was_encoded(columns, rows, device):
    generator = torch.Generator().manual_seed(columns)
    for segment in segments(columns):
        parts = random_parts(segment, rows, generator)
        on_device = {key: None if t is None else t.to(device) for key, t in parts.items()}
        packed = PackedWeight.encode(Format((segment,)), on_device)
        assert packed.shape == (rows, columns)
        assert torch.equal(packed.dequantize().cpu(), meaning(segment, parts)), segment


@pytest.mark.parametrize("bits", INTS)
def test_every_code_survives_with_every_zero_point(bits):
    top = 2 ** (4 if bits == 3 else bits)
    codes = torch.arange(2**bits, dtype=torch.uint8).repeat(top, 1)  # one row a zero point
    zero = torch.arange(top).float()[:, None]
    packed = PackedWeight.encode(
        Format((Ints(2**bits, bits),)), {"codes": codes, "scale": torch.ones(top, 1), "zero": zero}
    )
    assert torch.equal(packed.dequantize(), codes.float() - zero)


@settings(max_examples=40, deadline=None)
@given(formats(), st.integers(1, 4), st.integers(0, 2**32))
def test_a_row_of_any_segments_decodes_to_their_meanings_side_by_side(format, rows, seed):
    generator = torch.Generator().manual_seed(seed)
    parts = [random_parts(s, rows, generator) for s in format.segments]
    packed = PackedWeight.encode(format, *parts)
    expected = torch.cat([meaning(s, p) for s, p in zip(format.segments, parts, strict=True)], dim=1)
    assert torch.equal(packed.dequantize(), expected)


@settings(max_examples=25, deadline=None)
@given(formats(largest=600), st.integers(1, 2), st.integers(0, 2**32))
def test_the_bytes_mean_what_the_documentation_says(format, rows, seed):
    packed = random_packed(format, rows, seed)
    assert np.array_equal(packed.dequantize().numpy(), slow_decode(format, packed.tensors))


@settings(max_examples=25, deadline=None)
@given(formats(), st.integers(2, 9), st.data())
def test_a_slice_of_the_rows_decodes_alone(format, rows, data):
    low = data.draw(st.integers(0, rows - 1))
    high = data.draw(st.integers(low + 1, rows))
    packed = random_packed(format, rows)
    # the axis of the rows: before the words in the main tensors, the last in their companions
    main = {"weight", *(f"weight_{i}" for i in range(1, len(format.segments)))}
    part = {name: t[..., low:high, :] if name in main else t[..., low:high] for name, t in packed.tensors.items()}
    sliced = PackedWeight(format, (high - low, format.in_features), part)
    assert torch.equal(sliced.dequantize(), packed.dequantize()[low:high])


def test_decoding_by_tiles_changes_nothing(monkeypatch):
    format = Format((Planes(300, 2, 64), Ints(77, 3, 32)))
    packed = random_packed(format, 23)
    whole = packed.dequantize()
    monkeypatch.setattr("ultralowbit.format.weight._TILE", 5 * 377)  # 5 rows at a time, 3 in the last
    assert torch.equal(packed.dequantize(), whole)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("segment", segments(100), ids=name_of)
def test_other_dtypes_are_the_fp32_weight_rounded_once(segment, dtype):
    packed = random_packed(Format((segment,)), 6)
    assert torch.equal(packed.dequantize(dtype), packed.dequantize().to(dtype))


# --- the bytes of version 2: one of them that moves raises `VERSION` ------------------------------------------------

GOLDEN = {
    Planes(21, 1, None, "pm1"): {
        "weight": "a603ae01aa014701",
        "weight_scale": "00380030",
    },
    Planes(21, 2, 8, "pm1", offset=True): {
        "weight": "a603ae01aa0147011707a50386008403",
        "weight_scale": "003800b00030003900000034003900300030003a00390036",
        "weight_offset": "003800b00030003900000034",
    },
    Planes(21, 2, None, "01"): {
        "weight": "a603ae01aa0147011707a50386008403",
        "weight_scale": "00380030000000b0",
    },
    Ints(21, 2, 8): {
        "weight": "ae1c7e24cd2d1e0a6b078f07",
        "weight_scale": "003800b00030003900000034",
        "weight_zero": "1a3f",
    },
    Ints(21, 3, 8): {
        "weight": "ae1c7e24cd2d7104f1031e0a6b078f0746051702",
        "weight_scale": "003800b00030003900000034",
        "weight_zero": "66330103",
    },
    Ints(21, 4, 8): {
        "weight": "261cbeec41616b07db01fb0f9286afc3874bc7029605a701",
        "weight_scale": "003800b00030003900000034",
        "weight_zero": "e6bb010b",
    },
    Ints(21, 8, None, symmetric=True): {
        "weight": "c6df7e7c811c6be14b87fb01e2bffb3154def656bd0072ea0f564713677b66d2878559a1aad8883c3c545900",
        "weight_scale": "00380030",
    },
}


def golden_parts(segment: Planes | Ints, rows: int = 2) -> dict[str, torch.Tensor | None]:
    """Parts made by a rule that is written here in full: a golden byte depends on no random generator."""
    groups = 1 if segment.group is None else -(-segment.columns // segment.group)

    def run(*shape: int, modulo: int) -> torch.Tensor:
        x, values = 1, []
        for _ in range(int(np.prod(shape))):
            x = (1103515245 * x + 12345) % 2**31
            values.append((x >> 16) % modulo)
        return torch.tensor(values).view(shape)

    def scale(*shape: int) -> torch.Tensor:
        return (run(*shape, modulo=11) - 4) / 8

    if isinstance(segment, Planes):
        parts = {
            "bits": run(segment.planes, rows, segment.columns, modulo=2).bool(),
            "scale": scale(segment.planes, rows, groups),
        }
        return parts | ({"offset": scale(rows, groups)} if segment.offset else {})
    return {
        "codes": run(rows, segment.columns, modulo=2**segment.bits).to(torch.uint8),
        "scale": scale(rows, groups),
        "zero": None if segment.symmetric else run(rows, groups, modulo=2**segment.bits).float(),
    }


def hex_of(packed: PackedWeight) -> dict[str, str]:
    return {name: t.numpy().tobytes().hex() for name, t in packed.tensors.items()}


@pytest.mark.parametrize("segment", GOLDEN, ids=name_of)
def test_version_2_writes_these_bytes(segment):
    parts = golden_parts(segment)
    packed = PackedWeight.encode(Format((segment,), version=2), parts)
    assert hex_of(packed) == GOLDEN[segment]


@pytest.mark.parametrize("segment", GOLDEN, ids=name_of)
def test_version_2_reads_these_bytes(segment):
    format = Format((segment,), version=2)
    tensors = {
        name: torch.frombuffer(bytearray.fromhex(GOLDEN[segment][name]), dtype=spec.dtype).view(spec.shape)
        for name, spec in format.tensors(2, segment.columns).items()
    }
    assert torch.equal(
        PackedWeight(format, (2, segment.columns), tensors).dequantize(), meaning(segment, golden_parts(segment))
    )


def test_version_2_writes_these_words_in_a_full_super_block():
    """530 columns: a super-block of 512 and two words of 18; columns 0, 32 and 511 are +1, and the last."""
    bits = torch.zeros(1, 1, 530, dtype=torch.bool)
    bits[..., [0, 32, 511, 529]] = True
    packed = PackedWeight.encode(Format((Planes(530, 1),)), {"bits": bits, "scale": torch.ones(1, 1, 1)})
    words = ["0300", *["0000"] * 30, "0080", "0000", "0001"]
    assert packed.tensors["weight"].numpy().tobytes().hex() == "".join(words)


def test_version_2_describes_itself_in_these_words():
    format = Format((Ints(4, 3, 2), Planes(5, 2, None, "01", True)))
    assert json.loads(json.dumps(format.to_dict())) == {
        "version": 2,
        "segments": [
            {"kind": "ints", "columns": 4, "bits": 3, "group": 2, "symmetric": False},
            {"kind": "planes", "columns": 5, "planes": 2, "group": None, "alphabet": "01", "offset": True},
        ],
    }


# --- size --------------------------------------------------------------------------------------------------------


def test_bits_per_weight_is_the_file_without_its_header(tmp_path):
    for i, format in enumerate(
        [Format((s,)) for n in (1, 17, 352, 513) for s in segments(n)]
        + [Format((Ints(13, 4, 32), Planes(500, 1, 128)))]
    ):
        rows = i % 4 + 1
        packed = random_packed(format, rows)
        path = tmp_path / f"{i}.safetensors"
        save_file(packed.tensors, path)
        data = path.read_bytes()
        stored = len(data) - 8 - struct.unpack("<Q", data[:8])[0]
        assert packed.nbytes == stored, format.summary
        assert packed.bits_per_weight == 8 * stored / (rows * format.in_features)


@pytest.mark.parametrize(
    ("segment", "claimed", "true"),
    [
        (Planes(4096, 1), 1, 1 + 16 / 4096),
        (Planes(4096, 2, 128), 2, 2 + 2 * 16 / 128),
        (Planes(4096, 1, 128, "pm1", True), 1, 1 + 32 / 128),
        (Ints(4096, 2, 128), 2, 2 + 18 / 128),
        (Ints(4096, 3, 128), 3, 3 + 20 / 128),
        (Ints(4096, 4, 64, True), 4, 4 + 16 / 64),
        (Ints(4096, 8), 8, 8 + 24 / 4096),
        (Planes(11008, 1), 1, 1 + 16 / 11008),
    ],
    ids=lambda value: value.summary if hasattr(value, "summary") else "",
)
def test_bits_are_those_of_codes_scales_and_zero_points(segment, claimed, true):
    packed = random_packed(Format((segment,)), 8)
    assert packed.format.claimed_bits == claimed
    assert packed.bits_per_weight == true


def test_claimed_bits_of_a_mixture_are_their_mean_over_columns():
    assert Format((Ints(20, 4, 20), Planes(80, 1))).claimed_bits == 0.2 * 4 + 0.8 * 1


# --- the description -----------------------------------------------------------------------------------------------


@given(formats())
def test_a_description_survives_json(format):
    assert Format.from_dict(json.loads(json.dumps(format.to_dict()))) == format


def test_formats_that_store_other_tensors_have_other_summaries():
    """The summary is the key of a format in config.json."""
    by_summary = {}
    for n in (64, 100):
        for s in [
            *(Planes(n, p, g, a, o) for p in (1, 2) for g in (None, 32) for a in ("pm1", "01") for o in (True, False)),
            *(Ints(n, b, g, y) for b in INTS for g in (None, 32) for y in (True, False)),
        ]:
            assert by_summary.setdefault(s.summary, s) == s
    assert len(by_summary) == 64


def changed(**changes) -> dict:
    """The description of a format with some of its values replaced; `segment__x` is x of its segment."""
    data = Format((Planes(5, 2, 4),)).to_dict()
    for key, value in changes.items():
        (data["segments"][0] if key.startswith("segment__") else data)[key.removeprefix("segment__")] = value
    return data


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"version": 3}, "version 3"),
        ({"version": 1}, "version 1 is not version 2"),
        ({"version": None}, "version None"),
        ({"version": "2"}, "version '2'"),
        ({"segment__kind": "vectors"}, "unknown segment"),
        ({"segment__kind": None}, "unknown segment"),
        ({"segment__rotation": 7}, "rotation"),
        ({"permutation": [0, 1]}, "permutation"),
        ({"transform": "hadamard"}, "unknown transform"),
        ({"segment__planes": 0}, "planes.planes is 0"),
        ({"segment__planes": 9}, "planes.planes is 9"),
        ({"segment__alphabet": "02"}, "planes.alphabet is '02'"),
        ({"segment__columns": 0}, "columns=0"),
        ({"segment__group": 0}, "group=0"),
        ({"segment__group": -1}, "group=-1"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_a_description_from_elsewhere_is_refused(changes, named):
    with pytest.raises(FormatError) as error:
        Format.from_dict(changed(**changes))
    assert named in str(error.value)


@pytest.mark.parametrize(
    ("data", "named"),
    [
        (5, "version None"),
        ({"version": VERSION}, "segments None"),
        ({"version": VERSION, "segments": []}, r"segments \[\]"),
        ({"version": VERSION, "segments": [5]}, "unknown segment"),
        ({"version": VERSION, "segments": [{"kind": "ints"}]}, "lacks columns, bits"),
    ],
)
def test_what_is_no_description_is_refused(data, named):
    with pytest.raises(FormatError, match=named):
        Format.from_dict(data)


@pytest.mark.parametrize("bits", [0, 1, 5, 6, 7, 9, 16])
def test_code_widths_without_a_layout_are_refused(bits):
    with pytest.raises(FormatError, match=f"ints.bits is {bits}"):
        Ints(8, bits)


# --- what a packed weight refuses ------------------------------------------------------------------------------------


def spoil(name: str, change) -> dict[str, torch.Tensor]:
    tensors = dict(random_packed(Format((Ints(40, 4, 16), Planes(9, 1))), 3).tensors)
    tensors[name] = change(tensors[name])
    return tensors


@pytest.mark.parametrize("name", ["weight", "weight_scale", "weight_zero", "weight_1", "weight_1_scale"])
@pytest.mark.parametrize(
    "change",
    [lambda t: t[..., :-1], lambda t: t.flatten(), lambda t: t.to(torch.float32)],
    ids=["shorter", "flat", "cast"],
)
def test_a_tensor_of_another_shape_or_dtype_is_named(name, change):
    with pytest.raises(
        FormatError, match=rf"^{name} is \w+ \[[\d, ]+\], expected \w+ \[[\d, ]+\] of 40xint4/g16 \+ 9x1sign/row"
    ):
        PackedWeight(Format((Ints(40, 4, 16), Planes(9, 1))), (3, 49), spoil(name, change))


def test_missing_and_extra_tensors_are_named():
    format = Format((Planes(9, 1),))
    tensors = random_packed(format, 3).tensors
    with pytest.raises(FormatError, match=r"^weight_scale is missing, expected float16 \[1, 1, 3\] of 9x1sign/row"):
        PackedWeight(format, (3, 9), {"weight": tensors["weight"]})
    with pytest.raises(FormatError, match=r"^weight_offset is no part of 9x1sign/row"):
        PackedWeight(format, (3, 9), tensors | {"weight_offset": tensors["weight_scale"]})


def test_a_weight_of_another_width_is_refused():
    format = Format((Planes(9, 1),))
    with pytest.raises(FormatError, match="holds 9 input columns, the layer has 10"):
        PackedWeight(format, (3, 10), random_packed(format, 3).tensors)


@pytest.mark.parametrize("value", [65520.0, -1e6, float("inf"), float("nan")])
def test_a_scale_that_fp16_cannot_hold_is_refused(value):
    with pytest.raises(FormatError, match="does not fit fp16"):
        to_scale(torch.tensor([1.0, value]))


def test_scales_are_rounded_to_fp16():
    values = torch.tensor([65519.0, 1 / 3, -(2.0**-24), 2.0**-26, 0.0])
    assert torch.equal(to_scale(values), torch.tensor([65504.0, 0.333251953125, -(2.0**-24), 0.0, 0.0]))
