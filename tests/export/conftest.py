"""What tests of exporters share: tokenizers that llama.cpp reads, small models of every architecture, packed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from ultralowbit.methods.base import Method
from ultralowbit.nn.embedding import find_ends
from ultralowbit.nn.hf import pack_model

ROWS = 400  # of the embeddings: more than there are tokens, as in real models
SPECIAL = ["<s>", "</s>", "<unk>", "<pad>"]
PROSE = (
    "Once upon a time there was a little river that ran down from the hills to the sea, and in 1984 it didn't freeze. "
    "Nobody knew why; they'd all guessed: 'the winter's mild'.\n\n  Two old men   sat there -- waiting, waiting...\n"
    "Les élèves naïfs mangèrent déjà 12 gâteaux à 3,50 €. 東京は大きい。 Ω ≠ ∞!\t☃\n"
) * 3

ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama-untied": ("llama", {"tie_word_embeddings": False}),
    "llama-biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama-3": (
        "llama",
        {
            "rope_parameters": {
                "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0,
                "high_freq_factor": 4.0, "original_max_position_embeddings": 64,
            },
        },
    ),
    "llama-linear": ("llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}}),
    "llama-yarn": (
        "llama",
        {
            "rope_parameters": {
                "rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64,
            },
        },
    ),
    "mistral": ("mistral", {"sliding_window": None}),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {}),
    "gemma3": ("gemma3_text", {"num_hidden_layers": 7, "query_pre_attn_scalar": 32, "sliding_window": 8}),
    "phi3": ("phi3", {}),
    "phi3-long": (
        "phi3",
        {
            "max_position_embeddings": 512,
            "original_max_position_embeddings": 256,
            "rope_parameters": {
                "rope_type": "longrope", "rope_theta": 10000.0,
                "short_factor": [1 + i / 16 for i in range(16)], "long_factor": [1 + i / 8 for i in range(16)],
            },
        },
    ),
    "phi3-partial": (
        "phi3",
        {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}},
    ),
}  # fmt: skip
"""A name -> transformers' model_type and what differs from the other small models."""


def _fast(backend: Tokenizer) -> PreTrainedTokenizerFast:
    tokens = dict(zip(("bos_token", "eos_token", "unk_token", "pad_token"), SPECIAL, strict=True))
    return PreTrainedTokenizerFast(tokenizer_object=backend, **tokens)


@pytest.fixture(scope="session")
def words() -> PreTrainedTokenizerFast:
    """BPE over bytes with words split as in GPT-2."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(
        [PROSE], trainers.BpeTrainer(vocab_size=390, special_tokens=SPECIAL, initial_alphabet=sorted(alphabet))
    )
    tokenizer = _fast(backend)
    tokenizer.chat_template = "{% for message in messages %}<s>{{ message['content'] }}</s>{% endfor %}"
    return tokenizer


@pytest.fixture(scope="session")
def pieces() -> PreTrainedTokenizerFast:
    """BPE over SentencePiece's pieces, what it does not know in bytes, a space before every text."""
    backend = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    known = PROSE[:190]
    tokens = SPECIAL + [f"<0x{byte:02X}>" for byte in range(256)]
    backend.train_from_iterator([known], trainers.BpeTrainer(vocab_size=130, special_tokens=SPECIAL))
    trained = backend.get_vocab()
    learned = [t for t in sorted(trained, key=trained.get) if t not in SPECIAL]
    merges = [tuple(merge) for merge in json.loads(backend.to_str())["model"]["merges"]]
    vocabulary = {token: i for i, token in enumerate(tokens + learned)}
    backend.model = models.BPE(vocabulary, merges, byte_fallback=True, unk_token="<unk>", fuse_unk=True)
    return _fast(backend)


@pytest.fixture(scope="session")
def small_config() -> Callable[..., Any]:
    """small_config(name, **changes): the config of a small model, whose rows hold every block type."""

    def make(name: str, **changes: Any) -> Any:
        kind, own = ARCHITECTURES[name]
        shape = {
            "vocab_size": ROWS, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2,
            "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32, "max_position_embeddings": 256,
            "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 3, "tie_word_embeddings": True,
        }  # fmt: skip
        return AutoConfig.for_model(kind, **{**shape, **own, **changes})

    return make


@pytest.fixture(scope="session")
def save_packed(words, save_model) -> Callable[..., Path]:
    """save_packed(config, method, folder): folder/packed, where the Linears of the random model in folder/source are
    rounded to nearest, and with `embeddings` the embedding and the head too, both with a tokenizer."""

    def save(
        config: Any, method: Method, folder: Path, tokenizer: Any = words, embeddings: Method | None = None
    ) -> Path:
        model = AutoModelForCausalLM.from_pretrained(save_model(config, folder / "source"))
        linears = {
            name: method.quantize(module.weight.detach(), None)
            for name, module in model.named_modules()
            if isinstance(module, torch.nn.Linear) and "layers" in name
        }
        if embeddings is not None:
            ends = {name: model.get_submodule(name).weight.detach() for name in find_ends(model).names}
            linears |= {name: embeddings.quantize(weight, None) for name, weight in ends.items()}
        pack_model(model, linears).save_pretrained(folder / "packed")
        for part in ("source", "packed"):
            tokenizer.save_pretrained(folder / part)
        return folder / "packed"

    return save
