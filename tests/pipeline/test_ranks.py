"""One compression in several processes: the bytes of one process, whatever is killed, and one sentence of a failure."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from ultralowbit.checkpoint.activations import LANES, lanes_of
from ultralowbit.checkpoint.storage import sha256_file

BLOCKS = 8


@pytest.mark.parametrize("batches", [1, 2, 7, 8, 9, 63, 64])
def test_every_batch_lies_in_one_lane(batches):
    lanes = lanes_of(batches)
    assert [k for lane in lanes for k in lane] == list(range(batches))
    assert len(lanes) == min(LANES, batches) and all(len(lane) for lane in lanes)


@pytest.fixture(scope="module")
def deep(save_model, tiny_config, tmp_path_factory) -> Path:
    return save_model(tiny_config(num_hidden_layers=BLOCKS), tmp_path_factory.mktemp("deep") / "model")


def command(model: Path, out: Path, text: str, *more: str) -> list[str]:
    texts = ["--calib", text, "--samples", "12", "--length", "24", "--eval", "none", "--quiet", "--device", "cpu"]
    return ["-m", "ultralowbit", "compress", str(model), "--out", str(out), *texts, *more]


def ranks(n: int, arguments: list[str], **changes: str) -> subprocess.Popen[str]:
    start = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(n)] if n > 1 else []
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **changes}
    return subprocess.Popen(
        [sys.executable, *start, *arguments], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def run(n: int, arguments: list[str], **changes: str) -> tuple[int, str]:
    process = ranks(n, arguments, **changes)
    _, errors = process.communicate(timeout=300)
    return process.returncode, errors


def weights(out: Path) -> str:
    return sha256_file(out / "model.safetensors")


FAST = ("--bits", "2.9", "--effort", "fast")  # planes are allocated, errors are corrected, inputs are rotated


@pytest.mark.slow
@pytest.mark.parametrize("options", [FAST, ("--recipe", "ptq161-gptq", "--small")], ids=["ulb-fast", "ptq161-gptq"])
def test_any_number_of_processes_writes_the_same_bytes(options, deep, text, tmp_path):
    for n in (1, 2, 4):
        code, errors = run(n, command(deep, tmp_path / str(n), text, *options))
        assert code in (0, 3), errors
        assert (tmp_path / str(n) / "report.json").exists()
    assert weights(tmp_path / "1") == weights(tmp_path / "2") == weights(tmp_path / "4")


@pytest.mark.slow
@pytest.mark.parametrize("then", [1, 3])
def test_a_killed_rank_ends_the_others_and_any_number_goes_on(then, deep, text, tmp_path):
    arguments = command(deep, tmp_path / "killed", text, *FAST)
    process = ranks(2, arguments)
    job, committed = tmp_path / "killed.work" / "job.json", 0
    while committed < 2 and process.poll() is None:
        time.sleep(0.01)
        committed = json.loads(job.read_text())["blocks"] if job.exists() else 0
    victim = max(psutil.Process(process.pid).children(), key=lambda child: child.pid)
    victim.send_signal(signal.SIGKILL)
    _, errors = process.communicate(timeout=60)
    assert process.returncode and not (tmp_path / "killed").exists(), errors
    assert 2 <= json.loads(job.read_text())["blocks"] < BLOCKS
    code, errors = run(then, arguments)
    assert code == 0, errors
    assert run(1, command(deep, tmp_path / "whole", text, *FAST))[0] == 0
    assert weights(tmp_path / "killed") == weights(tmp_path / "whole")


@pytest.mark.slow
def test_a_mistake_is_said_once(deep, tmp_path):
    code, errors = run(2, command(deep, tmp_path / "out", "nowhere.txt", "--recipe", "sign-2"))
    assert code and errors.count("error: there is no file 'nowhere.txt'") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_ranks_that_disagree_are_told_before_the_work(deep, text, tmp_path):
    """Rank 1 is another program: the same with two threads, which sum in another order."""
    script = tmp_path / "program.py"
    script.write_text(
        "import os\n"
        "os.environ['OMP_NUM_THREADS'] = str(1 + int(os.environ['RANK']))\n"
        "from ultralowbit.cli.app import main\n"
        "main()\n"
    )
    arguments = command(deep, tmp_path / "out", text, "--recipe", "sign-2")
    code, errors = run(2, [str(script), *arguments[2:]])
    assert code and errors.count("rank 1 on") == 1 and "does not agree with rank 0" in errors and "threads" in errors
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("size", ["2", "many"])
def test_a_world_without_the_others_is_refused(size, deep, text, tmp_path):
    code, errors = run(1, command(deep, tmp_path / "out", text, "--recipe", "sign-2"), WORLD_SIZE=size, RANK="0")
    assert code == 2 and errors.startswith(f"error: WORLD_SIZE is {size}") and "Traceback" not in errors
