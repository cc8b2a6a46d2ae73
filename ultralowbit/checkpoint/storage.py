"""Reading and writing files so that a crash leaves the old or the new one, and damage is one sentence."""

from __future__ import annotations

import errno
import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Event, Lock
from typing import Any

import torch
from torch import Tensor

from ultralowbit.errors import CheckpointError, DiskFull, naming_memory

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""What the system says where a file cannot grow."""
DTYPES = {  # the names safetensors headers use
    "BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8, "I16": torch.int16, "I32": torch.int32, "I64": torch.int64,
    "F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64,
}  # fmt: skip
UNFINISHED = ".ultralowbit-unfinished-"
"""What the name of a file begins with until all of it is written; what lies there after a kill is ours to replace."""


def sha256_file(path: Path, progress: Callable[[int], object] | None = None) -> str:
    """Hex digest of a file's bytes, read 8 MB at a time; `progress` gets the bytes of each read."""
    digest = hashlib.sha256()
    with path.open("rb") as f:
        while chunk := f.read(1 << 23):
            digest.update(chunk)
            if progress:
                progress(len(chunk))
    return digest.hexdigest()


def sha256_files(paths: Iterable[Path], progress: Callable[[int], object] | None = None) -> dict[Path, str]:
    """Hex digests of files, several at a time, by their paths; `progress` gets the bytes of each read, one read at a
    time. What one of them raises, and an interrupt, ends the others."""
    paths, lock, ended = [*paths], Lock(), Event()

    def step(nbytes: int) -> None:
        if ended.is_set():
            raise InterruptedError
        if progress:
            with lock:
                progress(nbytes)

    with ThreadPoolExecutor(max(1, min(len(paths), os.cpu_count() or 1))) as pool:
        try:
            return dict(zip(paths, pool.map(lambda path: sha256_file(path, step), paths), strict=True))
        except BaseException:
            ended.set()
            raise


def write_atomic(path: Path, data: bytes | Iterable[bytes | memoryview]) -> None:
    """Write a file so that it holds `data`, whole or in pieces, or what it held before, also after a power cut;
    `DiskFull` keeps the old."""
    name = hashlib.sha256(os.fsencode(path.name)).hexdigest()[:16]  # with the name itself it might be too long
    temporary = path.with_name(UNFINISHED + name)
    try:
        with temporary.open("wb") as f:
            f.writelines([data] if isinstance(data, bytes) else data)
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
    write_atomic(path, json_bytes(value))


def json_bytes(value: Any) -> bytes:
    """What `write_json` writes."""
    return (json.dumps(value, indent=1, sort_keys=True) + "\n").encode()


def json_digest(value: Any) -> str:
    """Hex digest of a JSON value, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """One safetensors file, atomically, from tensors on any device; beside them one of them is in memory at a time."""
    with naming_memory(f"writing {path}"):
        write_atomic(path, tensor_file(tensors, {"format": "pt", **(metadata or {})}))


def tensor_file(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> Iterator[bytes | memoryview]:
    """A safetensors file: its header, then the bytes of one tensor after another."""
    names = {dtype: name for name, dtype in DTYPES.items()}
    header = lay_out((name, names[t.dtype], list(t.shape), t.nbytes) for name, t in sorted(tensors.items()))
    yield encode_header({"__metadata__": dict(metadata), **header})
    for name in header:
        yield tensor_bytes(tensors[name])


def lay_out(tensors: Iterable[tuple[str, str, list[int], int]]) -> dict[str, dict[str, Any]]:
    """The header of a safetensors file, without metadata, for tensors given as name, dtype as headers call it, shape
    and bytes; they lie in its order."""
    header, offset = {}, 0
    # wide dtypes first: every tensor then starts at a multiple of its item size, as torch needs it
    for name, dtype, shape, size in sorted(tensors, key=lambda tensor: -DTYPES[tensor[1]].itemsize):
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [offset, offset + size]}
        offset += size
    return header


def encode_header(header: Mapping[str, Any]) -> bytes:
    """What a safetensors file begins with."""
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    return len(encoded).to_bytes(8, "little") + encoded


def tensor_bytes(tensor: Tensor) -> memoryview:
    """The bytes of a tensor in the order of its numbers, not copied where it lies on the CPU in that order.

    Of a tensor that is sharded over processes, all of which then call this.
    """
    if hasattr(tensor, "full_tensor"):  # a DTensor; to import its class takes seconds
        tensor = tensor.full_tensor()
    return memoryview(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())


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


def follow_umask(*paths: Path) -> None:
    """Give files and folders the modes that new ones get here: safetensors and tempfile make theirs for the owner
    alone."""
    mask = os.umask(0o077)
    os.umask(mask)
    for path in paths:
        path.chmod((0o777 if path.is_dir() else 0o666) & ~mask)


def why_missing(folder: Path, name: str) -> str | None:
    """Why a folder has no file of this name, in words; None where it has one, or where reading it says more."""
    try:
        os.stat(folder / name)
    except NotADirectoryError:
        return "it is a file"
    except FileNotFoundError:
        return f"it has no {name}" if os.path.isdir(folder) else "it is not there"
    except (OSError, ValueError):
        return None
    return None


def sync_folder(path: Path) -> None:
    """Wait until the names in a folder are on disk."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
