"""The rate-distortion bound of a Linear: the least output error that any code of so many bits a weight can reach.

For rows w ~ N(0, s^2 I) under E = tr((W - Q) H (W - Q)^T), the components of a row along the eigenvectors of H are
independent with variances v_i = s^2 lambda_i, lambda the eigenvalues of H. At R bits a weight the least error is
reverse water-filling (Cover, Thomas: Elements of Information Theory, 2nd edition, theorem 10.3.3),

    D(R) = sum_i min(v_i, theta),   R = 1/columns sum_i max(0, 1/2 log2(v_i / theta)).

It holds for Gaussian rows, which those of a rotated weight nearly are, and for codes of any length. Scalar levels
cannot reach it: for white inputs they lose 1.45 times as much at one bit, 1.88 times at two.
"""

from __future__ import annotations

import torch
from torch import Tensor


def least_error(hessian: Tensor, bits: float) -> float:
    """D(R) / D(0), the share of the outputs' energy that is lost at least, from the hessian [in, in] of the inputs and
    the bits a weight. 0 where no input has any energy."""
    # those of a rank less than full come out as tiny numbers of either sign
    variances = torch.linalg.eigvalsh(hessian.double()).clamp_min(0).flip(0)  # [in], falling
    total = variances.sum()
    if total <= 0:
        return 0.0
    variances = variances[variances > 0]
    logs = variances.log2()
    count = torch.arange(1, len(variances) + 1, device=logs.device)
    # with the first k above the water, 2 R columns = sum of their logs - k log2 theta
    levels = (logs.cumsum(0) - 2 * bits * len(hessian)) / count  # log2 theta [in]
    above = int((logs >= levels).sum()) if bits > 0 else 0
    if above == 0:
        return 1.0
    theta = levels[above - 1].exp2()
    return ((above * theta + variances[above:].sum()) / total).item()
