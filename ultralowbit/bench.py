"""What compressing costs, against what it must cost: `ultralowbit bench pipeline`."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor


@dataclass(frozen=True)
class Shape:
    """Of a Llama; the default is TinyLlama-1.1B's."""

    hidden: int = 2048
    inter: int = 5632
    heads: int = 32
    kv_heads: int = 4
    vocab: int = 32000

    @property
    def linears(self) -> dict[str, tuple[int, int]]:
        """Linears of a block -> (out, in)."""
        kv = self.hidden // self.heads * self.kv_heads
        return {
            "self_attn.q_proj": (self.hidden, self.hidden),
            "self_attn.k_proj": (kv, self.hidden),
            "self_attn.v_proj": (kv, self.hidden),
            "self_attn.o_proj": (self.hidden, self.hidden),
            "mlp.gate_proj": (self.inter, self.hidden),
            "mlp.up_proj": (self.inter, self.hidden),
            "mlp.down_proj": (self.hidden, self.inter),
        }


def write_model(folder: Path, layers: int, shape: Shape = Shape(), seed: int = 0) -> Path:
    """A random Llama in bf16 with a tokenizer whose words are w0, w1, ...; one block is in memory at a time."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, PreTrainedTokenizerFast

    folder.mkdir(parents=True, exist_ok=True)
    config = LlamaConfig(
        architectures=["LlamaForCausalLM"], dtype="bfloat16", hidden_size=shape.hidden, intermediate_size=shape.inter,
        num_hidden_layers=layers, num_attention_heads=shape.heads, num_key_value_heads=shape.kv_heads,
        vocab_size=shape.vocab, max_position_embeddings=2048, tie_word_embeddings=False,
    )  # fmt: skip
    config.save_pretrained(folder)
    tokenizer = Tokenizer(models.WordLevel({f"w{i}": i for i in range(shape.vocab)}, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)

    generator = torch.Generator().manual_seed(seed)

    def random(rows: int, columns: int) -> Tensor:
        return torch.randn(rows, columns, generator=generator).div_(math.sqrt(columns)).bfloat16()

    def norm() -> Tensor:
        return torch.ones(shape.hidden, dtype=torch.bfloat16)

    weight_map = {}
    for i in range(layers + 1):
        if i < layers:
            block = f"model.layers.{i}"
            tensors = {f"{block}.{name}.weight": random(*size) for name, size in shape.linears.items()}
            tensors |= {f"{block}.{name}_layernorm.weight": norm() for name in ("input", "post_attention")}
        else:
            tensors = {"model.embed_tokens.weight": random(shape.vocab, shape.hidden), "model.norm.weight": norm()}
            tensors["lm_head.weight"] = random(shape.vocab, shape.hidden)
        file = f"model-{i + 1:05d}-of-{layers + 1:05d}.safetensors"
        save_file(tensors, folder / file, {"format": "pt"})
        weight_map |= dict.fromkeys(tensors, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def write_text(file: Path, words: int, vocab: int, seed: int = 0) -> Path:
    """Random words that the tokenizer of `write_model` knows, one token each."""
    ids = torch.randint(vocab, (words,), generator=torch.Generator().manual_seed(seed)).tolist()
    file.write_text(" ".join(f"w{i}" for i in ids))
    return file
