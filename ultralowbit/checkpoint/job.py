"""Writing a packed checkpoint so that a crash at any moment loses at most one block.

While a job runs, everything lies in `OUT.work`: one shard a block, the activations that enter the next block, and
job.json, whose atomic replacement is what commits a block. When all is written the folder of shards becomes OUT by one
rename: OUT is a whole checkpoint or it does not exist.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from ultralowbit.checkpoint.manifest import MANIFEST
from ultralowbit.checkpoint.storage import FULL, raise_disk_full, sync_folder, write_json
from ultralowbit.errors import InputError


class Job:
    """The work folder of one compression, opened by `Job.open`; `state` is what job.json holds."""

    def __init__(self, out: Path, fingerprint: dict[str, Any]) -> None:
        self.out = out
        self.work = out.with_name(out.name + ".work")
        self.shards = self.work / "checkpoint"
        self.state: dict[str, Any] = {
            "fingerprint": fingerprint,
            "blocks": 0,
            "layers": {},
            "seconds": {},
            "tuning": {},
        }
        self._lock = FileLock(self.work.with_name(self.work.name + ".lock"))

    @classmethod
    def open(cls, out: Path, fingerprint: dict[str, Any], restart: bool) -> Job | None:
        """Start, or go on with, the job that writes `out`; None if `out` already is what it would write.

        Raises `InputError` if `out` holds something else, if the unfinished work was started with another model,
        recipe or calibration (`restart` discards it), or if another process is at it.
        """
        job = cls(out, fingerprint)
        if out.exists() and not (out.is_dir() and not any(out.iterdir())):
            try:
                manifest = json.loads((out / MANIFEST).read_text())
                done = manifest["fingerprint"]
            except (OSError, ValueError, KeyError, TypeError):
                raise InputError(
                    f"{out} exists and is no checkpoint of ours: choose another --out, or remove it"
                ) from None
            if done == fingerprint and not restart:
                shutil.rmtree(job.work, ignore_errors=True)  # a kill right after the rename leaves it
                return None
            if not restart and job._begun() != fingerprint:  # or a --restart that was interrupted is to go on
                raise InputError(
                    f"{out} holds a checkpoint made with a different {_difference(done, fingerprint)}: choose another "
                    "--out, or --restart to replace it"
                )
        try:
            out.parent.mkdir(parents=True, exist_ok=True)
            job._lock.acquire(timeout=0)
        except Timeout:
            raise InputError(f"another process is writing {out}: wait for it, or choose another --out") from None
        except OSError as e:
            if e.errno in FULL:
                raise_disk_full(e, out)
            raise InputError(f"{out} cannot be written ({e.strerror} at {e.filename}): choose another --out") from e
        try:
            job._resume_or_start(restart)
        except BaseException:
            job.close()
            raise
        return job

    @property
    def _state_file(self) -> Path:
        return self.work / "job.json"

    def _begun(self) -> dict[str, Any] | None:
        """The fingerprint of the unfinished work, if there is any."""
        return json.loads(self._state_file.read_text())["fingerprint"] if self._state_file.exists() else None

    def _resume_or_start(self, restart: bool) -> None:
        if self._state_file.exists() and not restart:
            state = json.loads(self._state_file.read_text())
            fingerprint = self.state["fingerprint"]
            if state["fingerprint"] != fingerprint:
                raise InputError(
                    f"{self.work} holds unfinished work with a different "
                    f"{_difference(state['fingerprint'], fingerprint)}: run the command it was started with, or "
                    "--restart to discard it"
                )
            self.state = state
            for half_written in self.shards.glob("*.tmp"):  # or the manifest would list it
                half_written.unlink()
            return
        if self.work.exists() and not all(_is_work(path) for path in self.work.iterdir()):
            raise InputError(f"{self.work} holds files that are not ours: choose another --out, or remove them")
        shutil.rmtree(self.work, ignore_errors=True)
        try:
            self.shards.mkdir(parents=True)
        except OSError as e:
            raise_disk_full(e, self.work)
        self.commit()

    def commit(self) -> None:
        """Make `state` what a resumed job starts from."""
        write_json(self._state_file, self.state)

    def shard_name(self, i: int, total: int) -> str:
        return f"model-{i + 1:05d}-of-{total:05d}.safetensors"

    def publish(self) -> None:
        """Turn the finished folder into OUT by a rename, then remove the work folder."""
        old = self.out.with_name(self.out.name + ".old")
        if self.out.exists():
            shutil.rmtree(old, ignore_errors=True)
            self.out.replace(old)
        self.shards.replace(self.out)
        sync_folder(self.out.parent)
        shutil.rmtree(old, ignore_errors=True)
        shutil.rmtree(self.work)

    def close(self) -> None:
        self._lock.release()
        Path(self._lock.lock_file).unlink(missing_ok=True)


def _is_work(path: Path) -> bool:
    """Whether a path in the work folder is one that a job makes."""
    folders, files = ("checkpoint", "preprocess", "distilled"), ("job.json", "finetune.safetensors")
    streams = ("activations-", "original-", "targets-", "tuning-")
    return path.name.startswith((*folders, *files, *streams))


def _difference(old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    """Which parts of two fingerprints differ, in words."""
    parts = []
    for key in sorted({*old, *new}):
        a, b = old.get(key), new.get(key)
        if a == b:
            continue
        if isinstance(a, dict) and isinstance(b, dict):
            inner = [k for k in sorted({*a, *b}) if a.get(k) != b.get(k)]
            parts.append(f"{key} ({', '.join(inner[:3])})")
        else:
            parts.append(f"{key} ({a} there, {b} now)")
    return " and ".join(parts)
