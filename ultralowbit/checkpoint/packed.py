"""Packed weights among the tensors of a file: each under the name of its module."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ultralowbit.format.weight import Format, PackedWeight


def named_tensors(packed: Mapping[str, PackedWeight]) -> dict[str, Tensor]:
    """The tensors of packed weights by their names in a file, `model.layers.0.mlp.up_proj.weight_scale`; on the CPU."""
    return {f"{name}.{part}": tensor.cpu() for name, p in packed.items() for part, tensor in p.tensors.items()}


def packed_weight(name: str, entry: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> PackedWeight:
    """One of them again, from its entry in the manifest: `layout` and `shape`."""
    format, shape = Format.from_dict(entry["layout"]), tuple(entry["shape"])
    return PackedWeight(format, shape, {part: tensors[f"{name}.{part}"] for part in format.row_axes})
