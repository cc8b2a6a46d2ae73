"""What tests of several folders share: devices, a tiny tokenizer, a text to calibrate on, model folders."""

from __future__ import annotations

import gc
import os
import random
import string
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast
from transformers.utils import logging

VOCAB = 96

os.environ.pop("COLUMNS", None)  # xdist sets it: tables would be cut to a terminal's width
torch.set_num_threads(1)  # tiny products: more threads only wait for one another
logging.disable_progress_bar()


def pytest_make_parametrize_id(config: Any, val: Any, argname: str) -> str | None:
    """Ids that are the same in every process: xdist compares them."""
    if isinstance(val, set | frozenset):
        return "+".join(sorted(map(str, val)))
    return getattr(val, "__name__", None) if callable(val) else None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with slow tests come first: a worker gets whole files, and none shall be left with a long one."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


def pytest_collection_finish() -> None:
    """What was imported stays: `compress` collects garbage after every block, and would look at all of it each time."""
    gc.freeze()


def pytest_unconfigure() -> None:
    gc.unfreeze()


@pytest.fixture(scope="session", autouse=True)
def tokens_are_kept_apart(tmp_path_factory) -> Iterator[None]:
    """Tests leave the user's cache alone, and take no tokens from it."""
    folder = str(tmp_path_factory.mktemp("assets"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("huggingface_hub.utils._cache_assets.HF_ASSETS_CACHE", folder)
        patch.setenv("HF_ASSETS_CACHE", folder)  # for other processes
        yield


DEVICES = [
    "cpu",
    pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")),
]


@pytest.fixture(params=DEVICES)
def device(request) -> torch.device:
    """The CPU, and a GPU where there is one: the same truth for both."""
    return torch.device(request.param)


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE without merges, as every class of tokenizer in transformers reads it: a character is a token."""
    characters = "\u0120" + string.ascii_letters + string.digits + string.punctuation
    vocab = {token: i for i, token in enumerate(["<s>", "</s>", "<unk>", "<pad>", *characters[: VOCAB - 4]])}
    letters = Tokenizer(models.BPE(vocab, []))
    letters.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    letters.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=letters, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="<pad>"
    )


@pytest.fixture(scope="session")
def text(tmp_path_factory) -> str:
    """A local file of 4000 characters, in no order."""
    rng = random.Random(0)
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("".join(rng.choice(string.ascii_letters + string.digits + " ") for _ in range(4000)))
    return str(path)


@pytest.fixture(scope="session")
def tiny_config() -> Callable[..., Any]:
    """tiny_config(kind, **changes): a model with the tokenizer's vocabulary, of a kind that takes Llama's keys."""
    sizes = {
        "vocab_size": VOCAB, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64, "bos_token_id": 0,
        "eos_token_id": 1,
    }  # fmt: skip
    return lambda kind="llama", **changes: AutoConfig.for_model(kind, **sizes | changes)


MIXTURES = {
    "mixtral": {"num_local_experts": 4},
    "qwen2_moe": {"num_experts": 4, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 48},
    "qwen3_moe": {"num_experts": 4, "moe_intermediate_size": 32, "head_dim": 16},
    "olmoe": {"num_experts": 4, "intermediate_size": 32},
    "deepseek_v3": {
        "n_routed_experts": 4, "moe_intermediate_size": 32, "n_group": 2, "topk_group": 1, "first_k_dense_replace": 1,
        "num_key_value_heads": 4, "q_lora_rank": 32, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 16,
        "v_head_dim": 16, "head_dim": 8,
    },
    "gpt_oss": {
        "num_local_experts": 4, "intermediate_size": 32, "head_dim": 16,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    },
}  # fmt: skip
"""Kinds of mixtures of experts -> what makes a small one of `tiny_config`."""


@pytest.fixture(scope="session")
def mixture_config(tiny_config) -> Callable[..., Any]:
    """mixture_config(kind, **changes): a model of two blocks with four experts, of which a token goes through two."""
    common = {"num_hidden_layers": 2, "num_experts_per_tok": 2}
    return lambda kind, **changes: tiny_config(kind, **common | MIXTURES[kind] | changes)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Tests that ask for a `mixture_kind` run with each."""
    if "mixture_kind" in metafunc.fixturenames:
        metafunc.parametrize("mixture_kind", MIXTURES)


def random_model(config: Any, seed: int = 0, **kwargs: Any) -> Any:
    """A causal LM whose every stored tensor is random, norms, biases and buffers too: none can be lost unseen."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, **kwargs).eval()
        with torch.no_grad():
            for name, p in model.state_dict().items():
                if p.is_floating_point() and name not in model.all_tied_weights_keys:
                    gain = p.ndim == 1 and not name.endswith("bias")
                    p.copy_(gain + (0.15 if p.ndim > 1 else 0.2) * torch.randn(p.shape))
    return model


@pytest.fixture(scope="session")
def save_model(tokenizer) -> Callable[..., Path]:
    """save_model(config, folder) writes a random model and the tokenizer as a checkpoint folder."""

    def save(config: Any, folder: Path, seed: int = 0, dtype: torch.dtype = torch.float32, **kwargs: Any) -> Path:
        random_model(config, seed).to(dtype).save_pretrained(folder, **kwargs)
        tokenizer.save_pretrained(folder)
        return folder

    return save
