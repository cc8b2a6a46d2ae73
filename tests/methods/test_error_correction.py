"""Error correction against its least squares, written down in fp64."""

from __future__ import annotations

import pytest
import torch

from ultralowbit.format.transform import block_hadamard
from ultralowbit.methods import Need
from ultralowbit.methods.error_correction import ErrorCorrection
from ultralowbit.methods.statistics import InputStats

NEEDS = Need.HESSIAN | Need.ORIGINAL


def streams(layer, out: int = 5, columns: int = 24) -> tuple[torch.Tensor, ...]:
    """weight [out, in], inputs x and those of the original x_o [tokens, in], difference of the residual [tokens, out];
    all whole numbers, so that sums are exact in fp32."""
    problem = layer(out, columns, tokens=200)
    generator = torch.Generator().manual_seed(1)
    x = problem.inputs.float()
    x_o = x + torch.randint(-3, 4, x.shape, generator=generator)
    residual = torch.randint(-5, 6, (len(x), out), generator=generator).float()
    return problem.weight, x, x_o, residual


@pytest.mark.parametrize("residual", [False, True], ids=["inputs", "residual"])
@pytest.mark.parametrize("damp", [0.01, 1.0])
def test_it_is_the_damped_least_squares(layer, damp, residual):
    weight, x, x_o, moved = streams(layer)
    stats = InputStats(24, needs=NEEDS, writes=5 if residual else 0)
    stats.add(x, x_o, moved)
    W, X = weight.double(), x.double()
    wanted = x_o.double() @ W.T + (moved.double() if residual else 0)  # [tokens, out]
    strength = (damp * (X.T @ X).diagonal().mean()).sqrt()
    A = torch.cat([X, strength * torch.eye(24, dtype=torch.float64)])
    best = torch.linalg.lstsq(A, torch.cat([wanted, strength * W.T])).solution.T
    corrected = ErrorCorrection(damp=damp, residual=residual).target(weight, stats)
    torch.testing.assert_close(corrected.double(), best, rtol=1e-3, atol=1e-4 * best.abs().max().item())
    assert (corrected - weight).norm() > 0.01 * weight.norm()


def test_sums_of_parts_merge(layer):
    _, x, x_o, moved = streams(layer)
    whole, merged, second = (InputStats(24, needs=NEEDS, writes=5) for _ in range(3))
    whole.add(x, x_o, moved)
    merged.add(x[:77], x_o[:77], moved[:77])
    second.add(x[77:], x_o[77:], moved[77:])
    merged += second
    assert merged.count == whole.count
    assert torch.equal(merged.hessian, whole.hessian)
    assert torch.equal(merged.cross, whole.cross)
    assert torch.equal(merged.residual, whole.residual)


def test_a_weight_whose_inputs_are_the_originals_stays(layer):
    weight, x, _, moved = streams(layer)
    stats = InputStats(24, needs=NEEDS)
    stats.add(x, x, torch.zeros_like(moved))
    assert torch.equal(ErrorCorrection().target(weight, stats), weight)


def test_it_follows_a_rotation(layer):
    """Corrected and then rotated is rotated and then corrected."""
    weight, x, x_o, moved = streams(layer, columns=32)
    plain, rotated = InputStats(32, needs=NEEDS), InputStats(32, needs=NEEDS, hadamard=32)
    for stats in (plain, rotated):
        stats.add(x, x_o, moved)
    correction = ErrorCorrection(damp=0.1)
    expected = block_hadamard(correction.target(weight, plain), 32)
    torch.testing.assert_close(correction.target(block_hadamard(weight, 32), rotated), expected, rtol=1e-3, atol=1e-3)
