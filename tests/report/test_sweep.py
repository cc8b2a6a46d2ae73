"""The table of methods: resumable, one failure does not cost the others, tracks beside perplexity."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from ultralowbit.cli.app import app
from ultralowbit.errors import InputError
from ultralowbit.eval.schema import Evaluation, ModelResults, read_file
from ultralowbit.eval.scores import Score
from ultralowbit.eval.zeroshot import ZeroShot
from ultralowbit.report import sweep_runs, sweep_tracks
from ultralowbit.report.schema import Comparison, RunReport
from ultralowbit.report.sweep_runs import Methods, Results
from ultralowbit.report.sweep_tracks import task_accuracies

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def model(save_model, tiny_config, tmp_path_factory) -> Path:
    config = tiny_config(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2)
    return save_model(config, tmp_path_factory.mktemp("methods") / "tiny")


@pytest.fixture
def bench(model, text, tmp_path, monkeypatch):
    """bench(*options) runs the command into `out`; a recipe `broken` is there beside the shipped ones."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("ultralowbit.report.style.save", lambda plot, folder: {"wide": "", "narrow": ""})  # slow
    Path("broken.yaml").write_text(
        "quantize: {method: rtn}\noverrides: [{match: '*.nothing', quantize: {method: rtn}}]\n"
    )
    Path("sign-2.yaml").write_text("quantize: {method: sign, planes: 2}\n")
    Path("other.txt").write_text("0123456789 " * 200)

    def run(*options: str):
        common = ["--calib", text, "--samples", "4", "--length", "32", "--eval", text, "--max-tokens", "640", "-q"]
        args = ["bench", "methods", str(model), *common, "--context", "32", "--device", "cpu", "--out", "out"]
        return CliRunner(env={"COLUMNS": "160"}).invoke(app, [*args, *options])

    return run


def test_seeds_failures_and_tracks_in_one_table(bench, monkeypatch, tmp_path):
    options = ("--recipes", "rtn-4bit,sign-2,./broken.yaml", "--seeds", "0,3", "--calib", "other.txt")
    result = bench(*options)
    assert result.exit_code == 1, result.output  # one failed
    runs = sorted(path.parent.relative_to(tmp_path / "out/runs/tiny") for path in tmp_path.glob("out/**/manifest.json"))
    expected = ["rtn-4bit/seed-0", "sign-2/calibrated-on-other.txt", "sign-2/seed-0", "sign-2/seed-3"]
    assert [path.as_posix() for path in runs] == expected  # no seed for what reads no text
    json.loads(Path("out/report.json").read_text(), parse_constant=pytest.fail)
    comparison = read_file(Path("out/report.json"), Comparison, "")
    (section,) = comparison.sections
    by_label = {row.label: row for row in section.rows}
    assert [*by_label] == ["original", "rtn-4bit", "sign-2"]
    assert [run.seed for run in by_label["sign-2"].runs] == [0, 3]
    quality = next(column.key for column in section.columns if column.group == "perplexity")
    reports = [read_file(Path(f"out/runs/tiny/sign-2/seed-{s}/report.json"), RunReport, "") for s in (0, 3)]
    stored = [report.packed.metrics["perplexity"][0] for report in reports]
    assert by_label["sign-2"].metrics[quality].values == [p.perplexity for p in stored]
    failed = comparison.failed
    assert {failure.label for failure in failed} == {"broken/seed-0", "broken/seed-3", "broken/calibrated-on-other.txt"}
    assert all("matches no Linear" in failure.error for failure in failed) and "matches no Linear" in result.stdout

    (of_model,) = comparison.tracks["models"]
    tracks = {row["label"]: row["tracks"] for row in of_model["rows"]}
    sign = {name: track["ratios"] for name, track in tracks["sign-2"].items()}
    original = by_label["original"].mean(quality)
    nll = sum(p.nll for p in stored) / 2
    assert [*sign["language"].values()] == [pytest.approx(math.log(original) / nll)]
    assert sign["cost"].keys() == {"time", "seeds"} and tracks["rtn-4bit"]["cost"]["ratios"].keys() == {"time"}
    assert {"typos", "casing", "whitespace", "calibration on other.txt"} <= sign["robustness"].keys()
    bits = by_label["sign-2"].mean
    assert sign["complexity"] == {"linear": 16 / bits("linear_bits"), "model": 16 / bits("model_bits")}
    assert sign["inference"].keys() == {"prompt", "decoding"} and not sign["tasks"]
    assert comparison.tracks["across"] == []
    page, markdown = Path("out/report.html").read_text(), Path("out/report.md").read_text()
    for part in ("gave no result", "matches no Linear", "calibration on other.txt"):
        assert part in page
    assert "| sign-2 |" in markdown and "Time is compared with" in markdown

    # again: nothing is run or measured
    monkeypatch.setattr("ultralowbit.eval.runner.open_model", lambda *a, **k: pytest.fail("measured again"))
    monkeypatch.setattr("ultralowbit.report.measure.open_model", lambda *a, **k: pytest.fail("measured again"))
    monkeypatch.setattr(sweep_tracks, "open_model", lambda *a, **k: pytest.fail("measured again"))
    monkeypatch.setattr("ultralowbit.pipeline.stream.quantize_weight", lambda *a, **k: pytest.fail("packed again"))
    assert bench(*options).exit_code == 1
    again = read_file(Path("out/report.json"), Comparison, "")
    assert again.tracks == comparison.tracks
    assert [section.rows for section in again.sections] == [section.rows for section in comparison.sections]


@pytest.fixture
def tasks_dir(tmp_path) -> Path:
    """A folder with one task, whose data are local."""
    pytest.importorskip("lm_eval")
    folder = tmp_path / "tasks"
    folder.mkdir()
    rows = [{"question": f"{i} and", "choices": [f" {i} {i}", f" {7 * i % 9}"], "gold": i % 2} for i in range(12)]
    (folder / "toy.jsonl").write_text("\n".join(map(json.dumps, rows)))
    task = {
        "task": "toy", "dataset_path": "json", "validation_split": "validation", "metadata": {"version": 1.0},
        "dataset_kwargs": {"data_files": {"validation": str(folder / "toy.jsonl")}, "cache_dir": str(folder / "cache")},
        "doc_to_text": "{{question}}", "output_type": "multiple_choice", "doc_to_choice": "{{choices}}",
        "doc_to_target": "gold", "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }  # fmt: skip
    (folder / "toy.yaml").write_text(json.dumps(task))
    return folder


def test_tasks_are_asked_once_and_stand_in_the_table(bench, tasks_dir, monkeypatch):
    options = ["--recipes", "rtn-4bit,sign-2", "--seeds", "0,3", "--tasks-dir", str(tasks_dir), "--limit", "10"]
    asked = []
    evaluate = sweep_runs.evaluate_models
    monkeypatch.setattr(
        sweep_runs, "evaluate_models", lambda models, *a, **k: asked.extend(models) or evaluate(models, *a, **k)
    )
    result = bench(*options, "--tasks", "toy")
    assert result.exit_code == 0, result.output
    assert [Path(model).name for model in asked] == ["tiny", "seed-0", "seed-0"]  # the original once
    (section,) = read_file(Path("out/report.json"), Comparison, "").sections
    column = next(c for c in section.columns if c.group == "accuracy" and c.title.startswith("toy"))
    assert "10 of 12 documents" in column.protocol
    scores = {row.label: row.metrics[column.key].values for row in section.rows}
    assert scores.keys() == {"original", "rtn-4bit", "sign-2"} and all(len(values) == 1 for values in scores.values())
    for label in ("rtn-4bit", "sign-2"):
        kept = read_file(Path(f"out/runs/tiny/{label}/seed-0/eval-tasks.json"), Evaluation, "")
        assert [row.tasks.scores[0].value for row in kept.results] == [*scores[label], *scores["original"]]

    asked.clear()
    assert bench(*options, "--tasks", "toy").exit_code == 0 and not asked
    assert bench(*options[:-1], "5", "--tasks", "toy").exit_code == 0 and len(asked) == 3  # other questions
    asked.clear()
    assert bench(*options, "--tasks", "toy", "--tasks-dtype", "bfloat16").exit_code == 0 and len(asked) == 3
    kept = read_file(Path("out/runs/tiny/sign-2/seed-0/eval-tasks.json"), Evaluation, "")
    assert kept.asked["dtype"] == "torch.bfloat16"
    result = bench(*options, "--tasks", "toy", "--tasks-dtype", "int8")
    assert result.exit_code == 2 and "--tasks-dtype is 'int8', expected one of auto, float32" in result.stderr
    result = bench(*options, "--tasks", "toyy")
    assert result.exit_code == 2 and "did you mean 'toy'?" in result.stderr


def test_tasks_are_taken_from_eval_json(run, build):
    def row(model: str, value: float) -> ModelResults:
        score = Score("a", "acc", value, None, 0.5, documents=9, of=9, shots=0, version="1", higher_is_better=True)
        scores = [score, replace(score, metric="acc_norm", value=value + 0.1)]
        return ModelResults(model=model, tasks=ZeroShot(scores, [], 0, 9, 1.0, {}))

    evaluation = Evaluation(created="", results=[row("models/tiny", 0.7), row("packed/", 0.6)])
    folder = run("packed", "sign-2", 2.1, [build.perplexity(62.5)], evaluated=evaluation)
    packed, original = task_accuracies(folder)
    assert packed == {"a": (pytest.approx(0.7), 0.5)} and original == {"a": (pytest.approx(0.8), 0.5)}


def test_seeds_of_which_one_is_broken_spread_without_end(build):
    reports = [build.report(value) for value in (60.0, 62.0, math.nan, math.inf)]
    of = lambda *which: Results("tiny", build.recipe(), reports=[reports[i] for i in which])  # noqa: E731
    assert of(0).spread("novels.txt") is None
    assert of(0, 1).spread("novels.txt") == pytest.approx(math.log(62 / 60) / math.sqrt(2))
    assert of(0, 2).spread("novels.txt") == of(1, 3).spread("novels.txt") == math.inf


def test_what_cannot_be_told_apart_or_run_is_refused(bench, model, monkeypatch):
    for options, words in (
        (("--recipes", "sign-2,./sign-2.yaml"), "two of the recipes are called sign-2"),
        (("--recipes", "sign-9"), "no recipe 'sign-9'"),
        (("--recipes", "sign-2", "--seeds", "a"), "expected numbers with commas"),
        (("--recipes", "sign-2", str(model) + "/"), "two of the models are called tiny"),
        (("--recipes", "./broken.yaml"), "every run failed, the first one with: the override"),
    ):
        result = bench(*options)
        assert result.exit_code == 2 and words in result.stderr, (options, result.output)


def test_a_recipe_with_bits_is_what_compress_makes_of_them():
    recipe = Methods(models=(), recipes=()).recipe("ulb-fast:1.6", 3)
    assert (recipe.name, recipe.allocate.bits, recipe.calibration.seed) == ("ulb-fast-1.6bit", 1.6, 3)
    asked = Methods(models=(), recipes=(), settings=("quantize.refine=1",)).recipe("ulb:2.05", 0, "my.txt")
    assert (asked.quantize.refine, asked.finetune.data.source) == (1, "my.txt")
    for entry, words in (
        ("sign-2:1.6", "sign-2 does not share bits out among Linears: say sign-2"),
        ("ulb:", "no recipe 'ulb:'"),
        ("ulb:1.2.3", "allocate.bits"),
    ):
        with pytest.raises(InputError, match=words):
            Methods(models=(), recipes=()).recipe(entry, 0)


def test_an_interrupt_is_no_failure(bench, monkeypatch):
    def stop(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(sweep_runs, "compress_and_measure", stop)
    result = bench("--recipes", "rtn-4bit")
    assert result.exit_code == 130 and "to go on, run:" in result.stderr
