"""Reading and writing files so that a crash leaves the old or the new one, and damage is one sentence."""

from __future__ import annotations

import errno
import hashlib
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save
from torch import Tensor

from ultralowbit.errors import CheckpointError, DiskFull, naming_memory

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""What the system says where a file cannot grow."""


def sha256_file(path: Path, progress: Callable[[int], object] | None = None) -> str:
    """Hex digest of a file's bytes, read 8 MB at a time; `progress` gets the bytes of each read."""
    digest = hashlib.sha256()
    with path.open("rb") as f:
        while chunk := f.read(1 << 23):
            digest.update(chunk)
            if progress:
                progress(len(chunk))
    return digest.hexdigest()


def write_atomic(path: Path, data: bytes) -> None:
    """Write a file so that it holds `data` or what it held before, also after a power cut; `DiskFull` keeps the old."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        with temporary.open("wb") as f:
            f.write(data)
            f.flush()
            os.fsync(f.fileno())
        temporary.replace(path)
    except OSError as e:
        temporary.unlink(missing_ok=True)
        raise_disk_full(e, path)


def raise_disk_full(error: OSError, path: Path) -> None:
    """Raise `DiskFull` in place of an error that says that a file cannot grow, else the error itself."""
    if error.errno in FULL:
        why = "the file would be larger than the system allows" if error.errno == errno.EFBIG else "no space left"
        message = f"{why} to write {path}: make room, then run the same command to go on"
        raise DiskFull(error.errno, message) from error
    raise error


def write_json(path: Path, value: Any) -> None:
    """A JSON file with sorted keys, atomically."""
    write_atomic(path, (json.dumps(value, indent=1, sort_keys=True) + "\n").encode())


def json_digest(value: Any) -> str:
    """Hex digest of a JSON value, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """One safetensors file, atomically."""
    with naming_memory(f"writing {path}"):
        stored = {name: t.contiguous() for name, t in tensors.items()}
        write_atomic(path, save(stored, metadata={"format": "pt", **(metadata or {})}))


def read_json(path: Path, remedy: str = "copy it again") -> dict[str, Any]:
    """The object in a JSON file; `CheckpointError` names the file where it cannot be read or holds something else."""
    try:
        value = json.loads(path.read_bytes().decode("utf-8"))
    except (OSError, ValueError, RecursionError) as e:  # another encoding is a ValueError too
        reason = e.strerror if isinstance(e, OSError) else f"{type(e).__name__}: {str(e).splitlines()[0][:120]}"
        raise CheckpointError(f"{path} cannot be read as JSON ({reason}): {remedy}") from e
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds a {type(value).__name__}, expected an object: {remedy}")
    return value


def sync_folder(path: Path) -> None:
    """Wait until the names in a folder are on disk."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
