"""Refinement of sign planes after GPTQ: scales and codes, alternately, against the whole error of the layer.

GPTQ fixes column after column and never looks back. From where it ends,

    E(Q) = tr((W - Q) H (W - Q)^T)

falls further by two exact steps, in turn (our own composition; the steps are those of Alternating Multi-bit
Quantization, arXiv 1802.00150, with the layer's H in place of the identity):

    scales   all K G scales a of a row at once: A a = b, A = V H V^T, b = V H w, where row (p, g) of V [K G, in] is
             plane p in the columns of group g and 0 elsewhere;
    codes    column by column, for all rows: the level nearest to q_j + [(W - Q) H]_j / H_jj, the minimum over q_j.

Neither can raise E, but for the rounding of scales to fp16: rows where it would keep what they have.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ultralowbit.errors import FormatError
from ultralowbit.format.planes import Planes
from ultralowbit.format.weight import PackedWeight
from ultralowbit.format.words import to_scale, unpack_fields

_BLOCK = 128
"""Columns whose changes reach the others in one product."""
_SYSTEM = 1 << 24
"""Entries of the rows' least-squares systems that are in memory at a time."""


def refine(packed: PackedWeight, weight: Tensor, hessian: Tensor, damp: float, rounds: int) -> PackedWeight:
    """Refine a weight [out, in] packed as one segment of -1/+1 planes, against the damped hessian [in, in] of its
    inputs. Raises `FormatError` for any other format."""
    format = packed.format
    planes = format.segments[0]
    simple = len(format.segments) == 1 and format.outliers is None and format.transform is None
    if not (simple and isinstance(planes, Planes) and planes.alphabet == "pm1" and not planes.offset):
        raise FormatError(f"{format.summary} cannot be refined: expected one segment of -1/+1 planes without an offset")
    H = hessian.clone()
    H.diagonal().add_(damp * H.diagonal().mean())
    fit = _Fit(packed, weight, H, planes)
    for _ in range(rounds):
        fit.fit_scales()
        fit.fit_codes()
    fit.fit_scales()
    return fit.pack()


class _Fit:
    """bits [K, in, out] uint8, scale [K, groups, out]; Q and W are [in, out], so that a column of a weight is a row."""

    def __init__(self, packed: PackedWeight, weight: Tensor, H: Tensor, planes: Planes) -> None:
        self.format, self.H = packed.format, H
        self.W, self.Q = weight.T.contiguous(), packed.dequantize().T.contiguous()
        self.bits = unpack_fields(packed.tensors["weight"], 1, planes.columns).transpose(1, 2).to(torch.uint8)
        self.scale = packed.tensors["weight_scale"].float()
        self.width = planes.group or planes.columns
        starts = range(0, planes.columns, self.width)
        self.groups = [slice(start, min(start + self.width, planes.columns)) for start in starts]

    def fit_scales(self) -> None:
        """The joint least squares, a few rows of the weight at a time."""
        unknowns = len(self.bits) * len(self.groups)
        step = max(1, _SYSTEM // unknowns**2)
        for start in range(0, self.W.shape[1], step):
            rows = slice(start, start + step)
            self._fit_scales(self.W[:, rows], self.Q[:, rows], self.bits[..., rows], self.scale[..., rows])

    def _fit_scales(self, W: Tensor, Q: Tensor, bits: Tensor, scale: Tensor) -> None:
        """The same for views of some rows, which are changed in place."""
        signs = bits.float().mul_(2).sub_(1)  # [K, in, rows]
        HW = self.H @ W
        b = torch.stack([self._by_group(plane * HW) for plane in signs]).flatten(0, 1)  # [K groups, rows]
        A = torch.stack(
            [
                torch.stack([self._by_group(other * product) for other in signs]).flatten(0, 1)
                for plane in signs
                for product in (self.H[:, columns] @ plane[columns] for columns in self.groups)
            ]
        ).permute(2, 0, 1)  # [rows, K groups, K groups]  # fmt: skip
        # equal planes make A singular: the ridge then splits their scale
        ridge = 1e-6 * A.diagonal(dim1=1, dim2=2).mean(1)
        found = torch.linalg.solve(A + ridge[:, None, None] * torch.eye(len(b), device=A.device), b.T)
        found = to_scale(found.abs()).copysign(found)  # [rows, K groups]
        held = scale.flatten(0, 1).T

        def error(s: Tensor) -> Tensor:  # [rows], but for what does not depend on s
            return ((A @ s[..., None])[..., 0] * s - 2 * b.T * s).sum(1)

        better = error(found) < error(held)
        found = torch.where(better[:, None], found, held).T.unflatten(0, scale.shape[:2])
        scale.copy_(found.abs())
        for g, columns in enumerate(self.groups):
            bits[:, columns] ^= (found[:, g, None] < 0).to(torch.uint8)  # a plane with a negative scale, turned over
            Q[columns] = (signs[:, columns] * found[:, g, None]).sum(0)

    def fit_codes(self) -> None:
        """One pass of coordinate descent over the columns."""
        K, H = len(self.bits), self.H
        code_bits = (torch.arange(2**K, device=H.device) >> torch.arange(K, device=H.device)[:, None]) & 1  # [K, 2^K]
        levels = torch.einsum("kl,kgo->glo", code_bits * 2.0 - 1, self.scale)  # [groups, 2^K, out]
        G = H @ (self.W - self.Q)  # [in, out]
        pivots = H.diagonal().tolist()
        for low in range(0, len(H), _BLOCK):
            block = slice(low, min(low + _BLOCK, len(H)))
            before = self.Q[block].clone()
            for j in range(block.start, block.stop):
                choice = levels[j // self.width]
                code = (choice - (self.Q[j] + G[j] / pivots[j])).abs_().argmin(0)  # [out]
                value = choice.gather(0, code[None])[0]
                G[block].addr_(H[block, j], value - self.Q[j], alpha=-1)
                self.Q[j] = value
                self.bits[:, j] = code_bits[:, code]
            change = self.Q[block] - before
            G[: block.start].addmm_(H[: block.start, block], change, alpha=-1)
            G[block.stop :].addmm_(H[block.stop :, block], change, alpha=-1)

    def _by_group(self, values: Tensor) -> Tensor:  # [in, rows] -> [groups, rows]
        return torch.stack([values[columns].sum(0) for columns in self.groups])

    def pack(self) -> PackedWeight:
        bits, scale = self.bits.transpose(1, 2), self.scale.transpose(1, 2)
        return PackedWeight.encode(self.format, {"bits": bits, "scale": scale})
