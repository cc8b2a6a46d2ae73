"""ARB-LLM_RC: the alternation in fp64, its descent, exact planes, and what a block becomes."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from ultralowbit.format.words import unpack_fields
from ultralowbit.methods import billm
from ultralowbit.methods.arb_rc import ARBRC, _Term
from ultralowbit.methods.billm import BiLLM
from ultralowbit.methods.rtn import RTN


def solved(method, weight: Tensor, stats=None) -> Tensor:
    return method.quantize(weight, stats).dequantize()


def squared(values: Tensor, weight: Tensor) -> float:
    return (values.double() - weight.double()).square().sum().item()


def stored(packed) -> tuple[Tensor, Tensor, Tensor]:
    """Salient columns, groups, and t on the salient columns."""
    n, segment = packed.shape[1], packed.format.segments[0]
    salient = unpack_fields(packed.tensors["weight_salient"], 1, n).bool()
    second = unpack_fields(packed.tensors["weight"], 1, n)[1].bool()
    t = (
        unpack_fields(packed.tensors["weight_third"], 1, segment.salient).bool()
        if segment.third
        else second[:, salient]
    )
    return salient, second, t


def alternated(W: Tensor, mask: Tensor, iterations: int) -> tuple[Tensor, Tensor]:
    """r, u of one term by the sums of the paper, element by element."""
    B, (n, m) = torch.where(W >= 0, 1.0, -1.0), W.shape
    r = torch.tensor([W[i][mask[i]].abs().mean() if mask[i].any() else 0.0 for i in range(n)]).double()
    u = torch.zeros(m).double()
    for j in range(m):
        rows = [i for i in range(n) if mask[i, j]]
        u[j] = sum((W[i, j] / r[i]).abs() for i in rows) / max(1, len(rows))
    for _ in range(iterations):
        for i in range(n):
            columns = [j for j in range(m) if mask[i, j]]
            if columns:
                r[i] = sum(W[i, j] * u[j] * B[i, j] for j in columns) / sum(u[j] ** 2 for j in columns)
        for j in range(m):
            rows = [i for i in range(n) if mask[i, j]]
            if rows:
                u[j] = sum(W[i, j] * r[i] * B[i, j] for i in rows) / sum(r[i] ** 2 for i in rows)
    return r, u


@pytest.mark.parametrize("iterations", [0, 1, 5])
def test_a_term_is_the_alternation_of_the_paper(iterations):
    generator = torch.Generator().manual_seed(0)
    weight, mask = torch.randn(6, 9, generator=generator), torch.rand(6, 9, generator=generator) < 0.6
    mask[2], mask[:, 4] = False, False  # an empty row and column
    term = _Term(weight, mask.float())
    for _ in range(iterations):
        term.refine(term.along(weight))
    r, u = alternated(weight.double(), mask, iterations)
    expected = r[:, None] * u * torch.where(weight >= 0, 1.0, -1.0) * mask
    torch.testing.assert_close(term.value.double(), expected, rtol=1e-5, atol=1e-6)


def test_each_refinement_lowers_the_error():
    weight = torch.randn(20, 30, generator=torch.Generator().manual_seed(1))
    mask = weight.abs() > 0.4
    term, errors = _Term(weight, mask.float()), []
    for _ in range(10):
        errors.append(squared(term.value, weight * mask))
        term.refine(term.along(weight))
    assert all(after <= before * (1 + 1e-6) for before, after in pairwise(errors))
    assert errors[-1] < errors[0]


def test_a_rank_one_weight_is_exact():
    generator = torch.Generator().manual_seed(2)
    row, column = torch.rand(12, generator=generator) + 0.5, torch.rand(16, generator=generator) + 0.5
    sign = torch.where(torch.rand(12, 16, generator=generator) < 0.5, 1.0, -1.0)
    weight = row[:, None] * column * sign
    torch.testing.assert_close(solved(ARBRC(), weight), weight, rtol=1e-2, atol=0)


@pytest.mark.parametrize("cgb", [True, False])
def test_signs_are_those_of_the_weight_and_of_what_the_first_term_leaves(layer, cgb):
    problem = layer(14, 100, seed=1)
    packed = ARBRC(cgb=cgb).quantize(problem.weight, None)
    salient, sparse, t = stored(packed)
    first = unpack_fields(packed.tensors["weight"], 1, 100)[0].bool()
    assert torch.equal(first, problem.weight >= 0)
    scale, column = packed.tensors["weight_scale"].float()[:, 0], packed.tensors["weight_column"].float()
    kept = problem.weight[:, salient]
    if cgb:
        g = sparse[:, salient]
        value = torch.where(g, scale[3][:, None] * column[1, salient], scale[2][:, None] * column[0, salient])
    else:
        value = scale[2][:, None] * column[0, salient]
    assert torch.equal(t, kept - torch.where(kept >= 0, value, -value) >= 0)


@pytest.mark.parametrize("cgb", [True, False])
@pytest.mark.parametrize("compensation", ["diagonal", "exact"])
def test_the_packed_weight_is_what_compensation_saw(layer, monkeypatch, cgb, compensation):
    seen = []
    original = billm._pack

    def spy(blocks, size):
        packed = original(blocks, size)
        seen.append(packed.dequantize())
        return packed

    monkeypatch.setattr(billm, "_pack", spy)
    problem = layer(9, 200, seed=2)
    values = solved(ARBRC(block=64, cgb=cgb, compensation=compensation), problem.weight, problem.stats)
    assert torch.equal(values, torch.cat(seen[:-1], 1))


@pytest.mark.parametrize("cgb", [True, False])
@pytest.mark.parametrize("data", [False, True], ids=["plain", "compensated"])
@pytest.mark.parametrize("shape", [(1, 1), (5, 1), (1, 60), (3, 2), (4, 20), (2, 129)], ids=str)
def test_layers_of_any_shape(layer, shape, data, cgb):
    problem = layer(*shape, seed=5)
    values = solved(ARBRC(cgb=cgb), problem.weight, problem.stats if data else None)
    assert squared(values, problem.weight) < problem.weight.square().sum()


@pytest.mark.parametrize("value", [1.5, -0.3])
def test_constant_and_one_sided_rows(layer, value):
    problem = layer(6, 64)
    problem.weight[0] = value
    problem.weight[1] = problem.weight[1].abs() + 1
    values = solved(ARBRC(), problem.weight)
    assert (values[0].sign() == torch.tensor(value).sign()).all() and (values[1] > 0).all()
    assert squared(values[:2], problem.weight[:2]) < 0.1 * problem.weight[:2].square().sum()
    small = ARBRC(block=32)  # the columns of one block are not compensated
    assert problem.loss(solved(small, problem.weight, problem.stats)) < problem.loss(solved(small, problem.weight))


def test_rows_and_columns_of_zeros_stay_zero(layer):
    problem = layer(6, 80)
    problem.weight[2], problem.weight[:, 7] = 0, 0
    for method in (ARBRC(), ARBRC(cgb=False)):
        values = solved(method, problem.weight)
        assert not values[2].any() and not values[:, 7].any()


def test_iterations_groups_and_compensation_lower_the_error(layer):
    for seed in range(3):
        problem = layer(48, 256, seed=seed)
        plain = [squared(solved(ARBRC(iterations=n), problem.weight), problem.weight) for n in (0, 15)]
        assert plain[1] < plain[0]
        assert plain[1] < squared(solved(ARBRC(cgb=False), problem.weight), problem.weight)
        rtn = problem.loss(solved(RTN(bits=2, group=128), problem.weight))
        diagonal, exact = (
            problem.loss(solved(ARBRC(compensation=c), problem.weight, problem.stats)) for c in ("diagonal", "exact")
        )
        assert exact < problem.loss(solved(ARBRC(), problem.weight)) < rtn
        assert diagonal < rtn


def test_it_beats_billm_where_columns_differ(layer):
    problem = layer(48, 256, seed=4)
    weight = problem.weight * torch.randn(256, generator=torch.Generator().manual_seed(0)).exp()
    assert squared(solved(ARBRC(), weight), weight) < squared(solved(BiLLM(), weight), weight)


@pytest.mark.parametrize("cgb", [True, False])
def test_bits_of_the_recipe(layer, cgb):
    packed = ARBRC(cgb=cgb).quantize(layer(16, 512).weight, None)
    r = packed.format.segments[0].salient
    if cgb:
        words = 16 * (r // 512 * 32 + -(-(r % 512) // 16)) / 512  # of the third plane
        expected = 2 + words + 6 * 16 / 128 + (1 + 2 * 16 + 2 * 16 * r / 512) / 16
    else:
        expected = 2 + 4 * 16 / 128 + (1 + 2 * 16) / 16
    assert packed.bits_per_weight == pytest.approx(expected, abs=1e-12)
    assert packed.format.claimed_bits == 1 + r / 512
