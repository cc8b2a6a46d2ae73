"""Packed checkpoints in transformers: equal wherever they come from, and refused wherever they are not whole."""

from __future__ import annotations

import copy
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, LlamaForCausalLM

import ultralowbit
from ultralowbit.checkpoint.config import DIGEST, config_digest
from ultralowbit.errors import CheckpointError, FormatError, InputError
from ultralowbit.format.ints import Ints
from ultralowbit.format.planes import Planes
from ultralowbit.format.weight import PackedWeight
from ultralowbit.kernels import cpu
from ultralowbit.kernels.packed_matmul import packed_matmul
from ultralowbit.methods.gptq import GPTQ
from ultralowbit.methods.rtn import RTN
from ultralowbit.methods.sign import Sign
from ultralowbit.nn.hf import check_checkpoint, pack_model
from ultralowbit.nn.linear import PackedLinear
from ultralowbit.nn.quantizer import UltraLowBitConfig
from ultralowbit.recipe import Recipe

LLAMA = {
    "vocab_size": 96,
    "hidden_size": 40,
    "intermediate_size": 56,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
GPT2 = {
    "vocab_size": 96,
    "n_embd": 40,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 64,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", LLAMA),
    "llama-tied-biases": ("llama", LLAMA | {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True}),
    "gpt2": ("gpt2", GPT2),
    "gpt-neox": ("gpt_neox", {key: value for key, value in LLAMA.items() if key != "num_key_value_heads"}),
}
TOKENS = torch.randint(4, 96, (2, 12), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, save_model, text) -> Callable[[str], Path]:
    """The packed checkpoint of one of MODELS, beside its source: GPTQ, and sign planes in one Linear of a block."""
    made: dict[str, Path] = {}

    def make(name: str) -> Path:
        if name not in made:
            model_type, values = MODELS[name]
            root = tmp_path_factory.mktemp(name)
            source = save_model(AutoConfig.for_model(model_type, **values), root / "source")
            recipe = Recipe.model_validate(
                {
                    "name": "mixed",
                    "quantize": {"method": "gptq", "bits": 2, "group": 32},
                    "overrides": [
                        {"match": "*up_proj", "quantize": {"method": "sign", "planes": 2}},
                        {"match": "*c_fc", "quantize": {"method": "sign", "planes": 2}},
                        {"match": "*4h_to_h", "quantize": {"method": "sign", "planes": 2}},
                    ][("llama", "gpt2", "gpt_neox").index(model_type) :][:1],
                    "calibration": {"source": text, "samples": 4, "length": 24},
                }
            )
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr("ultralowbit.checkpoint.merge.SHARD_BYTES", 20_000)  # several files and an index
                made[name] = ultralowbit.compress(str(source), recipe, root / "packed").folder
        return made[name]

    return make


@pytest.fixture(params=MODELS, ids=MODELS.keys())
def folder(request, checkpoint) -> Path:
    return checkpoint(request.param)


@pytest.fixture(scope="module")
def llama(checkpoint) -> Path:
    return checkpoint("llama")


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(TOKENS.to(model.device)).logits


def state(model: Any) -> dict[str, Tensor]:
    """The packed tensors of a model."""
    return {
        f"{name}.{part}": tensor
        for name, module in model.named_modules()
        if isinstance(module, PackedLinear)
        for part, tensor in module.packed.tensors.items()
    }


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(a[k].dtype == b[k].dtype and torch.equal(a[k].cpu(), b[k].cpu()) for k in a)


def stored(folder: Path) -> dict[str, Tensor]:
    return {name: t for path in sorted(folder.glob("*.safetensors")) for name, t in load_file(path).items()}


# --- ways to load -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "kwargs",
    [
        {"device_map": "cpu"},
        {"device_map": "auto"},
        {"device_map": {"": "cpu"}},
        {"low_cpu_mem_usage": True},
        {"attn_implementation": "eager"},
        {"use_safetensors": True},
    ],
)
def test_every_way_to_load_gives_the_same_model(llama, kwargs):
    expected = ultralowbit.load(llama, attn_implementation=kwargs.get("attn_implementation"))
    for load in (ultralowbit.load, AutoModelForCausalLM.from_pretrained):
        model = load(llama, **kwargs)
        assert equal(state(model), state(expected))
        assert torch.equal(logits(model).cpu(), logits(expected).cpu())


def test_the_loaded_tensors_are_those_in_the_files(folder):
    model, files = ultralowbit.load(folder), stored(folder)
    packed = state(model)
    assert packed
    assert equal(packed, {name: files[name] for name in packed})
    assert not model.training
    assert not any(p.is_meta for p in [*model.parameters(), *model.buffers()])


def test_a_string_is_as_good_as_a_path(llama):
    assert torch.equal(logits(ultralowbit.load(str(llama))), logits(ultralowbit.load(llama)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_weights_are_rounded_once_to_the_dtype_asked_for(llama, dtype, monkeypatch):
    monkeypatch.setattr("ultralowbit.kernels.packed_matmul.KERNELS", {})  # faster paths sum in another order
    model = ultralowbit.load(llama, dtype=dtype)
    assert model.dtype == dtype
    assert {t.dtype for t in state(model).values()} == {torch.int16, torch.float16, torch.uint8}
    assert equal(state(model), state(ultralowbit.load(llama)))
    dense = AutoModelForCausalLM.from_pretrained(llama.parent / "source", dtype=dtype).eval()
    for name, module in model.named_modules():
        if isinstance(module, PackedLinear):
            dense.get_submodule(name).weight.data = module.packed.dequantize().to(dtype)
    assert torch.equal(logits(model), logits(dense))


def test_the_dtype_is_the_sources_own(tmp_path, save_model):
    source = save_model(AutoConfig.for_model("llama", **LLAMA), tmp_path / "source", dtype=torch.bfloat16)
    recipe = Recipe.model_validate({"name": "rtn", "quantize": {"method": "rtn", "bits": 2, "group": 32}})
    folder = ultralowbit.compress(str(source), recipe, tmp_path / "packed").folder
    assert ultralowbit.load(folder).dtype == torch.bfloat16
    assert ultralowbit.load(folder).model.norm.weight.dtype == torch.bfloat16
    assert {t.dtype for t in stored(folder).values()} == {torch.bfloat16, torch.int16, torch.float16, torch.uint8}


def test_the_bare_decoder_loads_too(folder):
    whole = ultralowbit.load(folder)
    bare = AutoModel.from_pretrained(folder).eval()
    assert len(state(bare)) == len(state(whole))
    with torch.no_grad():
        expected = whole.base_model(TOKENS).last_hidden_state
        assert torch.equal(bare(TOKENS).last_hidden_state, expected)


def test_packing_in_memory_and_saving_is_loading(folder, tmp_path):
    """`pack_model` on the source with the packed weights of the checkpoint makes the same model and the same file."""
    loaded = ultralowbit.load(folder)
    packed = {n: m.packed for n, m in loaded.named_modules() if isinstance(m, PackedLinear)}
    model = pack_model(AutoModelForCausalLM.from_pretrained(folder.parent / "source").eval(), packed, "mixed")
    assert torch.equal(logits(model), logits(loaded))
    model.save_pretrained(tmp_path)
    again = ultralowbit.load(tmp_path)
    assert equal(state(again), state(loaded))
    assert torch.equal(logits(again), logits(loaded))


@pytest.mark.parametrize("size", ["50GB", "10KB"], ids=["one-file", "shards"])
def test_saving_and_loading_again_changes_nothing(folder, tmp_path, size):
    model = ultralowbit.load(folder)
    model.save_pretrained(tmp_path, max_shard_size=size)
    assert len(list(tmp_path.glob("*.safetensors"))) == 1 or size == "10KB"
    again = ultralowbit.load(tmp_path)
    assert equal(state(again), state(model))
    assert torch.equal(logits(again), logits(model))
    assert equal(state(model), {k: v for k, v in stored(tmp_path).items() if k in state(model)})
    before, after = (json.loads((f / "config.json").read_text()) for f in (folder, tmp_path))
    assert before["quantization_config"] == after["quantization_config"]


# --- what a loaded model can do ------------------------------------------------------------------------------------


def test_generation_is_the_same_with_any_cache(folder):
    model = ultralowbit.load(folder)
    kwargs = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 3, "eos_token_id": None}
    expected = model.generate(TOKENS, use_cache=False, **kwargs)
    assert expected.shape == (2, 20)
    assert torch.equal(model.generate(TOKENS, **kwargs), expected)
    assert torch.equal(model.generate(TOKENS, cache_implementation="static", **kwargs), expected)


@pytest.mark.parametrize("name", ["llama-tied-biases", "gpt2"])
def test_the_whole_model_is_one_graph_for_the_compiler(checkpoint, name):
    model = ultralowbit.load(checkpoint(name))
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(TOKENS, use_cache=False).logits, logits(model), rtol=0, atol=1e-6)


def test_dequantizing_gives_a_plain_model_that_saves_and_loads(folder, tmp_path):
    model = ultralowbit.load(folder)
    expected, packed = logits(model), state(model)
    weights = {n: m.packed.dequantize() for n, m in model.named_modules() if isinstance(m, PackedLinear)}
    plain = model.dequantize()
    assert not state(plain)
    assert packed
    # an nn.Linear adds its bias inside the product, so the last bit may differ
    torch.testing.assert_close(logits(plain), expected, rtol=0, atol=2e-5)
    for name, weight in weights.items():
        stored_as = plain.get_submodule(name).weight
        assert torch.equal(stored_as.T if "gpt2" in type(plain).__name__.lower() else stored_as, weight)
    plain.save_pretrained(tmp_path)
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert torch.equal(logits(again), logits(plain))


def test_casting_the_model_leaves_the_packed_tensors_alone(llama):
    model = ultralowbit.load(llama)
    before = {name: t.clone() for name, t in state(model).items()}
    for dtype in (torch.bfloat16, torch.float64, torch.float32):
        model.to(dtype)
        assert model.model.norm.weight.dtype == dtype
        assert equal(state(model), before)
    assert torch.equal(logits(model), logits(ultralowbit.load(llama))) is False  # the embeddings were rounded
    copied = copy.deepcopy(model)
    assert equal(state(copied), before)


def test_moving_the_model_moves_the_packed_tensors(llama, device):
    model = ultralowbit.load(llama).to(device)
    assert {t.device.type for t in state(model).values()} == {device.type}
    torch.testing.assert_close(logits(model).cpu(), logits(ultralowbit.load(llama)), rtol=1e-4, atol=1e-4)


def test_gradients_reach_the_inputs_through_packed_layers(llama):
    model, plain = ultralowbit.load(llama), ultralowbit.load(llama).dequantize()
    grads = []
    for m in (model, plain):
        x = m.get_input_embeddings()(TOKENS).detach().requires_grad_()
        m(inputs_embeds=x).logits.square().mean().backward()
        grads.append(x.grad)
    assert grads[1].abs().max() > 0
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-6)


PACKED = {
    "planes": Sign(planes=2, group=32).quantize,
    "ints": RTN(bits=3, group=32).quantize,
    "symmetric": GPTQ(bits=4, group=None, symmetric=True).quantize,
}


@pytest.mark.parametrize("kind", PACKED)
def test_the_product_is_that_with_the_decoded_weight(kind, device):
    generator = torch.Generator().manual_seed(0)
    packed = PACKED[kind](torch.randn(24, 70, generator=generator), None)
    tensors = [t.to(device) for t in packed.tensors.values()]
    layout = json.dumps(packed.format.to_dict())
    for shape in [(70,), (1, 70), (3, 5, 70), (0, 70)]:
        for dtype in (torch.float32, torch.bfloat16):
            x = torch.randn(shape, generator=generator).to(device, dtype)
            weight = packed.dequantize().to(device)
            product = packed_matmul(x, tensors, layout)
            assert product.dtype == dtype
            step = torch.finfo(dtype).eps  # weights and the result may both be rounded to x's dtype
            bound = step * F.linear(x.double().abs(), weight.double().abs()) + 1e-5
            assert ((product.double() - F.linear(x.double(), weight.double())).abs() <= bound).all()


@pytest.mark.parametrize("kind", ["planes", "ints"])
def test_the_product_is_a_sound_operator(kind):
    """Schema, fake tensors and gradients, as torch.compile relies on them."""
    generator = torch.Generator().manual_seed(0)
    packed = PACKED[kind](torch.randn(6, 40, generator=generator), None)
    x = torch.randn(2, 3, 40, generator=generator, requires_grad=True)
    args = (x, list(packed.tensors.values()), json.dumps(packed.format.to_dict()))
    torch.library.opcheck(torch.ops.ultralowbit.packed_matmul.default, (x.detach(), *args[1:]))
    packed_matmul(*args).square().sum().backward()
    weight = packed.dequantize()
    torch.testing.assert_close(x.grad, 2 * (x.detach() @ weight.T) @ weight, rtol=1e-5, atol=1e-4)


# --- without the package ---------------------------------------------------------------------------------------------

STRANGER = """
import importlib.abc, sys

class Blocked(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "ultralowbit":
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Blocked())
from transformers import AutoModelForCausalLM
for folder in sys.argv[1:]:
    try:
        AutoModelForCausalLM.from_pretrained(folder)
    except Exception as e:
        print("REFUSED", type(e).__name__)
    else:
        print("LOADED", folder)
"""


def test_transformers_without_the_package_refuses_instead_of_inventing_weights(checkpoint, tmp_path):
    folders = [checkpoint(name) for name in MODELS]
    source = AutoModelForCausalLM.from_pretrained(folders[0].parent / "source")
    for segment, method in {
        "planes": Sign(planes=1),
        "one-bit-groups": Sign(planes=1, group=32),
        "ints-8": RTN(bits=8, group=None, symmetric=True),
        "ints-4": RTN(bits=4, group=128),
    }.items():
        model = copy.deepcopy(source)
        names = [f"model.layers.{i}.self_attn.q_proj" for i in range(2)]
        packed = {name: method.quantize(model.get_submodule(name).weight.detach(), None) for name in names}
        pack_model(model, packed).save_pretrained(tmp_path / segment)
        folders.append(tmp_path / segment)
    done = subprocess.run(
        [sys.executable, "-c", STRANGER, *map(str, folders)], capture_output=True, text=True, cwd=tmp_path, timeout=300
    )
    assert done.stdout.split("\n")[:-1] == ["REFUSED RuntimeError"] * len(folders), done.stderr[-2000:]


FRESH = """
import sys, torch
from pathlib import Path
{imports}
folder, tokens = Path(sys.argv[1]), torch.load("tokens.pt")
assert AutoConfig.from_pretrained(folder).quantization_config["quant_method"] == "ultralowbit"
with torch.no_grad():
    torch.save(AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()(tokens).logits, "logits.pt")
assert "ultralowbit.pipeline" not in sys.modules
"""


@pytest.mark.parametrize(
    "imports",
    [
        "import ultralowbit\nfrom transformers import AutoConfig, AutoModelForCausalLM",
        "import transformers\nimport ultralowbit\nfrom transformers import AutoConfig, AutoModelForCausalLM",
        "from transformers import AutoConfig, AutoModelForCausalLM\nimport ultralowbit",
        "from transformers.quantizers import auto\nfrom transformers import AutoConfig, AutoModelForCausalLM\n"
        "import ultralowbit",
    ],
    ids=["ours-first", "theirs-first", "classes-first", "quantizers-first"],
)
def test_a_fresh_process_loads_whatever_it_imports_first(llama, tmp_path, imports):
    torch.save(TOKENS, tmp_path / "tokens.pt")
    script = FRESH.format(imports=imports)
    done = subprocess.run(
        [sys.executable, "-c", script, str(llama)], capture_output=True, text=True, cwd=tmp_path, timeout=300
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert torch.equal(torch.load(tmp_path / "logits.pt"), logits(ultralowbit.load(llama)))


# --- what is refused ----------------------------------------------------------------------------------------------


def bless(folder: Path) -> None:
    """Let the shards agree with what config.json is now: what is behind that check is then seen."""
    digest = config_digest(json.loads((folder / "config.json").read_text()))
    for path in folder.glob("*.safetensors"):
        save_file(load_file(path), path, metadata={"format": "pt", DIGEST: digest})


def tampered(folder: Path, target: Path, change: Callable[[dict[str, Tensor]], None]) -> Path:
    """A copy whose tensors were changed, with an index that agrees."""
    shutil.copytree(folder, target)
    for path in sorted(target.glob("*.safetensors")):
        with safe_open(path, framework="pt") as f:
            tensors = {name: f.get_tensor(name) for name in f.keys()}  # noqa: SIM118
        change(tensors)
        save_file(tensors, path, metadata={"format": "pt"})
    index = target / "model.safetensors.index.json"
    data = json.loads(index.read_text())
    data["weight_map"] = {n: p.name for p in sorted(target.glob("*.safetensors")) for n in load_file(p)}
    index.write_text(json.dumps(data))
    bless(target)
    return target


def refused(folder: Path, *words: str) -> str:
    """Both ways to load, and the check alone, raise one of our errors, which names `words`."""
    messages = set()
    for load in (ultralowbit.load, AutoModelForCausalLM.from_pretrained, check_checkpoint):
        with pytest.raises((CheckpointError, FormatError)) as error:
            load(folder)
        messages.add(str(error.value))
    for message in messages:
        assert "\\n" not in message
        for word in words:
            assert word in message
    return messages.pop()


Q = "model.layers.0.self_attn.q_proj"
UP = "model.layers.1.mlp.up_proj"


@pytest.mark.parametrize(
    "name",
    [
        f"{Q}.weight",
        f"{Q}.weight_scale",
        f"{Q}.weight_zero",
        f"{UP}.weight",
        f"{UP}.weight_scale",
        "model.layers.1.input_layernorm.weight",
        "model.norm.weight",
        "model.embed_tokens.weight",
        "lm_head.weight",
    ],
)
def test_a_tensor_that_is_missing_is_named(llama, tmp_path, name):
    refused(tampered(llama, tmp_path / "x", lambda t: t.pop(name, None)), f"{name} is missing")


@pytest.mark.parametrize("name", ["lm_head.weight", "model.layers.1.mlp.up_proj.bias", "model.embed_tokens.weight"])
def test_of_tied_weights_only_the_stored_one_may_be_missing(checkpoint, tmp_path, name):
    folder = tampered(checkpoint("llama-tied-biases"), tmp_path / "x", lambda t: t.pop(name, None))
    if name == "lm_head.weight":  # never stored
        ultralowbit.load(folder)
    else:
        refused(folder, f"{name} is missing")


@pytest.mark.parametrize(
    "name", [f"{Q}.weight", f"{Q}.weight_scale", f"{Q}.weight_zero", f"{UP}.weight", "model.norm.weight"]
)
def test_a_tensor_of_another_shape_is_named(llama, tmp_path, name):
    def change(tensors):
        if name in tensors:
            tensors[name] = tensors[name][..., :-1].contiguous()

    refused(tampered(llama, tmp_path / "x", change), f"{name} is ", "expected")


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        (f"{Q}.weight", torch.int32),
        (f"{Q}.weight", torch.float16),
        (f"{Q}.weight_scale", torch.float32),
        (f"{Q}.weight_scale", torch.bfloat16),
        (f"{Q}.weight_zero", torch.int8),
        (f"{UP}.weight", torch.uint8),
        ("model.norm.weight", torch.int64),
        ("model.embed_tokens.weight", torch.uint8),
    ],
)
def test_a_tensor_of_another_dtype_is_named(llama, tmp_path, name, dtype):
    def change(tensors):
        if name in tensors:
            tensors[name] = tensors[name].to(dtype)

    refused(tampered(llama, tmp_path / "x", change), f"{name} is {str(dtype).removeprefix('torch.')} [")


@pytest.mark.parametrize("name", [f"{Q}.weight_offset", f"{UP}.weight_1", f"{UP}.weight_zero"])
def test_a_packed_tensor_that_the_format_does_not_list_is_named(llama, tmp_path, name):
    """A config.json that leaves out a part would change what the bytes mean."""

    def change(tensors):
        if name.rpartition(".")[0] + ".weight" in tensors:
            tensors[name] = torch.zeros(3)

    refused(tampered(llama, tmp_path / "x", change), name)


@pytest.mark.parametrize("left", [0, 7, 500, -1], ids=lambda n: f"first-{n}" if n >= 0 else "all-but-one-byte")
def test_a_cut_shard_is_named(llama, tmp_path, left):
    folder = Path(shutil.copytree(llama, tmp_path / "x"))
    shard = sorted(folder.glob("*.safetensors"))[1]
    shard.write_bytes(shard.read_bytes()[:left])
    refused(folder, shard.name, "not a complete safetensors file")


def test_a_shard_that_is_missing_is_named(llama, tmp_path):
    folder = Path(shutil.copytree(llama, tmp_path / "x"))
    shard = sorted(folder.glob("*.safetensors"))[1]
    shard.unlink()
    for load in (ultralowbit.load, AutoModelForCausalLM.from_pretrained):
        with pytest.raises((CheckpointError, OSError), match=shard.name):
            load(folder)


def with_config(folder: Path, target: Path, change: Callable[[dict[str, Any]], Any]) -> Path:
    """A copy whose quantization_config was changed, and its shards with it."""
    shutil.copytree(folder, target)
    config = json.loads((target / "config.json").read_text())
    change(config["quantization_config"])
    (target / "config.json").write_text(json.dumps(config))
    bless(target)
    return target


@pytest.mark.parametrize(
    "change",
    [
        lambda c: c.update(rms_norm_eps=1e-3),
        lambda c: c.update(hidden_act="relu"),
        lambda c: c.update(num_attention_heads=8),
        lambda c: next(iter(c["quantization_config"]["formats"].values()))["segments"][0].update(group=16),
        lambda c: c["quantization_config"]["modules"].pop(Q),
    ],
    ids=["epsilon", "activation", "heads", "group", "module"],
)
def test_a_config_that_was_not_written_with_the_weights_is_refused(llama, tmp_path, change):
    shutil.copytree(llama, tmp_path / "x")
    config = json.loads((llama / "config.json").read_text())
    change(config)
    (tmp_path / "x/config.json").write_text(json.dumps(config))
    refused(tmp_path / "x", "x/config.json is not the one that model", "was written with, so one of them was edited")


def test_weights_that_do_not_say_their_config_are_refused(llama, tmp_path):
    shutil.copytree(llama, tmp_path / "x")
    for path in (tmp_path / "x").glob("*.safetensors"):
        save_file(load_file(path), path, metadata={"format": "pt"})
    refused(tmp_path / "x", "does not say with which config.json it was written: copy both")


def test_a_newer_format_is_refused_by_its_version(llama, tmp_path):
    def change(config):
        for format in config["formats"].values():
            format["version"] = 3

    message = refused(with_config(llama, tmp_path / "x", change), "version 3", "version 2", "install")
    assert message.count("version 3") == 1


def each_segment(change: Callable[[dict[str, Any]], Any]) -> Callable[[dict[str, Any]], Any]:
    return lambda config: [change(s) for format in config["formats"].values() for s in format["segments"]]


EDITS: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "no modules": (lambda c: c.update(modules={}), "is int16"),
    "modules cut off": (lambda c: c.pop("modules"), "is int16"),
    "one module cut off": (lambda c: c["modules"].pop(Q), f"{Q}.weight is int16"),
    "modules in a list": (lambda c: c.update(modules=[1, 2]), "malformed"),
    "modules as text": (lambda c: c.update(modules="abc"), "malformed"),
    "no formats": (lambda c: c.update(formats={}), "malformed"),
    "formats cut off": (lambda c: c.pop("formats"), "malformed"),
    "formats as number": (lambda c: c.update(formats=7), "malformed"),
    "a format as number": (lambda c: c.update(formats=dict.fromkeys(c["formats"], 7)), "malformed"),
    "a format without segments": (
        lambda c: c.update(formats={k: {"version": 2} for k in c["formats"]}),
        "has the segments",
    ),
    "no segments": (lambda c: [f["segments"].clear() for f in c["formats"].values()], "has the segments"),
    "a format of another name": (lambda c: c["modules"].update({Q: "no-such-format"}), "no-such-format"),
    "columns cut off": (each_segment(lambda s: s.pop("columns")), "lacks columns"),
    "columns as text": (each_segment(lambda s: s.update(columns="x")), "positive whole numbers"),
    "other columns": (each_segment(lambda s: s.update(columns=48)), "input columns"),
    "another kind": (each_segment(lambda s: s.update(kind="curves")), "unknown segment"),
    "another field": (each_segment(lambda s: s.update(extra=1)), "extra"),
    "another group": (each_segment(lambda s: s.update(group=16)), "is float16"),
    "zero points ignored": (each_segment(lambda s: s.update(symmetric=True) if "bits" in s else None), "weight_zero"),
}


@pytest.mark.parametrize("edit", EDITS)
def test_a_config_that_was_edited_is_refused(llama, tmp_path, edit):
    change, word = EDITS[edit]
    refused(with_config(llama, tmp_path / "x", change), word)


@pytest.mark.parametrize("name", ["model.layers.7.mlp.up_proj", "model.layers.0.mlp.no_proj", "nothing"])
def test_a_module_that_the_model_lacks_is_named(llama, tmp_path, name):
    folder = with_config(llama, tmp_path / "x", lambda c: c["modules"].update({name: next(iter(c["formats"]))}))
    refused(folder, name)


@pytest.mark.parametrize("name", ["model.norm", "model.embed_tokens", "model.layers.0", "model"])
def test_a_module_that_is_no_linear_is_named(llama, tmp_path, name):
    folder = with_config(llama, tmp_path / "x", lambda c: c["modules"].update({name: next(iter(c["formats"]))}))
    refused(folder, name)


def test_a_folder_that_is_not_packed_is_refused(llama, tmp_path):
    with pytest.raises(CheckpointError, match=r"is not a packed checkpoint .* `ultralowbit compress"):
        ultralowbit.load(llama.parent / "source")
    with pytest.raises(CheckpointError, match=r"is not the folder of a checkpoint .it has no config.json.: give"):
        ultralowbit.load(tmp_path)
    for content in ("", "[", "[]", "null", '{"quantization_config": 3}'):
        (tmp_path / "config.json").write_text(content)
        with pytest.raises(CheckpointError):
            ultralowbit.load(tmp_path)


def test_a_name_that_is_nowhere_is_refused(tmp_path, monkeypatch):
    """Before transformers asks the hub again and again."""
    monkeypatch.setattr("huggingface_hub.file_exists", lambda *_, **__: 1 / 0)
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda *_, **__: pytest.fail("asked on"))
    for name in (tmp_path / "nothing", "./nothing", "~/nothing", "a/b/nothing"):
        with pytest.raises(InputError, match=r"there is no such folder .*nothing': check the path"):
            ultralowbit.load(name)
    for name in ("nothing", "org/nothing"):
        with pytest.raises(InputError, match=rf"no folder '{name}', and the hub cannot be reached for it \(Zero"):
            ultralowbit.load(name, revision="main")


def test_a_state_dict_in_place_of_files_is_refused(llama):
    config, state_dict = AutoConfig.from_pretrained(llama), ultralowbit.load(llama).state_dict()
    with pytest.raises(CheckpointError, match="safetensors files"):
        LlamaForCausalLM.from_pretrained(None, config=config, state_dict=state_dict)


def test_a_model_cannot_be_quantized_on_the_way_in(llama):
    config = UltraLowBitConfig({Q: "a"}, {"a": {"version": 2, "segments": []}})
    with pytest.raises(ValueError, match=r"ultralowbit|calibrat|quantiz"):
        AutoModelForCausalLM.from_pretrained(llama.parent / "source", quantization_config=config)


def test_a_packed_linear_takes_only_weights_of_its_own_format():
    packed = Sign(planes=1).quantize(torch.randn(6, 40), None)
    module = PackedLinear.replacing(torch.nn.Linear(40, 6), packed.format)
    module.fill(packed)
    assert torch.equal(module.packed.dequantize(), packed.dequantize())
    with pytest.raises(FormatError, match="input columns"):
        PackedLinear.replacing(torch.nn.Linear(41, 6), packed.format)
    assert isinstance(packed, PackedWeight)
    assert {type(s) for s in packed.format.segments} <= {Planes, Ints}


def test_activations_of_8_bits_only_where_they_are_asked_for(llama):
    exact, rounded = ultralowbit.load(llama), ultralowbit.load(llama, activations="int8")
    assert not any(m.int8 for m in exact.modules() if isinstance(m, PackedLinear))
    assert all(m.int8 for m in rounded.modules() if isinstance(m, PackedLinear))
    assert "format=40x2sign/row, int8=True)" in repr(rounded)
    difference = (logits(rounded) - logits(exact)).abs().max() / logits(exact).abs().max()
    assert 0 < difference < 0.1 if cpu.instruction_sets() else difference == 0
    with pytest.raises(ValueError, match="activations is 'int4', expected 'exact' or 'int8'"):
        ultralowbit.load(llama, activations="int4")


def test_a_packed_linear_says_what_it_is(llama):
    printed = repr(ultralowbit.load(llama))
    assert "PackedLinear(in_features=40, out_features=56, format=40x2sign/row)" in printed
    assert "40xint2/g32" in printed
