"""Planes whose bits are the code of a latent weight."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import ClassVar

import torch
from torch import Tensor

from ultralowbit.format.planes import Planes
from ultralowbit.format.segment import Segment
from ultralowbit.kernels.signs import Signs, grouped, nearest_bits, nearest_signs, step
from ultralowbit.methods.base import MIN_SCALE
from ultralowbit.training.estimators import STE, Estimator, binarize
from ultralowbit.training.fake_quant.planes import FixedPlanes
from ultralowbit.training.fake_quant.rounding import (
    decoded,
    moved_to_code,
    own_tensors,
    register,
    stored_scale,
    ungrouped,
)


class LatentPlanes(FixedPlanes):
    """Planes whose bits are the code of a latent weight [out, columns]; `keep` marks what is not replaced."""

    low: ClassVar[float]  # the value of a bit that is not set

    def __init__(
        self,
        segment: Planes,
        parts: Mapping[str, Tensor],
        train: Collection[str],
        keep: Tensor | None,
        estimator: Estimator,
        dtype: torch.dtype,
    ) -> None:
        super().__init__(segment, parts, train)
        self.estimator, self.dtype = estimator, dtype
        rows = parts[""].shape[-2]
        if keep is None and segment.columns % (segment.group or segment.columns):
            # tells the weights from what fills up the last group
            keep = torch.ones(rows, segment.columns, dtype=torch.bool, device=parts[""].device)
        self.register_buffer("keep", None if keep is None else grouped(keep.to(torch.uint8), segment.group))

    def _follow(self, latent: Tensor, parts: Mapping[str, Tensor], train: bool, near: bool = True) -> None:
        """Take the latent weight in the place of the fixed bits, changed where those are not its own."""
        packed, self.bits = self.bits.unbind(1), None

        def coded(latent: Tensor) -> Tensor:
            bits, _ = self._derive({**own_tensors(self), "latent": latent}, self._hard)
            same = torch.stack([a == b for a, b in zip(bits, packed, strict=True)]).all(0)
            return ungrouped(same, self.segment.columns)

        register(self, "latent", moved_to_code(latent, decoded(self.segment, parts), coded, self.dtype, near), train)

    def _derive(
        self, own: Mapping[str, Tensor], sign: Callable[[int, Tensor, Tensor | None], Tensor]
    ) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
        """What `codes` returns; sign(p, x, bits) is the bits of plane p, those of x if none are given."""
        raise NotImplementedError

    def _unit(self, own: Mapping[str, Tensor], p: int) -> Tensor:
        """What the estimator measures the argument of plane p's sign in [rows, groups or 1, 1]."""
        raise NotImplementedError

    def codes(self, own: Mapping[str, Tensor], progress: float) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
        def sign(p: int, x: Tensor, bits: Tensor | None = None) -> Tensor:
            return binarize(x, self._unit(own, p), self.estimator, progress, self.low, bits)

        return self._derive(own, sign)

    def _hard(self, p: int, x: Tensor, bits: Tensor | None = None) -> Tensor:
        return step(x, self.low) if bits is None else bits

    @property
    def distance(self) -> float:
        """Of neighbouring levels, in the mean."""
        span = (1 - self.low) * self.scale.detach().abs().sum(1)  # [out, groups], from the lowest to the highest
        return span.mean().item() / (2**self.segment.planes - 1)

    def _centred(self, own: Mapping[str, Tensor]) -> Tensor:
        """The latent weight less the offset [rows, groups, group]."""
        x = grouped(own["latent"].float(), self.segment.group)
        return x - own["offset"].detach()[..., None] if self.segment.offset else x

    def _set(self, bits: Tensor, own: Mapping[str, Tensor]) -> Tensor:
        return super()._set(bits * own["keep"] if "keep" in own else bits, own)


class LatentSigns(LatentPlanes):
    """-1/+1 planes of a trained latent weight: the level nearest to it, or with analytic scales each plane the signs of
    what the ones before it leave. The estimator's `units` [out, planes, 1, 1] are those of the start."""

    low = -1.0

    def __init__(
        self,
        segment: Planes,
        parts: Mapping[str, Tensor],
        train: Collection[str],
        latent: Tensor,
        keep: Tensor | None,
        estimator: Estimator,
        dtype: torch.dtype,
        analytic: bool,
    ) -> None:
        super().__init__(segment, parts, {*train} - {"scale"} if analytic else train, keep, estimator, dtype)
        self.analytic = False  # which bits the packed scales give is what counts at first
        units: list[Tensor] = []

        def measure(p: int, x: Tensor, bits: Tensor | None) -> Tensor:
            units.append(estimator.unit(x.flatten(1), None if self.keep is None else self.keep.flatten(1).bool()))
            return self._hard(p, x, bits)

        with torch.no_grad():
            self._order()
            # many weights close to zero would make the mean of all too small
            self._follow(latent, parts, True, near=not analytic)
            self.analytic = analytic
            self._derive(own_tensors(self), measure)
        self.register_buffer("units", torch.stack(units, dim=1)[..., None])

    @property
    def has_kernels(self) -> bool:
        """Whether `dense` can be asked: scales are free, and gradients pass straight through."""
        return not self.analytic and isinstance(self.estimator, STE)

    def dense(self, row: Tensor | None, block: int, dtype: torch.dtype) -> Tensor:
        """`weight` of all rows in a dtype, times a block Hadamard matrix (0: none), by the kernels for that."""
        stored = stored_scale(self.scale, row)
        offset = stored_scale(self.offset, row) if self.segment.offset else None
        centre = self.offset.detach() if self.segment.offset else None
        signs = Signs(self.scale.detach(), centre, self.segment.group or self.segment.columns, block)
        return nearest_signs(self.latent, stored, offset, self.units[..., 0], signs, dtype)

    def _order(self) -> None:
        """Make the scales positive and falling from plane to plane, without another meaning: the gradient is that of
        planes which have what the ones before them leave."""
        negative = (self.scale < 0)[..., None]
        self.bits = self.bits * torch.where(negative, -1, 1).to(torch.int8)
        scale, order = self.scale.abs().sort(dim=1, descending=True, stable=True)
        self.scale.copy_(scale)
        self.bits = self.bits.gather(1, order[..., None].expand_as(self.bits))

    def _unit(self, own: Mapping[str, Tensor], p: int) -> Tensor:
        return own["units"][:, p]

    def _derive(
        self, own: Mapping[str, Tensor], sign: Callable[[int, Tensor, Tensor | None], Tensor]
    ) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
        x, bits, scales = self._centred(own), [], []
        chosen = [None] * self.segment.planes
        if not self.analytic:
            with torch.no_grad():
                chosen = nearest_bits(x, own["scale"])
        for p, given in enumerate(chosen):
            if p:
                x = x - bits[-1] * scales[-1].detach()[..., None]
            bits.append(sign(p, x, given))
            scales.append(self._mean(x, own.get("keep")) if self.analytic else own["scale"][:, p])
        return bits, scales

    @staticmethod
    def _mean(x: Tensor, keep: Tensor | None) -> Tensor:
        """Mean |x| of each group over the weights that are binarised."""
        size = x.detach().abs()
        return size.mean(-1) if keep is None else size.mul_(keep).sum(-1) / keep.sum(-1).clamp_min(1)


class LatentDual(LatentPlanes):
    """Two 0/1 planes whose four levels the latent weight is cut into: between a_2 and 0, 0 and a_1 + a_2, a_1 + a_2 and
    a_1. Groups with a_1 < a_2, whose longer tail is the negative one, follow the rule's mirror image."""

    low = 0.0

    def __init__(
        self,
        segment: Planes,
        parts: Mapping[str, Tensor],
        train: Collection[str],
        latent: Tensor,
        keep: Tensor | None,
        estimator: Estimator,
        dtype: torch.dtype,
    ) -> None:
        super().__init__(segment, parts, train, keep, estimator, dtype)
        mirrored = (self.scale[:, 0] < self.scale[:, 1])[..., None]  # [out, groups, 1]
        self.register_buffer("mirror", 1 - 2 * mirrored.float() if mirrored.any() else None)
        with torch.no_grad():
            self._follow(latent, parts, "latent" in train)

    def _unit(self, own: Mapping[str, Tensor], p: int) -> Tensor:
        # the range of the levels; with a steeper surrogate the thresholds outweigh the sum, and scales diverge
        a1, a2 = own["scale"].detach()[..., None].unbind(1)
        return (a1 - a2).abs_().clamp_min_(MIN_SCALE)

    def _derive(
        self, own: Mapping[str, Tensor], sign: Callable[[int, Tensor], Tensor]
    ) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
        def H(p: int, x: Tensor) -> Tensor:
            return sign(p, x * own["mirror"] if "mirror" in own else x)

        w = self._centred(own)
        a1, a2 = own["scale"][..., None].unbind(1)
        b1 = H(0, w - (a1 + a2) / 2)
        return [b1, H(1, a1 * b1 + a2 / 2 - w)], own["scale"].unbind(1)


def is_dual(segment: Segment) -> bool:
    """Whether these are the two 0/1 planes of DB-LLM's dual binarization."""
    return isinstance(segment, Planes) and segment.alphabet == "01" and segment.planes == 2
