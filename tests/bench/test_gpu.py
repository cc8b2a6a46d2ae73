"""`bench gpu`: parts fail, hang and are stopped by themselves, the folder keeps what there is; all run on a CPU too."""

from __future__ import annotations

import json
import os
import sys
import time
from dataclasses import replace

import pytest
from typer.testing import CliRunner

from ultralowbit.bench import gpu
from ultralowbit.bench.gpu import PARTS, Task, device_bench
from ultralowbit.bench.gpu_parts import CARD, RUNS, _whole
from ultralowbit.bench.gpu_targets import summary_text, verdicts
from ultralowbit.cli.app import app
from ultralowbit.errors import InputError

CPU = Task("cpu")
SCRIPTS = {
    "kernels": "keep({'rows': []})",
    "decode": "print('working'); sys.exit('the card is on fire')",
    "compress": "keep({'done': 1}); signal.signal(signal.SIGTERM, lambda *_: (keep({'done': 2}), sys.exit()));"
    "subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)']).pid;"
    "open(folder / 'pid', 'w').write(str(os.getpgid(0))); time.sleep(600)",
    "deep": "signal.signal(signal.SIGTERM, signal.SIG_IGN); keep({'done': 3}); time.sleep(600)",
}
"""Stand-ins of parts: one that is done, one that fails, one that leaves when it is told to, one that does not."""


@pytest.fixture
def parts(monkeypatch):
    """Parts are replaced by the stand-ins, and have two seconds, and one to leave."""

    def command(name, folder, task):
        start = (
            "import json, os, pathlib, signal, subprocess, sys, time; folder = pathlib.Path(sys.argv[1]);"
            f"keep = lambda result: (folder / '{name}.json').write_text(json.dumps(result));"
        )
        return [sys.executable, "-c", start + SCRIPTS[name], str(folder)]

    monkeypatch.setattr(gpu, "_command", command)
    monkeypatch.setattr(gpu, "PARTS", {name: replace(part, limit=2) for name, part in PARTS.items()})
    monkeypatch.setattr(gpu, "GRACE", 1.0)
    monkeypatch.setattr(gpu, "LEAST", 1.0)


def test_no_part_stops_the_others(parts, tmp_path):
    said, folder = [], tmp_path / "out"
    began = time.monotonic()
    summary = device_bench(folder, CPU, list(SCRIPTS), say=said.append)
    assert time.monotonic() - began < 20
    states = {name: (part["status"], part["reason"]) for name, part in summary["parts"].items()}
    assert states == {
        "kernels": ("done", ""), "decode": ("failed", "the card is on fire"),
        "compress": ("stopped", "its 2 s were over"), "deep": ("stopped", "its 2 s were over"),
    }  # fmt: skip
    assert summary["results"] == {"kernels": {"rows": []}, "compress": {"done": 2}, "deep": {"done": 3}}
    with pytest.raises(ProcessLookupError):  # what a part has started ends with it
        os.killpg(int((folder / "pid").read_text()), 0)
    assert json.loads((folder / "summary.json").read_text()) == summary
    assert "| decode | failed | " in (folder / "summary.md").read_text()
    assert "working" in (folder / "decode.log").read_text()
    assert sum("at most 2 s" in line for line in said) == 4


def test_the_time_of_all_parts_is_bounded(parts, tmp_path):
    said = []
    summary = device_bench(tmp_path, CPU, ["deep", "compress", "kernels"], seconds=3.5, say=said.append)
    assert [part["status"] for part in summary["parts"].values()] == ["stopped", "left out", "left out"]
    assert said[-1] == "[3/3] kernels: left out, no time is left" and "no time was left" in summary_text(summary)


def test_a_further_run_adds_to_the_folder(parts, tmp_path):
    device_bench(tmp_path, CPU, ["kernels", "decode"], say=lambda line: None)
    summary = device_bench(tmp_path, CPU, ["deep"], say=lambda line: None)
    assert [part["status"] for part in summary["parts"].values()] == ["done", "failed", "stopped"]
    assert summary["results"].keys() == {"kernels", "deep"}


def test_an_interrupted_run_keeps_what_there_is(parts, tmp_path, monkeypatch):
    def interrupted(process):
        raise KeyboardInterrupt

    real = gpu._run_part
    monkeypatch.setattr(
        gpu, "_run_part", lambda name, *rest: real(name, *rest) if name == "kernels" else interrupted(0)
    )
    with pytest.raises(KeyboardInterrupt):
        device_bench(tmp_path, CPU, ["kernels", "compress", "deep"], say=lambda line: None)
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert {name: part["status"] for name, part in summary["parts"].items()} == {
        "kernels": "done", "compress": "interrupted",
    }  # fmt: skip


def test_mistakes_are_told_before_the_work(parts, tmp_path, monkeypatch):
    def refused(folder, names, match, task=CPU):
        with pytest.raises(InputError, match=match):
            device_bench(folder, task, names, say=lambda line: pytest.fail("work has begun"))

    refused(tmp_path / "new", ["kernel"], "--part is 'kernel', expected one of kernels, decode")
    refused(tmp_path / "new", ["best"], "give --model FOLDER")
    assert not (tmp_path / "new").exists()
    (tmp_path / "notes.txt").write_text("mine")
    refused(tmp_path, ["kernels"], "no summary.json of this benchmark: name another folder")
    refused(tmp_path / "notes.txt", ["kernels"], "cannot be made")
    (tmp_path / "other").mkdir()
    (tmp_path / "other/summary.json").write_text("{}")
    refused(tmp_path / "other", ["kernels"], "is not a summary of this benchmark")
    (tmp_path / "other/summary.json").write_text("{")
    refused(tmp_path / "other", ["kernels"], "name another folder")
    device_bench(tmp_path / "out", CPU, ["kernels"], say=lambda line: None)
    monkeypatch.setattr(gpu, "machine", lambda device: {"date": "today", "device": "Some GPU", "cuda": "13.0"})
    refused(tmp_path / "out", ["kernels"], "holds results of device cpu, and here device is Some GPU: name another")


def test_the_whole_model_follows_from_two_depths():
    """5 ms outside of the blocks, and 2 ms a block in bf16, 0.5 ms packed: 32 blocks take 69 and 21 ms."""

    def rows(depth):
        costs = {"bf16": 5 + 2 * depth, "1 plane": 5 + 0.5 * depth}
        return [{"format": name, "way": "graph", "batch": 1, "ms": ms} for name, ms in costs.items()]

    whole = _whole(rows(1), rows(9), CARD)
    assert [(row["layers"], row["ms"], row["x_bf16"]) for row in whole] == [(32, 69, 1), (32, 21, 69 / 21)]


def test_targets_are_judged_on_what_was_measured():
    row = {"out": 8192, "columns": 28672, "tokens": 1, "bits": 1.0, "of_copy": 0.8, "x_cublas": 9.5}
    rows = [row | {"format": "1 plane"}, row | {"format": "1 plane g128", "of_copy": 0.6}]
    summary = {"machine": {"device": "Some GPU", "cuda": "13.0"}, "parts": {}, "results": {"kernels": {"rows": rows}}}
    judged = {row["what"]: (row["measured"], row["met"]) for row in verdicts(summary)}
    assert judged.pop("one token, 29 MB and more, 1 plane: share of copy bandwidth") == (0.6, False)
    assert judged.pop("8192 x 28672, one token, 1 plane: times cuBLAS") == (9.5, True)
    assert {*judged.values()} == {(None, None)}
    text = summary_text(summary | {"targets": verdicts(summary)})
    assert "| >= 0.7 | 0.6 | **missed** |" in text and "| >= 9 | 9.5 | met |" in text and "not measured" in text
    del summary["machine"]["cuda"]
    assert {row["met"] for row in verdicts(summary)} == {None}


@pytest.mark.parametrize(("original", "judged"), [(28.523, (41.0, True)), (30.0, (None, None))])
def test_the_best_rungs_are_judged_on_their_model_alone(original, judged):
    metrics = {"original": original, "packed": 41.0}
    metrics = {label: {"perplexity": [{"perplexity": value}]} for label, value in metrics.items()}
    rows = [{"bits": "2.05", "seconds": None, "metrics": metrics}]
    summary = {"machine": {"cuda": "13.0"}, "results": {"best": {"rows": rows}}}
    found = {row["what"]: (row["measured"], row["met"]) for row in verdicts(summary)}
    assert found["SmolLM2-135M, --bits 2.05 --effort best: perplexity"] == judged
    assert found["the first of them, measuring included: s"] == (None, None)  # it went on from an earlier run


def test_named_parts_have_the_time_that_they_may_take(parts, tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "PARTS", gpu.PARTS | {"deep": replace(gpu.PARTS["deep"], limit=1000, asked=True)})
    monkeypatch.setattr(
        gpu, "_run_part", lambda name, folder, task: {"status": "done", "seconds": task.seconds, "reason": ""}
    )
    summary = device_bench(tmp_path, CPU, ["deep"], say=lambda line: None)
    assert 990 < summary["parts"]["deep"]["seconds"] <= 1000


def test_every_part_has_what_runs_it():
    assert RUNS.keys() == PARTS.keys()


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_all_parts_run_on_a_cpu(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "PARTS", {name: replace(part, limit=600) for name, part in PARTS.items()})
    said, folder = [], tmp_path / "out"
    summary = device_bench(folder, CPU, seconds=1800, say=said.append)
    assert {name: part for name, part in summary["parts"].items() if part["status"] != "done"} == {}
    results = summary["results"]
    assert results.keys() == {name for name, part in PARTS.items() if not part.asked}
    assert {row["tokens"] for row in results["kernels"]["rows"]} == {1, 3}
    assert {(row["format"], row["way"]) for row in results["decode"]["whole"]} >= {("1 plane", "compiled")}
    assert results["compress"]["seconds"] > results["compress"]["blocks_seconds"] > 0
    assert results["deep"]["whole_seconds"] > results["deep"]["seconds"]
    assert len(results["trained"]["recipes"]) > 5 and results["trained"]["failed"] == 0
    assert results["tests"]["tests"] > 10 and results["tests"]["failed"] == 0
    for file in results["profile"]["files"]:
        assert "Self CPU" in (folder / file).read_text()
    assert len(results["profile"]["files"]) == 5


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_the_best_recipe_is_a_part_that_is_asked_for(tmp_path, save_model, tiny_config, text):
    model = save_model(tiny_config(), tmp_path / "model")
    command = ["bench", "gpu", "--device", "cpu", "--part", "best", "--model", model, "--calib", text, "--eval", text]
    result = CliRunner().invoke(app, [*map(str, command), "--out", str(tmp_path / "out")])
    assert result.exit_code == 0, result.output + (tmp_path / "out/best.log").read_text()
    best = json.loads((tmp_path / "out/best.json").read_text())
    (row,) = best["rows"]
    assert row["metrics"]["packed"]["fidelity"] and (tmp_path / "out/best-2.2/model.safetensors").exists()


def test_the_command_says_what_is_wrong():
    result = CliRunner().invoke(app, ["bench", "gpu", "--device", "cpu", "--part", "nothing"])
    assert result.exit_code == 2 and "--part is 'nothing', expected one of kernels" in " ".join(result.stderr.split())
