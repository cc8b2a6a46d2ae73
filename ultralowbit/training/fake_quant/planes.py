"""Planes with fixed bits and trained scales."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import torch
from torch import Tensor, nn

from ultralowbit.format.planes import Planes
from ultralowbit.format.words import to_scale, unpack_fields
from ultralowbit.kernels.signs import grouped
from ultralowbit.training.fake_quant.rounding import register, stored_scale, ungrouped


class FixedPlanes(nn.Module):
    """Sign planes with fixed bits: `bits` [out, planes, groups, group] int8 as their values; `scale` [out, planes,
    groups] and `offset` [out, groups], without the factor of the row.

    Its methods take some rows of its own tensors, by name, and of the rows' factor.
    """

    def __init__(self, segment: Planes, parts: Mapping[str, Tensor], train: Collection[str]) -> None:
        super().__init__()
        self.segment = segment
        register(self, "scale", parts["_scale"].float().permute(2, 0, 1), "scale" in train)
        register(self, "offset", parts["_offset"].float().T if segment.offset else None, "offset" in train)
        bits = [grouped(self._unpack(words), segment.group) for words in parts[""]]
        self.register_buffer("bits", torch.stack(bits, dim=1))

    def _unpack(self, words: Tensor) -> Tensor:
        bits = unpack_fields(words, 1, self.segment.columns).to(torch.int8)
        return bits if self.segment.alphabet == "01" else bits.mul_(2).sub_(1)

    def codes(self, own: Mapping[str, Tensor], progress: float) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
        """Of each plane the bits [rows, groups, group] as their values, and the scale [rows, groups]."""
        return own["bits"].unbind(1), own["scale"].unbind(1)

    def weight(self, own: Mapping[str, Tensor], row: Tensor | None, progress: float) -> Tensor:
        """The weight [rows, columns]."""
        weight = None
        for bits, scale in zip(*self.codes(own, progress), strict=True):
            plane = bits * stored_scale(scale, row)[..., None]
            weight = plane if weight is None else weight.add_(plane)
        if self.segment.offset:
            weight = weight.add_(stored_scale(own["offset"], row)[..., None])
        return ungrouped(weight, self.segment.columns)

    def parts(self, own: Mapping[str, Tensor], row: Tensor | None, progress: float) -> dict[str, Tensor]:
        """What `Planes.encode` takes, of these rows."""
        bits, scales = self.codes(own, progress)
        parts = {
            "bits": torch.stack([self._set(b, own) for b in bits]),
            "scale": torch.stack([to_scale(stored_scale(s, row)) for s in scales]),
        }
        return parts | ({"offset": to_scale(stored_scale(own["offset"], row))} if self.segment.offset else {})

    def _set(self, bits: Tensor, own: Mapping[str, Tensor]) -> Tensor:
        """Which bits [rows, columns] are stored as 1."""
        return ungrouped(bits > 0, self.segment.columns)
