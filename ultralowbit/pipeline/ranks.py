"""One compression in several processes, as `torchrun` and `accelerate launch` start them.

Calibration batches belong to lanes (`checkpoint.activations`), lane l to rank l modulo the number of ranks. Ranks sum a
lane each, then the next ones; the sums of lanes are added in the order of the lanes, whoever made them, so that any
number of ranks adds the same numbers in the same order. Linears are solved by one rank each and handed to all. Blocks
and adapters are trained by rank 0, whole models by all ranks together (`training.shards`).

Results are the same bytes where every process computes alike: the same software and kind of processor, the same number
of threads. Models that are trained as a whole differ in their last digits.
"""

from __future__ import annotations

import json
import os
import platform
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from ultralowbit.errors import AnotherRankFailed, InputError
from ultralowbit.format.weight import Format, PackedWeight
from ultralowbit.methods.statistics import InputStats

PIECE = 1 << 24
"""Numbers of a sum that are exchanged at a time, so that beside the sums there is no copy of them."""
LONGEST_WAIT = timedelta(days=30)
"""For a rank that waits while rank 0 trains. A rank that has died is noticed at once: its connections close."""
GRACE = 5.0
"""Seconds in which a rank that fails tells the others why, once its connections are gone."""

T = TypeVar("T")
_FAILED = "ultralowbit/failed"


class ConnectionLost(RuntimeError):
    """A rank has ended without saying why: it was killed, or its machine is gone."""


class Ranks:
    """The processes that share one compression; by default this one is alone.

    As a context of several, it sees to it that one rank alone says what went wrong: in the others an error becomes
    `AnotherRankFailed`.
    """

    def __init__(self, rank: int = 0, size: int = 1, store: dist.Store | None = None) -> None:
        self.rank, self.size, self._store = rank, size, store
        self.received = 0
        """Bytes of tensors that other ranks have sent to this one, those of training left out."""

    @classmethod
    def join(cls) -> Ranks:
        """Meet the processes that were started beside this one; alone where the environment names none.

        Raises `InputError` where the environment is incomplete, or the others do not come.
        """
        if os.environ.get("WORLD_SIZE", "1") == "1":
            return cls()
        try:
            store, rank, size = next(dist.rendezvous("env://", timeout=timedelta(minutes=5)))
            both = torch.cuda.is_available() and dist.is_nccl_available()
            backend = "cpu:gloo,cuda:nccl" if both else "gloo"
            dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=LONGEST_WAIT)
        except (ValueError, RuntimeError) as e:
            raise InputError(
                f"WORLD_SIZE is {os.environ['WORLD_SIZE']}, and the processes do not meet "
                f"({' '.join(str(e).split())[:200]}): start them with torchrun --nproc-per-node N -m ultralowbit"
            ) from e
        return cls(rank, size, store)

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def device(self, device: str) -> str:
        """What `--device` means for this rank: with several, each has a GPU of its own."""
        if self.size == 1 or device not in ("auto", "cuda") or not torch.cuda.is_available():
            return device
        local, there = int(os.environ.get("LOCAL_RANK", self.rank)), torch.cuda.device_count()
        if local >= there:
            raise InputError(
                f"{local + 1} processes or more run on {platform.node()}, which has {there} GPUs: start one for each "
                "GPU, or give --device cpu"
            )
        return f"cuda:{local}"

    def mesh(self, device: torch.device) -> DeviceMesh | None:
        """The ranks as torch's distributed modules know them; None where this process is alone."""
        return None if self.size == 1 else init_device_mesh(device.type, (self.size,))

    def mine(self, lanes: int) -> range:
        """The lanes whose batches this rank runs."""
        return range(self.rank, lanes, self.size)

    # --- exchanges: every rank calls them in the same order ---

    def gather(self, value: T) -> list[T]:
        """The JSON values that the ranks give, by rank."""
        if self.size == 1:
            return [value]
        encoded = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
        lengths = [torch.zeros(1, dtype=torch.int64) for _ in range(self.size)]
        with self.exchanging():
            dist.all_gather(lengths, torch.tensor([len(encoded)], dtype=torch.int64))
            values = [torch.zeros(int(n), dtype=torch.uint8) for n in lengths]
            values[self.rank] = encoded
            for rank, part in enumerate(values):
                dist.broadcast(part, rank)
        return [json.loads(part.numpy().tobytes()) for part in values]

    def agree(self, make: Callable[[], T]) -> T:
        """A JSON value that rank 0 makes and all get."""
        return self.gather(make() if self.is_first else None)[0]

    def wait(self) -> None:
        """Go on when all ranks have come here."""
        self.gather(None)

    def from_rank(self, rank: int, tensor: Tensor) -> Tensor:
        """A tensor that one rank holds, for all; the others give one of its shape and dtype, which is filled."""
        if self.size > 1 and tensor.numel():
            with self.exchanging():
                dist.broadcast(tensor, rank)
            self.received += tensor.nbytes if rank != self.rank else 0
        return tensor

    def sum_lanes(
        self,
        lanes: list[range],
        new: Callable[[], list[InputStats]],
        collect: Callable[[range, list[InputStats]], object],
    ) -> list[InputStats]:
        """The statistics of all lanes, for all ranks: `collect` adds the batches of a lane to statistics that `new`
        makes. A rank holds the totals and the lane that it sums."""
        totals = new()
        for first in range(0, len(lanes), self.size):
            owners = min(self.size, len(lanes) - first)
            parts: list[InputStats | None] = [None] * len(totals)
            if self.rank < owners:
                parts = new()
                collect(lanes[first + self.rank], parts)
            for total, part in zip(totals, parts, strict=True):
                if self.size == 1:
                    total += part
                else:
                    self._add_parts(total, part, owners)
        for tensor in [tensor for total in totals for tensor in total.sums] if self.size > 1 else ():
            for piece in tensor.view(-1).split(PIECE):
                for rank, share in enumerate(piece.tensor_split(self.size)):
                    self.from_rank(rank, share)
        return totals

    def _add_parts(self, total: InputStats, part: InputStats | None, owners: int) -> None:
        """Add the parts that the first `owners` ranks hold, in their order. Each rank has a share of every sum right,
        the rest of it stays zero."""
        extremes = None if part is None else part.extremes
        sizes = self.gather(None if part is None else [part.count, len(extremes)])
        for rank, size in enumerate(sizes[:owners]):
            own = rank == self.rank
            shape = size[1], total.features
            entry = extremes if own else torch.empty(shape, dtype=torch.float32, device=total.device)
            total.take_extremes(part if own else None, size[0], self.from_rank(rank, entry))
        theirs = [None] * len(total.sums) if part is None else part.sums
        for mine, their in zip(total.sums, theirs, strict=True):
            sending = [None] if their is None else their.view(-1).split(PIECE)
            for k, piece in enumerate(mine.view(-1).split(PIECE)):
                self._add_shares(piece, sending[k] if part is not None else piece[:0], owners)

    def _add_shares(self, piece: Tensor, sent: Tensor, owners: int) -> None:
        """Add this rank's share of a piece of each owner's sum; `sent` is this rank's own, empty where it has none."""
        shares = [len(share) for share in piece.tensor_split(self.size)]
        width = shares[self.rank]
        received = piece.new_empty(owners * width)
        with self.exchanging():
            dist.all_to_all_single(
                received, sent, [width] * owners + [0] * (self.size - owners), shares if len(sent) else [0] * self.size
            )
        self.received += received.nbytes - (width * piece.itemsize if len(sent) else 0)
        share = piece.tensor_split(self.size)[self.rank]
        for part in received.view(owners, width):
            share += part

    def solve(
        self, costs: Mapping[str, int], pack: Callable[[str], tuple[PackedWeight, dict[str, Any]]], device: torch.device
    ) -> dict[str, tuple[PackedWeight, dict[str, Any]]]:
        """What `pack` makes of each name, for all ranks and in the order of `costs`; each is packed by one rank, the
        costly ones first dealt to the rank that has least to do. Beside the packed weight stands a JSON value."""
        if self.size == 1:
            return {name: pack(name) for name in costs}
        owner = dealt(costs, self.size)
        own = {name: pack(name) for name in costs if owner[name] == self.rank}
        heads = {name: [p.format.to_dict(), list(p.shape), note] for name, (p, note) in own.items()}
        solved = {}
        for rank, theirs in enumerate(self.gather(heads)):
            packed = {name: own[name][0] for name in own} if rank == self.rank else None
            for name, p in self._hand_out(rank, theirs, packed, device).items():
                solved[name] = p, theirs[name][2]
        return {name: solved[name] for name in costs}

    def hand_out(self, packed: Mapping[str, PackedWeight], device: torch.device) -> Mapping[str, PackedWeight]:
        """Packed weights of rank 0, for all ranks."""
        if self.size == 1:
            return packed
        heads = self.agree(lambda: {name: [p.format.to_dict(), list(p.shape), None] for name, p in packed.items()})
        return self._hand_out(0, heads, packed if self.is_first else None, device)

    def _hand_out(
        self, rank: int, heads: Mapping[str, Any], packed: Mapping[str, PackedWeight] | None, device: torch.device
    ) -> Mapping[str, PackedWeight]:
        """The packed weights of a rank, in one exchange: `packed` there, None elsewhere."""
        formats = {name: (Format.from_dict(layout), tuple(shape)) for name, (layout, shape, _) in heads.items()}
        specs = [
            (name, part, spec) for name, (format, shape) in formats.items()
            for part, spec in format.tensors(*shape).items()
        ]  # fmt: skip
        sizes = [spec.nbytes for _, _, spec in specs]
        if packed is None:
            data = torch.empty(sum(sizes), dtype=torch.uint8, device=device)
        else:
            parts = [packed[name].tensors[part] for name, part, _ in specs]
            bytes_of = [t.to(device).contiguous().view(-1).view(torch.uint8) for t in parts]
            data = torch.cat([torch.empty(0, dtype=torch.uint8, device=device), *bytes_of])
        self.from_rank(rank, data)
        if packed is not None:
            return packed
        tensors: dict[str, dict[str, Tensor]] = {name: {} for name in formats}
        for (name, part, spec), piece in zip(specs, data.split(sizes), strict=True):
            tensors[name][part] = piece.clone().view(spec.dtype).view(spec.shape)  # a slice may lie at any byte
        return {name: PackedWeight(format, shape, tensors[name]) for name, (format, shape) in formats.items()}

    # --- how it ends ---

    @contextmanager
    def exchanging(self) -> Iterator[None]:
        """Says in words that another rank is gone."""
        try:
            yield
        except RuntimeError as e:
            if not (isinstance(e, dist.DistError) or "gloo" in str(e)):
                raise
            raise ConnectionLost(
                f"rank {self.rank} has lost the connection to another rank, which was killed or whose machine is gone: "
                "run the same command to go on"
            ) from e

    def __enter__(self) -> Ranks:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.size == 1:
            return
        if error is None:
            dist.destroy_process_group()
            return
        interrupted = isinstance(error, KeyboardInterrupt)  # all of them are
        grace = GRACE if isinstance(error, ConnectionLost) else 0.0
        if (interrupted and not self.is_first) or not self._speaks(grace):
            raise AnotherRankFailed(f"rank {self.rank} ends because another rank has failed") from error

    def _speaks(self, grace: float) -> bool:
        """Whether it is this rank that says why all end: the first that fails, unless within `grace` seconds another
        says it."""
        end = time.monotonic() + grace
        with suppress(RuntimeError):  # the store is gone with the process that held it
            while time.monotonic() < end and not self._store.check([_FAILED]):
                time.sleep(0.05)
            return self._store.compare_set(_FAILED, "", str(self.rank)).decode() == str(self.rank)
        return self.is_first


def dealt(costs: Mapping[str, int], ranks: int) -> dict[str, int]:
    """The rank that each name is dealt to: the costly ones first, to the rank that has least to do."""
    load, owner = [0] * ranks, {}
    for name in sorted(costs, key=lambda name: -costs[name]):
        owner[name] = load.index(min(load))
        load[owner[name]] += costs[name]
    return owner


def check_agreement(ranks: Ranks, facts: Mapping[str, Any], differ: Callable[[Any, Any], str]) -> None:
    """Raise `InputError`, before the work, where a rank has other facts than rank 0; `differ` names what differs.

    Facts that are None are not compared.
    """
    first, *others = ranks.gather({**facts, "host": platform.node()})
    for rank, theirs in enumerate(others, 1):
        known = {name for name in facts if theirs[name] is not None and first[name] is not None}
        if difference := differ({name: first[name] for name in known}, {name: theirs[name] for name in known}):
            raise InputError(
                f"rank {rank} on {theirs['host']} does not agree with rank 0 on {first['host']} in {difference}: give "
                "all ranks the same files, versions, options and OMP_NUM_THREADS"
            )


def check_same_files(ranks: Ranks, folder: Path, names: Iterable[str]) -> None:
    """Raise `InputError` where two ranks of a machine read other files: one of them alone hashes those."""
    stats = {name: os.stat(folder / name) for name in names}
    mine = {name: [found.st_size, found.st_mtime_ns] for name, found in stats.items()}
    firsts: dict[str, tuple[int, Any]] = {}
    for rank, (host, theirs) in enumerate(ranks.gather((platform.node(), mine))):
        first, files = firsts.setdefault(host, (rank, theirs))
        if theirs != files:
            name = next(name for name in sorted({*theirs, *files}) if theirs.get(name) != files.get(name))
            raise InputError(
                f"rank {rank} does not read the model that rank {first} reads on {host}: {name} has another size or "
                "time of change; give all ranks the same MODEL"
            )


def machine_facts() -> dict[str, Any]:
    """What of a process and its machine the last bits of a result depend on."""
    return {
        "python": platform.python_version(),
        "threads": torch.get_num_threads(),
        "processor": [platform.machine(), torch.backends.cpu.get_cpu_capability()],
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def own_batches(lanes: Iterable[int], batches: list[range]) -> list[int]:
    """The batches of some lanes, in order."""
    return [k for lane in lanes for k in batches[lane]]
