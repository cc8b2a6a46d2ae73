"""The machine: devices, memory, and what of it a result depends on."""

from __future__ import annotations

import ctypes
import gc
import platform
import re
import sys
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil
import torch

from ultralowbit.errors import InputError


def pick_device(device: str) -> torch.device:
    """`auto` is cuda where there is one; raises `InputError` for a device that torch cannot use here."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        where = torch.device(device)
        torch.empty(0, dtype=torch.float32, device=where)
    except (RuntimeError, AssertionError) as e:
        gpu = device.partition(":")[0].lower() in ("gpu", "nvidia", "nvidia-gpu")
        hint = "a GPU is called cuda here, so try --device cuda" if gpu else "try --device cpu"
        raise InputError(f"device {device!r} cannot be used here ({str(e).splitlines()[0]}): {hint}") from e
    return where


def multiplies_bf16(device: torch.device) -> bool:
    """Whether products in bfloat16 take a fraction of the time that fp32 takes: on GPUs, and on CPUs with AMX."""
    if device.type == "cpu":
        return getattr(torch.cpu, "_is_amx_tile_supported", bool)()
    return device.type == "cuda"


def return_free_memory() -> None:
    """Give freed pages back to the system: glibc keeps those of blocks below 32 MB, and fragments would add up over the
    layers."""
    gc.collect()
    with suppress(OSError, AttributeError):  # another C library
        ctypes.CDLL(None).malloc_trim(0)


def environment(device: torch.device) -> dict[str, Any]:
    """Versions and hardware that a result may depend on."""
    packages = ("ultralowbit", "torch", "transformers", "safetensors", "accelerate", "numpy")
    return {
        "python": sys.version.split()[0],
        "platform": platform.platform(),
        "machine": platform.machine(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "cpu": torch.backends.cpu.get_cpu_capability() + (" AMX" if multiplies_bf16(torch.device("cpu")) else ""),
        "threads": torch.get_num_threads(),
        **{name: version(name) for name in packages},
    }


def available_memory() -> int:
    """Bytes that this process can still take: of the machine, or of the container where that has less."""
    free = psutil.virtual_memory().available
    with suppress(OSError, ValueError):
        group = Path("/sys/fs/cgroup")
        free = min(free, int((group / "memory.max").read_text()) - int((group / "memory.current").read_text()))
    return max(0, free)


def existing(path: Path) -> Path:
    """The folder on whose disk `path` will be."""
    path = path.absolute()
    return next(p for p in (path, *path.parents) if p.exists())


def forget_peak_memory() -> bool:
    """Let `peak_memory` count from now on; False where the system cannot."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def peak_memory() -> int:
    """Bytes of this process's largest resident set so far, pages of mapped files included."""
    try:  # unlike getrusage, which starts at the size of the process that forked this one
        status = Path("/proc/self/status").read_text()
        return 1024 * int(re.search(r"VmHWM:\s+(\d+) kB", status)[1])
    except OSError:
        import resource

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else 1024 * peak


def release(device: torch.device) -> None:
    """Give back the memory of models that are no longer in use."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
