"""verify() finds every byte that moved."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from ultralowbit.bench.models import Shape, write_model, write_text
from ultralowbit.checkpoint.contents import LOCAL
from ultralowbit.checkpoint.storage import sha256_file
from ultralowbit.cli.app import app
from ultralowbit.errors import CheckpointError
from ultralowbit.pipeline.compress import compress
from ultralowbit.pipeline.verify import rerun, verify
from ultralowbit.recipe import Recipe

SHARD = "model.safetensors"
LAYER = "model.layers.0.mlp.up_proj"


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder = tmp_path_factory.mktemp("verify")
    model = write_model(folder / "model", 2, Shape(hidden=64, inter=172, heads=4, kv_heads=2, vocab=96))
    recipe = Recipe.model_validate({"name": "rtn", "quantize": {"method": "rtn", "bits": 2}})
    return compress(str(model), recipe, folder / "out").folder


@pytest.fixture
def folder(written, tmp_path):
    return shutil.copytree(written, tmp_path / "copy")


def edit(path, change):
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


def bless(folder, *names):
    """Let the manifest agree with what the files are now."""
    edit(folder / "manifest.json", lambda m: m["files"].update({name: sha256_file(folder / name) for name in names}))


def test_an_untouched_checkpoint_has_no_problems(folder):
    for name in ("report.json", "report.md", "README.md"):
        (folder / name).write_text("added later")
    hashed = []
    assert verify(folder, hashed.append) == []
    files = json.loads((folder / "manifest.json").read_text())["files"]
    assert sum(hashed) == sum((folder / name).stat().st_size for name in files)


@pytest.mark.parametrize("name", [SHARD, "config.json", "tokenizer.json", "recipe.yaml"])
def test_one_flipped_bit_is_found(folder, name):
    data = bytearray((folder / name).read_bytes())
    data[-2] ^= 1
    (folder / name).write_bytes(data)
    assert f"{name} has changed since it was written: copy it again" in verify(folder)


def test_missing_and_extra_files(folder):
    (folder / SHARD).unlink()
    assert verify(folder) == [f"{SHARD} is missing: copy it again"]
    save_file({"other": torch.zeros(1)}, folder / "extra.safetensors")
    problems = verify(folder)
    assert len(problems) == 2 and problems[1].startswith("extra.safetensors is not in the manifest")


def test_a_cut_shard(folder):
    (folder / SHARD).write_bytes((folder / SHARD).read_bytes()[:-1])
    changed, cut = verify(folder)
    assert changed.startswith(f"{SHARD} has changed") and "not a complete safetensors file" in cut


def test_tensors_other_than_promised(folder):
    """Even where all hashes agree."""
    tensors = load_file(folder / SHARD)
    tensors[f"{LAYER}.weight"] = tensors[f"{LAYER}.weight"].to(torch.int32)
    tensors[f"{LAYER}.weight_scale"] = tensors[f"{LAYER}.weight_scale"][:, :5].contiguous()
    del tensors[f"{LAYER}.weight_zero"]
    save_file(tensors, folder / SHARD)
    bless(folder, SHARD)
    assert [problem.split(",")[0] for problem in verify(folder)] == [
        f"{LAYER}.weight is int32 [172",
        f"{LAYER}.weight_scale is float16 [1",
        f"{LAYER}.weight_zero is missing",
    ]


def test_config_and_manifest_disagree(folder):
    def change(config):
        del config["quantization_config"]["modules"][LAYER]
        next(iter(config["quantization_config"]["formats"].values()))["segments"][0]["bits"] = 4

    edit(folder / "config.json", change)
    bless(folder, "config.json")
    problems = verify(folder)
    assert problems[0].startswith(f"{LAYER} is packed according to manifest.json but not to config.json")
    assert "config.json says" in problems[1]


def test_an_unreadable_format(folder):
    def change(config):
        next(iter(config["quantization_config"]["formats"].values()))["version"] = 99

    edit(folder / "config.json", change)
    bless(folder, "config.json")
    assert len(problems := verify(folder)) == 1 and "version 99" in problems[0]
    edit(folder / "config.json", lambda config: config.pop("quantization_config"))
    bless(folder, "config.json")
    assert len(problems := verify(folder)) == 1 and "does not say how the weights are packed" in problems[0]


# -- repeated runs


def command(*args):
    return CliRunner().invoke(app, ["verify", *map(str, args), "-q"])


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A calibrated run, its model and its text."""
    root = tmp_path_factory.mktemp("rerun")
    model = write_model(root / "model", 1, Shape(hidden=64, inter=96, heads=4, kv_heads=2, vocab=96))
    (model / "eval.json").write_text("{}")  # of the original: not carried over
    texts = [str(write_text(root / name, 400, 96)) for name in ("text.txt", "more.txt")]
    calibration = {"source": {texts[0]: 3, texts[1]: 1}, "samples": 4, "length": 32}
    quantize = {"method": "gptq", "bits": 2}
    recipe = Recipe.model_validate({"name": "g", "quantize": quantize, "calibration": calibration})
    return root, compress(str(model), recipe, root / "out").folder


def test_a_run_repeats_byte_by_byte(made):
    root, folder = made
    before = sorted(root.rglob("*"))
    threads = torch.get_num_threads()
    result = command(folder, "--rerun")
    assert result.exit_code == 0, result.output
    assert "has the same bytes again" in result.stdout and "although" not in result.stdout
    assert sorted(root.rglob("*")) == before and torch.get_num_threads() == threads


@pytest.mark.parametrize("version", ["now", "earlier"])
def test_texts_of_one_name_in_two_folders_stay_apart(made, tmp_path, version):
    root, _ = made
    for place in ("a", "b"):
        (tmp_path / place).mkdir()
    texts = [write_text(tmp_path / place / "text.txt", n, 96) for place, n in (("a", 400), ("b", 300))]
    texts[1].write_text(" ".join(reversed(texts[1].read_text().split())))
    data = {"source": str(texts[1] if version == "now" else texts[0]), "samples": 4, "length": 32}
    tuned = {"objective": {"kind": "ce"}, "training": {"lr": {"scale": 1e-3}, "steps": 1}, "data": data}
    values = {"quantize": {"method": "sign"}, "calibration": data | {"source": str(texts[0])}, "finetune": tuned}
    out = compress(str(root / "model"), Recipe.model_validate({"name": "two", **values}), tmp_path / "out").folder
    if version == "earlier":
        edit(out / LOCAL, lambda places: places.update(texts=places["texts"]["calibration"]))
    assert rerun(out).different == {}


def test_a_run_repeats_elsewhere(made, tmp_path):
    root, folder = made
    shutil.copytree(root / "model", tmp_path / "moved")
    shutil.copytree(folder, tmp_path / "copy")
    edit(tmp_path / "copy" / LOCAL, lambda places: places.update(model=str(tmp_path / "gone")))
    assert command(tmp_path / "copy", "--rerun").exit_code == 2
    result = command(tmp_path / "copy", "--rerun", "--model", tmp_path / "moved")
    assert result.exit_code == 0, result.output


def test_what_is_not_reproduced_is_named_with_the_likely_reason(made, tmp_path, monkeypatch):
    _, folder = made
    copy = shutil.copytree(folder, tmp_path / "copy")
    shard = copy / SHARD
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    (copy / "extra.txt").write_text("x")
    edit(copy / "manifest.json", lambda m: m["environment"].update(torch="1.0", threads=2))
    bless(copy, shard.name, "extra.txt")
    result = command(copy, "--rerun")
    assert result.exit_code == 1
    assert f"not reproduced: {shard.name} has other bytes" in result.stdout
    assert "not reproduced: extra.txt was not written again" in result.stdout
    assert f"likely reason: torch was 1.0, is {torch.__version__}" in result.stdout
    assert "threads" not in result.stdout  # they were set as they had been


def test_another_original_is_refused_before_the_work(made, tmp_path, monkeypatch):
    root, folder = made
    other = shutil.copytree(root / "model", tmp_path / "other")
    edit(other / "config.json", lambda config: config.update(rope_theta=5.0))
    monkeypatch.setattr("ultralowbit.pipeline.verify.compress", lambda *a, **k: pytest.fail("compressed"))
    result = command(folder, "--rerun", "--model", other)
    assert result.exit_code == 2 and "config.json differs" in result.stderr
    assert command(folder, "--model", other).exit_code == 2  # it says nothing without --rerun


@pytest.mark.parametrize("text", [None, "{", "[]", "{}", '{"files": {"../x": ""}, "layers": {}}'])
def test_no_manifest(folder, text):
    (folder / "manifest.json").unlink()
    if text is not None:
        (folder / "manifest.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"manifest\.json"):
        verify(folder)
