"""Decoders of many families: the streamed walk is the model's own forward, what is written loads as it is meant."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, MixtralConfig

import ultralowbit
from ultralowbit.checkpoint.files import Source
from ultralowbit.errors import CheckpointError, InputError
from ultralowbit.format.weight import Format
from ultralowbit.nn.calls import CallSpy, run_block
from ultralowbit.nn.decoder import Decoder
from ultralowbit.nn.embedding import TiedHead
from ultralowbit.nn.inputs import input_groups
from ultralowbit.nn.linear import PackedLinear, linear_shape
from ultralowbit.nn.original import build_on_meta
from ultralowbit.nn.quantizer import UltraLowBitConfig
from ultralowbit.recipe import Recipe

Q = "model.layers.0.self_attn.q_proj.weight"

CPU = torch.device("cpu")

PLAIN = {
    "vocab_size": 96,
    "hidden_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 3,
}
GQA = PLAIN | {"intermediate_size": 56, "num_key_value_heads": 2}
FEED_FORWARD = PLAIN | {"intermediate_size": 56}
OLD = {
    "vocab_size": 96,
    "n_embd": 40,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 64,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
SLIDING = {"sliding_window": 8}
FALCON = {key: value for key, value in PLAIN.items() if key not in ("max_position_embeddings", "pad_token_id")}

FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", GQA),
    "llama-tied-biases": ("llama", GQA | {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True}),
    "qwen2": ("qwen2", GQA | {"use_sliding_window": True, "max_window_layers": 1} | SLIDING),
    "qwen3": ("qwen3", GQA | {"head_dim": 12, "tie_word_embeddings": True}),
    "qwen3.5-hybrid": (
        "qwen3_5_text",
        GQA
        | {"head_dim": 16, "layer_types": ["linear_attention", "full_attention"]}
        | {"linear_num_value_heads": 2, "linear_num_key_heads": 2}
        | {"linear_key_head_dim": 8, "linear_value_head_dim": 8},
    ),
    "mistral": ("mistral", GQA | SLIDING),
    "gemma2": ("gemma2", GQA | SLIDING | {"head_dim": 16}),
    "gemma3": ("gemma3_text", GQA | SLIDING | {"head_dim": 16, "layer_types": ["sliding_attention", "full_attention"]}),
    "gemma4-block-buffers": (
        "gemma4_text",
        GQA
        | SLIDING
        | {"head_dim": 16, "global_head_dim": 20, "layer_types": ["sliding_attention", "full_attention"]}
        | {"hidden_size_per_layer_input": 0, "num_kv_shared_layers": 0},
    ),
    "opt": ("opt", PLAIN | {"ffn_dim": 56, "word_embed_proj_dim": 40}),
    "opt-350m": ("opt", PLAIN | {"ffn_dim": 56, "word_embed_proj_dim": 24, "do_layer_norm_before": False}),
    "gpt2": ("gpt2", OLD),
    "gpt-neox-renamed-head": ("gpt_neox", FEED_FORWARD),
    "gptj": ("gptj", OLD | {"n_embd": 48, "rotary_dim": 8}),
    "gpt-bigcode": ("gpt_bigcode", OLD),
    "phi": ("phi", FEED_FORWARD | {"partial_rotary_factor": 0.4}),
    "phi3-fused": ("phi3", GQA),
    "falcon-7b": ("falcon", FALCON | {"multi_query": True, "parallel_attn": True, "alibi": False}),
    "falcon-rw": ("falcon", FALCON | {"multi_query": False, "parallel_attn": False, "bias": True, "alibi": True}),
    "falcon-40b": ("falcon", FALCON | {"new_decoder_architecture": True, "num_kv_heads": 2, "alibi": False}),
    "bloom": ("bloom", {"vocab_size": 96, "hidden_size": 40, "n_layer": 2, "n_head": 4}),
    "mpt": (
        "mpt",
        {"vocab_size": 96, "d_model": 40, "n_layers": 2, "n_heads": 4, "max_seq_len": 64, "expansion_ratio": 2},
    ),
    "stablelm": ("stablelm", GQA | {"use_qkv_bias": True, "qk_layernorm": True}),
    "cohere": ("cohere", GQA),
    "olmo2": ("olmo2", GQA),
    "glm": ("glm", GQA | {"head_dim": 10}),
    "granite": ("granite", GQA | {"embedding_multiplier": 3.0, "residual_multiplier": 0.5}),
    "starcoder2": ("starcoder2", GQA | SLIDING),
    "smollm3": ("smollm3", GQA),
    "nemotron": ("nemotron", GQA),
    "lfm2-convolutions": ("lfm2", GQA | {"layer_types": ["conv", "full_attention"]}),
}


@pytest.fixture(scope="module", params=FAMILIES, ids=FAMILIES.keys())
def folder(request, tmp_path_factory, save_model) -> Path:
    model_type, values = FAMILIES[request.param]
    return save_model(AutoConfig.for_model(model_type, **values), tmp_path_factory.mktemp("model") / request.param)


@pytest.fixture(scope="module")
def llama(tmp_path_factory, save_model) -> Path:
    return save_model(AutoConfig.for_model("llama", **GQA), tmp_path_factory.mktemp("model") / "llama")


def some_tokens(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(4, 96, shape, generator=torch.Generator().manual_seed(seed))


def block_outputs(model: nn.Module, name: str, batches: Tensor) -> list[Tensor]:
    """What the named block returns when the whole model runs."""
    outputs = []
    handle = model.get_submodule(name).register_forward_hook(
        lambda module, args, out: outputs.append(out if isinstance(out, Tensor) else out[0])
    )
    with torch.no_grad():
        for batch in batches:
            model.base_model(input_ids=batch, use_cache=False)
    handle.remove()
    return outputs


@torch.no_grad()
def walk(decoder: Decoder, batches: Tensor, after: Callable[[int, list[Tensor]], None] | None = None) -> list[Tensor]:
    """The hidden states after the last block, one block in memory at a time."""
    hidden: dict[int, Tensor] = {}
    calls = decoder.block_inputs(iter(batches), hidden.__setitem__)
    for i in range(len(decoder.blocks)):
        with decoder.filled_block(i) as (block, _):
            before = {k: h.clone() for k, h in hidden.items()}
            outputs = {k: run_block(block, h, calls[i]) for k, h in hidden.items()}
            assert all(torch.equal(hidden[k], before[k]) for k in hidden), "the block wrote into its input"
        hidden = outputs
    return [hidden[k] for k in range(len(batches))]


def test_the_walk_is_the_whole_model(folder):
    decoder = Decoder(folder, torch.float32, CPU)
    batches = some_tokens(3, 2, 24)
    walked = walk(decoder, batches)
    whole = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    expected = block_outputs(whole, decoder.block_name(len(decoder.blocks) - 1), batches)
    assert all(torch.equal(a, b) for a, b in zip(walked, expected, strict=True))
    assert decoder.left_out() == {}


def test_the_walk_can_start_again_and_leaves_no_weight_behind(folder):
    decoder = Decoder(folder, torch.float32, CPU)
    batches = some_tokens(2, 1, 16)
    first = walk(decoder, batches)
    assert all(p.device.type == "meta" for p in decoder.model.parameters())
    assert all(torch.equal(a, b) for a, b in zip(walk(decoder, batches), first, strict=True))


def test_every_linear_of_a_block_is_seen_once_in_the_order_of_use(folder):
    decoder = Decoder(folder, torch.float32, CPU)
    hidden: dict[int, Tensor] = {}
    calls = decoder.block_inputs(iter(some_tokens(1, 2, 16)), hidden.__setitem__)
    for i in range(2):
        with decoder.filled_block(i) as (block, _), torch.no_grad():
            linears = decoder.linears(i)
            groups = input_groups(block, linears, calls[i], hidden[0])
        assert sorted(name for group in groups for name in group.names) == sorted(linears)
        assert all(group.calls == 1 for group in groups)


def test_linears_with_one_input_are_one_group(llama):
    decoder = Decoder(llama, torch.float32, CPU)
    hidden: dict[int, Tensor] = {}
    calls = decoder.block_inputs(iter(some_tokens(1, 2, 16)), hidden.__setitem__)
    with decoder.filled_block(1) as (block, _), torch.no_grad():
        groups = input_groups(block, decoder.linears(1), calls[1], hidden[0])
    attention, mlp = "model.layers.1.self_attn.", "model.layers.1.mlp."
    assert [group.names for group in groups] == [
        [attention + "q_proj", attention + "k_proj", attention + "v_proj"],
        [attention + "o_proj"],
        [mlp + "gate_proj", mlp + "up_proj"],
        [mlp + "down_proj"],
    ]


def recipe_for(decoder: Decoder, source: str) -> Recipe:
    """Three methods in one model: GPTQ at 2 bits, but sign planes for a block's second Linear and RTN for its last."""
    names = list(decoder.linears(0))
    second, last = (name.removeprefix(decoder.block_name(0)) for name in (names[1], names[-1]))
    return Recipe.model_validate(
        {
            "name": "mixed",
            "quantize": {"method": "gptq", "bits": 2, "group": 32},
            "overrides": [
                {"match": f"*{second}", "quantize": {"method": "sign", "planes": 2}},
                {"match": f"*{last}", "quantize": {"method": "rtn", "bits": 3, "group": 64}},
            ],
            "calibration": {"source": source, "samples": 6, "length": 24},
        }
    )


class Plain(nn.Module):
    """x @ weight.T + bias, and nothing of the package."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(weight), bias

    def forward(self, x: Tensor) -> Tensor:
        y = F.linear(x, self.weight)
        return y if self.bias is None else y + self.bias


def read_shards(folder: Path) -> dict[str, Tensor]:
    return {name: t for path in sorted(folder.glob("*.safetensors")) for name, t in load_file(path).items()}


def test_a_compressed_model_loads_as_the_model_it_means(folder, text, tmp_path, monkeypatch):
    monkeypatch.setattr("ultralowbit.kernels.packed_matmul.KERNELS", {})  # faster paths sum in another order
    decoder = Decoder(folder, torch.float32, CPU)
    recipe = recipe_for(decoder, text)
    done = ultralowbit.compress(str(folder), recipe, tmp_path / "out")
    assert done.fallbacks == {}

    stored = read_shards(done.folder)
    config = json.loads((done.folder / "config.json").read_text())["quantization_config"]
    assert sorted(config["modules"]) == sorted(name for i in range(2) for name in decoder.linears(i))
    assert len({*config["modules"].values()}) >= 3

    # by hand: the source's tensors, but for the Linears, which become what the packed bytes mean
    meant = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    for name, key in config["modules"].items():
        format, module = Format.from_dict(config["formats"][key]), meant.get_submodule(name)
        tensors = {part: stored.pop(f"{name}.{part}") for part in format.tensors(*linear_shape(module))}
        parent, _, leaf = name.rpartition(".")
        setattr(meant.get_submodule(parent), leaf, Plain(format.decode(tensors), module.bias))
    source = decoder.source.read(list(decoder.source.specs))
    for name, tensor in stored.items():
        assert torch.equal(tensor, source[decoder.key_of[name]]), name
    assert stored.keys() == {n for n in decoder.key_of if n.removesuffix(".weight") not in config["modules"]}

    tokens = some_tokens(2, 20, seed=1)
    loaded = AutoModelForCausalLM.from_pretrained(done.folder).eval()
    assert sum(isinstance(m, PackedLinear) for m in loaded.modules()) == len(config["modules"])
    with torch.no_grad():
        assert torch.equal(loaded(tokens).logits, meant(tokens).logits)


# --- dtypes, tied weights -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_walk_runs_in_the_compute_dtype_whatever_is_stored(tmp_path, save_model, dtype):
    folder = save_model(AutoConfig.for_model("llama", **GQA), tmp_path, dtype=dtype)
    batches = some_tokens(2, 2, 16)
    for compute in (torch.float32, dtype):
        decoder = Decoder(folder, compute, CPU)
        whole = AutoModelForCausalLM.from_pretrained(folder, dtype=compute).eval()
        walked, expected = walk(decoder, batches), block_outputs(whole, "model.layers.1", batches)
        assert walked[0].dtype == compute
        assert all(torch.equal(a, b) for a, b in zip(walked, expected, strict=True))
        assert decoder.read(["model.layers.0.mlp.up_proj.weight"]).popitem()[1].dtype == dtype


def test_shards_are_read_like_one_file(llama, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(llama)
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 3
    batches = some_tokens(1, 2, 16)
    one, many = (walk(Decoder(folder, torch.float32, CPU), batches)[0] for folder in (llama, tmp_path))
    assert torch.equal(one, many)


def test_a_checkpoint_of_the_bare_decoder_is_read_too(llama, tmp_path):
    """Hub checkpoints such as gpt2's leave out the prefix."""
    config = AutoConfig.for_model("gpt2", **OLD)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    model.transformer.save_pretrained(tmp_path)
    config.save_pretrained(tmp_path)
    decoder = Decoder(tmp_path, torch.float32, CPU)
    assert decoder.key_of["transformer.h.0.attn.c_attn.weight"] == "h.0.attn.c_attn.weight"
    batches = some_tokens(1, 2, 16)
    assert torch.equal(walk(decoder, batches)[0], block_outputs(model.eval(), "transformer.h.1", batches)[0])


@pytest.mark.parametrize("equal", [True, False], ids=["equal", "different"])
def test_a_stored_head_that_config_ties_is_kept_where_it_differs(tmp_path, save_model, equal):
    """As transformers does, which ties only what is equal."""
    folder = save_model(AutoConfig.for_model("llama", **GQA, tie_word_embeddings=True), tmp_path / "source")
    tensors = read_shards(folder)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] + (0 if equal else 1)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    recipe = Recipe.model_validate({"name": "x", "quantize": {"method": "rtn", "bits": 8, "group": 32}})
    out = ultralowbit.compress(str(folder), recipe, tmp_path / "out").folder
    assert ("lm_head.weight" in read_shards(out)) is not equal
    head = ultralowbit.load(out).lm_head.weight
    assert torch.equal(head, AutoModelForCausalLM.from_pretrained(folder).lm_head.weight)
    assert torch.equal(head, tensors["lm_head.weight"])
    packed = Recipe.model_validate(recipe.model_dump() | {"embeddings": {"method": "ints", "bits": 8}})
    out = ultralowbit.compress(str(folder), packed, tmp_path / "packed").folder
    assert isinstance(ultralowbit.load(out).lm_head, TiedHead) is equal
    torch.testing.assert_close(ultralowbit.load(out).dequantize().lm_head.weight, head, rtol=0, atol=2e-2)


def test_a_tied_weight_may_be_stored_as_that_of_the_head(tmp_path, save_model):
    folder = save_model(AutoConfig.for_model("llama", **GQA, tie_word_embeddings=True), tmp_path / "source")
    recipe = Recipe.model_validate({"name": "x", "quantize": {"method": "rtn", "bits": 8, "group": 32}})
    expected = read_shards(ultralowbit.compress(str(folder), recipe, tmp_path / "expected").folder)
    tensors = read_shards(folder)
    tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    assert not Decoder(folder, torch.float32, CPU).left_out()
    stored = read_shards(ultralowbit.compress(str(folder), recipe, tmp_path / "out").folder)
    assert stored.keys() == expected.keys() and all(torch.equal(stored[name], expected[name]) for name in expected)


# --- what is refused ----------------------------------------------------------------------------------------------


def test_what_lies_outside_linears_is_refused_by_the_share_that_would_stay(
    tmp_path, save_model, mixture_config, monkeypatch
):
    """Such as experts of a kind that is not known."""
    folder = save_model(mixture_config("mixtral"), tmp_path)
    monkeypatch.setattr("ultralowbit.nn.experts.experts_layout", lambda module: None)
    with pytest.raises(InputError, match=r"^\d\d% of the block weights .* are not in Linear layers .*experts"):
        Decoder(folder, torch.float32, CPU)


def test_what_a_model_casts_to_is_not_packed(llama, monkeypatch):
    decoder = Decoder(llama, torch.float32, CPU)
    names = decoder.shapes(0)
    monkeypatch.setattr("ultralowbit.nn.decoder.cast_to", lambda block: {"mlp.up_proj"})
    assert names.keys() - decoder.shapes(0).keys() == {"model.layers.0.mlp.up_proj"}


def test_blocks_that_are_told_of_the_text_are_refused(tmp_path, save_model):
    """The small Gemma 3n and 4 give each block embeddings of the tokens: those of one batch are wrong for another."""
    values = GQA | SLIDING | {"head_dim": 16, "global_head_dim": 16}
    values |= {"layer_types": ["sliding_attention", "full_attention"]}
    values |= {"hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 96, "num_kv_shared_layers": 0}
    folder = save_model(AutoConfig.for_model("gemma4_text", **values), tmp_path)
    with pytest.raises(InputError, match=r"gemma4_text .* depends on the text"):
        walk(Decoder(folder, torch.float32, CPU), some_tokens(2, 2, 16))


@pytest.mark.parametrize("may_share", [True, False])
def test_what_a_block_leaves_for_those_after_it_is_seen(may_share):
    """A block that reads it would, streamed, find that of another batch; Gemma 4 leaves some that none reads."""

    class Leaving(nn.Module):
        def forward(self, hidden, shared):
            shared["keys"] = hidden
            return hidden + 1

    blocks = nn.ModuleList([Leaving(), Leaving()])
    spy = CallSpy(blocks[0], blocks, may_share)
    for _ in range(2):
        shared = {}
        for block in blocks:
            block(torch.randn(1, 2, 3), shared=shared)
        assert not shared
    assert spy.alike is not may_share


def test_a_model_of_another_kind_is_refused(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "vit"}')
    save_file({"weight": torch.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(InputError, match="cannot build a causal LM"):
        Decoder(tmp_path, torch.float32, CPU)


@pytest.mark.parametrize("content", ["", "{", "[]", '{"model_type": "nothing-like-it"}', "{}"])
def test_a_config_that_cannot_be_read_is_refused(tmp_path, content):
    save_file({"weight": torch.zeros(1)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(InputError, match=r"not one that transformers can read|cannot build"):
        Decoder(tmp_path, torch.float32, CPU)


def test_a_model_with_code_of_its_own_asks_for_trust(tmp_path):
    save_file({"weight": torch.zeros(1)}, tmp_path / "model.safetensors")
    named = {"AutoConfig": "configuration_mine.MyConfig"}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "mine", "auto_map": named}))
    (tmp_path / "configuration_mine.py").write_text("raise SystemExit('it ran')")
    with pytest.raises(InputError, match=r"Python code that comes with it: .*--trust-remote-code"):
        Decoder(tmp_path, torch.float32, CPU)


def test_a_quantized_source_is_refused(llama, tmp_path):
    config = json.loads((llama / "config.json").read_text())
    published = {"quant_method": "mxfp4"}
    for method in ({"quant_method": "gptq", "bits": 4}, UltraLowBitConfig(recipe="x").to_dict(), published):
        (tmp_path / "config.json").write_text(json.dumps(config | {"quantization_config": method}))
        with pytest.raises(InputError, match=f"already quantized \\({method['quant_method']}\\)") as refused:
            Decoder(tmp_path, torch.float32, CPU)
        assert ("Mxfp4Config(dequantize=True)" in str(refused.value)) is (method is published)


def copied(folder: Path, target: Path, change: Callable[[dict[str, Tensor]], None]) -> Path:
    """The checkpoint with its tensors changed."""
    tensors = read_shards(folder)
    change(tensors)
    save_file(tensors, target / "model.safetensors")
    (target / "config.json").write_bytes((folder / "config.json").read_bytes())
    return target


def test_a_missing_tensor_is_named(llama, tmp_path):
    folder = copied(llama, tmp_path, lambda t: t.pop("model.layers.1.mlp.up_proj.weight"))
    with pytest.raises(CheckpointError, match=r"holds no tensor for model.layers.1.mlp.up_proj.weight;"):
        Decoder(folder, torch.float32, CPU)


def test_a_tensor_of_another_shape_is_named(llama, tmp_path):
    def change(tensors):
        tensors["model.norm.weight"] = torch.ones(39)

    with pytest.raises(CheckpointError, match=r"model.norm.weight .* has shape \[39\], config.json implies \[40\]"):
        Decoder(copied(llama, tmp_path, change), torch.float32, CPU)


def test_the_stored_dtype_is_that_of_the_parameters_alone(llama, tmp_path):
    def halve(tensors, but=()):
        tensors |= {name: t.bfloat16() for name, t in tensors.items() if name not in but}
        tensors["rotary.inv_freq"] = torch.ones(3, dtype=torch.float32)

    assert Decoder(copied(llama, tmp_path, halve), None, CPU).stored_dtype == torch.bfloat16
    mixed = copied(llama, tmp_path, lambda tensors: halve(tensors, but=["model.norm.weight"]))
    assert Decoder(mixed, None, CPU).stored_dtype == torch.float32


def test_tensors_without_a_place_are_listed(llama, tmp_path):
    folder = copied(llama, tmp_path, lambda t: t.update({"rotary.inv_freq": torch.ones(3)}))
    assert list(Decoder(folder, torch.float32, CPU).left_out()) == ["rotary.inv_freq"]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_weights_that_are_not_finite_are_named(llama, tmp_path, value):
    def change(tensors):
        tensors["model.layers.1.self_attn.o_proj.weight"][3, 4] = value

    decoder = Decoder(copied(llama, tmp_path, change), torch.float32, CPU)
    with pytest.raises(CheckpointError, match=r"model.layers.1.self_attn.o_proj.weight .* holds NaN or Inf"):
        walk(decoder, some_tokens(1, 2, 16))


@pytest.mark.parametrize("left", [0, 4, 100, 5000, -1], ids=lambda n: f"first-{n}" if n >= 0 else "all-but-one-byte")
def test_a_cut_file_is_named(llama, tmp_path, left):
    (tmp_path / "config.json").write_bytes((llama / "config.json").read_bytes())
    data = (llama / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(data[:left])
    with pytest.raises(CheckpointError, match=r"model.safetensors is not a complete safetensors file"):
        Decoder(tmp_path, torch.float32, CPU)


@pytest.mark.parametrize("content", ["", "{", "{}", "[]", '{"weight_map": 3}'])
def test_an_index_that_cannot_be_read_is_named(llama, tmp_path, content):
    copied(llama, tmp_path, lambda tensors: None)
    (tmp_path / "model.safetensors").rename(tmp_path / "model-00001-of-00001.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"model.safetensors.index.json"):
        Source(tmp_path)


def sharded(llama: Path, folder: Path, index: Callable[[dict[str, str]], None]) -> dict[str, Tensor]:
    """The checkpoint in two files, and an index that was edited; returns its tensors."""
    copied(llama, folder, lambda tensors: None)
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    files = {name: f"model-0000{1 + (i % 2)}-of-00002.safetensors" for i, name in enumerate(names)}
    for file in set(files.values()):
        save_file({name: tensors[name] for name in names if files[name] == file}, folder / file)
    index(files)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))
    return tensors


@pytest.mark.parametrize(
    "edit",
    [
        lambda files: files.pop("model.norm.weight"),
        lambda files: files.update({"model.norm.weight": "model-00001-of-00002.safetensors"}),
        lambda files: files.update({"model.norm.weight": "model-00002-of-00002.safetensors"}),
    ],
    ids=["left out", "first file", "second file"],
)
def test_shards_are_read_whole_whatever_the_index_says_of_a_tensor(llama, tmp_path, edit):
    tensors = sharded(llama, tmp_path, edit)
    read = Source(tmp_path).read(sorted(tensors))
    assert all(torch.equal(read[name], tensors[name]) for name in tensors)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).state_dict()
    assert torch.equal(loaded["model.norm.weight"], tensors["model.norm.weight"])


def test_one_whole_file_goes_before_an_index_and_other_files(llama, tmp_path):
    other = sharded(llama, tmp_path, lambda files: None)
    mine = {name: tensor + 1 for name, tensor in other.items()}
    save_file(mine, tmp_path / "model.safetensors", {"format": "pt"})
    save_file(other, tmp_path / "model_ema.safetensors")
    read = Source(tmp_path).read(["model.norm.weight"])
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).state_dict()
    assert torch.equal(read["model.norm.weight"], mine["model.norm.weight"])
    assert torch.equal(read["model.norm.weight"], loaded["model.norm.weight"])


def test_files_that_transformers_would_not_load_are_not_guessed_at(llama, tmp_path):
    copied(llama, tmp_path, lambda tensors: None)
    (tmp_path / "model.safetensors").rename(tmp_path / "model_ema.safetensors")
    with pytest.raises(CheckpointError, match=r"no model.safetensors and no .*, only model_ema.safetensors"):
        Source(tmp_path)


def test_an_adapter_beside_the_weights_is_refused(llama, tmp_path):
    copied(llama, tmp_path, lambda tensors: None)
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(InputError, match="merge the adapter first"):
        Decoder(tmp_path, torch.float32, CPU)


@pytest.mark.parametrize(
    "change",
    [
        lambda t: t.update({Q: t[Q].to(torch.int8), Q + "_scale": torch.ones(1)}),
        lambda t: t.update({Q: t[Q].to(torch.float8_e4m3fn)}),
        lambda t: t.update({Q.replace(".weight", ".qweight"): t.pop(Q).to(torch.int32)}),
    ],
    ids=["int8", "fp8", "qweight"],
)
def test_codes_of_another_quantization_are_refused(llama, tmp_path, change):
    copied(llama, tmp_path, change)
    with pytest.raises(InputError, match="codes of another quantization"):
        Decoder(tmp_path, torch.float32, CPU)


def test_a_file_that_is_cut_after_it_was_opened_is_named(llama, tmp_path):
    copied(llama, tmp_path, lambda tensors: None)
    source = Source(tmp_path)
    data = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(data[:-100])
    with pytest.raises(CheckpointError, match=r"model.safetensors cannot be read at model.norm.weight"):
        source.read(["model.norm.weight"])


def test_a_model_is_built_in_the_memory_of_its_buffers():
    """The experts of one layer would take 2^55 bytes; buffers that the forward pass computes with are real."""
    config = MixtralConfig(
        hidden_size=1 << 20, intermediate_size=1 << 21, num_local_experts=1 << 12, num_hidden_layers=1,
        num_attention_heads=1 << 13, num_key_value_heads=1, vocab_size=96,
    )  # fmt: skip
    model = build_on_meta(config, torch.float32)
    assert all(p.device.type == "meta" for p in model.parameters())
    buffers = dict(model.named_buffers())
    assert buffers and all(b.device.type == "cpu" and b.isfinite().all() for b in buffers.values())
    assert config.dtype is None
