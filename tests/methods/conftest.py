"""Random layers, and GPTQ written down once more in fp64, for any rounding."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from ultralowbit.methods.statistics import InputStats, Need


class Layer(NamedTuple):
    """A weight [out, in] and inputs [tokens, in] of small whole numbers, whose Hessian is exact in fp32."""

    weight: Tensor
    inputs: Tensor

    @property
    def stats(self) -> InputStats:
        stats = InputStats(self.inputs.shape[1], needs=Need.MAGNITUDES | Need.HESSIAN)
        stats.add(self.inputs)
        return stats

    @property
    def hessian(self) -> Tensor:
        return self.inputs.double().T @ self.inputs.double()

    def loss(self, quantized: Tensor) -> float:
        """tr(D H D^T), D = W - Q, in fp64."""
        D = self.weight.double() - quantized.double()
        return (D @ self.hessian * D).sum().item()


def random_layer(rows: int, columns: int, seed: int = 0, tokens: int | None = None) -> Layer:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator)
    weight *= torch.randn(rows, 1, generator=generator).exp()
    mix = torch.randn(columns, columns, generator=generator) * (torch.rand(columns, generator=generator) + 0.2)
    x = torch.randn(tokens or 4 * columns, columns, generator=generator) @ mix / columns**0.5 * 4
    return Layer(weight, x.round().clamp(-60, 60))


def gptq_fp64(layer: Layer, fit: Callable, group: int | None, damp: float, act_order: bool = False) -> Tensor:
    """Algorithm 1 of arXiv 2210.17323. `fit(weight [out, n], importance [n])` returns the rounding of a group."""
    W, H, n = layer.weight.double(), layer.hessian, layer.weight.shape[1]
    group, dead = group or n, layer.hessian.diagonal() == 0
    H.diagonal()[dead] = H.diagonal().mean()
    order = H.diagonal().argsort(descending=True, stable=True) if act_order else torch.arange(n)
    H = H[order][:, order] + damp * H.diagonal().mean() * torch.eye(n)
    U = torch.linalg.cholesky(torch.linalg.inv(H)).mT
    importance = torch.empty(n).double().scatter_(0, order, U.diagonal() ** -2)
    grids = [fit(W[:, g : g + group], importance[g : g + group]) for g in range(0, n, group)]
    Q = torch.zeros_like(W)
    for k, j in enumerate(order.tolist()):
        if not act_order and j % group == 0:
            grids[j // group] = fit(W[:, j : j + group], importance[j : j + group])
        Q[:, j] = grids[j // group](W[:, j])
        W[:, order[k:]] -= torch.outer((W[:, j] - Q[:, j]) / U[k, k], U[k, k:])
    return Q.float()


def rows_that_differ(a: Tensor, b: Tensor) -> int:
    """A tie that fp32 and fp64 break differently changes one row, as rows are independent; a mistake changes all."""
    return int((a != b).any(1).sum())


@pytest.fixture(scope="session")
def layer() -> Callable[..., Layer]:
    return random_layer


@pytest.fixture(scope="session")
def gptq_reference() -> Callable[..., Tensor]:
    return gptq_fp64


@pytest.fixture(scope="session")
def differing_rows() -> Callable[[Tensor, Tensor], int]:
    return rows_that_differ
