"""GGUF files: two other readers find in them what was packed, and what cannot be in them is said beforehand."""

from __future__ import annotations

import importlib.metadata
import json
import math
from types import SimpleNamespace

import pytest
import torch
from tokenizers import Regex, normalizers, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from ultralowbit.checkpoint.size import measure_size
from ultralowbit.errors import CheckpointError, InputError
from ultralowbit.export.base import export
from ultralowbit.export.gguf.architectures import ARCHITECTURES
from ultralowbit.export.gguf.blocks import Multiples, exact_type
from ultralowbit.export.gguf.vocabulary import Vocabulary
from ultralowbit.format.planes import Planes
from ultralowbit.format.testing import random_packed
from ultralowbit.format.transform import InputTransform
from ultralowbit.format.weight import Format
from ultralowbit.methods.rtn import RTN
from ultralowbit.methods.sign import Sign
from ultralowbit.nn.hf import load
from ultralowbit.pipeline.compress import compress
from ultralowbit.recipe import Recipe

gguf = pytest.importorskip("gguf")

FOUR = RTN(bits=4, group=32, symmetric=True)
EIGHT = RTN(bits=8, group=32, symmetric=True)


def read(path):
    """Keys and tensors of a file, by the gguf package's reader."""
    reader = gguf.GGUFReader(path)
    keys = {name: field.contents() for name, field in reader.fields.items()}
    return keys, {tensor.name: tensor for tensor in reader.tensors}


def values(tensor) -> torch.Tensor:
    """What a tensor of a file means, fp32."""
    return torch.from_numpy(gguf.quants.dequantize(tensor.data.copy(), tensor.tensor_type))


@pytest.fixture(scope="module")
def packed(tmp_path_factory, save_packed, small_config):
    return save_packed(small_config("llama"), FOUR, tmp_path_factory.mktemp("gguf"))


# --- what is in a file -----------------------------------------------------------------------------------------------


def test_every_weight_is_in_the_file_as_it_was_packed(packed, tmp_path):
    model = load(packed)
    keys, tensors = read(export(packed, "gguf", tmp_path / "m.gguf"))
    assert keys["general.architecture"] == "llama" and keys["general.file_type"] == 2
    assert (keys["llama.block_count"], keys["llama.attention.head_count_kv"], keys["llama.vocab_size"]) == (2, 2, 400)
    assert len(tensors) == 2 * 9 + 2  # the head is tied to the embeddings
    assert tensors["token_embd.weight"].tensor_type == gguf.GGMLQuantizationType.F16
    assert torch.equal(values(tensors["token_embd.weight"]), model.model.embed_tokens.weight.half().float())
    assert torch.equal(values(tensors["blk.1.ffn_norm.weight"]), model.model.layers[1].post_attention_layernorm.weight)
    layer = model.model.layers[1]
    down = tensors["blk.1.ffn_down.weight"]
    assert down.tensor_type == gguf.GGMLQuantizationType.Q4_0 and down.shape.tolist() == [256, 128]
    assert torch.equal(values(down), layer.mlp.down_proj.packed.dequantize())
    for own, module, heads in (("attn_q", layer.self_attn.q_proj, 4), ("attn_k", layer.self_attn.k_proj, 2)):
        rows = module.packed.dequantize().view(heads, 2, 16, 128)  # a head's two halves
        assert torch.equal(values(tensors[f"blk.1.{own}.weight"]), rows.transpose(1, 2).reshape(-1, 128))


def test_the_packed_bytes_are_those_that_inspect_counts(save_packed, small_config, tmp_path):
    methods = {"q1_0": Sign(group=128), "q2_0": RTN(bits=2, group=64, symmetric=True), "q4_0": FOUR, "q8_0": EIGHT}
    for (name, method), bits in zip(methods.items(), (1.125, 2.25, 4.5, 8.5), strict=True):
        folder = save_packed(small_config("llama"), method, tmp_path / name)
        size = measure_size(folder)
        assert size.linear_bits_per_weight == bits
        file, sixteen = (
            export(folder, "gguf", tmp_path / f"{name}{kind}.gguf", dequantize=kind == "-16").stat().st_size
            for kind in ("", "-16")
        )
        assert sixteen - file == 2 * size.linear_weights - size.linear_bytes


@pytest.mark.parametrize("name", ["llama", "llama-untied", "mistral", "qwen2", "gemma3", "phi3"])
def test_transformers_reads_the_same_model(name, save_packed, small_config, tmp_path):
    config = small_config(name)
    folder = save_packed(config, FOUR, tmp_path)
    out = export(folder, "gguf", tmp_path / "m.gguf", dequantize=name == "gemma3")
    theirs = AutoModelForCausalLM.from_pretrained(out.parent, gguf_file=out.name, dtype=torch.float32)
    mine = load(folder)
    for name, module in mine.named_modules():
        if hasattr(module, "packed"):
            expected = module.packed.dequantize()
            expected = expected if not theirs.config.model_type.startswith("gemma") else expected.half().float()
            assert torch.equal(theirs.get_submodule(name).weight, expected), name


@pytest.mark.parametrize("name", ["llama", "llama-biases", "mistral", "qwen2", "qwen3", "phi3"])
def test_a_folded_model_is_one_of_llama_cpp_too(name, save_model, small_config, words, text, tmp_path):
    """No input is rotated when the model runs; the head has a weight of its own."""
    source = save_model(small_config(name), tmp_path / "source")
    words.save_pretrained(source)
    calibration = {"source": text, "samples": 2, "length": 32}
    recipe = {"name": "r", "rotate": {"inputs": "folded", "others": "none"}, "quantize": {"method": "gptq", "bits": 4}}
    recipe["quantize"] |= {"group": 32, "symmetric": True}
    folder = compress(
        str(source), Recipe.model_validate(recipe | {"calibration": calibration}), tmp_path / "out"
    ).folder
    (tmp_path / "gguf").mkdir()
    out = export(folder, "gguf", tmp_path / "gguf" / "m.gguf")
    _, tensors = read(out)
    model = load(folder)
    assert torch.equal(values(tensors["output.weight"]), model.lm_head.weight.half().float())
    assert torch.equal(values(tensors["token_embd.weight"]), model.model.embed_tokens.weight.half().float())
    assert (values(tensors["blk.1.ffn_norm.weight"]) == 1).all()
    assert torch.equal(
        values(tensors["blk.1.ffn_down.weight"]), model.model.layers[1].mlp.down_proj.packed.dequantize()
    )


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_embeddings_of_eight_bits(name, save_packed, small_config, tmp_path):
    folder = save_packed(small_config(name), FOUR, tmp_path)
    _, tensors = read(export(folder, "gguf", tmp_path / "m.gguf", embeddings="q8_0"))
    rounded, exact = values(tensors["token_embd.weight"]), load(folder).get_input_embeddings().weight
    step = exact.unflatten(1, (-1, 32)).abs().amax(-1) / 127  # of each block
    assert tensors["token_embd.weight"].tensor_type == gguf.GGMLQuantizationType.Q8_0
    # half a step, and fp16's rounding of the step 127 times
    assert ((rounded - exact).unflatten(1, (-1, 32)).abs().amax(-1) <= step * (0.5 + 127 * 2**-11)).all()


@pytest.mark.parametrize("name", ["llama", "llama-untied", "gemma3"])
@pytest.mark.parametrize(("method", "kind"), [(EIGHT, "Q8_0"), (FOUR, "Q4_0")], ids=["q8_0", "q4_0"])
def test_packed_embeddings_are_exact_in_blocks_of_32(method, kind, name, save_packed, small_config, tmp_path):
    folder = save_packed(small_config(name), FOUR, tmp_path, embeddings=method)
    _, tensors = read(export(folder, "gguf", tmp_path / "m.gguf"))
    model = load(folder)
    names = {"token_embd.weight": model.get_input_embeddings()}
    names |= {"output.weight": model.get_output_embeddings()} if name == "llama-untied" else {}
    for stored, module in names.items():
        assert tensors[stored].tensor_type == gguf.GGMLQuantizationType[kind]
        assert torch.equal(values(tensors[stored]), module.packed.dequantize())


def test_packed_embeddings_that_no_block_holds(save_packed, small_config, tmp_path):
    folder = save_packed(small_config("llama"), FOUR, tmp_path / "model", embeddings=RTN(bits=8, group=None))
    refused(folder, tmp_path, "embed_tokens exactly as stored.*embeddings={method: ints, group: 32, symmetric")
    _, tensors = read(export(folder, "gguf", tmp_path / "m.gguf", dequantize=True))
    expected = load(folder).get_input_embeddings().packed.dequantize()
    assert torch.equal(values(tensors["token_embd.weight"]), expected.half().float())


def test_all_that_no_block_holds_is_refused_with_one_remedy(save_packed, small_config, tmp_path):
    """A recipe that leaves the embedding in 16 bits is enough for both."""
    folder = save_packed(
        small_config("llama"), Sign(planes=2, group=128), tmp_path / "model", embeddings=RTN(bits=8, group=None)
    )
    weights = len(json.loads((folder / "config.json").read_text())["quantization_config"]["modules"])
    refused(folder, tmp_path, f"{weights} of the packed weights, such as model.layers.0.*2sign.*--recipe q2_0`, whose")


def test_norms_of_gemma_are_what_transformers_multiplies_by(save_packed, small_config, tmp_path):
    folder = save_packed(small_config("gemma3"), FOUR, tmp_path)
    _, tensors = read(export(folder, "gguf", tmp_path / "m.gguf"))
    assert torch.equal(values(tensors["output_norm.weight"]), 1 + load(folder).model.norm.weight)


def test_rope_factors_of_llama_3(save_packed, small_config, tmp_path):
    folder = save_packed(small_config("llama-3"), FOUR, tmp_path)
    _, tensors = read(export(folder, "gguf", tmp_path / "m.gguf"))
    waves = [2 * math.pi * 10000 ** (2 * i / 32) for i in range(16)]
    expected = []
    for wave in waves:  # as Meta's code has it: below 64 / 4 as trained, above 64 / 1 stretched, between a mixture
        smooth = min(1.0, max(0.0, (64 / wave - 1) / (4 - 1)))
        expected.append(1 / ((1 - smooth) / 8 + smooth))
    assert torch.allclose(values(tensors["rope_freqs.weight"]), torch.tensor(expected), rtol=1e-6)


def test_a_model_that_is_not_packed_becomes_sixteen_bits(packed, tmp_path):
    source = packed.parent / "source"
    keys, tensors = read(export(source, "gguf", tmp_path / "m.gguf"))
    weight = AutoModelForCausalLM.from_pretrained(source).model.layers[0].mlp.up_proj.weight
    assert keys["general.file_type"] == 1
    assert torch.equal(values(tensors["blk.0.ffn_up.weight"]), weight.half().float())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=["bf16", "fp64"])
@pytest.mark.parametrize("options", [{}, {"embeddings": "q8_0"}, {"dequantize": True}], ids=["exact", "q8_0", "f16"])
def test_the_default_dtype_changes_no_byte(packed, tmp_path, dtype, options):
    expected = export(packed, "gguf", tmp_path / "plain.gguf", **options).read_bytes()
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        changed = export(packed, "gguf", tmp_path / "changed.gguf", **options).read_bytes()
    finally:
        torch.set_default_dtype(before)
    assert changed == expected


def test_an_ollama_modelfile_lies_beside(packed, tmp_path):
    export(packed, "gguf", tmp_path / "m.gguf")
    assert "FROM ./m.gguf\n" in (tmp_path / "m.Modelfile").read_text()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m.Modelfile", "m.gguf"]


# --- the tokenizer ---------------------------------------------------------------------------------------------------


def test_the_vocabulary_is_in_the_file(packed, words, tmp_path):
    keys, _ = read(export(packed, "gguf", tmp_path / "m.gguf"))
    tokens = keys["tokenizer.ggml.tokens"]
    assert keys["tokenizer.ggml.model"] == "gpt2" and keys["tokenizer.ggml.pre"] == "gpt-2"
    assert tokens[: len(words)] == words.convert_ids_to_tokens(range(len(words)))
    assert tokens[len(words) :] == [f"[PAD{i}]" for i in range(len(words), 400)]
    assert keys["tokenizer.ggml.token_type"][0] == gguf.TokenType.CONTROL
    assert keys["tokenizer.ggml.token_type"][-1] == gguf.TokenType.UNUSED
    assert (keys["tokenizer.ggml.bos_token_id"], keys["tokenizer.ggml.eos_token_id"]) == (0, 1)
    assert keys["tokenizer.ggml.add_bos_token"] is False
    assert keys["tokenizer.chat_template"] == words.chat_template
    merges = json.loads(words.backend_tokenizer.to_str())["model"]["merges"]
    assert keys["tokenizer.ggml.merges"] == [" ".join(merge) for merge in merges]


def test_pieces_have_scores_that_fall_with_the_rank_of_their_merge(pieces, tmp_path):
    pieces.save_pretrained(tmp_path)
    vocabulary = Vocabulary.read(tmp_path, 400, [])
    assert vocabulary.split is None and vocabulary.space_first
    merges = json.loads(pieces.backend_tokenizer.to_str())["model"]["merges"]
    ids = [vocabulary.texts.index("".join(merge)) for merge in merges]
    assert [vocabulary.scores[token] for token in dict.fromkeys(ids)] == sorted(
        {-float(ids.index(token)) for token in ids}, reverse=True
    )
    assert vocabulary.types[vocabulary.texts.index("<0x41>")] == gguf.TokenType.BYTE
    assert vocabulary.types[vocabulary.texts.index("<unk>")] != gguf.TokenType.NORMAL


def test_a_second_token_that_ends_texts_is_named(words, tmp_path):
    words.save_pretrained(tmp_path)
    assert Vocabulary.read(tmp_path, 400, [1, 2]).special["eot"] == 2


LLAMA_3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)


@pytest.mark.parametrize(
    ("steps", "ignore_merges", "name"),
    [
        (
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)],
            0,
            "smollm",
        ),
        (
            [
                pre_tokenizers.Split(Regex(LLAMA_3), "isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ],
            1,
            "llama-bpe",
        ),
    ],
)
def test_how_words_are_split_has_llama_cpps_name(words, tmp_path, steps, ignore_merges, name):
    backend = json.loads(words.backend_tokenizer.to_str())
    backend["model"]["ignore_merges"] = bool(ignore_merges)
    changed = type(words.backend_tokenizer).from_str(json.dumps(backend))
    changed.pre_tokenizer = pre_tokenizers.Sequence(steps)
    PreTrainedTokenizerFast(tokenizer_object=changed, bos_token="<s>").save_pretrained(tmp_path)
    assert Vocabulary.read(tmp_path, 400, []).split == name


def test_tokenizers_that_would_read_otherwise_are_refused(words, tokenizer, tmp_path):
    def refused(changed, rows, pattern):
        changed.save_pretrained(tmp_path)
        with pytest.raises(InputError, match=pattern):
            Vocabulary.read(tmp_path, rows, [])

    refused(tokenizer, 400, "has no merges")
    refused(words, 300, "tokens and the embeddings 300 rows")
    backend = type(words.backend_tokenizer).from_str(words.backend_tokenizer.to_str())
    backend.normalizer = normalizers.Lowercase()
    refused(PreTrainedTokenizerFast(tokenizer_object=backend), 400, "changes texts first")
    backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    refused(PreTrainedTokenizerFast(tokenizer_object=backend), 400, "splits words by .*Whitespace.*GPT-2, SmolLM")


# --- what is refused -------------------------------------------------------------------------------------------------


class Rotated:
    """Signs of random weights that multiply rotated inputs."""

    def quantize(self, weight, stats):
        columns = weight.shape[1]
        format = Format((Planes(columns, 1, 128),), transform=InputTransform(columns, hadamard=128))
        return random_packed(format, len(weight))


def refused(folder, tmp_path, pattern, **options):
    with pytest.raises(InputError, match=pattern) as error:
        export(folder, "gguf", tmp_path / "out" / "m.gguf", **options)
    assert "\n" not in str(error.value)
    assert not any(tmp_path.joinpath("out").glob("*"))


@pytest.mark.parametrize(
    ("method", "pattern"),
    [
        (Sign(planes=2, group=128), "2sign/g128: compress the model again with `--recipe q2_0`"),
        (Sign(planes=3, group=128), "3sign/g128: compress the model again with `--recipe q4_0`"),
        (Rotated(), r"1sign/g128 \+ input\(hadamard128\): compress the model again with `--recipe q1_0`"),
    ],
    ids=["two planes", "three planes", "rotated"],
)
def test_a_format_that_no_block_type_holds_names_the_recipe_that_would_do(
    method, pattern, save_packed, small_config, tmp_path
):
    folder = save_packed(small_config("llama"), method, tmp_path / "model")
    refused(folder, tmp_path, pattern + ".*or give --dequantize")
    _, tensors = read(export(folder, "gguf", tmp_path / "m.gguf", dequantize=True))
    down = load(folder).model.layers[0].mlp.down_proj.packed.dequantize()
    assert torch.equal(values(tensors["blk.0.ffn_down.weight"]), down.half().float())


def test_rows_that_no_block_divides(save_packed, small_config, tmp_path):
    folder = save_packed(small_config("llama", intermediate_size=200), FOUR, tmp_path / "model")
    refused(folder, tmp_path, "hold blocks of 32 to 128 columns, and its rows have 200, or give --dequantize")


@pytest.mark.parametrize(
    ("name", "changes", "pattern"),
    [
        ("llama", {"hidden_act": "gelu"}, "has the activation 'gelu', expected 'silu'"),
        (
            "llama",
            {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}},
            "rotary embeddings of the type 'dynamic', expected one of default, linear, llama3, yarn",
        ),
        ("qwen3", {"attention_bias": True}, r"q_proj\.bias has no place"),
        ("gemma3", {"query_pre_attn_scalar": 64}, r"scales queries by 64 \*\* -0\.5, expected 32"),
        ("gemma3", {"attn_logit_softcapping": 50.0}, "caps the logits"),
        ("gemma3", {"layer_types": ["full_attention"] * 7}, "other places than every sixth"),
    ],
)
def test_what_llama_cpp_computes_otherwise(name, changes, pattern, save_model, small_config, words, tmp_path):
    folder = save_model(small_config(name, **changes), tmp_path / "model")
    words.save_pretrained(folder)
    refused(folder, tmp_path, pattern)


def test_an_architecture_that_is_not_known(save_model, tmp_path):
    config = AutoConfig.for_model("gpt2", n_embd=32, n_layer=1, n_head=2, vocab_size=96)
    refused(save_model(config, tmp_path / "model"), tmp_path, f"'gpt2', expected one of {', '.join(ARCHITECTURES)}")


def test_options_and_places_are_checked_before_the_work(packed, tmp_path):
    refused(packed, tmp_path, "--embeddings is 'q5', expected f16 or q8_0", embeddings="q5")
    (tmp_path / "m.Modelfile").write_text("mine")
    with pytest.raises(InputError, match=r"m\.Modelfile exists"):
        export(packed, "gguf", tmp_path / "m.gguf")
    assert (tmp_path / "m.Modelfile").read_text() == "mine" and not (tmp_path / "m.gguf").exists()


@pytest.mark.parametrize("version", [None, "0.10.0"])
def test_the_gguf_package_may_be_missing_or_too_old(packed, tmp_path, monkeypatch, version):
    real = importlib.metadata.version

    def installed(name: str) -> str:
        if name != "gguf":
            return real(name)
        if version is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return version

    monkeypatch.setattr("importlib.metadata.version", installed)
    refused(packed, tmp_path, r"ultralowbit\[gguf\]" if version is None else "0.10.0, expected 0.19 or newer")


def test_a_disk_that_is_too_small(packed, tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=1000))
    refused(packed, tmp_path, "needs 0.3 MB and its disk has 0.0 MB left: make room")


def test_folders_that_are_no_checkpoint(packed, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match=r"has no config\.json"):
        export(tmp_path / "empty", "gguf", tmp_path / "m.gguf")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text('{"model_type": "no such"}')
    (tmp_path / "other" / "model.safetensors").write_bytes((packed / "model.safetensors").read_bytes())
    refused(tmp_path / "other", tmp_path, "cannot be loaded by transformers")


def test_another_quantization_is_no_source(packed, tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    for path in (packed.parent / "source").iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "gptq"}}))
    refused(folder, tmp_path, "quantized by 'gptq'")


def test_weights_beyond_sixteen_bits(save_packed, small_config, tmp_path):
    source = save_packed(small_config("llama"), FOUR, tmp_path / "model").parent / "source"
    model = AutoModelForCausalLM.from_pretrained(source)
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[3, 4] = 1e5
    model.save_pretrained(source)
    AutoTokenizer.from_pretrained(tmp_path / "model" / "packed").save_pretrained(source)
    refused(source, tmp_path, r"up_proj\.weight holds 1e\+05, and 16-bit floats end at 65504")


@pytest.mark.parametrize(
    ("method", "hidden", "reason"),
    [
        (Sign(group=32), 128, "take 4.500 bits per weight, 1.500 in the checkpoint: the recipe q1_0 makes weights for"),
        (Sign(group=128), 192, "checkpoint: rows of 192 columns are no whole blocks of Q1_0, which have 128"),
    ],
)
def test_weights_that_grow_are_told_why(method, hidden, reason, save_packed, small_config, tmp_path, caplog):
    folder = save_packed(small_config("llama", hidden_size=hidden), method, tmp_path / "model")
    export(folder, "gguf", tmp_path / "m.gguf")
    assert reason in caplog.text


def test_layers_that_look_back_over_a_window_are_told(save_packed, small_config, tmp_path, caplog):
    folder = save_packed(small_config("mistral", sliding_window=64), FOUR, tmp_path / "model")
    export(folder, "gguf", tmp_path / "m.gguf")
    assert "look back over 64 tokens" in caplog.text


@pytest.mark.parametrize(("name", "bits"), [("q1_0", 1.125), ("q2_0", 2.25), ("q4_0", 4.5)])
def test_recipes_are_named_after_the_type_that_holds_their_weights(name, bits):
    recipe = Recipe.load(name)
    packed = recipe.quantize.quantize(torch.randn(8, 256, generator=torch.Generator().manual_seed(0)), None)
    assert exact_type(Multiples.of(packed)).name == name.upper()
    assert packed.bits_per_weight == bits
    assert recipe.rotate is None  # llama.cpp rotates no inputs
