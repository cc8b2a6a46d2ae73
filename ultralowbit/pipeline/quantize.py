"""One Linear packed."""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ultralowbit.format.weight import PackedWeight
from ultralowbit.methods.base import Method
from ultralowbit.methods.statistics import InputStats, Need, SingularHessian, relative_error


def quantize_linear(module: nn.Module, method: Method, stats: InputStats | None) -> tuple[PackedWeight, dict[str, Any]]:
    """Pack one Linear and give it the weight that the packed bytes mean.

    Statistics that cannot be used, or none where some are needed, fall back to round-to-nearest, and that is said in
    the result's `fallback`. `error` is known where there is a Hessian.
    """
    started = time.perf_counter()
    weight = module.weight.detach().float()
    weight = weight.T.contiguous() if isinstance(module, Conv1D) else weight
    fallback = None
    if method.needs and (stats is None or stats.count == 0):
        fallback, stats = "no calibration token reached it", None
    try:
        packed = method.quantize(weight, stats)
    except SingularHessian as e:
        fallback = str(e)
        packed = method.quantize(weight, None)
    dense = packed.dequantize()
    measured = stats and Need.HESSIAN in stats.needs and not fallback
    error = relative_error(weight, dense, stats.hessian) if measured else None
    give_weight(module, dense)
    return packed, {
        "shape": list(packed.shape),
        "format": packed.format.summary,
        "layout": packed.format.to_dict(),
        "bits_per_weight": packed.bits_per_weight,
        "error": error,
        "fallback": fallback,
        "notes": list(stats.notes) if stats else [],
        "seconds": round(time.perf_counter() - started, 3),
    }


@torch.no_grad()
def give_weight(module: nn.Module, dense: Tensor) -> None:
    """Put a weight [out, in] into a Linear or Conv1D."""
    module.weight.copy_(dense.T if isinstance(module, Conv1D) else dense)
