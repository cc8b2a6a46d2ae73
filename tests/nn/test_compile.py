"""`load(..., compile=True)`: a step of `generate` is one compiled graph, and writes what it writes without."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from ultralowbit.format.planes import Planes
from ultralowbit.format.testing import random_packed
from ultralowbit.format.weight import Format
from ultralowbit.nn.hf import load, pack_model


def packed_folder(save_model, tiny_config, tmp_path) -> Path:
    source = save_model(tiny_config(num_hidden_layers=2), tmp_path / "model")
    model = AutoModelForCausalLM.from_pretrained(source)
    linears = {name: m for name, m in model.model.named_modules(prefix="model") if isinstance(m, nn.Linear)}
    formats = {name: Format((Planes(m.in_features, 2),)) for name, m in linears.items()}
    packed = {name: random_packed(formats[name], m.out_features) for name, m in linears.items()}
    pack_model(model, packed).save_pretrained(tmp_path / "packed")
    return tmp_path / "packed"


def test_what_is_compiled_is_no_part_of_a_checkpoint(save_model, tiny_config, tmp_path):
    folder = packed_folder(save_model, tiny_config, tmp_path)
    model = copy.deepcopy(load(folder, compile=True))
    model.generation_config.max_length = 40  # what the user sets is
    for _ in range(2):
        model.save_pretrained(tmp_path / "again")
    stored = [json.loads((f / "generation_config.json").read_text()) for f in (folder, tmp_path / "again")]
    assert stored[1] == stored[0] | {"max_length": 40}
    assert model.generation_config.cache_implementation == "static" and model.generation_config.compile_config.fullgraph


@pytest.mark.slow
def test_a_compiled_step_is_one_graph_and_writes_the_same(save_model, tiny_config, tmp_path, device):
    folder = packed_folder(save_model, tiny_config, tmp_path)
    prompt = torch.tensor([[5, 9, 11], [77, 3, 2]], device=device)
    fixed = {"do_sample": False, "pad_token_id": 0, "eos_token_id": None, "max_new_tokens": 12}
    expected = load(folder).to(device).generate(prompt, **fixed)
    compiled = load(folder, fuse=True, compile=True).to(device)
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    assert torch.equal(compiled.generate(prompt, **fixed), expected)
    assert torch.equal(compiled.generate(prompt, **fixed), expected)
    counters = torch._dynamo.utils.counters
    assert counters["stats"]["unique_graphs"] == 1 and not counters["graph_break"]
