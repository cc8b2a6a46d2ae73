"""Writing a packed checkpoint so that a crash at any moment loses at most one block.

While a job runs, everything lies in its work folder: a safetensors file for each block, the activations that enter the
next block, and job.json, whose atomic replacement is what commits a block. job.json holds size and digest of every
committed file, so that a resumed job trusts nothing that it did not check. When all is written, the finished folder
becomes OUT by one rename: OUT is a whole checkpoint or it does not exist.

The work folder is OUT.work, or OUT/.ultralowbit-work where OUT cannot be renamed (a mount point, the current folder, a
parent that is not ours to write). Nothing is deleted or replaced that does not carry the job's mark.
"""

from __future__ import annotations

import errno
import logging
import os
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import psutil
from filelock import FileLock, Timeout
from safetensors.torch import load_file
from torch import Tensor

from ultralowbit.checkpoint.contents import WORK, files_in, own_files
from ultralowbit.checkpoint.manifest import MANIFEST, changed_files, read_manifest
from ultralowbit.checkpoint.storage import (
    FULL,
    UNFINISHED,
    json_digest,
    raise_disk_full,
    read_json,
    sha256_file,
    sha256_files,
    sync_folder,
    write_json,
    write_tensors,
)
from ultralowbit.errors import CheckpointError, InputError, naming_memory, reason
from ultralowbit.progress import Progress

EMBEDDINGS = "embeddings.safetensors"
"""The packed embedding and head, in the work folder."""

CARRIED = "files to carry over"
"""Of a fingerprint: digests of the tokenizer and of what else a checkpoint takes over from the original."""

STATE = "job.json"
"""What makes a folder a job's work folder."""

_OUTSIDE = "finetuned/outside.safetensors"
_MARK = {"made_by": "ultralowbit"}
_FOLDERS = ("blocks", "checkpoint", "replaced", "finetuned", "preprocess")
_FILES = (STATE, "lock")
_PREFIXES = (
    "activations-", "original-", "targets-", "experts.", "allocation.", "outputs-", EMBEDDINGS, "blockwise-",
    "finetune.", "outside.", UNFINISHED,
)  # fmt: skip

log = logging.getLogger(__name__)


class Job:
    """The work folder of one compression, opened by `Job.open`; `state` is what job.json holds."""

    def __init__(self, out: Path, fingerprint: dict[str, Any]) -> None:
        self.out = out.expanduser().resolve()
        if not self.out.name:
            raise InputError(f"--out is {str(out)!r}, which is the root of the file system: name a folder in it")
        beside, inside = self.out.with_name(self.out.name + ".work"), self.out / WORK
        self.inside = _is_marked(inside) or not _can_be_renamed(self.out)  # where unfinished work is, it goes on
        self.work = inside if self.inside and not _is_marked(beside) else beside
        self.checkpoint = self.work / "checkpoint"
        self.state: dict[str, Any] = {
            **_MARK, "fingerprint": fingerprint, "blocks": 0, "layers": {}, "seconds": {}, "blockwise": {},
            "files": {}, "publishing": False, "peak_memory_bytes": 0, "replaces": None,
        }  # fmt: skip
        self._lock = FileLock(self.work / "lock")

    @classmethod
    def open(cls, out: Path, fingerprint: dict[str, Any], restart: bool, progress: Progress) -> Job | None:
        """Start, or go on with, the job that writes `out`; None if `out` already is what it would write.

        Raises `InputError` if `out` or the work folder holds something else, if the unfinished work was started with
        another model, recipe or calibration (`restart` discards it), if a file of it is not as it was committed, or if
        another process is at it.
        """
        job = cls._at(out, fingerprint)
        job._acquire()
        try:
            if job._resume(restart, progress):
                return job
            if job._is_finished(restart, progress):
                job.close(finished=True)
                return None
            job._start()
        except BaseException:
            job.close()
            raise
        return job

    @classmethod
    def _at(cls, out: Path, fingerprint: dict[str, Any]) -> Job:
        """The job that would write `out`; `InputError` where that can be no folder, or holds something else."""
        try:
            job = cls(out, fingerprint)
            job._refuse_what_is_not_ours()
        except InputError:
            raise
        except (OSError, RuntimeError, ValueError) as e:  # too long, links in a circle, characters that no name has
            raise InputError(f"--out is {str(out)!r}, which cannot be a folder ({reason(e)}): choose another") from e
        return job

    @classmethod
    def places(cls, out: Path) -> tuple[Path, Path]:
        """The folder that a job writes and its work folder; `InputError` where it could write neither."""
        job = cls._at(out, {})
        return job.out, job.work

    @classmethod
    def check(cls, out: Path) -> None:
        """Raise `InputError` where a job could not write `out`; nothing is written."""
        _, work = cls.places(out)
        above = next(path for path in (work, *work.parents) if path.exists())
        if not above.is_dir() or not os.access(above, os.W_OK | os.X_OK):
            raise InputError(f"{out} cannot be written (no folder can be made in {above}): choose another --out")

    @property
    def place(self) -> dict[str, Any]:
        """What a `Follower` needs to know."""
        return {"out": str(self.out), "work": str(self.work), "state": self.state}

    def _refuse_what_is_not_ours(self) -> None:
        if self.work.is_symlink() or (self.work.exists() and not _is_work(self.work)):
            raise InputError(f"{self.work} holds files that are not ours: choose another --out, or move them")
        if self.out.exists() and not self.out.is_dir():
            raise InputError(f"{self.out} is a file: choose another --out")

    def _acquire(self) -> None:
        """Lock first, then look: what another process is writing is never read, let alone removed."""
        try:
            self.work.mkdir(parents=True, exist_ok=True)
            self._lock.acquire(timeout=0)
        except Timeout:
            raise InputError(f"another process is writing {self.out}: wait for it, or choose another --out") from None
        except OSError as e:
            if e.errno in FULL:
                raise_disk_full(e, self.out)
            raise InputError(
                f"{self.out} cannot be written ({e.strerror} at {e.filename}): choose another --out"
            ) from e

    def _resume(self, restart: bool, progress: Progress) -> bool:
        """Take up unfinished work, if there is any and it is of this job."""
        there = self.work / STATE
        if restart or not there.exists():
            return False
        state = read_json(there, "begin again with --restart")
        if state.pop("sha256", None) != json_digest(state):
            raise InputError(f"{there} has changed since it was committed: begin again with --restart")
        if state["publishing"] and state["fingerprint"] == self.state["fingerprint"]:
            self.state = state
            self.publish()
            self._acquire()
            return False
        differing = difference(state.get("fingerprint"), self.state["fingerprint"])
        if differing:
            raise InputError(
                f"{self.work} holds unfinished work with a different {differing}: run the command it was started "
                "with, or --restart to discard it"
            )
        self.state = state
        self._check_out()
        self._check_committed(progress)
        return True

    def _check_committed(self, progress: Progress) -> None:
        """Compare every committed file with its size and digest."""
        files = self.state["files"]
        progress.start("checking what is there", sum(entry["bytes"] for entry in files.values()))
        for name, entry in files.items():
            path = self.work / name
            if not path.is_file() or path.stat().st_size != entry["bytes"]:
                raise InputError(f"{path} is missing or cut, so the job cannot go on: begin again with --restart")
        digests = sha256_files((self.work / name for name in files), progress.step)
        for name, entry in files.items():
            if digests[self.work / name] != entry["sha256"]:
                raise InputError(f"{self.work / name} has changed since it was committed: begin again with --restart")

    def _is_finished(self, restart: bool, progress: Progress) -> bool:
        """Whether OUT already is what this job would write; `InputError` where it is something else."""
        if not self.out.exists() or all(path.name == WORK for path in self.out.iterdir()):
            return False
        try:
            manifest = read_manifest(self.out)
        except CheckpointError:
            raise InputError(
                f"{self.out} holds files and is no checkpoint of ours: choose another --out, or move them"
            ) from None
        if not restart:
            if differing := difference(manifest["fingerprint"], self.state["fingerprint"]):
                raise InputError(
                    f"{self.out} holds a checkpoint made with a different {differing}: choose another --out, or "
                    "--restart to replace it"
                )
            total = sum(path.stat().st_size for path in self.out.iterdir() if path.is_file())
            progress.start(f"checking {self.out.name}", total)
            for name, problem in changed_files(self.out, manifest, progress.step).items():
                raise InputError(f"{self.out / name} {problem}: --restart makes the checkpoint again")
            return True
        if foreign := sorted(files_in(self.out) - own_files(self.out)):
            raise InputError(
                f"{self.out} holds {foreign[0]}, which --restart would remove and `compress` did not write, or not as "
                "it is now: move it, or choose another --out"
            )
        self.state["replaces"] = sha256_file(self.out / MANIFEST)
        return False

    def _check_out(self) -> None:
        """Raise `InputError` where publishing would remove or overwrite what this job was not told to replace."""
        foreign = files_in(self.out) - self._replaced()
        if self.inside:
            foreign &= files_in(self.checkpoint)
        if foreign:
            raise InputError(
                f"{min(foreign)} has been put into {self.out} while it was being made: move it, then run the same "
                "command to go on"
            )

    def _replaced(self) -> set[str]:
        """Names of what is still there of the checkpoint that --restart replaces."""
        manifest = self.out / MANIFEST
        is_old = manifest.is_file() and sha256_file(manifest) == self.state.get("replaces")
        return own_files(self.out) if is_old else set()

    def _start(self) -> None:
        """Begin with an empty work folder, once OUT is known to be one that can be replaced."""
        self._remove_work(keep=("lock",))
        self.commit()

    def block_file(self, i: int) -> Path:
        return self.work / self.state.get("block_folder", "blocks") / f"{i:05d}.safetensors"

    def write_block(self, i: int, tensors: Mapping[str, Tensor], folder: str = "blocks") -> None:
        """Write the tensors of block i; the next `commit` makes the file count."""
        self._write(self.work / folder / f"{i:05d}.safetensors", tensors)

    def write_outside(self, tensors: Mapping[str, Tensor]) -> None:
        """Write tensors outside of the blocks that have changed; the next `commit` makes the file count."""
        self._write(self.work / _OUTSIDE, tensors)

    def _write(self, path: Path, tensors: Mapping[str, Tensor]) -> None:
        try:
            path.parent.mkdir(exist_ok=True)
        except OSError as e:
            raise_disk_full(e, path)
        write_tensors(path, tensors)
        self.record([path])

    def read_outside(self) -> dict[str, Tensor]:
        """What of the tensors outside of the blocks has changed."""
        return load_file(self.work / _OUTSIDE) if _OUTSIDE in self.state["files"] else {}

    def read_block(self, i: int) -> dict[str, Tensor]:
        with naming_memory(f"reading {self.block_file(i)}"):
            return load_file(self.block_file(i))

    def record(self, paths: Iterable[Path]) -> None:
        """Note size and digest of files in the work folder."""
        self.state["files"] |= self.describe(paths)

    def describe(self, paths: Iterable[Path]) -> dict[str, dict[str, Any]]:
        """Size and digest of files in the work folder, by their names in it."""
        return {
            str(path.relative_to(self.work)): {"bytes": path.stat().st_size, "sha256": sha256_file(path)}
            for path in paths
        }

    def forget(self, paths: Iterable[Path]) -> None:
        """Do not expect files of the work folder any more."""
        for path in paths:
            self.state["files"].pop(str(path.relative_to(self.work)), None)

    def note_memory(self, nbytes: int) -> None:
        """Keep the largest of what each process that was at the job has needed so far."""
        self.state["peak_memory_bytes"] = max(self.state["peak_memory_bytes"], nbytes)

    def commit(self) -> None:
        """Make `state` what a resumed job starts from."""
        write_json(self.work / STATE, {**self.state, "sha256": json_digest(self.state)})

    def new_checkpoint(self) -> Path:
        """An empty folder for the finished checkpoint."""
        shutil.rmtree(self.checkpoint, ignore_errors=True)
        self.checkpoint.mkdir()
        return self.checkpoint

    def publish(self) -> None:
        """Turn the finished folder into OUT and remove the work folder; killed at any moment, it can be repeated.

        Raises `InputError` where files have been put into OUT in the meantime; the work is then kept.
        """
        if not self.state["publishing"]:
            self.state["publishing"] = True
            self.commit()
        if self.checkpoint.exists():
            self._check_out()
            (self._publish_inside if self.inside else self._publish_by_rename)()
        self.close(finished=True)

    def _publish_by_rename(self) -> None:
        if self.out.exists():
            _remove(self.work / "replaced")
            self.out.replace(self.work / "replaced")
        self.checkpoint.replace(self.out)
        sync_folder(self.out.parent)

    def _publish_inside(self) -> None:
        """Remove the files of the checkpoint that --restart replaces, then move the new ones, each manifest last: it is
        what makes OUT a checkpoint."""
        for name in sorted(self._replaced(), key=_manifest_last):
            (self.out / name).unlink()
            _remove_empty((self.out / name).parent, self.out)
        for name in sorted(files_in(self.checkpoint), key=_manifest_last):
            (self.out / name).parent.mkdir(parents=True, exist_ok=True)
            (self.checkpoint / name).replace(self.out / name)
        sync_folder(self.out)

    def close(self, finished: bool = False) -> None:
        """Let go of the work folder; what a finished job leaves in it, or one that never began, is removed."""
        if not self._lock.is_locked:
            return
        try:
            if finished or not (self.work / STATE).exists():
                self._remove_work()
        finally:
            self._lock.release()

    def _remove_work(self, keep: tuple[str, ...] = ()) -> None:
        """Remove what jobs make, the mark after all else but the lock, and the folder if nothing else is in it."""
        there = self.work.iterdir() if self.work.exists() else ()
        for path in sorted(there, key=lambda path: (path.name == "lock", path.name == STATE)):
            if _is_ours(path) and path.name not in keep:
                _remove(path)
        if not keep:
            try:
                self.work.rmdir()
            except FileNotFoundError:
                pass
            except OSError as e:
                if e.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                    raise
                log.warning("%s holds files that are not ours: it is left there", self.work)


class Follower(Job):
    """The job as other processes see it, that take part in the work: they read its folder and keep its `state`, and
    another process writes both."""

    def __init__(self, place: Mapping[str, Any]) -> None:
        self.out, self.work, self.state = Path(place["out"]), Path(place["work"]), place["state"]

    def write_block(self, i: int, tensors: Mapping[str, Tensor], folder: str = "blocks") -> None: ...

    def write_outside(self, tensors: Mapping[str, Tensor]) -> None: ...

    def commit(self) -> None: ...

    def close(self, finished: bool = False) -> None: ...


def _manifest_last(name: str) -> tuple[bool, str]:
    return name == MANIFEST, name


def _remove_empty(folder: Path, above: Path) -> None:
    """Remove a folder, and those that it lies in up to one above, where nothing is left in them."""
    while folder != above and not any(folder.iterdir()):
        folder.rmdir()
        folder = folder.parent


def _can_be_renamed(out: Path) -> bool:
    """Whether OUT can be put into place by a rename: it is no mount point, not the current folder or one above it, and
    the folder that it lies in may be written."""
    if not out.exists():
        return True
    here = Path.cwd()
    mounts = {Path(partition.mountpoint) for partition in psutil.disk_partitions(all=True)}  # bind mounts too
    in_use = here == out or out in here.parents
    return not (in_use or out in mounts or os.path.ismount(out)) and os.access(out.parent, os.W_OK)


def _is_ours(path: Path) -> bool:
    """Whether a path in the work folder has a name that jobs give."""
    return path.name in (*_FOLDERS, *_FILES) or path.name.startswith(_PREFIXES)


def _is_work(folder: Path) -> bool:
    """Whether a folder is the work folder of a job: it has the mark, or nothing but what lies there before the mark."""
    return _is_marked(folder) or (folder.is_dir() and all(map(_is_of_a_start, folder.iterdir())))


def _is_marked(folder: Path) -> bool:
    try:
        return read_json(folder / STATE).items() >= _MARK.items()
    except CheckpointError:
        return False


def _is_of_a_start(path: Path) -> bool:
    if path.name.startswith(UNFINISHED):
        return True
    return path.name == "lock" and path.is_file() and path.stat().st_size == 0


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def difference(old: Any, new: Mapping[str, Any]) -> str:
    """Which parts of two fingerprints differ, in words; nothing where they agree. An earlier version kept nothing of
    the files that are carried over."""
    if not isinstance(old, Mapping):
        return "origin"
    parts = []
    for key in sorted({*old, *new} - ({CARRIED} - {*old})):
        a, b = old.get(key), new.get(key)
        if a == b:
            continue
        if isinstance(a, dict) and isinstance(b, dict):
            inner = [k for k in sorted({*a, *b}) if a.get(k) != b.get(k)]
            parts.append(f"{key} ({', '.join(inner[:3])})")
        else:
            parts.append(f"{key} ({a} there, {b} now)")
    return " and ".join(parts)
