"""The command does what it says, in one sentence when it cannot, and always with the right exit code."""

from __future__ import annotations

import errno
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import ultralowbit
from ultralowbit.checkpoint.size import measure_size
from ultralowbit.cli.app import app
from ultralowbit.cli.errors import explain
from ultralowbit.demo import run as demo
from ultralowbit.demo.run import run_demo
from ultralowbit.errors import DiskFull
from ultralowbit.methods.statistics import InputStats, SingularHessian
from ultralowbit.nn.linear import PackedLinear
from ultralowbit.pipeline.verify import verify
from ultralowbit.report.gates import Continuation
from ultralowbit.report.run import Texts

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "COLUMNS": "80"}


@pytest.fixture
def run(monkeypatch, tmp_path):
    """Invoke the command in an empty folder."""
    monkeypatch.chdir(tmp_path)
    runner = CliRunner(env={"COLUMNS": "80"})
    return lambda *args: runner.invoke(app, [str(arg) for arg in args])


def options(text: str, evaluate: str | None = None) -> list[str]:
    calibration = ["--calib", text, "--samples", "8", "--length", "32"]
    return [*calibration, "--eval", evaluate or text, "--max-tokens", "640", "--device", "cpu"]


def spawn(*args: str, cwd: Path) -> subprocess.Popen:
    command = [sys.executable, "-m", "ultralowbit", *args]
    return subprocess.Popen(command, cwd=cwd, env=ENVIRONMENT, stdout=-1, stderr=-1, text=True)


def test_help_and_version(run):
    assert run("--version").stdout.strip() == f"ultralowbit {ultralowbit.__version__}"
    listed = run().stdout
    for command in ("compress", "inspect", "verify", "eval", "compare", "generate", "recipes", "demo", "bench"):
        assert command in listed
        examples = run(command, "--help").stdout
        assert f"ultralowbit {command}" in examples or "Commands" in examples


def test_compress_reports_what_is_stored(run, model, text, tmp_path):
    result = run("compress", model, "--recipe", "sign-2", *options(text))
    assert result.exit_code == 0, result.output
    folder = tmp_path / "tiny-sign-2"  # the default name
    report = json.loads((folder / "report.json").read_text(), parse_constant=pytest.fail)
    size = measure_size(folder).to_dict()
    layers = {layer["name"]: layer for layer in size.pop("layers")}
    assert size.pop("outside") == []
    assert report["packed"]["size"] == size
    assert {layer["name"] for layer in report["layers"]} == layers.keys()
    assert all(layer["bytes"] == layers[layer["name"]]["bytes"] for layer in report["layers"])
    errors = [layer["error"] for layer in report["layers"]]
    assert errors == sorted(errors, reverse=True)
    before, after = (report[row]["metrics"]["perplexity"][0] for row in ("original", "packed"))
    for key in ("source", "windows", "context", "tokens", "dtype", "bos", "sha256"):
        assert before[key] == after[key]
    assert (after["windows"], after["context"], after["dtype"]) == (10, 64, "float32")
    assert report["command"].startswith("ultralowbit compress ") and "--recipe sign-2" in report["command"]
    assert "sign-2" in result.stdout and f"{size['linear_bits_per_weight']:.3f}" in result.stdout
    assert verify(folder) == []  # the report is no stranger in the folder
    markdown = (folder / "report.md").read_text()
    assert report["command"] in markdown and after["sha256"][:12] in markdown and "ultralowbit.load" in markdown


def test_a_finished_folder_is_measured_only_where_it_was_not(run, model, text, tmp_path, monkeypatch):
    assert run("compress", model, "--recipe", "rtn-4bit", *options(text)).exit_code == 0
    first = json.loads((tmp_path / "tiny-rtn-4bit/report.json").read_text())
    monkeypatch.setattr("ultralowbit.report.measure.open_model", lambda *a: pytest.fail("measured again"))
    again = run("compress", model, "--recipe", "rtn-4bit", *options(text))
    assert again.exit_code == 0, again.output
    second = json.loads((tmp_path / "tiny-rtn-4bit/report.json").read_text())
    assert second["packed"] == first["packed"] and second["original"] == first["original"]
    none = run("compress", model, "--recipe", "rtn-4bit", *options(text, "none"))
    assert none.exit_code == 0 and "perplexity" not in none.stdout
    report = json.loads((tmp_path / "tiny-rtn-4bit/report.json").read_text())
    assert report["packed"]["metrics"] == {}
    assert "Nothing was measured." in (tmp_path / "tiny-rtn-4bit/report.md").read_text()


def test_an_original_that_does_not_fit_is_left_out(run, model, text, tmp_path, monkeypatch):
    monkeypatch.setattr("ultralowbit.eval.runner.available_memory", lambda: 1000)
    result = run("compress", model, "--recipe", "rtn-4bit", *options(text))
    assert result.exit_code == 0, result.output
    assert "not measured: it needs" in result.stdout and "WARNING" in result.stderr
    report = json.loads((tmp_path / "tiny-rtn-4bit/report.json").read_text())
    assert report["original"]["metrics"] == {} and report["packed"]["metrics"].keys() == {"perplexity"}
    assert "not measured: it needs" in (tmp_path / "tiny-rtn-4bit/report.md").read_text()
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    run("compress", model, "--recipe", "rtn-4bit", *options(text))  # there is room now
    again = json.loads((tmp_path / "tiny-rtn-4bit/report.json").read_text())
    assert again["original"]["metrics"].keys() == {"perplexity"}
    assert again["packed"]["metrics"]["perplexity"] == report["packed"]["metrics"]["perplexity"]
    assert again["packed"]["metrics"]["fidelity"]


def test_a_killed_report_is_made_up_for(run, model, text, tmp_path, monkeypatch):
    def stop(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("ultralowbit.report.measure.measure_alone", stop)
    result = run("compress", model, "--recipe", "rtn-4bit", *options(text))
    assert result.exit_code == 130 and "to go on, run:" in result.stderr
    assert verify(tmp_path / "tiny-rtn-4bit") == []
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    assert run("compress", model, "--recipe", "rtn-4bit", *options(text)).exit_code == 0
    assert (tmp_path / "tiny-rtn-4bit/report.md").exists()


def test_mistakes_are_one_sentence_and_exit_2(run, model, text, tmp_path):
    (tmp_path / "mine.yaml").write_text("quantize: {method: sign, plane: 2}\ncalibraton: {}\n")
    for args, said in (
        (["compress", model, "--recipe", "mine.yaml"], ["did you mean planes?", "did you mean calibration?"]),
        (["compress", model, "--recipe", "sign2"], ["did you mean 'sign-2'?"]),
        (["compress", model, "--recipe", "sign-2", "--set", "quantize.plane=2"], ["did you mean planes?"]),
        (["compress", "./nowhere", "--recipe", "sign-2"], ["no such folder"]),
        (["compress", model, "--recipe", "sign-2", *options(text, "nowhere.txt")], ["no file 'nowhere.txt'"]),
        (["compress", model, "--recipe", "sign-2", "--eval", "auto", "--eval", text], ["stand alone"]),
        (["compress", model, "--recipe", "sign-2", *options(text), "--context", "65"], ["the model takes 2 to 64"]),
        (["compress", model, "--recipe", "sign-2", "--device", "toaster"], ["try --device cpu"]),
        (["eval", model, "--ppl", text, "--dtype", "int3"], ["expected one of auto, float32"]),
        (["eval", model], ["name a text with --ppl, or tasks with --tasks"]),
        (["eval", model, "--tasks", "piqa", "--fidelity", model], ["name one with --ppl"]),
        (["eval", model, "--tasks", "piqa", "--batch-size", "0"], ["expected auto or a number from 1"]),
        (["eval", model, "--ppl", text, "--json", "none/x.json"], ["lies in no folder"]),
    ):
        result = run(*args)
        assert result.exit_code == 2, (args, result.output)
        assert result.stdout == "" and result.stderr.count("\n") == 1 and "Traceback" not in result.stderr
        assert all(part in result.stderr for part in said), result.stderr
    assert run("compress", model).exit_code == 2  # no recipe
    assert "Did you mean 'compress'" in run("compres").stderr
    assert not list(tmp_path.glob("tiny*"))  # nothing was begun


@pytest.mark.parametrize(
    ("command", "words"),
    [
        (["verify", "MODEL"], "wrote (it has no manifest.json): give"),
        (["verify", "MODEL/model.safetensors"], "wrote (it is a file): give"),
        (["export", "MODEL", "--to", "dense", "--out", "x"], "wrote (it has no manifest.json): give"),
        (["serve", "./nope"], "nope is not the folder of a checkpoint (it is not there): give"),
        (["inspect", "MODEL/model.safetensors"], "model.safetensors is not the folder of a checkpoint (it is a file)"),
    ],
)
def test_what_is_no_checkpoint_is_wrong_input(run, model, command, words):
    result = run(*(part.replace("MODEL", model) for part in command))
    assert result.exit_code == 2 and words in result.stderr and result.stderr.count("\n") == 1


def test_quality_gates_exit_4_after_everything_is_written(run, model, text, tmp_path):
    compress = ["compress", model, "--recipe", "sign-1", *options(text)]
    result = run(*compress, "--max-ppl-ratio", "0.1", "--max-kl", "1e-4")
    assert result.exit_code == 4, result.output
    report = json.loads((tmp_path / "tiny-sign-1/report.json").read_text())
    (before,), (after,), (near,) = (
        report[row]["metrics"][what]
        for row, what in (("original", "perplexity"), ("packed", "perplexity"), ("packed", "fidelity"))
    )
    assert near["sha256"] == after["sha256"] and near["kl_mean"] > 0
    assert report["limits"] == {"ppl_ratio": 0.1, "kl": 1e-4}  # a random model does not get worse
    ratio, kl = report["exceeded"]
    assert f"{after['perplexity'] / before['perplexity']:.2f} times" in ratio and f"{near['kl_mean']:.3g} nats" in kl
    printed = " ".join(result.stdout.replace("│", " ").split())
    assert "QUALITY GATE FAILED" in printed and "--set quantize.planes=2" in printed and "--effort fast" in printed
    assert "Quality gate failed" in (tmp_path / "tiny-sign-1/report.md").read_text()
    assert verify(tmp_path / "tiny-sign-1") == []
    assert run(*compress, "--max-ppl-ratio", "0.1").exit_code == 4  # and stays so
    assert run(*compress, "--max-ppl-ratio", "1000", "--max-kl", "1000").exit_code == 0
    none = run(*compress[:-6], "--eval", "none", "--max-kl", "1", "--out", "other")
    assert none.exit_code == 2 and "name one with --eval" in none.stderr and not (tmp_path / "other").exists()


def test_a_gate_that_cannot_be_checked_does_not_pass(run, model, text, tmp_path, monkeypatch):
    monkeypatch.setattr("ultralowbit.eval.runner.available_memory", lambda: 1000)
    result = run("compress", model, "--recipe", "rtn-4bit", *options(text), "--max-ppl-ratio", "3", "--max-kl", "1")
    assert result.exit_code == 4 and result.stdout.count("cannot be checked") == 2


def test_a_model_that_repeats_a_token_is_called_collapsed(run, model, text, tmp_path, monkeypatch):
    written = iter([["b"] * 24, [*"abcdefgh"] * 3])  # the packed model, then the original

    def repeat(net, tokenizer, starts, progress):
        words = next(written)
        return [Continuation("abc", "".join(words), max(map(words.count, words)) / len(words))]

    monkeypatch.setattr("ultralowbit.report.measure.PROMPTS", ())
    monkeypatch.setattr("ultralowbit.report.measure.continuations", repeat)
    result = run("compress", model, "--recipe", "rtn-4bit", *options(text))
    assert result.exit_code == 0 and "After 'abc' the packed model writes 'bbbbbbbb" in result.stdout
    report = json.loads((tmp_path / "tiny-rtn-4bit/report.json").read_text())
    assert report["continuation"]["repeats"] and next(written, None) is None
    assert "**Collapsed.**" in (tmp_path / "tiny-rtn-4bit/report.md").read_text()
    written = iter([["b"] * 24, ["c"] * 24])  # the original does so too
    result = run("compress", model, "--recipe", "rtn-4bit", *options(text), "--restart")
    assert "the packed model writes" not in result.stdout and next(written, None) is None


def test_the_zeros_of_both_planes_are_reported(run, model, text, tmp_path):
    only_solved = ["--set", "blockwise=null", "--set", "finetune=null"]
    result = run("compress", model, "--recipe", "db-llm", *options(text), *only_solved, "--out", "p")
    assert result.exit_code == 0, result.output
    shown = json.loads((tmp_path / "p/report.json").read_text())["packed"]["plane_sparsity"]
    linears = [m.packed for m in ultralowbit.load("p").modules() if isinstance(m, PackedLinear)]
    sizes = torch.tensor([packed.shape[0] * packed.shape[1] for packed in linears], dtype=torch.float64)
    shares = torch.tensor([packed.sparsity for packed in linears], dtype=torch.float64)  # [linears, planes]
    assert shown == pytest.approx((sizes @ shares / sizes.sum()).tolist()) and 0 < shown[1] < shown[0] < 1
    line = f"{shown[0]:.1%} of plane 1, {shown[1]:.1%} of plane 2"
    assert line in " ".join(result.stdout.split()) and line in (tmp_path / "p/report.md").read_text()


def test_fallbacks_are_loud_and_exit_3(run, model, text, tmp_path, monkeypatch):
    def broken(self, *key):
        raise SingularHessian("its Hessian is broken")

    monkeypatch.setattr(InputStats, "_factorise", broken)
    result = run("compress", model, "--recipe", "sign-1", *options(text))
    assert result.exit_code == 3
    assert "21 OF 21 LINEARS FELL BACK" in result.stdout and "WARNING" in result.stderr
    report = json.loads((tmp_path / "tiny-sign-1/report.json").read_text())
    assert len(report["fallbacks"]) == 21
    markdown = (tmp_path / "tiny-sign-1/report.md").read_text()
    assert "21 of 21 Linears were rounded to nearest" in markdown and "its Hessian is broken" in markdown
    assert run("compress", model, "--recipe", "sign-1", *options(text)).exit_code == 3  # and stays so


def test_errors_in_words(monkeypatch, run):
    full = OSError(errno.ENOSPC, "No space left on device", "/x/y")
    assert explain(full) == "no space is left to write /x/y: make room, then run the same command to go on"
    assert explain(DiskFull(errno.ENOSPC, "no space left to write /x")) == "no space left to write /x"
    full = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.")
    assert explain(full).startswith("out of memory while running this command (CUDA out of memory): free some")
    assert explain(PermissionError(errno.EACCES, "Permission denied", "/x")) == "Permission denied: /x"
    assert explain(KeyError("a")).startswith("unexpected KeyError: 'a'")
    monkeypatch.setattr("ultralowbit.checkpoint.size.measure_size", lambda folder: 1 / 0)
    assert (result := run("inspect", ".")).exit_code == 1 and "unexpected ZeroDivisionError" in result.stderr
    assert isinstance(run("--debug", "inspect", ".").exception, ZeroDivisionError)


def test_inspect_verify_eval_generate(run, model, text, tmp_path):
    assert run("compress", model, "--recipe", "gptq-2bit", *options(text), "--out", "p").exit_code == 0
    size = measure_size(tmp_path / "p")
    printed = run("inspect", "p").stdout
    for part in (f"{size.linear_bits_per_weight:.3f}", f"{size.model_bits_per_weight:.3f}", f"{size.file_bytes:,}"):
        assert part in printed
    assert all(layer.name in printed for layer in size.layers)
    assert json.loads(run("inspect", "p", "--json").stdout) == json.loads(json.dumps(size.to_dict()))
    assert "whole model" in run("inspect", model).stdout

    result = run("eval", model, "p", "--ppl", text, "--max-tokens", "640", "--json", "ppl.json", "--device", "cpu")
    assert result.exit_code == 0, result.output
    rows = json.loads((tmp_path / "ppl.json").read_text())["results"]
    assert [row["model"] for row in rows] == [model, "p"]
    original, packed = (row["metrics"]["perplexity"][0] for row in rows)
    assert original["sha256"] == packed["sha256"] and packed["context"] == 64
    report = json.loads((tmp_path / "p/report.json").read_text())
    assert [original, packed] == [report[row]["metrics"]["perplexity"][0] for row in ("original", "packed")]

    state = torch.random.get_rng_state()
    for folder in ("p", model):
        greedy = run("generate", folder, "w1 w2 w3", "--max-new-tokens", "5")
        assert greedy.exit_code == 0 and len(greedy.stdout) > len("w1 w2 w3 \n"), greedy.output
    assert run("generate", "p", "w1 w2 w3", "--max-new-tokens", "5", "--int8").exit_code == 0
    sampled = ["generate", "p", "w1", "--max-new-tokens", "8", "--temperature", "2", "--seed"]
    assert run(*sampled, "1").stdout == run(*sampled, "1").stdout != run(*sampled, "2").stdout
    assert torch.equal(state, torch.random.get_rng_state())

    assert run("verify", "p").exit_code == 0
    shard = sorted((tmp_path / "p").glob("*.safetensors"))[0]
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    broken = run("verify", "p")
    assert broken.exit_code == 1 and shard.name in broken.stdout
    shard.write_bytes(data[:-8])
    cut = run("generate", "p", "w1")
    assert cut.exit_code == 1 and shard.name in cut.stderr


def test_recipes(run, tmp_path):
    listed = run("recipes", "list").stdout
    assert "gptq-2bit" in listed and "sign-1" in listed
    shown = run("recipes", "show", "sign-2").stdout
    (tmp_path / "again.yaml").write_text(shown)
    assert run("recipes", "show", "again.yaml").stdout.splitlines()[1:] == shown.splitlines()[1:]
    assert run("recipes", "show", "nothing").exit_code == 2


def test_dry_run_writes_nothing(run, model, text, tmp_path):
    result = run("compress", model, "--recipe", "sign-1", *options(text), "--dry-run")
    assert result.exit_code == 0 and "bits per weight" in result.stdout
    assert "packed blocks and the files they are merged into" in result.stdout
    assert f"measuring on {text} is not in the estimates" in " ".join(result.stdout.split())
    assert not list(tmp_path.iterdir())
    none = run("compress", model, "--recipe", "sign-1", *options(text)[:-6], "--eval", "none", "--dry-run")
    assert none.exit_code == 0 and "measuring on" not in none.stdout


def test_a_dry_run_refuses_a_place_that_cannot_be_written(run, model, text, tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine.work").mkdir()
    (tmp_path / "mine.work/notes.txt").write_text("")
    for out, words in (("file/a/b", "cannot be written"), ("file", "is a file"), ("mine", "not ours")):
        result = run("compress", model, "--recipe", "rtn-4bit", "--out", out, "--dry-run")
        assert result.exit_code == 2 and words in result.stderr and "choose another --out" in result.stderr
    assert len(list(tmp_path.rglob("*"))) == 4


def test_demo_is_resumed_and_then_instant(run, model, text, tmp_path, monkeypatch):
    monkeypatch.setattr(
        demo, "SETTINGS", (f"calibration.source={text}", "calibration.samples=4", "calibration.length=32")
    )
    monkeypatch.setattr(demo, "PROMPT", "w1 w2")
    monkeypatch.setattr(demo, "TEXTS", Texts((text,), None, 640))
    monkeypatch.setitem(run_demo.__kwdefaults__, "checkpoint", Path(model))
    monkeypatch.setitem(run_demo.__kwdefaults__, "recipes", ("gptq-3bit", "sign-1"))
    result = run("demo", "--device", "cpu")
    assert result.exit_code == 0, result.output
    for part in ("original", "gptq-3bit", "sign-1", "w1 w2"):
        assert part in result.stdout
    report = json.loads((tmp_path / "ultralowbit-demo/report.json").read_text())
    assert [row["label"] for row in report["rows"]] == ["original", "gptq-3bit", "sign-1"]
    monkeypatch.setattr(demo, "compress_and_measure", lambda *a, **k: pytest.fail("compressed again"))
    assert run("demo", "--device", "cpu").stdout == result.stdout


def test_interrupted_run_prints_what_resumes_it(model, text, tmp_path):
    """A process of its own, ended after its first block."""
    arguments = ["compress", model, "--recipe", "sign-2", *options(text), "--set", "quantize.iterations=100"]
    process = spawn(*arguments, "--out", "a", "--restart", cwd=tmp_path)
    job = tmp_path / "a.work" / "job.json"
    while not job.exists() or not json.loads(job.read_text())["blocks"]:
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert "Traceback" not in err
    printed = err.strip().splitlines()[-1].strip()
    assert printed == shlex.join(["ultralowbit", *arguments, "--out", "a"])  # and not --restart
    assert not (tmp_path / "a").exists()

    resumed = spawn(*shlex.split(printed)[1:], cwd=tmp_path)
    out, err = resumed.communicate(timeout=120)
    assert resumed.returncode == 0, err
    assert "going on after block" in err and "perplexity" in out
    assert "\x1b" not in out + err  # plain lines where nobody watches
    assert verify(tmp_path / "a") == []


def test_an_interrupt_that_a_finalizer_swallows_is_sent_again():
    """And ends a wait in the kernel at once."""
    script = """
import signal, sys, time
from ultralowbit.cli.app import _keep_interrupts
_keep_interrupts()
class Finalized:
    def __del__(self):
        signal.raise_signal(signal.SIGTERM)
try:
    Finalized()
    time.sleep(60)
except KeyboardInterrupt:
    sys.exit(130)
"""
    assert subprocess.run([sys.executable, "-c", script], timeout=45).returncode == 130


@pytest.mark.parametrize("name", ["out [x]", "a[/o]b", "[bold]", "esc\x1b[31m"])
def test_names_are_printed_as_they_are_and_drive_no_terminal(run, model, text, tmp_path, name):
    result = run("compress", model, "--recipe", "rtn-4bit", "--out", name, *options(text, "none"))
    assert result.exit_code == 0, result.output
    assert (tmp_path / name / "manifest.json").exists()
    assert name.replace("\x1b", "\\x1b") in result.stdout and "\x1b" not in result.output
    result = run("verify", name, "-q")
    assert result.exit_code == 0 and name.replace("\x1b", "\\x1b") in result.stdout
    result = run("verify", f"{name}-gone", "-q")
    assert result.exit_code == 2 and name.replace("\x1b", "\\x1b") in result.stderr


def test_names_of_texts_and_models_are_printed_as_they_are(run, model, text, tmp_path):
    (tmp_path / "[red] m").symlink_to(model)
    (tmp_path / "a [x].txt").write_text(Path(text).read_text())
    measured = ["--eval", "a [x].txt", "--context", "16", "--max-tokens", "64", "--device", "cpu", "-q"]
    done = run("compress", "[red] m", "--recipe", "rtn-4bit", "--out", "[p]", *measured)
    assert done.exit_code == 0, done.output
    assert "a [x].txt" in " ".join(done.stdout.split())
    ppl = ["--ppl", *measured[1:]]
    for args, names in (
        (["eval", "[red] m", "[p]", *ppl], ["[red] m", "[p]", "a [x].txt"]),
        (["compare", "[p]", "--out", "page"], ["[x].txt"]),
        (["inspect", "[p]"], ["q_proj"]),
    ):
        shown = run(*args)
        assert shown.exit_code == 0, shown.output
        for name in names:
            assert name in " ".join(shown.stdout.split()), (args, shown.stdout)
