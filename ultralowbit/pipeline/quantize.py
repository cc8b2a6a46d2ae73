"""One weight packed."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ultralowbit.errors import FormatError
from ultralowbit.format.weight import PackedWeight
from ultralowbit.kernels.hadamard import block_hadamard
from ultralowbit.methods.base import Method
from ultralowbit.methods.bound import least_error
from ultralowbit.methods.error_correction import ErrorCorrection
from ultralowbit.methods.output_feedback import OutputFeedback
from ultralowbit.methods.rotation import rotated_weight
from ultralowbit.methods.statistics import InputStats, Need, SingularHessian, output_energy, relative_error


def quantize_weight(
    weight: Tensor,
    method: Method,
    stats: InputStats | None,
    hadamard: int | None = None,
    correction: ErrorCorrection | None = None,
    feedback: OutputFeedback | None = None,
    outputs: Sequence[Tensor] = (),
) -> tuple[PackedWeight, dict[str, Any]]:
    """Pack the weight [out, in] fp32 of one Linear, or of an embedding.

    hadamard: the block of the Hadamard matrix that its inputs are multiplied by, which `stats` are of too. correction:
    how the weight is corrected for what is wrong in its inputs, where `stats` know that. feedback: how its rows make up
    for each other's errors, where `outputs` has what it takes.

    Statistics that cannot be used, or none where some are needed, fall back to round-to-nearest, and that is said in
    the result's `fallback`. `error` is known where there is a Hessian: the share of the outputs' energy that is lost,
    of the corrected weight where there is a correction; `least_error` is what any code of as many bits loses at least.
    """
    started = time.perf_counter()
    weight = block_hadamard(weight, hadamard) if hadamard else weight
    fallback = None
    if method.needs and (stats is None or stats.count == 0):
        fallback, stats = "no calibration token reached it", None
    try:
        if correction is not None and stats is not None and Need.ORIGINAL in stats.needs:
            weight = correction.target(weight, stats)
        packed = feedback.quantize(method, weight, stats, outputs) if outputs else method.quantize(weight, stats)
    except SingularHessian as e:
        fallback = str(e)
        packed = method.quantize(weight, None)
    error = least = None
    if stats and Need.HESSIAN in stats.needs and not fallback:
        energy = output_energy(weight, stats.hessian)
        error = relative_error(weight, packed.dequantize(), stats.hessian, energy)
        least = _least_error(weight, stats, packed.bits_per_weight, energy)
    packed = rotated_weight(packed, hadamard) if hadamard else packed
    _check_not_lost(weight, packed.dequantize())
    return packed, {
        "shape": list(packed.shape),
        "format": packed.format.summary,
        "layout": packed.format.to_dict(),
        "bits_per_weight": packed.bits_per_weight,
        "error": error,
        "least_error": least,
        "fallback": fallback,
        "notes": list(stats.notes) if stats else [],
        "seconds": round(time.perf_counter() - started, 3),
    }


def _least_error(weight: Tensor, stats: InputStats, bits: float, energy: Tensor) -> float | None:
    """The share of the outputs' energy that a code of so many bits loses at least, for Gaussian rows as large as those
    of the weight [out, in]; None for outputs without energy."""
    isotropic = weight.double().square().sum() * stats.hessian.diagonal().mean()
    return (least_error(stats.spectrum, bits) * isotropic / energy).item() if energy > 0 else None


def _check_not_lost(weight: Tensor, dense: Tensor) -> None:
    """Raise `FormatError` where most of a weight [out, in] lies in rows whose every scale rounds to 0.

    Rows that are next to nothing beside the others may come back as zeros: 0 is the nearest scale.
    """
    energy = weight.double().square().sum(1)
    if energy[~dense.any(1)].sum() > energy.sum() / 2:
        raise FormatError(
            f"its largest value is {weight.abs().max().item():.3g}, and scales that small round to 0 in fp16 (smallest "
            f"{2.0**-24:.3g}): check the source checkpoint, or leave this Linear out with `ignore`"
        )


@torch.no_grad()
def give_weight(module: nn.Module, dense: Tensor) -> None:
    """Put a weight [out, in] into a Linear or Conv1D."""
    module.weight.copy_(dense.T if isinstance(module, Conv1D) else dense)
