"""Tasks of lm-eval on a tiny packed model: its own numbers, chance counted, averages by hand, no trace left."""

from __future__ import annotations

import json
import logging
import math
import os
import random
import sys
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from typer.testing import CliRunner

from ultralowbit.cli.app import app
from ultralowbit.errors import InputError
from ultralowbit.eval import zeroshot
from ultralowbit.eval.runner import open_model
from ultralowbit.eval.scores import Score, averages, task_readings
from ultralowbit.methods.rtn import RTN
from ultralowbit.nn.hf import pack_model

pytest.importorskip("lm_eval")

LETTERS = "abcdefgh"
MEAN = {"aggregation": "mean", "higher_is_better": True}


def documents(count: int, seed: int) -> list[dict]:
    """Questions of letters with two to four answers, the number of which differs from one to the next."""
    rng = random.Random(seed)
    words = lambda n: "".join(rng.choice(LETTERS) for _ in range(n))  # noqa: E731
    groups = []
    for i in range(count):
        choices = [words(rng.randint(1, 6)) for _ in range(2 + i % 3)]
        groups.append(
            {
                "question": words(8),
                "choices": choices,
                "gold": rng.randrange(len(choices)),
                "page": " ".join(words(4) for _ in range(40)),
            }
        )
    return groups


@pytest.fixture(scope="session")
def tasks_dir(tmp_path_factory) -> Path:
    """A folder of tasks whose data are local."""
    folder = tmp_path_factory.mktemp("tasks")

    def write(name: str, count: int, **config) -> None:
        data = folder / f"{name}.jsonl"
        data.write_text("\n".join(map(json.dumps, documents(count, len(name)))))
        common = {
            "task": name, "dataset_path": "json", "validation_split": "validation", "metadata": {"version": 3.0},
            "dataset_kwargs": {"data_files": {"validation": str(data)}, "cache_dir": str(folder / "cache")},
            "doc_to_text": "{{question}}",
        }  # fmt: skip
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(common | config))

    choice = {"output_type": "multiple_choice", "doc_to_choice": "{{choices}}", "doc_to_target": "gold"}
    both = [{"metric": "acc", **MEAN}, {"metric": "acc_norm", **MEAN}]
    write("toy_choice", 30, **choice, metric_list=both)
    write("toy_part_one", 8, **choice, metric_list=both[:1])
    write("toy_part_two", 15, **choice, metric_list=both[:1])
    for name, weigh in (("toy_group", False), ("toy_weighed", True)):
        group = {"group": name, "task": ["toy_part_one", "toy_part_two"]}
        group["aggregate_metric_list"] = [{"metric": "acc", "aggregation": "mean", "weight_by_size": weigh}]
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(group))
    nested = {"group": "toy_loose", "task": ["toy_group", "toy_choice"]}  # with no score of its own
    (folder / "toy_loose.yaml").write_text(yaml.safe_dump(nested))
    write("toy_several", 12, **{**choice, "doc_to_target": "{{[0, 1]}}"}, metric_list=both[:1])
    free = [{"metric": "perplexity", "aggregation": "perplexity", "higher_is_better": False}, {"metric": "acc", **MEAN}]
    write("toy_free", 12, output_type="loglikelihood", doc_to_target=" {{choices[0]}}", metric_list=free)
    metrics = [{"metric": m} for m in ("word_perplexity", "byte_perplexity", "bits_per_byte")]
    rolling = {"output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "{{page}}"}
    write("toy_pages", 5, **rolling, metric_list=metrics)
    write("toy_none", 0, **choice, metric_list=both[:1])
    write("toy_filtered", 4, **choice, metric_list=both[:1])
    (folder / "empty.py").write_text("def none(docs):\n    return docs.select([])\n")
    with (folder / "toy_filtered.yaml").open("a") as file:
        file.write("process_docs: !function empty.none\n")
    write("toy_broken", 5, **choice, metric_list=both)
    (folder / "toy_broken.jsonl").unlink()
    return folder


@pytest.fixture(scope="session")
def checkpoint(save_model, tiny_config, tmp_path_factory) -> Path:
    config = tiny_config(num_hidden_layers=2, num_key_value_heads=4)
    return save_model(config, tmp_path_factory.mktemp("zeroshot") / "tiny")


@pytest.fixture(scope="session")
def packed(checkpoint):
    model = open_model(checkpoint, torch.device("cpu"), torch.float32)
    method = RTN(bits=4, group=32)
    linears = {n: m for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and "layers" in n}
    return pack_model(model, {name: method.quantize(m.weight.detach(), None) for name, m in linears.items()})


@pytest.fixture(scope="session")
def dense(packed, checkpoint):
    """The same model as plain transformers, for lm-eval alone."""
    model = open_model(checkpoint, torch.device("cpu"), torch.float32)
    for name, module in packed.named_modules():
        if hasattr(module, "dense"):
            model.get_submodule(name).weight.data = module.dense(torch.float32).weight.data
    return model


@pytest.fixture(scope="session")
def ask(packed, tokenizer, tasks_dir):
    def ask(*names: str, **options):
        return zeroshot.evaluate(packed, tokenizer, zeroshot.read_tasks(names, tasks_dir), **options)

    return ask


def score(answer, task: str, metric: str = "acc") -> Score:
    return next(s for s in answer.scores if (s.task, s.metric) == (task, metric))


ALL = ("toy_choice", "toy_group", "toy_several", "toy_free", "toy_pages")


def test_numbers_are_those_of_lm_eval_alone(ask, dense, tokenizer, tasks_dir):
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    answer = ask(*ALL)
    theirs = lm_eval.simple_evaluate(
        HFLM(pretrained=dense, tokenizer=tokenizer, batch_size=3), tasks=[*ALL], bootstrap_iters=1000,
        task_manager=TaskManager(include_path=str(tasks_dir), include_defaults=False),
    )  # fmt: skip
    mine = answer.lm_eval["results"]
    assert mine.keys() == theirs["results"].keys() and len(mine) == 7
    for task, row in theirs["results"].items():
        assert mine[task].keys() == row.keys()
        for key, value in row.items():
            assert mine[task][key] == (pytest.approx(value, rel=1e-5) if isinstance(value, float) else value), key
    assert score(answer, "toy_choice", "acc_norm").value == theirs["results"]["toy_choice"]["acc_norm,none"]
    pages = score(answer, "toy_pages", "word_perplexity")
    assert pages.value == pytest.approx(theirs["results"]["toy_pages"]["word_perplexity,none"], rel=1e-5)
    assert (pages.stderr, pages.chance, pages.higher_is_better) == (None, None, False)
    # the familiar table and everything behind it
    assert all(part in answer.table for part in ("toy_choice", "Groups", "acc_norm", "Stderr"))
    kept = answer.lm_eval
    assert {"configs", "versions", "n-shot", "n-samples", "config", "lm_eval_version"} <= kept.keys()
    assert "samples" not in kept and kept["versions"]["toy_choice"] == 3.0
    json.dumps(asdict(answer), allow_nan=False)


def test_chance_is_counted(ask, tasks_dir):
    answer = ask(*ALL)

    def counted(name: str, right: int = 1) -> float:
        rows = [json.loads(line) for line in (tasks_dir / f"{name}.jsonl").read_text().splitlines()]
        return np.mean([right / len(row["choices"]) for row in rows])

    one, two = counted("toy_part_one"), counted("toy_part_two")
    assert one != two
    for task, chance in (
        ("toy_choice", counted("toy_choice")),
        ("toy_group", (one + two) / 2),
        ("toy_several", counted("toy_several", 2)),
        ("toy_free", 0),
    ):
        assert score(answer, task).chance == pytest.approx(chance), task
    weighed = score(ask("toy_weighed"), "toy_weighed")
    assert weighed.chance == pytest.approx((8 * one + 15 * two) / 23) and (weighed.documents, weighed.of) == (23, 23)
    limited = score(ask("toy_choice", limit=3), "toy_choice")  # of the documents that were asked
    assert limited.chance == pytest.approx((1 / 2 + 1 / 3 + 1 / 4) / 3)
    assert (limited.documents, limited.of) == (3, 30)


def test_averages_by_hand():
    def row(task: str, metric: str, value: float, stderr: float | None, chance: float | None) -> Score:
        return Score(task, metric, value, stderr, chance, 10, 10, 0, "1", True)

    scores = [
        row("a", "acc", 0.6, 0.03, 0.5), row("a", "acc_norm", 0.7, 0.02, 0.5), row("b", "acc", 0.4, 0.04, 0.25),
        row("c", "word_perplexity", 20.0, None, None),
    ]  # fmt: skip
    plain, normed = averages(scores)
    assert plain.metrics == {"a": "acc", "b": "acc"} and normed.metrics == {"a": "acc_norm", "b": "acc"}
    assert plain.value == pytest.approx(0.5) and plain.stderr == pytest.approx(0.025) and plain.chance == 0.375
    assert plain.corrected == pytest.approx((0.1 / 0.5 + 0.15 / 0.75) / 2)
    assert plain.corrected_stderr == pytest.approx(math.hypot(0.03 / 0.5, 0.04 / 0.75) / 2)
    assert normed.value == pytest.approx(0.55)
    assert len(averages(scores[2:])) == 0  # of one task there is none
    (unknown,) = averages([row("a", "acc", 0.6, None, None), row("b", "acc", 0.4, 0.1, 0.5)])
    assert (unknown.value, unknown.stderr, unknown.chance, unknown.corrected) == (0.5, None, None, None)
    (sure,) = averages([row("a", "acc", 1.0, 0.0, 1.0), row("b", "acc", 0.4, 0.1, 0.5)])  # a has one choice
    assert (sure.value, sure.chance, sure.corrected, sure.corrected_stderr) == (0.7, 0.75, None, None)


def test_columns_of_averages_say_what_they_are_over():
    def of(*scores: Score) -> dict[str, tuple[str, float]]:
        found = task_readings(scores, averages(scores)).values()
        return {c.drawn: (c.key, value) for c, value in found if c.drawn}

    a, b = (Score(task, "acc", 0.5, None, 0.25, 10, 10, 0, "1", True) for task in ("arc", "b"))
    normed = replace(a, metric="acc_norm", value=0.7)
    both = of(a, normed, b)
    assert {name: value for name, (_, value) in both.items()} == {
        "mean accuracy": 0.5, "mean accuracy, normed by length": pytest.approx(0.6),
    }  # fmt: skip
    assert of(b, a)["mean accuracy"] == both["mean accuracy"]  # the order says nothing
    assert of(a, replace(b, documents=5))["mean accuracy"] != both["mean accuracy"]


def test_the_same_seed_gives_the_same_numbers_and_no_trace_is_left(ask, tokenizer, capfd):
    import lm_eval.api.task
    import tqdm

    random.seed(5)
    np.random.seed(5)
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
    traces = lm_eval.api.task.tqdm, tqdm.tqdm, logging.getLogger("lm_eval").level, dict(os.environ), tokenizer.pad_token
    stages = {}

    def progress(what: str):
        def report(done: int, total: int) -> None:
            stages.setdefault(what, []).append((done, total))

        return report

    names = [name for name in ALL if name != "toy_several"]  # lm-eval has no example for more than one answer
    few = [ask(*names, num_fewshot=2, seed=seed, progress=progress) for seed in (0, 0, 1)]
    assert before[:2] == (random.getstate(), np.random.get_state()[1].tolist())
    assert torch.equal(before[2], torch.get_rng_state())
    assert capfd.readouterr() == ("", "")
    now = lm_eval.api.task.tqdm, tqdm.tqdm, logging.getLogger("lm_eval").level, dict(os.environ), tokenizer.pad_token
    assert now == traces
    assert few[0].scores == few[1].scores != few[2].scores  # other examples
    assert score(few[0], "toy_choice").shots == 2
    assert few[0].scores != ask(*names).scores
    for what in ("building requests", "tokenizing requests", "requests", "windows of rolling likelihoods"):
        assert all(done <= total for done, total in stages[what]) and stages[what][-1][0] == stages[what][-1][1], what
    assert stages["windows of rolling likelihoods"][-1] == (5 * math.ceil(200 / 64), 5 * math.ceil(200 / 64))


def test_batches_do_not_matter(ask):
    one, auto = ask(*ALL, batch_size=1), ask(*ALL)
    for a, b in zip(one.scores, auto.scores, strict=True):
        assert (a.task, a.metric, a.documents) == (b.task, b.metric, b.documents)
        assert a.value == pytest.approx(b.value, rel=1e-5)


def test_requests_that_lost_their_beginning_are_counted(ask):
    answer = ask("toy_choice")
    assert (answer.truncated, answer.requests) == (0, 10 * (2 + 3 + 4))
    answer = ask("toy_choice", num_fewshot=8)  # some 90 characters, in a context of 64
    assert answer.truncated == answer.requests == 90


def test_samples_on_request(ask):
    samples = ask("toy_choice", limit=2, log_samples=True).lm_eval["samples"]
    assert [len(s["arguments"]) for s in samples["toy_choice"]] == [2, 3]


def test_names_may_be_patterns(ask):
    answer = ask("toy_part_*", limit=2)
    assert [s.task for s in answer.scores] == ["toy_part_one", "toy_part_two"]


def test_a_group_without_a_score_stands_for_its_members(ask):
    answer = ask("toy_loose", limit=4)
    assert [(s.task, s.metric) for s in answer.scores] == [
        ("toy_group", "acc"), ("toy_choice", "acc"), ("toy_choice", "acc_norm"),
    ]  # fmt: skip
    assert answer.averages[0].metrics == {"toy_group": "acc", "toy_choice": "acc"}


def test_mistakes(tasks_dir, tmp_path, monkeypatch, ask):
    manager = __import__("lm_eval.tasks", fromlist=["TaskManager"]).TaskManager
    local = manager(include_path=str(tasks_dir), include_defaults=False)
    monkeypatch.setattr("lm_eval.tasks.TaskManager", lambda **kwargs: local)  # its own take ten seconds
    for names, folder, said in (
        (["toy_choise"], tasks_dir, "there is no task 'toy_choise': did you mean 'toy_choice'?"),
        (["qqqq"], tasks_dir, "there is no task 'qqqq'"),
        (["toy_choice"], tmp_path / "none", "is no folder"),
        (["toy_broken"], tasks_dir, "the task 'toy_broken' cannot be read"),
        (["toy_none"], tasks_dir, "the task 'toy_none' has no document"),
        (["toy_filtered"], tasks_dir, "the task 'toy_filtered' has no document"),
    ):
        with pytest.raises(InputError, match=said) as caught:
            zeroshot.read_tasks(names, folder)
        assert "\n" not in str(caught.value)
    with pytest.raises(InputError, match="lm-eval cannot run toy_choice"):
        ask("toy_choice", num_fewshot=100)
    monkeypatch.undo()
    with pytest.raises(InputError, match=r"holds no \.yaml file of a task"):
        zeroshot.read_tasks(["toy_choice"], tmp_path)
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(InputError, match=r"pip install 'ultralowbit\[eval\]'"):
        zeroshot.read_tasks(["toy_choice"], tasks_dir)


def test_the_command(checkpoint, tasks_dir, tmp_path, ask, dense, tokenizer):
    runner = CliRunner(env={"COLUMNS": "160"})
    dense.save_pretrained(tmp_path / "rounded")
    tokenizer.save_pretrained(tmp_path / "rounded")
    models = [str(checkpoint), str(tmp_path / "rounded")]
    options = ["--tasks", "toy_choice,toy_group", "--tasks", "toy_free", "--tasks-dir", tasks_dir, "--device", "cpu"]
    result = runner.invoke(app, [str(a) for a in ["eval", *models, *options, "--json", tmp_path / "found.json"]])
    assert result.exit_code == 0, result.output
    written = json.loads((tmp_path / "found.json").read_text(), parse_constant=pytest.fail)
    assert [row["model"] for row in written["results"]] == models
    mine = ask("toy_choice", "toy_group", "toy_free")
    scores = written["results"][1]["tasks"]["scores"]
    assert [s["task"] for s in scores] == [s.task for s in mine.scores]
    assert [s["value"] for s in scores] == pytest.approx([s.value for s in mine.scores], rel=1e-5)
    assert written["results"][0]["tasks"]["lm_eval"]["results"].keys() == mine.lm_eval["results"].keys()
    for part in ("Filter", "average above chance", "acc_norm / acc", "toy_choice acc_norm, toy_group acc", "±"):
        assert part in result.stdout, part
    assert f"{score(mine, 'toy_choice').chance:.3f}" in result.stdout
