"""Model cards: front matter that the hub reads, numbers that the report holds, and nothing of this machine."""

from __future__ import annotations

import json
import math
import shlex
from fnmatch import fnmatch
from pathlib import Path

import pytest
from huggingface_hub import ModelCard, errors
from typer.testing import CliRunner

from ultralowbit import hub
from ultralowbit.bench.models import Shape, write_model, write_text
from ultralowbit.checkpoint.storage import sha256_file
from ultralowbit.cli.app import app
from ultralowbit.errors import InputError
from ultralowbit.eval.metric import METRICS
from ultralowbit.eval.schema import read_file
from ultralowbit.pipeline.verify import verify
from ultralowbit.report import card
from ultralowbit.report.markdown import public_command
from ultralowbit.report.schema import RunReport
from ultralowbit.report.tables import render

SHAPE = Shape(hidden=64, inter=96, heads=4, kv_heads=2, vocab=96)


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    folder = write_model(tmp_path_factory.mktemp("cards") / "tiny", layers=1, shape=SHAPE)
    write_text(folder.parent / "text.txt", 400, SHAPE.vocab)
    return folder


@pytest.fixture
def compress(source, tmp_path, monkeypatch):
    """compress(*options) runs the command into `packed`; returns its result and the folder."""
    monkeypatch.chdir(tmp_path)

    def run(*options: str, model: str | None = None):
        text = str(source.parent / "text.txt")
        command = ["compress", model or str(source), "--recipe", "rtn-4bit", "--out", "packed", "--device", "cpu", "-q"]
        result = CliRunner().invoke(app, [*command, "--eval", text, "--context", "32", *options])
        return result, tmp_path / "packed"

    return run


def test_what_was_changed_in_a_recipe_is_on_the_card_and_in_the_report(compress):
    result, folder = compress("--set", "quantize.bits=2")
    assert result.exit_code == 0, result.output
    text = (folder / "README.md").read_text()
    assert "with the recipe `rtn-4bit`, with `quantize.bits=2`." in text
    assert (folder / "report.md").read_text().startswith("# tiny, compressed with rtn-4bit, with quantize.bits=2\n\n|")


def test_a_card_is_read_back(compress, source, tmp_path):
    result, folder = compress()
    assert result.exit_code == 0, result.output
    report = read_file(folder / "report.json", RunReport, "")
    card = ModelCard.load(folder / "README.md")
    data = card.data.to_dict()
    assert data["library_name"] == "transformers" and data["pipeline_tag"] == "text-generation"
    assert {"ultralowbit", "rtn", "rtn-4bit"} <= {*data["tags"]} and data["recipe"] == "rtn-4bit"
    assert "base_model" not in data and "license" not in data  # a folder says neither
    measured = {result.metric_type: result for result in card.data.eval_results}
    assert measured.keys() == {"perplexity", "fidelity"}
    (stored,) = report.packed.metrics["perplexity"]
    assert measured["perplexity"].metric_value == pytest.approx(stored.perplexity, rel=1e-5)
    assert "12 windows of 32 tokens, float32" in measured["perplexity"].metric_name
    size = report.packed.size
    for part in (
        f"{size.linear_bits_per_weight:.3f}",
        f"{size.model_bits_per_weight:.3f}",
        stored.sha256[:12],
        sha256_file(folder / "manifest.json"),
        "import ultralowbit",
        'from_pretrained("packed")',
        "It needed no calibration text",
    ):  # fmt: skip
        assert part in card.text
    assert verify(folder) == []


def test_nothing_that_is_pushed_names_a_folder(compress, source, tmp_path):
    """Not of the model, the texts, the output or the command."""
    text = source.parent / "text.txt"
    options = ["--recipe", "gptq-4bit", "--calib", str(text), "--samples", "4", "--length", "32"]
    result, _ = compress(*options, "--out", str(tmp_path / "deep/packed"))
    assert result.exit_code == 0, result.output
    pushed = [path for path in (tmp_path / "deep/packed").iterdir() if not path.name.startswith(".")]
    assert {"README.md", "report.json", "report.md", "manifest.json", "recipe.yaml"} <= {path.name for path in pushed}
    for path in pushed:
        for private in (tmp_path, source.parent, Path.home(), Path.cwd()):
            assert str(private) == "/" or str(private).encode() not in path.read_bytes(), path
    report = read_file(tmp_path / "deep/packed/report.json", RunReport, "")
    assert (report.model, report.folder, report.calibration.source) == ("tiny", "packed", "text.txt")
    assert "--calib .../text.txt" in report.command and "--out .../packed" in report.command


def test_an_edited_card_is_left_alone(compress):
    _, folder = compress()
    text = (folder / "README.md").read_text()
    assert compress()[0].exit_code == 0 and (folder / "README.md").read_text() == text
    for mine in (text + "\nMine.\n", text.replace("rtn-4bit", "mine", 1), "# Mine\n", ""):
        (folder / "README.md").write_text(mine)
        for _ in range(2):
            assert compress()[0].exit_code == 0
            assert (folder / "README.md").read_text() == mine
    (folder / "README.md").unlink()
    assert compress()[0].exit_code == 0 and (folder / "README.md").read_text() == text


def test_the_licence_is_passed_on(tmp_path):
    assert card.passed_on(tmp_path) == {}
    (tmp_path / "LICENSE.txt").write_text("LLAMA 3.2 COMMUNITY LICENSE AGREEMENT\n...")
    other = {"license": "other", "license_name": "that-of-the-original", "license_link": "LICENSE.txt"}
    assert card.passed_on(tmp_path) == other
    (tmp_path / "LICENSE").write_text(
        "\n                                 Apache License\n           Version 2.0, January"
    )
    assert card.passed_on(tmp_path) == {"license": "apache-2.0"}
    (tmp_path / "README.md").write_text("# no front matter\n---\nlicense: x\n---\n")
    assert card.passed_on(tmp_path) == {"license": "apache-2.0"}
    front = "license: llama3.2\nlanguage: [en, de]\ndatasets: [a]\nmodel-index: 5\n"
    (tmp_path / "README.md").write_text(f"---\n{front}---\n# Model\n")
    assert card.passed_on(tmp_path) == {"license": "llama3.2", "language": ["en", "de"]}


BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{name}: &{name} [{', '.join([f'*{before}'] * 9)}]\n" for before, name in zip("abcdefg", "bcdefgh", strict=True)
)


@pytest.mark.parametrize(
    "front",
    [
        "license: [", "- a", "7", "license: 0x1", "license: {a: b}",
        "license: [a, b]", "license: true", "license: .nan", "license: ''", "language: {en: 1}", "language: [en, 1]",
        "language: [[en]]", "pipeline_tag: [a]", "license: *a", "license: !!python/object:os.system x", "? [a]\n: b",
        "license: " + "x" * 300, "x: " + "[" * 5000 + "]" * 5000, BOMB + "license: *h",
        "language: [" + "en, " * 400 + "]", "license: 1" + "0" * 5000, "a: 1_000:59:59:59",
    ],
)  # fmt: skip
def test_any_front_matter_is_passed_over(tmp_path, front):
    """What is no licence, language or task as the hub knows them is none, and costs no time."""
    (tmp_path / "README.md").write_text(f"---\n{front}\n---\n")
    assert card.passed_on(tmp_path) == {}


@pytest.mark.parametrize("date", ["2020-13-45", "2020-01-01"])
def test_a_date_is_a_text(build, tmp_path, date):
    (tmp_path / "README.md").write_text(f"---\nlicense: {date}\n---\n")
    text = card.card_text(build.report(), str(tmp_path), tmp_path, "packed")
    assert ModelCard(text).data.to_dict()["license"] == date


@pytest.mark.parametrize(
    "data", [b"\xff\xfe---\n", b"---\nlicense: \xff\n---\n", b"\x00" * 10, b"---\nlicense: x" * 99_999]
)
def test_any_bytes_are_passed_over(tmp_path, data):
    (tmp_path / "README.md").write_bytes(data)
    assert card.passed_on(tmp_path).keys() <= {"license"}
    (tmp_path / "README.md").unlink()
    (tmp_path / "README.md").mkdir()
    assert card.passed_on(tmp_path) == {}


def test_names_are_escaped_for_markdown_and_for_a_shell(build, tmp_path):
    """What others called their files is text: no link, no heading, no second command."""
    name = "it's `x`; $(touch y) <b>|[a](b)"
    report = build.report(model="[m](javascript:x)", folder=name, command="ultralowbit compress x\n# heading")
    report.recipe = report.recipe.model_copy(update={"summary": "*bold* <script>x</script>\n# heading"})
    text = card.card_text(report, "[m](javascript:x)", tmp_path, name)
    page = render("report.md.j2", **dict(report))
    for written in (ModelCard(text).text, page):
        assert "<script>" not in written.replace("\\<script\\>", "") and "\n# heading" not in written
        assert "](javascript:" not in written.replace("\\](javascript:", "")
        assert f"generate {shlex.quote(name)}" in written
        assert f"({json.dumps(name)})" in written  # a string of Python
        assert "\\*bold\\*" in written
    assert ModelCard(text).data.to_dict()["recipe"] == "sign-2"


def test_names_on_the_hub(tmp_path):
    cached = tmp_path / "hub/models--org--some--model/snapshots/0123"
    assert card.hub_id("org/some--model@v1", cached) == "org/some--model"
    assert card.hub_id(str(cached), cached) == "org/some--model"
    assert card.hub_id("gpt2", Path("/elsewhere")) == "gpt2"
    assert card.hub_id(str(tmp_path), tmp_path) is None
    (tmp_path / "x.gguf").touch()
    assert card.hub_id(str(tmp_path / "x.gguf"), cached.parents[3] / "decoded") is None


def test_a_small_divergence_is_no_zero(build, tmp_path):
    report = build.report(metrics={"perplexity": [build.perplexity(62.5)], "fidelity": [build.fidelity(3.21e-5)]})
    results = card.metadata(report, None, tmp_path, "x").eval_results
    assert [result.metric_value for result in results] == [62.5, 3.21e-5]


def test_losses_in_words(build):
    change = METRICS["perplexity"].change
    ten, more, less = (build.perplexity(value) for value in (10.0, 12.5, 9.0))
    assert change(ten, more).endswith("went from 10.000 to 12.500: +25 %, +0.223 nats per token")
    assert "-10 %" in change(ten, less) and change(ten, build.perplexity(math.nan)).endswith(": the model is broken")


def test_commands_name_no_folder(tmp_path, monkeypatch):
    """And say where one was: what is typed in the folder itself can be typed again."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data/here").mkdir(parents=True)
    (tmp_path / "my.txt").touch()
    for typed, shown in (
        ("/a/b/model", ".../model"),
        ("/a/b/model/", ".../model"),
        ("'/my secret/model'", ".../model"),
        ("~/model", ".../model"),
        ("../x", ".../x"),
        ("data/here", ".../here"),
        ("org/name", "org/name"),  # on the hub
        ("my.txt", "my.txt"),
        ("./packed", "./packed"),
        ("./packed/", "./packed/"),
        ("x" * 300, "x" * 300),
        ("--set calibration.source=/c/d.txt", "--set calibration.source=.../d.txt"),
        (
            "--set 'calibration.source={/my secret/a.txt: 0.5, ~/b.txt: 1, org/name: 2, ../c/d.txt: 1}'",
            "--set 'calibration.source={.../a.txt: 0.5, .../b.txt: 1, org/name: 2, .../d.txt: 1}'",
        ),
    ):
        assert public_command(f"ultralowbit compress {typed} -q") == f"ultralowbit compress {shown} -q"


# -- pushing


class Api:
    """A hub that remembers; `refuse` is what it raises, `at` where."""

    calls: list
    refuse: Exception | None = None
    at = ""

    def _call(self, name, **values):
        if self.refuse is not None and self.at == name:
            raise self.refuse
        Api.calls.append((name, values))

    def whoami(self):
        self._call("whoami")

    def create_repo(self, repo, **options):
        self._call("create_repo", repo=repo, **options)
        return f"https://huggingface.co/{repo}"

    def upload_folder(self, **options):
        self._call("upload_folder", **options)


@pytest.fixture
def api(monkeypatch):
    Api.calls, Api.refuse, Api.at = [], None, ""
    monkeypatch.setattr("huggingface_hub.HfApi", Api)
    return Api


def test_a_verified_folder_is_pushed(compress, api):
    result, folder = compress("--push-to-hub", "org/tiny-4bit", "--private")
    assert result.exit_code == 0, result.output
    assert [name for name, _ in api.calls] == ["whoami", "create_repo", "upload_folder"]
    assert api.calls[1][1] == {"repo": "org/tiny-4bit", "private": True, "exist_ok": True}
    upload = api.calls[2][1]
    assert (upload["repo_id"], str(upload["folder_path"])) == ("org/tiny-4bit", "packed")
    names = [*(path.name for path in folder.iterdir()), "eval.json", "eval-tasks.json", "tracks.json"]
    kept_here = {name for name in names if any(fnmatch(name, pattern) for pattern in upload["ignore_patterns"])}
    assert kept_here == {".ultralowbit-local.json", "eval.json", "eval-tasks.json", "tracks.json"}
    assert "pushed to https://huggingface.co/org/tiny-4bit" in result.stdout
    assert 'from_pretrained("org/tiny-4bit")' in Path("packed/README.md").read_text()


def test_nothing_is_pushed_unless_asked_nor_if_damaged(compress, api, monkeypatch):
    assert compress()[0].exit_code == 0 and api.calls == []
    monkeypatch.setattr("ultralowbit.pipeline.verify.verify", lambda folder: ["x has changed since it was written"])
    result, _ = compress("--push-to-hub", "org/tiny")
    assert result.exit_code == 1 and "is not pushed: x has changed" in result.stderr
    assert [name for name, _ in api.calls] == ["whoami"]


@pytest.mark.parametrize(
    ("name", "refusal", "words"),
    [
        ("tiny", None, "expected a name on the hub like org/name"),
        ("a/b/c", None, "expected a name on the hub"),
        ("org/../x", None, "expected a name on the hub"),
        ("org/tiny", errors.LocalTokenNotFoundError("no token\nlong story"), "needs a token: run `hf auth login`"),
        ("org/tiny", ConnectionError("unreachable"), "does not know who you are"),
    ],
)
def test_what_is_wrong_is_said_before_the_work(compress, api, name, refusal, words):
    api.refuse, api.at = refusal, "whoami"
    result, folder = compress("--push-to-hub", name)
    assert result.exit_code == 2 and words in result.stderr and result.stderr.count("\n") == 1
    assert not folder.exists()


def test_private_needs_a_name(compress, api):
    result, _ = compress("--private")
    assert result.exit_code == 2 and "--push-to-hub" in result.stderr


@pytest.mark.parametrize("at", ["create_repo", "upload_folder"])
def test_a_refused_push_keeps_the_folder(compress, api, at, tmp_path):
    api.refuse, api.at = errors.HfHubHTTPError.__new__(errors.HfHubHTTPError), at
    api.refuse.args = ("403 Forbidden.\n\nlong story",)
    result, folder = compress("--push-to-hub", "org/tiny")
    assert result.exit_code == 2 and "cannot be pushed to 'org/tiny'" in result.stderr
    assert verify(folder) == [] and (folder / "README.md").exists()
    with pytest.raises(InputError, match="which only pushes again"):
        hub.push(folder, "org/tiny")
