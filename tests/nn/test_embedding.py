"""Packed embeddings: what is looked up, what a tied head multiplies by, and how they stand in a transformers model."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from ultralowbit.errors import InputError
from ultralowbit.format.transform import block_hadamard
from ultralowbit.format.weight import PackedWeight
from ultralowbit.methods.embeddings import IntEmbeddings, PlaneEmbeddings
from ultralowbit.methods.rotation import rotated_weight
from ultralowbit.nn.embedding import PackedEmbedding, TiedHead, find_ends
from ultralowbit.nn.hf import load, pack_model

ROWS, COLUMNS = 101, 40
SPECS = [
    IntEmbeddings(),
    IntEmbeddings(bits=4, group=32),
    IntEmbeddings(bits=4, symmetric=True),
    *(PlaneEmbeddings(planes=planes) for planes in (3, 5, 8)),
]
SIZES = {"vocab_size": ROWS, "hidden_size": COLUMNS, "num_hidden_layers": 2, "num_attention_heads": 4}
FAMILIES = {
    "llama": {"intermediate_size": 56},
    "gemma3_text": {"intermediate_size": 56, "head_dim": 16, "num_key_value_heads": 2},  # rows are scaled
    "gpt2": {},
    "opt": {"ffn_dim": 56, "word_embed_proj_dim": COLUMNS},
}


def packed(weight: torch.Tensor, spec, block: int | None = None) -> PackedWeight:
    rows = block_hadamard(weight, block) if block else weight
    result = spec.quantizer.quantize(rows, None)
    return rotated_weight(result, block) if block else result


def tied(kind: str):
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **SIZES, **FAMILIES[kind], tie_word_embeddings=True, pad_token_id=3)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


def with_weight(model, weight: torch.Tensor):
    dense = copy.deepcopy(model)
    with torch.no_grad():
        dense.get_input_embeddings().weight.copy_(weight)
    return dense


@pytest.mark.parametrize("block", [None, 32])
@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_rows_are_those_of_the_decoded_weight(spec, block):
    module = nn.Embedding(ROWS, COLUMNS, padding_idx=100)
    weight = packed(module.weight.detach(), spec, block)
    embedding = PackedEmbedding(module, weight.format)
    embedding.fill(weight)
    ids = torch.tensor([[100, 0, 7, 7], [3, 100, 99, 1]])
    assert torch.equal(embedding(ids), weight.dequantize()[ids])
    assert embedding(ids[:, :0]).shape == (2, 0, COLUMNS)
    assert embedding.bfloat16()(ids).dtype == torch.bfloat16
    assert torch.equal(embedding(ids), weight.dequantize(torch.bfloat16)[ids])
    assert {name: t.dtype for name, t in embedding.state_dict().items()} == {
        name: t.dtype for name, t in weight.tensors.items()
    }
    assert embedding.num_embeddings == ROWS
    for outside in (-1, ROWS):
        with pytest.raises((IndexError, RuntimeError), match="out of"):
            embedding(torch.tensor([0, outside]))


@pytest.mark.parametrize("rows", [5, 64])
def test_the_compiler_sees_rotated_rows(rows):
    """Few rows lie one after the other while they are rotated, many side by side."""
    weight = packed(torch.randn(ROWS, COLUMNS, dtype=torch.float32), IntEmbeddings(), 32)
    embedding = PackedEmbedding(nn.Embedding(ROWS, COLUMNS), weight.format)
    embedding.fill(weight)
    ids = torch.arange(rows)
    compiled = torch.compile(embedding, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(ids), embedding(ids))


@pytest.mark.parametrize("kind", FAMILIES)
def test_a_tied_model_computes_with_one_packed_weight(kind, tmp_path):
    model = tied(kind)
    name = find_ends(model).embedding
    assert find_ends(model).head is None
    weight = packed(model.get_input_embeddings().weight.detach(), IntEmbeddings(bits=4), 32)
    dense = with_weight(model, weight.dequantize())
    ids = torch.randint(4, ROWS, (2, 9))
    # bytes are multiplied in another order of sums than cuBLAS' or MKL's
    expected, tolerance = dense(ids).logits, 64 * torch.finfo(torch.float32).eps * COLUMNS
    ours = pack_model(copy.deepcopy(model), {name: weight})
    assert isinstance(ours.get_output_embeddings(), TiedHead)
    torch.testing.assert_close(ours(ids).logits, expected, rtol=0, atol=tolerance)
    stored = [n for n in ours.state_dict() if n.startswith(name) or "head" in n]
    assert stored == [f"{name}.{part}" for part in weight.tensors]

    ours.save_pretrained(tmp_path)
    loaded = load(tmp_path)
    loaded.tie_weights()  # as other programs do, which ties nothing here
    assert torch.equal(loaded(ids).logits, ours(ids).logits)
    ours.generate(ids, max_new_tokens=2, do_sample=False)
    with pytest.raises(InputError, match="cannot be resized"):
        loaded.resize_token_embeddings(200)
    for same in ({}, {"new_num_tokens": ROWS}, {"pad_to_multiple_of": 1}):
        assert loaded.resize_token_embeddings(**same) is loaded.get_input_embeddings()
    with pytest.raises(InputError, match="from 101 rows to 104"):
        loaded.resize_token_embeddings(pad_to_multiple_of=8)

    plain = loaded.dequantize()
    assert plain.get_output_embeddings().weight is plain.get_input_embeddings().weight
    torch.testing.assert_close(plain(ids).logits, expected, rtol=0, atol=tolerance)
    assert plain.resize_token_embeddings(200).num_embeddings == 200
    assert plain.get_output_embeddings().weight is plain.get_input_embeddings().weight


def test_a_model_without_a_head_is_loaded_too(tmp_path):
    from transformers import AutoModel

    model = tied("llama")
    weight = packed(model.get_input_embeddings().weight.detach(), IntEmbeddings())
    ours = pack_model(copy.deepcopy(model), {find_ends(model).embedding: weight})
    ours.save_pretrained(tmp_path)
    ids = torch.randint(4, ROWS, (2, 9))
    bare = AutoModel.from_pretrained(tmp_path)
    assert torch.equal(bare(ids).last_hidden_state, ours.model(ids).last_hidden_state)


def test_a_head_follows_a_copied_model():
    model = tied("llama")
    weight = packed(model.get_input_embeddings().weight.detach(), IntEmbeddings())
    ours = copy.deepcopy(pack_model(model, {"model.embed_tokens": weight}))
    assert ours.lm_head.embedding is ours.model.embed_tokens is ours.resize_token_embeddings()


def test_what_is_no_embedding_is_refused():
    model = tied("llama")
    model.model.embed_tokens = nn.EmbeddingBag(ROWS, COLUMNS)
    with pytest.raises(InputError, match="embeddings of LlamaForCausalLM are EmbeddingBag and its head Linear"):
        find_ends(model)


def test_a_head_that_the_model_casts_to_is_refused(monkeypatch):
    monkeypatch.setattr("ultralowbit.nn.embedding.cast_to", lambda model: {"lm_head", "model.layers.0.mlp"})
    with pytest.raises(InputError, match="casts to the dtype of lm_head, which has none where it is packed"):
        find_ends(tied("llama"))
