"""What every method promises, and the layers that no paper mentions."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from pydantic import ValidationError

from ultralowbit.methods import METHODS
from ultralowbit.methods.arb_rc import ARBRC
from ultralowbit.methods.billm import BiLLM
from ultralowbit.methods.db_llm import DBLLM
from ultralowbit.methods.gptq import GPTQ
from ultralowbit.methods.pb_llm import PBLLM
from ultralowbit.methods.ptq161 import PTQ161
from ultralowbit.methods.rtn import RTN
from ultralowbit.methods.sign import Sign
from ultralowbit.methods.statistics import InputStats, Need, SingularHessian

ALL = {
    "rtn-2-g32": RTN(bits=2, group=32),
    "rtn-3-row-symmetric": RTN(bits=3, group=None, symmetric=True),
    "rtn-4-clip": RTN(bits=4, clip="mse"),
    "gptq-2-g32": GPTQ(bits=2, group=32),
    "gptq-3-row": GPTQ(bits=3, group=None),
    "gptq-4-act-order-symmetric": GPTQ(bits=4, group=64, symmetric=True, act_order=True),
    "gptq-8-clip": GPTQ(bits=8, clip="mse"),
    "sign-1": Sign(),
    "sign-2-g64": Sign(planes=2, group=64),
    "sign-3-act-order": Sign(planes=3, group=32, act_order=True),
    "sign-4": Sign(planes=4),
    "pb-llm": PBLLM(),
    "pb-llm-magnitude-g32": PBLLM(ratio=0.2, salience="magnitude", group=32),
    "pb-llm-from-scratch": PBLLM(salience="magnitude", compensation="none"),
    "db-llm": DBLLM(),
    "db-llm-row-free": DBLLM(group=None, iterations=10),
    "db-llm-g32-gptq": DBLLM(group=32, iterations=10, compensation="gptq"),
    "sign-2-refined": Sign(planes=2, group=64, refine=2),
    "ptq161": PTQ161(),
    "ptq161-mean-gptq": PTQ161(ratio=0.3, score="mean", compensation="gptq"),
    "billm": BiLLM(),
    "billm-b32-exact": BiLLM(block=32, compensation="exact"),
    "arb-rc": ARBRC(),
    "arb-rc-b64-no-cgb": ARBRC(block=64, cgb=False),
}

BLOCKWISE = (BiLLM, ARBRC)
"""Those that choose a block of columns at once."""


@pytest.mark.parametrize("method", ALL.values(), ids=ALL)
def test_a_method_asks_for_no_more_than_it_needs(method):
    """Statistics may know less than a Hessian, and more than nothing, of inputs that other methods share."""
    generator = torch.Generator().manual_seed(0)
    weight, x = torch.randn(8, 128, generator=generator), torch.randn(200, 128, generator=generator)
    stats = InputStats(128, needs=method.needs)
    stats.add(x)
    packed = method.quantize(weight, stats)
    assert packed.shape == weight.shape
    if not method.needs:
        assert torch.equal(packed.dequantize(), method.quantize(weight, None).dequantize())


@pytest.fixture(params=ALL, ids=ALL.keys())
def method(request):
    return ALL[request.param]


@pytest.fixture(params=[False, True], ids=["no-stats", "stats"])
def stats_for(request, method):
    """The statistics of a layer, or none; one that needs none is also asked without."""
    if request.param and method.needs is Need.NOTHING:
        pytest.skip("uses no statistics")
    return (lambda problem: problem.stats) if request.param else (lambda problem: None)


def relative(quantized: torch.Tensor, weight: torch.Tensor) -> float:
    return ((quantized - weight).norm() / weight.norm()).item()


def test_the_table_names_each_method():
    assert all(cls(method=name).method == name for name, cls in METHODS.items())
    assert {type(m) for m in ALL.values()} == {*METHODS.values()}


def test_the_format_is_known_before_the_data(method, stats_for, layer):
    for columns in (1, 20, 100, 130):
        problem = layer(3, columns)
        packed = method.quantize(problem.weight, stats_for(problem))
        written, expected = packed.format, method.format(columns)
        if isinstance(method, BLOCKWISE):  # how many columns are salient is in the format, and only known now
            written, expected = written.tensors(3, columns).keys(), expected.tensors(3, columns).keys()
        assert written == expected
        assert packed.shape == (3, columns)


@pytest.mark.parametrize("shape", [(6, 100), (1, 40), (7, 1), (1, 1)], ids=str)
@pytest.mark.parametrize("transposed", [False, True], ids=["rows", "transposed"])
def test_weight_and_statistics_are_left_as_they_were(method, stats_for, layer, shape, transposed):
    """One row, one column and a transposed view are contiguous once transposed: a copy is not a matter of course."""
    problem = layer(*shape)
    given = problem.weight.T.contiguous().T if transposed else problem.weight.clone()
    stats = stats_for(problem)
    hessian = stats.hessian.clone() if stats else None
    method.quantize(given, stats)
    assert torch.equal(problem.weight, given)
    assert stats is None or torch.equal(stats.hessian, hessian)


def test_the_same_layer_gives_the_same_bytes_and_draws_no_random_number(method, stats_for, layer):
    problem = layer(6, 100)
    state = torch.get_rng_state()
    first, second = (method.quantize(problem.weight, stats_for(problem)).tensors for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_transposed_view_is_the_weight_it_shows(method, stats_for, layer):
    problem = layer(6, 100)
    view = problem.weight.T.contiguous().T
    assert not view.is_contiguous()
    first = method.quantize(problem.weight, stats_for(problem)).dequantize()
    assert torch.equal(method.quantize(view, stats_for(problem)).dequantize(), first)


@pytest.mark.parametrize("shape", [(1, 1), (1, 40), (7, 1), (5, 33), (2, 129)], ids=str)
def test_layers_of_any_shape_are_packed(method, stats_for, layer, shape):
    problem = layer(*shape, seed=4)
    quantized = method.quantize(problem.weight, stats_for(problem)).dequantize()
    assert quantized.shape == shape
    assert relative(quantized, problem.weight) < 1


def test_a_group_larger_than_the_layer_is_the_row(method, layer):
    if getattr(method, "group", None) is None:
        pytest.skip("has no group")
    problem = layer(5, 24)
    stats = None if method.needs is Need.NOTHING else problem.stats
    row = type(method)(**{**method.__dict__, "group": None}) if hasattr(method, "__dict__") else method
    assert torch.equal(
        method.quantize(problem.weight, stats).dequantize(), row.quantize(problem.weight, stats).dequantize()
    )


def test_rows_of_zeros_stay_zero(method, stats_for, layer):
    problem = layer(5, 70)
    problem.weight[[0, 3]] = 0
    quantized = method.quantize(problem.weight, stats_for(problem)).dequantize()
    assert not quantized[[0, 3]].any()
    assert relative(quantized, problem.weight) < 1


@pytest.mark.parametrize("value", [0.37, -2.5])
def test_constant_rows_keep_their_value(method, layer, value):
    if isinstance(method, ARBRC):
        pytest.skip("has no mean, and column scales that serve all rows")
    problem = layer(5, 70)
    problem.weight[2] = value
    packed = method.quantize(problem.weight, None)
    if getattr(method, "symmetric", False):  # the ends of a symmetric grid lie half a step off its codes
        tolerance = 0.51 * packed.tensors["weight_scale"][:, 2].max().item()
    else:
        tolerance = 2**-10 * abs(value)
    assert ((packed.dequantize()[2] - value).abs() <= tolerance).all()


@pytest.mark.parametrize("factor", [1e-3, 1e3])
def test_the_scale_of_a_layer_does_not_matter(method, stats_for, layer, factor):
    problem = layer(8, 96)
    weight = problem.weight / problem.weight.abs().amax(1, keepdim=True)  # all rows far from fp16's ends
    errors = [relative(method.quantize(weight * f, stats_for(problem)).dequantize(), weight * f) for f in (1, factor)]
    assert errors[1] == pytest.approx(errors[0], rel=0.1)


@pytest.mark.parametrize("factor", [3e4, 1e-6, 1e-12, 1e-40], ids=str)
def test_weights_at_the_ends_of_fp16_stay_finite(method, stats_for, layer, factor):
    problem = layer(4, 64)
    weight = problem.weight / problem.weight.abs().max() * factor
    quantized = method.quantize(weight, stats_for(problem)).dequantize()
    assert quantized.isfinite().all()
    assert quantized.abs().max() <= max(3 * factor, 2.0**-22)


def test_a_hessian_of_low_rank_is_damped(method, layer):
    if method.needs is Need.NOTHING:
        pytest.skip("uses no statistics")
    problem = layer(6, 96, tokens=3)
    quantized = method.quantize(problem.weight, problem.stats).dequantize()
    assert quantized.isfinite().all()
    if not isinstance(method, BLOCKWISE):  # a block takes no notice of the errors in itself
        assert problem.loss(quantized) < problem.loss(method.quantize(problem.weight, None).dequantize())


@pytest.mark.parametrize("alive", [0, 1, 40])
def test_inputs_that_are_always_zero_hold_nothing_up(method, alive):
    """Dead channels, all but one of them, or all: columns that no output depends on."""
    generator = torch.Generator().manual_seed(alive)
    weight, x = torch.randn(24, 96, generator=generator), torch.randn(200, 96, generator=generator)
    x[:, alive:] = 0
    stats = InputStats(96, needs=method.needs | Need.MAGNITUDES)
    stats.add(x)
    dense = method.quantize(weight, stats if method.needs else None).dequantize()
    assert dense.isfinite().all()
    lost = ((dense - weight) @ x.T).square().sum()
    assert lost <= (weight @ x.T).square().sum()


def test_a_hessian_that_cannot_be_used_is_refused(method, layer):
    if method.needs is Need.NOTHING:
        pytest.skip("uses no statistics")
    stats = InputStats(8, needs=method.needs)
    stats.add(torch.full((5, 8), float("nan")))
    with pytest.raises(SingularHessian, match="not finite"):
        method.quantize(layer(3, 8).weight, stats)


@pytest.mark.parametrize(
    ("cls", "fields"),
    [
        (RTN, {"bits": 5}),
        (RTN, {"group": 100}),
        (RTN, {"damp": 0.1}),
        (GPTQ, {"bits": 1}),
        (GPTQ, {"damp": 0}),
        (GPTQ, {"damp": 2}),
        (GPTQ, {"clip": "max"}),
        (GPTQ, {"method": "rtn"}),
        (Sign, {"planes": 0}),
        (Sign, {"planes": 9}),
        (Sign, {"iterations": -1}),
        (Sign, {"bits": 1}),
        (PBLLM, {"ratio": 1.1}),
        (PBLLM, {"ratio": -0.1}),
        (PBLLM, {"salience": "gradient"}),
        (BiLLM, {"block": 100}),
        (ARBRC, {"iterations": -1}),
    ],
    ids=lambda value: "-".join(f"{k}={v}" for k, v in value.items()) if isinstance(value, dict) else value.__name__,
)
def test_values_without_a_meaning_are_refused(cls, fields):
    with pytest.raises(ValidationError):
        cls(**fields)


def test_nothing_waits_for_the_garbage_collector(method, layer):
    """A cycle would keep the factor of a layer in memory while the next ones are solved."""
    problem = layer(8, 64)
    stats = problem.stats
    gc.collect()
    gc.disable()
    try:
        method.quantize(problem.weight, stats)
        factors = [weakref.ref(factor.R) for factor in stats._factors.values()]
        del stats
        assert not any(factor() is not None for factor in factors)
    finally:
        gc.enable()
