"""Error correction: a Linear is fitted to what the original model makes of its own inputs.

Arai, Ichikawa: Quantization Error Propagation: Revisiting Layer-Wise Post-Training Quantization, NeurIPS 2025, arXiv
2504.09629. The blocks and Linears before it are quantized, and so its inputs x are not the original's x_o. The weight
that comes nearest to the original's outputs,

    W' = argmin sum |W x_o - W' x|^2 + damp mean(diag H) |W' - W|^2 = W + W C (H + damp mean(diag H) I)^-1,

C = sum (x_o - x) x^T and H = sum x x^T, then takes the place of W in any method; both sums merge by addition.

`residual` is ours: a Linear whose outputs are added to the residual stream also makes up for what is wrong in that
already. With r the stream that they are added to, S = sum (r_o - r) x^T joins W C.
"""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor

from ultralowbit.methods.base import fields
from ultralowbit.methods.statistics import InputStats


@fields
class ErrorCorrection:
    """damp: how strongly the corrected weight is drawn to the original one, relative to mean(diag H); residual: also
    make up for the error that the residual stream carries."""

    damp: float = Field(0.3, gt=0, le=10)
    residual: bool = True

    def target(self, weight: Tensor, stats: InputStats) -> Tensor:
        """W' [out, in] for a weight [out, in], from statistics with `Need.ORIGINAL`. Raises `SingularHessian` where
        they cannot be used."""
        R = stats.factor(self.damp).R
        moved = weight @ stats.cross  # [out, in]
        if stats.residual is not None:
            moved += stats.residual
        half = torch.linalg.solve_triangular(R.T, moved, upper=False, left=False)
        return weight + torch.linalg.solve_triangular(R, half, upper=True, left=False)
