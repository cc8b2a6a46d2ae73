"""Benchmarks run and report what they promise; no speed is asserted."""

from __future__ import annotations

import json
from dataclasses import asdict
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, MixtralConfig

from ultralowbit.bench import eval as eval_module
from ultralowbit.bench import pipeline, quantize, scale
from ultralowbit.bench.decode import DECODED, decode_bench
from ultralowbit.bench.eval import eval_bench
from ultralowbit.bench.models import Shape, write_headers, write_model, write_text
from ultralowbit.bench.pipeline import packing_bench, pipeline_bench, unavoidable
from ultralowbit.bench.quantize import quantize_bench
from ultralowbit.bench.scale import Card, scale_bench
from ultralowbit.bench.training import TRAINED, training_bench
from ultralowbit.data.corpora import read_text
from ultralowbit.errors import InputError
from ultralowbit.methods.gptq import GPTQ
from ultralowbit.methods.sign import Sign
from ultralowbit.nn.decoder import Decoder
from ultralowbit.pipeline.ranks import Ranks
from ultralowbit.system import forget_peak_memory, peak_memory

pytestmark = pytest.mark.slow

TINY = Shape(hidden=64, inter=172, heads=4, kv_heads=2, vocab=96)


def test_models_load_and_words_are_tokens(tmp_path):
    model = AutoModelForCausalLM.from_pretrained(write_model(tmp_path / "model", 2, TINY))
    assert model.dtype == torch.bfloat16 and model.config.num_hidden_layers == 2
    sizes = {name: tuple(w.shape) for name, w in model.model.layers[0].named_parameters() if w.ndim == 2}
    assert sizes == {f"{name}.weight": size for name, size in TINY.linears.items()}
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    text = read_text(str(write_text(tmp_path / "text.txt", 100, TINY.vocab)), "train").text
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert [f"w{i}" for i in ids] == text.split() and len(ids) == 100


def test_pipeline_bench(tmp_path):
    said = []
    result = pipeline_bench((2, 1), 4, 16, json_file=tmp_path / "bench.json", shape=TINY, say=said.append)
    assert [len(runs[1]["block_seconds"]) for runs in result["runs"].values()] == [2, 1]
    for run in (runs[1] for runs in result["runs"].values()):
        assert run["unavoidable"].keys() == {"forward passes", "Hessians", "factors", "updates"}
        assert 0 < run["unavoidable_seconds"] < run["seconds"] and run["ratio"] > 1
        assert sum(run["block_seconds"]) <= run["seconds"] + 0.01 and run["peak_bytes"] > 1e8
    written = json.loads((tmp_path / "bench.json").read_text())
    assert written["runs"]["2"]["1"] == result["runs"][2][1] and written["packing"] == result["packing"]
    assert sum("layers: peak memory" in line for line in said) == 2
    assert list(tmp_path.iterdir()) == [tmp_path / "bench.json"]


def test_a_run_is_compared_with_what_no_run_can_avoid(monkeypatch):
    """Two blocks of 1.5 s each that cannot be avoided, in a run of 12 s."""
    manifest = {"block_seconds": {"0": 5.0, "1": 6.0}, "layers": {"q": {"seconds": 2.0}, "k": {"seconds": 0.5}},
                "calibration": {"source": "x"}, "files": {"model.safetensors": "ab"}}  # fmt: skip
    clock = iter([100.0, 112.0])
    monkeypatch.setattr(pipeline, "compress", lambda *_, **__: SimpleNamespace(manifest=manifest))
    monkeypatch.setattr(
        pipeline, "estimate", lambda *_, **__: SimpleNamespace(peaks={"blocks": (7, 0)}, seconds={"a": 1, "b": 2})
    )
    monkeypatch.setattr(pipeline, "unavoidable", lambda *_: {"forward passes": 1.0, "Hessians": 0.5})
    monkeypatch.setattr(pipeline, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    task = {"model": "m", "out": "o", "recipe": "gptq-2bit", "settings": [], "shape": asdict(TINY)}
    run = pipeline._run(task, Ranks())
    assert (run["seconds"], run["unavoidable_seconds"], run["ratio"]) == (12.0, 3.0, 4.0)
    assert (run["block_seconds"], run["quantizing_seconds"]) == ([5.0, 6.0], 2.5)
    assert (run["predicted_seconds"], run["received_bytes"], run["sha256"]) == (3, 0, "ab")
    assert run["stage_peaks"]["blocks"]["predicted"] == 7 and run["stage_peaks"]["blocks"]["measured"] > 0


def test_out_folder_is_kept_but_emptied_of_models(tmp_path):
    result = pipeline_bench((1,), 4, 16, "rtn-4bit", out=tmp_path, shape=TINY, say=lambda line: None)
    assert [path.name for path in tmp_path.iterdir()] == ["text.txt"]
    # rounding to nearest needs no data: nothing is unavoidable
    assert (result["runs"][1][1]["unavoidable"], result["runs"][1][1]["ratio"]) == ({}, None)


def test_processes_that_share_the_work_are_set_beside_one(tmp_path):
    said = []
    result = pipeline_bench((2,), 8, 512, "gptq-2bit", (1, 2), shape=TINY, say=said.append)
    alone, both = result["runs"][2].values()
    assert alone["sha256"] == both["sha256"] and alone["received_bytes"] == 0 and both["unavoidable"] == {}
    # two lanes of 2 x 512 tokens; a block has three groups of 64 columns and one of 172
    sums = 4 * 2 * (3 * 64**2 + 172**2) * (1 - 1 / 2) * (1 + 2 / 2)
    packed = 2 * sum(out * columns for out, columns in TINY.linears.values())  # at most a byte a weight
    assert sums < both["received_bytes"] < sums + packed + 8 * 8 * 512
    (line,) = (line for line in said if "times as fast" in line)
    assert "the same bytes" in line and "a rank received" in line


def test_large_models_are_worked_out_from_rates(tmp_path, monkeypatch):
    dense = LlamaConfig(
        architectures=["LlamaForCausalLM"], hidden_size=64, intermediate_size=172, num_hidden_layers=2, vocab_size=96,
        num_attention_heads=4, num_key_value_heads=2,
    )  # fmt: skip
    mixture = MixtralConfig(
        architectures=["MixtralForCausalLM"], hidden_size=64, intermediate_size=96, num_hidden_layers=2, vocab_size=96,
        num_attention_heads=4, num_key_value_heads=2, num_local_experts=8, num_experts_per_tok=2,
    )  # fmt: skip
    monkeypatch.setattr(scale, "LARGE", {"dense": lambda: dense, "mixture": lambda: mixture})
    said = []
    rows = scale_bench(ranks=(1, 4), json_file=tmp_path / "scale.json", say=said.append)
    assert [(row["model"], row["ranks"]) for row in rows] == [(m, n) for m in ("dense", "mixture") for n in (1, 4)]
    assert json.loads((tmp_path / "scale.json").read_text())["rows"] == rows and len(said) == 1 + 2 * len(rows)
    tokens = 128 * 2048
    for one, four in zip(rows[::2], rows[1::2], strict=True):
        assert one["received_bytes"] == 0 < four["received_bytes"] and "waiting for sums" not in one["seconds"]
        assert four["seconds"]["Hessians"] == pytest.approx(one["seconds"]["Hessians"] / 4)
    # q, k, v share an input; a Hessian of theirs, of o_proj's, of gate and up's and of down_proj's
    assert rows[0]["seconds"]["Hessians"] == pytest.approx(2 * tokens * 2 * (3 * 64**2 + 172**2) / 33e12)
    # attention: not known to share; a quarter of the tokens reach each of eight experts
    widths = 4 * 64**2 + 8 / 4 * (64**2 + 96**2)
    assert rows[2]["seconds"]["Hessians"] == pytest.approx(2 * tokens * 2 * widths / 33e12)
    folder = tmp_path / "mine"
    dense.save_pretrained(folder)
    (mine,) = scale_bench(folder, ranks=(1,), card=Card(fp32=330.0), say=said.append)
    assert mine["seconds"]["Hessians"] == pytest.approx(rows[0]["seconds"]["Hessians"] / 10)
    with pytest.raises(InputError, match=r"nowhere has no config.json: give the folder of a checkpoint"):
        scale_bench(tmp_path / "nowhere")


def test_headers_alone_are_written(tmp_path):
    config = LlamaConfig(architectures=["LlamaForCausalLM"], hidden_size=64, num_attention_heads=4, vocab_size=10**6)
    folder = write_headers(tmp_path / "holes", config, most=100_000_000)
    files = sorted(folder.glob("*.safetensors"))
    assert len(files) > 2 and sum(file.stat().st_size for file in files) > 2 * 2 * 64 * 10**6
    assert sum(file.stat().st_blocks * 512 for file in files) < 10**6
    decoder = Decoder(folder, torch.bfloat16, torch.device("cpu"))
    assert decoder.specs["model.embed_tokens.weight"].shape == (10**6, 64)


def test_quantize_bench(tmp_path):
    said = []
    names = ("gptq-2bit", "sign-1", "pb-llm")
    rows = quantize_bench(names, TINY, repeat=1, json_file=tmp_path / "quantize.json", say=said.append)
    assert [row["recipe"] for row in rows] == [*names] and rows[0]["ratio"] == 1
    assert all(row["seconds"] > 0 for row in rows)
    written = json.loads((tmp_path / "quantize.json").read_text())
    assert written["rows"] == rows and written["statistics"].keys() == {"tokens", "float32", "bfloat16"}
    assert len(said) == 5 and "statistics of 2,048 tokens" in said[-1]


def test_methods_are_compared_with_the_first_by_their_fastest_turn(monkeypatch):
    costs = {GPTQ: iter([9.0] + [1.0] * 100), Sign: iter([2.5] * 100)}  # seconds of each Linear; the first is disturbed
    clock = [0.0]

    def costing(method):
        def quantize(self, weight, stats):
            clock[0] += next(costs[method])

        return quantize

    for method in costs:
        monkeypatch.setattr(method, "quantize", costing(method))
    ticking = SimpleNamespace(thread_time=lambda: clock[0], perf_counter=lambda: clock[0])
    monkeypatch.setattr(quantize, "time", ticking)
    said = []
    rows = quantize_bench(("gptq-2bit", "sign-1"), TINY, repeat=2, say=said.append)
    assert [(row["seconds"], row["ratio"]) for row in rows] == [(7.0, 1.0), (17.5, 2.5)]
    assert "2.50 times gptq-2bit" in said[-2]


@pytest.mark.parametrize("given", [False, True])
def test_eval_bench(tmp_path, given):
    said = []
    model = write_model(tmp_path / "model", 1, TINY) if given else None
    result = eval_bench(
        model, layers=1, context=64, tokens=4200, repeat=2, device="cpu", json_file=tmp_path / "bench.json", shape=TINY,
        say=said.append,
    )  # fmt: skip
    assert (result["tokens"], result["context"]) == (4160, 64) and str(model or "random Llama") in result["model"]
    assert all(seconds > 0 for seconds in result["seconds"].values())
    assert json.loads((tmp_path / "bench.json").read_text()) == result and len(said) == 3


def test_measuring_is_compared_with_its_forward_passes(monkeypatch):
    said, seconds = [], {"forward": 2.0, "perplexity": 2.5, "two forwards": 4.0, "divergence": 6.0}
    monkeypatch.setattr(eval_module, "_raced", lambda *_: seconds)
    result = eval_bench(None, layers=1, context=16, tokens=32, device="cpu", shape=TINY, say=said.append)
    assert (result["perplexity_ratio"], result["divergence_ratio"]) == (1.25, 1.5)
    assert "1.250 times" in said[1] and "1.500 times" in said[2]


def test_packing_and_bare_products():
    threads = torch.get_num_threads()
    state = torch.random.get_rng_state()
    rows = packing_bench(32, 200)
    assert [row["what"] for row in rows[:3]] == ["copy", "200x1sign/row", "200x1sign/g128"] and len(rows) == 9
    assert all(row["pack"] > 0 and row["unpack"] > 0 for row in rows)
    assert all(seconds > 0 for seconds in unavoidable(TINY, 4, 16).values())
    before = peak_memory()
    if forget_peak_memory():
        assert peak_memory() <= before
    assert torch.get_num_threads() == threads
    assert torch.equal(state, torch.random.get_rng_state())
    assert peak_memory() > 1e8


def test_training_bench(tmp_path):
    said, state = [], torch.random.get_rng_state()
    rows = training_bench(16, 2, 2, TINY, json_file=tmp_path / "bench.json", say=said.append)
    assert [row["what"] for row in rows] == list(TRAINED) and len(said) == 1 + len(TRAINED)
    for row in rows:
        assert row["seconds"] > 0 and row["plain"] > 0 and row["ratio"] > 0
    assert json.loads((tmp_path / "bench.json").read_text())["rows"] == rows
    assert torch.equal(state, torch.random.get_rng_state())


def test_shapes_have_whole_heads():
    assert Shape.wide(2048) == Shape() and Shape.wide(64).linears["mlp.down_proj"] == (64, 176)
    with pytest.raises(InputError, match=r"200 wide .* multiple of 64"):
        Shape.wide(200)


def test_decode_bench(tmp_path, monkeypatch):
    said = []
    monkeypatch.delitem(DECODED, "gptq-2bit")
    monkeypatch.delitem(DECODED, "sign-2-g128")
    result = decode_bench(1, tokens=2, rounds=1, shape=TINY, json_file=tmp_path / "decode.json", say=said.append)
    assert list(result["models"]) == ["bf16", *(f"{name}{way}" for name in DECODED for way in ("", " int8"))]
    dense, packed = result["models"]["bf16"], result["models"]["sign-1"]
    assert dense["ratio"] == 1 and packed["file_bytes"] < dense["file_bytes"]
    for model in result["models"].values():
        assert model["tokens_per_second"] > 0 and model["peak_bytes"] > 1e8 and 0 < model["share"] < 1
    assert json.loads((tmp_path / "decode.json").read_text()) == result
    assert len(said) == 1 + len(result["models"])
