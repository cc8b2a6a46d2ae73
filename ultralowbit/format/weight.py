"""The packed format: how one weight `[out, in]` is stored, shared by methods, files, kernels and the loader."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, fields, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ultralowbit.errors import FormatError
from ultralowbit.format.ints import Ints
from ultralowbit.format.outliers import IndexedOutliers, MaskedOutliers
from ultralowbit.format.planes import Planes, TiedPlanes
from ultralowbit.format.salient import SalientSplit
from ultralowbit.format.segment import Outliers, Part, Segment, unknown_fields
from ultralowbit.format.transform import InputTransform
from ultralowbit.format.words import VERSION, TensorSpec, unpack_fields

_TILE = 1 << 17  # weights unpacked at a time: their int16 and fp32 forms stay in a core's L2


SEGMENTS: dict[str, type[Segment]] = {s.kind: s for s in (Planes, Ints, TiedPlanes, SalientSplit)}
"""What config.json calls a segment -> its class."""

OUTLIERS: dict[str, type[Outliers]] = {o.kind: o for o in (IndexedOutliers, MaskedOutliers)}
"""The same of outliers."""


class Place(NamedTuple):
    """A part of a format, the name of its main tensor and its first column."""

    prefix: str
    column: int
    part: Part

    def of(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The part's own among the stored tensors of a weight, by suffix."""
        return {suffix: tensors[self.prefix + suffix] for suffix in self.part.tensors(1)}


@dataclass(frozen=True)
class Format:
    """How one weight [out, in] is stored: the segments of its columns from left to right, the outliers that replace
    single weights of them, the transform that its inputs go through first, and the version of the layout.

    Segments and outliers have the columns in the order and basis that the transform leaves; `decode` returns them as
    the inputs come. Raises `FormatError` where the parts have other columns than the segments together.
    """

    segments: tuple[Segment, ...]
    outliers: Outliers | None = None
    transform: InputTransform | None = None
    version: int = VERSION

    def __post_init__(self) -> None:
        if not self.segments:
            raise FormatError("a packed weight without segments has no columns: the config.json was edited, copy again")
        for name in ("outliers", "transform"):
            part = getattr(self, name)
            if part is not None and part.columns != self.in_features:
                raise FormatError(f"{name}.columns is {part.columns}, the segments have {self.in_features} columns")

    @property
    def in_features(self) -> int:
        """Input columns of the weight."""
        return sum(s.columns for s in self.segments)

    @property
    def summary(self) -> str:
        """One line that names every field: `4096xint2/g128`."""
        return " + ".join(part.summary for _, _, part in self.parts)

    @property
    def kinds(self) -> str:
        """The kinds of its parts: `planes+indexed_outliers`."""
        return "+".join(part.kind for _, _, part in self.parts)

    @property
    def claimed_bits(self) -> float:
        """Bits per weight as papers count them: the codes alone, without scales and padding, and 8 bits for each
        outlier without its place."""
        bits = sum(s.columns * s.code_bits for s in self.segments) / self.in_features
        return bits if self.outliers is None else 8 * self.outliers.share + (1 - self.outliers.share) * bits

    def tensors(self, out_features: int, in_features: int) -> dict[str, TensorSpec]:
        """Name -> dtype and shape of everything that is stored. The first is `weight`: a loader that does not know the
        format then stops at its shape instead of initialising a random weight. Raises `FormatError` for other columns
        than its own."""
        if in_features != self.in_features:
            raise FormatError(
                f"format {self.summary} holds {self.in_features} input columns, the layer has {in_features}"
            )
        return {
            prefix + suffix: spec
            for prefix, _, part in self.parts
            for suffix, spec in part.tensors(out_features).items()
        }

    def nbytes(self, out_features: int, in_features: int) -> int:
        """What a packed weight takes to store, all that `tensors` lists."""
        return sum(spec.nbytes for spec in self.tensors(out_features, in_features).values())

    def mismatches(self, stored: Mapping[str, TensorSpec], out_features: int) -> Iterator[str]:
        """How stored tensors, by name, differ from what this format stores for so many rows: a clause for each, that
        begins with the name."""
        expected = self.tensors(out_features, self.in_features)
        for name, spec in expected.items():
            if name not in stored:
                yield f"{name} is missing, expected {spec} of {self.summary}"
            elif stored[name] != spec:
                yield f"{name} is {stored[name]}, expected {spec} of {self.summary}"
        for name in sorted(stored.keys() - expected.keys()):
            yield f"{name} is no part of {self.summary}"

    def check_values(self, tensors: Mapping[str, Tensor]) -> None:
        """Raise `FormatError` where stored tensors of the right shapes hold what nothing can have written: scales that
        are not finite, places of outliers or salient columns that cannot be."""
        faults = [
            f"{place.prefix}{suffix} {fault}"
            for place in self.parts
            for suffix, fault in place.part.faults(place.of(tensors))
        ]
        if self.transform is not None and self.transform.channel_order:
            marked = int(unpack_fields(tensors["weight_input_channel_order"], 1, self.in_features).sum())
            if marked != (columns := self.segments[0].columns):
                faults.append(f"weight_input_channel_order marks {marked} channels, expected {columns}")
        if faults:
            raise FormatError(f"{faults[0]}: the checkpoint is damaged, copy it again")

    def encode(self, *parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The arguments of each segment's `encode`, then those of the outliers and of the transform if there are such
        -> the stored tensors by name. Raises `FormatError` for marks that do not fit the segments."""
        if self.transform is not None and self.transform.channel_order:
            marked, columns = int(parts[-1]["channel_order"].sum()), self.segments[0].columns
            if marked != columns:
                raise FormatError(f"the channel_order marks {marked} channels, the first segment has {columns} columns")
        return {
            prefix + suffix: tensor
            for (prefix, _, part), values in zip(self.parts, parts, strict=True)
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
            for place in self.parts:
                columns = slice(place.column, place.column + place.part.columns)
                place.part.decode(place.of(stored), tile[:, columns])
            if dtype != torch.float32:
                weight[rows] = tile
        return weight

    def transformed(self, tensors: Mapping[str, Tensor], x: Tensor) -> Tensor:
        """T(x) [..., in] for x [..., in], in x's dtype: what the weight that `untransformed` decodes multiplies."""
        if self.transform is None:
            return x
        return self.transform.apply(self.parts[-1].of(tensors), x)

    @property
    def untransformed(self) -> Format:
        """The segments and the outliers alone, which the same stored tensors hold."""
        return replace(self, transform=None)

    def rows(self, tensors: Mapping[str, Tensor], rows: slice | Tensor) -> dict[str, Tensor]:
        """The stored tensors of some rows, a slice of them or their numbers [rows] int64, which are stored tensors
        again. torch raises `IndexError` or `RuntimeError` for a number of no row."""
        return {
            name: tensors[name]
            if axis is None
            else tensors[name].index_select(axis, rows)
            if isinstance(rows, Tensor)
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
            for prefix, _, part in self.parts
            for suffix in part.tensors(1)
        }

    @property
    def shared(self) -> list[str]:
        """The stored tensors that all rows share."""
        return [name for name, axis in self.row_axes.items() if axis is None]

    @property
    def parts(self) -> list[Place]:
        """Its parts in the order of decoding: segments, outliers, transform."""
        places, column = [], 0
        for i, segment in enumerate(self.segments):
            places.append(Place("weight" if i == 0 else f"weight_{i}", column, segment))
            column += segment.columns
        whole = (Place("weight_outliers", 0, self.outliers), Place("weight_input", 0, self.transform))
        return places + [place for place in whole if place.part is not None]

    def to_dict(self) -> dict[str, Any]:
        """Plain values for config.json; `from_dict` is the inverse."""
        data = {"version": self.version, "segments": [_description(s) for s in self.segments]}
        optional = {"outliers": self.outliers, "transform": self.transform}
        return data | {name: _description(part) for name, part in optional.items() if part is not None}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Format:
        """The inverse of `to_dict`; raises `FormatError` for another version, an unknown part or an unknown field."""
        version = data.get("version") if isinstance(data, Mapping) else None
        if version != VERSION:
            raise FormatError(
                f"packed format version {version!r} is not version {VERSION}, the one this ultralowbit reads: "
                "install the release that wrote the checkpoint, or a newer one"
            )
        if unknown := unknown_fields(cls, data):
            raise FormatError(f"unknown {sorted(unknown)} in the packed format: a newer ultralowbit wrote it, upgrade")
        outliers, transform, segments = data.get("outliers"), data.get("transform"), data.get("segments")
        if not isinstance(segments, list | tuple) or not segments:
            raise FormatError(f"the packed format has the segments {segments!r}, expected a list of them")
        return cls(
            tuple(_described(entry, SEGMENTS, "segment") for entry in segments),
            None if outliers is None else _described(outliers, OUTLIERS, "outliers"),
            None if transform is None else _described(transform, {InputTransform.kind: InputTransform}, "transform"),
        )


def _description(part: Part) -> dict[str, Any]:
    return {"kind": part.kind, **asdict(part)}


def _described(entry: Any, kinds: Mapping[str, type], what: str) -> Any:
    values = dict(entry) if isinstance(entry, Mapping) else {}
    kind = values.pop("kind", None)
    part = kinds.get(kind) if isinstance(kind, str) else None
    if part is None or unknown_fields(part, values):
        raise FormatError(f"unknown {what} in the packed format: {entry}; a newer ultralowbit wrote it, upgrade")
    if missing := [f.name for f in fields(part) if f.default is MISSING and f.name not in values]:
        raise FormatError(f"the packed format lacks {', '.join(missing)} of {what} {entry}: copy the checkpoint again")
    return part(**values)


@dataclass(frozen=True)
class PackedWeight:
    """One weight as it is stored.

    format: how; shape: (out_features, in_features); tensors: name -> tensor as `Format.tensors` lists them, checked on
    construction: `FormatError` names the first that differs.
    """

    format: Format
    shape: tuple[int, int]
    tensors: dict[str, Tensor]

    def __post_init__(self) -> None:
        out_features, in_features = self.shape
        self.format.tensors(out_features, in_features)  # refuses other columns
        stored = {name: TensorSpec(t.dtype, tuple(t.shape)) for name, t in self.tensors.items()}
        for mismatch in self.format.mismatches(stored, out_features):
            raise FormatError(f"{mismatch}: the tensors belong to another format")

    @classmethod
    def encode(cls, format: Format, *parts: Mapping[str, Tensor]) -> PackedWeight:
        """Pack one mapping of parts for each segment, then for the outliers and the transform (see their `encode`)."""
        tensors = format.encode(*parts)
        return cls(format, (tensors["weight"].shape[-2], format.in_features), tensors)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight [out, in] that the stored bytes mean."""
        return self.format.decode(self.tensors, dtype)

    @property
    def sparsity(self) -> list[float]:
        """The share of zeros in each 0/1 plane, such as DB-LLM's two; empty where there are no such planes."""
        return [
            share
            for place, segment in zip(self.format.parts, self.format.segments, strict=False)
            for share in segment.sparsity(place.of(self.tensors))
        ]

    @property
    def nbytes(self) -> int:
        """Bytes stored: words with their padding, scales, zero points, offsets."""
        return sum(t.nbytes for t in self.tensors.values())

    @property
    def bits_per_weight(self) -> float:
        """Bits stored for each weight, all counted."""
        return 8 * self.nbytes / (self.shape[0] * self.shape[1])
