"""The packed format: how one weight `[out, in]` is stored, shared by methods, files, kernels and the loader."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ultralowbit.errors import FormatError
from ultralowbit.format.ints import Ints
from ultralowbit.format.outliers import OUTLIERS, IndexedOutliers, MaskedOutliers
from ultralowbit.format.planes import Planes, TiedPlanes
from ultralowbit.format.salient import SalientSplit
from ultralowbit.format.segment import Part, Segment, unknown_fields
from ultralowbit.format.transform import InputTransform
from ultralowbit.format.words import VERSION, TensorSpec, unpack_fields

_TILE = 1 << 17  # weights unpacked at a time: their int16 and fp32 forms stay in a core's L2


SEGMENTS: dict[str, type[Segment]] = {s.kind: s for s in (Planes, Ints, TiedPlanes, SalientSplit)}
"""What config.json calls a segment -> its class."""


@dataclass(frozen=True)
class Format:
    """How one weight [out, in] is stored: the segments of its columns, left to right, what replaces single weights of
    them, what its inputs go through first, and the version of the layout. Segments and outliers have the columns in the
    order and basis that the transform leaves; `decode` returns them as the inputs come."""

    segments: tuple[Segment, ...]
    outliers: IndexedOutliers | MaskedOutliers | None = None
    transform: InputTransform | None = None
    version: int = VERSION

    def __post_init__(self) -> None:
        for name in ("outliers", "transform"):
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
        """What a kernel is chosen by: `planes+indexed_outliers`."""
        return "+".join(part.kind for _, _, part in self._parts())

    @property
    def claimed_bits(self) -> float:
        """Bits per weight as papers count them: the codes alone, no scales, no padding, and of outliers the 8 bits of
        the weights in it but not where they are."""
        bits = sum(s.columns * s.code_bits for s in self.segments) / self.in_features
        return bits if self.outliers is None else 8 * self.outliers.share + (1 - self.outliers.share) * bits

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
        """The `encode` arguments of each segment, then of the outliers and of the transform if there are -> the stored
        tensors."""
        if self.transform is not None and self.transform.channel_order:
            marked, columns = int(parts[-1]["channel_order"].sum()), self.segments[0].columns
            if marked != columns:
                raise FormatError(f"the channel_order marks {marked} channels, the first segment has {columns} columns")
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
        """The segments and the outliers alone, which the same stored tensors hold."""
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
        whole = (("weight_outliers", 0, self.outliers), ("weight_input", 0, self.transform))
        return found + [entry for entry in whole if entry[2] is not None]

    def to_dict(self) -> dict[str, Any]:
        """Plain values for config.json; `from_dict` is the inverse."""
        data = {"version": self.version, "segments": [_description(s) for s in self.segments]}
        optional = {"outliers": self.outliers, "transform": self.transform}
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
        outliers, transform = data.get("outliers"), data.get("transform")
        return cls(
            tuple(_described(entry, SEGMENTS, "segment") for entry in data["segments"]),
            None if outliers is None else _described(outliers, OUTLIERS, "outliers"),
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
        """Pack one mapping of parts for each segment, then for the outliers and the transform (see their `encode`)."""
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
