"""Packed models whose tensors accelerate keeps on a disk between uses: they compute and are saved alike."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig

import ultralowbit
from ultralowbit.nn import fused
from ultralowbit.recipe import Recipe

SIZES = {
    "vocab_size": 96, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 64, "bos_token_id": 0, "eos_token_id": 1,
}  # fmt: skip
MODELS: dict[str, dict[str, Any]] = {
    "llama": SIZES | {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True},
    "gemma3_text": SIZES,  # rows of the embedding are scaled
    "gpt2": {"vocab_size": 96, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 64},  # Conv1D
    "gpt_oss": SIZES | {"num_local_experts": 4, "num_experts_per_tok": 2},
}
TOKENS = torch.randint(4, 96, (1, 12), generator=torch.Generator().manual_seed(0))
SUMS = 2.0**-16
"""What the order of fp32 sums changes in logits near 1."""


@pytest.fixture(scope="module", params=MODELS)
def folder(request, tmp_path_factory, save_model) -> Path:
    root = tmp_path_factory.mktemp(request.param)
    source = save_model(AutoConfig.for_model(request.param, **MODELS[request.param]), root / "source")
    recipe = Recipe.load("rtn-4bit", ["quantize.group=32", "embeddings.method=ints"])
    return ultralowbit.compress(str(source), recipe, root / "packed").folder


def places(folder: Path, embedding: str) -> dict[str, str]:
    """A device map with all on the disk, but for what is looked up and the norms of the model."""
    model = ultralowbit.load(folder)
    decoder = model.base_model
    return {"lm_head": "disk"} | {
        f"{model.base_model_prefix}.{name}": "disk" if isinstance(child, nn.ModuleList) else embedding
        for name, child in decoder.named_children()
    }


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(TOKENS, use_cache=False).logits


@pytest.mark.parametrize("embedding", ["cpu", "disk"])
@pytest.mark.parametrize("fuse", [False, True])
def test_what_is_offloaded_computes_and_is_written_out(folder, fuse, embedding, tmp_path):
    def load(buffers: bool = True) -> Any:
        offload = {"offload_buffers": buffers, "offload_folder": tmp_path / "offloaded"}
        return ultralowbit.load(folder, fuse=fuse, device_map=places(folder, embedding), **offload)

    plain = ultralowbit.load(folder)
    expected = logits(plain)
    model = load()
    assert any(buffer.is_meta for buffer in model.buffers())
    assert torch.equal(logits(model), expected)
    torch.testing.assert_close(logits(load(buffers=False)), expected, rtol=0, atol=SUMS)

    model.save_pretrained(tmp_path / "saved")
    assert torch.equal(logits(ultralowbit.load(tmp_path / "saved")), expected)
    torch.testing.assert_close(logits(model.dequantize()), logits(plain.dequantize()), rtol=0, atol=SUMS)


def test_nothing_is_fused_where_nothing_is_in_memory(folder):
    assert fused.fuse(ultralowbit.load(folder, device_map="meta")) == []
