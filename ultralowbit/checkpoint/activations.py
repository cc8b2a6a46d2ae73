"""Hidden states in memory-mapped files."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from ultralowbit.checkpoint.storage import raise_disk_full


class Activations:
    """Hidden states [samples, length, hidden] in a memory-mapped file, so that they need disk and not memory."""

    def __init__(self, path: Path, shape: tuple[int, ...], dtype: torch.dtype, create: bool) -> None:
        self.path = path
        size = torch.Size(shape).numel()
        if create:
            path.unlink(missing_ok=True)
            with path.open("wb") as f:
                try:
                    # reserve the blocks now: a full disk would otherwise be a SIGBUS in the middle of a forward pass
                    if hasattr(os, "posix_fallocate"):
                        os.posix_fallocate(f.fileno(), 0, size * dtype.itemsize)
                    else:
                        f.truncate(size * dtype.itemsize)
                except OSError as e:
                    path.unlink(missing_ok=True)
                    raise_disk_full(e, path)
        self.tensor = torch.from_file(str(path), shared=True, size=size, dtype=dtype).view(shape)

    def sync(self) -> None:
        """Wait until the file's bytes are on disk."""
        with self.path.open("rb") as f:
            try:
                os.fsync(f.fileno())
            except OSError as e:  # file systems that cannot reserve blocks notice only now
                raise_disk_full(e, self.path)
