"""The rate-distortion bound of a Linear: the least output error that any code of so many bits a weight can reach.

For rows w ~ N(0, s^2 I) under E = tr((W - Q) H (W - Q)^T), the components of a row along the eigenvectors of H are
independent with variances v_i = s^2 lambda_i, lambda the eigenvalues of H. At R bits a weight the least error is
reverse water-filling (Cover, Thomas: Elements of Information Theory, 2nd edition, theorem 10.3.3),

    D(R) = sum_i min(v_i, theta),   R = 1/columns sum_i max(0, 1/2 log2(v_i / theta)).

It holds for Gaussian rows, which those of a rotated weight nearly are, and for codes of any length. Scalar levels
cannot reach it: for white inputs they lose 1.45 times as much at one bit, 1.88 times at two.

How the eigenvalues are distributed is enough, and stochastic Lanczos quadrature finds that from a few hundred products
with H (Ubaru, Chen, Saad: Fast estimation of tr(f(A)) via stochastic Lanczos quadrature, SIMAX 38, 2017).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

_EXACT = 512
"""Columns up to which the eigenvalues themselves are computed."""
_LARGEST, _ITERATIONS, _PROBES, _STEPS = 32, 4, 8, 48


class Spectrum(NamedTuple):
    """values [count] fp64, falling and not negative: eigenvalues; shares [count] fp64, which sum to 1: of how many
    columns each is one."""

    values: Tensor
    shares: Tensor


def spectrum(hessian: Tensor) -> Spectrum:
    """The eigenvalues of a Hessian [in, in]: all, or the largest and what Lanczos quadrature has for the rest."""
    n = len(hessian)
    if n <= _EXACT:
        values = torch.linalg.eigvalsh(hessian.double())
        shares = torch.full_like(values, 1 / n)
    else:
        # each of the largest counts much, and by random vectors as anything between nothing and several times itself
        largest, top = _largest(hessian)
        alphas, betas = _lanczos(hessian, top)
        T = torch.diag_embed(alphas) + torch.diag_embed(betas, 1) + torch.diag_embed(betas, -1)
        nodes, vectors = torch.linalg.eigh(T)  # [probes, steps], [probes, steps, steps]
        values = torch.cat([largest, nodes.flatten()])
        rest = vectors[:, 0].square().flatten() * (1 - _LARGEST / n) / _PROBES
        shares = torch.cat([torch.full_like(largest, 1 / n), rest])
    # those of a rank less than full come out as tiny numbers of either sign
    order = values.argsort(descending=True)
    return Spectrum(values[order].clamp_min(0).cpu(), shares[order].cpu())


def _random_signs(rows: int, columns: int, like: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return (torch.randint(2, (rows, columns), generator=generator) * 2 - 1).to(like.device, torch.float32)


def _largest(H: Tensor) -> tuple[Tensor, Tensor]:
    """About the largest eigenvalues of H [in, in], fp64 [count], and an orthonormal basis of their space [in, count],
    by subspace iteration."""
    basis = _random_signs(len(H), _LARGEST, H)
    for _ in range(_ITERATIONS):
        basis = torch.linalg.qr(H @ basis).Q
    return torch.linalg.eigvalsh((basis.T @ (H @ basis)).double()), basis


def _lanczos(H: Tensor, top: Tensor) -> tuple[Tensor, Tensor]:
    """The tridiagonal matrices of H [in, in] beside the space of `top` [in, count], from random vectors: diagonals
    [probes, steps], and beside them [probes, steps - 1], fp64. What is already spanned is taken out of each vector
    twice."""

    def beside(v: Tensor) -> Tensor:
        return v - (v @ top) @ top.T

    v = beside(_random_signs(_PROBES, len(H), H))  # [probes, in]
    basis = (v / v.norm(dim=1, keepdim=True))[..., None]  # [probes, in, steps so far]
    alphas, betas = [], []
    for _ in range(_STEPS):
        v = basis[..., -1]
        w = v @ H  # H is symmetric
        alphas.append((v.double() * w.double()).sum(1))
        for _ in range(2):
            w = beside(w - (basis @ (basis.mT @ w[..., None]))[..., 0])
        beta = w.norm(dim=1)
        betas.append(beta.double())
        basis = torch.cat([basis, (w / beta.clamp_min(torch.finfo(w.dtype).tiny)[:, None])[..., None]], dim=-1)
    return torch.stack(alphas, 1), torch.stack(betas[:-1], 1)


def least_error(of: Spectrum, bits: float) -> float:
    """D(R) / D(0), from the spectrum of the inputs' Hessian and the bits a weight; 0 where no input has any energy.

    D(0) is the energy that outputs of rows without a preferred direction have: |W|^2 mean(diag H)."""
    present = of.values > 0
    values, shares = of.values[present], of.shares[present]
    energy = values * shares
    if not len(values):
        return 0.0
    logs = values.log2()
    # with the first k above the water, 2 R = sum of their shares times (log v - log theta)
    levels = ((shares * logs).cumsum(0) - 2 * bits) / shares.cumsum(0)  # log2 theta [in]
    above = int((logs >= levels).sum()) if bits > 0 else 0
    if above == 0:
        return 1.0
    theta = levels[above - 1].exp2()
    return ((shares[:above].sum() * theta + energy[above:].sum()) / energy.sum()).item()
