"""The tests in gpu/ run on a GPU, or on the CPU in Triton's interpreter, which test_interpreter.py starts."""

from __future__ import annotations

import importlib.util
import os

import pytest
import torch
from torch import Tensor

from ultralowbit.kernels import cpu

RUNNABLE = importlib.util.find_spec("triton") and (torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET"))
collect_ignore = [] if RUNNABLE else ["gpu"]


def random_block(
    columns: int, out: int, levels: int, groups: int = 1, exact: bool = False, seed: int = 0
) -> tuple[Tensor, ...]:
    """weight, rest, R, tables and which, as `round_block` takes them; `exact`: so that all sums and quotients are exact
    in fp32, in any order."""
    generator = torch.Generator().manual_seed(seed)

    def whole(low: int, high: int, *size: int) -> Tensor:
        return torch.randint(low, high + 1, size, generator=generator).float()

    which = torch.arange(columns) * groups // columns
    if exact:
        # small whole numbers; the diagonal is 1, and no row of R has a second entry but in the next column: what is
        # divided by, in the loop and in the sweeps, is 1 or 2
        R = torch.eye(columns) + torch.diag(whole(-1, 1, columns - 1), 1)
        tables = whole(-8, 8, groups, levels, out).sort(dim=1).values
        return whole(-20, 20, columns, out), whole(-20, 20, columns, out), R, tables, which
    R = torch.randn(columns, columns, generator=generator).triu() / columns**0.5
    R.diagonal().copy_(torch.rand(columns, generator=generator) + 0.5)
    tables = torch.randn(groups, levels, out, generator=generator).sort(dim=1).values
    weight, rest = torch.randn(2, columns, out, generator=generator)
    return weight, rest, R, tables, which


@pytest.fixture(scope="session")
def column_block():
    return random_block


@pytest.fixture(params=cpu.instruction_sets())
def isa(request, monkeypatch) -> str:
    """Each instruction set of this CPU that the compiled kernels know; they then use it."""
    monkeypatch.setattr(cpu, "_isa", cpu.instruction_sets().index(request.param))
    assert cpu.isa() == request.param
    return request.param
