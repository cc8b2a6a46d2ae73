"""The packed format: how one weight `[out, in]` is stored, shared by methods, files, kernels and the loader.

A weight is a row of *segments*, each a run of consecutive input columns: sign planes (`Planes`) or integer codes
(`Ints`). All of them keep their bits in one word layout, fixed by what a GPU unpacks with one AND: fields of `w`
bits lie in int16 words, `16 / w` fields a word, and in a super-block of `16 / w * 32` columns

    word c, field f   <->   column f * 32 + c            (c = 0..31; a field's 32 columns are contiguous)

    w = 1   word 0 = [col 480 .. col 64 col 32 col 0]    most significant bit first
            word 1 = [col 481 .. col 65 col 33 col 1]

Columns after the last full super-block form one shorter super-block with `ceil(rest / fields)` words, so a row is
padded by fewer than `16 / w` columns. The padding is zero and is counted in `bits_per_weight` like everything stored.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

VERSION = 1
"""Raised when the meaning of a stored byte changes."""

WORD_BITS = 16
LANES = 32
_TILE = 1 << 17  # weights unpacked at a time: their int16 and fp32 forms stay in a core's L2


class FormatError(ValueError):
    """Stored tensors and the format that should describe them do not agree."""


class TensorSpec(NamedTuple):
    """What a file and a module hold for one tensor."""

    dtype: torch.dtype
    shape: tuple[int, ...]


def word_count(columns: int, width: int) -> int:
    """int16 words that hold `columns` fields of `width` bits, padding included."""
    per_word = WORD_BITS // width
    full, rest = divmod(columns, per_word * LANES)
    return full * LANES + -(-rest // per_word)


def pack_fields(codes: Tensor, width: int) -> Tensor:
    """codes [..., columns] uint8 below 2**width -> words [..., word_count] int16."""
    per_word = WORD_BITS // width
    *lead, columns = codes.shape
    full, rest = divmod(columns, per_word * LANES)
    words = codes.new_zeros((*lead, word_count(columns, width)), dtype=torch.int16)
    body = codes[..., : columns - rest].unflatten(-1, (full, per_word, LANES))  # [..., full, fields, 32]
    head = words[..., : full * LANES].unflatten(-1, (full, LANES))  # [..., full, 32], a view
    for f in range(per_word if full else 0):
        head |= body[..., f, :].to(torch.int16) << (width * f)
    tail, lanes = words[..., full * LANES :], -(-rest // per_word)
    for f in range(per_word):
        part = codes[..., columns - rest + f * lanes : columns][..., :lanes]
        tail[..., : part.shape[-1]] |= part.to(torch.int16) << (width * f)
    return words


def unpack_fields(words: Tensor, width: int, columns: int) -> Tensor:
    """words [..., word_count] int16 -> codes [..., columns] int16, the inverse of `pack_fields`."""
    per_word, mask = WORD_BITS // width, (1 << width) - 1
    full, rest = divmod(columns, per_word * LANES)
    shifts = torch.arange(0, WORD_BITS, width, dtype=torch.int16, device=words.device)[:, None]
    # the shift is arithmetic, so the mask is what drops the copies of the sign bit
    body = words[..., : full * LANES].unflatten(-1, (full, 1, LANES)) >> shifts  # [..., full, fields, 32]
    tail = words[..., None, full * LANES :] >> shifts  # [..., fields, lanes]
    if not rest:
        return body.bitwise_and_(mask).flatten(-3)
    return torch.cat([body.flatten(-3), tail.flatten(-2)[..., :rest]], dim=-1).bitwise_and_(mask)


def to_scale(values: Tensor) -> Tensor:
    """Round to the stored fp16, as fp32; raises `FormatError` where fp16 cannot hold a value."""
    stored = values.half()
    if not stored.isfinite().all():
        raise FormatError(
            f"a scale of {values.abs().max().item():.3g} does not fit fp16 (largest 65504): the weights are not finite "
            "or far too large, check the source checkpoint"
        )
    return stored.float()


def group_count(columns: int, group: int | None) -> int:
    """Scale groups in a row: one where `group` is None, else ceil(columns / group); the last may be shorter."""
    return 1 if group is None else -(-columns // group)


def _groups(tile: Tensor, values: Tensor, group: int | None) -> Iterator[tuple[Tensor, Tensor]]:
    """Pair views of tile [rows, columns] with the values [groups, rows] of their groups, both as [rows, groups, .]."""
    rows = values.float().T[..., None]  # [rows, groups, 1]
    columns = tile.shape[1]
    group = group or columns
    whole = columns // group
    if whole:
        yield tile[:, : whole * group].unflatten(1, (whole, group)), rows[:, :whole]
    if columns % group:
        yield tile[:, None, whole * group :], rows[:, whole:]


@dataclass(frozen=True)
class Planes:
    """`columns` inputs as sign planes: w = sum_p scale[p] * b[p] (+ offset), b in {-1, +1} or {0, 1}.

    Stored: words [planes, out, words] int16 (bit 1 is +1); scale [planes, groups, out] fp16; with `offset`, one more
    fp16 [groups, out]. `group` is the columns that share a scale, None one scale a row.
    """

    kind: ClassVar[str] = "planes"
    columns: int
    planes: int
    group: int | None = None
    alphabet: Literal["pm1", "01"] = "pm1"
    offset: bool = False

    def __post_init__(self) -> None:
        _check_segment(self, planes=range(1, 5), alphabet=("pm1", "01"))

    @property
    def code_bits(self) -> int:
        return self.planes

    @property
    def summary(self) -> str:
        scale = "row" if self.group is None else f"g{self.group}"
        name = "sign" if self.alphabet == "pm1" else "bool"
        return f"{self.columns}x{self.planes}{name}/{scale}{'+offset' if self.offset else ''}"

    def tensors(self, out_features: int) -> dict[str, TensorSpec]:
        groups = group_count(self.columns, self.group)
        specs = {
            "": TensorSpec(torch.int16, (self.planes, out_features, word_count(self.columns, 1))),
            "_scale": TensorSpec(torch.float16, (self.planes, groups, out_features)),
        }
        if self.offset:
            specs["_offset"] = TensorSpec(torch.float16, (groups, out_features))
        return specs

    def encode(self, bits: Tensor, scale: Tensor, offset: Tensor | None = None) -> dict[str, Tensor]:
        """bits [planes, out, columns] bool; scale [planes, out, groups], offset [out, groups], both fp16-exact."""
        parts = {"": pack_fields(bits.to(torch.uint8), 1), "_scale": scale.transpose(1, 2).half().contiguous()}
        if offset is not None:
            parts["_offset"] = offset.T.half().contiguous()
        return parts

    def decode(self, parts: Mapping[str, Tensor], out: Tensor) -> None:
        """Write the meaning of the stored rows into out [rows, columns] fp32."""
        for p, (words, scale) in enumerate(zip(parts[""], parts["_scale"], strict=True)):
            plane = out if p == 0 else torch.empty_like(out)
            plane.copy_(unpack_fields(words, 1, self.columns))
            if self.alphabet == "pm1":
                plane.mul_(2).sub_(1)
            for view, s in _groups(plane, scale, self.group):
                view.mul_(s)
            if p:
                out += plane
        if self.offset:
            for view, offset in _groups(out, parts["_offset"], self.group):
                view.add_(offset)


@dataclass(frozen=True)
class Ints:
    """`columns` inputs as unsigned integer codes: w = (code - zero) * scale.

    Stored: words int16 [out, words] (3 bits: all the low 2-bit fields, then the high bits); scale fp16 [groups, out];
    zero points, where asymmetric, at the code's own width (4 bits for 3), packed along the groups into bytes:
    uint8 [ceil(groups / per byte), out]. Symmetric codes have the zero point 2**(bits - 1) and store none.
    """

    kind: ClassVar[str] = "ints"
    columns: int
    bits: int
    group: int | None = None
    symmetric: bool = False

    def __post_init__(self) -> None:
        _check_segment(self, bits=(2, 3, 4, 8), symmetric=(True, False))

    @property
    def code_bits(self) -> int:
        return self.bits

    @property
    def summary(self) -> str:
        scale = "row" if self.group is None else f"g{self.group}"
        return f"{self.columns}xint{self.bits}/{scale}{'+sym' if self.symmetric else ''}"

    @property
    def _widths(self) -> tuple[int, ...]:
        return (2, 1) if self.bits == 3 else (self.bits,)

    @property
    def _zero_width(self) -> int:
        return 4 if self.bits == 3 else self.bits

    def tensors(self, out_features: int) -> dict[str, TensorSpec]:
        groups = group_count(self.columns, self.group)
        words = sum(word_count(self.columns, w) for w in self._widths)
        specs = {
            "": TensorSpec(torch.int16, (out_features, words)),
            "_scale": TensorSpec(torch.float16, (groups, out_features)),
        }
        if not self.symmetric:
            specs["_zero"] = TensorSpec(torch.uint8, (-(-groups * self._zero_width // 8), out_features))
        return specs

    def encode(self, codes: Tensor, scale: Tensor, zero: Tensor | None = None) -> dict[str, Tensor]:
        """codes [out, columns] uint8; scale [out, groups] fp16-exact; zero [out, groups] whole numbers."""
        if self.bits == 3:
            words = torch.cat([pack_fields(codes & 3, 2), pack_fields(codes >> 2, 1)], dim=-1)
        else:
            words = pack_fields(codes, self.bits)
        parts = {"": words, "_scale": scale.T.half().contiguous()}
        if zero is not None:
            parts["_zero"] = self._pack_zero(zero.T.to(torch.uint8))
        return parts

    def _pack_zero(self, zero: Tensor) -> Tensor:  # [groups, out] -> [bytes, out]
        width = self._zero_width
        per_byte = 8 // width
        packed = zero.new_zeros((-(-len(zero) // per_byte), zero.shape[1]))
        for f in range(per_byte):
            part = zero[f::per_byte]
            packed[: len(part)] |= part << (width * f)
        return packed

    def _unpack_zero(self, packed: Tensor) -> Tensor:  # [bytes, rows] -> [groups, rows]
        width = self._zero_width
        shifts = torch.arange(0, 8, width, dtype=torch.uint8, device=packed.device)
        zero = (packed[:, None] >> shifts[:, None]) & ((1 << width) - 1)  # [bytes, per byte, rows]
        return zero.flatten(0, 1)[: group_count(self.columns, self.group)]

    def decode(self, parts: Mapping[str, Tensor], out: Tensor) -> None:
        """Write the meaning of the stored rows into out [rows, columns] fp32."""
        words = parts[""]
        if self.bits == 3:
            low, high = words.split([word_count(self.columns, 2), word_count(self.columns, 1)], dim=-1)
            codes = unpack_fields(low, 2, self.columns) + (unpack_fields(high, 1, self.columns) << 2)
        else:
            codes = unpack_fields(words, self.bits, self.columns)
        out.copy_(codes)
        if self.symmetric:
            out -= 2 ** (self.bits - 1)
        else:
            for view, zero in _groups(out, self._unpack_zero(parts["_zero"]), self.group):
                view.sub_(zero)
        for view, scale in _groups(out, parts["_scale"], self.group):
            view.mul_(scale)


Segment = Planes | Ints
SEGMENTS: dict[str, type[Planes] | type[Ints]] = {s.kind: s for s in (Planes, Ints)}


def _check_segment(segment: Segment, **allowed: Sequence[Any]) -> None:
    if segment.columns < 1 or (segment.group is not None and segment.group < 1):
        raise FormatError(f"columns and group must be positive, got {segment}")
    for name, values in allowed.items():
        if getattr(segment, name) not in values:
            raise FormatError(f"{segment.kind}.{name} is {getattr(segment, name)!r}, expected one of {list(values)}")


@dataclass(frozen=True)
class Format:
    """How one weight [out, in] is stored: the segments of its columns, left to right, and the version of the layout."""

    segments: tuple[Segment, ...]
    version: int = VERSION

    @property
    def in_features(self) -> int:
        return sum(s.columns for s in self.segments)

    @property
    def summary(self) -> str:
        """One line that names every field: `4096xint2/g128`."""
        return " + ".join(s.summary for s in self.segments)

    @property
    def claimed_bits(self) -> float:
        """Bits per weight as papers count them: the codes alone, no scales, no padding."""
        return sum(s.columns * s.code_bits for s in self.segments) / self.in_features

    def tensors(self, out_features: int, in_features: int) -> dict[str, TensorSpec]:
        """Names, dtypes and shapes of everything stored. The first is `weight`: a loader that does not know the
        format then stops at its shape instead of initialising a random weight."""
        if in_features != self.in_features:
            raise FormatError(
                f"format {self.summary} holds {self.in_features} input columns, the layer has {in_features}"
            )
        return {
            prefix + suffix: spec
            for prefix, segment in self._prefixed()
            for suffix, spec in segment.tensors(out_features).items()
        }

    def encode(self, *parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """One mapping of the segment's `encode` arguments for each segment -> the stored tensors."""
        return {
            prefix + suffix: tensor
            for (prefix, segment), part in zip(self._prefixed(), parts, strict=True)
            for suffix, tensor in segment.encode(**part).items()
        }

    def decode(self, tensors: Mapping[str, Tensor], dtype: torch.dtype = torch.float32) -> Tensor:
        """Stored tensors -> weight [out, in]. This IS the meaning: computed in fp32, rounded once to `dtype`."""
        first = tensors["weight"]
        out_features = first.shape[-2]
        weight = torch.empty(out_features, self.in_features, dtype=dtype, device=first.device)
        step = max(1, _TILE // self.in_features)
        for row in range(0, out_features, step):
            rows = slice(row, min(row + step, out_features))
            tile = torch.empty(rows.stop - row, self.in_features, device=first.device)
            column = 0
            for prefix, segment in self._prefixed():
                # rows are the axis before the words in the main tensor, and the last axis in its companions
                parts = {
                    suffix: tensors[prefix + suffix][..., rows, :]
                    if suffix == ""
                    else tensors[prefix + suffix][..., rows]
                    for suffix in segment.tensors(out_features)
                }
                segment.decode(parts, tile[:, column : column + segment.columns])
                column += segment.columns
            weight[rows] = tile
        return weight

    def _prefixed(self) -> list[tuple[str, Segment]]:
        return [("weight" if i == 0 else f"weight_{i}", s) for i, s in enumerate(self.segments)]

    def to_dict(self) -> dict[str, Any]:
        """Plain values for config.json; `from_dict` is the inverse."""
        return {"version": self.version, "segments": [{"kind": s.kind, **asdict(s)} for s in self.segments]}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Format:
        """Raises `FormatError` for a newer version, an unknown segment or an unknown field."""
        version = data.get("version")
        if version != VERSION:
            raise FormatError(
                f"packed format version {version!r} is not version {VERSION}, the one this ultralowbit reads: "
                "install the release that wrote the checkpoint, or a newer one"
            )
        if unknown := unknown_fields(cls, data):
            raise FormatError(f"unknown {sorted(unknown)} in the packed format: a newer ultralowbit wrote it, upgrade")
        segments = []
        for entry in data["segments"]:
            entry = dict(entry)
            segment = SEGMENTS.get(entry.pop("kind", None))
            if segment is None or unknown_fields(segment, entry):
                raise FormatError(
                    f"unknown segment in the packed format: {entry}; a newer ultralowbit wrote it, upgrade"
                )
            segments.append(segment(**entry))
        return cls(tuple(segments))


def unknown_fields(cls: type, entry: Mapping[str, Any]) -> set[str]:
    """Keys of `entry` that are no fields of the dataclass."""
    return set(entry) - {f.name for f in fields(cls)}


@dataclass(frozen=True)
class PackedWeight:
    """One weight as it is stored.

    format: how; shape: (out_features, in_features); tensors: name -> tensor as `Format.tensors` lists them, checked on
    construction (`FormatError` names the first that differs).
    """

    format: Format
    shape: tuple[int, int]
    tensors: dict[str, Tensor]

    def __post_init__(self) -> None:
        expected = self.format.tensors(*self.shape)
        if self.tensors.keys() != expected.keys():
            raise FormatError(f"{self.format.summary} stores {sorted(expected)}, found {sorted(self.tensors)}")
        for name, spec in expected.items():
            found = TensorSpec(self.tensors[name].dtype, tuple(self.tensors[name].shape))
            if found != spec:
                raise FormatError(f"{name} of {self.format.summary} is {found}, expected {spec}")

    @classmethod
    def encode(cls, format: Format, *parts: Mapping[str, Tensor]) -> PackedWeight:
        """Pack one mapping of parts for each segment (see the segments' `encode`)."""
        tensors = format.encode(*parts)
        return cls(format, (tensors["weight"].shape[-2], format.in_features), tensors)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight [out, in] that the stored bytes mean."""
        return self.format.decode(self.tensors, dtype)

    @property
    def nbytes(self) -> int:
        """Bytes stored: words with their padding, scales, zero points, offsets."""
        return sum(t.nbytes for t in self.tensors.values())

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.nbytes / (self.shape[0] * self.shape[1])
