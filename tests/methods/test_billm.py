"""BiLLM: the search of columns and breaks by brute force, what a block becomes, and the loop over blocks in fp64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ultralowbit.format.salient import SalientSplit
from ultralowbit.format.words import unpack_fields
from ultralowbit.methods import billm
from ultralowbit.methods.billm import BiLLM, break_of, salient_columns
from ultralowbit.methods.rtn import RTN


def solved(method, weight: Tensor, stats=None) -> Tensor:
    return method.quantize(weight, stats).dequantize()


def binarised(w: Tensor) -> Tensor:
    """B(w) of one row of any length, in fp64."""
    w = w.double()
    mu = w.mean()
    return mu + (w - mu).abs().mean() * torch.where(w >= mu, 1.0, -1.0)


def error_of(weight: Tensor, mask: Tensor) -> float:
    """Squared error of binarising the mask of each row and the rest of it apart."""
    values = 0.0
    for row, inside in zip(weight, mask.expand_as(weight), strict=True):
        for part in (row[inside], row[~inside]):
            values += (binarised(part) - part).square().sum().item() if len(part) else 0.0
    return values


@pytest.mark.parametrize("seed", range(4))
def test_no_number_of_salient_columns_is_better(seed):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(7, 60, generator=generator) * torch.randn(60, generator=generator).exp()
    pivots = torch.rand(60, generator=generator) + 0.2
    order = (weight.square() / pivots.square()).sum(0).argsort(descending=True)
    tried = [torch.zeros(60, dtype=torch.bool).index_fill(0, order[:c], True) for c in range(1, 50)]
    best = min(tried, key=lambda mask: error_of(weight, mask))
    assert torch.equal(salient_columns(weight, pivots), best)


@pytest.mark.parametrize("seed", range(4))
def test_no_break_is_better(seed):
    weight = torch.randn(6, 50, generator=torch.Generator().manual_seed(seed))
    ordered = weight.abs().flatten().sort().values
    tried = [weight.abs() >= ordered[round(q / 100 * 299)] for q in range(10, 91)]
    assert torch.equal(weight.abs() >= break_of(weight), min(tried, key=lambda mask: error_of(weight, mask)))


def reference_block(weight: Tensor, salient: Tensor, sparse: Tensor) -> Tensor:
    """Equations 3 to 10 row by row, scales of fp16 except the first mean of salient columns, which is not stored."""

    def half(x: Tensor) -> Tensor:
        return x.half().double()

    def sign(w: Tensor) -> Tensor:
        return torch.where(w >= 0, 1.0, -1.0).double()

    W, Q = weight.double(), torch.zeros(weight.shape, dtype=torch.float64)
    for i in range(len(W)):
        for inside in (~salient & sparse[i], ~salient & ~sparse[i]):
            if inside.any():
                w = W[i, inside]
                mu = half(w.mean())
                Q[i, inside] = mu + half((w - mu).abs().mean()) * sign(w - mu)
        w = W[i, salient]
        first = w - w.mean()
        a = half(first.abs().mean())
        rest = first - a * sign(first)
        second = rest - rest.mean()
        b = half(second.abs().mean())
        Q[i, salient] = half(w.mean() + rest.mean()) + a * sign(first) + b * sign(second)
    return Q


@pytest.mark.parametrize("compensation", ["diagonal", "exact"])
def test_it_is_the_algorithm_of_the_paper(layer, compensation, differing_rows):
    """100 columns in blocks of 32, the last of 4; columns and breaks are those that were stored."""
    problem = layer(20, 100, seed=3)
    method = BiLLM(block=32, compensation=compensation)
    packed = method.quantize(problem.weight, problem.stats)
    salient = unpack_fields(packed.tensors["weight_salient"], 1, 100).bool()
    sparse = unpack_fields(packed.tensors["weight"], 1, 100)[1].bool()
    H = problem.hessian
    H += method.damp * H.diagonal().mean() * torch.eye(100)
    U = torch.linalg.cholesky(torch.linalg.inv(H)).mT
    W, Q = problem.weight.double(), torch.zeros(20, 100, dtype=torch.float64)
    for start in range(0, 100, 32):
        b, after = slice(start, start + 32), slice(start + 32, 100)
        Q[:, b] = reference_block(W[:, b], salient[b], sparse[:, b])
        inner = U[b, b] if compensation == "exact" else U[b, b].diagonal().diag()
        W[:, after] -= (W[:, b] - Q[:, b]) @ torch.linalg.inv(inner) @ U[b, after]
    close = torch.isclose(packed.dequantize().double(), Q, rtol=1e-3, atol=1e-4 * problem.weight.abs().max().item())
    assert differing_rows(close, torch.ones_like(close)) <= 1


def test_exact_compensation_is_the_column_loop_with_the_codes_of_the_block(layer):
    """What is left in a block's columns is made up for as if they had been rounded one by one."""
    problem = layer(8, 64, seed=1)
    factor = problem.stats.factor(0.01)
    packed = BiLLM(block=32, compensation="exact").quantize(problem.weight, problem.stats)
    values, W = packed.dequantize(), problem.weight.clone()
    for j in range(32):
        W[:, j:] -= torch.outer((W[:, j] - values[:, j]) / factor.U[j, j], factor.U[j, j:])
    second = billm._pack([billm.fit(W[:, 32:], factor.U.diagonal()[32:])], 32).dequantize()
    torch.testing.assert_close(values[:, 32:], second, rtol=2e-3, atol=1e-3)


@pytest.mark.parametrize("block", [32, 128])
def test_the_packed_weight_is_what_compensation_saw(layer, monkeypatch, block):
    seen = []
    original = billm._pack

    def spy(blocks, size):
        packed = original(blocks, size)
        seen.append(packed.dequantize())
        return packed

    monkeypatch.setattr(billm, "_pack", spy)
    problem = layer(9, 200, seed=2)
    values = solved(BiLLM(block=block), problem.weight, problem.stats)
    assert torch.equal(values, torch.cat(seen[:-1], 1))


@pytest.mark.parametrize("data", [False, True], ids=["plain", "compensated"])
@pytest.mark.parametrize("shape", [(1, 1), (5, 1), (1, 60), (3, 2), (4, 20), (2, 129)], ids=str)
def test_layers_of_any_shape(layer, shape, data):
    problem = layer(*shape, seed=5)
    packed = BiLLM().quantize(problem.weight, problem.stats if data else None)
    assert (packed.dequantize() - problem.weight).square().sum() < problem.weight.square().sum()
    assert packed.format.segments[0].salient >= 1


@pytest.mark.parametrize("value", [1.5, -0.3])
def test_constant_and_one_sided_rows(layer, value):
    problem = layer(6, 64)
    problem.weight[0] = value
    problem.weight[1] = problem.weight[1].abs() + 1
    values = solved(BiLLM(), problem.weight)
    torch.testing.assert_close(values[0], torch.full((64,), value), rtol=2**-10, atol=0)
    assert (values[1] > 0).all()
    small = BiLLM(block=32)  # the columns of one block are not compensated
    assert problem.loss(solved(small, problem.weight, problem.stats)) < problem.loss(solved(small, problem.weight))


def test_a_constant_layer_is_kept():
    weight = torch.full((4, 40), 0.5)
    assert torch.equal(solved(BiLLM(), weight), weight)


def test_error_against_round_to_nearest_at_two_bits(layer):
    for seed in range(3):
        problem = layer(48, 256, seed=seed)
        rtn = problem.loss(solved(RTN(bits=2, group=128), problem.weight))
        plain = problem.loss(solved(BiLLM(), problem.weight))
        diagonal, exact = (
            problem.loss(solved(BiLLM(compensation=c), problem.weight, problem.stats)) for c in ("diagonal", "exact")
        )
        assert exact < plain < rtn  # the diagonal is an approximation, and may end above `plain`
        assert diagonal < rtn


def test_bits_of_the_recipe(layer):
    """Two planes and 7 fp16 a row and block; a bit a column, padded to whole words."""
    packed = BiLLM().quantize(layer(16, 512).weight, None)
    segment = packed.format.segments[0]
    assert packed.format.tensors(16, 512) == BiLLM().format(512).tensors(16, 512)
    assert packed.bits_per_weight == 2 + 7 * 16 / 128 + 1 / 16
    assert packed.format.claimed_bits == 1 + segment.salient / 512
    assert isinstance(segment, SalientSplit) and segment.salient <= 4 * billm.MOST_SALIENT
