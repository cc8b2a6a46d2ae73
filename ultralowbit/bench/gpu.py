"""All that there is to measure of a GPU, in a few minutes and one folder: `ultralowbit bench gpu`.

Each part runs in a process of its own with a limit of its own, so that none stops the others, and leaves NAME.json with
what it has measured so far and NAME.log with what it printed. summary.json and summary.md are written after each.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from ultralowbit.bench.gpu_targets import summary_text, verdicts
from ultralowbit.bench.kernels_gpu import machine
from ultralowbit.checkpoint.storage import read_json, write_atomic, write_json
from ultralowbit.errors import CheckpointError, InputError
from ultralowbit.system import pick_device
from ultralowbit.units import format_seconds

GRACE = 10.0
"""Seconds in which a part that is told to stop may write what it has."""
EIGHT_MINUTES = 480.0
LEAST = 15.0
"""Seconds below which a part is not begun: importing torch takes a third of them."""


@dataclass(frozen=True)
class Part:
    """What a part does, and for at most how many seconds; `asked`: it runs only where it is named."""

    does: str
    limit: float
    asked: bool = False


PARTS = {
    "kernels": Part("products beside cuBLAS and a copy of as many bytes", 75),
    "decode": Part("tokens a second in 7B's shape: launched by Python, as a CUDA graph, compiled", 100),
    "compress": Part("gptq-2bit on your model, or a random one of SmolLM2-135M's shape, and measuring it", 60),
    "deep": Part("sign-2-refined on some blocks of TinyLlama-1.1B's shape", 60),
    "trained": Part("every recipe that trains, a few steps of each", 45),
    "eval": Part("measuring, as a multiple of the forward passes", 25),
    "profile": Part("what a decoding step and the solving of a block spend their time on", 60),
    "tests": Part("the tests of kernels and of whole pipelines on the device", 240),
    "tune": Part("tiles for kernels/gpu/tuning.json", 60),
    "best": Part("ulb-best on your model, at 2.05 bits, then at 3.1, 2.6, 1.6 and 1.05", 3600, asked=True),
}
"""In the order in which they run: what says most comes first."""


@dataclass(frozen=True)
class Task:
    """What every part is told. calibration, evaluation: sources of text for `model`; `seconds` is the part's time."""

    device: str
    model: str | None = None
    calibration: str | None = None
    evaluation: str | None = None
    seconds: float = 0.0


def device_bench(
    folder: Path,
    task: Task,
    names: Sequence[str] = (),
    seconds: float | None = None,
    say: Callable[[str], object] = print,
) -> dict[str, Any]:
    """Run the named parts, all that need not be asked for by default, for at most `seconds` together: eight minutes, or
    where a part is named that has to be, as long as the named ones may take.

    What earlier runs left in `folder` stays, but for the parts that run again. Returns what summary.json holds. Raises
    `InputError`, before the work, for a part that is not known, a folder of something else, or one that holds results
    of another machine.
    """
    folder = folder.expanduser().absolute()  # for processes that run elsewhere
    names = list(dict.fromkeys(names)) or [name for name, part in PARTS.items() if not part.asked]
    for name in names:
        if name not in PARTS:
            raise InputError(f"--part is {name!r}, expected one of {', '.join(PARTS)}")
    if "best" in names and task.model is None:
        raise InputError(
            "--part best compresses a model of yours: give --model FOLDER, and --calib FILE without network"
        )
    summary = _begin(folder, machine(pick_device(task.device)))
    say(", ".join(f"{key} {value}" for key, value in summary["machine"].items()))
    if seconds is None:
        asked = any(PARTS[name].asked for name in names)
        seconds = sum(PARTS[name].limit for name in names) + GRACE if asked else EIGHT_MINUTES
    end = time.monotonic() + seconds
    for i, name in enumerate(names, 1):
        limit = min(PARTS[name].limit, end - time.monotonic() - GRACE)
        if limit < LEAST:
            summary["parts"][name] = {"status": "left out", "seconds": 0.0, "reason": "no time was left for it"}
            say(f"[{i}/{len(names)}] {name}: left out, no time is left")
        else:
            say(f"[{i}/{len(names)}] {name}: {PARTS[name].does}; at most {format_seconds(limit)}")
            summary["parts"][name] = {"status": "interrupted", "seconds": 0.0, "reason": ""}
            try:
                summary["parts"][name] = _run_part(name, folder, replace(task, seconds=limit))
            finally:
                _write(folder, summary)
            outcome = summary["parts"][name]
            say(f"      {outcome['status']} after {format_seconds(outcome['seconds'])}{_because(outcome)}")
        _write(folder, summary)
    return summary


def _because(outcome: dict[str, Any]) -> str:
    return f": {outcome['reason']}" if outcome["reason"] else ""


def _begin(folder: Path, about: dict[str, str]) -> dict[str, Any]:
    """The summary to go on with: of an earlier run on the same machine, or a new one in an empty folder."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{folder} cannot be made ({error.strerror}): name another folder") from error
    file = folder / "summary.json"
    if not file.exists():
        if any(folder.iterdir()):
            raise InputError(f"{folder} holds files, but no summary.json of this benchmark: name another folder")
        return {"machine": about, "parts": {}, "results": {}, "targets": []}
    try:
        summary = read_json(file, "name another folder")
    except CheckpointError as error:
        raise InputError(str(error)) from error
    if not {"machine", "parts", "results"} <= summary.keys():
        raise InputError(f"{file} is not a summary of this benchmark: name another folder")
    differing = [key for key in about if key != "date" and about[key] != summary["machine"].get(key)]
    if differing:
        key = differing[0]
        raise InputError(
            f"{folder} holds results of {key} {summary['machine'].get(key)}, and here {key} is {about[key]}: name "
            "another folder"
        )
    summary["parts"] = {name: summary["parts"][name] for name in PARTS if name in summary["parts"]}
    return summary


def _command(name: str, folder: Path, task: Task) -> list[str]:
    """What runs a part, see `gpu_parts.main`."""
    return [sys.executable, "-P", "-m", "ultralowbit.bench.gpu_parts", name, str(folder), json.dumps(asdict(task))]


def _run_part(name: str, folder: Path, task: Task) -> dict[str, Any]:
    """Run one part and stop it at its limit; what became of it."""
    (folder / f"{name}.json").unlink(missing_ok=True)
    log = folder / f"{name}.log"
    began = time.monotonic()
    with log.open("wb") as stream, tempfile.TemporaryDirectory(prefix="ultralowbit-") as scratch:
        environment = {
            **os.environ,
            "TMPDIR": scratch,
            "PYTHONUNBUFFERED": "1",
        }  # what is killed leaves no models behind
        process = subprocess.Popen(
            _command(name, folder, task),
            stdout=stream,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,
        )
        try:
            code: int | None = process.wait(task.seconds)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            _stop(process)
    outcome = {"seconds": round(time.monotonic() - began, 1), "reason": ""}
    if code is None:
        return outcome | {"status": "stopped", "reason": f"its {format_seconds(task.seconds)} were over"}
    if code:
        return outcome | {"status": "failed", "reason": _last_line(log) or f"exit code {code}"}
    return outcome | {"status": "done"}


def _stop(process: subprocess.Popen) -> None:
    """Interrupt a part that still runs, and end all that it started if it does not leave in time."""
    if process.poll() is not None:
        return
    process.send_signal(signal.SIGTERM)
    with suppress(subprocess.TimeoutExpired):
        process.wait(GRACE)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)  # a part leads a group of its own
    process.wait()


def _last_line(log: Path) -> str:
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1][:300] if lines else ""


def _write(folder: Path, summary: dict[str, Any]) -> None:
    """Write summary.json and summary.md from what the parts have left so far."""
    for name in summary["parts"]:
        file = folder / f"{name}.json"
        if file.exists():
            summary["results"][name] = json.loads(file.read_text())
        else:
            summary["results"].pop(name, None)
    summary["targets"] = verdicts(summary)
    write_json(folder / "summary.json", summary)
    write_atomic(folder / "summary.md", summary_text(summary).encode())
