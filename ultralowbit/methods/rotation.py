"""Rotation of inputs: every input channel is spread over a block of them before the weight meets it.

Ashkboos et al.: QuaRot: Outlier-Free 4-Bit Inference in Rotated LLMs, NeurIPS 2024, arXiv 2404.00456. With R the
orthonormal, symmetric block Hadamard matrix, y = W x = (W R) (R x): the method quantizes W R against the Hessian of
R x, and the format multiplies inputs by R (`InputTransform.hadamard`), which stores nothing. Rows of W R are near
Gaussian, and no channel stands out. Random signs before R are left out: they bring nothing (measured: 0.5 % of the
error at two planes). Rotations that are folded into the weights instead are in `nn/folding.py`.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

from pydantic import Field

from ultralowbit.format.transform import InputTransform
from ultralowbit.format.weight import Format, PackedWeight
from ultralowbit.methods.base import fields

LARGEST = 512
"""Columns of a block, at most: larger ones take longer and bring nothing."""
SMALLEST = 32
"""Columns of a block that is worth it."""


@fields
class Rotate:
    """inputs: `online` multiplies the inputs of every packed Linear by a block Hadamard matrix where they enter it;
    `folded` rotates the residual stream and the values of each head within the weights, where the architecture allows
    that, at no cost when the model runs; `off` is as no `rotate` at all. others: what is done to inputs that no
    rotation can be folded into, those of down_proj or, where nothing can be folded, all: `online`, or `none`. tied: a
    head that is tied to the embedding gets a weight of its own with `untie`; with `keep` nothing is folded into such a
    model. seed: of the signs of folded rotations.
    """

    inputs: Literal["online", "folded"] = "online"
    others: Literal["online", "none"] = "online"
    tied: Literal["untie", "keep"] = "untie"
    seed: int = Field(0, ge=0, lt=2**31)

    def __post_init__(self) -> None:
        if self.inputs == "online" and self.others == "none":
            raise ValueError("others: none goes with inputs: folded; to rotate nothing, leave rotate out")

    def block(self, in_features: int) -> int | None:
        """Columns of a block: the largest power of two that divides `in_features`, up to 512. Where that is less than
        32 it is the largest that fits, and smaller blocks follow for the rest. None for a single column."""
        if in_features < 2:
            return None
        divides = min(LARGEST, in_features & -in_features)
        return divides if divides >= SMALLEST else min(LARGEST, 1 << in_features.bit_length() - 1)

    def about(self, in_features: int) -> str | None:
        """A sentence where no block of a size that is worth it divides so many inputs."""
        block = self.block(in_features)
        if block is None or in_features % block == 0:
            return None
        return (
            f"no Hadamard block of {SMALLEST} or more divides {in_features} inputs: they are rotated in blocks of "
            f"{block}, the last {in_features % block} in smaller ones"
        )


def rotated_format(format: Format, block: int) -> Format:
    """The format with its inputs multiplied by a block Hadamard matrix first; it stores the same tensors."""
    transform = format.transform or InputTransform(format.in_features, hadamard=block)
    return replace(format, transform=replace(transform, hadamard=block))


def rotated_weight(packed: PackedWeight, block: int) -> PackedWeight:
    """A weight that multiplies R x, as one that multiplies x."""
    return PackedWeight(rotated_format(packed.format, block), packed.shape, packed.tensors)
