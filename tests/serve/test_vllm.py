"""vLLM itself writes the tokens that `load` does: `make test-vllm`, in an environment of its own."""

from __future__ import annotations

import importlib.metadata
import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoTokenizer

import ultralowbit
from ultralowbit.checkpoint.config import DIGEST, config_digest
from ultralowbit.errors import CheckpointError
from ultralowbit.eval import zeroshot
from ultralowbit.format.weight import PackedWeight
from ultralowbit.methods.pb_llm import PBLLM
from ultralowbit.methods.rtn import RTN
from ultralowbit.methods.sign import Sign
from ultralowbit.recipe import Recipe

os.environ |= {
    "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1",
}  # fmt: skip

pytest.importorskip("vllm")

from vllm import LLM, SamplingParams
from vllm.distributed import cleanup_dist_env_and_memory
from vllm.model_executor.layers.linear import LinearBase

SHARED = Path(__file__).parents[3] / "shared"
SIZES = {
    "vocab_size": 96, "hidden_size": 128, "intermediate_size": 192, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 32, "max_position_embeddings": 128, "bos_token_id": 0, "eos_token_id": 1,
    "pad_token_id": 3,
}  # fmt: skip
NEOX = {key: value for key, value in SIZES.items() if key != "num_key_value_heads"}
GPT2 = {"vocab_size": 96, "n_embd": 128, "n_layer": 2, "n_head": 4, "n_positions": 128, "eos_token_id": 1}
GPTQ = {"method": "gptq", "bits": 2, "group": 32}
TWO_SIGNS = {"method": "sign", "planes": 2}
ROTATED = {
    "rotate": {"inputs": "online"}, "error_correction": {},
    "quantize": {"method": "sign", "planes": 2, "act_order": True, "refine": 1},
}  # fmt: skip


def mixed(pattern: str) -> dict[str, Any]:
    """GPTQ, but for a Linear of each block that vLLM multiplies together with others where it can."""
    return {"quantize": GPTQ, "overrides": [{"match": pattern, "quantize": TWO_SIGNS}]}


MODELS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "llama, tied, biases, gate and up differ": (
        "llama",
        SIZES | {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True},
        mixed("*up_proj"),
    ),
    "qwen3, rotated inputs in an order": ("qwen3", SIZES, ROTATED),
    "gemma3, outliers": (
        "gemma3_text",
        SIZES | {"sliding_window": 16, "layer_types": ["sliding_attention", "full_attention"]},
        {"quantize": {"method": "pb_llm", "ratio": 0.1}},
    ),
    "gpt2, stored transposed": ("gpt2", GPT2, mixed("*c_fc")),
    "phi3, fused in the files": ("phi3", SIZES, {"quantize": {"method": "rtn", "bits": 3, "group": 32}}),
    "gpt-neox, heads in turns": ("gpt_neox", NEOX, mixed("*4h_to_h")),
    "llama, tied embedding packed": (
        "llama",
        SIZES | {"tie_word_embeddings": True},
        ROTATED | {"embeddings": {"method": "ints", "bits": 4}},
    ),
    "qwen3, embedding and head packed": ("qwen3", SIZES, ROTATED | {"embeddings": {"method": "planes", "planes": 5}}),
    "gemma3, scaled rows packed": (
        "gemma3_text",
        SIZES | {"sliding_window": 16, "layer_types": ["sliding_attention", "full_attention"]},
        {"quantize": GPTQ, "embeddings": {"method": "ints"}},
    ),
    "mistral, a block left out": ("mistral", SIZES, {"quantize": GPTQ, "ignore": ["*layers.1.*"]}),
}


def compress(source: Path, folder: Path, stages: dict[str, Any], text: str) -> Path:
    few = {"source": text, "samples": 4, "length": 24}
    return ultralowbit.compress(
        str(source), Recipe.model_validate({"name": "x", "calibration": few} | stages), folder
    ).folder


@pytest.fixture(scope="module")
def packed(tmp_path_factory, save_model, text) -> Callable[[str], Path]:
    """The packed checkpoint of one of MODELS."""
    made: dict[str, Path] = {}

    def make(name: str) -> Path:
        if name not in made:
            model_type, values, stages = MODELS[name]
            root = tmp_path_factory.mktemp("vllm")
            source = save_model(AutoConfig.for_model(model_type, **values), root / "source")
            made[name] = compress(source, root / "packed", stages, text)
        return made[name]

    return make


@pytest.fixture(scope="module")
def novel(tmp_path_factory) -> Path:
    """A real language model of 4 million weights, packed."""
    source = SHARED / "models/novel-4m"
    if not source.exists():
        pytest.skip("needs novel-4m")
    return compress(
        source, tmp_path_factory.mktemp("novel") / "packed", ROTATED, str(SHARED / "data/novels_heldout.txt")
    )


@pytest.fixture
def open_vllm() -> Iterator[Callable[..., LLM]]:
    """A folder in vLLM; one at a time, for they share what is global."""
    opened: list[LLM] = []

    def open_folder(folder: Path, **kwargs: Any) -> LLM:
        options = {"dtype": "float32", "enforce_eager": True, "max_model_len": 96, "max_num_seqs": 32, **kwargs}
        opened.append(LLM(str(folder), **options))
        return opened[0]

    yield open_folder
    for llm in opened:
        llm.llm_engine.engine_core.shutdown()
    opened.clear()
    cleanup_dist_env_and_memory()


def greedy(llm: LLM, prompts: list[list[int]], tokens: int = 16) -> list[list[int]]:
    sampling = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True)
    outputs = llm.generate([{"prompt_token_ids": ids} for ids in prompts], sampling, use_tqdm=False)
    return [list(output.outputs[0].token_ids) for output in outputs]


def expected(folder: Path, prompts: list[list[int]], tokens: int = 16) -> list[list[int]]:
    """The same from transformers, one prompt at a time."""
    model = ultralowbit.load(folder, dtype=torch.float32)
    kwargs = {"max_new_tokens": tokens, "do_sample": False, "eos_token_id": None, "pad_token_id": 3}
    return [model.generate(torch.tensor([ids]), **kwargs)[0, len(ids) :].tolist() for ids in prompts]


def prompts(count: int, vocab: int = 96, shared: int = 0) -> list[list[int]]:
    """Random tokens, of which the first `shared` are the same."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(3, 20, (count,), generator=generator).tolist()
    common = torch.randint(4, vocab, (shared,), generator=generator).tolist()
    return [common + torch.randint(4, vocab, (n,), generator=generator).tolist() for n in lengths]


@pytest.mark.parametrize("name", MODELS)
def test_vllm_writes_the_same_tokens(packed, open_vllm, name):
    folder = packed(name)
    wanted = expected(folder, prompts(20))  # first: vLLM changes classes of transformers that it has no own of
    assert greedy(open_vllm(folder), prompts(20)) == wanted


def test_a_real_model_writes_the_same_tokens_in_a_batch_with_a_shared_prefix(novel, open_vllm):
    llm = open_vllm(novel, enable_prefix_caching=True, max_model_len=256)
    batch = prompts(32, 4096, shared=160)
    wanted = expected(novel, batch)
    assert greedy(llm, batch) == wanted
    assert greedy(llm, batch) == wanted  # now all of whole blocks is cached
    assert llm.generate({"prompt_token_ids": batch[0]}, use_tqdm=False)[0].num_cached_tokens == 128  # in blocks of 128


def test_the_packed_words_are_all_that_is_kept(packed, open_vllm):
    llm = open_vllm(packed("mistral, a block left out"))
    model = llm.llm_engine.model_executor.driver_worker.model_runner.model
    linears = {name: m for name, m in model.named_modules() if isinstance(m, LinearBase)}
    dtypes = {name: {t.dtype for t in [*m.parameters(), *m.buffers()] if t.dim() > 1} for name, m in linears.items()}
    first = {name: kinds for name, kinds in dtypes.items() if ".0." in name}
    assert len(first) == 4
    assert all(kinds == {torch.int16, torch.float16, torch.uint8} for kinds in first.values())
    assert len(linears["model.layers.0.self_attn.qkv_proj"].products) == 1


def damage(folder: Path, target: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> Path:
    shutil.copytree(folder, target)
    digest = config_digest(json.loads((target / "config.json").read_text()))
    for path in target.glob("*.safetensors"):
        tensors = load_file(path)
        change(tensors)
        save_file(tensors, path, metadata={"format": "pt", DIGEST: digest})
    return target


@pytest.mark.parametrize(
    ("change", "word"),
    [
        (lambda t: t.pop("model.norm.weight"), "model.norm.weight is missing"),
        (lambda t: t.pop("model.layers.0.mlp.up_proj.weight_scale"), "up_proj.weight_scale is missing"),
        (lambda t: t.update({"lm_head.weight": t["lm_head.weight"][:-1].contiguous()}), "lm_head.weight is"),
        (lambda t: t["model.layers.0.mlp.up_proj.weight_scale"].fill_(torch.inf), "gate_up_proj.weight_scale"),
    ],
    ids=["a norm", "a scale", "the head's shape", "a value"],
)
def test_damage_is_refused(packed, open_vllm, tmp_path, change, word):
    folder = damage(packed("mistral, a block left out"), tmp_path / "x", change)
    with pytest.raises(ValueError, match=word):
        open_vllm(folder)


def test_an_edited_config_is_refused(packed, open_vllm, tmp_path):
    folder = Path(shutil.copytree(packed("mistral, a block left out"), tmp_path / "x"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 1e-3}))
    with pytest.raises(ValueError, match="was written with another config"):
        open_vllm(folder)


def test_packed_and_plain_weights_cannot_be_one_product(open_vllm, save_model, text, tmp_path):
    source = save_model(AutoConfig.for_model("llama", **SIZES), tmp_path / "source")
    folder = compress(source, tmp_path / "packed", {"quantize": GPTQ, "ignore": ["*k_proj"]}, text)
    with pytest.raises(CheckpointError, match=r"q_proj and .*k_proj at once, of which only the first is packed"):
        open_vllm(folder)


# --- ranks of tensor parallelism ---------------------------------------------------------------------------------

METHODS = {"ints": RTN(bits=3, group=32), "two signs": Sign(planes=2), "outliers": PBLLM(ratio=0.1)}


def weights(*shapes: tuple[int, int], kind: str) -> list[PackedWeight]:
    generator = torch.Generator().manual_seed(0)
    return [METHODS[kind].quantize(torch.randn(shape, generator=generator), None) for shape in shapes]


def loaded(layer: Any, members: list[PackedWeight], shards: list[Any], inputs: tuple[int, int], rows: list[int]) -> Any:
    """A Linear of one rank, given the members' stored tensors as vLLM's models give them."""
    from ultralowbit.serve.vllm import PackedMethod

    method = PackedMethod([member.format for member in members])
    method.create_weights(layer, inputs[0], rows, inputs[1], 0, torch.float32, weight_loader=None)
    for member, shard in zip(members, shards, strict=True):
        for name, tensor in member.tensors.items():
            parameter = layer._parameters[name]
            parameter.weight_loader(parameter, tensor, *([] if shard is None else [shard]))
    method.process_weights_after_loading(layer)
    return lambda x: method.apply(layer, x)


def linear(rank: int, ranks: int, **values: Any) -> Any:
    layer = torch.nn.Module()
    for name, value in {"tp_rank": rank, "tp_size": ranks, "prefix": "x", **values}.items():
        setattr(layer, name, value)
    return layer


@pytest.mark.parametrize("kind", METHODS)
@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("fused", [False, True], ids=["apart", "fused"])
def test_ranks_have_the_rows_of_their_heads(kind, ranks, fused):
    """Four heads of queries, two of keys and of values: with four ranks, two have the same keys."""
    members = weights((64, 96), (32, 96), (32, 96), kind=kind)
    x = torch.randn(5, 96, generator=torch.Generator().manual_seed(1))
    whole = [x @ member.dequantize().T for member in members]
    heads = {"total_num_heads": 4, "total_num_kv_heads": 2, "head_size": 16, "v_head_size": 16}
    kv = max(1, 2 // ranks)
    for rank in range(ranks):
        layer = linear(rank, ranks, **heads)
        if fused:
            format = members[0].format
            one = PackedWeight(format, (128, 96), format.stacked([member.tensors for member in members]))
            run = loaded(layer, [one], [None], (96, 96), [64 // ranks, 16 * kv, 16 * kv])
        else:
            run = loaded(layer, members, ["q", "k", "v"], (96, 96), [64 // ranks, 16 * kv, 16 * kv])
        first = rank * kv if ranks <= 2 else rank // 2
        mine = [whole[0][:, 64 // ranks * rank :][:, : 64 // ranks]]
        mine += [part[:, 16 * first : 16 * (first + kv)] for part in whole[1:]]
        torch.testing.assert_close(run(x), torch.cat(mine, dim=1), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("kind", METHODS)
def test_the_sum_over_ranks_is_the_product_where_input_columns_are_shared_out(kind):
    (member,) = weights((24, 96), kind=kind)
    x = torch.randn(5, 96, generator=torch.Generator().manual_seed(1))
    parts = [loaded(linear(rank, 2), [member], [None], (48, 96), [24])(x[:, 48 * rank :][:, :48]) for rank in range(2)]
    torch.testing.assert_close(parts[0] + parts[1], x @ member.dequantize().T, rtol=1e-5, atol=1e-4)


def test_a_part_that_never_came_is_named():
    a, b = weights((24, 96), (24, 96), kind="ints")
    with pytest.raises(CheckpointError, match=r"x\.weight is missing"):
        loaded(linear(0, 1, output_sizes=[24, 24]), [a, b][:1] * 2, [0, 0], (96, 96), [24, 24])


# --- over the wire, and through lm-eval --------------------------------------------------------------------------


def test_the_server_answers_by_openais_protocol(novel, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = os.environ | {"VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
    command = [sys.executable, "-P", "-m", "ultralowbit", "serve", str(novel), "--run", "--", "--port", str(port)]
    command += ["--dtype", "float32", "--enforce-eager", "--max-model-len", "128"]
    server = subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=-1, stderr=subprocess.STDOUT, text=True)
    try:
        ask = {"model": novel.name, "prompt": "It was a dark", "max_tokens": 16, "temperature": 0, "ignore_eos": True}
        request = urllib.request.Request(
            f"http://127.0.0.1:{port}/v1/completions", json.dumps(ask).encode(), {"Content-Type": "application/json"}
        )
        for _ in range(240):
            assert server.poll() is None, server.stdout.read()[-2000:]
            try:
                answer = json.loads(urllib.request.urlopen(request, timeout=60).read())
                break
            except OSError:
                time.sleep(1)
    finally:
        server.terminate()
        server.communicate(timeout=60)
    tokenizer = AutoTokenizer.from_pretrained(novel)
    ids = tokenizer("It was a dark")["input_ids"]
    assert answer["choices"][0]["text"] == tokenizer.decode(expected(novel, [ids])[0])


def test_lm_eval_through_vllm_gives_the_accuracies_of_eval(novel, tmp_path, monkeypatch):
    lm_eval = pytest.importorskip("lm_eval")
    read = importlib.metadata.version  # lm-eval looks for a package `vllm`, which vllm-cpu is not
    monkeypatch.setattr(importlib.metadata, "version", lambda name: read(name + "-cpu" * (name == "vllm")))
    from lm_eval.models.vllm_causallms import VLLM
    from lm_eval.tasks import TaskManager

    shutil.copytree(SHARED / "data/zeroshot", tmp_path / "zeroshot")
    subprocess.run([sys.executable, "make_yaml.py"], cwd=tmp_path / "zeroshot", check=True)
    names = ["local_piqa", "local_arc_easy"]
    tasks = zeroshot.read_tasks(names, tmp_path / "zeroshot/yaml")
    model, tokenizer = ultralowbit.load(novel, dtype=torch.float32), AutoTokenizer.from_pretrained(novel)
    mine = zeroshot.evaluate(model, tokenizer, tasks, limit=40).lm_eval["results"]
    manager = TaskManager(include_path=str(tmp_path / "zeroshot/yaml"), include_defaults=False)
    lm = VLLM(pretrained=str(novel), dtype="float32", enforce_eager=True, max_model_len=512, batch_size="auto")
    theirs = lm_eval.simple_evaluate(lm, tasks=names, task_manager=manager, limit=40)["results"]
    for name in names:
        for metric in ("acc,none", "acc_norm,none"):
            assert theirs[name][metric] == mine[name][metric], (name, metric)
