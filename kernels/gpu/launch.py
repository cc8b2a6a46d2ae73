"""A kernel launch as a value: what runs on a GPU and in the interpreter is what tests compile without either."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import triton
import triton.language as tl
from triton.runtime.errors import OutOfResources

NARROWEST_DOT = 8 if tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 5) else 16
"""Columns that a product of tensor cores must have: older Tritons pad none."""
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
ASSEMBLY = tl.constexpr(not INTERPRETED)
"""The interpreter knows no inline assembly: kernels then say the same in Triton."""


@dataclass(frozen=True)
class Launch:
    """One kernel on a grid. `args` are tensors and ints in the order of the kernel's parameters, `constants` the
    constexpr ones by name."""

    kernel: Any
    grid: tuple[int, ...]
    args: tuple[Any, ...]
    constants: dict[str, Any] = field(default_factory=dict)
    warps: int = 4
    stages: int = 3

    @property
    def options(self) -> dict[str, Any]:
        """What the compiler is told; fused multiply-adds by name, since Triton's default for them is changing."""
        return {"num_warps": self.warps, "num_stages": self.stages, "enable_fp_fusion": True}

    def __call__(self) -> None:
        self.kernel[self.grid](*self.args, **self.constants, **self.options)


def run(launches: Sequence[Launch], device: torch.device) -> None:
    """Launch in order on the device's current stream."""
    if device.type != "cuda":
        for launch in launches:
            launch()
        return
    with torch.cuda.device(device):  # Triton launches on the current device, which need not be that of the tensors
        for launch in launches:
            launch()


def cdiv(a: int, b: int) -> int:
    """a / b, rounded up."""
    return -(-a // b)


__all__ = ["ASSEMBLY", "INTERPRETED", "NARROWEST_DOT", "Launch", "OutOfResources", "cdiv", "run", "tl", "triton"]
