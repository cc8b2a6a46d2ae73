"""Hidden states in memory-mapped files, so that they need disk and not memory."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

from ultralowbit.checkpoint.storage import raise_disk_full
from ultralowbit.errors import CheckpointError, naming_memory

LANES = 8
"""Into how many lanes calibration batches are dealt, whatever the number of processes: a lane is summed in its order by
one process, and the lanes in theirs, so that any number of processes makes the same sums."""


def lanes_of(batches: int) -> list[range]:
    """The batches of each lane, which follow one another; there are fewer lanes where there are fewer batches."""
    lanes = min(LANES, batches)
    return [range(batches * i // lanes, batches * (i + 1) // lanes) for i in range(lanes)]


class Activations:
    """Hidden states [batches, ...], such as [batches, batch, length, hidden], in a memory-mapped file for each lane.

    create: the lanes whose files are made, with room for all of it, by this process alone. The file of another lane
    must be there in full when a batch of it is asked for: `CheckpointError` where it is missing or has another size.
    Where processes on several machines share the work, the files lie on a file system that all of them see. Raises
    `DiskFull`.
    """

    def __init__(self, path: Path, shape: tuple[int, ...], dtype: torch.dtype, create: Iterable[int] = ()) -> None:
        self.path, self.shape, self.dtype = path, shape, dtype
        self.lanes = lanes_of(shape[0])
        self._mapped: dict[int, Tensor] = {}
        for lane in create:
            self._reserve(lane)
            self._map(lane)

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, k: int) -> Tensor:
        """Batch k, as a view of its file."""
        lane = next(lane for lane, batches in enumerate(self.lanes) if k in batches)
        if lane not in self._mapped:
            self._check(lane)
            self._map(lane)
        return self._mapped[lane][k - self.lanes[lane].start]

    def file(self, lane: int) -> Path:
        return self.path.with_name(f"{self.path.name}.{lane}.bin")

    def sync(self) -> None:
        """Wait until the bytes of the files that are open here are on disk."""
        for lane in self._mapped:
            path = self.file(lane)
            with path.open("rb") as f:
                try:
                    os.fsync(f.fileno())
                except OSError as e:  # file systems that cannot reserve blocks notice only now
                    raise_disk_full(e, path)

    def remove(self) -> None:
        """Remove the files that are open here."""
        for lane in self._mapped:
            self.file(lane).unlink()

    def _shape(self, lane: int) -> tuple[int, ...]:
        return (len(self.lanes[lane]), *self.shape[1:])

    def _nbytes(self, lane: int) -> int:
        return torch.Size(self._shape(lane)).numel() * self.dtype.itemsize

    def _map(self, lane: int) -> None:
        path, shape = self.file(lane), self._shape(lane)
        with naming_memory(f"mapping {path}"):
            size = torch.Size(shape).numel()
            self._mapped[lane] = torch.from_file(str(path), shared=True, size=size, dtype=self.dtype).view(shape)

    def _check(self, lane: int) -> None:
        path, nbytes = self.file(lane), self._nbytes(lane)
        if not path.is_file() or path.stat().st_size != nbytes:
            there = f"has {path.stat().st_size} bytes" if path.is_file() else "is missing"
            raise CheckpointError(f"{path} {there}, expected {nbytes} bytes of activations: begin again with --restart")

    def _reserve(self, lane: int) -> None:
        path = self.file(lane)
        path.unlink(missing_ok=True)
        with path.open("wb") as f:
            try:
                # reserve the blocks now: a full disk would otherwise be a SIGBUS in the middle of a forward pass
                if hasattr(os, "posix_fallocate"):
                    os.posix_fallocate(f.fileno(), 0, self._nbytes(lane))
                else:
                    f.truncate(self._nbytes(lane))
            except OSError as e:
                path.unlink(missing_ok=True)
                raise_disk_full(e, path)
