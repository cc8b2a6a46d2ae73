"""Refinement of sign planes and integer codes against the whole error of a layer (our own composition).

GPTQ fixes column after column and never looks back. In the first round it searches within its blocks of columns, while
later ones can still make up for what is left (`compensate`). Scales that fit the weights alone are too small for what
compensation asks of the codes, and a search would settle for them: so they grow beforehand, by as much as GPTQ's codes
of a few rows ask for. Each further round goes on from there, with e = (W - Q) R, H = R R^T and E = |e|^2, and takes
two steps of Alternating Multi-bit Quantization (Xu et al., ICLR 2018, arXiv 1802.00150), with H for the identity:

    scales   all K G scales a of a row at once: least squares of e + sum_s (a_s - a'_s) v_s R over a'; v_s [in] is what
             scale s multiplies in its columns, a plane or the integers code - zero, and 0 elsewhere;
    codes    block B after block, for all rows: with g = e R^T and H_BB = S S^T, S upper triangular, other values q' of
             its columns change E by |e_B + (q - q')_B S|^2 - |e_B|^2, e_B = g_B S^-T. That is rounded and searched as
             the blocks of `compensate` are.

Neither can raise E, but for the rounding of scales to fp16: rows where it would keep what they have. The order of the
columns is that of GPTQ.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from ultralowbit.format.words import to_scale
from ultralowbit.methods.base import Rounding
from ultralowbit.methods.compensate import compensated, fit_groups, rounded, stored
from ultralowbit.methods.statistics import BLOCK, Factor

SWEEPS = 8
"""Over the columns of a block, at most: they stop where nothing changes any more. Four leave 0.7 % more of the error of
two planes, twelve 0.1 % less."""
SAMPLE = 16
"""Rows that tell how much scales grow. All rows, each for itself, leave 0.4 to 2 % less of the error of one plane and
nothing of two, and took a third of the time of two rounds."""
_ROWS = 256
"""Rows of the weight whose scales are fitted at a time: what they need stays in a core's cache."""
_PRODUCTS = 1 << 24
"""Entries of v_s R that are in memory at a time."""


class Refinable(Rounding, Protocol):
    """A rounding whose values are sums of K scales times what the codes say."""

    scale: Tensor
    """[groups, K, out], or [groups, out] for K = 1."""

    def of_rows(self, rows: Tensor) -> Refinable:
        """What this is for some rows of the weight, by their numbers."""
        ...

    def multiples(self, g: int, codes: Tensor, rows: slice) -> list[Tensor]:
        """What each of the K scales multiplies in some rows of the weight, fp32, for codes [columns, rows]."""
        ...

    def ordered(self, scale: Tensor) -> Tensor:
        """Scales [groups, K, rows] that leave the same levels, or the nearest that may be stored."""
        ...

    def rescale(self, scale: Tensor) -> None:
        """Take other scales [groups, K, out] in the place of all."""
        ...


def refine(weight: Tensor, rounding: Refinable, factor: Factor, rounds: int) -> Tensor:
    """Codes [out, in] uint8 of a weight [out, in] after `rounds` of refinement, 0 for none; fits the rounding."""
    if not rounds:
        return stored(compensated(weight, rounding, factor), factor)
    as_they_are = factor.order is not None or (rounding.group or len(factor.R)) >= len(factor.R)
    if as_they_are:  # else groups are fitted to what compensation has made of them by then
        fit_groups(weight, rounding, factor)
        scale = _by_group(rounding.scale) * _growth(weight, rounding, factor)
        rounding.rescale(rounding.ordered(to_scale(scale.abs()).copysign(scale)))
    fit = _packed(weight, rounding, factor, SWEEPS, not as_they_are)
    for _ in range(rounds - 1):
        fit.fit_scales()
        fit.fit_codes()
    return stored(fit.codes, factor)


def _packed(weight: Tensor, rounding: Refinable, factor: Factor, sweeps: int = 0, fit: bool = False) -> _Fit:
    """The weight packed by GPTQ, with the scales that there are unless they are to be fitted."""
    rest = torch.empty_like(weight.T, memory_format=torch.contiguous_format)
    return _Fit(rounding, compensated(weight, rounding, factor, sweeps, rest, fit), rest, factor)


def _growth(weight: Tensor, rounding: Refinable, factor: Factor) -> Tensor:
    """What GPTQ's codes make of fitted scales [groups, K, 1]: the median over some rows."""
    some = torch.arange(0, len(weight), -(-len(weight) // SAMPLE), device=weight.device)
    rounding = rounding.of_rows(some)
    before = rounding.scale.clone()
    _packed(weight[some], rounding, factor).fit_scales()
    growth = torch.where(before != 0, rounding.scale / before, 1.0)  # a plane may have nothing left in a short group
    return _by_group(growth).median(-1, keepdim=True).values


def _by_group(scale: Tensor) -> Tensor:
    """[groups, K, out] or [groups, out] -> [groups, K, out]."""
    return scale.view(len(scale), -1, scale.shape[-1])


class _Fit:
    """Codes [in, out] uint8 and e [in, out], columns of the weight in the order of rounding."""

    def __init__(self, rounding: Refinable, codes: Tensor, rest: Tensor, factor: Factor) -> None:
        self.rounding, self.codes, self.rest, self.factor = rounding, codes, rest, factor
        total = len(factor.R)
        self.places = torch.arange(total, device=codes.device) if factor.order is None else factor.order
        self.group = rounding.group or total
        groups = self.places // self.group
        self.columns = [(groups == g).nonzero()[:, 0] for g in range(len(rounding.scale))]  # of each group, rising
        ends = torch.arange(BLOCK, total + BLOCK, BLOCK, device=codes.device)
        self.above = [torch.searchsorted(columns, ends).tolist() for columns in self.columns]  # those before each end

    def fit_scales(self) -> None:
        """The joint least squares, a few rows of the weight at a time."""
        out = self.codes.shape[1]
        scale = _by_group(self.rounding.scale).clone()
        unknowns = scale.shape[0] * scale.shape[1]
        step = max(1, min(_ROWS, _PRODUCTS // (unknowns * max(unknowns, len(self.rest)))))
        for start in range(0, out, step):
            rows = slice(start, start + step)
            self._fit_scales(rows, scale[..., rows])
        self.rounding.rescale(self.rounding.ordered(scale))
        for g, columns in enumerate(self.columns):  # another order of scales changes what codes stand for
            self.codes[columns] = self.rounding.round(g, self._values(g, scale[g]))[0].to(torch.uint8)

    def _values(self, g: int, scale: Tensor) -> Tensor:
        """Of the codes of a group, with scales [K, out] or [out]."""
        multiples = self.rounding.multiples(g, self.codes[self.columns[g]], slice(None))
        return sum(plane * a for plane, a in zip(multiples, scale.view(len(multiples), -1), strict=True))

    def _fit_scales(self, rows: slice, scale: Tensor) -> None:
        """Replaces scale [groups, K, rows]."""
        rest = self.rest[:, rows].T.contiguous()  # [rows, in]: sums over a row are many times faster than over columns
        products = self._products(rows, scale.shape[1])  # [groups K, rows, in]
        b = torch.einsum("sri,ri->rs", products, rest)
        A = torch.einsum("sri,tri->rst", products, products)
        # equal planes make A [rows, groups K, groups K] singular: the ridge then splits their scale
        ridge = (1e-6 * A.diagonal(dim1=1, dim2=2).mean(1)).clamp(min=torch.finfo(A.dtype).tiny)  # inputs may be dead
        held = scale.flatten(0, 1).T  # [rows, groups K]
        change = torch.linalg.solve(A + ridge[:, None, None] * torch.eye(A.shape[1], dtype=A.dtype, device=A.device), b)
        wanted = held + change
        wanted = to_scale(wanted.abs()).copysign(wanted)
        change = wanted - held
        gain = ((2 * b - (A @ change[..., None])[..., 0]) * change).sum(1, keepdim=True)  # [rows, 1], what E falls by
        rest -= torch.einsum("sri,rs->ri", products, torch.where(gain > 0, change, 0))
        self.rest[:, rows] = rest.T
        scale.copy_(torch.where(gain > 0, wanted, held).T.unflatten(0, scale.shape[:2]))

    def _products(self, rows: slice, planes: int) -> Tensor:
        """v_s R of all scales [groups K, rows, in]."""
        R, total = self.factor.R, len(self.rest)
        products = self.rest.new_empty(len(self.columns), planes, self.rest[:, rows].shape[1], total)
        for g, columns in enumerate(self.columns):
            part = R if len(columns) == total else R[columns]
            for p, plane in enumerate(self.rounding.multiples(g, self.codes[columns][:, rows], rows)):
                for low, above in zip(range(0, total, BLOCK), self.above[g], strict=True):
                    here = slice(low, min(low + BLOCK, total))  # where R is 0 for columns after it
                    torch.mm(plane[:above].T, part[:above, here], out=products[g, p, :, here])
        return products.flatten(0, 1)

    def fit_codes(self) -> None:
        """One pass over the blocks of columns."""
        R, rest = self.factor.R, self.rest
        values = torch.empty_like(rest)
        for g, columns in enumerate(self.columns):
            values[columns] = self._values(g, self.rounding.scale[g])
        for low, (own, inverse) in zip(range(0, len(R), BLOCK), self.factor.blocks, strict=True):
            block = slice(low, min(low + BLOCK, len(R)))
            here, after = R[block, low:], rest[low:]
            left = inverse @ (here @ after)  # [columns, out]
            held = values[block]
            codes, tried, new = rounded(self.rounding, held, left, own, self.places[block], self.group, SWEEPS)
            better = new.square_().sum(0) < left.square_().sum(0)  # [out]
            self.codes[block] = torch.where(better, codes, self.codes[block])
            after.addmm_(here.T, held.sub_(tried).mul_(better))
