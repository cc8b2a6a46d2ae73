"""Output feedback: rows make up for each other's errors, each is packed as the method does it, and none is mixed up."""

from __future__ import annotations

import math

import pytest
import torch

from ultralowbit.methods import refine
from ultralowbit.methods.gptq import GPTQ
from ultralowbit.methods.output_feedback import OutputFeedback
from ultralowbit.methods.sign import Sign

METHODS = [Sign(planes=2), Sign(planes=1, refine=2, act_order=True), GPTQ(bits=2, group=32), GPTQ(bits=3, refine=1)]


def information(rows: int, seed: int = 0, rank: int | None = None) -> torch.Tensor:
    """H_O [rows, rows] fp32 of gradients that are strongly correlated."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(rank or rows, rows, generator=generator) / (1 + torch.arange(rank or rows))[:, None]
    g = torch.randn(4 * rows, rank or rows, generator=generator) @ mix
    return g.T @ g


def loss(weight: torch.Tensor, values: torch.Tensor, H_O: torch.Tensor, H: torch.Tensor) -> float:
    E = weight.double() - values.double()
    return torch.einsum("ij,jk,kl,il->", H_O.double(), E, H.double(), E).item()


@pytest.mark.parametrize("method", METHODS, ids=str)
@pytest.mark.parametrize("rows", [40, 21])
def test_the_loss_of_predictions_falls(layer, method, rows):
    problem, H_O = layer(rows, 96), information(rows)
    plain = method.quantize(problem.weight, problem.stats)
    packed = OutputFeedback().quantize(method, problem.weight, problem.stats, [H_O])
    assert packed.format == plain.format and packed.nbytes == plain.nbytes
    H = problem.stats.hessian
    ratio = loss(problem.weight, packed.dequantize(), H_O, H) / loss(problem.weight, plain.dequantize(), H_O, H)
    assert ratio < 0.75
    # what a row at a time would leave at best; coarse codes make up for less
    assert OutputFeedback().gain([H_O]) < ratio


def test_a_row_at_a_time_is_the_sequential_least_squares(layer):
    """Of each row, given the ones before, with those after it free to make up for all: by the inverse of H_O."""
    rows, method = 6, Sign(planes=1)
    problem, H_O = layer(rows, 48), information(6)
    spec = OutputFeedback(parts=64, damp=1e-9)
    values = spec.quantize(method, problem.weight, problem.stats, [H_O]).dequantize()
    weight, H = problem.weight.double(), H_O.double()
    for i in range(rows):
        E = weight[:i] - values[:i].double()
        # the block of the inverse: what is left of H_O once all later rows are free
        left = torch.linalg.inv(torch.linalg.inv(H)[: i + 1, : i + 1])
        target = weight[i] + left[i, :i] @ E / left[i, i]
        alone = method.quantize(target.float()[None], problem.stats).dequantize()
        assert torch.allclose(values[i], alone[0], rtol=1e-3), i


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_without_correlation_rows_are_packed_on_their_own(layer, method, monkeypatch):
    """But for how much scales grow, which a sample of the rows that are packed together tells."""
    monkeypatch.setattr(refine, "_growth", lambda *_: torch.ones(()))
    problem = layer(21, 96)
    plain = method.quantize(problem.weight, problem.stats)
    H_O = torch.diag(torch.rand(21, generator=torch.Generator().manual_seed(0)) + 0.1)
    packed = OutputFeedback().quantize(method, problem.weight, problem.stats, [H_O])
    # sums over other numbers of rows may be in another order: a tie may fall to the other side in a row
    differ = (packed.dequantize() != plain.dequantize()).any(1)
    assert differ.sum() <= 1


def test_rows_in_several_matrices_keep_their_places(layer):
    problem, method = layer(30, 64), Sign(planes=2)
    parts = [information(12, 1), information(18, 2)]
    together = OutputFeedback().quantize(method, problem.weight, problem.stats, parts).dequantize()
    for rows, H_O in ((slice(0, 12), parts[0]), (slice(12, 30), parts[1])):
        alone = OutputFeedback().quantize(method, problem.weight[rows], problem.stats, [H_O])
        assert torch.equal(together[rows], alone.dequantize())


@pytest.mark.parametrize(
    "H_O",
    [torch.zeros(9, 9), torch.full((9, 9), torch.nan), torch.full((9, 9), torch.inf)],
    ids=["no gradient", "nan", "overflow"],
)
def test_where_nothing_is_known_rows_are_packed_on_their_own(layer, H_O):
    problem, method = layer(9, 64), Sign(planes=2)
    packed = OutputFeedback().quantize(method, problem.weight, problem.stats, [H_O])
    assert torch.equal(packed.dequantize(), method.quantize(problem.weight, problem.stats).dequantize())
    assert OutputFeedback().gain([H_O]) == 1.0


@pytest.mark.parametrize("rank", [1, 3], ids=str)
def test_few_directions_that_matter(layer, rank):
    problem, method = layer(16, 64), Sign(planes=1)
    packed = OutputFeedback().quantize(method, problem.weight, problem.stats, [information(16, rank=rank)])
    assert packed.dequantize().isfinite().all()


def test_the_gain_is_that_of_the_determinant():
    H_O = information(12).double()
    spec = OutputFeedback(damp=0.1)
    damped = H_O + 0.1 * H_O.diagonal().mean() * torch.eye(12, dtype=torch.float64)
    expected = math.exp((damped.logdet() - damped.diagonal().log().sum()).item() / 12)
    assert spec.gain([H_O]) == pytest.approx(expected) and 0 < expected < 1
    assert spec.gain([torch.eye(12)]) == pytest.approx(1.0)
    assert torch.equal(H_O, information(12).double())  # it is not changed
