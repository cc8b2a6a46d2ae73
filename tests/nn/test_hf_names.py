"""What the package needs of transformers, whichever version is installed: `make test-transformers VERSION=...`."""

from __future__ import annotations

import ast
import inspect
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache

from ultralowbit.errors import InputError
from ultralowbit.nn import refuse_old
from ultralowbit.nn.hf_names import cache_name, cast_to, match_keys, tied_names

ROOT = Path(__file__).resolve().parents[2]
SIZES = {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
DOCUMENTED = {
    "transformers",
    "transformers.modeling_rope_utils",
    "transformers.pytorch_utils",  # GPT-2's Conv1D has no other place
    "transformers.quantizers.auto",
    "transformers.quantizers.base",
    "transformers.utils",
    "transformers.utils.quantization_config",
}


def model(model_type: str, **values):
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **SIZES, **values))


def test_only_the_adapter_names_what_is_not_documented():
    named = {}
    for folder in ("ultralowbit", "eval", "kernels"):
        for path in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "transformers":
                    named.setdefault(path.relative_to(ROOT).as_posix(), set()).add(node.module)
    others = {path: modules - DOCUMENTED for path, modules in named.items() if modules - DOCUMENTED}
    assert others == {
        "ultralowbit/nn/hf_names.py": {"transformers.conversion_mapping", "transformers.core_model_loading"}
    }


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "gpt_neox"])
@pytest.mark.parametrize("prefix", ["kept", "dropped"])
def test_keys_are_found_with_the_prefix_of_the_base_model_and_without(model_type, prefix):
    built = model(model_type)
    start = f"{built.base_model_prefix}."
    stored = {name if prefix == "kept" else name.removeprefix(start): name for name in built.state_dict()}
    assert match_keys(built, stored) == {name: key for key, name in stored.items()}


def test_keys_are_found_under_the_names_that_transformers_renames():
    neox, bert = model("gpt_neox"), model("bert", is_decoder=True)
    head = next(name for name in neox.state_dict() if name in ("lm_head.weight", "embed_out.weight"))
    assert match_keys(neox, ["embed_out.weight", "optimizer.step"]) == {head: "embed_out.weight"}
    norm = "bert.embeddings.LayerNorm"
    assert match_keys(bert, [f"{norm}.gamma"]) == {f"{norm}.weight": f"{norm}.gamma"}


@pytest.mark.parametrize("version", ["4.57.6", "5.9.0", "5.0.0rc1"])
def test_a_transformers_that_is_too_old_is_one_sentence(version):
    with pytest.raises(InputError, match=f"transformers {version} is installed, expected 5.10 or newer: run `pip"):
        refuse_old(version)
    for newer in ("5.10.0", "5.25.0.dev0", "6.0"):
        refuse_old(newer)


def test_a_tied_weight_is_named_with_what_it_is_tied_to():
    assert tied_names(model("llama", tie_word_embeddings=True)) == {"lm_head.weight": "model.embed_tokens.weight"}
    assert not tied_names(model("llama", tie_word_embeddings=False))


def test_the_cache_goes_in_by_a_name_that_is_not_deprecated():
    built = model("llama").to_empty(device="cpu")
    name = cache_name(built)
    assert name in inspect.signature(built.forward).parameters
    cache = DynamicCache()
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("error")
        built(torch.zeros(1, 5, dtype=torch.int64), **{name: cache}, use_cache=True)
    assert cache.get_seq_length() == 5


COMMANDS = """
import sys
from typer.testing import CliRunner
from ultralowbit.cli.app import app

source, text, out = sys.argv[1:]
few = ["--samples", "4", "--length", "32", "--max-tokens", "320", "--device", "cpu"]
for command in (
    ["compress", source, "--recipe", "gptq-3bit", "--calib", text, "--eval", text, *few, "--out", out],
    ["eval", out, "--ppl", text, "--fidelity", source, "--max-tokens", "320", "--device", "cpu"],
    ["generate", out, "abc", "--max-new-tokens", "8", "--device", "cpu"],
):
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 0, (command, done.output, done.exception)
"""


def test_compress_eval_and_generate_use_nothing_deprecated(save_model, text, tmp_path):
    source = save_model(AutoConfig.for_model("llama", **SIZES, max_position_embeddings=64), tmp_path / "source")
    command = [sys.executable, "-W", "error::FutureWarning", "-c", COMMANDS, str(source), text, str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "deprecat" not in done.stderr.lower()


class Casting(nn.Module):
    """As the indexer of DeepSeek V3.2 has it."""

    def __init__(self) -> None:
        super().__init__()
        self.weights_proj, self.proj = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.weights_proj(self.proj(x).to(self.weights_proj.weight.dtype))


def test_what_a_model_casts_to_is_told():
    assert cast_to(nn.Sequential(nn.Linear(4, 4), Casting())) == {"1.weights_proj"}
    assert not cast_to(model("llama"))
