"""Sums of products over tokens: what statistics of inputs are made of."""

from __future__ import annotations

from torch import Tensor

from ultralowbit.kernels import cpu


def add_products(total: Tensor, x: Tensor, y: Tensor | None = None, half: bool = False) -> None:
    """total [n, m] += x^T y for x [tokens, n] and y [tokens, m], all fp32; without y a symmetric total += x^T x.

    half: x and y may be rounded to bfloat16, sums stay fp32: done on CPUs with AMX, where it is three to six times as
    fast.
    """
    if half and total.device.type == "cpu" and cpu.has_amx() and total.is_contiguous():
        cpu.add_products(total, x, y)
    else:
        total.addmm_(x.T, x if y is None else y)
