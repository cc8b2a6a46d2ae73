"""Experts, packed and not, against transformers' own modules."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from transformers import AutoModelForCausalLM

from ultralowbit.checkpoint.names import expert_linear, expert_of, weight_name
from ultralowbit.errors import CheckpointError
from ultralowbit.format.planes import Planes
from ultralowbit.format.testing import random_packed
from ultralowbit.format.weight import Format
from ultralowbit.kernels import packed_matmul as products
from ultralowbit.nn.decoder import Decoder
from ultralowbit.nn.experts import ExpertLinear, Experts, routing_linears, separate_experts
from ultralowbit.nn.hf import pack_model
from ultralowbit.nn.hf_names import experts_layout
from ultralowbit.nn.linear import linear_shape


@pytest.fixture
def model(mixture_config, mixture_kind):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(mixture_config(mixture_kind), experts_implementation="eager").eval()
        with torch.no_grad():
            for p in model.parameters():
                p.copy_(0.2 * torch.randn(p.shape) + (p.ndim == 1))
    return model


def fused(model):
    """The last module of fused experts of a model."""
    return [module for module in model.modules() if experts_layout(module) is not None][-1]


def some_tokens(experts_count: int, tokens: int = 13, width: int = 64):
    """Tokens, the experts of each, which leave out the last expert, and their weights."""
    g = torch.Generator().manual_seed(1)
    x = torch.randn(tokens, width, generator=g, dtype=torch.float32)
    routed = torch.stack([torch.randperm(experts_count - 1, generator=g)[:2] for _ in range(tokens)])
    return x, routed, torch.rand(tokens, 2, generator=g, dtype=torch.float32)


@torch.no_grad()
def test_experts_compute_what_the_fused_module_does(model):
    module = fused(model)
    given = some_tokens(4)
    expected = copy.deepcopy(module)(*given)
    y = Experts(module)(*given)
    # sums of at most 64 products, in another order
    assert torch.allclose(y, expected, rtol=0, atol=64 * 2**-24 * expected.abs().max())
    assert y.abs().min() > 0


@torch.no_grad()
def test_an_expert_s_weight_is_written_through_to_the_tensor_of_all(model):
    module = fused(model)
    transposed = module.is_transposed
    experts = Experts(module)
    linear = experts.linear(2, "down_proj")
    assert (
        linear.weight.shape == (linear.out_features, linear.in_features) == (64, experts.down_proj.numel() // 4 // 64)
    )
    before = experts.down_proj.clone()
    linear.weight.copy_(torch.full_like(linear.weight, 3.0).tril())
    expected = torch.full_like(linear.weight, 3.0).tril()
    assert torch.equal(experts.down_proj[2], expected.T if transposed else expected)
    assert torch.equal(experts.down_proj[[0, 1, 3]], before[[0, 1, 3]])
    twin = copy.deepcopy(experts)
    twin.linear(2, "down_proj").weight.zero_()
    assert linear.weight.any(), "a copy has weights of its own"


@torch.no_grad()
def test_experts_are_pickled(model):
    experts = Experts(fused(model))
    twin = pickle.loads(pickle.dumps(experts))
    assert torch.equal(twin(*some_tokens(4)), experts(*some_tokens(4)))


def packed_model(model):
    """A model whose experts are packed, each in a format of its own."""
    packed = {}
    for name, module in model.named_modules():
        layout = experts_layout(module)
        for projection in layout.projections if layout else ():
            shape = getattr(module, projection).shape
            out, width = (shape[2], shape[1]) if layout.transposed else (shape[1], shape[2])
            for e in range(shape[0]):
                format = Format((Planes(width, 1 + e % 2, 32),))
                packed[f"{name}.{expert_linear(e, projection)}"] = random_packed(format, out, seed=e)
    return pack_model(model, packed)


@torch.no_grad()
def test_packed_experts_against_the_weights_that_their_bytes_mean(model):
    packed = packed_model(copy.deepcopy(model))
    module = [m for m in packed.modules() if isinstance(m, Experts)][-1]
    given = some_tokens(4)
    y = module(*given)
    dense = fused(packed.dequantize())
    assert type(dense) is type(fused(model))
    expected = dense(*given)
    assert torch.allclose(y, expected, rtol=0, atol=256 * 2**-24 * expected.abs().max())


@torch.no_grad()
def test_only_the_experts_of_a_token_are_multiplied(model, monkeypatch):
    packed = packed_model(model)
    module = [m for m in packed.modules() if isinstance(m, Experts)][-1]
    read = []
    product = products._product
    monkeypatch.setattr(products, "_product", lambda x, t, *rest: read.append(t[0].data_ptr()) or product(x, t, *rest))
    x, _, weights = some_tokens(4, tokens=1)
    module(x, torch.tensor([[3, 1]]), weights)
    assert read == [module.linear(e, p).weight.data_ptr() for e in (1, 3) for p in module.projections]


@torch.no_grad()
def test_an_index_past_the_last_expert_is_none(model):
    experts = Experts(fused(model))
    x, routed, weights = some_tokens(4)
    alone = experts(x, torch.full_like(routed, 4), weights)
    assert torch.equal(alone, torch.zeros_like(x))
    routed[0] = torch.tensor([1, 4])
    assert torch.allclose(experts(x, routed, weights)[0], weights[0, 0] * experts._run(1, x[:1])[0], atol=1e-5)


def test_experts_of_which_some_are_not_packed_are_refused(mixture_config):
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(mixture_config("mixtral"))
    name = "model.layers.0.mlp.experts.1.packed_down_proj"
    with pytest.raises(CheckpointError, match="expert 0 of 4 is not packed in down_proj, others are"):
        pack_model(model, {name: random_packed(Format((Planes(96, 1),)), 64, seed=0)})


def test_the_linears_of_experts_are_there_while_their_block_is(save_model, mixture_config, mixture_kind, tmp_path):
    folder = save_model(mixture_config(mixture_kind), tmp_path, dtype=torch.bfloat16)
    decoder = Decoder(folder, None, torch.device("cpu"))
    assert decoder.dtype == torch.bfloat16

    def made() -> list[str]:
        return [name for name, module in decoder.model.named_modules() if isinstance(module, ExpertLinear)]

    assert not made()
    with decoder.filled_block(1):
        linears = decoder.linears(1)
        assert made() == [name for name in linears if expert_of(name)] and len(made()) == 8
        assert {name: linear_shape(module) for name, module in linears.items()} == decoder.shapes(1)
        assert all(module.weight.any() for module in linears.values())
    assert not made() and [*decoder.shapes(1)] == [*linears]


def test_routers_are_no_weights_to_pack(model):
    separate_experts(model)
    names = {name for name, _ in model.named_modules() if name.endswith("shared_expert_gate")}
    assert routing_linears(model) == names


def test_names():
    linear = f"model.layers.3.mlp.experts.{expert_linear(12, 'gate_up_proj')}"
    assert expert_of(linear) == ("model.layers.3.mlp.experts", "gate_up_proj")
    assert weight_name(linear) == "model.layers.3.mlp.experts.gate_up_proj"
    assert expert_of("model.layers.3.self_attn.q_proj") is None
    assert weight_name("model.layers.3.self_attn.q_proj") == "model.layers.3.self_attn.q_proj.weight"
