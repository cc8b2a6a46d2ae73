"""compress(): streams as the whole model would, survives being killed anywhere, and refuses what it cannot do."""

from __future__ import annotations

import errno
import itertools
import json
import os
import re
import shutil
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.pytorch_utils import Conv1D

import ultralowbit
from ultralowbit.checkpoint.card import CARD, signed
from ultralowbit.checkpoint.contents import LOCAL
from ultralowbit.checkpoint.manifest import MANIFEST
from ultralowbit.checkpoint.storage import UNFINISHED, write_atomic
from ultralowbit.data.calibration import calibrate
from ultralowbit.data.corpora import public_name
from ultralowbit.errors import CheckpointError, DiskFull, InputError
from ultralowbit.methods.gptq import GPTQ
from ultralowbit.methods.rtn import RTN
from ultralowbit.methods.statistics import InputStats, Need
from ultralowbit.nn.linear import PackedLinear
from ultralowbit.pipeline.collect import collect
from ultralowbit.pipeline.compress import compress
from ultralowbit.pipeline.quantize import quantize_weight
from ultralowbit.progress import Silent
from ultralowbit.recipe import Recipe

LLAMA = {
    "vocab_size": 96,
    "hidden_size": 40,
    "intermediate_size": 56,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
GEMMA = LLAMA | {
    "head_dim": 16,
    "sliding_window": 8,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
}
GPT2 = {"vocab_size": 96, "n_embd": 40, "n_layer": 3, "n_head": 4, "n_positions": 64}
Q = "model.layers.1.self_attn.q_proj"


@pytest.fixture(scope="module")
def source(tmp_path_factory, save_model) -> Path:
    return save_model(AutoConfig.for_model("llama", **LLAMA), tmp_path_factory.mktemp("model") / "llama")


@pytest.fixture
def model(source, tmp_path) -> Path:
    """A copy of the model, to be damaged."""
    return Path(shutil.copytree(source, tmp_path / "model"))


@pytest.fixture
def recipe(text) -> Callable[..., Recipe]:
    """recipe(key=value, ...): GPTQ at 2 bits on six windows of a local text, but for the keys given."""

    def make(**values: Any) -> Recipe:
        calibration = {"source": text, "samples": 6, "length": 24} | values.pop("calibration", {})
        return Recipe.model_validate(
            {"name": "test", "quantize": {"method": "gptq", "bits": 2, "group": 32}, "calibration": calibration}
            | values
        )

    return make


@pytest.fixture(autouse=True)
def small_batches(monkeypatch):
    """Three batches of two windows."""
    monkeypatch.setattr("ultralowbit.pipeline.source.BATCH_TOKENS", 48)


def shards(folder: Path) -> dict[str, Tensor]:
    return {name: t for path in sorted(folder.glob("*.safetensors")) for name, t in load_file(path).items()}


class Lines(Silent):
    """Notes what compress says."""

    def __init__(self) -> None:
        self.said: list[str] = []
        self.steps = 0

    def start(self, what: str, total: int) -> None:
        self.steps = 0

    def step(self, n: int = 1) -> None:
        self.steps += n

    def say(self, line: str) -> None:
        self.said.append(line)


def timeless(value: Any) -> Any:
    """Notes without the time and memory that the run took."""
    if isinstance(value, dict):
        measured = ("seconds", "block_seconds", "peak_memory_bytes")
        return {k: timeless(v) for k, v in value.items() if k not in measured}
    return [timeless(v) for v in value] if isinstance(value, list) else value


def assert_same(a: Path, b: Path) -> None:
    """Two outputs hold the same files with the same bytes, but for the time and memory that they took."""
    assert sorted(p.name for p in a.iterdir()) == sorted(p.name for p in b.iterdir())
    for path in a.iterdir():
        if path.name in ("manifest.json", LOCAL):
            one, other = (timeless(json.loads((folder / path.name).read_text())) for folder in (a, b))
            assert one == other
        else:
            assert path.read_bytes() == (b / path.name).read_bytes(), path.name


# --- the stream is the whole model -----------------------------------------------------------------------------------


@torch.no_grad()
def compress_in_memory(folder: Path, recipe: Recipe) -> dict[str, Tensor]:
    """The same method on the whole model in memory: every Linear, in the order of use, measured on the calibration
    text after all Linears before it were packed."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    spec, tokenizer = recipe.calibration, AutoTokenizer.from_pretrained(folder)
    tokens = calibrate(spec.source, tokenizer, samples=spec.samples, length=spec.length, seed=spec.seed).tokens
    linears = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear | Conv1D) and name != "lm_head"
    }

    def inputs(*names: str) -> dict[str, list[Tensor]]:
        seen_inputs: dict[str, list[Tensor]] = {}
        handles = [
            linears[name].register_forward_pre_hook(
                lambda _, args, name=name: seen_inputs.setdefault(name, []).append(args[0])
            )
            for name in names
        ]
        for batch in tokens.view(-1, 2, spec.length):
            model(batch, use_cache=False)
        for handle in handles:
            handle.remove()
        return seen_inputs

    packed: dict[str, Tensor] = {}
    groups: list[list[str]] = []
    first = {name: batches[0] for name, batches in inputs(*linears).items()}  # in the order of use
    for name in first:
        if groups and first[groups[-1][0]] is first[name]:
            groups[-1].append(name)
        else:
            groups.append([name])
    for names in groups:
        stats = InputStats(first[names[0]].shape[-1], needs=Need.MAGNITUDES | Need.HESSIAN)
        for x in inputs(names[0])[names[0]]:
            stats.add(x)
        for name in names:
            module, transposed = linears[name], isinstance(linears[name], Conv1D)
            weight = module.weight.T.contiguous() if transposed else module.weight
            method = recipe.method_for(name)
            packed_weight = method.quantize(weight, stats if method.needs else None)
            packed |= {f"{name}.{part}": t for part, t in packed_weight.tensors.items()}
            dense = packed_weight.dequantize()
            module.weight.copy_(dense.T if transposed else dense)
    return packed


@pytest.mark.parametrize(
    ("model_type", "values"),
    [("llama", LLAMA), ("gemma3_text", GEMMA), ("gpt2", GPT2)],
    ids=["llama", "gemma3", "gpt2"],
)
def test_streaming_is_the_method_on_the_whole_model(tmp_path, save_model, recipe, model_type, values):
    folder = save_model(AutoConfig.for_model(model_type, **values), tmp_path / "source")
    mixed = recipe(
        overrides=[
            {"match": "*up_proj", "quantize": {"method": "sign", "planes": 2}},
            {"match": "*.1.*o_proj", "quantize": {"method": "rtn", "bits": 3}},
            {"match": "*.2.*proj", "quantize": {"method": "ptq161"}},
        ][: None if model_type != "gpt2" else 0]
    )
    done = compress(str(folder), mixed, tmp_path / "out")
    expected, written = compress_in_memory(folder, mixed), shards(tmp_path / "out")
    assert len(expected) > 20
    assert all(torch.equal(written[name], tensor) for name, tensor in expected.items())
    assert done.fallbacks == {}


def test_the_manifest_tells_what_was_done(source, recipe, tmp_path):
    done = compress(str(source), recipe(), tmp_path / "out")
    layers = done.manifest["layers"]
    assert len(layers) == 21
    assert layers[Q]["shape"] == [40, 40]
    assert layers[Q]["format"] == "40xint2/g32"
    assert 0 < layers[Q]["error"] < 1
    model = ultralowbit.load(tmp_path / "out")
    assert layers[Q]["bits_per_weight"] == model.get_submodule(Q).packed.bits_per_weight
    assert done.manifest == json.loads((tmp_path / "out/manifest.json").read_text())
    assert set(done.manifest["files"]) == {p.name for p in (tmp_path / "out").iterdir()} - {MANIFEST, LOCAL}


def test_the_errors_reported_are_those_of_the_outputs(source, recipe, tmp_path):
    """Of the first block, whose inputs no packed layer has changed: |x (W - Q)^T|^2 / |x W^T|^2."""
    done = compress(str(source), recipe(), tmp_path / "out")
    whole = AutoModelForCausalLM.from_pretrained(source)
    spec = recipe().calibration
    tokens = calibrate(spec.source, AutoTokenizer.from_pretrained(source), samples=6, length=24, seed=0).tokens
    packed = ultralowbit.load(tmp_path / "out")
    with torch.no_grad():
        x = whole.model.layers[0].input_layernorm(whole.model.embed_tokens(tokens)).double()
        for name in ("q_proj", "k_proj", "v_proj"):
            full = f"model.layers.0.self_attn.{name}"
            W, D = whole.get_submodule(full).weight.double(), packed.get_submodule(full).packed.dequantize().double()
            error = ((x @ (W - D).T).square().sum() / (x @ W.T).square().sum()).item()
            assert done.manifest["layers"][full]["error"] == pytest.approx(error, rel=1e-3)


def test_what_belongs_to_the_model_comes_along(model, recipe, tmp_path):
    (model / "chat_template.jinja").write_text("{{ messages }}")
    (model / "README.md").write_text("about another model")
    (model / "pytorch_model.bin").write_bytes(b"x")
    (model / "folder").mkdir()
    (model / "folder/notes.txt").write_text("x")
    (model / ".env").write_text("TOKEN=secret")
    (tmp_path / "elsewhere.txt").write_text("mine")
    (model / "linked.txt").symlink_to(tmp_path / "elsewhere.txt")
    (model / "additional_chat_templates").mkdir()
    (model / "additional_chat_templates/tools.jinja").write_text("{{ tools }}")
    out = compress(str(model), recipe(), tmp_path / "out").folder
    names = {p.name for p in out.iterdir()}
    assert {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"} <= names
    assert {p.name for p in out.glob("*.safetensors")} == {"model.safetensors"}
    assert not {"README.md", "pytorch_model.bin", "folder", ".env", "linked.txt"} & names
    assert (out / "additional_chat_templates/tools.jinja").read_text() == "{{ tools }}"
    again = Recipe.load(out / "recipe.yaml")
    assert again == recipe().with_sources(public_name)
    assert (out / "recipe.yaml").read_text().startswith("# ultralowbit compress ")
    assert (
        AutoTokenizer.from_pretrained(out)("ab")["input_ids"] == AutoTokenizer.from_pretrained(model)("ab")["input_ids"]
    )


def test_methods_without_data_need_neither_text_nor_tokenizer(model, recipe, tmp_path):
    for path in model.glob("tokenizer*"):
        path.unlink()
    done = compress(
        str(model), recipe(quantize={"method": "rtn"}, calibration={"source": "/nowhere.txt"}), tmp_path / "out"
    )
    assert done.manifest["calibration"] is None
    assert {layer["error"] for layer in done.manifest["layers"].values()} == {None}


def test_random_generators_are_left_alone(source, recipe, tmp_path):
    import random

    import numpy as np

    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    compress(str(source), recipe(quantize={"method": "sign", "planes": 2}), tmp_path / "out")
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    assert np.random.get_state()[1].tolist() == states[2]


def test_two_runs_write_the_same_bytes(source, recipe, tmp_path, monkeypatch):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        monkeypatch.chdir(tmp_path / name)
        compress(str(source), recipe(), "out")
    assert_same(tmp_path / "a/out", tmp_path / "b/out")


@pytest.mark.parametrize("share", [0.9, 0.99])
def test_large_tokens_are_clipped_by_their_share(source, recipe, tmp_path, share):
    done = [compress(str(source), recipe(calibration={"clip_tokens": c}), tmp_path / str(c)) for c in (None, share)]
    errors = [d.manifest["layers"][Q]["error"] for d in done]
    assert errors[0] != errors[1]


# --- killed ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def undisturbed(source, text, tmp_path_factory) -> tuple[Recipe, Path]:
    """A recipe and what it makes of the model when nobody interrupts."""
    quantize = {"method": "gptq", "bits": 2, "group": 32}
    overrides = [{"match": "*down_proj", "quantize": {"method": "sign", "planes": 2}}]
    calibration = {"source": text, "samples": 6, "length": 24}
    recipe = Recipe(name="test", quantize=quantize, overrides=overrides, calibration=calibration)
    root = tmp_path_factory.mktemp("undisturbed")
    before = os.getcwd()
    os.chdir(root)
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("ultralowbit.pipeline.source.BATCH_TOKENS", 48)
            compress(str(source), recipe, "out")
    finally:
        os.chdir(before)
    return recipe, root / "out"


SCRIPT = """
import sys
import ultralowbit, ultralowbit.pipeline.source, ultralowbit.progress
from ultralowbit.recipe import Recipe
ultralowbit.pipeline.source.BATCH_TOKENS = 48

class Loud(ultralowbit.progress.Silent):
    def say(self, line):
        print(line, flush=True)

ultralowbit.compress(sys.argv[1], Recipe.load(sys.argv[2]), "out", progress=Loud())
print("done", flush=True)
"""


def spawn(source: Path, recipe: Recipe, root: Path) -> subprocess.Popen:
    (root / "recipe.yaml").write_text(recipe.to_yaml())
    return subprocess.Popen(
        [sys.executable, "-c", SCRIPT, str(source), "./recipe.yaml"],
        cwd=root,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        text=True,
    )


def test_a_mean_over_fewer_linears_says_so(source, recipe, tmp_path):
    """Rounding asks for no statistics: what it loses in a Linear with inputs of its own is not measured."""
    lines = Lines()
    method = {"match": "*.down_proj", "quantize": {"method": "rtn", "bits": 4}}
    compress(str(source), recipe(overrides=[method]), tmp_path / "out", progress=lines)
    assert ", 6 of 7 measured, " in lines.said[0]


def test_a_process_killed_after_a_block_is_gone_on_with_by_another(source, undisturbed, tmp_path):
    recipe, expected = undisturbed
    with spawn(source, recipe, tmp_path) as process:
        first = process.stdout.readline()
        process.kill()  # SIGKILL
    assert first.startswith("model.layers.0: 7 Linears, output error ")
    assert not (tmp_path / "out").exists()
    with spawn(source, recipe, tmp_path) as process:
        said = process.stdout.read().splitlines()
    assert process.returncode == 0
    assert said[-1] == "done"
    assert said[0].startswith(("model.layers.0", "going on after block"))  # killed before or after the commit
    assert_same(tmp_path / "out", expected)


def test_going_on_does_not_repeat_what_is_committed(source, undisturbed, tmp_path, monkeypatch):
    recipe, expected = undisturbed
    monkeypatch.chdir(tmp_path)

    class Stop(Lines):
        def say(self, line):
            super().say(line)
            if line.startswith("model.layers.2"):
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compress(str(source), recipe, "out", progress=Stop())
    assert json.loads((tmp_path / "out.work/job.json").read_text())["blocks"] == 2
    lines = Lines()
    compress(str(source), recipe, "out", progress=lines)
    assert lines.said[0] == "going on after block 1, where the last run stopped"
    assert [line.partition(":")[0] for line in lines.said[1:]] == ["model.layers.2"]
    assert_same(tmp_path / "out", expected)


def interrupted(source: Path, recipe: Recipe, out: Path, after: int = 1, restart: bool = False) -> None:
    """Leave unfinished work: `after` blocks are committed."""

    class Stop(Lines):
        def say(self, line):
            if line.startswith(f"model.layers.{after}"):
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compress(str(source), recipe, out, restart=restart, progress=Stop())


# --- another command, another process --------------------------------------------------------------------------------


def test_unfinished_work_of_another_recipe_is_not_gone_on_with(source, recipe, tmp_path):
    interrupted(source, recipe(), tmp_path / "out")
    with pytest.raises(InputError, match=r"unfinished work with a different recipe \(quantize\).*--restart") as error:
        compress(str(source), recipe(quantize={"method": "gptq", "bits": 3, "group": 32}), tmp_path / "out")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


def test_unfinished_work_of_another_text_is_not_gone_on_with(source, recipe, tmp_path, text):
    other = tmp_path / "text.txt"
    other.write_text(Path(text).read_text())
    interrupted(source, recipe(calibration={"source": str(other)}), tmp_path / "out")
    other.write_text(Path(text).read_text()[::-1])
    with pytest.raises(InputError, match=r"different calibration \(sha256\)"):
        compress(str(source), recipe(calibration={"source": str(other)}), tmp_path / "out")


@pytest.mark.parametrize("file", ["config.json", "model.safetensors"])
def test_unfinished_work_of_another_model_is_not_gone_on_with(model, recipe, tmp_path, file):
    interrupted(model, recipe(), tmp_path / "out")
    if file == "config.json":
        config = json.loads((model / file).read_text())
        (model / file).write_text(json.dumps(config | {"rope_theta": 5000.0}))
    else:
        save_file({name: t * 2 for name, t in shards(model).items()}, model / file)
    with pytest.raises(InputError, match=rf"different model \({file}\)"):
        compress(str(model), recipe(), tmp_path / "out")


def test_restart_discards_unfinished_work(source, recipe, undisturbed, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    interrupted(source, recipe(), Path("out"))
    lines = Lines()
    compress(str(source), undisturbed[0], "out", restart=True, progress=lines)
    assert not any("going on" in line for line in lines.said)
    assert_same(tmp_path / "out", undisturbed[1])


def test_a_finished_folder_is_returned_at_once(source, recipe, tmp_path, monkeypatch):
    first = compress(str(source), recipe(), tmp_path / "out")
    monkeypatch.setattr("ultralowbit.pipeline.stream.quantize_weight", lambda *a: pytest.fail("quantized again"))
    times = {p.name: p.stat().st_mtime_ns for p in first.folder.iterdir()}
    again = compress(str(source), recipe(), tmp_path / "out")
    assert again.manifest == first.manifest
    assert times == {p.name: p.stat().st_mtime_ns for p in first.folder.iterdir()}
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("name", ["tokenizer.json", "LICENSE", "chat_template.jinja"])
@pytest.mark.parametrize("inside", [False, True], ids=["beside", "inside"])
def test_files_that_are_carried_over_are_part_of_what_a_folder_was_made_from(source, recipe, tmp_path, name, inside):
    model = shutil.copytree(source, tmp_path / "model")
    out = model / "out" if inside else tmp_path / "out"
    compress(str(model), recipe(), out)
    compress(str(model), recipe(), out)  # as it was
    path = model / name
    path.write_text((path.read_text() if path.exists() else "") + " ")
    with pytest.raises(InputError, match=rf"made with a different files to carry over \({name}\)"):
        compress(str(model), recipe(), out)
    manifest = json.loads((out / "manifest.json").read_text())
    del manifest["fingerprint"]["files to carry over"]  # as an earlier version wrote it
    (out / "manifest.json").write_text(json.dumps(manifest))
    assert compress(str(model), recipe(), out).manifest == manifest


def test_a_finished_folder_of_another_recipe_is_kept_until_restart(source, recipe, tmp_path):
    compress(str(source), recipe(), tmp_path / "out")
    before = shards(tmp_path / "out")
    other = recipe(quantize={"method": "sign"})
    with pytest.raises(InputError, match=r"holds a checkpoint made with a different .*recipe \(quantize\).*--restart"):
        compress(str(source), other, tmp_path / "out")
    assert all(torch.equal(t, before[name]) for name, t in shards(tmp_path / "out").items())
    compress(str(source), other, tmp_path / "out", restart=True)
    assert json.loads((tmp_path / "out/manifest.json").read_text())["layers"][Q]["format"] == "40x1sign/row"
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_restart_makes_a_finished_folder_again(source, recipe, tmp_path):
    compress(str(source), recipe(), tmp_path / "out")
    before = (tmp_path / "out/manifest.json").stat().st_mtime_ns
    lines = Lines()
    compress(str(source), recipe(), tmp_path / "out", restart=True, progress=lines)
    assert lines.said[0].startswith("model.layers.0")
    assert (tmp_path / "out/manifest.json").stat().st_mtime_ns != before


def test_restart_removes_what_a_kill_left_half_written(source, recipe, tmp_path):
    def killed():
        yield b"half"
        raise KeyboardInterrupt

    out = compress(str(source), recipe(), tmp_path / "out").folder
    with pytest.raises(KeyboardInterrupt):
        write_atomic(out / "report.json", killed())
    assert any(path.name.startswith(UNFINISHED) for path in out.iterdir())
    compress(str(source), recipe(), out, restart=True)
    assert not any(path.name.startswith(UNFINISHED) for path in out.iterdir())


def test_a_restart_that_fails_keeps_the_old_folder(source, recipe, tmp_path, monkeypatch):
    compress(str(source), recipe(), tmp_path / "out")
    before = shards(tmp_path / "out")
    monkeypatch.setattr(
        "ultralowbit.pipeline.compress.write_checkpoint", lambda *a: (_ for _ in ()).throw(RuntimeError("stop"))
    )
    with pytest.raises(RuntimeError, match="stop"):
        compress(str(source), recipe(quantize={"method": "sign"}), tmp_path / "out", restart=True)
    assert all(torch.equal(t, before[name]) for name, t in shards(tmp_path / "out").items())


def test_a_restart_that_was_interrupted_is_gone_on_with(source, recipe, undisturbed, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    compress(str(source), recipe(quantize={"method": "sign"}), "out")
    interrupted(source, undisturbed[0], Path("out"), restart=True)
    lines = Lines()
    compress(str(source), undisturbed[0], "out", progress=lines)
    assert lines.said[0].startswith("going on after block 0")
    assert_same(tmp_path / "out", undisturbed[1])


@pytest.fixture
def finished(source, recipe, tmp_path, monkeypatch) -> Path:
    """A finished checkpoint of another recipe, with a card."""
    monkeypatch.chdir(tmp_path)
    out = compress(str(source), recipe(quantize={"method": "sign"}), "out").folder
    (out / CARD).write_text(signed("A card.\n"))
    return out


MINE = ["thesis.txt", "notes/thesis.txt", "tokenizer/x/thesis.txt", ".git/config", CARD]


@pytest.mark.parametrize("name", MINE)
def test_what_restart_would_remove_of_others_is_refused_before(source, undisturbed, finished, name):
    (finished / name).parent.mkdir(parents=True, exist_ok=True)
    (finished / name).write_text("mine")
    with pytest.raises(InputError, match=f"out holds {name}, which --restart would remove"):
        compress(str(source), undisturbed[0], "out", restart=True)
    assert (finished / name).read_text() == "mine" and not Path("out.work").exists()


@pytest.mark.parametrize("name", MINE)
def test_what_is_put_into_out_meanwhile_is_kept(source, undisturbed, finished, name):
    interrupted(source, undisturbed[0], Path("out"), restart=True)
    (finished / name).parent.mkdir(parents=True, exist_ok=True)
    (finished / name).write_text("mine")
    with pytest.raises(InputError, match=f"{name} has been put into .*out while it was being made: move it"):
        compress(str(source), undisturbed[0], "out")
    assert (finished / name).read_text() == "mine"
    (finished / name).unlink()
    lines = Lines()
    compress(str(source), undisturbed[0], "out", progress=lines)
    assert lines.said[0].startswith("going on after block 0")
    assert_same(Path("out"), undisturbed[1])


def test_another_checkpoint_that_is_put_into_out_meanwhile_is_kept(source, recipe, undisturbed, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    interrupted(source, undisturbed[0], Path("out"))
    other = compress(str(source), recipe(quantize={"method": "sign"}), "other").folder
    before = shards(other)
    other.rename("out")
    with pytest.raises(InputError, match=r"has been put into .*out while it was being made: move it"):
        compress(str(source), undisturbed[0], "out")
    assert all(torch.equal(t, before[name]) for name, t in shards(Path("out")).items())


def test_inside_a_folder_that_cannot_be_renamed_only_our_files_are_replaced(source, undisturbed, finished, monkeypatch):
    monkeypatch.chdir(finished)
    interrupted(source, undisturbed[0], Path("."), restart=True)
    (finished / "notes").mkdir()
    (finished / "notes/thesis.txt").write_text("mine")
    compress(str(source), undisturbed[0], ".")
    assert (finished / "notes/thesis.txt").read_text() == "mine"
    shutil.rmtree(finished / "notes")
    assert_same(finished, undisturbed[1])


def test_inside_a_folder_that_cannot_be_renamed_nothing_is_overwritten(source, undisturbed, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    interrupted(source, undisturbed[0], Path("."))
    Path("config.json").write_text("mine")
    with pytest.raises(InputError, match=r"config.json has been put into"):
        compress(str(source), undisturbed[0], ".")
    assert Path("config.json").read_text() == "mine"


@pytest.mark.parametrize("first", ["within", "beside"])
def test_work_goes_on_from_within_out_and_from_beside_it(source, undisturbed, tmp_path, monkeypatch, first):
    (tmp_path / "out").mkdir()
    places = [(tmp_path / "out", "."), (tmp_path, "out")]
    for i, (here, out) in enumerate(places if first == "within" else places[::-1]):
        monkeypatch.chdir(here)
        if i == 0:
            interrupted(source, undisturbed[0], Path(out))
            continue
        lines = Lines()
        compress(str(source), undisturbed[0], out, progress=lines)
        assert lines.said[0].startswith("going on after block 0")
    assert_same(tmp_path / "out", undisturbed[1])
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_another_text_makes_no_difference_to_a_method_that_reads_none(source, recipe, tmp_path):
    rtn = {"method": "rtn", "bits": 4}
    compress(str(source), recipe(quantize=rtn), tmp_path / "out")
    lines = Lines()
    compress(
        str(source), recipe(quantize=rtn, calibration={"source": "no such text"}), tmp_path / "out", progress=lines
    )
    assert "already" in lines.said[-1]


@pytest.mark.parametrize("restart", [False, True], ids=["go-on", "restart"])
@pytest.mark.parametrize("content", ["a folder", "a file", "a broken manifest", "another manifest"])
def test_an_out_that_is_not_ours_is_refused_and_untouched(source, recipe, tmp_path, content, restart):
    out = tmp_path / "out"
    if content == "a file":
        out.write_text("mine")
    else:
        out.mkdir()
        (out / "thesis.txt").write_text("mine")
        if "manifest" in content:
            (out / "manifest.json").write_text("{" if "broken" in content else '{"name": "another program"}')
    with pytest.raises(InputError, match=r"is no checkpoint of ours|is a file"):
        compress(str(source), recipe(), out, restart=restart)
    assert (out if content == "a file" else out / "thesis.txt").read_text() == "mine"
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_an_empty_folder_is_a_fine_out(source, recipe, tmp_path):
    (tmp_path / "out").mkdir()
    compress(str(source), recipe(), tmp_path / "out")
    assert (tmp_path / "out/manifest.json").exists()


def test_missing_parents_are_made(source, recipe, tmp_path):
    compress(str(source), recipe(), tmp_path / "a/b/out")
    assert (tmp_path / "a/b/out/manifest.json").exists()


def test_an_out_below_a_file_is_refused(source, recipe, tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(InputError, match="file"):
        compress(str(source), recipe(), tmp_path / "file/out")
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize("name", ["thesis.txt", "blocks/house.blend", "job.json", "lock"])
def test_a_work_folder_that_is_not_ours_is_refused_and_untouched(source, recipe, tmp_path, name):
    mine = tmp_path / "out.work" / name
    mine.parent.mkdir(parents=True)
    mine.write_text("mine")
    for restart in (False, True):
        with pytest.raises(InputError, match=r"out.work holds files that are not ours"):
            compress(str(source), recipe(), tmp_path / "out", restart=restart)
    assert mine.read_text() == "mine" and [*(tmp_path / "out.work").rglob("*.*")] in ([], [mine])


@pytest.mark.parametrize("keep", [{"job.json", "lock"}, {"lock"}])
def test_a_work_folder_that_was_being_removed_is_ours(source, undisturbed, tmp_path, monkeypatch, keep):
    """A kill while unfinished work is discarded leaves the mark until the lock alone is left."""
    monkeypatch.chdir(tmp_path)
    interrupted(source, undisturbed[0], Path("out"))
    with pytest.raises(KeyboardInterrupt), monkeypatch.context() as patch:

        def killed(path: Path) -> None:
            if {other.name for other in path.parent.iterdir()} == keep:
                raise KeyboardInterrupt
            shutil.rmtree(path) if path.is_dir() else path.unlink()

        patch.setattr("ultralowbit.checkpoint.job._remove", killed)
        compress(str(source), undisturbed[0], "out", restart=True)
    compress(str(source), undisturbed[0], "out", restart=True)
    assert_same(tmp_path / "out", undisturbed[1])


def test_two_processes_do_not_write_one_out(source, recipe, tmp_path):
    out, refusals = tmp_path / "out", []

    class Second(Lines):
        def say(self, line):
            if line.startswith("model.layers.1"):
                pid = os.fork()
                if pid == 0:
                    try:
                        compress(str(source), recipe(), out)
                    except InputError as e:
                        os._exit(7 if "another process" in str(e) else 8)
                    os._exit(9)
                refusals.append(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))

    compress(str(source), recipe(), out, progress=Second())
    assert refusals == [7]
    assert ultralowbit.load(out) is not None


# --- disk ------------------------------------------------------------------------------------------------------------


def test_a_full_disk_is_one_sentence_wherever_it_strikes(source, undisturbed, tmp_path, monkeypatch):
    """The n-th thing that takes space fails; afterwards the same command goes on to the same bytes."""
    recipe, expected = undisturbed
    left = 0

    def or_full(function: Callable) -> Callable:
        def call(fd: int, *args: Any) -> Any:
            nonlocal left
            left -= stat.S_ISREG(os.fstat(fd).st_mode)
            if left < 0:
                raise OSError(errno.ENOSPC, "No space left on device")
            return function(fd, *args)

        return call

    monkeypatch.setattr(os, "fsync", or_full(os.fsync))
    monkeypatch.setattr(os, "posix_fallocate", or_full(os.posix_fallocate))
    for n in itertools.count():
        root, left = tmp_path / str(n), n
        root.mkdir()
        monkeypatch.chdir(root)
        try:
            compress(str(source), recipe, "out")
        except DiskFull as e:
            assert e.errno == errno.ENOSPC
            assert "no space left to write" in str(e)
            assert "run the same command to go on" in str(e)
            assert "\n" not in str(e)
            assert not Path("out").exists()
        else:
            break
        left = 1000
        if n % 3 == 0:
            compress(str(source), recipe, "out")
            assert_same(root / "out", expected)
        shutil.rmtree(root)
    assert n > 15


@pytest.fixture
def small_disk(tmp_path):
    """The current folder, on a file system of 128 kB."""
    folder, before = tmp_path / "disk", os.getcwd()
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=128k", "tmpfs", folder], capture_output=True).returncode:
        pytest.skip("cannot mount a tmpfs here")
    os.chdir(folder)
    yield folder
    os.chdir(before)
    subprocess.run(["umount", folder], check=True)


@pytest.mark.skipif(shutil.which("mount") is None, reason="has no mount")
def test_on_a_disk_that_is_full_the_message_is_one_sentence(source, undisturbed, small_disk):
    recipe, expected = undisturbed
    with pytest.raises(DiskFull, match="no space left to write") as error:
        compress(str(source), recipe, "out")
    assert "\n" not in str(error.value)
    assert not (small_disk / "out").exists()
    subprocess.run(["mount", "-o", "remount,size=4m", small_disk], check=True)
    compress(str(source), recipe, "out")
    assert_same(small_disk / "out", expected)


# --- bad input -------------------------------------------------------------------------------------------------------


def refused(kind: type[Exception], model: Path | str, recipe: Recipe, out: Path, *words: str, **kwargs: Any) -> None:
    with pytest.raises(kind) as error:
        compress(str(model), recipe, out, **kwargs)
    assert type(error.value) is kind
    assert "\n" not in str(error.value)
    for word in words:
        assert word in str(error.value)
    assert not out.exists()


def edit(model: Path, change: Callable[[dict[str, Tensor]], Any]) -> None:
    tensors = shards(model)
    change(tensors)
    save_file(tensors, model / "model.safetensors")


@pytest.mark.parametrize("left", [0, 5000, -1])
def test_a_cut_shard_is_named(model, recipe, tmp_path, left):
    data = (model / "model.safetensors").read_bytes()
    (model / "model.safetensors").write_bytes(data[:left])
    refused(CheckpointError, model, recipe(), tmp_path / "out", "model.safetensors")


@pytest.mark.parametrize("name", [f"{Q}.weight", "model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"])
@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_a_weight_that_is_not_finite_is_named(model, recipe, tmp_path, name, value):
    def change(tensors):
        tensors[name].view(-1)[7] = value

    edit(model, change)
    refused(CheckpointError, model, recipe(), tmp_path / "out", name, "NaN or Inf")


def test_a_weight_too_large_for_the_format_is_named(model, recipe, tmp_path):
    edit(model, lambda tensors: tensors[f"{Q}.weight"].mul_(1e7))
    refused(CheckpointError, model, recipe(), tmp_path / "out", f"{Q} in", "does not fit fp16")


@pytest.mark.parametrize("method", [{"method": "rtn", "bits": 2, "group": 32}, {"method": "sign", "damp": 1.0}])
@pytest.mark.parametrize("factor", [1e-8, 1e-30])
def test_a_weight_too_small_for_the_format_is_named(model, recipe, tmp_path, method, factor):
    edit(model, lambda tensors: tensors[f"{Q}.weight"].mul_(factor))
    refused(CheckpointError, model, recipe(quantize=method), tmp_path / "out", f"{Q} in", "round to 0 in fp16")


@pytest.mark.parametrize("method", [{"method": "rtn", "bits": 2, "group": 32}, {"method": "sign", "damp": 1.0}])
def test_a_few_rows_too_small_for_the_format_are_zeros(model, recipe, tmp_path, method):
    edit(model, lambda tensors: tensors[f"{Q}.weight"][:3].mul_(1e-9))
    compress(str(model), recipe(quantize=method), tmp_path / "out")
    weight = ultralowbit.load(tmp_path / "out").get_submodule(Q).packed.dequantize()
    assert not weight[:3].any() and weight[3:].any(1).all()


def test_activations_that_overflow_fall_back_loudly(model, recipe, tmp_path, caplog):
    def change(tensors):
        tensors["model.layers.1.input_layernorm.weight"].mul_(1e30)

    edit(model, change)
    done = compress(str(model), recipe(), tmp_path / "out")
    assert "not finite" in done.fallbacks[Q]
    assert f"{Q}: rounded to nearest, because its activations are not finite (NaN or Inf)" in caplog.messages
    whole = RTN(bits=2, group=32).quantize(shards(model)[f"{Q}.weight"], None)
    loaded = ultralowbit.load(tmp_path / "out").get_submodule(Q).packed
    assert torch.equal(loaded.dequantize(), whole.dequantize())
    assert "model.layers.0.self_attn.q_proj" not in done.fallbacks


def test_a_channel_that_is_always_zero_is_noted(model, recipe, tmp_path):
    def change(tensors):
        tensors["model.layers.1.input_layernorm.weight"][[2, 5]] = 0

    edit(model, change)
    done = compress(str(model), recipe(), tmp_path / "out")
    for name in ("q_proj", "k_proj", "v_proj"):
        notes = done.manifest["layers"][f"model.layers.1.self_attn.{name}"]["notes"]
        assert notes == ["2 of 40 input channels are zero on all calibration text"]
    assert done.manifest["layers"]["model.layers.1.mlp.up_proj"]["notes"] == []
    assert done.fallbacks == {}


@pytest.mark.parametrize("content", ["", "   \n ", "too short"])
def test_a_text_that_is_too_short_is_refused(source, recipe, tmp_path, content):
    path = tmp_path / "short.txt"
    path.write_text(content)
    refused(InputError, source, recipe(calibration={"source": str(path)}), tmp_path / "out", "short.txt")


def test_a_text_that_is_missing_is_refused(source, recipe, tmp_path):
    refused(InputError, source, recipe(calibration={"source": "/no/such.txt"}), tmp_path / "out", "/no/such.txt")


def test_windows_are_cut_to_the_models_positions(source, recipe, tmp_path):
    lines = Lines()
    done = compress(str(source), recipe(calibration={"length": 500}), tmp_path / "out", progress=lines)
    assert done.manifest["calibration"]["length"] == 64
    assert any(
        re.fullmatch(r"windows of .*text.txt cut from 500 to the model.s 64 positions", line) for line in lines.said
    )


def test_a_tokenizer_larger_than_the_model_is_refused(tmp_path, save_model, recipe, text, tokenizer):
    rows = max(tokenizer(Path(text).read_text())["input_ids"])  # one too few
    folder = save_model(AutoConfig.for_model("llama", **LLAMA | {"vocab_size": rows}), tmp_path / "model")
    many = recipe(calibration={"samples": 64, "length": 60})
    refused(InputError, folder, many, tmp_path / "out", f"the tokenizer makes token {rows}, the model has {rows}")


def test_a_model_without_tokenizer_is_refused(model, recipe, tmp_path):
    for path in model.glob("tokenizer*"):
        path.unlink()
    refused(InputError, model, recipe(), tmp_path / "out", "tokenizer")


def test_a_model_in_pickles_only_is_refused(model, recipe, tmp_path):
    torch.save(shards(model), model / "pytorch_model.bin")
    (model / "model.safetensors").unlink()
    refused(InputError, model, recipe(), tmp_path / "out", "no .safetensors file")


def test_a_packed_model_is_not_packed_again(source, recipe, tmp_path):
    compress(str(source), recipe(), tmp_path / "first")
    refused(InputError, tmp_path / "first", recipe(), tmp_path / "out", "already quantized (ultralowbit)")


def test_a_folder_that_is_not_there_is_refused(recipe, tmp_path):
    refused(InputError, tmp_path / "none", recipe(), tmp_path / "out", "no such folder")


@pytest.mark.parametrize("device", ["nonsense", "cuda:99", "meta:x"])
def test_a_device_that_is_not_there_is_refused(source, recipe, tmp_path, device):
    refused(InputError, source, recipe(), tmp_path / "out", device, device=device)


def test_the_source_is_not_written_to(source, recipe, tmp_path):
    before = {p.name: (p.stat().st_mtime_ns, p.read_bytes()) for p in source.iterdir()}
    compress(str(source), recipe(), tmp_path / "out")
    assert before == {p.name: (p.stat().st_mtime_ns, p.read_bytes()) for p in source.iterdir()}


def test_the_source_cannot_be_the_output(model, recipe):
    before = {p.name: p.read_bytes() for p in model.iterdir()}
    for restart in (False, True):
        with pytest.raises(InputError, match=r"is no checkpoint of ours|is a file"):
            compress(str(model), recipe(), model, restart=restart)
    assert before == {p.name: p.read_bytes() for p in model.iterdir()}


# --- statistics ------------------------------------------------------------------------------------------------------


def test_only_what_the_methods_of_a_group_need_is_gathered(source, recipe, tmp_path, monkeypatch):
    gathered = []

    class Spy(InputStats):
        def __post_init__(self) -> None:
            super().__post_init__()
            gathered.append(self)

    monkeypatch.setattr("ultralowbit.pipeline.stream.InputStats", Spy)
    overrides = [
        {"match": "*.q_proj", "quantize": {"method": "gptq"}},
        {"match": "*.down_proj", "quantize": {"method": "rtn"}},
    ]
    done = compress(str(source), recipe(quantize={"method": "ptq161"}, overrides=overrides), tmp_path / "out")
    first_of_each = gathered[:: len(gathered) // 9]  # the total of a group, then its lanes
    assert [stats.needs for stats in first_of_each] == 3 * [
        Need.MAGNITUDES | Need.HESSIAN,  # q, k, v
        Need.MAGNITUDES,  # o
        Need.MAGNITUDES,  # gate, up
    ]
    assert not any(hasattr(stats, "_sum") for stats in gathered if Need.HESSIAN not in stats.needs)
    known = {name.rpartition(".")[2] for name, layer in done.manifest["layers"].items() if layer["error"] is not None}
    assert known == {"q_proj", "k_proj", "v_proj"}
    assert done.fallbacks == {}
    assert isinstance(ultralowbit.load(tmp_path / "out").model.layers[1].mlp.up_proj, PackedLinear)


# --- ignore and overrides ---------------------------------------------------------------------------------------------


def test_skipped_linears_stay_as_they_are(source, recipe, tmp_path):
    compress(str(source), recipe(ignore=["*down_proj", "model.layers.0.*"]), tmp_path / "out")
    model, before = ultralowbit.load(tmp_path / "out"), shards(source)
    for name, module in model.named_modules():
        if name.startswith("model.layers.") and name.endswith("_proj"):
            skipped = name.endswith("down_proj") or ".0." in name
            assert isinstance(module, PackedLinear) is not skipped
            assert not skipped or torch.equal(module.weight, before[f"{name}.weight"])


def test_the_last_override_that_matches_decides(source, recipe, tmp_path):
    overrides = [
        {"match": "*proj", "quantize": {"method": "sign"}},
        {"match": "*q_proj", "quantize": {"method": "rtn", "bits": 8}},
        {"match": "*.0.*q_proj", "quantize": {"method": "rtn", "bits": 3}},
    ]
    layers = compress(str(source), recipe(overrides=overrides), tmp_path / "out").manifest["layers"]
    assert layers["model.layers.0.self_attn.q_proj"]["format"] == "40xint3/g128"
    assert layers[Q]["format"] == "40xint8/g128"
    assert layers["model.layers.1.self_attn.k_proj"]["format"] == "40x1sign/row"


def test_an_override_that_matches_nothing_is_refused(source, recipe, tmp_path):
    overrides = [{"match": "*dense_proj", "quantize": {"method": "sign"}}]
    refused(InputError, source, recipe(overrides=overrides), tmp_path / "out", "*dense_proj", "model.layers.0")


def test_a_skip_that_leaves_nothing_is_refused(source, recipe, tmp_path):
    refused(InputError, source, recipe(ignore=["*"]), tmp_path / "out", "skips every Linear")


# --- parts -----------------------------------------------------------------------------------------------------------


def test_a_linear_that_no_token_reaches_is_rounded_and_says_so():
    weight = torch.randn(6, 40, generator=torch.Generator().manual_seed(0))
    for stats in (None, InputStats(40)):
        packed, result = quantize_weight(weight, GPTQ(bits=2, group=32), stats)
        assert result["fallback"] == "no calibration token reached it"
        assert result["error"] is None
        assert torch.equal(packed.dequantize(), RTN(bits=2, group=32).quantize(weight, None).dequantize())


def test_a_linear_that_is_called_twice_is_measured_twice():
    class Twice(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = torch.nn.Linear(8, 8)

        def forward(self, hidden_states: Tensor) -> Tensor:
            return self.linear(self.linear(hidden_states))

    from ultralowbit.nn.calls import BlockCall
    from ultralowbit.nn.inputs import input_groups

    block, call = Twice(), BlockCall((), {})
    inputs = torch.randn(3, 2, 5, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        (group,) = input_groups(block, {"linear": block.linear}, call, inputs[0])
        assert group == (["linear"], 2)
        stats = InputStats(8)
        collect(block, "linear", group.calls, call, inputs, range(3), stats)
        x = torch.cat([inputs, block.linear(inputs)]).view(-1, 8)
    assert stats.count == 60
    torch.testing.assert_close(stats.hessian, x.T @ x, rtol=1e-4, atol=1e-4)
