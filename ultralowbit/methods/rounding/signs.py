"""Sign planes with free scales, and with scales that halve."""

from __future__ import annotations

import torch
from torch import Tensor

from ultralowbit.format.planes import TiedPlanes
from ultralowbit.format.weight import Format, PackedWeight
from ultralowbit.format.words import to_scale
from ultralowbit.methods.rounding.alternating import AlternatingRounding, Greedy, Levels, OddMultiples


def sign_levels(scale: Tensor) -> Levels | Greedy:
    """The levels of sign planes whose scales [K, out] fall and are not negative; bit p of a code is plane p."""
    return Greedy(scale) if len(scale) <= 2 else Levels.of(scale, -1)


class SignRounding(AlternatingRounding):
    """K sign planes with free scales: the nearest of the levels sum_p +-a_p, from greedy residual binarisation.

    For K = 1 that is a = sum h|w| / sum h at once.
    """

    def _start(self, weight: Tensor, h: Tensor) -> Tensor:
        rest, scales = weight.clone(), []
        for _ in range(self.planes):
            a = (h @ rest.abs()) / h.sum()  # [out]
            scales.append(a)
            rest -= torch.copysign(a, rest)
        return torch.stack(scales)

    def _least_squares(self, codes: Tensor, weight: Tensor, h: Tensor) -> Tensor:
        return self.ordered(self._free(codes, weight, h))

    def ordered(self, scale: Tensor) -> Tensor:
        """The same levels with positive, falling scales [..., K, out]: a negative one only flips its plane."""
        return scale.abs().sort(dim=-2, descending=True).values

    def multiples(self, g: int, codes: Tensor, rows: slice) -> list[Tensor]:
        return [self.plane(codes, p) for p in range(self.planes)]

    def _table(self, scale: Tensor) -> Levels | Greedy:
        return sign_levels(scale)

    def _alternate(self, weight: Tensor, h: Tensor) -> Tensor:
        return self._alternate_two(weight, h) if self.planes == 2 else super()._alternate(weight, h)

    def _alternate_two(self, weight: Tensor, h: Tensor) -> Tensor:
        """The alternation in terms of u = |w| and r, the product of the two signs: 1 where u >= a_1, else -1."""
        u, total = weight.abs(), h.sum()
        energy, first = h @ u.square(), h @ u  # [out]
        scale = tried = to_scale(self.ordered(self._start(weight, h)))  # [2, out]
        best, outer = torch.full_like(first, torch.inf), torch.empty_like(u)
        for _ in range(self.iterations + 1):
            torch.ge(u, tried[0], out=outer)  # [columns, out], 1 or 0: ten times faster than converting a mask
            both = 2 * (h @ outer) - total  # sum h r
            second = 2 * (h @ outer.mul_(u)) - first  # sum h r u
            a, b = tried
            error = energy - 2 * (a * first + b * second) + (a * a + b * b) * total + 2 * a * b * both
            better = error < best - 1e-6 * energy  # what fp32 sums can tell
            if not better.any():
                break
            scale, best = torch.where(better, tried, scale), torch.where(better, error, best)
            # signs that are always equal, or always opposite, make the system singular: the ridge splits the scale
            diagonal = total * (1 + 1e-6)
            determinant = diagonal * diagonal - both * both
            solution = torch.stack([diagonal * first - both * second, diagonal * second - both * first]) / determinant
            tried = to_scale(self.ordered(solution))
        return scale


class TiedSignRounding(AlternatingRounding):
    """K sign planes whose scales halve from one to the next: the nearest odd multiple of one scale of a group. A code
    counts the levels from below, so that its highest bit is the plane of the largest scale."""

    def __init__(self, out: int, columns: int, planes: int, group: int | None, iterations: int, device) -> None:
        super().__init__(out, columns, planes, group, iterations, device)
        self.segment = TiedPlanes(columns, planes, group)
        self.scale = self.scale[:, :1]

    def _start(self, weight: Tensor, h: Tensor) -> Tensor:
        middle = 2 ** (self.planes - 1)  # levels as large as |w| on average
        return ((h @ weight.abs()) / (h.sum() * middle))[None]

    def _least_squares(self, codes: Tensor, weight: Tensor, h: Tensor) -> Tensor:
        odd = codes.float().mul_(2).sub_(2**self.planes - 1)  # [columns, out]
        return ((h @ (odd * weight)).abs() / (h @ odd.square()))[None]

    def _table(self, scale: Tensor) -> OddMultiples:
        return OddMultiples(scale[0], 2**self.planes - 1)

    def pack(self, codes: Tensor) -> PackedWeight:
        return PackedWeight.encode(Format((self.segment,)), {"codes": codes, "scale": self.scale[:, 0].T})
