"""compress --bits, --size and --effort: what is asked for is what is there, and what cannot be is said first."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

from ultralowbit.checkpoint.size import measure_size
from ultralowbit.cli.app import app
from ultralowbit.cli.goal import OURS, Effort
from ultralowbit.errors import InputError
from ultralowbit.recipe import Recipe
from ultralowbit.units import format_bytes, parse_bytes


@pytest.fixture
def compress(model, text, tmp_path, monkeypatch):
    """Compress the model into the current, empty folder on a short text."""
    monkeypatch.chdir(tmp_path)
    runner = CliRunner(env={"COLUMNS": "80"})
    short = ["--calib", text, "--samples", "4", "--length", "24", "--eval", "none", "--device", "cpu", "-q"]
    return lambda *args: runner.invoke(app, ["compress", model, *short, *args])


@pytest.mark.parametrize("effort", Effort)
def test_bits_are_at_most_what_is_asked_for_by_a_recipe_that_is_named(compress, effort):
    few = ["--small", "--set", "finetune.data=null", "--set", "finetune.training.steps=2"]
    done = compress("--bits", "1.9", "--effort", effort, *few * (effort != Effort.FAST))
    assert done.exit_code == 0, done.output
    (folder,) = Path().iterdir()
    manifest = json.loads((folder / "manifest.json").read_text())
    assert folder.name.endswith(f"{OURS[effort]}-1.9bit") and manifest["recipe"] == f"{OURS[effort]}-1.9bit"
    assert 1.6 < measure_size(folder).linear_bits_per_weight <= 1.9
    report = (folder / "report.md").read_text()
    assert "## Where the bits are" in report and "self_attn.q_proj  " in report


def test_more_effort_is_a_longer_training_of_the_same():
    recipes = [Recipe.load(OURS[effort]) for effort in Effort]
    trained = [
        0 if r.finetune is None else r.finetune.training.steps * r.finetune.training.batch * r.finetune.data.length
        for r in recipes
    ]
    assert trained[0] == 0 < trained[1] < trained[2]
    same = [recipe.model_copy(update={"name": "", "summary": "", "finetune": None}) for recipe in recipes]
    assert same[0] == same[1] == same[2] and same[0].blockwise is None


@pytest.mark.parametrize("room", [1.0, 1.1, 1.4])
def test_a_file_is_no_larger_than_what_is_asked_for(compress, room):
    told = compress("--size", "1kB")
    assert told.exit_code == 2
    least = int(re.search(r"ask for --size (\d+) at least", " ".join(told.stderr.split()))[1])
    assert compress("--size", str(least - 1)).exit_code == 2
    wanted = int(room * least)
    done = compress("--size", str(wanted), "--effort", "fast", "--out", "packed")
    assert done.exit_code == 0, done.output
    size = measure_size(Path("packed"))
    assert size.file_bytes == (Path("packed") / "model.safetensors").stat().st_size <= wanted
    assert size.file_bytes > 0.9 * wanted - 400  # what is counted for headers is a bound


def test_a_file_of_the_most_planes_is_the_largest_that_can_be_asked_for(compress):
    told = compress("--size", "1TB")
    most = int(re.search(r"ask for --size (\d+) at most", " ".join(told.stderr.split()))[1])
    assert told.exit_code == 2 and compress("--size", str(most + 1)).exit_code == 2
    assert compress("--size", str(most), "--effort", "fast", "--out", "packed").exit_code == 0
    assert all("x4sign" in layer.format for layer in measure_size(Path("packed")).layers)


@pytest.mark.parametrize(
    ("args", "words"),
    [
        ([], "neither --bits nor --size nor --recipe is given"),
        (["--bits", "2", "--recipe", "sign-1"], "--recipe and --bits are given"),
        (["--bits", "2", "--size", "1MB"], "--bits and --size are given"),
        (["--recipe", "sign-1", "--effort", "best"], "--effort goes with --bits and --size"),
        (["--bits", "2", "--set", "allocate=null"], "--bits shares planes out among Linears, which --set"),
        (["--bits", "2", "--set", "quantize.method=gptq"], "allocate chooses planes: give it quantize: {method: sign"),
        (["--bits", "0.9"], "--bits is 0.9, expected true bits a packed weight from 1 to about 4"),
        (["--bits", "5"], "--bits is 5, expected true bits a packed weight from 1 to about 4"),
        (["--bits", "nan"], "--bits is nan"),
        (["--bits", "1"], "allocate.bits, which --bits sets, is 1, and one plane for every Linear takes 1.2"),
        (["--bits", "2", "--set", "name=mine"], "--bits says itself what --set name would"),
        (["--size", "1MB", "--set", "quantize.planes=3"], "--set quantize.planes says nothing where allocate chooses"),
        (["--bits", "2", "--set", "allocate.bits=3"], "--bits says itself what --set allocate.bits would"),
        (["--bits", "2", "--set", "allocate={bits: 3}"], "--bits says itself what --set allocate would"),
        (["--bits", "2", "--device", "gpu"], "a GPU is called cuda here, so try --device cuda"),
        (["--size", "60 potatoes"], "is no size"),
        (["--size", "10kB"], "embeddings, head, norms and headers take"),
    ],
)
def test_what_cannot_be_is_one_sentence_before_the_work(compress, args, words):
    done = compress(*args)
    assert done.exit_code == 2 and words in " ".join(done.stderr.split())
    assert done.stderr.startswith("error: ") and list(Path().iterdir()) == []


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("60MB", 60_000_000),
        ("1.5 GB", 1_500_000_000),
        ("900MiB", 900 << 20),
        ("12", 12),
        ("3k", 3000),
        ("2TB", 2 * 10**12),
    ],
)
def test_sizes_are_read(text, count):
    assert parse_bytes(text) == count
    assert parse_bytes(format_bytes(count).removesuffix(" bytes")) == count or "i" in text


@pytest.mark.parametrize("text", ["", "MB", "-3MB", "1e3MB", "60 XB", "nan"])
def test_no_sizes(text):
    with pytest.raises(InputError, match="is no size"):
        parse_bytes(text)
