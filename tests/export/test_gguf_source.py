"""A GGUF file is a model to compress: what it means, decoded once; what would be lost is refused."""

from __future__ import annotations

import logging

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import ultralowbit
from ultralowbit.errors import InputError
from ultralowbit.export.base import export
from ultralowbit.hub import resolve_model
from ultralowbit.methods.rtn import RTN
from ultralowbit.nn.hf import load
from ultralowbit.recipe import Recipe

pytest.importorskip("gguf")

FOUR = RTN(bits=4, group=32, symmetric=True)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.utils._cache_assets.HF_ASSETS_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def refused(path, pattern):
    with pytest.raises(InputError, match=pattern) as error:
        resolve_model(str(path))
    assert "\n" not in str(error.value)


def test_a_file_is_the_model_that_it_means(save_packed, small_config, tmp_path, caplog):
    folder = save_packed(small_config("llama"), FOUR, tmp_path / "model")
    file = export(folder, "gguf", tmp_path / "m.gguf")
    decoded = resolve_model(str(file))
    assert "m.gguf is a GGUF file whose weights are 85% Q4_0, 15% F16: they are read as 16-bit floats" in caplog.text
    for path in (decoded, *decoded.iterdir()):  # for whom the umask says, whatever wrote it
        assert path.stat().st_mode == (tmp_path / "model" if path.is_dir() else decoded / "config.json").stat().st_mode
    theirs, mine = AutoModelForCausalLM.from_pretrained(decoded, dtype=torch.float32), load(folder)
    for name, module in mine.named_modules():
        if hasattr(module, "packed"):
            assert torch.equal(theirs.get_submodule(name).weight, module.packed.dequantize().half().float()), name
    assert theirs.lm_head.weight is theirs.model.embed_tokens.weight
    texts = "There was a river, in 1984."
    assert (
        AutoTokenizer.from_pretrained(decoded)(texts)["input_ids"]
        == AutoTokenizer.from_pretrained(folder)(texts)["input_ids"]
    )


def test_it_is_decoded_once_and_compressed_as_any_other(save_packed, small_config, tmp_path, monkeypatch, caplog):
    caplog.set_level(logging.INFO)
    source = save_packed(small_config("llama"), FOUR, tmp_path / "model").parent / "source"
    file = export(source, "gguf", tmp_path / "files" / "m.gguf")
    decoded = resolve_model(str(file))
    assert "100% F16" in caplog.text and not [r for r in caplog.records if r.levelno >= logging.WARNING]
    monkeypatch.setattr("ultralowbit.checkpoint.gguf._decode", lambda *_: pytest.fail("decoded again"))
    assert resolve_model(str(file)) == decoded
    assert resolve_model(str(file.parent)) == decoded  # the only one in a folder without a config.json
    recipe = Recipe.model_validate({"name": "four", "quantize": {"method": "rtn", "group": 32, "symmetric": True}})
    made = ultralowbit.compress(str(file), recipe, tmp_path / "packed")
    assert made.manifest["model"] == "m.gguf"
    weight = AutoModelForCausalLM.from_pretrained(source).model.layers[0].mlp.down_proj.weight.half().float()
    packed = load(made.folder).model.layers[0].mlp.down_proj.packed
    assert torch.equal(packed.dequantize(), FOUR.quantize(weight, None).dequantize())


def test_what_transformers_would_drop_or_cannot_read_is_refused(save_packed, small_config, tmp_path, cache):
    for name, pattern in (
        ("llama-3", "says of its positions what transformers does not read .rope_freqs.weight.: give the original"),
        ("llama-linear", r"llama\.rope\.scaling\.type"),
    ):
        folder = save_packed(small_config(name), FOUR, tmp_path / name)
        refused(export(folder, "gguf", tmp_path / f"{name}.gguf"), pattern)
    whole = (tmp_path / "llama-3.gguf").read_bytes()
    (tmp_path / "cut.gguf").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "none.gguf").write_bytes(b"no such thing")
    refused(tmp_path / "cut.gguf", "cut.gguf cannot be read as GGUF .*copy it again")
    refused(tmp_path / "none.gguf", "none.gguf cannot be read as GGUF")
    assert not [path for path in cache.rglob("*") if path.is_file()]  # nothing half-made is kept


def test_a_type_that_transformers_does_not_read_is_for_llama_cpp(save_packed, small_config, tmp_path):
    folder = save_packed(small_config("llama"), Recipe.load("q2_0").quantize, tmp_path / "model")
    refused(
        export(folder, "gguf", tmp_path / "m.gguf"),
        "a type that transformers cannot read .*run it with llama.cpp, or give the folder that it was exported from",
    )


def test_a_shape_that_transformers_does_not_read_is_refused(save_packed, small_config, tmp_path):
    """It takes the heads of Qwen 3 for 128 wide, whatever the file says."""
    folder = save_packed(small_config("qwen3"), FOUR, tmp_path / "model")
    refused(export(folder, "gguf", tmp_path / "m.gguf"), "transformers cannot decode .*give the original's folder")
