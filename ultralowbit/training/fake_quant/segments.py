"""How each kind of segment is fake-quantized: a line in `FAKE_QUANT`. A segment that has none is not trained."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from ultralowbit.errors import InputError
from ultralowbit.format.ints import Ints
from ultralowbit.format.planes import Planes
from ultralowbit.format.segment import Segment
from ultralowbit.training.estimators import Estimator
from ultralowbit.training.fake_quant.ints import FakeQuantInts
from ultralowbit.training.fake_quant.latent import LatentDual, LatentSigns, is_dual
from ultralowbit.training.fake_quant.planes import FixedPlanes
from ultralowbit.training.fake_quant.rounding import decoded

Scales = Literal["free", "analytic"]


@dataclass(frozen=True)
class Start:
    """What the training of a segment starts from, beside its stored tensors."""

    train: Collection[str]
    """Which of `KINDS` are trained."""
    latent: Tensor | None
    """The original weight [out, columns]."""
    keep: Tensor | None
    """Which weights are no outliers [out, columns] bool; None without outliers."""
    estimator: Estimator
    scales: Scales
    beside_planes: bool
    """Whether there are planes in the same row."""
    dtype: torch.dtype
    """Of trained latent weights."""


class Frozen(nn.Module):
    """Columns [out, columns] that are not trained."""

    def __init__(self, values: Tensor) -> None:
        super().__init__()
        self.register_buffer("values", values)

    def weight(self, own: Mapping[str, Tensor], row: Tensor | None, progress: float) -> Tensor:
        return own["values"]

    def parts(self, own: Mapping[str, Tensor], row: Tensor | None, progress: float) -> dict[str, Tensor]:
        return {}


def _planes(segment: Planes, parts: Mapping[str, Tensor], start: Start) -> nn.Module:
    trained = start.latent is not None and "latent" in start.train
    signs = segment.alphabet == "pm1" and trained
    if start.scales == "analytic" and not signs:
        raise InputError(f"analytic scales need -1/+1 planes with a trained latent weight, found {segment.summary}")
    if signs:
        beside = start.train, start.latent, start.keep, start.estimator, start.dtype
        return LatentSigns(segment, parts, *beside, start.scales == "analytic")
    if start.latent is not None and is_dual(segment):
        return LatentDual(segment, parts, start.train, start.latent, start.keep, start.estimator, start.dtype)
    return FixedPlanes(segment, parts, start.train)


def _ints(segment: Ints, parts: Mapping[str, Tensor], start: Start) -> nn.Module:
    if start.beside_planes:  # salient columns, which stay as they are
        return Frozen(decoded(segment, parts))
    return FakeQuantInts(segment, parts, start.train, start.latent if "latent" in start.train else None, start.dtype)


FAKE_QUANT: dict[str, Callable[[Segment, Mapping[str, Tensor], Start], nn.Module]] = {
    Planes.kind: _planes,
    Ints.kind: _ints,
}
"""Kind of a segment -> what makes the module of one, from the segment, its stored tensors by suffix, and the start.

A module has two methods, of some rows of its own tensors by name, of the factor of these rows, and of the share of
training done: `weight` returns them [rows, columns] fp32, and `parts` what the segment's `encode` takes."""


def fake_quant(segment: Segment, parts: Mapping[str, Tensor], start: Start) -> nn.Module:
    """The module that stands for a segment's stored tensors (by suffix) while it is trained."""
    build = FAKE_QUANT.get(segment.kind)
    return Frozen(decoded(segment, parts)) if build is None else build(segment, parts, start)
