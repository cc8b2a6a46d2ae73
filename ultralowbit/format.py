"""The packed format: how one weight `[out, in]` is stored, shared by methods, files, kernels and the loader.

A weight is a row of *segments*, each a run of consecutive input columns: sign planes (`Planes`, or `TiedPlanes` that
share a scale), integer codes (`Ints`), or sign planes with several scales (`Zones`). An *overlay* (`Overlay`, `Bitmap`)
may replace single weights of the row by 8-bit values, and an `InputTransform` may bring the inputs into the order and
basis of the row's columns. All of them keep their bits in one word layout, fixed by what a GPU unpacks with one AND:
fields of `w` bits lie in int16 words, `16 / w` fields a word, and in a super-block of `16 / w * 32` columns

    word c, field f   <->   column f * 32 + c            (c = 0..31; a field's 32 columns are contiguous)

    w = 1   word 0 = [col 480 .. col 64 col 32 col 0]    most significant bit first
            word 1 = [col 481 .. col 65 col 33 col 1]

Columns after the last full super-block form one shorter super-block with `ceil(rest / fields)` words, so a row is
padded by fewer than `16 / w` columns. The padding is zero and is counted in `bits_per_weight` like everything stored.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
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
    row_axis: ClassVar[Mapping[str, int | None]] = {"": -2}
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
    row_axis: ClassVar[Mapping[str, int | None]] = {"": -2}
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
    def widths(self) -> tuple[int, ...]:
        return (2, 1) if self.bits == 3 else (self.bits,)

    @property
    def zero_width(self) -> int:
        return 4 if self.bits == 3 else self.bits

    def tensors(self, out_features: int) -> dict[str, TensorSpec]:
        groups = group_count(self.columns, self.group)
        words = sum(word_count(self.columns, w) for w in self.widths)
        specs = {
            "": TensorSpec(torch.int16, (out_features, words)),
            "_scale": TensorSpec(torch.float16, (groups, out_features)),
        }
        if not self.symmetric:
            specs["_zero"] = TensorSpec(torch.uint8, (-(-groups * self.zero_width // 8), out_features))
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
        width = self.zero_width
        per_byte = 8 // width
        packed = zero.new_zeros((-(-len(zero) // per_byte), zero.shape[1]))
        for f in range(per_byte):
            part = zero[f::per_byte]
            packed[: len(part)] |= part << (width * f)
        return packed

    def _unpack_zero(self, packed: Tensor) -> Tensor:  # [bytes, rows] -> [groups, rows]
        width = self.zero_width
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


@dataclass(frozen=True)
class TiedPlanes:
    """`columns` inputs as sign planes whose scales halve from one to the next, so that one is stored:
    w = scale * (2^(planes - 1) b_1 + ... + 2 b_(planes - 1) + b_planes), b in {-1, +1}; an odd number times the scale.

    Stored: words int16 [out, words] with fields of `planes` bits, that of b_1 the highest; scale fp16 [groups, out].
    """

    kind: ClassVar[str] = "tied"
    row_axis: ClassVar[Mapping[str, int | None]] = {"": -2}
    columns: int
    planes: int
    group: int | None = None

    def __post_init__(self) -> None:
        _check_segment(self, planes=(2, 4))

    @property
    def code_bits(self) -> int:
        return self.planes

    @property
    def summary(self) -> str:
        scale = "row" if self.group is None else f"g{self.group}"
        return f"{self.columns}x{self.planes}tied/{scale}"

    def tensors(self, out_features: int) -> dict[str, TensorSpec]:
        return {
            "": TensorSpec(torch.int16, (out_features, word_count(self.columns, self.planes))),
            "_scale": TensorSpec(torch.float16, (group_count(self.columns, self.group), out_features)),
        }

    def encode(self, codes: Tensor, scale: Tensor) -> dict[str, Tensor]:
        """codes [out, columns] uint8, the bits of a weight from b_1 down; scale [out, groups] fp16-exact."""
        return {"": pack_fields(codes, self.planes), "_scale": scale.T.half().contiguous()}

    def decode(self, parts: Mapping[str, Tensor], out: Tensor) -> None:
        """Write the meaning of the stored rows into out [rows, columns] fp32."""
        out.copy_(unpack_fields(parts[""], self.planes, self.columns)).mul_(2).sub_(2**self.planes - 1)
        for view, scale in _groups(out, parts["_scale"], self.group):
            view.mul_(scale)


@dataclass(frozen=True)
class Zones:
    """`columns` inputs as signs s, t = -1 or +1 whose scales depend on the zone of a weight: is its column one of the
    `salient` ones, which all rows share, and is it in group g = 0 or 1 by a bit of its own?

        other columns                   w = a[g] s + c[g]
        salient columns, two planes     w = a[2] s + a[3] t + c[2]             the second plane holds t, there is no g
        salient columns, `third`        w = a[2+g] s + a[4+g] t + c[2+g]

    with a = scale, for each row and block; with `column_scale` times u of the column, where u[0], u[1] belong to the
    a[g] of s and v[0], v[1] to those of t (without g, u[0] to s and u[1] to t); c = offset only with `offset`.

    Stored: words int16 [2, out, words], of s and of g or t; which columns are salient int16 [words]; with `third`, t of
    the salient columns alone int16 [out, words of them]; scale fp16 [4 or 6, blocks, out]; offset fp16 [3 or 4, blocks,
    out]; u fp16 [2, columns] and, with `third`, v fp16 [2, salient].
    """

    kind: ClassVar[str] = "zones"
    row_axis: ClassVar[Mapping[str, int | None]] = {
        "": -2, "_third": -2, "_salient": None, "_column": None, "_third_column": None,
    }  # fmt: skip
    columns: int
    salient: int
    block: int = 128
    third: bool = False
    column_scale: bool = False
    offset: bool = False

    def __post_init__(self) -> None:
        flags = dict.fromkeys(("third", "column_scale", "offset"), (True, False))
        _check_segment(self, salient=range(bool(self.third), self.columns + 1), block=range(1, 1 << 16), **flags)

    @property
    def code_bits(self) -> float:
        """As papers count: a sign, and one more on salient columns; not the second plane."""
        return 1 + self.salient / self.columns

    @property
    def summary(self) -> str:
        planes = f"{self.salient}salient{'x3' if self.third else ''}"
        scales = f"{'+columns' if self.column_scale else ''}{'+offset' if self.offset else ''}"
        return f"{self.columns}xzones({planes})/b{self.block}{scales}"

    def tensors(self, out_features: int) -> dict[str, TensorSpec]:
        words, blocks = word_count(self.columns, 1), group_count(self.columns, self.block)
        specs = {
            "": TensorSpec(torch.int16, (2, out_features, words)),
            "_salient": TensorSpec(torch.int16, (words,)),
            "_scale": TensorSpec(torch.float16, (6 if self.third else 4, blocks, out_features)),
        }
        if self.third:
            specs["_third"] = TensorSpec(torch.int16, (out_features, word_count(self.salient, 1)))
        if self.offset:
            specs["_offset"] = TensorSpec(torch.float16, (4 if self.third else 3, blocks, out_features))
        if self.column_scale:
            specs["_column"] = TensorSpec(torch.float16, (2, self.columns))
            if self.third:
                specs["_third_column"] = TensorSpec(torch.float16, (2, self.salient))
        return specs

    def encode(
        self,
        bits: Tensor,
        salient: Tensor,
        scale: Tensor,
        offset: Tensor | None = None,
        column: Tensor | None = None,
        third: Tensor | None = None,
        third_column: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """bits [2, out, columns], salient [columns], third [out, salient] bool; scale [4 or 6, out, blocks], offset
        [3 or 4, out, blocks], column [2, columns], third_column [2, salient] fp16-exact. All join on the last axis."""
        parts = {
            "": pack_fields(bits.to(torch.uint8), 1),
            "_salient": pack_fields(salient.to(torch.uint8), 1),
            "_scale": scale.transpose(1, 2).half().contiguous(),
        }
        if self.third:
            parts["_third"] = pack_fields(third.to(torch.uint8), 1)
        if self.offset:
            parts["_offset"] = offset.transpose(1, 2).half().contiguous()
        if self.column_scale:
            parts["_column"] = column.half().contiguous()
            if self.third:
                parts["_third_column"] = third_column.half().contiguous()
        return parts

    def decode(self, parts: Mapping[str, Tensor], out: Tensor) -> None:
        """Write the meaning of the stored rows into out [rows, columns] fp32."""
        s, second = unpack_fields(parts[""], 1, self.columns)  # [rows, columns]
        mask = unpack_fields(parts["_salient"], 1, self.columns).bool()
        others, salient = (~mask).nonzero()[:, 0], mask.nonzero()[:, 0]
        g, t, u, v = second[:, salient], second[:, salient], parts.get("_column"), parts.get("_third_column")

        def of_block(values: Tensor, columns: Tensor) -> Tensor:  # [zones, blocks, rows] -> [zones, rows, columns or 1]
            values = values.float()
            return (values if values.shape[1] == 1 else values[:, columns // self.block]).transpose(1, 2)

        def term(sign: Tensor, zones: slice, g: Tensor, columns: Tensor, factor: Tensor | None) -> Tensor:
            level = of_block(parts["_scale"][zones], columns)
            return _of_group(level if factor is None else level * factor.float()[:, None], g) * (2 * sign - 1)

        out[:, others] = term(s[:, others], slice(0, 2), second[:, others], others, u if u is None else u[:, others])
        first, u = s[:, salient], u if u is None else u[:, salient]
        if self.third:
            t = unpack_fields(parts["_third"], 1, self.salient)
            out[:, salient] = term(first, slice(2, 4), g, salient, u) + term(t, slice(4, 6), g, salient, v)
        else:
            u, v = (None, None) if u is None else (u[:1], u[1:])
            out[:, salient] = term(first, slice(2, 3), g, salient, u) + term(t, slice(3, 4), g, salient, v)
        if self.offset:
            out[:, others] += _of_group(of_block(parts["_offset"][:2], others), second[:, others])
            out[:, salient] += _of_group(of_block(parts["_offset"][2:], salient), g)


def _of_group(values: Tensor, g: Tensor) -> Tensor:
    """values [2, rows, columns or 1] of the groups that g [rows, columns] names, or [1, ...] of all."""
    # lerp at 0 and 1 chooses, exactly, and in a fraction of the time of `where`
    return values[0] if len(values) == 1 else torch.lerp(values[0], values[1], g.float())


Segment = Planes | Ints | TiedPlanes | Zones
"""`row_axis` says where a stored tensor has its rows: the last axis unless named, None for what all rows share."""
SEGMENTS: dict[str, type[Segment]] = {s.kind: s for s in (Planes, Ints, TiedPlanes, Zones)}


@dataclass(frozen=True)
class Overlay:
    """Single weights at 8 bits in the place of what the segments say: w = (value - zero) * scale.

    Each row has `count` of them in every `block` columns, and ceil(count * rest / block) in a shorter last block.
    Stored by rising column: index in the block uint8 [entries, out]; value uint8 [entries, out]; and a row's scale fp16
    [1, out] and zero uint8 [1, out].
    """

    kind: ClassVar[str] = "overlay"
    row_axis: ClassVar[Mapping[str, int | None]] = {}
    columns: int
    count: int
    block: int = 256

    def __post_init__(self) -> None:
        _check_segment(self, block=range(1, 257))
        _check_segment(self, count=range(1, self.block + 1))

    @property
    def summary(self) -> str:
        return f"{self.count}of{self.block}xint8"

    @property
    def blocks(self) -> list[tuple[int, int, int]]:
        """First column, columns and entries of each block."""
        starts = range(0, self.columns, self.block)
        sizes = [min(self.block, self.columns - start) for start in starts]
        return [(start, size, -(-self.count * size // self.block)) for start, size in zip(starts, sizes, strict=True)]

    @property
    def share(self) -> float:
        """The share of a row's weights that it replaces."""
        return sum(entries for _, _, entries in self.blocks) / self.columns

    def tensors(self, out_features: int) -> dict[str, TensorSpec]:
        entries = sum(entries for _, _, entries in self.blocks)
        return {
            "_index": TensorSpec(torch.uint8, (entries, out_features)),
            "_value": TensorSpec(torch.uint8, (entries, out_features)),
            "_scale": TensorSpec(torch.float16, (1, out_features)),
            "_zero": TensorSpec(torch.uint8, (1, out_features)),
        }

    def encode(self, mask: Tensor, codes: Tensor, scale: Tensor, zero: Tensor) -> dict[str, Tensor]:
        """mask [out, columns] bool; codes [out, columns] uint8, read where the mask is set; scale [out] fp16-exact,
        zero [out] whole numbers."""
        index, value = [], []
        for start, size, entries in self.blocks:
            part = mask[:, start : start + size]
            if (part.sum(1) != entries).any():
                raise FormatError(f"{self.summary} holds {entries} weights in columns {start} to {start + size - 1}")
            at = part.nonzero()[:, 1].view(len(mask), entries)
            index.append(at.T.to(torch.uint8))
            value.append(codes[:, start : start + size].gather(1, at).T)
        return {"_index": torch.cat(index), "_value": torch.cat(value), **_row_grid(scale, zero)}

    def decode(self, parts: Mapping[str, Tensor], out: Tensor) -> None:
        """Replace what out [rows, columns] fp32 holds at the stored columns."""
        first = [torch.full((entries, 1), start, device=out.device) for start, _, entries in self.blocks]
        out.scatter_(1, (parts["_index"] + torch.cat(first)).T, _grid_values(parts))


@dataclass(frozen=True)
class Bitmap:
    """Like `Overlay`, for any number of weights in a row: a bit for each weight says whether it is replaced.

    Stored: mask words int16 [out, words]; value uint8 [capacity, out], of the row's set bits by rising column, zeros
    after the last; scale fp16 [1, out]; zero uint8 [1, out]. `ratio` is the share of the whole weight that is meant to
    be replaced: bits that papers claim come from it, stored ones from `capacity`, which is that of the fullest row.
    """

    kind: ClassVar[str] = "bitmap"
    row_axis: ClassVar[Mapping[str, int | None]] = {"_mask": -2}
    columns: int
    capacity: int
    ratio: float

    def __post_init__(self) -> None:
        _check_segment(self, capacity=range(1, self.columns + 1))
        if not 0 <= self.ratio <= 1:
            raise FormatError(f"bitmap.ratio is {self.ratio!r}, expected a share from 0 to 1")

    @property
    def summary(self) -> str:
        return f"{self.capacity}xint8/bitmap({self.ratio:g})"

    @property
    def share(self) -> float:
        """The share of the weights that it replaces."""
        return self.ratio

    def tensors(self, out_features: int) -> dict[str, TensorSpec]:
        return {
            "_mask": TensorSpec(torch.int16, (out_features, word_count(self.columns, 1))),
            "_value": TensorSpec(torch.uint8, (self.capacity, out_features)),
            "_scale": TensorSpec(torch.float16, (1, out_features)),
            "_zero": TensorSpec(torch.uint8, (1, out_features)),
        }

    def encode(self, mask: Tensor, codes: Tensor, scale: Tensor, zero: Tensor) -> dict[str, Tensor]:
        """As `Overlay.encode`."""
        if (fullest := int(mask.sum(1).max())) > self.capacity:
            raise FormatError(f"{self.summary} holds {self.capacity} weights a row, a row of the mask has {fullest}")
        value = codes.new_zeros(len(mask), self.capacity)
        value[self._used(mask)] = codes[mask]  # both in order of rows, then columns
        parts = {"_mask": pack_fields(mask.to(torch.uint8), 1), "_value": value.T.contiguous()}
        return parts | _row_grid(scale, zero)

    def decode(self, parts: Mapping[str, Tensor], out: Tensor) -> None:
        """Replace what out [rows, columns] fp32 holds where the mask is set."""
        mask = unpack_fields(parts["_mask"], 1, self.columns).bool()
        out[mask] = _grid_values(parts)[self._used(mask)]

    def _used(self, mask: Tensor) -> Tensor:  # [rows, columns] -> [rows, capacity] bool
        return torch.arange(self.capacity, device=mask.device) < mask.sum(1, keepdim=True)


def _row_grid(scale: Tensor, zero: Tensor) -> dict[str, Tensor]:
    return {"_scale": scale[None].half(), "_zero": zero[None].to(torch.uint8)}


def _grid_values(parts: Mapping[str, Tensor]) -> Tensor:
    """The values [rows, entries] fp32 that an overlay stores."""
    return ((parts["_value"].float() - parts["_zero"].float()) * parts["_scale"].float()).T


OVERLAYS: dict[str, type[Overlay] | type[Bitmap]] = {o.kind: o for o in (Overlay, Bitmap)}


@dataclass(frozen=True)
class InputTransform:
    """What is done to the inputs of a weight before its segments and overlay multiply them: y = stored @ T(x),

        T(x) = scale * partition(hadamard(x))

    each part optional. `hadamard` is a block size, a power of two: blocks of so many channels are multiplied by the
    orthonormal Hadamard matrix (-1)^popcount(i & j) / sqrt(size); the channels after the last whole block are cut into
    falling powers of two. `partition` puts the channels of the first segment, which a bit marks, before the others,
    both in rising order. `column_scale` is a factor for each channel, in the order that the segments then have.

    Stored: partition words int16 [words]; scale fp16 [columns]. All rows share them.
    """

    kind: ClassVar[str] = "input"
    row_axis: ClassVar[Mapping[str, int | None]] = {"_partition": None, "_scale": None}
    columns: int
    partition: bool = False
    column_scale: bool = False
    hadamard: int | None = None

    def __post_init__(self) -> None:
        _check_segment(self, partition=(True, False), column_scale=(True, False))
        if self.hadamard not in (None, *(2**k for k in range(1, 17))):
            raise FormatError(f"input.hadamard is {self.hadamard!r}, expected a power of two from 2 to 65536")
        if not (self.partition or self.column_scale or self.hadamard):
            raise FormatError("an input transform without partition, column_scale and hadamard is none: leave it out")

    @property
    def summary(self) -> str:
        steps = (
            f"hadamard{self.hadamard}" if self.hadamard else "",
            "partition" if self.partition else "",
            "scale" if self.column_scale else "",
        )
        return f"input({','.join(filter(None, steps))})"

    def tensors(self, out_features: int) -> dict[str, TensorSpec]:
        specs = {}
        if self.partition:
            specs["_partition"] = TensorSpec(torch.int16, (word_count(self.columns, 1),))
        if self.column_scale:
            specs["_scale"] = TensorSpec(torch.float16, (self.columns,))
        return specs

    def encode(self, partition: Tensor | None = None, scale: Tensor | None = None) -> dict[str, Tensor]:
        """partition [columns] bool, set for the channels of the first segment; scale [columns] fp16-exact, in the order
        of the segments."""
        parts = {}
        if self.partition:
            parts["_partition"] = pack_fields(partition.to(torch.uint8), 1)
        if self.column_scale:
            parts["_scale"] = scale.half()
        return parts

    def order(self, parts: Mapping[str, Tensor]) -> Tensor:
        """The channel [columns] int64 that is at each place after the partition."""
        return unpack_fields(parts["_partition"], 1, self.columns).argsort(descending=True, stable=True)

    def apply(self, parts: Mapping[str, Tensor], x: Tensor) -> Tensor:
        """T(x) for x [..., columns]: computed in fp32, rounded once to x's dtype."""
        found = x.float()
        if self.hadamard:
            found = block_hadamard(found, self.hadamard)
        if self.partition:
            found = found[..., self.order(parts)]
        if self.column_scale:
            found = found * parts["_scale"].float()
        return found.to(x.dtype)

    def decode(self, parts: Mapping[str, Tensor], out: Tensor) -> None:
        """Turn out [rows, columns] fp32, which multiplies T(x), into the weight that multiplies x."""
        if self.column_scale:
            out *= parts["_scale"].float()
        if self.partition:
            out[:, self.order(parts)] = out.clone()
        if self.hadamard:
            out.copy_(block_hadamard(out, self.hadamard))


def block_hadamard(x: Tensor, block: int) -> Tensor:
    """x [..., columns] times the orthonormal, symmetric block matrix that `InputTransform` describes."""
    columns = x.shape[-1]
    start = columns // block * block
    found = [_walsh(x[..., :start], block)] if start else []
    while start < columns:
        size = 1 << (columns - start).bit_length() - 1
        found.append(_walsh(x[..., start : start + size], size))
        start += size
    return torch.cat(found, dim=-1)


def _walsh(x: Tensor, size: int) -> Tensor:
    """The fast transform of each `size` columns of x [..., columns]: log2(size) rounds of sums and differences."""
    half = 1
    while half < size:
        a, b = x.unflatten(-1, (-1, 2, half)).unbind(-2)  # [..., pairs, half]
        x = torch.stack([a + b, a - b], dim=-2).flatten(-3)
        half *= 2
    return x * size**-0.5


Part = Segment | Overlay | Bitmap | InputTransform


def _check_segment(segment: Part, **allowed: Sequence[Any]) -> None:
    group = getattr(segment, "group", None)
    if segment.columns < 1 or (group is not None and group < 1):
        raise FormatError(f"columns and group must be positive, got {segment}")
    for name, values in allowed.items():
        if getattr(segment, name) not in values:
            expected = f"{values[0]} to {values[-1]}" if isinstance(values, range) else f"one of {list(values)}"
            raise FormatError(f"{segment.kind}.{name} is {getattr(segment, name)!r}, expected {expected}")


@dataclass(frozen=True)
class Format:
    """How one weight [out, in] is stored: the segments of its columns, left to right, what replaces single weights of
    them, what its inputs go through first, and the version of the layout. Segments and overlay have the columns in the
    order and basis that the transform leaves; `decode` returns them as the inputs come."""

    segments: tuple[Segment, ...]
    overlay: Overlay | Bitmap | None = None
    transform: InputTransform | None = None
    version: int = VERSION

    def __post_init__(self) -> None:
        for name in ("overlay", "transform"):
            part = getattr(self, name)
            if part is not None and part.columns != self.in_features:
                raise FormatError(f"the {name} has {part.columns} columns, the segments have {self.in_features}")

    @property
    def in_features(self) -> int:
        return sum(s.columns for s in self.segments)

    @property
    def summary(self) -> str:
        """One line that names every field: `4096xint2/g128`."""
        return " + ".join(part.summary for _, _, part in self._parts())

    @property
    def kinds(self) -> str:
        """What a kernel is chosen by: `planes+overlay`."""
        return "+".join(part.kind for _, _, part in self._parts())

    @property
    def claimed_bits(self) -> float:
        """Bits per weight as papers count them: the codes alone, no scales, no padding, and of an overlay the 8 bits of
        the weights in it but not where they are."""
        bits = sum(s.columns * s.code_bits for s in self.segments) / self.in_features
        return bits if self.overlay is None else 8 * self.overlay.share + (1 - self.overlay.share) * bits

    def tensors(self, out_features: int, in_features: int) -> dict[str, TensorSpec]:
        """Names, dtypes and shapes of everything stored. The first is `weight`: a loader that does not know the
        format then stops at its shape instead of initialising a random weight."""
        if in_features != self.in_features:
            raise FormatError(
                f"format {self.summary} holds {self.in_features} input columns, the layer has {in_features}"
            )
        return {
            prefix + suffix: spec
            for prefix, _, part in self._parts()
            for suffix, spec in part.tensors(out_features).items()
        }

    def encode(self, *parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The `encode` arguments of each segment, then of the overlay and of the transform if there are -> the stored
        tensors."""
        if self.transform is not None and self.transform.partition:
            marked, columns = int(parts[-1]["partition"].sum()), self.segments[0].columns
            if marked != columns:
                raise FormatError(f"the partition marks {marked} channels, the first segment has {columns} columns")
        return {
            prefix + suffix: tensor
            for (prefix, _, part), values in zip(self._parts(), parts, strict=True)
            for suffix, tensor in part.encode(**values).items()
        }

    def decode(self, tensors: Mapping[str, Tensor], dtype: torch.dtype = torch.float32) -> Tensor:
        """Stored tensors -> weight [out, in]. This IS the meaning: computed in fp32, rounded once to `dtype`."""
        first = tensors["weight"]
        out_features = first.shape[-2]
        weight = torch.empty(out_features, self.in_features, dtype=dtype, device=first.device)
        step = max(1, _TILE // self.in_features)
        for row in range(0, out_features, step):
            rows = slice(row, min(row + step, out_features))
            tile = weight[rows] if dtype == torch.float32 else torch.empty_like(weight[rows], dtype=torch.float32)
            stored = self.rows(tensors, rows)
            for prefix, column, part in self._parts():
                values = {suffix: stored[prefix + suffix] for suffix in part.tensors(out_features)}
                part.decode(values, tile[:, column : column + part.columns])
            if dtype != torch.float32:
                weight[rows] = tile
        return weight

    def transformed(self, tensors: Mapping[str, Tensor], x: Tensor) -> Tensor:
        """T(x) [..., in] for x [..., in], in x's dtype: what the weight that `untransformed` decodes multiplies."""
        if self.transform is None:
            return x
        return self.transform.apply(
            {suffix: tensors[f"weight_input{suffix}"] for suffix in self.transform.tensors(1)}, x
        )

    @property
    def untransformed(self) -> Format:
        """The segments and the overlay alone, which the same stored tensors hold."""
        return replace(self, transform=None)

    def rows(self, tensors: Mapping[str, Tensor], rows: slice) -> dict[str, Tensor]:
        """The stored tensors of some rows, which are stored tensors again."""
        return {
            name: tensors[name]
            if axis is None
            else tensors[name][..., rows]
            if axis == -1
            else tensors[name][..., rows, :]
            for name, axis in self.row_axes.items()
        }

    def stacked(self, weights: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
        """The stored tensors of several weights one below the other, the inverse of `rows`; what all rows share is that
        of the first."""
        return {
            name: weights[0][name] if axis is None else torch.cat([tensors[name] for tensors in weights], dim=axis)
            for name, axis in self.row_axes.items()
        }

    @property
    def row_axes(self) -> dict[str, int | None]:
        """Stored tensor -> the axis that its rows lie on, None for what all rows share."""
        return {
            prefix + suffix: part.row_axis.get(suffix, -1)
            for prefix, _, part in self._parts()
            for suffix in part.tensors(1)
        }

    @property
    def shared(self) -> list[str]:
        """The stored tensors that all rows share."""
        return [name for name, axis in self.row_axes.items() if axis is None]

    def _parts(self) -> list[tuple[str, int, Part]]:
        """Name of the main tensor and first column of each part, in the order of decoding."""
        found, column = [], 0
        for i, segment in enumerate(self.segments):
            found.append(("weight" if i == 0 else f"weight_{i}", column, segment))
            column += segment.columns
        whole = (("weight_overlay", 0, self.overlay), ("weight_input", 0, self.transform))
        return found + [entry for entry in whole if entry[2] is not None]

    def to_dict(self) -> dict[str, Any]:
        """Plain values for config.json; `from_dict` is the inverse."""
        data = {"version": self.version, "segments": [_description(s) for s in self.segments]}
        optional = {"overlay": self.overlay, "transform": self.transform}
        return data | {name: _description(part) for name, part in optional.items() if part is not None}

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
        overlay, transform = data.get("overlay"), data.get("transform")
        return cls(
            tuple(_described(entry, SEGMENTS, "segment") for entry in data["segments"]),
            None if overlay is None else _described(overlay, OVERLAYS, "overlay"),
            None if transform is None else _described(transform, {InputTransform.kind: InputTransform}, "transform"),
        )


def _description(part: Part) -> dict[str, Any]:
    return {"kind": part.kind, **asdict(part)}


def _described(entry: Any, kinds: Mapping[str, type], what: str) -> Any:
    values = dict(entry) if isinstance(entry, Mapping) else {}
    found = kinds.get(values.pop("kind", None))
    if found is None or unknown_fields(found, values):
        raise FormatError(f"unknown {what} in the packed format: {entry}; a newer ultralowbit wrote it, upgrade")
    return found(**values)


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
        """Pack one mapping of parts for each segment, then for the overlay and the transform (see their `encode`)."""
        tensors = format.encode(*parts)
        return cls(format, (tensors["weight"].shape[-2], format.in_features), tensors)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight [out, in] that the stored bytes mean."""
        return self.format.decode(self.tensors, dtype)

    @property
    def sparsity(self) -> list[float]:
        """The share of zeros in each 0/1 plane, such as DB-LLM's two; empty where there are no such planes."""
        found: list[float] = []
        for prefix, _, segment in self.format._parts():
            if isinstance(segment, Planes) and segment.alphabet == "01":
                bits = unpack_fields(self.tensors[prefix], 1, segment.columns)  # [planes, out, columns]
                found += (bits == 0).float().mean((1, 2)).tolist()
        return found

    @property
    def nbytes(self) -> int:
        """Bytes stored: words with their padding, scales, zero points, offsets."""
        return sum(t.nbytes for t in self.tensors.values())

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.nbytes / (self.shape[0] * self.shape[1])
