"""Sampling says why it cannot, and leaves the random state alone."""

from __future__ import annotations

import math

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from ultralowbit.errors import CheckpointError, InputError
from ultralowbit.eval.generation import generate


@pytest.fixture
def model():
    config = LlamaConfig(
        vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4,
        initializer_range=0.5, tie_word_embeddings=False, eos_token_id=None, bos_token_id=None,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return LlamaForCausalLM(config).eval()


def test_samples_are_those_of_their_seed(model, tokenizer):
    state = torch.random.get_rng_state()
    a, b, c = (generate(model, tokenizer, "ab", max_new_tokens=8, temperature=2.0, seed=seed) for seed in (1, 1, 2))
    assert a == b != c and a.startswith("ab")
    assert torch.equal(state, torch.random.get_rng_state())


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_collapsed_model_is_named(model, tokenizer, value):
    model.model.norm.weight.data[0] = value
    with pytest.raises(CheckpointError, match="collapsed, compress it with more bits"):
        generate(model, tokenizer, "ab", max_new_tokens=2, temperature=1.0)


def test_a_temperature_too_small_to_divide_by_is_named(model, tokenizer):
    with pytest.raises(InputError, match="temperature of 1e-42 is too small"):
        generate(model, tokenizer, "ab", max_new_tokens=2, temperature=1e-42)


def test_it_ends_with_the_context(model, tokenizer, caplog):
    model.config.max_position_embeddings = 12
    text = generate(model, tokenizer, "abcd", max_new_tokens=2000)
    prompt = tokenizer("abcd")["input_ids"]
    written = len(tokenizer(text)["input_ids"])
    assert written <= 12 and f"context is 12 tokens, of which the prompt takes {len(prompt)}: at most" in caplog.text
    caplog.clear()
    assert generate(model, tokenizer, "abcd", max_new_tokens=12 - len(prompt)) == text and not caplog.text
    with pytest.raises(InputError, match=r"tokens and the model's context is 12: give at most 11 of them"):
        generate(model, tokenizer, "abcd" * 3, max_new_tokens=1)
