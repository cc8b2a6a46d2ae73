"""Random models in the shapes of real ones."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from ultralowbit.checkpoint.config import DIGEST, config_digest, read_config_json
from ultralowbit.errors import InputError
from ultralowbit.format.planes import Planes, TiedPlanes
from ultralowbit.format.segment import Segment
from ultralowbit.format.testing import random_packed
from ultralowbit.format.weight import Format, PackedWeight
from ultralowbit.methods.pb_llm import PBLLM
from ultralowbit.methods.ptq161 import PTQ161
from ultralowbit.nn.fused import fuse
from ultralowbit.nn.hf_names import stored_tensors
from ultralowbit.nn.linear import PackedLinear, swap
from ultralowbit.nn.original import build_on_meta
from ultralowbit.nn.quantizer import UltraLowBitConfig


@dataclass(frozen=True)
class Shape:
    """The shape of a Llama; the default is TinyLlama-1.1B's."""

    hidden: int = 2048
    inter: int = 5632
    heads: int = 32
    kv_heads: int = 4
    vocab: int = 32000

    @classmethod
    def wide(cls, hidden: int) -> Shape:
        """The shape of this width in the default's proportions; `InputError` where heads of 64 do not fill it."""
        if hidden % 64:
            raise InputError(f"a block {hidden} wide has no whole number of heads: give a multiple of 64")
        return cls(hidden, hidden * 11 // 4, hidden // 64, max(1, hidden // 512))

    @property
    def linears(self) -> dict[str, tuple[int, int]]:
        """The name of each Linear of a block -> (out, in)."""
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


def write_model(
    folder: Path, layers: int, shape: Shape = Shape(), seed: int = 0, segment: Callable[[int], Segment] | None = None
) -> Path:
    """Write a random Llama in bf16, one block at a time, with a tokenizer whose words are w0, w1, ...

    Where `segment` is given, which makes a segment for a number of columns, its Linears are packed: random words and
    scales, which no weight had.
    """

    folder.mkdir(parents=True, exist_ok=True)
    config = LlamaConfig(
        architectures=["LlamaForCausalLM"], dtype="bfloat16", hidden_size=shape.hidden, intermediate_size=shape.inter,
        num_hidden_layers=layers, num_attention_heads=shape.heads, num_key_value_heads=shape.kv_heads,
        vocab_size=shape.vocab, max_position_embeddings=2048, tie_word_embeddings=False,
    )  # fmt: skip
    if segment:
        formats = {
            f"model.layers.{i}.{name}": Format((segment(columns),))
            for i in range(layers)
            for name, (_, columns) in shape.linears.items()
        }
        config.quantization_config = UltraLowBitConfig.of(formats).to_dict()
    config.save_pretrained(folder)
    tokenizer = Tokenizer(models.WordLevel({f"w{i}": i for i in range(shape.vocab)}, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)

    generator = torch.Generator().manual_seed(seed)

    def random(rows: int, columns: int) -> Tensor:
        return torch.randn(rows, columns, generator=generator, dtype=torch.float32).div_(math.sqrt(columns)).bfloat16()

    def linear(rows: int, columns: int) -> dict[str, Tensor]:
        if segment is None:
            return {"weight": random(rows, columns)}
        return random_packed(Format((segment(columns),)), rows, seed).tensors

    def norm() -> Tensor:
        return torch.ones(shape.hidden, dtype=torch.bfloat16)

    weight_map = {}
    for i in range(layers + 1):
        if i < layers:
            block = f"model.layers.{i}"
            tensors = {
                f"{block}.{name}.{part}": tensor
                for name, size in shape.linears.items()
                for part, tensor in linear(*size).items()
            }
            tensors |= {f"{block}.{name}_layernorm.weight": norm() for name in ("input", "post_attention")}
        else:
            tensors = {"model.embed_tokens.weight": random(shape.vocab, shape.hidden), "model.norm.weight": norm()}
            tensors["lm_head.weight"] = random(shape.vocab, shape.hidden)
        file = f"model-{i + 1:05d}-of-{layers + 1:05d}.safetensors"
        save_file(tensors, folder / file, {"format": "pt", DIGEST: config_digest(read_config_json(folder))})
        weight_map |= dict.fromkeys(tensors, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def write_headers(folder: Path, config: PretrainedConfig, most: int = 1 << 32) -> Path:
    """Write the checkpoint that a config describes, in bf16, of which the headers alone are real: its values are holes
    in files of at most `most` bytes each, one tensor at least. Its tensors are those that transformers would save. What
    is planned from headers can be tried so for models that no disk here holds."""
    folder.mkdir(parents=True, exist_ok=True)
    config.dtype = "bfloat16"
    config.save_pretrained(folder)
    shards: list[dict[str, tuple[int, ...]]] = [{}]
    room = most
    for name, tensor in stored_tensors(build_on_meta(config, torch.bfloat16)).items():
        if 2 * tensor.numel() > room and shards[-1]:
            shards.append({})
            room = most
        shards[-1][name] = tuple(tensor.shape)
        room -= 2 * tensor.numel()
    weight_map = {}
    for i, shapes in enumerate(shards):
        file, header, end = f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors", {}, 0
        for name, shape in shapes.items():
            start, end = end, end + 2 * math.prod(shape)
            header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [start, end]}
        weight_map |= dict.fromkeys(shapes, file)
        encoded = json.dumps(header).encode()
        with open(folder / file, "wb") as f:
            f.write(len(encoded).to_bytes(8, "little") + encoded)
            f.truncate(8 + len(encoded) + end)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def write_text(file: Path, words: int, vocab: int, seed: int = 0) -> Path:
    """Write random words that the tokenizer of `write_model` knows; each is one token."""
    ids = torch.randint(vocab, (words,), generator=torch.Generator().manual_seed(seed)).tolist()
    file.write_text(" ".join(f"w{i}" for i in ids))
    return file


LLAMA_7B = {
    "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32,
    "num_key_value_heads": 32, "vocab_size": 32000,
}  # fmt: skip


def random_llama(
    config: LlamaConfig, device: torch.device, dtype: torch.dtype, format_of: Callable[[int], Format] | None
) -> PreTrainedModel:
    """Make a Llama of random weights on the device; Linears that share an input are multiplied at once.

    The Linears of its blocks have the format that `format_of` makes for their columns, without a dense weight ever
    being made, or are dense where it is None.
    """
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    if format_of is not None:
        linears = [name for name, m in model.model.layers.named_modules() if isinstance(m, nn.Linear)]
        for name in linears:
            linear = model.model.layers.get_submodule(name)
            swap(model.model.layers, name, PackedLinear.replacing(linear, format_of(linear.in_features)))
    model.to_empty(device=device)
    model.model.rotary_emb = type(model.model.rotary_emb)(config).to(device)  # its buffer is not random
    generator = torch.Generator(device).manual_seed(0)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "norm" in name:
                p.fill_(1)
            else:
                p.normal_(0, config.hidden_size**-0.5, generator=generator)
    shared: dict[Format, dict[str, Tensor]] = {}  # what is done to an input is the same for all Linears that have it
    for i, module in enumerate(m for m in model.modules() if isinstance(m, PackedLinear)):
        packed = random_packed(module.format, module.out_features, i, device)
        common = {name: packed.tensors[name] for name in packed.format.shared}
        tensors = packed.tensors | shared.setdefault(packed.format, common)
        module.fill(PackedWeight(packed.format, packed.shape, tensors))
    fuse(model)
    return model.eval()


FORMATS: dict[str, Callable[[int], Format]] = {
    "1 plane": lambda k: Format((Planes(k, 1),)),
    "1 plane g128": lambda k: Format((Planes(k, 1, 128),)),
    "2 planes g128": lambda k: Format((Planes(k, 2, 128),)),
    "2 tied planes g128": lambda k: Format((TiedPlanes(k, 2, 128),)),
    "ptq161": PTQ161().format,
    "pb-llm": PBLLM().format,
}
"""Name on the command line -> the format it has for a number of input columns."""
