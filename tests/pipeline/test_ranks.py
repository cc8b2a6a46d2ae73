"""One compression in several processes: the bytes of one process, or near them where a whole model is trained,
whatever is killed, and one sentence of a failure."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import psutil
import pytest

import ultralowbit
from ultralowbit.checkpoint.activations import LANES, lanes_of
from ultralowbit.checkpoint.storage import sha256_file
from ultralowbit.pipeline.ranks import ConnectionLost, Ranks

BLOCKS = 6


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
    here = str(Path(ultralowbit.__file__).parents[1])  # which scripts in other folders would not find
    environment = {**os.environ, "PYTHONPATH": here, "OMP_NUM_THREADS": "1", **changes}
    return subprocess.Popen(
        [sys.executable, *start, *arguments], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def run(n: int, arguments: list[str], **changes: str) -> tuple[int, str]:
    process = ranks(n, arguments, **changes)
    _, errors = process.communicate(timeout=300)
    return process.returncode, errors


def weights(out: Path) -> str:
    return sha256_file(out / "model.safetensors")


# planes are allocated, errors are corrected, inputs are rotated, outputs are heard
FAST = ("--bits", "2.9", "--effort", "fast", "--set", "output_feedback.windows=5")
FOLDED = (*FAST, "--set", "rotate.inputs=folded")
# the head is fitted to what it reads
PTQ161 = ("--recipe", "ptq161-gptq", "--small", "--set", "embeddings={method: ints, bits: 4}")


@pytest.mark.slow
@pytest.mark.parametrize("options", [FOLDED, PTQ161], ids=["ulb-fast, folded", "ptq161-gptq"])
def test_any_number_of_processes_writes_the_same_bytes(options, forked, deep, text, tmp_path):
    for n in (1, 2, 4):  # the calibration text is in six lanes
        code, errors = forked(n, command(deep, tmp_path / str(n), text, *options), BATCH_TOKENS="48")
        assert code in (0, 3), errors
        assert (tmp_path / str(n) / "report.json").exists()
    assert weights(tmp_path / "1") == weights(tmp_path / "2") == weights(tmp_path / "4")


@pytest.fixture(scope="module")
def whole(forked, deep, text, tmp_path_factory) -> str:
    """The weights of a run that nothing stops."""
    out = tmp_path_factory.mktemp("whole") / "out"
    assert forked(1, command(deep, out, text, *FAST))[0] == 0
    return weights(out)


@pytest.mark.slow
@pytest.mark.parametrize(("rank", "then"), [(1, 1), (0, 3)])
def test_a_killed_rank_ends_the_others_and_any_number_goes_on(forked, deep, text, tmp_path, whole, rank, then):
    process = ranks(2, command(deep, tmp_path / "killed", text, *FAST))
    job, committed = tmp_path / "killed.work" / "job.json", 0
    while committed < 2 and process.poll() is None:
        time.sleep(0.01)
        committed = json.loads(job.read_text())["blocks"] if job.exists() else 0
    started = sorted(psutil.Process(process.pid).children(), key=lambda child: child.pid)
    started[rank].send_signal(signal.SIGKILL)
    _, errors = process.communicate(timeout=60)
    assert process.returncode and not (tmp_path / "killed").exists(), errors
    assert 2 <= json.loads(job.read_text())["blocks"] < BLOCKS
    arguments = command(deep, tmp_path / "killed", text, *FAST)
    arguments.remove("--quiet")
    code, errors = forked(then, arguments)
    assert code == 0 and "going on after block" in errors, errors
    assert weights(tmp_path / "killed") == whole


STEPS = 24


def distilled(folder: Path, latents: str) -> tuple[str, str]:
    """The option for a recipe that trains the latent weights and scales of all blocks; five of 12 windows are held
    out, so that neither they nor the last batch of an epoch can be dealt evenly."""
    training = {"lr": {"latent": 0.09, "scale": 0.05}, "relative": True, "steps": STEPS, "batch": 2, "accumulation": 2}
    stage = {"objective": {"kind": "kl"}, "held_out": 0.4, "latents": latents, "checkpointing": latents == "bf16"}
    path = folder / f"{latents}.yaml"
    path.write_text(json.dumps({"quantize": {"method": "sign"}, "finetune": stage | {"training": training}}))
    return "--recipe", str(path)


def finetuned(out: Path) -> dict[str, Any]:
    """What the manifest says of the training."""
    return json.loads((out / "manifest.json").read_text())["finetune"]


@pytest.fixture(scope="module")
def shallow(save_model, tiny_config, tmp_path_factory) -> Path:
    """Linears with 64, 32 and 100 rows: shards of three ranks differ in size."""
    config = tiny_config(num_hidden_layers=2, intermediate_size=100)
    return save_model(config, tmp_path_factory.mktemp("shallow") / "model")


@pytest.fixture(scope="module")
def trained(forked, shallow, text, tmp_path_factory) -> Callable[[str, int], Path]:
    """trained(latents, n): what n processes write that train latent weights of this dtype, once."""

    @cache
    def train(latents: str, n: int) -> Path:
        folder = tmp_path_factory.mktemp("trained")
        code, errors = forked(n, command(shallow, folder / "out", text, *distilled(folder, latents)))
        assert code == 0, errors
        return folder / "out"

    return train


def assert_near(together: dict[str, Any], one: dict[str, Any], latents: str) -> None:
    """Whether a training by several processes has gone as that by one.

    In fp32 gradients differ by some 2^-24 of themselves. AdamW's steps do not depend on how large gradients are, so
    that those whose sums cancel may step the other way and a few signs flip: a thousandth of what training gains is
    allowed for these. In bf16 each step is rounded at random, by other numbers on each rank, to a 256th of a weight:
    one training is to another as those of two seeds.
    """
    assert together["before"] == one["before"] and together["steps"] == one["steps"] == STEPS
    share, loss = (1e-3, 1e-4) if latents == "fp32" else (0.3, 0.03)
    assert together["after"] == pytest.approx(one["after"], abs=share * (one["before"] - one["after"]))
    losses = [[entry["loss"] for entry in fitted["history"]] for fitted in (together, one)]
    assert losses[0] == pytest.approx(losses[1], rel=loss)


@pytest.mark.slow
@pytest.mark.parametrize(("latents", "n"), [("fp32", 2), ("fp32", 3), ("bf16", 2)])
def test_ranks_that_train_together_come_near_one(latents, n, trained):
    alone, out = finetuned(trained(latents, 1)), trained(latents, n)
    fitted = finetuned(out)
    assert_near(fitted, alone, latents)
    (note,) = fitted["notes"]
    assert note.startswith(f"trained by {n} processes together") and not alone["notes"]
    assert note in (out / "report.md").read_text()


@pytest.fixture(scope="module")
def killing(tmp_path_factory) -> str:
    """The command as a program that saves its state after every step, and whose last rank is killed in the middle of
    training where KILLED is set."""
    script = tmp_path_factory.mktemp("killing") / "program.py"
    script.write_text(
        "import os, signal\n"
        "from ultralowbit.training import loop\n"
        "loop.fit.__kwdefaults__['save_seconds'] = 0.0\n"
        "step = loop._Fit._step\n"
        "def killed(self, k):\n"
        f"    if k == {STEPS // 2 + 1} and os.environ.get('KILLED') == os.environ['RANK']:\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "    step(self, k)\n"
        "loop._Fit._step = killed\n"
        "from ultralowbit.cli.app import main\n"
        "main()\n"
    )
    return str(script)


@pytest.mark.slow
@pytest.mark.parametrize("latents", ["fp32", "bf16"])
def test_any_number_goes_on_with_a_training_that_was_killed(latents, killing, forked, trained, shallow, text, tmp_path):
    def arguments(out: str) -> list[str]:
        return [killing, *command(shallow, tmp_path / out, text, *distilled(tmp_path, latents))[2:]]

    code, errors = forked(2, arguments("killed"), KILLED="1")
    assert code and errors.count("error: ") == 1 and not (tmp_path / "killed").exists(), errors
    for then in map(str, (1, 2, 3)):
        shutil.copytree(tmp_path / "killed.work", tmp_path / f"{then}.work")
        code, errors = forked(int(then), arguments(then))
        assert code == 0, errors
        assert_near(finetuned(tmp_path / then), finetuned(trained(latents, 1)), latents)
        assert "trained by 2 processes" in finetuned(tmp_path / then)["notes"][0]
    assert weights(trained(latents, 2)) == weights(tmp_path / "2")


def test_a_lost_connection_is_told_from_other_errors():
    gone = RuntimeError("[.../gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:4242")
    with pytest.raises(ConnectionLost, match="rank 0 has lost the connection"), Ranks().exchanging():
        raise gone
    with pytest.raises(RuntimeError, match="shapes"), Ranks().exchanging():
        raise RuntimeError("shapes cannot be multiplied")


@pytest.mark.slow
def test_a_dry_run_prints_once_and_for_a_rank(shallow, text, tmp_path):
    process = ranks(2, command(shallow, tmp_path / "out", text, *distilled(tmp_path, "fp32"), "--dry-run"))
    printed, errors = process.communicate(timeout=300)
    assert process.returncode == 0 and printed.count("  memory    ") == 1, errors
    assert printed.count("memory and time are those of one of 2 processes") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["fp32.yaml"]


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


def test_ranks_with_other_models_are_told_before_the_work(forked, deep, save_model, tiny_config, text, tmp_path):
    """Of the same shapes, so that nothing else differs."""
    other = save_model(tiny_config(num_hidden_layers=BLOCKS), tmp_path / "other")
    script = tmp_path / "program.py"
    script.write_text(
        "import os, sys\n"
        f"sys.argv[2:3] = [{str(other)!r}] if os.environ['RANK'] == '1' else sys.argv[2:3]\n"
        "from ultralowbit.cli.app import main\n"
        "main()\n"
    )
    code, errors = forked(2, [str(script), *command(deep, tmp_path / "out", text, "--recipe", "sign-2")[2:]])
    assert code and "rank 1 does not read the model that rank 0 reads" in errors and "Traceback" not in errors
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("size", ["2", "many"])
def test_a_world_without_the_others_is_refused(size, deep, text, tmp_path):
    code, errors = run(1, command(deep, tmp_path / "out", text, "--recipe", "sign-2"), WORLD_SIZE=size, RANK="0")
    assert code == 2 and errors.startswith(f"error: WORLD_SIZE is {size}") and "Traceback" not in errors
