"""AdamW in 8 bits: codes are the nearest ones, roundings are right in the mean, and steps are AdamW's."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

from ultralowbit.training import optimizer
from ultralowbit.training.optimizer import BLOCK, AdamW8bit, decode, dynamic_map, encode_, rounded_at_random

CPU = torch.device("cpu")


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def adamw(params: list[Parameter], lr: float = 1e-3, weight_decay: float = 0.0, seed: int = 0) -> AdamW8bit:
    return AdamW8bit(params, lr, (0.9, 0.999), weight_decay, seed)


@pytest.mark.parametrize("signed", [True, False])
def test_the_map_has_256_numbers_of_seven_decades(signed):
    numbers = dynamic_map(signed, CPU)
    assert numbers.shape == (256,) and (numbers.diff() > 0).all() and numbers[-1] == 1 and (numbers == 0).any()
    assert numbers.abs()[numbers != 0].min() < 6e-7 and (numbers.min() < 0) == signed
    if signed:
        assert torch.equal(-numbers[:127].flip(0), numbers[128:-1])
    assert ((numbers > 0.1) & (numbers < 1)).sum() == (64 if signed else 128)


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("size", [1, BLOCK, 5 * BLOCK + 17])
def test_codes_are_the_nearest_ones(signed, size):
    x = normal(size) * 10 ** normal(size, seed=1)
    x = x if signed else x.abs()
    blocks = -(-size // BLOCK)
    codes, scale = torch.empty(size, dtype=torch.uint8), torch.empty(blocks)
    encode_(x, codes, scale, signed)
    largest = torch.stack([part.abs().max() for part in x.split(BLOCK)])
    assert torch.equal(scale, largest)
    shares = x / largest.repeat_interleave(BLOCK)[:size]
    numbers = dynamic_map(signed, CPU)
    least = (shares[:, None] - numbers).abs().amin(1)
    error = (decode(codes, scale, signed) - x).abs() / largest.repeat_interleave(BLOCK)[:size]
    rounding = 2**-11 * shares.abs() + 2**-25  # to fp16, normal or not, before the code is looked up
    assert (error <= least + 2 * rounding + 1e-6 * shares.abs()).all()
    again = torch.empty_like(codes)
    encode_(decode(codes, scale, signed), again, scale.clone(), signed)
    assert torch.equal(codes, again)


def test_zeros_stay_zeros():
    codes, scale = torch.empty(300, dtype=torch.uint8), torch.empty(2)
    encode_(torch.zeros(300), codes, scale, True)
    assert not decode(codes, scale, True).any()


def test_rounding_at_random_is_right_in_the_mean():
    n = 100_000
    generator = torch.Generator().manual_seed(0)
    for value, share in ((1 + 2**-10, 0.125), (-(1 + 3 * 2**-9), 0.75), (0.0300293, None)):
        low = torch.tensor(value).view(torch.int32).bitwise_and(-1 << 16).view(torch.float32).item()
        high = torch.tensor(low).bfloat16().nextafter(torch.tensor(math.copysign(9.0, value)).bfloat16()).item()
        share = (value - low) / (high - low) if share is None else share
        rounded = rounded_at_random(torch.full((n,), value), generator).float()
        assert set(rounded.tolist()) == {low, high}
        assert abs((rounded == high).float().mean().item() - share) < 5 * math.sqrt(share * (1 - share) / n)
    exact = normal(1000).bfloat16()
    assert torch.equal(rounded_at_random(exact.float(), generator), exact)


def test_a_step_too_small_for_bf16_counts_in_the_mean():
    """200 steps of 2e-5 from 1, where neighbours are 0.0039 apart."""
    p = Parameter(torch.ones(50_000, dtype=torch.bfloat16))
    adam = adamw([p], lr=2e-5)
    for _ in range(200):
        p.grad = torch.ones_like(p)
        adam.step()
    moved = 1 - p.detach().double().mean().item()
    assert moved == pytest.approx(200 * 2e-5, rel=0.05)  # 5 sigma: sqrt(0.004 * 0.0039 / 50,000) is 0.4 %


def test_steps_are_those_of_adamw():
    """Against torch's in fp64, with other gradients at every step: what 8 bits lose stays a small part of the way."""
    start, p = normal(40, 100), Parameter(normal(40, 100).bfloat16())
    exact = Parameter(p.detach().double())
    ours, theirs = adamw([p], 1e-2, 0.1), torch.optim.AdamW([exact], 1e-2, (0.9, 0.999), weight_decay=0.1)
    for step in range(30):
        gradient = 0.01 * normal(40, 100, seed=step) + 0.01 * start
        p.grad, exact.grad = gradient.bfloat16(), gradient.bfloat16().double()
        ours.step(), theirs.step()
    way = (exact.detach() - start.bfloat16().double()).norm()
    assert (p.detach().double() - exact.detach()).norm() < 0.1 * way
    assert {n: t.dtype for n, t in ours.state[p].items()} == {
        "step": torch.float32, "exp_avg": torch.uint8, "exp_avg_scale": torch.float32,
        "exp_avg_sq": torch.uint8, "exp_avg_sq_scale": torch.float32,
    }  # fmt: skip


def test_random_numbers_are_those_of_the_seed(monkeypatch):
    def trained(seed: int) -> tuple[Tensor, Tensor]:
        ps = [Parameter(normal(3, 500).bfloat16()), Parameter(normal(7).bfloat16())]
        adam = adamw(ps, seed=seed)
        for step in range(3):
            for p in ps:
                p.grad = normal(*p.shape, seed=step).bfloat16()
            adam.step()
        return torch.cat([p.detach().flatten() for p in ps]), adam.state[ps[0]]["exp_avg_sq"]

    before = torch.random.get_rng_state()
    whole, moments = trained(0)
    assert torch.equal(trained(0)[0], whole) and not torch.equal(trained(1)[0], whole)
    assert torch.equal(before, torch.random.get_rng_state())
    monkeypatch.setattr(optimizer, "CHUNK", BLOCK)
    assert torch.equal(trained(0)[1], moments)


def test_a_parameter_without_a_gradient_is_left_alone():
    p, q = Parameter(normal(5).bfloat16()), Parameter(normal(5).bfloat16())
    before = q.detach().clone()
    p.grad = torch.ones_like(p)
    adamw([p, q]).step()
    assert torch.equal(q.detach(), before)
