"""Sign planes of a latent weight: what end-to-end and block-wise training make a weight of at every step.

    b = argmin |w - c - sum_p a_p b_p| over all signs,   W = (sum_p a'_p b_p + c') H

with w [out, in], one of each a, a', c, c' for each row, group of columns (and plane); halfway between two levels the
higher one counts. a' and c' are a and c as they are stored; H is a block Hadamard matrix, or none. Where scales fall so
fast that a_p >= a_p+1 + a_p+2 + ..., each b_p is the sign of what the planes before it leave, x_p; the levels of three
and more planes that were fitted to a layer are often closer together. The gradient is that of such signs all the same,

    x_0 = w - c,   x_p+1 = x_p - a_p b_p,   db_p / dx_p = 1 / u_p

with one unit u_p a row; a, c and u are constants to it. So with G = (dL / dW) H

    dL / da'_p = sum G b_p,   dL / dc' = sum G        over the columns of a group
    dL / dw    = s G,   s = s_0,   s_p = (a'_p - a_p s_p+1) / u_p + s_p+1,   s_P = 0

where the signs have gone from the gradient of w: it takes one factor a group.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ultralowbit.kernels import cpu
from ultralowbit.kernels.hadamard import block_hadamard


class Signs(NamedTuple):
    """scale a [out, planes, groups]; centre c [out, groups], or None for 0; `group` columns each, the last ones fewer;
    `block` of the Hadamard matrix, 0 for none."""

    scale: Tensor
    centre: Tensor | None
    group: int
    block: int


def nearest_signs(
    latent: Tensor, stored: Tensor, offset: Tensor | None, units: Tensor, signs: Signs, dtype: torch.dtype
) -> Tensor:
    """W [out, in] in `dtype`, computed in fp32, for w [out, in] in fp32 or bf16, a' [out, planes, groups], c' [out,
    groups] or None, u [out, planes, 1]. Differentiable in w, a' and c'."""
    return _NearestSigns.apply(latent, stored, offset, units, signs, dtype)


class _NearestSigns(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        latent: Tensor,
        stored: Tensor,
        offset: Tensor | None,
        units: Tensor,
        signs: Signs,
        dtype: torch.dtype,
    ) -> Tensor:
        scale, centre, *ctx.layout = signs
        ctx.save_for_backward(latent, stored, offset, units, scale, centre)
        return weight(latent, stored, offset, signs, dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        latent, stored, offset, units, scale, centre = ctx.saved_tensors
        signs = Signs(scale, centre, *ctx.layout)
        own, sums = gradients(grad, latent, slope(stored, units, scale), offset is not None, signs)
        planes = stored.shape[1]
        return own, sums[:, :planes], None if offset is None else sums[:, planes], None, None, None


def slope(stored: Tensor, units: Tensor, scale: Tensor) -> Tensor:
    """s [out, groups], from a', u and a."""
    s = torch.zeros_like(stored[:, 0])
    for p in reversed(range(stored.shape[1])):
        s = (stored[:, p] - scale[:, p] * s) / units[:, p] + s
    return s


def weight(latent: Tensor, stored: Tensor, offset: Tensor | None, signs: Signs, dtype: torch.dtype) -> Tensor:
    """W [out, in]."""
    if latent.device.type == "cpu" and cpu.runs_here():
        return cpu.nearest_signs(latent, stored, offset, signs, dtype)
    return weight_ref(latent, stored, offset, signs, dtype)


def gradients(grad: Tensor, latent: Tensor, s: Tensor, with_offset: bool, signs: Signs) -> tuple[Tensor, Tensor]:
    """dL / dw [out, in] in w's dtype; dL / da' and, with an offset, dL / dc', [out, planes (+ 1), groups]."""
    if latent.device.type == "cpu" and cpu.runs_here():
        return cpu.nearest_signs_gradients(grad, latent, s, with_offset, signs)
    return gradients_ref(grad, latent, s, with_offset, signs)


def weight_ref(latent: Tensor, stored: Tensor, offset: Tensor | None, signs: Signs, dtype: torch.dtype) -> Tensor:
    """`weight` in torch, which says what it is."""
    W = None
    for b, a in zip(_bits(latent, signs), stored.unbind(1), strict=True):
        plane = b * a[..., None]
        W = plane if W is None else W.add_(plane)
    if offset is not None:
        W = W.add_(offset[..., None])
    W = W.flatten(1)[:, : latent.shape[1]]
    return (block_hadamard(W, signs.block) if signs.block else W).to(dtype)


def gradients_ref(grad: Tensor, latent: Tensor, s: Tensor, with_offset: bool, signs: Signs) -> tuple[Tensor, Tensor]:
    """`gradients` in torch."""
    G = block_hadamard(grad.float(), signs.block) if signs.block else grad.float()
    G = grouped(G, signs.group)
    sums = [(G * b).sum(-1) for b in _bits(latent, signs)] + [G.sum(-1)] * with_offset
    return (G * s[..., None]).flatten(1)[:, : latent.shape[1]].to(latent.dtype), torch.stack(sums, 1)


def _bits(latent: Tensor, signs: Signs) -> list[Tensor]:
    """b_p [out, groups, group] of each plane."""
    x = grouped(latent.float(), signs.group)
    return nearest_bits(x if signs.centre is None else x - signs.centre[..., None], signs.scale)


def nearest_bits(x: Tensor, scale: Tensor) -> list[Tensor]:
    """b_p [rows, groups, group] of each plane for x [rows, groups, group] and a [rows, planes, groups]."""
    planes = scale.shape[1]
    levels = torch.zeros_like(scale[:, 0, :, None])  # [rows, groups, 2^planes], by codes whose first plane is highest
    for a in scale.unbind(1):
        levels = torch.stack([levels - a[..., None], levels + a[..., None]], dim=-1).flatten(-2)
    levels, codes = levels.sort(dim=-1, stable=True)
    middles, codes = (levels[..., 1:] + levels[..., :-1]) * 0.5, codes.to(torch.uint8)
    code = codes[..., :1].expand(x.shape)
    for j, change in enumerate((codes[..., 1:] ^ codes[..., :-1]).unbind(-1)):
        code = code ^ (x >= middles[..., j, None]).to(torch.uint8).mul_(change[..., None])
    return [((code >> p) & 1).to(x.dtype).mul_(2).sub_(1) for p in reversed(range(planes))]


def step(x: Tensor, low: float = -1.0) -> Tensor:
    """1 where x is not negative and `low` elsewhere, in x's dtype, without a gradient."""
    b = torch.ge(x.detach(), 0, out=torch.empty_like(x))  # `where` takes thirty times as long on a CPU
    return b.mul_(1 - low).add_(low) if low else b


def grouped(x: Tensor, group: int | None) -> Tensor:
    """x [rows, columns] -> [rows, groups, group], the last group filled up with zeros; None: one group."""
    group = group or x.shape[1]
    rest = -x.shape[1] % group
    return (F.pad(x, (0, rest)) if rest else x).unflatten(1, (-1, group))
