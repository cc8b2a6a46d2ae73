"""Folded rotations: the same function in other weights for every architecture that allows it, and why not in others."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from ultralowbit.errors import CheckpointError
from ultralowbit.nn.decoder import Decoder
from ultralowbit.nn.experts import separate_experts
from ultralowbit.nn.folding import FOLDABLE, Rotation, give_folded

CPU = torch.device("cpu")
MIXTURES = ("mixtral", "qwen3_moe")
WIDE = {"hidden_size": 96, "head_dim": 24, "pad_token_id": 3}  # 96 = 3 * 32, 24 = 3 * 8
CHANGES = {"llama": {"attention_bias": True, "mlp_bias": True}, "gemma": {"num_key_value_heads": 1}}


def decoder_of(folder: Path) -> Decoder:
    return Decoder(folder, torch.float32, CPU)


@torch.no_grad()
def logits(model, tokens: torch.Tensor) -> torch.Tensor:
    return model(tokens, use_cache=False).logits


@pytest.mark.parametrize("n", [1, 2, 7, 15, 24, 64, 96, 576])
def test_a_rotation_is_orthonormal_and_flat(n):
    R = Rotation(n, 0)(torch.eye(n, dtype=torch.float64))
    torch.testing.assert_close(R @ R.T, torch.eye(n, dtype=torch.float64), rtol=0, atol=1e-6)
    assert R.abs().max() <= (2 / n) ** 0.5 + 1e-6
    if n > 15:
        assert not torch.equal(R, Rotation(n, 1)(torch.eye(n, dtype=torch.float64)))


def test_a_rotation_turns_each_head():
    x = torch.randn(5, 3 * 24, dtype=torch.float64)
    R = Rotation(24, 3)(torch.eye(24, dtype=torch.float64))
    torch.testing.assert_close(Rotation(24, 3)(x), x @ torch.block_diag(R, R, R), rtol=1e-6, atol=1e-6)


@pytest.fixture(params=FOLDABLE)
def config(request, tiny_config, mixture_config):
    make = mixture_config if request.param in MIXTURES else tiny_config
    return make(request.param, **WIDE | CHANGES.get(request.param, {}))


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_a_folded_model_computes_the_same(tied, config, save_model, tmp_path):
    """In fp32, with gains and biases at random: off by no more than what rounding leaves, of which a fp64 model knows
    the size; the weights are others all the same, and every gain is 1."""
    config.tie_word_embeddings = tied
    folder = save_model(config, tmp_path / "model")
    model = AutoModelForCausalLM.from_pretrained(folder, experts_implementation="eager").eval()
    decoder = decoder_of(folder)
    assert decoder.fold(0) is None and decoder.folding.untied == tied
    folded = deepcopy(model)
    separate_experts(folded)
    give_folded(folded, decoder)
    tokens = torch.randint(96, (3, 32), generator=torch.Generator().manual_seed(0))
    plain, other, exact = logits(model, tokens), logits(folded, tokens), logits(model.double(), tokens)
    rounding = (plain - exact).abs().max()
    assert (other - exact).abs().max() <= 4 * rounding
    weights = decoder.read(list(decoder.specs))
    norms = ("layernorm.weight", "model.norm.weight")
    gains = [w + decoder.folding.offset for name, w in weights.items() if name.endswith(norms)]
    assert len(gains) == 2 * len(decoder.blocks) + 1 and all(torch.equal(g, torch.ones_like(g)) for g in gains)
    source = decoder_of(folder).read(list(decoder_of(folder).specs))
    same = {name for name, w in source.items() if w.ndim > 1 and torch.allclose(w, weights[name], atol=1e-3)}
    assert not same


def test_the_same_seed_folds_the_same(save_model, tiny_config, tmp_path):
    folder = save_model(tiny_config(), tmp_path / "model")
    read = {}
    for key, seed in (("a", 0), ("b", 0), ("c", 1)):
        decoder = decoder_of(folder)
        decoder.fold(seed)
        read[key] = decoder.read(list(decoder.specs))
    assert all(torch.equal(read["a"][name], read["b"][name]) for name in read["a"])
    assert not torch.equal(read["a"]["lm_head.weight"], read["c"]["lm_head.weight"])


def test_rows_outside_blocks_are_folded_a_part_at_a_time(save_model, tiny_config, tmp_path, monkeypatch):
    folder = save_model(tiny_config(tie_word_embeddings=True), tmp_path / "model")
    whole, parts = decoder_of(folder), decoder_of(folder)
    whole.fold(0)
    expected = whole.read(whole.names_outside_blocks())
    monkeypatch.setattr("ultralowbit.nn.folding._ROWS", 40)
    parts.fold(0)
    assert expected.keys() == {"model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"}
    for name, tensor in parts.read(list(expected)).items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-6, atol=1e-6)


def test_tensors_keep_the_dtype_in_which_they_are_stored(save_model, tiny_config, tmp_path):
    decoder = decoder_of(save_model(tiny_config(), tmp_path / "model", dtype=torch.bfloat16))
    decoder.fold(0)
    assert {w.dtype for w in decoder.read(list(decoder.specs)).values()} == {torch.bfloat16}


def test_what_is_folded_is_known_by_name(save_model, tiny_config, mixture_config, tmp_path):
    decoder = decoder_of(save_model(tiny_config("phi3", pad_token_id=3), tmp_path / "phi3"))
    decoder.fold(0)
    rest = {name for i in range(3) for name in decoder.linears(i)} - decoder.folding.folded
    assert rest == {f"model.layers.{i}.mlp.down_proj" for i in range(3)}
    assert {"model.embed_tokens", "lm_head"} < decoder.folding.folded
    mixture = decoder_of(save_model(mixture_config("mixtral"), tmp_path / "mixtral"))
    mixture.fold(0)
    rest = {name for i in range(2) for name in mixture.linears(i)} - mixture.folding.folded
    assert rest == {f"model.layers.{i}.mlp.experts.{e}.packed_down_proj" for i in range(2) for e in range(4)}


@pytest.mark.parametrize(
    ("kind", "changes", "said"),
    [
        ("gemma2", {"head_dim": 16}, "norms stand between"),
        ("gemma3_text", {"head_dim": 16}, "norms stand between"),
        ("olmo2", {}, "norms stand between"),
        ("gpt2", {"n_embd": 64, "n_head": 4, "n_layer": 2}, "LayerNorm takes the mean off"),
        ("stablelm", {}, "LayerNorm takes the mean off"),
        ("olmoe", None, "none of llama, mistral"),
    ],
)
def test_why_an_architecture_cannot_be_folded(kind, changes, said, save_model, tiny_config, mixture_config, tmp_path):
    config = mixture_config(kind) if changes is None else tiny_config(kind, pad_token_id=3, **changes)
    decoder = decoder_of(save_model(config, tmp_path / "model"))
    before = decoder.read(list(decoder.specs))
    assert said in decoder.fold(0) and decoder.folding is None
    assert all(torch.equal(w, before[name]) for name, w in decoder.read(list(decoder.specs)).items())


def test_code_that_only_calls_itself_llama_is_not_folded(save_model, tiny_config, tmp_path, monkeypatch):
    decoder = decoder_of(save_model(tiny_config(), tmp_path / "model"))
    monkeypatch.setattr(type(decoder.model), "__module__", "transformers_modules.mine.modeling")
    assert decoder.fold(0) == "its code is not that of transformers"


def test_a_damaged_norm_is_named(save_model, tiny_config, tmp_path):
    folder = save_model(tiny_config(), tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.input_layernorm.weight"][3] = float("nan")
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    decoder = decoder_of(folder)
    decoder.fold(0)
    with pytest.raises(CheckpointError, match=r"layers.1.input_layernorm.weight in .* holds NaN or Inf"):
        decoder.read(["model.layers.1.self_attn.q_proj.weight"])
