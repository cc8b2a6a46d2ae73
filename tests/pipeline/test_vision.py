"""Models that also see: their text decoder is packed, wherever it lies, and what has no place in the result is said."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText
from typer.testing import CliRunner

import ultralowbit
from ultralowbit.cli.app import app
from ultralowbit.report.schema import RunReport

TEXT = {
    "vocab_size": 96, "hidden_size": 40, "intermediate_size": 56, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 64, "bos_token_id": 0, "eos_token_id": 1,
}  # fmt: skip
TOWER = {
    "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2, "num_hidden_layers": 2, "image_size": 28,
    "patch_size": 14,
}  # fmt: skip
HYBRID = {
    "layer_types": ["linear_attention", "full_attention"], "linear_num_value_heads": 2, "linear_num_key_heads": 2,
    "linear_key_head_dim": 8, "linear_value_head_dim": 8,
}  # fmt: skip
GEMMA3 = {
    "text_config": TEXT | {"sliding_window": 8}, "vision_config": TOWER, "mm_tokens_per_image": 4,
    "image_token_index": 5, "boi_token_index": 6, "eoi_token_index": 7,
}  # fmt: skip
QWEN3_5 = {
    "text_config": TEXT | HYBRID, "image_token_id": 5, "video_token_id": 6, "vision_start_token_id": 7,
    "vision_end_token_id": 8,
    "vision_config": {
        "depth": 2, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "out_hidden_size": 40, "patch_size": 14,
        "num_position_embeddings": 16, "deepstack_visual_indexes": [],
    },
}  # fmt: skip
LLAVA = {
    "text_config": {"model_type": "llama", **TEXT}, "image_token_index": 5,
    "vision_config": {"model_type": "clip_vision_model", "projection_dim": 32, **TOWER},
}  # fmt: skip
IDS = torch.arange(10, 26)[None]


@pytest.fixture
def save(tmp_path, tokenizer):
    """save(model_type, values): a random model whose vision tower is as deep as its text decoder."""

    def write(model_type: str, values: dict[str, Any]) -> Path:
        folder = tmp_path / model_type
        with torch.random.fork_rng():
            torch.manual_seed(0)
            AutoModelForImageTextToText.from_config(AutoConfig.for_model(model_type, **values)).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return folder

    return write


def compress(model: Path, text: str, out: Path) -> Any:
    arguments = ["--recipe", "gptq-4bit", "--calib", text, "--samples", "4", "--length", "24", "--eval", "none"]
    return CliRunner().invoke(app, ["compress", str(model), "--out", str(out), *arguments])


@torch.no_grad()
def test_a_tower_as_deep_as_the_text_is_not_taken_for_it(save, text, tmp_path):
    """What transformers loads as a causal LM is kept whole, the tower as it was."""
    model = save("gemma3", GEMMA3)
    result = compress(model, text, tmp_path / "out")
    assert result.exit_code == 0, result.output
    layers = json.loads((tmp_path / "out/manifest.json").read_text())["layers"]
    assert {name.rpartition(".layers.")[0] for name in layers} == {"model.language_model"}
    loaded, original = ultralowbit.load(tmp_path / "out"), AutoModelForCausalLM.from_pretrained(model)
    assert type(loaded) is type(original)
    tower = {name: tensor for name, tensor in original.state_dict().items() if "vision_tower" in name}
    assert tower and all(torch.equal(loaded.state_dict()[name], tensor) for name, tensor in tower.items())
    assert loaded(IDS).logits.isfinite().all()


@torch.no_grad()
def test_parts_that_have_no_place_are_said_with_counts(save, text, tmp_path):
    """On the screen, in report.json, report.md, the manifest and the card; config.json names the class that loads."""
    model, out = save("qwen3_5", QWEN3_5), tmp_path / "out"
    tensors = load_file(model / "model.safetensors")
    tensors["mtp.fc.weight"] = torch.zeros(40, 80)
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    tower = [tensor for name, tensor in tensors.items() if name.startswith("model.visual.")]
    weights = sum(tensor.numel() for tensor in tower)
    result = compress(model, text, out)
    assert result.exit_code == 0, result.output
    expected = {
        "model.visual": {"tensors": len(tower), "weights": weights}, "mtp.fc": {"tensors": 1, "weights": 3200},
    }  # fmt: skip
    assert json.loads((out / "manifest.json").read_text())["left_out"] == expected
    report = RunReport.model_validate_json((out / "report.json").read_text())
    assert {part: left.model_dump() for part, left in report.left_out.items()} == expected
    for said in (result.stderr, (out / "report.md").read_text(), (out / "README.md").read_text()):
        words = " ".join(said.replace("\n> ", " ").split())
        assert "model.visual" in words and f"{weights:,} weights" in words and "left out" in words.lower(), said
        assert "mtp.fc" in words and "3,200 weights" in words, said
    config = json.loads((out / "config.json").read_text())
    assert config["architectures"] == ["Qwen3_5ForCausalLM"]
    assert type(ultralowbit.load(out)).__name__ == type(AutoModelForCausalLM.from_pretrained(out)).__name__
    assert type(ultralowbit.load(out)).__name__ == "Qwen3_5ForCausalLM"


def test_one_that_transformers_loads_as_no_causal_lm_is_refused(save, text, tmp_path):
    result = compress(save("llava", LLAVA), text, tmp_path / "out")
    assert result.exit_code == 2 and result.stderr.count("\n") == 1, result.output
    assert "cannot build a causal LM" in result.stderr and "LlavaConfig" in result.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["llava"]
