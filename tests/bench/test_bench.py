"""Benchmarks run and report what they promise; no speed is asserted."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from ultralowbit.bench.decode import DECODED, decode_bench
from ultralowbit.bench.eval import eval_bench
from ultralowbit.bench.models import Shape, write_model, write_text
from ultralowbit.bench.pipeline import packing_bench, pipeline_bench, unavoidable
from ultralowbit.bench.quantize import quantize_bench
from ultralowbit.bench.training import TRAINED, training_bench
from ultralowbit.data.corpora import read_text
from ultralowbit.errors import InputError
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
    assert [len(run["block_seconds"]) for run in result["runs"].values()] == [2, 1]
    for depth, run in result["runs"].items():
        assert run["unavoidable"].keys() == {"forward passes", "Hessians", "factors", "updates"}
        assert run["unavoidable_seconds"] == pytest.approx(depth * sum(run["unavoidable"].values()))
        assert run["ratio"] == pytest.approx(run["seconds"] / run["unavoidable_seconds"])
        assert sum(run["block_seconds"]) <= run["seconds"] + 0.01 and run["peak_bytes"] > 1e8
    written = json.loads((tmp_path / "bench.json").read_text())
    assert written["runs"]["2"] == result["runs"][2] and written["packing"] == result["packing"]
    assert sum("layers: peak memory" in line for line in said) == 2
    assert list(tmp_path.iterdir()) == [tmp_path / "bench.json"]


def test_out_folder_is_kept_but_emptied_of_models(tmp_path):
    result = pipeline_bench((1,), 4, 16, "rtn-4bit", out=tmp_path, shape=TINY, say=lambda line: None)
    assert [path.name for path in tmp_path.iterdir()] == ["text.txt"]
    # rounding to nearest needs no data: nothing is unavoidable
    assert (result["runs"][1]["unavoidable"], result["runs"][1]["ratio"]) == ({}, None)


def test_quantize_bench(tmp_path):
    said = []
    names = ("gptq-2bit", "sign-1", "pb-llm")
    rows = quantize_bench(names, TINY, repeat=1, json_file=tmp_path / "quantize.json", say=said.append)
    assert [row["recipe"] for row in rows] == [*names] and rows[0]["ratio"] == 1
    assert all(row["ratio"] == row["seconds"] / rows[0]["seconds"] > 0 for row in rows)
    assert json.loads((tmp_path / "quantize.json").read_text())["rows"] == rows
    assert len(said) == 4


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
    assert result["perplexity_ratio"] == result["seconds"]["perplexity"] / result["seconds"]["forward"]
    assert result["divergence_ratio"] == result["seconds"]["divergence"] / result["seconds"]["two forwards"]
    assert (
        f"{result['perplexity_ratio']:.3f} times" in said[1]
        and json.loads((tmp_path / "bench.json").read_text()) == result
    )


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
