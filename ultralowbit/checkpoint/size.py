"""True size of a checkpoint: every bit is counted from the tensors that its files store."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from ultralowbit.checkpoint.check import by_module, is_in_block, weight_mismatches
from ultralowbit.checkpoint.config import packed_formats, read_config_json, text_config
from ultralowbit.checkpoint.files import read_headers, weight_files
from ultralowbit.checkpoint.manifest import is_untied
from ultralowbit.checkpoint.names import natural
from ultralowbit.errors import CheckpointError
from ultralowbit.format.segment import PART_KINDS, BudgetKind
from ultralowbit.format.weight import Format
from ultralowbit.format.words import TensorSpec

KINDS = ("embeddings", "head", "norms and other", "unquantized linears")
"""What is stored beside the packed weights; biases count as other."""


@dataclass(frozen=True)
class LayerSize:
    """One packed weight."""

    name: str
    shape: tuple[int, int]
    """(out, in)"""
    format: str
    """`Format.summary`"""
    parts: dict[str, int]
    """codes, scale, zero, offset, outliers_index, ... -> bytes"""
    budget: dict[BudgetKind, int]
    """What the same bytes are spent on."""
    claimed_bits: float
    """Bits per weight as papers count them: the codes alone."""

    @property
    def weights(self) -> int:
        return self.shape[0] * self.shape[1]

    @property
    def bytes(self) -> int:
        return sum(self.parts.values())

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.bytes / self.weights

    def to_dict(self) -> dict[str, Any]:
        """Fields and totals, as JSON values."""
        return {**asdict(self), "bytes": self.bytes, "bits_per_weight": self.bits_per_weight}


@dataclass(frozen=True)
class Size:
    """A whole checkpoint: `file_bytes` = `total_bytes` + `header_bytes`, exactly.

    A packed weight counts as out * in weights, any other tensor as its elements. What is said of linears is said of
    those in blocks: a packed embedding or head counts under its kind. An unpacked checkpoint has no layers,
    and None for the bits of its linears.
    """

    layers: tuple[LayerSize, ...]
    """Packed Linears of the blocks."""
    outside: tuple[LayerSize, ...]
    """The packed embedding and head, whose bytes count as `other`."""
    other: dict[str, int]
    """Each of KINDS -> bytes."""
    other_weights: int
    """Of the original: where a tied head got a weight of its own, its bytes count and its weights do not."""
    header_bytes: int

    @property
    def linear_bytes(self) -> int:
        return sum(layer.bytes for layer in self.layers)

    @property
    def linear_weights(self) -> int:
        return sum(layer.weights for layer in self.layers)

    @property
    def linear_bits_per_weight(self) -> float | None:
        return 8 * self.linear_bytes / self.linear_weights if self.layers else None

    @property
    def claimed_bits(self) -> float | None:
        """Mean over the packed weights of what papers would claim."""
        if not self.layers:
            return None
        return sum(layer.claimed_bits * layer.weights for layer in self.layers) / self.linear_weights

    @property
    def total_bytes(self) -> int:
        return self.linear_bytes + sum(self.other.values())

    @property
    def total_weights(self) -> int:
        return self.linear_weights + self.other_weights

    @property
    def model_bits_per_weight(self) -> float:
        return 8 * self.total_bytes / self.total_weights

    @property
    def file_bytes(self) -> int:
        return self.total_bytes + self.header_bytes

    @property
    def budget(self) -> dict[str, int]:
        """What the bytes of the file are spent on: each of PART_KINDS, of KINDS, and the headers; they sum to
        `file_bytes`."""
        packed = {kind: sum(layer.budget.get(kind, 0) for layer in self.layers) for kind in PART_KINDS}
        return {**packed, **self.other, "file headers": self.header_bytes}

    @property
    def model_bits_before(self) -> float:
        """Bits per weight of the whole model if its embedding and head had 16 bits, as they have where they are not
        packed."""
        packed, weights = sum(layer.bytes for layer in self.outside), sum(layer.weights for layer in self.outside)
        return 8 * (self.total_bytes - packed + 2 * weights) / self.total_weights

    @property
    def fp16_bytes(self) -> int:
        """The same weights at two bytes each."""
        return 2 * self.total_weights

    @property
    def compression(self) -> float:
        """How many times smaller the files are than the weights in fp16."""
        return self.fp16_bytes / self.file_bytes

    def to_dict(self) -> dict[str, Any]:
        """Fields and totals, as JSON values."""
        totals = (
            "linear_bytes", "linear_weights", "linear_bits_per_weight", "claimed_bits", "total_bytes", "total_weights",
            "model_bits_per_weight", "model_bits_before", "header_bytes", "file_bytes", "fp16_bytes", "compression",
        )  # fmt: skip
        return {
            "layers": [layer.to_dict() for layer in self.layers],
            "outside": [layer.to_dict() for layer in self.outside],
            "other": dict(self.other),
            "budget": self.budget,
            **{name: getattr(self, name) for name in totals},
        }

    @classmethod
    def of(
        cls,
        tensors: Mapping[str, TensorSpec],
        formats: Mapping[str, Format],
        vocabulary: int | None = None,
        header_bytes: int = 0,
        untied: bool = False,
    ) -> Size:
        """From what is stored under which name, the format of each packed Linear, and the size of the vocabulary.
        untied: the head shared the embedding's weight in the original.

        Raises `CheckpointError` where a packed weight lacks a tensor, or has one of another shape or dtype.
        """
        modules = by_module(tensors)
        names = sorted(formats, key=natural)
        packed_weights = _layers({name: (formats[name], modules.get(name, {})) for name in names})
        layers = tuple(layer for layer in packed_weights if is_in_block(layer.name))
        outside = tuple(layer for layer in packed_weights if not is_in_block(layer.name))
        suffixes = {format: tuple(format.row_axes) for format in {*formats.values()}}
        packed = {f"{name}.{tensor}" for name, format in formats.items() for tensor in suffixes[format]}
        rest = {name: spec for name, spec in tensors.items() if name not in packed}
        other = dict.fromkeys(KINDS, 0)
        weights = 0
        sizes = [(name, spec.shape, spec.nbytes) for name, spec in rest.items()]
        for name, shape, nbytes in sizes + [(layer.name, layer.shape, layer.bytes) for layer in outside]:
            kind = _kind(name, shape, vocabulary)
            other[kind] += nbytes
            weights += 0 if untied and kind == "head" else math.prod(shape)
        return cls(layers, outside, other, weights, header_bytes)


def measure_size(folder: Path | str) -> Size:
    """Count what the safetensors files of a checkpoint folder store, packed or not; no tensor is read.

    Raises `CheckpointError` for a folder that holds no checkpoint, a cut file, or tensors other than config.json
    promises, `FormatError` for a packed format of a newer release.
    """
    folder = Path(folder)
    config = read_config_json(folder)
    tensors: dict[str, TensorSpec] = {}
    header_bytes = 0
    for file in weight_files(folder):
        specs = read_headers([file])
        for name, spec in specs.items():
            if name in tensors:
                raise CheckpointError(f"{name} is stored twice, once in {file}: copy the checkpoint again")
            if spec.dtype is None:
                raise CheckpointError(f"{name} in {file} has a dtype that torch cannot hold: re-save it as bf16")
        with file.open("rb") as f:
            header = 8 + int.from_bytes(f.read(8), "little")
        if sum(spec.nbytes for spec in specs.values()) + header != file.stat().st_size:
            raise CheckpointError(f"{file} holds bytes that belong to no tensor: compress or download it again")
        tensors |= specs
        header_bytes += header
    vocabulary = text_config(config).get("vocab_size")
    vocabulary = vocabulary if isinstance(vocabulary, int) else None
    return Size.of(tensors, packed_formats(config), vocabulary, header_bytes, is_untied(folder))


def _layers(packed: Mapping[str, tuple[Format, Mapping[str, TensorSpec]]]) -> list[LayerSize]:
    """Of each packed weight, by its name, given its format and its own tensors; those that are alike are counted once,
    such as all experts."""
    counted: dict[Any, LayerSize] = {}
    layers = []
    for name, (format, own) in packed.items():
        alike = format, tuple(own.items())
        if alike not in counted:
            counted[alike] = _layer(name, format, own)
        layers.append(replace(counted[alike], name=name))
    return layers


def _layer(name: str, format: Format, own: Mapping[str, TensorSpec]) -> LayerSize:
    """One packed Linear, from its own tensors."""
    main = own.get("weight")
    if main is None or len(main.shape) < 2:
        raise CheckpointError(
            f"{name}.weight is missing or not packed, config.json expects {format.summary}: copy again"
        )
    out = main.shape[-2]
    for mismatch in weight_mismatches(name, format, out, own):
        raise CheckpointError(f"{mismatch}: copy the checkpoint again, or compress again")
    parts: dict[str, int] = {}
    budget: dict[BudgetKind, int] = {}
    for place in format.parts:
        for suffix in place.part.tensors(out):
            stored = place.prefix + suffix
            count, part = own[stored].nbytes, stored.removeprefix("weight").strip("_0123456789") or "codes"
            kind = place.part.budget.get(suffix, "other parts")
            parts[part] = parts.get(part, 0) + count
            budget[kind] = budget.get(kind, 0) + count
    return LayerSize(name, (out, format.in_features), format.summary, parts, budget, format.claimed_bits)


def _kind(name: str, shape: tuple[int, ...], vocabulary: int | None) -> str:
    """Which of KINDS a tensor that is not packed belongs to."""
    if len(shape) < 2 or name.endswith("bias"):
        return "norms and other"
    if is_in_block(name):
        return "unquantized linears"
    if vocabulary and max(shape) >= vocabulary and re.search(r"head|out", name):
        return "head"
    if (vocabulary and max(shape) >= vocabulary) or re.search(r"emb|wpe|wte|pos", name):
        return "embeddings"
    return "unquantized linears"
