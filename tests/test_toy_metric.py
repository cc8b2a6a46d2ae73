"""A metric that is registered from here is measured, printed, stored, carded and drawn: nothing else knows of it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from typer.testing import CliRunner

from ultralowbit.cli.app import app
from ultralowbit.eval.base import Metric, Quantity, Result
from ultralowbit.eval.metric import METRICS
from ultralowbit.eval.runner import open_model, read_texts
from ultralowbit.eval.schema import Evaluation, read_file
from ultralowbit.eval.windows import cut
from ultralowbit.report.schema import Comparison, RunReport

# -- what the file of a new metric would hold: its numbers, their accumulator, and how they are shown


@dataclass(frozen=True, kw_only=True)
class Entropy(Result):
    """Mean entropy of the next-token distributions, nats."""

    entropy: float


class _Entropies:
    def __init__(self) -> None:
        self.sums: list[float] = []

    def add(self, tokens, logits, original) -> None:
        assert original is None and logits.shape[:2] == tokens.shape
        self.sums.append(torch.distributions.Categorical(logits=logits[:, :-1].double()).entropy().sum().item())

    def result(self, how: Result) -> Entropy:
        return Entropy(**vars(how), entropy=sum(self.sums) / how.tokens)


class EntropyMetric(Metric):
    name = "entropy"
    result = Entropy
    quantities = (Quantity("entropy", "mean entropy", "nats", None, "entropy", drawn=True),)

    def start(self) -> _Entropies:
        return _Entropies()


# -- one that compares with the original, in a unit that nothing knows


@dataclass(frozen=True, kw_only=True)
class Drift(Result):
    """Largest and mean distance of the logits from those of the original."""

    largest: float
    mean: float


class _Distances:
    def __init__(self) -> None:
        self.largest, self.sum, self.count = 0.0, 0.0, 0

    def add(self, tokens, logits, original) -> None:
        distance = (logits.double() - original.double()).abs()
        self.largest = max(self.largest, distance.max().item())
        self.sum += distance.sum().item()
        self.count += distance.numel()

    def result(self, how: Result) -> Drift:
        return Drift(**vars(how), largest=self.largest, mean=self.sum / self.count)


class DriftMetric(Metric):
    name = "drift"
    result = Drift
    needs_original = True
    quantities = (
        Quantity("largest", "largest drift", "logits", "lower", "largest drift of a logit"),
        Quantity("mean", "mean drift", "logits", "lower", "mean drift of a logit"),
    )

    def start(self) -> _Distances:
        return _Distances()


@pytest.fixture
def run(save_model, tiny_config, tmp_path, monkeypatch):
    """run(*args) runs a command where `tiny` is a model; the metrics are registered."""
    monkeypatch.setitem(METRICS, "entropy", EntropyMetric())
    monkeypatch.setitem(METRICS, "drift", DriftMetric())
    monkeypatch.chdir(tmp_path)
    save_model(
        tiny_config(hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2), tmp_path / "tiny"
    )

    def run(*args: str) -> str:
        result = CliRunner(env={"COLUMNS": "200"}).invoke(app, [*args])
        assert result.exit_code == 0, result.output
        return result.stdout

    return run


def expected(folder: str, text: str) -> float:
    """The entropy of a checkpoint on the first 640 tokens, all at once."""
    (read,) = read_texts(Path(folder), [text], max_tokens=640)
    model = open_model(Path(folder), torch.device("cpu"), torch.float32)
    with torch.no_grad():
        logits = model(cut(read.tokens, 64)).logits[:, :-1].double()
    return torch.distributions.Categorical(logits=logits).entropy().mean().item()


def test_a_new_metric_stands_everywhere(run, text):
    pages = {}
    for name, recipe in (("a", "rtn-4bit"), ("b", "gptq-2bit")):
        options = ["--eval", text, "--max-tokens", "640", "--device", "cpu", "--out", name]
        calib = ["--calib", text, "--samples", "4", "--length", "32"] if recipe != "rtn-4bit" else []
        shown = run("compress", "tiny", "--recipe", recipe, *calib, *options)
        report = read_file(Path(name, "report.json"), RunReport, "")
        (before,), (after,) = report.original.metrics["entropy"], report.packed.metrics["entropy"]
        assert before.entropy == pytest.approx(expected("tiny", text), rel=1e-6)
        assert after.entropy == pytest.approx(expected(name, text), rel=1e-6)
        (drift,) = report.packed.metrics["drift"]
        assert 0 < drift.mean < drift.largest and "drift" not in report.original.metrics
        line = (
            f"Drift on text.txt: largest drift of a logit {drift.largest:.4g}, mean drift of a logit {drift.mean:.4g}"
        )
        assert line[1:] in " ".join(shown.split())
        for file in ("report.md", "README.md"):
            page = Path(name, file).read_text()
            assert "entropy text.txt" in page and f"{after.entropy:.3g}" in page and line in page
        card = ModelCard.load(Path(name, "README.md"))
        assert {"entropy", "drift"} <= {measured.metric_type for measured in card.data.eval_results}
        assert f"Entropy on text.txt went from {before.entropy:.3g} to {after.entropy:.3g}." in card.text
        pages[name] = report

    shown = run(
        "eval", "a", "--fidelity", "tiny", "--ppl", text, "--max-tokens", "640", "--device", "cpu", "--json", "e.json"
    )
    evaluation = read_file(Path("e.json"), Evaluation, "")
    (original, packed) = evaluation.results
    assert packed.metrics == pages["a"].packed.metrics and "drift" in original.noise_floor
    assert "mean entropy" in shown and "largest drift" in shown and f"{packed.metrics['drift'][0].mean:.4g}" in shown
    stored = json.loads(Path("e.json").read_text())["results"][1]["metrics"]
    assert stored["entropy"][0]["entropy"] == packed.metrics["entropy"][0].entropy

    shown = run("compare", "a", "b", "--out", "page")
    (section,) = read_file(Path("page/report.json"), Comparison, "").sections
    columns = {column.title: column for column in section.columns if column.metric in ("entropy", "drift")}
    assert columns.keys() == {"text.txt", "largest drift", "mean drift"}
    rows = {row.label: row for row in section.rows}
    assert rows["gptq-2bit"].mean(columns["text.txt"].key) == pages["b"].packed.metrics["entropy"][0].entropy
    assert rows["original"].mean(columns["text.txt"].key) == pages["b"].original.metrics["entropy"][0].entropy
    assert Path("page/plots/entropy-on-text-txt-nats.png").stat().st_size > 0
    for page in ("page/report.md", "page/report.html"):
        assert f"{pages['a'].packed.metrics['drift'][0].largest:.4g}" in Path(page).read_text()
    assert "entropy" in shown


def test_what_no_metric_measures_is_refused(run, text, monkeypatch):
    """A file of a release that has more metrics is one sentence, not a table with holes."""
    run(
        "compress",
        "tiny",
        "--recipe",
        "rtn-4bit",
        "--eval",
        text,
        "--max-tokens",
        "640",
        "--device",
        "cpu",
        "--out",
        "a",
    )
    monkeypatch.delitem(METRICS, "entropy")
    result = CliRunner().invoke(app, ["compare", "a", "--out", "page"])
    assert result.exit_code == 2 and "entropy is no metric of this release" in result.stderr
