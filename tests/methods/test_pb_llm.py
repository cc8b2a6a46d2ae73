"""PB-LLM: which weights are salient, what the two kinds become, and the column loop in fp64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ultralowbit.format.words import unpack_fields
from ultralowbit.methods.pb_llm import PBLLM, _SomeSalient
from ultralowbit.methods.rtn import RTN


def solved(method: PBLLM | RTN, weight: Tensor, stats=None) -> Tensor:
    return method.quantize(weight, stats).dequantize()


def salient_of(packed) -> Tensor:
    """The mask [out, in] that is stored."""
    out, columns = packed.shape
    if packed.format.outliers is None:
        return torch.zeros(out, columns, dtype=torch.bool)
    if "weight_outliers_mask" in packed.tensors:
        return unpack_fields(packed.tensors["weight_outliers_mask"], 1, columns).bool()
    starts = [start for start, _, entries in packed.format.outliers.blocks for _ in range(entries)]
    places = packed.tensors["weight_outliers_index"].long() + torch.tensor(starts)[:, None]
    return torch.zeros(out, columns, dtype=torch.bool).scatter_(1, places.T, True)


def reference(problem, method: PBLLM, salient: Tensor, compensated: bool) -> Tensor:
    """Section 3 of the paper in fp64, scales rounded to fp16 as they are stored."""
    W, H, n = problem.weight.double(), problem.hessian, problem.weight.shape[1]
    H += method.damp * H.diagonal().mean() * torch.eye(n)
    U = torch.linalg.cholesky(torch.linalg.inv(H)).mT if compensated else torch.eye(n).double()
    low, high = W.amin(1).clamp_max(0), W.amax(1).clamp_min(0)
    step = ((high - low) / 255).half().double()
    zero = (-low / step).round().clamp(0, 255)
    Q, group = torch.zeros_like(W), method.group or n
    for j in range(n):
        if j % group == 0:
            part, kept = W[:, j : j + group], ~salient[:, j : j + group]
            count = kept.sum(1).clamp_min(1)
            mu = ((part * kept).sum(1) / count).half().double()
            alpha = (((part - mu[:, None]).abs() * kept).sum(1) / count).half().double()
        w = W[:, j]
        binary, codes = torch.where(w >= mu, mu + alpha, mu - alpha), ((w / step).round() + zero).clamp(0, 255)
        Q[:, j] = torch.where(salient[:, j], (codes - zero) * step, binary)
        W[:, j:] -= torch.outer((w - Q[:, j]) / U[j, j], U[j, j:])
    return Q.float()


@pytest.mark.parametrize("selection", ["count", "threshold"])
@pytest.mark.parametrize("group", [32, None], ids=["g32", "row"])
@pytest.mark.parametrize("compensated", [True, False], ids=["data", "plain"])
def test_it_is_the_algorithm_of_the_paper(layer, differing_rows, selection, group, compensated):
    problem = layer(24, 80, seed=5)
    method = PBLLM(ratio=0.1, selection=selection, group=group)
    packed = method.quantize(problem.weight, problem.stats if compensated else None)
    expected = reference(problem, method, salient_of(packed), compensated)
    close = torch.isclose(packed.dequantize(), expected, rtol=1e-6, atol=1e-6)
    assert differing_rows(close, torch.ones_like(close)) <= 1


@pytest.mark.parametrize("salience", ["hessian", "magnitude"])
@pytest.mark.parametrize("columns", [80, 300, 600])
def test_count_takes_the_largest_of_every_row_and_block(layer, salience, columns):
    problem = layer(6, columns, seed=1)
    method = PBLLM(salience=salience)
    salient = salient_of(method.quantize(problem.weight, problem.stats))
    score = problem.weight.square()
    if salience == "hessian":
        score /= problem.stats.factor(method.damp).U.diagonal().square()
    for part, mask in zip(score.split(256, 1), salient.split(256, 1), strict=True):
        entries = -(-26 * part.shape[1] // 256)
        assert torch.equal(mask.sum(1), torch.full((6,), entries))
        rest, taken = part.masked_fill(mask, 0).amax(1), part.masked_fill(~mask, torch.inf).amin(1)
        assert (taken >= rest).all()


@pytest.mark.parametrize("group", [32, None], ids=["g32", "whole"])
def test_threshold_takes_the_largest_of_all_rows(layer, group):
    problem = layer(40, 96, seed=2)
    method = PBLLM(selection="threshold", group=group)
    packed = method.quantize(problem.weight, problem.stats)
    salient = salient_of(packed)
    score = problem.weight.square() / problem.stats.factor(method.damp).U.diagonal().square()
    for part, mask in zip(score.split(group or 96, 1), salient.split(group or 96, 1), strict=True):
        assert mask.sum().item() == pytest.approx(0.1 * part.numel(), abs=1)
        assert part[mask].min() > part[~mask].max()
    assert packed.format.outliers.capacity == salient.sum(1).max()
    assert packed.format.claimed_bits == pytest.approx(0.1 * 8 + 0.9)


def test_salience_is_fixed_before_any_column_is_compensated(layer):
    problem = layer(12, 64, seed=3)
    plain, compensated = (PBLLM(salience="magnitude").quantize(problem.weight, s) for s in (None, problem.stats))
    assert torch.equal(salient_of(plain), salient_of(compensated))
    assert not torch.equal(plain.dequantize(), compensated.dequantize())


def test_binary_means_leave_the_salient_weights_out(layer):
    weight = layer(9, 120).weight
    packed = PBLLM(salience="magnitude").quantize(weight, None)
    low = ~salient_of(packed)
    for r in range(9):
        kept = weight[r][low[r]].double()
        mu = kept.mean()
        assert packed.tensors["weight_offset"][0, r].item() == pytest.approx(mu.item(), rel=2**-10, abs=1e-6)
        expected = (kept - mu).abs().mean().item()
        assert packed.tensors["weight_scale"][0, 0, r].item() == pytest.approx(expected, rel=2**-9)


@pytest.mark.parametrize("selection", ["count", "threshold"])
def test_the_packed_weight_is_what_compensation_saw(layer, monkeypatch, selection):
    """Every value that `round` returned, in its place, is what the bytes mean."""
    seen = {}
    original = _SomeSalient.round

    def spy(self, g, weight, first=0):
        codes, values = original(self, g, weight, first)
        seen[first] = values.clone()
        return codes, values

    monkeypatch.setattr(_SomeSalient, "round", spy)
    problem = layer(11, 70, seed=4)
    values = solved(PBLLM(selection=selection, group=32), problem.weight, problem.stats)
    assert torch.equal(values, torch.stack([seen[j] for j in range(70)], 1))


@pytest.mark.parametrize("selection", ["count", "threshold"])
@pytest.mark.parametrize("ratio", [0, 0.001, 0.1, 0.5, 0.999, 1])
@pytest.mark.parametrize("shape", [(5, 40), (7, 1), (1, 1), (1, 300)], ids=str)
def test_any_share_of_any_layer_can_be_salient(layer, selection, ratio, shape):
    problem = layer(*shape, seed=6)
    method = PBLLM(ratio=ratio, selection=selection)
    for stats in (None, problem.stats):
        packed = method.quantize(problem.weight, stats)
        error = (packed.dequantize() - problem.weight).square().sum() / problem.weight.square().sum()
        assert error < 1
        salient = salient_of(packed)
        assert (ratio == 1 and salient.all()) or (ratio == 0 and not salient.any()) or 0 < ratio < 1


def test_without_salient_weights_it_is_one_plane_and_with_only_them_8_bits(layer):
    problem = layer(8, 64)
    packed = PBLLM(ratio=0).quantize(problem.weight, problem.stats)
    assert packed.format.outliers is None and packed.format.claimed_bits == 1
    every = PBLLM(ratio=1).quantize(problem.weight, None)
    assert torch.equal(every.dequantize(), solved(RTN(bits=8, group=None), problem.weight))


@pytest.mark.parametrize("selection", ["count", "threshold"])
@pytest.mark.parametrize("value", [1.5, -0.3])
def test_constant_and_one_sided_rows(layer, selection, value):
    problem = layer(6, 64)
    problem.weight[0] = value
    problem.weight[1] = problem.weight[1].abs() + 1
    problem.weight[2] = -problem.weight[2].abs() - 1
    plain, compensated = (solved(PBLLM(selection=selection), problem.weight, s) for s in (None, problem.stats))
    assert (plain[1] > 0).all() and (plain[2] < 0).all()
    assert ((plain - problem.weight).norm(dim=1) < 0.7 * problem.weight.norm(dim=1)).all()
    torch.testing.assert_close(plain[0], torch.full((64,), value), rtol=2**-10, atol=0)
    assert problem.loss(compensated) < problem.loss(plain)


def test_a_constant_layer_has_nothing_above_its_order_statistic():
    packed = PBLLM(selection="threshold").quantize(torch.full((4, 32), 0.5), None)
    assert packed.format.outliers is None
    assert torch.equal(packed.dequantize(), torch.full((4, 32), 0.5))


def test_more_salient_weights_and_compensation_lower_the_output_error(layer):
    for seed in range(3):
        problem = layer(32, 128, seed=seed)
        losses = [problem.loss(solved(PBLLM(ratio=r), problem.weight, problem.stats)) for r in (0, 0.05, 0.1, 0.3, 0.5)]
        assert losses == sorted(losses, reverse=True)
        assert losses[2] < problem.loss(solved(PBLLM(ratio=0.1), problem.weight))


def test_it_beats_round_to_nearest_at_two_bits(layer):
    for seed in range(3):
        problem = layer(48, 256, seed=seed)
        rtn = problem.loss(solved(RTN(bits=2, group=None), problem.weight))
        assert problem.loss(solved(PBLLM(), problem.weight)) < rtn
        assert problem.loss(solved(PBLLM(), problem.weight, problem.stats)) < rtn / 2


def test_bits_of_the_recipe(layer):
    """One plane, its scale and mean; 26 of 256 places and values; an 8-bit grid a row."""
    packed = PBLLM().quantize(layer(8, 512).weight, None)
    assert packed.bits_per_weight == 1 + 32 / 512 + 16 * 26 / 256 + 24 / 512
    assert packed.format.claimed_bits == 26 / 256 * 8 + 230 / 256
