"""Model cards: front matter that the hub reads, numbers that the report holds, and nothing of this machine."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from huggingface_hub import ModelCard, errors
from typer.testing import CliRunner

from ultralowbit import hub
from ultralowbit.bench.models import Shape, write_model, write_text
from ultralowbit.checkpoint.storage import sha256_file
from ultralowbit.cli.app import app
from ultralowbit.errors import InputError
from ultralowbit.pipeline.verify import verify
from ultralowbit.report import card

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


def test_a_card_is_read_back(compress, source, tmp_path):
    result, folder = compress()
    assert result.exit_code == 0, result.output
    report = json.loads((folder / "report.json").read_text())
    assert report["card"] == {"path": "README.md", "sha256": sha256_file(folder / "README.md")}
    found = ModelCard.load(folder / "README.md")
    data = found.data.to_dict()
    assert data["library_name"] == "transformers" and data["pipeline_tag"] == "text-generation"
    assert {"ultralowbit", "rtn", "rtn-4bit"} <= {*data["tags"]} and data["recipe"] == "rtn-4bit"
    assert "base_model" not in data and "license" not in data  # a folder says neither
    (measured,) = found.data.eval_results
    stored = report["packed"]["perplexity"][0]
    assert measured.metric_value == pytest.approx(stored["perplexity"], abs=1e-4)
    assert "12 windows of 32 tokens, float32" in measured.metric_name
    size = report["packed"]["size"]
    for part in (
        f"{size['linear_bits_per_weight']:.3f}",
        f"{size['model_bits_per_weight']:.3f}",
        stored["sha256"][:12],
        report["manifest"]["sha256"],
        sha256_file(folder / "manifest.json"),
        "import ultralowbit",
        'from_pretrained("packed")',
        "No calibration text was used.",
    ):  # fmt: skip
        assert part in found.text
    for private in (str(tmp_path), str(source.parent)):
        assert private not in found.content
    assert verify(folder) == []


def test_an_edited_card_is_left_alone(compress):
    _, folder = compress()
    text = (folder / "README.md").read_text()
    first = json.loads((folder / "report.json").read_text())
    assert compress()[0].exit_code == 0 and (folder / "README.md").read_text() == text
    (folder / "README.md").write_text(text + "\nMine.\n")
    for _ in range(2):
        assert compress()[0].exit_code == 0
        assert (folder / "README.md").read_text() == text + "\nMine.\n"
    (folder / "README.md").unlink()
    assert compress()[0].exit_code == 0 and (folder / "README.md").read_text() == text
    assert json.loads((folder / "report.json").read_text())["card"] == first["card"]


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
    for broken in ("---\nlicense: [\n---\n", "---\n- a\n---\n", b"\xff\xfe"):
        (tmp_path / "README.md").write_bytes(broken if isinstance(broken, bytes) else broken.encode())
        assert card.passed_on(tmp_path) == {"license": "apache-2.0"}


def test_names_on_the_hub(tmp_path):
    cached = tmp_path / "hub/models--org--some--model/snapshots/0123"
    assert card.hub_id("org/some--model@v1", cached) == "org/some--model"
    assert card.hub_id(str(cached), cached) == "org/some--model"
    assert card.hub_id("gpt2", Path("/elsewhere")) == "gpt2"
    assert card.hub_id(str(tmp_path), tmp_path) is None


def test_losses_in_words():
    nll = lambda p: {"nll": math.log(p) if p > 0 else str(p)}  # noqa: E731
    assert card.loss(nll(10.0), nll(12.5)) == "+25 %, +0.223 nats a token"
    assert card.loss(nll(10.0), nll(9.0)).startswith("-10 %")
    assert card.loss(nll(10.0), {"nll": "nan"}) == "the model is broken"


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
    result, _ = compress("--push-to-hub", "org/tiny-4bit", "--private")
    assert result.exit_code == 0, result.output
    assert [name for name, _ in api.calls] == ["whoami", "create_repo", "upload_folder"]
    assert api.calls[1][1] == {"repo": "org/tiny-4bit", "private": True, "exist_ok": True}
    upload = api.calls[2][1]
    assert (upload["repo_id"], str(upload["folder_path"])) == ("org/tiny-4bit", "packed")
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
