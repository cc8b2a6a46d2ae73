"""How a gradient passes through a sign. Forward is always the sign itself, +1 for zero; backward is the derivative of a
surrogate f of z = x / unit, with one unit a row:

    b = sign(x),   db/dx = f'(x / unit) / unit

The papers' constants are for weights of about [-1, 1]; language models' are a hundred times smaller, where a clip at 1
never clips and ReSTE's guard covers every weight. The unit, mean |x| of the row (for BiPer a quantile), brings them
there. It also makes a b with a ~ unit pass a gradient of f'(z), near the identity, whatever the size of the weights.

Adam divides a slowly changing factor out of each weight's gradient again, so estimators differ less than in the papers,
which use SGD: through exact zeros, changes of sign (BiPer), and the schedule (ReSTE).
"""

from __future__ import annotations

import math
from typing import Any, Literal, Protocol

import torch
from pydantic import Field
from torch import Tensor

from ultralowbit.kernels.signs import step
from ultralowbit.methods.base import MIN_SCALE, fields


class Estimator(Protocol):
    """A surrogate of the sign: a frozen dataclass whose fields are the recipe's keys, with the paper's values."""

    def unit(self, x: Tensor, keep: Tensor | None = None) -> Tensor:
        """x [rows, columns] -> [rows, 1] > 0, what z is measured in; `keep` [rows, columns] marks the x that count."""
        ...

    def slope(self, z: Tensor, progress: float) -> Tensor:
        """f'(z), a new tensor in z's shape. `progress` is the share of training done, 0 to 1."""
        ...

    def surrogate(self, z: Tensor, progress: float) -> Tensor:
        """f(z), of which `slope` is the derivative."""
        ...


class _MeanUnit:
    def unit(self, x: Tensor, keep: Tensor | None = None) -> Tensor:
        x = x.detach().abs()
        if keep is None:
            return x.mean(1, keepdim=True).clamp_min_(MIN_SCALE)
        return ((x * keep).sum(1, keepdim=True) / keep.sum(1, keepdim=True).clamp_min(1)).clamp_min_(MIN_SCALE)


@fields
class STE(_MeanUnit):
    """The straight-through estimator: f(z) = z. Bengio, Léonard, Courville 2013, arXiv 1308.3432."""

    kind: Literal["ste"] = "ste"

    def slope(self, z: Tensor, progress: float) -> Tensor:
        return torch.ones_like(z)

    def surrogate(self, z: Tensor, progress: float) -> Tensor:
        return z


@fields
class Clip(_MeanUnit):
    """f(z) = min(max(z, -t), t): weights far from zero are left alone. Binarized Neural Networks, Hubara et al. 2016,
    arXiv 1602.02830, where t = 1."""

    kind: Literal["clip"] = "clip"
    t: float = Field(1.0, gt=0)

    def slope(self, z: Tensor, progress: float) -> Tensor:
        return (z.abs() <= self.t).to(z.dtype)

    def surrogate(self, z: Tensor, progress: float) -> Tensor:
        return z.clamp(-self.t, self.t)


@fields
class ReSTE(_MeanUnit):
    """f(z) = sign(z) |z|^(1/o), from the identity (o = 1) towards the sign (o = `o_end`) on
    o(p) = 1 + (1 - cos(pi p / 2)) (o_end - 1). Wu et al.: Estimator Meets Equilibrium Perspective, ICCV 2023,
    arXiv 2308.06689.

    Guards, from the code: for |z| <= m the slope is that of the chord, f(m) / m, in place of the infinite one at zero;
    for |z| > t it is 0.
    """

    kind: Literal["reste"] = "reste"
    o_end: float = Field(3.0, ge=1)
    m: float = Field(0.1, gt=0)
    t: float = Field(1.5, gt=0)

    def power(self, progress: float) -> float:
        """o at this share of the training."""
        return 1 + (1 - math.cos(math.pi * progress / 2)) * (self.o_end - 1)

    def slope(self, z: Tensor, progress: float) -> Tensor:
        o = self.power(progress)
        z = z.abs()
        slope = z.clamp_min(self.m).pow_((1 - o) / o).div_(o)
        return slope.masked_fill_(z <= self.m, self.m ** (1 / o - 1)).masked_fill_(z > self.t, 0)

    def surrogate(self, z: Tensor, progress: float) -> Tensor:
        o = self.power(progress)
        size = z.abs().clamp_max(self.t)
        size = torch.where(size <= self.m, size * self.m ** (1 / o - 1), size ** (1 / o))
        return size.copysign(z)


@fields
class BiPer:
    """f(z) = sin z up to |z| = pi, then falling on: past the crest a weight is pulled back to it. Vargas et al.: BiPer:
    Binary Neural Networks using a Periodic Function, CVPR 2024, arXiv 2404.01278.

    omega = 1 / unit = (pi / 2) / q, with q a quantile of |x| in the row: the crest is there, and signs of a trained
    model's weights are not scrambled as by the paper's omega = 20. The forward sign is that of x, which is that of
    sin(omega x) for all |x| < 2 q, where the falling branch ends.
    """

    kind: Literal["biper"] = "biper"
    quantile: float = Field(0.95, gt=0, le=1)

    def unit(self, x: Tensor, keep: Tensor | None = None) -> Tensor:
        x = x.detach().abs()
        count = torch.full_like(x[:, :1], x.shape[1]) if keep is None else keep.sum(1, keepdim=True).to(x.dtype)
        x = x if keep is None else x.masked_fill(~keep, torch.inf)  # the others come last
        rank = (count * self.quantile).ceil().clamp_(1).long() - 1
        q = x.sort(dim=1).values.gather(1, rank)
        return (q.where(count > 0, 0) / (math.pi / 2)).clamp_min_(MIN_SCALE)

    def slope(self, z: Tensor, progress: float) -> Tensor:
        return z.clamp(-math.pi, math.pi).cos_()

    def surrogate(self, z: Tensor, progress: float) -> Tensor:
        inside = z.clamp(-math.pi, math.pi)
        return inside.sin() + inside - z


ESTIMATORS: dict[str, type[Estimator]] = {"ste": STE, "clip": Clip, "reste": ReSTE, "biper": BiPer}
"""By the `kind` that a recipe names."""


class _Step(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, unit: Tensor, estimator: Estimator, progress: float, low: float, bits: Tensor | None
    ) -> Tensor:
        ctx.estimator, ctx.progress, ctx.height = estimator, progress, (1 - low) / 2
        # the straight-through gradient does not depend on x: a tensor as large as the weight is not kept for it
        ctx.save_for_backward(unit, *([] if isinstance(estimator, STE) else [x]))
        return step(x, low) if bits is None else bits.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        unit, *rest = ctx.saved_tensors
        if rest:
            grad = ctx.estimator.slope(rest[0] / unit, ctx.progress).mul_(grad)
        return grad * (ctx.height / unit), None, None, None, None, None


def binarize(
    x: Tensor, unit: Tensor, estimator: Estimator, progress: float = 0.0, low: float = -1.0, bits: Tensor | None = None
) -> Tensor:
    """1 where x [rows, ...] is not negative and `low` elsewhere, in x's dtype: signs, or with low = 0 the step H(x) =
    (sign(x) + 1) / 2, with the estimator's gradient to x. bits: the values, where these are not those of x alone.

    unit: of the estimator, broadcastable to x; it gets no gradient.
    """
    return _Step.apply(x, unit, estimator, progress, low, bits)
