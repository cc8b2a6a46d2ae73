"""What the kernels' tests share: the device that runs them, random packed weights, poisoned outputs, exact products."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from ultralowbit.format.testing import random_packed
from ultralowbit.format.weight import Format, PackedWeight
from ultralowbit.kernels.gpu.launch import INTERPRETED, Launch, run


@dataclass
class Gpu:
    """A CUDA device, or the CPU in the interpreter."""

    device: torch.device

    def packed(self, format: Format, out: int, seed: int = 0) -> PackedWeight:
        """Random in every stored byte, the padding of the words too."""
        return random_packed(format, out, seed, self.device)

    def x(self, tokens: int, columns: int, dtype: torch.dtype = torch.float32, seed: int = 1) -> Tensor:
        """Signed, and of another size in every token."""
        x = torch.randn(tokens, columns, generator=torch.Generator().manual_seed(seed))
        return (x * torch.logspace(1, -4, tokens)[:, None]).to(self.device, dtype)

    def run(self, launches: Sequence[Launch], *given: Tensor) -> None:
        """Run, with NaN in every tensor that the launches write: those that were not given to them."""
        known = {t.untyped_storage().data_ptr() for t in given}
        for launch in launches:
            for arg in launch.args:
                if (
                    isinstance(arg, Tensor)
                    and arg.untyped_storage().data_ptr() not in known
                    and arg.is_floating_point()
                ):
                    arg.fill_(torch.nan)
        run(launches, self.device)


@pytest.fixture
def gpu(device: torch.device) -> Gpu:
    if (device.type == "cpu") != INTERPRETED:
        pytest.skip(
            "on the CPU test_interpreter.py runs these" if device.type == "cpu" else "the interpreter is chosen"
        )
    return Gpu(device)


@pytest.fixture
def assert_product():
    """assert_product(y, x, weight): y = x [tokens, in] @ weight [out, in].T but for fp32 sums and one rounding.

    A weight is a code less a zero point. A GPU fuses one of the two products into their sum, so that a rounding is left
    where they are equal: a little of the largest weight is allowed there.
    """

    def check(y: Tensor, x: Tensor, weight: Tensor) -> None:
        x, weight = x.double(), weight.double()
        exact, size = x @ weight.T, x.abs() @ weight.abs().T
        info = torch.finfo(y.dtype)
        eps = info.eps if INTERPRETED and y.dtype == torch.bfloat16 else info.eps / 2  # cut off there, not rounded
        error = (y.double() - exact).abs()
        allowed = eps * exact.abs().clamp_min(info.smallest_normal) + 2.0**-18 * size
        if not INTERPRETED:
            allowed += 2.0**-22 * x.abs().sum(1, keepdim=True) * weight.abs().max()
        worst = divmod(int((error - allowed).argmax()), y.shape[1])
        assert (error <= allowed).all(), (
            f"{error[worst]:.3g} from {exact[worst]:.3g} at {worst}, {allowed[worst]:.3g} allowed"
        )

    return check
