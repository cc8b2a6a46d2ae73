"""Refinement after GPTQ, of sign planes and integer codes: scales and codes, alternately, against the whole error.

GPTQ fixes column after column and never looks back. From where it ends,

    E(Q) = tr((W - Q) H (W - Q)^T)

falls further by two exact steps, in turn (our own composition; the steps are those of Alternating Multi-bit
Quantization, arXiv 1802.00150, with the layer's H in place of the identity):

    scales   all K G scales a of a row at once: A a = b, A = V H V^T, b = V H w, where row (g, p) of V [G K, in] is
             what scale p of group g multiplies in its columns, a plane or the integers code - zero, and 0 elsewhere;
    codes    column by column, for all rows: the level nearest to q_j + [(W - Q) H]_j / H_jj, the minimum over q_j.

Neither can raise E, but for the rounding of scales to fp16: rows where it would keep what they have. The order of the
columns does not matter here (measured: 0.2 % of E), that of GPTQ before it does.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from ultralowbit.format.words import to_scale

_BLOCK = 16
"""Columns whose changes reach the later ones in one product."""
_ROWS = 256
"""Rows of the weight whose scales are fitted at a time: what they need stays in a core's cache."""
_SYSTEM = 1 << 24
"""Entries of the rows' least-squares systems that are in memory at a time."""


class Levels(Protocol):
    """The values that the codes of a group stand for."""

    def nearest(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """weight [..., out] -> (codes, values) of the nearest."""
        ...

    def values(self, weight: Tensor) -> Tensor:
        """The values alone."""
        ...


class Refinable(Protocol):
    """A rounding whose values are sums of K scales times what the codes say."""

    group: int | None
    scale: Tensor
    """[groups, K, out], or [groups, out] for K = 1."""

    def multiples(self, g: int, codes: Tensor, rows: slice) -> list[Tensor]:
        """What each of the K scales multiplies in some rows of the weight, fp32, for codes [columns, rows]."""
        ...

    def levels(self, g: int, scale: Tensor, rows: slice) -> Levels:
        """The levels of group g in some rows of the weight for scales [K, rows]."""
        ...

    def ordered(self, scale: Tensor) -> Tensor:
        """Scales [groups, K, rows] that leave the same levels, or the nearest that may be stored."""
        ...


def refine(weight: Tensor, rounding: Refinable, codes: Tensor, hessian: Tensor, damp: float, rounds: int) -> Tensor:
    """Refine the codes [out, in] uint8 and the scales of `rounding`, which are replaced, for a weight [out, in] and the
    hessian [in, in] of its inputs, damped by `damp` of its mean diagonal; returns the codes."""
    H = hessian.clone()
    H.diagonal().add_(damp * H.diagonal().mean())
    fit = _Fit(weight, rounding, codes, H)
    for _ in range(rounds):
        fit.fit_scales()
        fit.fit_codes()
    fit.fit_scales()
    rounding.scale = fit.scale.view_as(rounding.scale)
    return torch.cat(fit.codes()).T.to(torch.uint8)


class _Fit:
    """The values Q of a weight W and what the rest of it puts out; a column of the weight is a row here.

    W, Q, HW = H W and G = H (W - Q) are [in, out]; scale [groups, K, out] is ordered, so that the codes follow from Q
    alone.
    """

    def __init__(self, weight: Tensor, rounding: Refinable, codes: Tensor, H: Tensor) -> None:
        self.rounding, self.H, self.HW = rounding, H, H @ weight.T
        self.G = torch.empty_like(self.HW)
        self.scale = rounding.scale.view(len(rounding.scale), -1, len(weight)).clone()
        width = rounding.group or len(H)
        self.groups = [slice(start, min(start + width, len(H))) for start in range(0, len(H), width)]
        self.Q = torch.empty_like(self.HW)
        for g, (columns, scale) in enumerate(zip(self.groups, self.scale, strict=True)):
            multiples = rounding.multiples(g, codes.T[columns], slice(None))
            self.Q[columns] = sum(plane * a for plane, a in zip(multiples, scale, strict=True))

    def codes(self, rows: slice = slice(None)) -> list[Tensor]:
        """Of each group [columns, rows] uint8."""
        return [
            self.rounding.levels(g, scale[:, rows], rows).nearest(self.Q[columns, rows])[0]
            for g, (columns, scale) in enumerate(zip(self.groups, self.scale, strict=True))
        ]

    def fit_scales(self) -> None:
        """The joint least squares, a few rows of the weight at a time."""
        unknowns = self.scale.shape[0] * self.scale.shape[1]
        step = max(1, min(_ROWS, _SYSTEM // unknowns**2))
        for start in range(0, self.Q.shape[1], step):
            self._fit_scales(slice(start, start + step))

    def _fit_scales(self, rows: slice) -> None:
        Q, G, HW, scale = self.Q[:, rows], self.G[:, rows], self.HW[:, rows], self.scale[..., rows]
        planes = [self.rounding.multiples(g, codes, rows) for g, codes in enumerate(self.codes(rows))]
        products = [self.H[:, c] @ plane for c, group in zip(self.groups, planes, strict=True) for plane in group]

        def by_group(values: Tensor) -> Tensor:  # [in, rows] -> V values [groups K, rows]
            pairs = zip(self.groups, planes, strict=True)
            return torch.stack([(plane * values[columns]).sum(0) for columns, group in pairs for plane in group])

        b = by_group(HW)
        A = torch.stack([by_group(product) for product in products], dim=-1).transpose(0, 1)
        # equal planes make A [rows, groups K, groups K] singular: the ridge then splits their scale
        ridge = (1e-6 * A.diagonal(dim1=1, dim2=2).mean(1)).clamp(min=torch.finfo(A.dtype).tiny)  # inputs may be dead
        solution = torch.linalg.solve(A + ridge[:, None, None] * torch.eye(len(b), dtype=A.dtype, device=A.device), b.T)
        solution = to_scale(solution.abs()).copysign(solution)  # [rows, groups K]
        held = scale.flatten(0, 1).T

        def error(s: Tensor) -> Tensor:  # [rows], but for what does not depend on s
            return ((A @ s[..., None])[..., 0] * s - 2 * b.T * s).sum(1)

        better = error(solution) < error(held)
        factors = torch.where(better[:, None], solution, held).T.contiguous()  # [groups K, rows]
        for columns, group, s in zip(self.groups, planes, factors.unflatten(0, scale.shape[:2]), strict=True):
            torch.mul(group[0], s[0], out=Q[columns])
            for plane, a in zip(group[1:], s[1:], strict=True):
                Q[columns].addcmul_(plane, a)
        G.copy_(HW)
        for product, s in zip(products, factors, strict=True):
            G.addcmul_(product, s, value=-1)
        scale.copy_(self.rounding.ordered(factors.unflatten(0, scale.shape[:2])))

    def fit_codes(self) -> None:
        """One pass of coordinate descent over the columns. `fit_scales` has made G, and makes it anew after it."""
        H, Q, G = self.H, self.Q, self.G
        levels = [self.rounding.levels(g, scale, slice(None)) for g, scale in enumerate(self.scale)]
        width = self.groups[0].stop
        inverse = H.diagonal().reciprocal().nan_to_num_(posinf=0).tolist()  # a column that nothing depends on stays
        for low in range(0, len(H), _BLOCK):
            block = slice(low, min(low + _BLOCK, len(H)))
            before = Q[block].clone()
            # H is symmetric: a contiguous row of the block is what a change of its column does to the block
            within, q, g = H[block, block].contiguous().unbind(), Q[block].unbind(), G[block]
            for j, row in enumerate(within, block.start):
                value = levels[j // width].values(torch.add(q[j - low], g[j - low], alpha=inverse[j]))
                g.addr_(row, q[j - low] - value)
                q[j - low].copy_(value)
            G[block.stop :].addmm_(H[block.stop :, block], Q[block] - before, alpha=-1)
