"""What the calibration text says about the inputs of a Linear: one `InputStats` for all Linears that share an input.

E(Q) = tr((W - Q) H (W - Q)^T) with H = sum x x^T is the error that every method here works against. H is a plain sum
over tokens, so statistics of parts of the text merge by addition. A method may want less than H, such as how large the
input channels are: only what it needs is gathered.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Flag, auto
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from ultralowbit.kernels.hadamard import block_hadamard
from ultralowbit.kernels.products import add_products
from ultralowbit.methods.bound import Spectrum, spectrum

BLOCK = 256
"""Columns of a block that methods search and update at once. In larger ones a search takes longer than it brings, in
smaller ones it brings less."""


class SingularHessian(ArithmeticError):
    """No damping made the Hessian positive definite."""


class Need(Flag):
    """What a method wants to know of a Linear's inputs; `|` joins, and `in` asks."""

    NOTHING = 0
    MAGNITUDES = auto()
    """The largest and the mean |x| of each channel."""
    HESSIAN = auto()
    ORIGINAL = auto()
    """How the inputs differ from the original model's; with `HESSIAN`."""


@dataclass(frozen=True)
class Factor:
    """R [in, in] fp32 upper triangular with H + damp mean(diag H) I = R R^T, columns in `order`.

    (w - q)^2 R_jj^2 is the loss of rounding column j once the columns before it are fixed. `order` [in] int64 lists the
    columns in the order of rounding, None for left to right.
    """

    R: Tensor
    order: Tensor | None
    damp: float

    @cached_property
    def U(self) -> Tensor:
        """R^-1 [in, in] fp32, so that (H + damp mean(diag H) I)^-1 = U^T U: row j says how the later columns make up
        for an error of column j."""
        return invert_upper(self.R.double()).float()

    @cached_property
    def blocks(self) -> list[tuple[Tensor, Tensor]]:
        """S and S^-1 fp32, S upper triangular with S S^T what R R^T is for the columns of one block, for each."""
        blocks = []
        for low in range(0, len(self.R), BLOCK):
            wide = self.R[low : low + BLOCK, low:].double()  # fp32 sums may leave what is not positive definite
            S = upper_cholesky(wide @ wide.T)
            blocks.append((S.float(), invert_upper(S.clone()).float()))
        return blocks


@dataclass
class InputStats:
    """Statistics of the inputs x [tokens, in] that one or more Linears share.

    needs: what is gathered; asking for anything else is an error. hessian: [in, in] fp32, the sum of x x^T. outliers:
    how many of the largest tokens (by norm) are scaled down to the next largest before they count for it, 0 for none;
    with a share of the tokens that are to come, that is clipping at a percentile of the token norms, exact however the
    text is cut into batches. hadamard: the block of a Hadamard matrix that inputs are multiplied by first, None for
    none; everything is then of the rotated inputs. writes: the outputs of a Linear that the residual stream is made up
    for in, 0 for none; with `Need.ORIGINAL`. half: products may be of numbers rounded to bfloat16, see
    `add_products`.
    """

    features: int
    outliers: int = 0
    device: torch.device | str = "cpu"
    needs: Need = Need.HESSIAN
    hadamard: int | None = None
    writes: int = 0
    half: bool = False
    count: int = 0
    notes: list[str] = field(default_factory=list)
    _factors: dict[Any, Factor] = field(default_factory=dict, repr=False)
    _spectrum: Spectrum | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        if Need.MAGNITUDES in self.needs:
            self._absmax = torch.zeros(self.features, dtype=torch.float32, device=self.device)
            self._abssum = torch.zeros(self.features, dtype=torch.float32, device=self.device)
        if Need.HESSIAN in self.needs:
            self._sum = torch.zeros(self.features, self.features, dtype=torch.float32, device=self.device)
        if Need.ORIGINAL in self.needs:
            self._cross = torch.zeros(self.features, self.features, dtype=torch.float32, device=self.device)
        if self.writes:
            self._residual = torch.zeros(self.writes, self.features, dtype=torch.float32, device=self.device)
        self._largest = torch.zeros(0, self.features, dtype=torch.float32, device=self.device)

    def add(self, x: Tensor, original: Tensor | None = None, residual: Tensor | None = None) -> None:
        """Count the tokens of x [..., in].

        With `Need.ORIGINAL`, original [..., in] is what the same tokens are in the original model, and with `writes`
        residual [..., out] how the stream that the outputs are added to differs there from here, the original's minus
        this one.
        """
        x = self.rotated(x)
        self.count += len(x)
        if Need.ORIGINAL in self.needs:
            add_products(self._cross, self.rotated(original) - x, x, self.half)
            if self.writes:
                add_products(self._residual, residual.reshape(len(x), -1).float(), x, self.half)
        if Need.MAGNITUDES in self.needs and len(x):
            size = x.abs()
            self._absmax = torch.maximum(self._absmax, size.amax(0))
            self._abssum += size.sum(0)
        if Need.HESSIAN in self.needs:
            if self.outliers:
                x = self._hold_back(x)
            add_products(self._sum, x, half=self.half)
            self.forget_factors()

    def __iadd__(self, part: InputStats) -> InputStats:
        """Count what another part of the text has counted, whose statistics are then used up."""
        self.take_extremes(part, part.count, part.extremes)
        for mine, theirs in zip(self.sums, part.sums, strict=True):
            mine += theirs
        return self

    @property
    def sums(self) -> list[Tensor]:
        """What is added up over tokens, always in the same order: sums of parts of the text are those of the whole."""
        named = (
            (Need.MAGNITUDES in self.needs, "_abssum"), (Need.HESSIAN in self.needs, "_sum"),
            (Need.ORIGINAL in self.needs, "_cross"), (self.writes > 0, "_residual"),
        )  # fmt: skip
        return [getattr(self, name) for there, name in named if there]

    @property
    def extremes(self) -> Tensor:
        """What parts of the text compare, [tokens, in] fp32: max |x| where that is gathered, then the tokens held
        back."""
        absmax = [self._absmax[None]] if Need.MAGNITUDES in self.needs else []
        return torch.cat([*absmax, self._largest])

    def take_extremes(self, part: InputStats | None, count: int, extremes: Tensor) -> None:
        """Take over all of another part of the text, `count` tokens, but its `sums`, to which the tokens are added that
        are not among the largest any more; no part where another process has those sums."""
        self.count += count
        self.forget_factors()
        if Need.MAGNITUDES in self.needs:
            self._absmax, extremes = torch.maximum(self._absmax, extremes[0]), extremes[1:]
        if self.outliers and Need.HESSIAN in self.needs:
            rest = self._hold_back(extremes)
            if part is not None:
                part._sum.addmm_(rest.T, rest)

    def rotated(self, x: Tensor) -> Tensor:
        """x [..., in] as tokens [tokens, in] fp32, in the basis that the statistics are of."""
        x = x.reshape(-1, self.features).float()
        return x if self.hadamard is None else block_hadamard(x, self.hadamard)

    def _hold_back(self, x: Tensor) -> Tensor:
        """Keep the `outliers` largest tokens seen so far, and the one that sets their bound; return the others."""
        x = torch.cat([self._largest, x])
        order = x.norm(dim=1).argsort(descending=True, stable=True)
        kept = order[: self.outliers + 1]
        self._largest = x[kept]
        rest = torch.ones(len(x), dtype=torch.bool, device=x.device)
        rest[kept] = False
        return x[rest]

    @property
    def absmax(self) -> Tensor:
        """max |x| [in] fp32 over all tokens, 0 before any; as they are, never scaled down."""
        return self._absmax

    @property
    def absmean(self) -> Tensor:
        """mean |x| [in] fp32 over all tokens, 0 before any; as they are, never scaled down."""
        return self._abssum / max(1, self.count)

    @property
    def cross(self) -> Tensor:
        """C [in, in] fp32, the sum of (x_o - x) x^T, x_o the original model's inputs."""
        return self._cross

    @property
    def residual(self) -> Tensor | None:
        """S [out, in] fp32, the sum of (r_o - r) x^T for the residual stream r; None where none was given."""
        return self._residual if self.writes else None

    @property
    def hessian(self) -> Tensor:
        """H [in, in] fp32; the tokens above the bound count scaled down to it."""
        if not self.outliers or not len(self._largest):
            return self._sum
        norms = self._largest.norm(dim=1, keepdim=True)
        clipped = self._largest * (norms[-1:] / norms.clamp_min(torch.finfo(norms.dtype).tiny))
        return self._sum + clipped.T @ clipped

    def factor(self, damp: float, act_order: bool = False, last: Tensor | None = None) -> Factor:
        """The factor of the damped inverse Hessian, kept for the other Linears of this input.

        damp is relative to mean(diag H) and grows tenfold while the Cholesky factorisation fails; `notes` then says
        so. act_order sorts the columns by falling diag H; those that last [in] bool marks then follow all others.
        Raises `SingularHessian` past damp 10.
        """
        key = (damp, act_order, None if last is None else tuple(last.tolist()))
        if key not in self._factors:
            self._factors[key] = self._factorise(damp, act_order, last)
        return self._factors[key]

    @property
    def spectrum(self) -> Spectrum:
        """How the eigenvalues of H are distributed, kept for the other Linears of this input."""
        if self._spectrum is None:
            self._spectrum = spectrum(self.hessian)
        return self._spectrum

    def forget_factors(self) -> None:
        """Let what is made of H be computed again."""
        self._factors.clear()
        self._spectrum = None

    def _factorise(self, damp: float, act_order: bool, last: Tensor | None) -> Factor:
        H = self.hessian
        diag = H.diagonal().double()
        if not diag.isfinite().all():
            raise SingularHessian("its activations are not finite (NaN or Inf)")
        dead = diag == 0
        if dead.any():
            self.notes.append(f"{int(dead.sum())} of {self.features} input channels are zero on all calibration text")
            diag[dead] = diag.mean() if not dead.all() else 1.0
        order = diag.argsort(descending=True, stable=True) if act_order else None
        if last is not None:
            order = torch.arange(self.features, device=diag.device) if order is None else order
            order = order[last[order].to(torch.uint8).argsort(stable=True)]
        backwards = None if order is None else order.flip(0)
        # fp64: at 1-2 bits the small eigenvalues decide where the error goes
        H = (H.flip(0, 1) if order is None else H[backwards][:, backwards]).double()
        H.diagonal().copy_(diag.flip(0) if order is None else diag[backwards])
        step = damp * H.diagonal().mean()
        total = damp
        H.diagonal().add_(step)
        while True:
            # with J the reversal, J H J = L L^T gives H = R R^T for the upper R = J L J
            L, info = torch.linalg.cholesky_ex(H)
            if info.item() == 0:
                break
            if total > 1:
                raise SingularHessian(f"its Hessian is not positive definite even with damping {total:g}")
            self.notes.append(f"the Cholesky factorisation failed with damping {total:g}, tried {10 * total:g}")
            H.diagonal().add_(9 * step)
            step, total = 10 * step, 10 * total
        del H
        return Factor(L.float().flip(0, 1), order, total)


def upper_cholesky(H: Tensor) -> Tensor:
    """R, upper triangular, with H = R R^T: with J the reversal, J H J = L L^T gives R = J L J."""
    return torch.linalg.cholesky(H.flip(0, 1)).flip(0, 1)


def invert_upper(R: Tensor, leaf: int = 256) -> Tensor:
    """Inverse of an upper triangular matrix, in place, by halves: a third of the work of solving against I."""
    n = len(R)
    if n <= leaf:
        return R.copy_(torch.linalg.solve_triangular(R, torch.eye(n, dtype=R.dtype, device=R.device), upper=True))
    h = n // 2
    A, B, D = invert_upper(R[:h, :h], leaf), R[:h, h:], invert_upper(R[h:, h:], leaf)
    B.copy_(-(A @ B @ D))
    return R


def relative_error(weight: Tensor, quantized: Tensor, hessian: Tensor, energy: Tensor) -> float:
    """tr(D H D^T) / tr(W H W^T), D = W - Q: the share of the output's energy, tr(W H W^T) [] fp64, that is lost on the
    calibration text."""
    return (output_energy(weight - quantized, hessian) / energy).item() if energy > 0 else 0.0


def output_energy(rows: Tensor, H: Tensor, block: int = 1024) -> Tensor:
    """tr(R H R^T) [] fp64 of rows [out, in], by blocks of columns: H [in, in] is symmetric, so the blocks above the
    diagonal count twice."""
    total = rows.new_zeros((), dtype=torch.float64)
    for i in range(0, len(H), block):
        part, here = rows[:, i : i + block], slice(i, i + block)
        product = torch.addmm(part @ H[here, here], rows[:, :i], H[:i, here], alpha=2)
        total += product.mul_(part).sum(dtype=torch.float64)
    return total
