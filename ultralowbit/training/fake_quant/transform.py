"""The input transform of a fake-quantized weight."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ultralowbit.format.ints import Ints
from ultralowbit.format.planes import Planes
from ultralowbit.format.weight import PackedWeight
from ultralowbit.format.words import to_scale
from ultralowbit.kernels.hadamard import block_hadamard
from ultralowbit.training.fake_quant.rounding import Permute, StoreFp16, register


class FakeQuantTransform(nn.Module):
    """What the input transform makes of a weight; all rows share its tensors, each None where the transform has no such
    part: `column` [in] factors as they are stored or trained, `fixed` and `trained` what those are that are not trained
    and which are, `order` and `inverse` of the columns."""

    def __init__(self, packed: PackedWeight, train: bool) -> None:
        super().__init__()
        self.transform = transform = packed.format.transform
        parts = {s: packed.tensors[f"weight_input{s}"] for s in (transform.tensors(1) if transform else ())}
        order = transform.order(parts) if "_channel_order" in parts else None
        self.register_buffer("order", order)
        self.register_buffer("inverse", None if order is None else order.argsort())
        segments = packed.format.segments
        # Ints beside planes are not trained, so neither are the factors of their columns
        kind = next((kind for kind in (Planes, Ints) if any(isinstance(s, kind) for s in segments)), ())
        trained = torch.cat([torch.full((s.columns,), isinstance(s, kind), dtype=torch.bool) for s in segments])
        column = parts["_scale"].float() if "_scale" in parts else None
        train = train and column is not None and bool(trained.any())
        register(self, "column", column, train)
        self.register_buffer("fixed", column if train else None)
        self.register_buffer("trained", trained.to(column.device) if train else None)

    @property
    def block(self) -> int:
        """Of the Hadamard matrix, 0 where there is none."""
        return (self.transform and self.transform.hadamard) or 0

    @property
    def only_turns(self) -> bool:
        """Whether the Hadamard matrix is all that the transform may have."""
        return self.order is None and self.column is None

    def turned(self, rows: Tensor) -> Tensor:
        """Rows [..., in] times the Hadamard matrix, which is its own inverse."""
        return block_hadamard(rows, self.block) if self.block else rows

    def stored(self, weight: Tensor) -> Tensor:
        """A weight [out, in] that multiplies x, in the columns that are stored."""
        weight = self.turned(weight)
        if self.order is not None:
            weight = weight[:, self.order]
        if self.column is not None:
            weight = weight / self.column.detach().where(self.column != 0, 1)
        return weight

    def weight(self, own: Mapping[str, Tensor], weight: Tensor) -> Tensor:
        """Some rows of what is stored, as they multiply x once it is `turned`: beside that, the inverse."""
        if "column" in own:
            weight = weight * self._column(own)
        if "order" in own:
            weight = Permute.apply(weight, own["inverse"], own["order"])
        return weight

    def _column(self, own: Mapping[str, Tensor]) -> Tensor:
        column = StoreFp16.apply(own["column"], None)
        return torch.where(own["trained"], column, own["fixed"]) if "trained" in own else column

    def parts(self, own: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What is stored otherwise than before."""
        return {"_scale": to_scale(self._column(own)).half()} if "trained" in own else {}
