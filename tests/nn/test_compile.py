"""`load(..., compile=True)`: a step of `generate` is one compiled graph, and writes what it writes without."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from ultralowbit.format.planes import Planes
from ultralowbit.format.testing import random_packed
from ultralowbit.format.weight import Format
from ultralowbit.nn.hf import load, pack_model


@pytest.mark.slow
def test_a_compiled_step_is_one_graph_and_writes_the_same(save_model, tiny_config, tmp_path, device):
    source = save_model(tiny_config(num_hidden_layers=2), tmp_path / "model")
    model = AutoModelForCausalLM.from_pretrained(source)
    linears = {name: m for name, m in model.model.named_modules(prefix="model") if isinstance(m, nn.Linear)}
    formats = {name: Format((Planes(m.in_features, 2),)) for name, m in linears.items()}
    packed = {name: random_packed(formats[name], m.out_features) for name, m in linears.items()}
    pack_model(model, packed).save_pretrained(tmp_path / "packed")
    prompt = torch.tensor([[5, 9, 11], [77, 3, 2]], device=device)
    fixed = {"do_sample": False, "pad_token_id": 0, "eos_token_id": None, "max_new_tokens": 12}
    expected = load(tmp_path / "packed").to(device).generate(prompt, **fixed)
    compiled = load(tmp_path / "packed", fuse=True, compile=True).to(device)
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    assert torch.equal(compiled.generate(prompt, **fixed), expected)
    assert torch.equal(compiled.generate(prompt, **fixed), expected)
    counters = torch._dynamo.utils.counters
    assert counters["stats"]["unique_graphs"] == 1 and not counters["graph_break"]
    compiled.save_pretrained(tmp_path / "again")  # what is compiled is no part of a checkpoint
    assert torch.equal(load(tmp_path / "again").to(device).generate(prompt, **fixed), expected)
