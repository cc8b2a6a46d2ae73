"""Hidden states in memory-mapped files, so that they need disk and not memory."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from ultralowbit.checkpoint.storage import raise_disk_full
from ultralowbit.errors import CheckpointError, naming_memory


class Activations:
    """Hidden states [batches, batch, length, hidden] in a memory-mapped file.

    `create` makes the file, with room for all of it; otherwise it must be there in full: `CheckpointError` where it is
    missing or has another size. Raises `DiskFull`.
    """

    def __init__(self, path: Path, shape: tuple[int, ...], dtype: torch.dtype, create: bool) -> None:
        self.path = path
        size = torch.Size(shape).numel()
        nbytes = size * dtype.itemsize
        if create:
            self._reserve(nbytes)
        elif not path.is_file() or path.stat().st_size != nbytes:
            there = f"has {path.stat().st_size} bytes" if path.is_file() else "is missing"
            raise CheckpointError(f"{path} {there}, expected {nbytes} bytes of activations: begin again with --restart")
        with naming_memory(f"mapping {path}"):
            self.tensor = torch.from_file(str(path), shared=True, size=size, dtype=dtype).view(shape)

    def _reserve(self, nbytes: int) -> None:
        self.path.unlink(missing_ok=True)
        with self.path.open("wb") as f:
            try:
                # reserve the blocks now: a full disk would otherwise be a SIGBUS in the middle of a forward pass
                if hasattr(os, "posix_fallocate"):
                    os.posix_fallocate(f.fileno(), 0, nbytes)
                else:
                    f.truncate(nbytes)
            except OSError as e:
                self.path.unlink(missing_ok=True)
                raise_disk_full(e, self.path)

    def sync(self) -> None:
        """Wait until the file's bytes are on disk."""
        with self.path.open("rb") as f:
            try:
                os.fsync(f.fileno())
            except OSError as e:  # file systems that cannot reserve blocks notice only now
                raise_disk_full(e, self.path)
