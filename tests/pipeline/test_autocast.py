"""Blocks that run in fp32, with products in bfloat16."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

import ultralowbit
from ultralowbit.data.calibration import calibrate
from ultralowbit.hub import open_tokenizer
from ultralowbit.methods.statistics import InputStats
from ultralowbit.pipeline.compress import compress
from ultralowbit.pipeline.source import open_decoder
from ultralowbit.recipe import Recipe
from ultralowbit.training import specs
from ultralowbit.training.objectives import divergence
from ultralowbit.training.specs import CalibrationSpec

CPU = torch.device("cpu")
LLAMA = {
    "vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "intermediate_size": 48, "max_position_embeddings": 64, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 0,
}  # fmt: skip


@pytest.fixture(scope="module")
def source(tmp_path_factory, save_model):
    return save_model(AutoConfig.for_model("llama", **LLAMA), tmp_path_factory.mktemp("model") / "llama")


def recipe(folder, autocast: str) -> Recipe:
    text = folder / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog. " * 100)
    settings = ["calibration.samples=16", "calibration.length=32", f"calibration.autocast={autocast}"]
    return Recipe.load("ulb-fast", [*settings, f"calibration.source={text}"])


def test_only_products_are_made_in_bfloat16(source, tmp_path, monkeypatch):
    """Every part of our own recipe: what Linears cost, H_O, the head's Hessian, errors corrected for."""
    seen: dict[str, set[torch.dtype]] = {}
    add = InputStats.add

    def spied(stats: InputStats, x: torch.Tensor, *others: torch.Tensor | None) -> None:
        seen.setdefault(case, set()).add(x.dtype)
        add(stats, x, *others)
        assert {total.dtype for total in stats.sums} == {torch.float32}
        assert not torch.is_autocast_enabled("cpu")

    monkeypatch.setattr(InputStats, "add", spied)
    made = {}
    for case in ("off", "on"):
        made[case] = compress(str(source), recipe(tmp_path, case), tmp_path / case)
    assert seen == {"off": {torch.float32}, "on": {torch.float32, torch.bfloat16}}
    assert made["on"].manifest["fingerprint"]["compute"]["products"] == "bfloat16"
    assert "products" not in made["off"].manifest["fingerprint"]["compute"]

    spec = recipe(tmp_path, "off").calibration
    tokens = calibrate(
        spec.source, open_tokenizer(source), samples=spec.samples, length=spec.length, seed=1, model_path=source,
        device=CPU, progress=None,
    ).tokens  # fmt: skip
    with torch.no_grad():
        original = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)(tokens).logits
        logits = {case: ultralowbit.load(tmp_path / case, dtype=torch.float32)(tokens).logits for case in made}
    lost = {case: divergence(packed, original).mean().item() for case, packed in logits.items()}
    # products are off by 2^-8 of themselves at most, far less than what packing to two bits loses
    assert lost["on"] == pytest.approx(lost["off"], rel=0.1)


@pytest.mark.parametrize("amx", [False, True])
def test_where_products_in_bfloat16_are_faster(source, monkeypatch, amx):
    monkeypatch.setattr(specs, "multiplies_bf16", lambda device: amx)
    assert not open_decoder(source, CPU, spec=CalibrationSpec()).autocast  # products are a small part of its time
    monkeypatch.setattr(specs, "FEW", 1)
    assert open_decoder(source, CPU, spec=CalibrationSpec()).autocast == amx
    assert open_decoder(source, CPU, spec=CalibrationSpec(autocast="on")).autocast
    assert not open_decoder(source, CPU, spec=CalibrationSpec(autocast="off")).autocast
    assert not open_decoder(source, CPU).autocast


def test_a_dtype_of_16_bits_stays(source):
    """Elsewhere than on a CPU blocks run in the checkpoint's dtype."""
    AutoModelForCausalLM.from_pretrained(source, dtype=torch.float16).save_pretrained(source.parent / "half")
    decoder = open_decoder(source.parent / "half", torch.device("meta"), spec=CalibrationSpec(autocast="on"))
    assert decoder.dtype == torch.float16 and not decoder.autocast
