"""The stage `embeddings`: what is packed before the blocks, what they see of it, and that all of it is counted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from ultralowbit.checkpoint.size import measure_size
from ultralowbit.checkpoint.storage import read_json
from ultralowbit.errors import InputError
from ultralowbit.eval import runner
from ultralowbit.methods.statistics import InputStats
from ultralowbit.nn.hf import load
from ultralowbit.pipeline import embed
from ultralowbit.pipeline.compress import compress
from ultralowbit.pipeline.estimate import estimate
from ultralowbit.pipeline.verify import rerun, verify
from ultralowbit.recipe import Recipe
from ultralowbit.units import format_bytes

FOUR = {"method": "ints", "bits": 4}
EMBEDDING = "model.embed_tokens"


@pytest.fixture(scope="module")
def source(save_model, tiny_config, tmp_path_factory) -> Path:
    return save_model(
        tiny_config(num_hidden_layers=2, tie_word_embeddings=True), tmp_path_factory.mktemp("tied") / "model"
    )


@pytest.fixture(scope="module")
def untied(save_model, tiny_config, tmp_path_factory) -> Path:
    return save_model(
        tiny_config(num_hidden_layers=2, tie_word_embeddings=False), tmp_path_factory.mktemp("untied") / "model"
    )


@pytest.fixture(autouse=True)
def small_parts(monkeypatch):
    """Three batches of two windows, rows in parts of which the last is smaller."""
    monkeypatch.setattr("ultralowbit.pipeline.source.BATCH_TOKENS", 48)
    monkeypatch.setattr(embed, "ROWS", 40)


def recipe(text: str, **values: Any) -> Recipe:
    base = {"name": "test", "quantize": {"method": "gptq", "bits": 2, "group": 32}, "embeddings": FOUR}
    return Recipe.model_validate(base | {"calibration": {"source": text, "samples": 6, "length": 24}} | values)


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


@pytest.mark.parametrize("spec", [{"method": "ints"}, FOUR, {"method": "planes", "planes": 5}], ids=str)
@pytest.mark.parametrize("kind", ["tied", "untied"])
def test_the_result_computes_with_the_stored_bytes(kind, spec, source, untied, text, tmp_path):
    folder = source if kind == "tied" else untied
    done = compress(str(folder), recipe(text, embeddings=spec, rotate={}), tmp_path / "out")
    names = [EMBEDDING] if kind == "tied" else [EMBEDDING, "lm_head"]
    assert list(done.manifest["embeddings"]) == names
    model, tokens = load(tmp_path / "out"), torch.randint(0, 96, (2, 24))
    dense = AutoModelForCausalLM.from_pretrained(folder)
    state = {name: module.packed.dequantize() for name, module in model.named_modules() if hasattr(module, "packed")}
    dense.load_state_dict({f"{name}.weight": weight for name, weight in state.items()}, strict=False)
    torch.testing.assert_close(model(tokens).logits, dense(tokens).logits, rtol=0, atol=2e-5)
    assert verify(tmp_path / "out") == []
    if kind == "untied":  # the head's own error is known where it was fitted to what it reads
        assert (done.manifest["embeddings"]["lm_head"]["error"] is None) == (spec == {"method": "ints"})
    assert 0 < done.manifest["embeddings"][EMBEDDING]["lookup_error"] < 0.1


@pytest.mark.parametrize("values", [{}, {"rotate": {}, "error_correction": {}}], ids=["plain", "corrected"])
def test_blocks_see_the_packed_embedding_and_the_original_keeps_its_own(values, source, text, tmp_path):
    """Blocks are those of a model whose embedding is what the bytes mean; with error correction they are not, since
    the original that they are to follow is another."""
    done = compress(str(source), recipe(text, **values), tmp_path / "out").folder
    dense = AutoModelForCausalLM.from_pretrained(source)
    with torch.no_grad():
        dense.get_input_embeddings().weight.copy_(load(done).get_input_embeddings().packed.dequantize())
    dense.save_pretrained(tmp_path / "dense")
    (tmp_path / "dense" / "tokenizer.json").write_bytes((source / "tokenizer.json").read_bytes())
    (tmp_path / "dense" / "tokenizer_config.json").write_bytes((source / "tokenizer_config.json").read_bytes())
    plain = compress(str(tmp_path / "dense"), recipe(text, **values, embeddings=None), tmp_path / "plain").folder
    ours, theirs = tensors(done), tensors(plain)
    same = [torch.equal(t, ours[name]) for name, t in theirs.items() if ".layers." in name]
    assert all(same) == (not values)


def test_the_head_is_fitted_to_what_it_reads(untied, text, tmp_path, monkeypatch):
    seen: list[InputStats] = []
    gather = embed._read_by_head
    monkeypatch.setattr(embed, "_read_by_head", lambda *args: seen.append(gather(*args)) or seen[-1])
    compress(str(untied), recipe(text), tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(untied)
    from ultralowbit.data.calibration import calibrate
    from ultralowbit.hub import open_tokenizer

    tokens = calibrate(text, open_tokenizer(untied), samples=6, length=24, seed=0).tokens
    with torch.no_grad():
        x = model.model(tokens).last_hidden_state.flatten(0, 1)
    assert seen[0].count == len(x)
    torch.testing.assert_close(seen[0].hessian, x.T @ x, rtol=1e-4, atol=1e-4)


def test_a_stopped_run_goes_on_to_the_same_bytes(source, text, tmp_path, monkeypatch):
    whole = compress(str(source), recipe(text), tmp_path / "whole").manifest
    from ultralowbit.pipeline import stream

    class Stopped(BlockingIOError): ...

    def stop(*args):
        raise Stopped

    pack = stream.quantize_weight
    monkeypatch.setattr(stream, "quantize_weight", stop)
    with pytest.raises(Stopped):
        compress(str(source), recipe(text), tmp_path / "parts")
    monkeypatch.setattr(stream, "quantize_weight", pack)
    monkeypatch.setattr(embed, "quantize_weight", lambda *args: pytest.fail("packed again"))
    parts = compress(str(source), recipe(text), tmp_path / "parts").manifest
    assert parts["files"] == whole["files"]


def test_a_repeated_run_writes_the_same_bytes(source, text, tmp_path):
    compress(str(source), recipe(text), tmp_path / "out")
    assert rerun(tmp_path / "out").different == {}


def test_training_leaves_the_packed_embedding_as_it_is(source, text, tmp_path, short):
    trained = short("sign-2-distilled")
    seen = trained.calibration.model_copy(update={"samples": trained.packed_windows})  # the others judge
    plain = {"finetune": None, "embeddings": recipe(text).embeddings, "calibration": seen}
    plain = trained.model_copy(update=plain)
    both = trained.model_copy(update={"embeddings": plain.embeddings})
    before = tensors(compress(str(source), plain, tmp_path / "plain").folder)
    done = compress(str(source), both, tmp_path / "trained")
    after = tensors(done.folder)
    names = [name for name in before if name.startswith(EMBEDDING)]
    assert names and all(torch.equal(before[name], after[name]) for name in names)
    assert load(done.folder)(torch.zeros(1, 3, dtype=torch.int64)).logits.isfinite().all()


def test_its_bytes_are_counted_and_predicted(source, text, tmp_path):
    small = recipe(text)
    done = compress(str(source), small, tmp_path / "out").folder
    size = measure_size(done)
    stored = sum(t.nbytes for name, t in tensors(done).items() if name.startswith(EMBEDDING))
    assert size.other["embeddings"] == stored == sum(layer.bytes for layer in size.outside)
    assert [layer.name for layer in size.outside] == [EMBEDDING]
    assert size.file_bytes == (done / "model.safetensors").stat().st_size
    assert estimate(str(source), small).size.other == size.other
    plain = measure_size(compress(str(source), recipe(text, embeddings=None), tmp_path / "plain").folder)
    assert size.linear_bits_per_weight == plain.linear_bits_per_weight
    assert size.total_weights == plain.total_weights
    rows = 96 * 64
    assert size.model_bits_before == pytest.approx(
        plain.model_bits_per_weight - 8 * (plain.other["embeddings"] - 2 * rows) / size.total_weights
    )
    assert json.loads(json.dumps(size.to_dict()))["outside"][0]["name"] == EMBEDDING


def test_no_text_is_read_where_none_is_needed(source, tmp_path):
    eight = Recipe.load("rtn-4bit", ["embeddings.method=ints"])
    assert not eight.reads_text
    assert Recipe.load("rtn-4bit", ["embeddings.method=ints", "embeddings.bits=4"]).reads_text
    compress(str(source), eight, tmp_path / "out")
    assert read_json(tmp_path / "out" / "manifest.json")["embeddings"][EMBEDDING]["format"] == "64xint8/row"


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("embeddings.planes=9", "embeddings.planes: input should be less than or equal to 8"),
        ("embeddings.method=words", "embeddings.method is words, expected one of ints, planes"),
        ("embeddings.bit=4", "unknown key embeddings.bit"),
    ],
)
def test_bad_values_are_one_sentence(setting, said):
    method = "planes" if "planes" in setting else "ints"
    with pytest.raises(InputError, match=said):
        Recipe.load("rtn-4bit", [f"embeddings.method={method}", setting])


def test_an_embedding_that_is_not_finite_is_named(source, text, tmp_path):
    model = tmp_path / "model"
    model.mkdir()
    for path in source.iterdir():
        (model / path.name).write_bytes(path.read_bytes())
    stored = load_file(model / "model.safetensors")
    stored[f"{EMBEDDING}.weight"][3, 3] = torch.nan
    save_file(stored, model / "model.safetensors", {"format": "pt"})
    with pytest.raises(Exception, match=f"{EMBEDDING}.weight in .* holds NaN or Inf"):
        compress(str(model), recipe(text), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_scaled_rows_of_gemma(save_model, text, tmp_path):
    config = AutoConfig.for_model(
        "gemma3_text", vocab_size=96, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, sliding_window=8, max_position_embeddings=64,
    )  # fmt: skip
    source = save_model(config, tmp_path / "gemma")
    done = compress(str(source), recipe(text), tmp_path / "out").folder
    model, tokens = load(done), torch.randint(0, 96, (2, 24))
    dense = load(done).dequantize()
    torch.testing.assert_close(model(tokens).logits, dense(tokens).logits, rtol=0, atol=2e-5)


@pytest.mark.parametrize("kind", ["tied", "untied"])
def test_packed_ends_are_in_memory_what_they_are_on_the_disk(kind, request, text, tmp_path, monkeypatch):
    """What a model is expected to take before it is opened."""
    folder = request.getfixturevalue("source" if kind == "tied" else kind)
    packed = compress(str(folder), recipe(text), tmp_path / "out").folder
    model = load(packed, dtype=torch.float32)
    there = {tensor.data_ptr(): tensor.nbytes for tensor in model.state_dict().values()}
    monkeypatch.setattr(runner, "available_memory", lambda: 0)
    said = runner.too_large([(packed, torch.float32)], torch.device("cpu"))
    assert said.startswith(f"needs {format_bytes(round(1.1 * sum(there.values())))} of memory")
