"""Output feedback: rounding errors of a weight's rows make up for each other where the model's predictions hear both.

After Tseng, Sun, Hou, De Sa: Model-Preserving Adaptive Rounding (YAQA), 2025, arXiv 2505.22988. With g the gradient of
log p(y) with respect to the outputs of a Linear, y drawn from the model's own predictions, a weight that is off by E
moves these by KL ~ 1/2 mean (g^T E x)^2 over tokens. Taking g and x as independent, that is

    tr(H_O E H E^T) / 2,   H_O = mean g g^T [out, out],   H = mean x x^T [in, in].

GPTQ lowers it for H_O = 1, a row at a time. Here the rows are dealt out to P parts, row i to part i mod P, which any
method packs one after the other. With H_O + damp mean(diag H_O) 1 = R R^T, R upper triangular in the order of the
parts, part p is fitted to

    W_p + R_pp^-T R_<p,p^T E_<p,

which makes up for what the parts before it lost, as later columns do in GPTQ. Within a part rows count as independent;
YAQA goes row by row, of which 8 parts leave little: in SmolLM2-135M rows lose 0.77 (up_proj) to 0.20 (v_proj) of what
independent ones do, and 0.74 to 0.17 row by row (the geometric mean of the diagonal of what is left of H_O).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from pydantic import Field
from torch import Tensor

from ultralowbit.format.weight import PackedWeight
from ultralowbit.methods.base import Method, fields
from ultralowbit.methods.statistics import InputStats, upper_cholesky

ROWS = 2048
"""Outputs, at most, whose errors make up for each other: H_O of a part of a wide Linear stays small."""


@fields
class OutputFeedback:
    """parts: P; damp: as above, relative to mean(diag H_O); windows: of the calibration text, on which H_O is measured
    in the original model."""

    parts: int = Field(8, ge=2, le=64)
    damp: float = Field(0.02, gt=0, le=10)
    windows: int = Field(32, ge=1, le=4096)

    def quantize(
        self, method: Method, weight: Tensor, stats: InputStats | None, outputs: Sequence[Tensor]
    ) -> PackedWeight:
        """What `method`, which packs each row on its own, makes of a weight [out, in] with statistics of its inputs.

        outputs: H_O of the first rows [rows, rows], of the next ones, and so on, each up to a factor.
        """
        done = []
        for rows, H in zip(weight.split([len(H) for H in outputs]), outputs, strict=True):
            done.append(self._together(method, rows, stats, H.to(weight.device)))
        format = done[0].format
        return PackedWeight(format, tuple(weight.shape), format.stacked([packed.tensors for packed in done]))

    def gain(self, outputs: Sequence[Tensor]) -> float:
        """What is left of the loss, at best, beside rows that are packed on their own: the geometric mean over rows, of
        which each makes up for the errors of all before it."""
        logs = [torch.zeros(len(H), dtype=torch.float64) for H in outputs]
        for H, log in zip(outputs, logs, strict=True):
            if _is_known(H):
                damped = self._damped(H)
                log += ((damped.logdet() - damped.diagonal().log().sum()) / len(H)).cpu()
        return torch.cat(logs).mean().exp().item()

    def _damped(self, H: Tensor) -> Tensor:
        damped = H.to(torch.float64, copy=True)
        damped.diagonal().add_(self.damp * damped.diagonal().mean())
        return damped

    def _together(self, method: Method, weight: Tensor, stats: InputStats | None, H: Tensor) -> PackedWeight:
        """The same of rows with one H_O."""
        if not _is_known(H):
            return method.quantize(weight, stats)
        parts = [torch.arange(p, len(weight), self.parts) for p in range(min(self.parts, len(weight)))]
        order = torch.cat(parts).to(weight.device)
        R = upper_cholesky(self._damped(H[order][:, order])).float()
        weight, lost, done, low = weight[order], torch.empty_like(weight), [], 0
        for rows in parts:
            here = slice(low, low + len(rows))
            heard = R[:low, here].T @ lost[:low]  # [rows, in], in the place of R_pp^T E_p
            target = weight[here] + torch.linalg.solve_triangular(R[here, here].T, heard, upper=False)
            done.append(method.quantize(target, stats))
            lost[here] = weight[here] - done[-1].dequantize()
            low = here.stop
        format = done[0].format
        stored = format.rows(format.stacked([packed.tensors for packed in done]), order.argsort())
        return PackedWeight(format, tuple(weight.shape), stored)


def _is_known(H: Tensor) -> bool:
    """Whether a gradient has reached these outputs, and all were finite."""
    return bool(H.isfinite().all() and H.diagonal().mean() > 0)
