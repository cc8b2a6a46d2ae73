"""Integer codes on a trained grid."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch
from torch import Tensor, nn

from ultralowbit.format.ints import Ints
from ultralowbit.format.words import to_scale
from ultralowbit.kernels.signs import grouped
from ultralowbit.methods.base import MIN_SCALE
from ultralowbit.training.fake_quant.rounding import (
    RoundSTE,
    StoreFp16,
    decoded,
    moved_to_code,
    own_tensors,
    register,
    ungrouped,
)


class FakeQuantInts(nn.Module):
    """Integer codes on a trained grid: `scale` [out, groups]; the codes are fixed, or those of the latent weight."""

    def __init__(
        self,
        segment: Ints,
        parts: Mapping[str, Tensor],
        train: Collection[str],
        latent: Tensor | None,
        dtype: torch.dtype,
    ) -> None:
        super().__init__()
        self.segment = segment
        register(self, "scale", parts["_scale"].float().T, "scale" in train)
        middle = torch.full_like(self.scale.detach(), 2 ** (segment.bits - 1))
        self.register_buffer("zero", middle if segment.symmetric else segment.unpack_zero(parts["_zero"]).T.float())
        unscaled = {**parts, "_scale": torch.ones_like(parts["_scale"])}
        centred = grouped(decoded(segment, unscaled), segment.group)  # code - zero [out, groups, group]
        self.register_buffer("centred", centred.to(torch.int16) if latent is None else None)
        if latent is not None:

            def coded(latent: Tensor) -> Tensor:
                same = self._nearest(own_tensors(self), latent, self.scale.detach()) == centred
                return ungrouped(same, segment.columns)

            register(self, "latent", moved_to_code(latent, decoded(segment, parts), coded, dtype), True)

    @property
    def distance(self) -> float:
        """Of neighbouring levels, in the mean."""
        return self.scale.detach().mean().item()

    def _nearest(self, own: Mapping[str, Tensor], latent: Tensor, scale: Tensor) -> Tensor:
        """code - zero of the nearest code [rows, groups, group]."""
        code = RoundSTE.apply(grouped(latent.float(), self.segment.group) / scale[..., None])
        low = -own["zero"][..., None]
        return code.clamp(low, low + (2**self.segment.bits - 1))

    def _current(self, own: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """code - zero [rows, groups, group], and the scale [rows, groups] as it is stored."""
        scale = StoreFp16.apply(own["scale"], MIN_SCALE)
        return own["centred"] if "centred" in own else self._nearest(own, own["latent"], scale), scale

    def weight(self, own: Mapping[str, Tensor], row: Tensor | None, progress: float) -> Tensor:
        centred, scale = self._current(own)
        return ungrouped(centred * scale[..., None], self.segment.columns)

    def parts(self, own: Mapping[str, Tensor], row: Tensor | None, progress: float) -> dict[str, Tensor]:
        centred, scale = self._current(own)
        codes = ungrouped(centred + own["zero"][..., None], self.segment.columns).to(torch.uint8)
        zero = {} if self.segment.symmetric else {"zero": own["zero"]}
        return {"codes": codes, "scale": to_scale(scale), **zero}
