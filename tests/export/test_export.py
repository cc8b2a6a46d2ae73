"""Exporters: a plain checkpoint says what the packed one says, nothing half-written is left, a new one is a line."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

import ultralowbit
from ultralowbit.cli.app import app
from ultralowbit.errors import CheckpointError, InputError
from ultralowbit.export.base import EXPORTERS, Exporter, export
from ultralowbit.recipe import Recipe

LLAMA = {
    "vocab_size": 96, "hidden_size": 40, "intermediate_size": 56, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "bos_token_id": 0, "eos_token_id": 1,
}  # fmt: skip
TOKENS = torch.arange(4, 20)[None]


@pytest.fixture(scope="module")
def packed(tmp_path_factory, save_model):
    root = tmp_path_factory.mktemp("export")
    source = save_model(AutoConfig.for_model("llama", **LLAMA), root / "source")
    (source / "additional_chat_templates").mkdir()
    (source / "additional_chat_templates/tools.jinja").write_text("{{ tools }}")
    recipe = Recipe.model_validate({"name": "rtn", "quantize": {"method": "rtn", "bits": 2, "group": 32}})
    return ultralowbit.compress(str(source), recipe, root / "packed").folder


@torch.no_grad()
def test_a_dense_checkpoint_is_a_plain_one_with_the_same_weights(packed, tmp_path):
    out = export(packed, "dense", tmp_path / "dense")
    assert "quantization_config" not in AutoConfig.from_pretrained(out).to_dict()
    mine, theirs = ultralowbit.load(packed), AutoModelForCausalLM.from_pretrained(out)
    for name, weight in theirs.state_dict().items():
        parent = mine.get_submodule(name.rpartition(".")[0])
        assert torch.equal(weight, parent.packed.dequantize() if hasattr(parent, "packed") else parent.weight)
    torch.testing.assert_close(theirs(TOKENS).logits, mine(TOKENS).logits, rtol=0, atol=2e-5)
    assert (
        AutoTokenizer.from_pretrained(out)("ab")["input_ids"]
        == AutoTokenizer.from_pretrained(packed)("ab")["input_ids"]
    )
    assert (out / "additional_chat_templates/tools.jinja").exists()
    assert not (out / "manifest.json").exists() and not (out / "recipe.yaml").exists()


def test_files_are_for_whom_the_umask_says(packed, tmp_path):
    (tmp_path / "new").write_text("")
    out = export(packed, "dense", tmp_path / "dense")
    assert {path.stat().st_mode for path in out.iterdir() if path.is_file()} == {(tmp_path / "new").stat().st_mode}


def test_what_cannot_be_exported_is_said_before_anything_is_written(packed, tmp_path):
    with pytest.raises(InputError, match=r"no exporter 'onnx', expected one of dense, gguf"):
        export(packed, "onnx", tmp_path / "x")
    with pytest.raises(InputError, match="dense has no --colour, expected no options"):
        export(packed, "dense", tmp_path / "x", colour="red")
    with pytest.raises(CheckpointError, match=r"manifest\.json"):
        export(tmp_path, "dense", tmp_path / "x")
    (tmp_path / "there").mkdir()
    (tmp_path / "there/thesis.txt").write_text("mine")
    with pytest.raises(InputError, match="exists"):
        export(packed, "dense", tmp_path / "there")
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["there", "thesis.txt"]


@dataclass(frozen=True)
class Toy(Exporter):
    """Writes the names of the packed weights, one a line."""

    shout: bool = False

    def export(self, folder, out, progress):
        names = "\n".join(sorted(ultralowbit.load(folder).hf_quantizer.quantization_config.modules))
        out.write_text(names.upper() if self.shout else names)


def test_a_new_exporter_is_a_line_in_the_table(packed, tmp_path, monkeypatch):
    monkeypatch.setitem(EXPORTERS, "toy", f"{__name__}:Toy")
    monkeypatch.setitem(__import__("sys").modules, __name__, __import__("types").SimpleNamespace(Toy=Toy))
    result = CliRunner().invoke(app, ["export", str(packed), "--to", "toy", "--out", str(tmp_path / "names.txt"), "-q"])
    assert result.exit_code == 0, result.output
    assert "model.layers.0.mlp.down_proj" in (tmp_path / "names.txt").read_text()
    assert "names.txt" in result.stdout
    result = CliRunner().invoke(app, ["export", str(packed), "--to", "tie", "--out", str(tmp_path / "x"), "-q"])
    assert result.exit_code == 2 and "expected one of dense, gguf, toy" in result.stderr
