"""Calibration windows follow the published rule; a model's own samples are reproducible and leave global state be."""

from __future__ import annotations

import logging
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from ultralowbit.data import calibration, tokenize
from ultralowbit.data.calibration import calibrate
from ultralowbit.data.corpora import token_sha256
from ultralowbit.data.tokenize import encode
from ultralowbit.errors import InputError

VOCAB = 64


@pytest.fixture(scope="module")
def tokenizer():
    vocab = {"<s>": 0, "</s>": 1, "<unk>": 2, **{f"w{n}": n for n in range(3, VOCAB)}}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>", model_max_length=32
    )


@pytest.fixture(scope="module")
def model_path(tmp_path_factory):
    config = LlamaConfig(
        vocab_size=VOCAB + 6,  # rows that no token has
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=48,
        initializer_range=0.4,
        bos_token_id=0,
        eos_token_id=[1, 63],
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LlamaForCausalLM(config)
    path = tmp_path_factory.mktemp("model")
    model.save_pretrained(path)
    return path


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text(" ".join(f"w{n % 50 + 3}" for n in range(500)))
    return str(path)


def words(*numbers):
    return " ".join(f"w{n}" for n in numbers)


# -- texts


@pytest.mark.parametrize("seed", [0, 2])
def test_text_windows_are_the_published_draws(text, tokenizer, seed):
    calibration = calibrate(text, tokenizer, samples=16, length=32, seed=seed)
    ids = [n % 50 + 3 for n in range(500)]
    random.seed(seed)
    expected = []
    for _ in range(16):
        i = random.randint(0, len(ids) - 32 - 1)
        expected.append(ids[i : i + 32])
    assert torch.equal(calibration.tokens, torch.tensor(expected))
    assert (calibration.tokens.dtype, calibration.source, calibration.seed) == (torch.int64, text, seed)
    assert calibration.sha256 == token_sha256(calibration.tokens)


def test_text_is_tokenised_once_and_quietly(text, tokenizer, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)  # caplog listens at the root
    tokenizer.deprecation_warnings.clear()  # each tokenizer warns once
    texts = []
    monkeypatch.setattr(tokenize, "encode", lambda tokenizer, text: texts.append(text) or encode(tokenizer, text))
    calibrate(text, tokenizer, samples=4, length=8, seed=0)
    assert texts == [Path(text).read_text()]
    assert not caplog.records


def test_shortest_text(tmp_path, tokenizer):
    path = tmp_path / "a.txt"
    path.write_text(words(3, 4, 5, 6))
    calibration = calibrate(str(path), tokenizer, samples=2, length=3, seed=0)
    assert calibration.tokens.tolist() == [[3, 4, 5]] * 2
    with pytest.raises(InputError, match=r"has 4 tokens, expected at least 5 .* shorter length or a longer text"):
        calibrate(str(path), tokenizer, samples=2, length=4, seed=0)


def test_local_documents_are_one_text(tmp_path, tokenizer):
    path = tmp_path / "a.jsonl"
    path.write_text("".join(f'{{"text": "w{n}"}}\n' for n in range(3, 23)))
    calibration = calibrate(str(path), tokenizer, samples=1, length=19, seed=0)
    assert calibration.tokens.tolist() == [list(range(3, 22))]


@pytest.fixture
def documents(monkeypatch):
    rows = [words(*range(3, 3 + length)) for length in (1, 30, 8, 9, 20, 3, 12)]
    monkeypatch.setattr(calibration, "is_collection", lambda source: source == "c4")
    monkeypatch.setattr(calibration, "read_documents", lambda source, split: rows if split == "train" else [])
    return rows


def test_collections_follow_gptq(documents, tokenizer):
    calibration = calibrate("c4", tokenizer, samples=24, length=8, seed=0)
    random.seed(0)
    expected = []
    for _ in range(24):
        while True:
            i = random.randint(0, len(documents) - 1)
            ids = tokenizer(documents[i], add_special_tokens=False).input_ids
            if len(ids) > 8:
                break
        i = random.randint(0, len(ids) - 8 - 1)
        expected.append(ids[i : i + 8])
    assert torch.equal(calibration.tokens, torch.tensor(expected))


def test_collections_without_a_long_document(documents, tokenizer, monkeypatch):
    monkeypatch.setattr(calibration, "_TRIES", 100)
    with pytest.raises(InputError, match=r"longest of 100 documents .* 30 tokens, expected more than 30: .* shorter"):
        calibrate("c4", tokenizer, samples=1, length=30, seed=0)


@pytest.mark.parametrize("source", ["text", "c4"])
def test_progress_counts_bytes_of_texts_and_tokens_of_documents(source, text, documents, tokenizer):
    seen = []
    calibrate(
        text if source == "text" else source,
        tokenizer,
        samples=3,
        length=8,
        seed=0,
        progress=lambda done, total: seen.append((done, total)),
    )
    size = Path(text).stat().st_size
    assert seen == ([(size, size)] if source == "text" else [(8, 24), (16, 24), (24, 24)])


@pytest.mark.parametrize("wrong", [{"samples": 0}, {"length": 0}, {"length": -1}])
def test_bad_sizes(text, tokenizer, wrong):
    with pytest.raises(InputError, match=r"expected at least 1"):
        calibrate(text, tokenizer, **{"samples": 1, "length": 4, "seed": 0, **wrong})


# -- the model's own samples


def own(tokenizer, model_path, **changes):
    return calibrate("self", tokenizer, **{"samples": 11, "length": 24, "seed": 0, "model_path": model_path, **changes})


def test_own_samples_are_reproducible_and_plain(tokenizer, model_path):
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()
    seen = []
    calibration = own(tokenizer, model_path, progress=lambda *done: seen.append(done))
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    assert (np.random.get_state()[1] == states[2]).all()

    assert calibration.tokens.shape == (11, 24)
    assert calibration.tokens.dtype == torch.int64
    assert calibration.tokens.min() >= 3  # <s>, </s> and <unk> are special
    assert calibration.tokens.max() <= 62  # 63 ends a sample for this model, further rows are no tokens
    assert seen == sorted(seen)
    assert seen[-1] == (11 * 24, 11 * 24)

    torch.manual_seed(5)
    assert own(tokenizer, model_path).sha256 == calibration.sha256
    assert own(tokenizer, model_path, seed=1).sha256 != calibration.sha256
    assert (calibration.source, calibration.seed) == ("self", 0)


def test_own_samples_start_greedy_then_vary(tokenizer, model_path):
    generated = own(tokenizer, model_path, samples=8).tokens
    model = LlamaForCausalLM.from_pretrained(model_path)
    with torch.no_grad():
        logits = model(generated).logits
    likeliest = logits[:, :-1, 3:63].argmax(-1) + 3  # without a cache: the model's own view of the prefix
    rng = random.Random(0)
    assert generated[:, 0].tolist() == [rng.choice(range(3, 63)) for _ in range(8)]
    greedy = [rng.randint(3, 5) for _ in range(8)]
    for row, until in enumerate(greedy):
        assert torch.equal(generated[row, 1:until], likeliest[row, : until - 1])
    assert any(generated[row, until] != likeliest[row, until - 1] for row, until in enumerate(greedy))
    assert (generated[:, 1:] == likeliest).float().mean() < 0.8


def test_own_samples_stay_below_a_small_embedding(tokenizer, model_path, tmp_path):
    model = LlamaForCausalLM.from_pretrained(model_path)
    model.resize_token_embeddings(8)
    model.save_pretrained(tmp_path)
    assert {*own(tokenizer, tmp_path).tokens.flatten().tolist()} == {3, 4, 5, 6, 7}
    model.resize_token_embeddings(3)
    model.save_pretrained(tmp_path)
    with pytest.raises(InputError, match="only special tokens"):
        own(tokenizer, tmp_path)


def test_own_samples_without_a_cache_are_the_same(tokenizer, model_path, monkeypatch):
    calibration = own(tokenizer, model_path, samples=2)
    forward = LlamaForCausalLM.forward

    def cacheless(self, input_ids, **kwargs):
        output = forward(self, input_ids=input_ids)
        output.past_key_values = None
        return output

    monkeypatch.setattr(LlamaForCausalLM, "forward", cacheless)
    assert own(tokenizer, model_path, samples=2).sha256 == calibration.sha256


def test_a_broken_model_is_named(tokenizer, model_path, tmp_path):
    model = LlamaForCausalLM.from_pretrained(model_path)
    model.model.norm.weight.data[0] = torch.nan
    model.save_pretrained(tmp_path)
    with pytest.raises(InputError, match=r"logits .* not finite"):
        own(tokenizer, tmp_path)


def test_own_samples_need_a_model_that_fits(tokenizer, model_path, tmp_path):
    with pytest.raises(InputError, match="model_path"):
        own(tokenizer, None)
    with pytest.raises(InputError, match="cannot be loaded"):
        own(tokenizer, tmp_path)
    with pytest.raises(InputError, match="cannot be loaded on nowhere"):
        own(tokenizer, model_path, device="nowhere")
    with pytest.raises(InputError, match="length is 49 but the model has 48 positions"):
        own(tokenizer, model_path, length=49)


def test_own_samples_of_one_token(tokenizer, model_path):
    assert own(tokenizer, model_path, samples=3, length=1).tokens.shape == (3, 1)
