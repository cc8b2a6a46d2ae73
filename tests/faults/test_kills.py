"""Killed at any moment, the same command goes on and ends with the same bytes."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import pytest

from ultralowbit.pipeline.compress import compress
from ultralowbit.pipeline.verify import verify
from ultralowbit.recipe import Recipe

FILE_EVENTS = (
    "open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.truncate", "shutil.rmtree", "shutil.copyfile",
)  # fmt: skip
PLACES = ["new", "over an old checkpoint", "inside"]
"""Where a run writes: a new folder, one that `--restart` replaces, one that cannot be renamed."""


NOTES = ("manifest.json", ".ultralowbit-local.json")
"""Files that hold what was measured while they were made."""
MEASURED = ("seconds", "block_seconds", "peak_memory_bytes")


def timeless(value: Any) -> Any:
    """Notes without what was measured."""
    if isinstance(value, dict):
        return {k: timeless(v) for k, v in value.items() if k not in MEASURED}
    return [timeless(v) for v in value] if isinstance(value, list) else value


def is_same(folder: Path, expected: Path) -> bool:
    """Whether two checkpoints hold the same files with the same bytes, but for what was measured."""
    if sorted(p.name for p in folder.iterdir()) != sorted(p.name for p in expected.iterdir()):
        return False
    mine, theirs = ([timeless(json.loads((f / name).read_text())) for name in NOTES] for f in (folder, expected))
    others = [path.name for path in expected.iterdir() if path.name not in NOTES]
    return mine == theirs and all((folder / name).read_bytes() == (expected / name).read_bytes() for name in others)


class Torn:
    """A file whose every write may be cut in its middle."""

    def __init__(self, file: IO[bytes], operation: Callable[..., None]) -> None:
        self.file, self.operation = file, operation

    def write(self, data: bytes) -> int:
        self.operation(lambda: (self.file.write(data[: len(data) // 2]), self.file.flush()))
        return self.file.write(data)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)

    def __enter__(self) -> Torn:
        return self

    def __exit__(self, *error: object) -> None:
        self.file.close()


def _count_writes(operation: Callable[..., None]) -> None:
    """Tell of what Python has no audit event for: writing to files, and waiting until they are on disk."""
    opened, synced, reserved = Path.open, os.fsync, os.posix_fallocate
    Path.open = lambda path, mode="r", *args, **options: (
        Torn(opened(path, mode, *args, **options), operation) if "w" in mode else opened(path, mode, *args, **options)
    )
    os.fsync = lambda file: (operation(), synced(file))[1]
    os.posix_fallocate = lambda *args: (operation(), reserved(*args))[1]


def in_a_killed_process(run: Callable[[], Any], event: int | None = None, seconds: float | None = None) -> bool:
    """Run in a forked process that gets SIGKILL just before its `event`-th operation on a file of the current folder,
    half-way through it where that is a write, or after so many `seconds`; whether it was killed, False if it came to
    its end first."""
    folder = os.getcwd()
    pid = os.fork()
    if pid == 0:
        left = event

        def operation(half: Callable[[], object] = lambda: None) -> None:
            nonlocal left
            if left is not None:
                left -= 1
                if left < 0:
                    half()
                    os.kill(os.getpid(), signal.SIGKILL)

        def hook(name: str, args: tuple[Any, ...]) -> None:
            if name in FILE_EVENTS and any(str(a).startswith(("out", folder)) for a in args):
                operation()

        try:
            sys.addaudithook(hook)
            _count_writes(operation)
            run()
            os._exit(0)
        except BaseException as e:
            print(repr(e), file=sys.stderr, flush=True)
            os._exit(1)
    if seconds is not None:
        time.sleep(seconds)
        os.kill(pid, signal.SIGKILL)
    _, status = os.waitpid(pid, 0)
    if os.WIFSIGNALED(status):
        assert os.WTERMSIG(status) == signal.SIGKILL
        return True
    assert os.WEXITSTATUS(status) == 0, "the run failed, see stderr"
    return False


@pytest.fixture
def place(source, every_format, undisturbed, old, tmp_path, monkeypatch) -> Callable[..., bool | None]:
    """place(where, event=... or seconds=...): kill a run there, look at what it has left, and run it again; whether the
    result is as without the kill, None if the run came to its end first."""

    def run(where: str, **when: Any) -> bool | None:
        root = tmp_path / "root"
        shutil.rmtree(root, ignore_errors=True)
        root.mkdir()
        monkeypatch.chdir(root)
        again = {}
        if where == "over an old checkpoint":
            shutil.copytree(old, root / "out")
            again = {"restart": True}
        if where == "inside":
            (root / "out").mkdir()
            monkeypatch.setattr("ultralowbit.checkpoint.job._can_be_renamed", lambda out: False)
        if not in_a_killed_process(lambda: compress(str(source), every_format, "out", **again), **when):
            return None
        if (root / "out/manifest.json").exists() and where != "inside":
            assert verify("out") == []  # whole as soon as it is there: the old one or the new one
        begun = (root / "out.work/job.json").exists() or not (root / "out").exists()
        compress(str(source), every_format, "out", restart=bool(again) and not begun)
        left = {path.name for path in root.iterdir()} | {path.name for path in (root / "out").glob(".ultralowbit-work")}
        assert left == {"out"}
        return is_same(root / "out", undisturbed)

    return run


@pytest.fixture(scope="session")
def old(source, tmp_path_factory) -> Path:
    """A finished checkpoint of another recipe."""
    other = Recipe.model_validate({"name": "old", "quantize": {"method": "rtn", "bits": 4}})
    return compress(str(source), other, tmp_path_factory.mktemp("old") / "out").folder


@pytest.mark.parametrize("where", PLACES)
@pytest.mark.parametrize("step", [23, pytest.param(1, marks=pytest.mark.campaign)], ids=["some", "every"])
def test_killed_before_an_operation_on_a_file(place, campaign, where, step):
    """The last operations, which publish, are all among those of the slow suite."""
    for event in range(0, 10_000, step):
        ended = False

        def attempt(event: int = event) -> bool:
            nonlocal ended
            outcome = place(where, event=event)
            ended = outcome is None
            return outcome is not False

        campaign.attempt(f"before operation {event}", attempt)
        if ended:
            break
    campaign.check()
    assert campaign.counts.total() > 5


@pytest.mark.parametrize("times", [3, pytest.param(67, marks=pytest.mark.campaign)], ids=["few", "many"])
@pytest.mark.parametrize("where", PLACES)
def test_killed_at_a_random_time(place, campaign, where, times):
    rng = random.Random(where)
    for _ in range(times):
        seconds = rng.uniform(0, 1.5)
        campaign.attempt(f"after {seconds:.3f} s", lambda seconds=seconds: place(where, seconds=seconds) is not False)
    campaign.check()


def test_killed_again_and_again(source, every_format, undisturbed, tmp_path, monkeypatch):
    """Each run gets a little further before it is killed."""
    monkeypatch.chdir(tmp_path)
    killed = 0
    while in_a_killed_process(lambda: compress(str(source), every_format, "out"), event=10 + 6 * killed):
        killed += 1
        assert killed < 60
    assert killed > 3
    assert is_same(tmp_path / "out", undisturbed)
