"""What CONTRIBUTING promises of a new metric: with one class and one line in a table it is shown everywhere."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from click.testing import Result as Answer
from torch import Tensor
from transformers import LlamaConfig
from typer.testing import CliRunner

from ultralowbit.cli.app import app
from ultralowbit.eval.base import Metric, Quantity, Result
from ultralowbit.eval.metric import METRICS
from ultralowbit.nn.hf import load

CONFIG = LlamaConfig(
    vocab_size=96, hidden_size=40, intermediate_size=56, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=64, bos_token_id=0, eos_token_id=1,
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Confidence(Result):
    """How sure a model is of its likeliest token."""

    confidence: float
    """Mean probability of the likeliest next token."""


class _Sum:
    def __init__(self) -> None:
        self.total = 0.0

    def add(self, tokens: Tensor, logits: Tensor, original: Tensor | None) -> None:
        self.total += logits[:, :-1].float().softmax(-1).amax(-1).double().sum().item()

    def result(self, how: Result) -> Confidence:
        return Confidence(**vars(how), confidence=self.total / how.tokens)


class ConfidenceMetric(Metric):
    """The confidence of a model."""

    name = "confidence"
    result = Confidence
    quantities = (Quantity("confidence", "sureness", "percent", None, "mean confidence", drawn=True),)

    def start(self) -> _Sum:
        return _Sum()


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    monkeypatch.setitem(METRICS, ConfidenceMetric.name, ConfidenceMetric())


@torch.no_grad()
def test_it_is_measured_and_shown_everywhere(save_model, text, tmp_path, tokenizer):
    def run(*args: object) -> Answer:
        done = CliRunner(env={"COLUMNS": "200"}).invoke(app, [str(arg) for arg in args])
        assert done.exit_code == 0, done.output
        return done

    source, out = save_model(CONFIG, tmp_path / "source"), tmp_path / "out"
    run(
        "compress", source, "--recipe", "rtn-4bit", "--out", out, "--calib", text, "--samples", 8, "--length", 32,
        "--eval", text, "--max-tokens", 640, "--device", "cpu",
    )  # fmt: skip
    report = json.loads((out / "report.json").read_text())
    (before,), (after,) = (report[row]["metrics"]["confidence"] for row in ("original", "packed"))

    windows = torch.tensor(tokenizer(Path(text).read_text())["input_ids"])[: after["windows"] * after["context"]]
    windows = windows.view(after["windows"], after["context"])
    sure = load(out)(windows).logits[:, :-1].double().softmax(-1).amax(-1).mean().item()
    assert after["confidence"] == pytest.approx(sure, rel=1e-5)
    shown = {f"{100 * value:.1f}" for value in (before["confidence"], after["confidence"])}

    page = tmp_path / "page"
    run("compare", out, "--out", page)
    measured = run("eval", source, out, "--ppl", text, "--max-tokens", 640, "--json", tmp_path / "eval.json")
    results = json.loads((tmp_path / "eval.json").read_text())["results"]
    assert [result["metrics"]["confidence"][0]["confidence"] for result in results] == [
        pytest.approx(row["confidence"], rel=1e-6) for row in (before, after)
    ]
    places = {
        "eval": measured.stdout, "report.md": (out / "report.md").read_text(), "card": (out / "README.md").read_text(),
        "page": next(page.glob("*.html")).read_text(),
    }  # fmt: skip
    for place, said in places.items():
        missing = {number for number in shown if number not in said}
        assert not missing and ("confidence" in said or "sureness" in said), (place, missing)
    assert "mean confidence" in places["page"]  # the axis of its plot
