"""Norms and biases that are trained: which they are, what the model computes with, and that a teacher keeps its own."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch
from torch import nn

from ultralowbit.training.memory import compute_in_fp32
from ultralowbit.training.plain import make_trainable, plain_parameters


def block(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(6, 6), nn.LayerNorm(6), nn.Linear(6, 6, bias=False), nn.RMSNorm(6)).to(dtype)


def test_every_vector_of_a_norm_and_every_bias_is_found_once():
    model = block()
    kinds = {plain.name: plain.kind for plain in plain_parameters(model)}
    assert kinds == {"0.bias": "bias", "1.weight": "norm", "1.bias": "bias", "3.weight": "norm"}
    model[3].weight = model[1].weight  # two modules, one vector: each would train its own
    assert {plain.name for plain in plain_parameters(model)} == {"0.bias", "1.bias"}
    model = block(torch.bfloat16)
    compute_in_fp32(model)
    assert {plain.name: plain.kind for plain in plain_parameters(model)} == kinds


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_model_computes_with_what_will_be_stored(dtype):
    teacher = block(dtype)
    compute_in_fp32(teacher)
    student = deepcopy(teacher, memo={id(p): p for p in teacher.parameters()})
    x = torch.linspace(-1, 1, 12).view(2, 6)
    expected = teacher(x)
    own = make_trainable(student, {"norm"})
    assert own.keys() == {"1.weight", "3.weight"} and torch.equal(student(x), expected)
    with torch.no_grad():
        for vector in own.values():
            vector.parameter.add_(1 / 3)  # of which 16 bits hold a rounded value
    student(x).square().sum().backward()
    for name, vector in own.items():
        assert vector.dtype == vector.stored.dtype == dtype and vector.parameter.dtype == torch.float32
        module = student.get_submodule(name.partition(".")[0])
        assert torch.equal(module.weight, vector.stored.float())
        assert vector.parameter.grad.abs().sum() > 0
    assert torch.equal(teacher(x), expected)  # it shares all else with the student
