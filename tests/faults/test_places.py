"""Where models and results may lie, and what may lie beside them: all goes well or is refused before the work."""

from __future__ import annotations

import json
import os
import unicodedata
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from ultralowbit.cli.app import app
from ultralowbit.errors import CheckpointError, InputError
from ultralowbit.pipeline.compress import compress
from ultralowbit.pipeline.verify import verify
from ultralowbit.progress import Silent
from ultralowbit.recipe import Recipe

SHARD = "model.safetensors"
RTN = Recipe.model_validate({"name": "rtn", "quantize": {"method": "rtn", "bits": 4, "group": 32}})


@pytest.fixture
def model(source, copied) -> Path:
    """A copy of the model, to put things beside it."""
    return copied(source)


def packed_files(model: Path, out: Path) -> set[str]:
    """What a compressed model's manifest lists, once it has been verified."""
    made = compress(str(model), RTN, out)
    assert verify(made.folder) == []
    return set(made.manifest["files"])


OURS = {"config.json", "generation_config.json", SHARD, "recipe.yaml", "tokenizer.json", "tokenizer_config.json"}


def test_links_in_a_circle_pipes_and_devices_are_not_carried(model, tmp_path):
    os.symlink("vocab.txt", model / "vocab.txt")
    os.symlink("c.jinja", model / "b.jinja")
    os.symlink("b.jinja", model / "c.jinja")
    os.symlink("..", model / "up")
    os.symlink("/dev/zero", model / "added_tokens.json")
    os.symlink("/dev/zero", model / "zero")
    os.mkfifo(model / "merges.txt")
    assert packed_files(model, tmp_path / "out") == OURS


def test_what_no_model_needs_is_not_carried(model, tmp_path):
    """Other weights, data and scripts: a folder may be anything's home, and the result may be published."""
    (tmp_path / "id_rsa").write_text("secret")
    (model / "scripts").mkdir()
    for name in ("rust_model.ot", "optimizer.pt.1", "customers.jsonl", "notes.txt", "mine.py", "scripts/deploy.py"):
        (model / name).write_text("x")
    os.symlink(tmp_path / "id_rsa", model / "LICENSE")
    assert packed_files(model, tmp_path / "out") == OURS
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"auto_map": {"AutoTokenizer": ["mine.Mine", None]}}))
    assert packed_files(model, tmp_path / "coded") == {*OURS, "mine.py", "scripts/deploy.py"}


def test_a_folder_of_links_is_carried_like_one_of_files(model, tmp_path):
    (model / "LICENSE").write_text("mine")
    linked = tmp_path / "linked"
    linked.mkdir()
    for path in model.iterdir():
        os.symlink(path, linked / path.name)
    assert packed_files(linked, tmp_path / "out") == {*OURS, "LICENSE"}


NAMES = ["two\nlines", "[red] `x` $(y)", unicodedata.normalize("NFD", "é"), os.fsdecode(b"\xff"), "-q"]


@pytest.mark.parametrize("name", NAMES, ids=["newline", "markup", "nfd", "no utf-8", "option"])
def test_any_name_may_be_carried_and_written_to(model, tmp_path, name):
    template = f"{name}.jinja"
    (model / template).write_text("x")
    (model / "é.jinja").write_text("y")
    folder = name.encode("utf-8", "replace").decode()  # safetensors opens no other
    assert packed_files(model.rename(tmp_path / folder), tmp_path / f"{folder}.out") == {*OURS, template, "é.jinja"}


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir, lambda path: os.symlink("/dev/zero", path)])
@pytest.mark.parametrize("name", [SHARD, "config.json"])
def test_what_is_no_file_is_no_part_of_a_model(model, tmp_path, name, make):
    (model / name).unlink()
    make(model / name)
    with pytest.raises(InputError, match=f"has no .*{'safetensors' if name == SHARD else name}"):
        compress(str(model), RTN, tmp_path / "out")


def test_a_result_inside_the_models_folder_does_not_carry_itself(model):
    (model / "additional_chat_templates").mkdir()
    (model / "additional_chat_templates/tools.jinja").write_text("{{ tools }}")
    expected = {*OURS, "additional_chat_templates/tools.jinja"}
    assert packed_files(model, model / "first") == expected
    assert packed_files(model, model / "deep/second") == expected


def link_to_folder(path: Path) -> None:
    (path.parent / "elsewhere").mkdir()
    os.symlink("elsewhere", path)


@pytest.mark.parametrize(
    "name, prepare, words",
    [
        ("out", lambda out: os.symlink("out", out), "cannot be a folder"),
        ("o" * 300, lambda out: None, "cannot be a folder"),
        ("o" * 253, lambda out: None, "cannot be a folder"),
        ("o\0ut", lambda out: None, "cannot be a folder"),
        ("out", os.mkfifo, "is a file"),
        ("out", lambda out: link_to_folder(out.with_name("out.work")), "files that are not ours"),
        ("out", lambda out: os.symlink("out.work", out.with_name("out.work")), "files that are not ours"),
        ("out", lambda out: (out.with_name("out.work") / "lock").mkdir(parents=True), "files that are not ours"),
        ("out", lambda out: (out.with_name("out.work") / "job.json").mkdir(parents=True), "files that are not ours"),
    ],
    ids=["circle", "long", "long with .work", "nul", "pipe", "work is a link", "work circle", "lock", "job"],
)
def test_an_out_that_cannot_be_is_refused(source, tmp_path, name, prepare: Callable, words):
    out = tmp_path / name
    prepare(out)
    before, lock = set(tmp_path.rglob("*")), tmp_path / "out.work/lock"
    with pytest.raises((InputError, CheckpointError), match=words):
        compress(str(source), RTN, out)
    assert set(tmp_path.rglob("*")) - {lock} == before - {lock}


class Meddler(Silent):
    """Calls `meddle` once the first block is packed."""

    def __init__(self, meddle: Callable[[], object]) -> None:
        self.meddle, self.done = meddle, False

    def say(self, line: str) -> None:
        if ".0: " in line and not self.done:
            self.done = True
            self.meddle()


@pytest.mark.parametrize("name", [SHARD, "config.json"])
def test_a_model_that_changes_while_it_is_read_is_refused(source, model, every_format, undisturbed, tmp_path, name):
    """What is published was hashed; put back as it was, the same command goes on."""

    def meddle() -> None:
        if name == SHARD:
            doubled = {key: 2 * tensor for key, tensor in load_file(model / SHARD).items()}
            save_file(doubled, model / SHARD, {"format": "pt"})
        else:
            config = json.loads((model / name).read_text())
            (model / name).write_text(json.dumps(config | {"rms_norm_eps": 0.1}))

    with pytest.raises(CheckpointError, match=f"{name} has changed while it was read"):
        compress(str(model), every_format, tmp_path / "out", progress=Meddler(meddle))
    assert not (tmp_path / "out").exists()
    (model / name).write_bytes((source / name).read_bytes())
    compress(str(model), every_format, tmp_path / "out")
    assert (tmp_path / "out" / SHARD).read_bytes() == (undisturbed / SHARD).read_bytes()


WRITES = [
    ["compress", "MODEL", "--recipe", "rtn-4bit", "--out"], ["export", "MODEL", "--to", "dense", "--out"],
    ["compare", "MODEL", "--out"], ["demo", "--out"], ["bench", "methods", "MODEL", "--out"],
]  # fmt: skip


@pytest.mark.parametrize("command", WRITES, ids=lambda command: command[0])
@pytest.mark.parametrize("place", ["circle", "~nobody-of-this-name/x"])
def test_a_place_that_cannot_be_is_refused_by_every_command(source, tmp_path, monkeypatch, command, place):
    monkeypatch.chdir(tmp_path)
    os.symlink("circle", "circle")
    result = CliRunner().invoke(app, [str(source) if part == "MODEL" else part for part in [*command, place]])
    assert result.exit_code == 2 and result.stderr.count("\n") == 1, result.output
    assert repr(place) in result.stderr and "unexpected" not in result.stderr


@pytest.mark.parametrize("option", ["--json", "--csv"])
@pytest.mark.parametrize("name", ["pipe", "/dev/null", "circle"])
def test_results_are_written_to_regular_files_alone(source, tmp_path, monkeypatch, option, name):
    """A device or a pipe would be replaced by a file."""
    monkeypatch.chdir(tmp_path)
    os.symlink("circle", "circle")
    os.mkfifo("pipe")
    command = ["eval", str(source)] if option == "--json" else ["bench", "kernels"]
    result = CliRunner().invoke(app, [*command, option, name])
    assert result.exit_code == 2 and f"{name!r}, is no regular file" in result.stderr, result.output


@pytest.mark.parametrize("name", ["./a\0b", "~nobody-of-this-name/x.yaml", "./circle", "./binary"])
def test_a_recipe_file_that_cannot_be_is_refused(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    os.symlink("circle", "circle")
    Path("binary").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match="cannot be read"):
        Recipe.load(name)
