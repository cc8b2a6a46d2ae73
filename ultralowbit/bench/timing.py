"""Clocks for benchmarks."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache

import torch


def now(device: torch.device) -> float:
    """Seconds, with all that the device was asked to do done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def sum_over(seconds: Callable[..., float], shapes: Iterable[tuple[int, ...]]) -> float:
    """The sum over shapes; each distinct one is timed once."""
    return sum(count * seconds(*shape) for shape, count in Counter(shapes).items())


def best_of(f: Callable[[], object], repeat: int = 3) -> float:
    """Seconds of the fastest of a few calls: the others were disturbed."""
    times = []
    for _ in range(repeat):
        started = time.perf_counter()
        f()
        times.append(time.perf_counter() - started)
    return min(times)


Call = Callable[[], object]


def captured(calls: Sequence[Call], device: torch.device) -> Call:
    """Make one call of many, one after the other: on a GPU a replay of their CUDA graph."""
    if device.type != "cuda":
        return lambda: [call() for call in calls]
    stream = _side_stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):  # kernels are compiled, and libraries choose theirs, outside of the graph
        for call in calls[:2]:
            call()
    torch.cuda.current_stream(device).wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for call in calls:
            call()
    return graph.replay


@cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    """One for all captures: cuBLAS keeps a workspace for every stream, which would count as peak memory."""
    return torch.cuda.Stream(device)


def seconds(run: Call, device: torch.device) -> float:
    """Seconds of one run on the device."""
    if device.type != "cuda":
        started = time.perf_counter()
        run()
        return time.perf_counter() - started
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    run()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3


def race(runs: Mapping[str, Call], device: torch.device, rounds: int) -> dict[str, list[float]]:
    """Seconds of each run, in rising order; they take turns, and a first round only warms up."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(rounds + 1):
        for name, run in runs.items():
            took = seconds(run, device)
            times[name] += [took] if turn else []
    return {name: sorted(samples) for name, samples in times.items()}


def cache_bytes(device: torch.device) -> int:
    """Bytes of the L2 cache; 1 MB on a CPU, where only the tests run this."""
    if device.type != "cuda":
        return 1 << 20
    return getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 0) or 64 << 20


def copies(nbytes: int, device: torch.device) -> int:
    """The number of weights of `nbytes` each that together are four times the cache; at least two."""
    return max(2, math.ceil(4 * cache_bytes(device) / nbytes))
