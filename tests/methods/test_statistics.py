"""Input statistics: sums that merge, clipping that does not depend on batches, factors against fp64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ultralowbit.methods.statistics import InputStats, Need, SingularHessian, output_energy, relative_error


def tokens(count: int, features: int, seed: int = 0, spread: float = 1.0) -> torch.Tensor:
    """Correlated inputs; with `spread`, norms of very different sizes."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(features, features, generator=generator) / features**0.5
    x = torch.randn(count, features, generator=generator) @ mix
    return x * torch.randn(count, 1, generator=generator).mul(spread - 1).exp()


def gathered(x: torch.Tensor, cuts: list[int], outliers: int = 0) -> InputStats:
    stats = InputStats(x.shape[1], outliers, x.device)
    for part in x.tensor_split(sorted(cuts)):
        stats.add(part)
    return stats


def clipped_hessian(x: torch.Tensor, outliers: int) -> torch.Tensor:
    """sum x x^T in fp64 after scaling the `outliers` largest tokens down to the norm of the next."""
    x = x.double()
    norms = x.norm(dim=1)
    bound = norms.sort(descending=True).values[min(outliers, len(x) - 1)]
    x = x * (bound / norms).clamp_max(1)[:, None] if outliers else x
    return x.T @ x


def test_the_hessian_is_the_sum_over_tokens_of_any_leading_shape(device):
    x = tokens(60, 9).to(device)
    stats = InputStats(9, device=device)
    stats.add(x[:40].view(2, 20, 9))
    stats.add(x[40:].view(5, 2, 2, 9).half())
    expected = torch.cat([x[:40], x[40:].half().float()]).double()
    assert stats.count == 60
    torch.testing.assert_close(stats.hessian.double(), expected.T @ expected, rtol=1e-5, atol=1e-4)


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 80), st.lists(st.integers(0, 80), max_size=5), st.integers(0, 90), st.integers(0, 999))
def test_clipping_is_the_same_however_the_text_is_cut(count, cuts, outliers, seed):
    x = tokens(count, 5, seed, spread=2.0)
    expected = clipped_hessian(x, outliers)
    torch.testing.assert_close(gathered(x, cuts, outliers).hessian.double(), expected, rtol=1e-5, atol=1e-4)


@settings(max_examples=50, deadline=None)
@given(st.integers(2, 80), st.integers(0, 80), st.integers(0, 90), st.integers(0, 999))
def test_merging_parts_is_having_seen_the_whole(count, cut, outliers, seed):
    x = tokens(count, 5, seed, spread=2.0)
    cut = min(cut, count)
    left, right = gathered(x[:cut], [], outliers), gathered(x[cut:], [cut // 2], outliers)
    left += right
    assert left.count == count
    torch.testing.assert_close(left.hessian.double(), clipped_hessian(x, outliers), rtol=1e-5, atol=1e-4)


def test_merged_statistics_go_on_counting():
    x = tokens(50, 5, spread=2.0)
    merged = gathered(x[:20], [], 3)
    merged += gathered(x[20:40], [], 3)
    merged.add(x[40:])
    torch.testing.assert_close(merged.hessian.double(), clipped_hessian(x, 3), rtol=1e-5, atol=1e-5)


def test_zero_tokens_do_not_spoil_clipping():
    assert torch.equal(gathered(torch.zeros(6, 4), [2], 2).hessian, torch.zeros(4, 4))


def test_reading_the_hessian_does_not_change_it():
    stats = gathered(tokens(30, 5, spread=2.0), [10], 4)
    assert torch.equal(stats.hessian.clone(), stats.hessian)


# --- magnitudes ---------------------------------------------------------------------------------------------------


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 60), st.integers(0, 60), st.integers(0, 9), st.integers(0, 999))
def test_magnitudes_are_those_of_all_tokens_however_cut_or_merged(count, cut, outliers, seed):
    x, cut = tokens(count, 7, seed, spread=2.0), min(cut, count)
    merged, part = (InputStats(7, outliers, needs=Need.MAGNITUDES | Need.HESSIAN) for _ in range(2))
    merged.add(x[:cut].view(1, cut, 7))
    part.add(x[cut:])
    merged += part
    assert torch.equal(merged.absmax, x.abs().amax(0))
    torch.testing.assert_close(merged.absmean.double(), x.double().abs().mean(0), rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(merged.hessian.double(), clipped_hessian(x, outliers), rtol=1e-5, atol=1e-4)


def test_magnitudes_alone_gather_no_hessian(device):
    x = tokens(40, 6).to(device)
    stats = InputStats(6, 3, device, Need.MAGNITUDES)
    stats.add(x.half())
    both = InputStats(6, 3, device, Need.MAGNITUDES)
    both += stats
    both += stats
    assert torch.equal(both.absmax, x.half().float().abs().amax(0))
    assert both.count == 80
    with pytest.raises(AttributeError):
        _ = both.hessian


def test_before_any_token_magnitudes_are_zero():
    stats = InputStats(4, needs=Need.MAGNITUDES)
    assert torch.equal(stats.absmax, torch.zeros(4))
    assert torch.equal(stats.absmean, torch.zeros(4))


def test_a_value_that_is_not_finite_stays_visible():
    x = tokens(5, 3)
    x[2, 1] = float("nan")
    stats = InputStats(3, needs=Need.MAGNITUDES)
    stats.add(x)
    stats.add(tokens(5, 3))
    for magnitudes in (stats.absmax, stats.absmean):
        assert magnitudes.isnan().tolist() == [False, True, False]


# --- factors ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("features", [1, 2, 17, 300, 600])
@pytest.mark.parametrize("act_order", [False, True], ids=["left-to-right", "act-order"])
def test_the_factor_inverts_the_damped_hessian(features, act_order, device):
    stats = gathered(tokens(2 * features + 3, features).to(device), [])
    factor = stats.factor(0.01, act_order)
    H = stats.hessian.double()
    if act_order:
        assert torch.equal(factor.order, H.diagonal().argsort(descending=True, stable=True))
        H = H[factor.order][:, factor.order]
    else:
        assert factor.order is None
    H = H + 0.01 * H.diagonal().mean() * torch.eye(features, device=device)
    U = factor.U.double()
    assert factor.U.dtype == torch.float32
    assert torch.equal(U, U.triu())
    assert (U.diagonal() > 0).all()
    torch.testing.assert_close(U @ H @ U.T, torch.eye(features, device=device).double(), rtol=0, atol=1e-4)
    assert factor.damp == 0.01
    assert stats.notes == []


@pytest.mark.parametrize("act_order", [False, True], ids=["left-to-right", "act-order"])
def test_marked_columns_follow_all_others(act_order):
    stats = gathered(tokens(60, 20), [])
    last = torch.arange(20) % 3 == 0
    factor = stats.factor(0.01, act_order, last)
    before = stats.factor(0.01, True).order if act_order else torch.arange(20)
    assert factor.order.tolist() == [j for j in before if not last[j]] + [j for j in before if last[j]]
    H = (stats.hessian.double() + 0.01 * stats.hessian.diagonal().mean() * torch.eye(20))[factor.order][:, factor.order]
    U = factor.U.double()
    torch.testing.assert_close(U @ H @ U.T, torch.eye(20).double(), rtol=0, atol=1e-4)
    assert stats.factor(0.01, act_order, last.clone()) is factor
    assert stats.factor(0.01, act_order, ~last) is not factor


def test_a_factor_is_computed_once_until_more_tokens_come():
    stats = gathered(tokens(20, 6), [])
    first = stats.factor(0.01)
    assert stats.factor(0.01) is first
    assert stats.factor(0.02) is not first
    stats.add(tokens(20, 6, seed=1))
    assert not torch.equal(stats.factor(0.01).U, first.U)


def test_factoring_leaves_the_sum_alone():
    x = tokens(20, 6)
    x[:, 2] = 0
    stats = gathered(x, [])
    before = stats.hessian.clone()
    stats.factor(0.01)
    assert torch.equal(stats.hessian, before)


def test_channels_without_input_are_noted_and_do_not_disturb_the_others():
    x = tokens(40, 6)
    x[:, [1, 4]] = 0
    stats = gathered(x, [])
    U = stats.factor(0.01).U
    assert stats.notes == ["2 of 6 input channels are zero on all calibration text"]
    assert U.isfinite().all()
    off_diagonal = U - U.diagonal().diag()
    assert not off_diagonal[[1, 4]].any()
    assert not off_diagonal[:, [1, 4]].any()


def test_inputs_that_are_all_zero_have_a_factor():
    stats = gathered(torch.zeros(8, 5), [])
    U = stats.factor(0.01).U
    assert torch.equal(U, U.diagonal().diag())
    assert (U.diagonal() > 0).all()
    assert "5 of 5" in stats.notes[0]


def test_fewer_tokens_than_channels_need_no_more_than_the_damping_asked_for():
    stats = gathered(tokens(3, 40), [])
    assert stats.factor(1e-4).damp == 1e-4


def indefinite(eigenvalue: float) -> InputStats:
    """Statistics whose Hessian has a negative eigenvalue, relative to mean(diag H)."""
    generator = torch.Generator().manual_seed(0)
    Q = torch.linalg.qr(torch.randn(8, 8, generator=generator).double()).Q
    values = torch.linspace(1, 2, 8).double()
    values[0] = 0
    values[0] = eigenvalue * (values.mean() * 8 + eigenvalue) / 8
    stats = InputStats(8, count=100)
    stats._sum = (Q @ values.diag() @ Q.T).float()
    return stats


@pytest.mark.parametrize(("eigenvalue", "damp", "tries"), [(-0.05, 0.1, 1), (-0.5, 1, 3), (-2, 10, 4)])
def test_damping_grows_tenfold_until_the_factorisation_succeeds(eigenvalue, damp, tries):
    stats = indefinite(eigenvalue)
    start = damp / 10 ** (tries - 1)
    factor = stats.factor(start)
    assert factor.damp == pytest.approx(damp)
    assert len(stats.notes) == tries - 1
    assert all("Cholesky factorisation failed with damping" in note for note in stats.notes)
    H = stats.hessian.double()
    H = H + damp * H.diagonal().mean() * torch.eye(8)
    U = factor.U.double()
    torch.testing.assert_close(U @ H @ U.T, torch.eye(8).double(), rtol=0, atol=1e-4)


def test_a_hessian_that_no_damping_mends_is_refused():
    stats = InputStats(4, count=9)
    stats._sum = torch.eye(4) - 20 * torch.ones(4, 4).triu(1) - 20 * torch.ones(4, 4).tril(-1)
    with pytest.raises(SingularHessian, match="not positive definite even with damping 10"):
        stats.factor(0.01)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e30], ids=["nan", "inf", "overflow"])
def test_activations_that_are_not_finite_are_refused(value):
    x = tokens(10, 4)
    x[3, 2] = value
    with pytest.raises(SingularHessian, match="not finite"):
        gathered(x, []).factor(0.01)


# --- error ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("outliers", [0, 5])
def test_the_error_is_the_share_of_the_output_that_is_lost(outliers, device):
    x = tokens(200, 24, spread=2.0)
    generator = torch.Generator().manual_seed(1)
    W = torch.randn(11, 24, generator=generator)
    Q = W + 0.1 * torch.randn(11, 24, generator=generator)
    H = clipped_hessian(x, outliers)
    expected = ((W - Q).double() @ H * (W - Q).double()).sum() / (W.double() @ H * W.double()).sum()
    stats = gathered(x.to(device), [50], outliers)
    W, Q = W.to(device), Q.to(device)
    share = relative_error(W, Q, stats.hessian, output_energy(W, stats.hessian))
    assert share == pytest.approx(expected.item(), rel=1e-5)


def test_the_error_is_that_of_the_outputs():
    x = tokens(200, 24)
    W, Q = torch.randn(5, 24, generator=torch.Generator().manual_seed(2)), torch.zeros(5, 24)
    H = gathered(x, []).hessian
    energy = output_energy(W, H)
    assert relative_error(W, Q, H, energy) == pytest.approx(1)
    assert relative_error(W, W, H, energy) == 0
    assert relative_error(W * 0, Q, H, output_energy(W * 0, H)) == 0
    half = torch.cat([W[:2], Q[2:]])
    expected = (x @ (W - half).T).square().sum() / (x @ W.T).square().sum()
    assert relative_error(W, half, H, energy) == pytest.approx(expected.item(), rel=1e-4)
