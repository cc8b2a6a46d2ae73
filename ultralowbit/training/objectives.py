"""What a block, or the whole model, is trained on.

A block objective is given outputs [batch, length, hidden]: yq of the quantized block, and as targets y1, of the
original block on what the original model feeds it, and y2, of the original block on what the quantized one feeds it.

An end-to-end objective is given the `Outputs` of student and teacher on the same tokens [batch, length]. Terms on
hidden states are added to a term on the logits, the `base`. All values are computed in fp32 and are means, so that
learning rates do not depend on batch, length or depth.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ultralowbit.methods.base import fields

CHUNK = 1 << 20
"""Logits whose fp32 forms are held at a time on a CPU, 4 MB each; elsewhere, where every chunk costs a launch, 16 times
as many."""


class Outputs(NamedTuple):
    """logits [batch, length, vocab]; hidden, where the objective wants them, any number of [batch, ..., length, d]."""

    logits: Tensor
    hidden: tuple[Tensor, ...] = ()


class BlockObjective(Protocol):
    """A frozen dataclass whose fields are the recipe's keys."""

    def __call__(self, yq: Tensor, y1: Tensor, y2: Tensor | None = None) -> Tensor:
        """Outputs and targets [batch, length, hidden] -> the scalar to be lowered."""
        ...


class Objective(Protocol):
    """A frozen dataclass whose fields are the recipe's keys. `needs_teacher`, `needs_hidden`: what it looks at."""

    needs_teacher: bool
    needs_hidden: bool

    def preprocess(self, teacher: Outputs | None) -> Loss:
        """The loss, with what is fixed before training. Only those with `needs_hidden` look at the teacher's outputs on
        some calibration windows, always the same ones, or a resumed run would train on another loss."""
        ...


Loss = Callable[[Outputs, Outputs | None, Tensor], Tensor]
"""(student, teacher, tokens [batch, length]) -> the scalar to be lowered."""


# --- of blocks ------------------------------------------------------------------------------------------------------


@fields
class MSE:
    """MSE(yq, y1) + MSE(yq, y2), the mean over all elements; without y2 the first alone.

    normalise: divide each by the mean square of its target, so that a loss says the same in every block.
    """

    kind: Literal["mse"] = "mse"
    normalise: bool = False

    def __call__(self, yq: Tensor, y1: Tensor, y2: Tensor | None = None) -> Tensor:
        return sum(self._one(yq.float(), y.float()) for y in (y1, y2) if y is not None)

    def _one(self, yq: Tensor, y: Tensor) -> Tensor:
        error = F.mse_loss(yq, y)
        return error / y.square().mean().clamp_min(torch.finfo(y.dtype).tiny) if self.normalise else error


@fields
class MSENLC:
    """PTQ1.61's block objective (Zhao et al. 2025, arXiv 2502.13179), for y in y1 and y2 the sum of

    MSE(yq, y) - log |mean over tokens of cos(yq, y)|
    """

    kind: Literal["mse_nlc"] = "mse_nlc"

    def __call__(self, yq: Tensor, y1: Tensor, y2: Tensor | None = None) -> Tensor:
        yq = yq.float()
        return sum(F.mse_loss(yq, y.float()) + self._nlc(yq, y.float()) for y in (y1, y2) if y is not None)

    @staticmethod
    def _nlc(yq: Tensor, y: Tensor) -> Tensor:
        return -F.cosine_similarity(yq, y, dim=-1).mean().abs().clamp_min(torch.finfo(y.dtype).tiny).log()


BLOCK_OBJECTIVES: dict[str, type[BlockObjective]] = {"mse": MSE, "mse_nlc": MSENLC}
"""By the `kind` that a recipe names."""


# --- end to end -----------------------------------------------------------------------------------------------------


def _in_chunks(f: Callable[..., Tensor], *rows: Tensor) -> Tensor:
    """f of rows [positions, ...], a few positions at a time, recomputed for the gradient: what f makes of [positions,
    vocab] in fp32 never lies in memory as a whole."""
    chunks = zip(*(r.split(_rows(rows[0])) for r in rows), strict=True)
    return torch.cat([checkpoint(f, *c, use_reentrant=False, preserve_rng_state=False) for c in chunks])


def cross_entropy(logits: Tensor, tokens: Tensor) -> Tensor:
    """Mean -log p of each next token in tokens [batch, length] under logits [batch, length, vocab]."""

    def rows(logits: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(logits.float(), targets, reduction="none")

    return _in_chunks(rows, logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()).mean()


class _Divergence(torch.autograd.Function):
    """`divergence` of rows [positions, vocab], a few at a time: its gradient (q - p) / temperature of the student's
    logits is made of the logits again, and the teacher's have none."""

    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
        ctx.save_for_backward(student, teacher)
        ctx.temperature = temperature
        values = []
        for rows in zip(student.split(_rows(student)), teacher.split(_rows(student)), strict=True):
            log_q, log_p = (_tempered(logits, temperature).log_softmax(-1) for logits in rows)
            values.append(log_p.exp().mul_(log_p.sub_(log_q)).sum(-1))
        return torch.cat(values)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        student, teacher = ctx.saved_tensors
        result = torch.empty_like(student)
        by_rows = (t.split(_rows(student)) for t in (student, teacher, gradient / ctx.temperature, result))
        for s, t, g, out in zip(*by_rows, strict=True):
            q, p = (_tempered(logits, ctx.temperature).softmax(-1) for logits in (s, t))
            out.copy_(q.sub_(p).mul_(g[:, None]))
        return result, None, None


def _tempered(logits: Tensor, temperature: float) -> Tensor:
    return logits.float() if temperature == 1 else logits.float() / temperature


def _rows(logits: Tensor) -> int:
    """How many rows of logits [positions, vocab] are taken at a time."""
    return max(1, (CHUNK if logits.device.type == "cpu" else 16 * CHUNK) // logits.shape[-1])


def divergence(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """KL(teacher || student) [positions] of the softmax of logits [..., vocab] / temperature."""
    return _Divergence.apply(student.flatten(0, -2), teacher.detach().flatten(0, -2), temperature)


def entropy(teacher: Tensor) -> Tensor:
    """Of the softmax of logits [..., vocab], in nats [positions]."""

    def rows(teacher: Tensor) -> Tensor:
        log_p = teacher.float().log_softmax(-1)
        return -(log_p.exp() * log_p).sum(-1)

    return _in_chunks(rows, teacher.flatten(0, -2))


class _Stateless:
    """Objectives that are themselves the loss."""

    needs_teacher: ClassVar[bool] = True
    needs_hidden: ClassVar[bool] = False

    def preprocess(self, teacher: Outputs | None) -> Loss:
        return self


@fields
class CrossEntropy(_Stateless):
    """Next-token cross-entropy, without a teacher (PB-LLM, EfficientQAT)."""

    needs_teacher: ClassVar[bool] = False
    kind: Literal["ce"] = "ce"

    def __call__(self, student: Outputs, teacher: Outputs | None, tokens: Tensor) -> Tensor:
        return cross_entropy(student.logits, tokens)


@fields
class KL(_Stateless):
    """T^2 KL(teacher || student) of the logits over T, the mean over positions. Hinton, Vinyals, Dean 2015, arXiv
    1503.02531."""

    kind: Literal["kl"] = "kl"
    temperature: float = Field(1.0, gt=0)

    def __call__(self, student: Outputs, teacher: Outputs, tokens: Tensor) -> Tensor:
        return self.temperature**2 * divergence(student.logits, teacher.logits, self.temperature).mean()


@fields
class _WithBase(_Stateless):
    """base + weight * term, where base is "kl" (temperature 1) or "ce"."""

    base: Literal["kl", "ce"] = "kl"
    weight: float = Field(1.0, ge=0)

    def _base(self, student: Outputs, teacher: Outputs, tokens: Tensor) -> Tensor:
        return (KL() if self.base == "kl" else CrossEntropy())(student, teacher, tokens)


@fields
class DAD(_WithBase):
    """Deviation-aware distillation of DB-LLM (Chen et al. 2024, arXiv 2402.11960): positions on which the models are
    uncertain weigh more,

        base + weight * mean_i (U_i / mean U)^gamma KL_i(teacher || student)

    where the factor gets no gradient. U is the teacher's entropy, or with `ambiguity: cross` the cross-entropy of the
    student under the teacher. The paper prints neither its hyper-parameters nor the normalisation by the mean.
    """

    kind: Literal["dad"] = "dad"
    gamma: float = Field(0.1, ge=0)
    ambiguity: Literal["teacher", "cross"] = "teacher"

    def __call__(self, student: Outputs, teacher: Outputs, tokens: Tensor) -> Tensor:
        rows = divergence(student.logits, teacher.logits)
        with torch.no_grad():
            U = entropy(teacher.logits)
            if self.ambiguity == "cross":
                U = U + rows
            U = U.clamp_min(0)  # rounding
            factor = (U / U.mean().clamp_min(torch.finfo(U.dtype).tiny)) ** self.gamma
        base = rows.mean() if self.base == "kl" else cross_entropy(student.logits, tokens)
        return base + self.weight * (factor * rows).mean()


@fields
class Direction(_WithBase):
    """Direction matching of BiBERT (Qin et al., ICLR 2022, arXiv 2203.06390): base + weight * the mean of 1 - cos of
    student's and teacher's token similarities H H^T, each sample, layer and head on its own.

    For a causal model only the similarities to earlier tokens and to itself count, on the first `window` tokens after
    the first one, an attention sink that would outshine the others.
    """

    needs_hidden: ClassVar[bool] = True
    kind: Literal["direction"] = "direction"
    window: int = Field(256, ge=2)

    def __call__(self, student: Outputs, teacher: Outputs, tokens: Tensor) -> Tensor:
        return self._base(student, teacher, tokens) + self.weight * self.term(student, teacher)

    def term(self, student: Outputs, teacher: Outputs) -> Tensor:
        """The mean of 1 - cos over the hidden states [..., length, d]."""
        grams = ((self._gram(s), self._gram(t)) for s, t in _pairs(student, teacher))
        cosines = torch.stack([F.cosine_similarity(s, t, dim=-1).mean() for s, t in grams])
        return 1 - cosines.mean()

    def _gram(self, hidden: Tensor) -> Tensor:
        """hidden [..., length, d] -> the lower triangle [..., pairs] of its similarities."""
        hidden = hidden[..., 1 : 1 + self.window, :].float()
        hidden = hidden / hidden.detach().square().mean((-2, -1), keepdim=True).sqrt().clamp_min(1e-12)  # no overflow
        gram = hidden @ hidden.mT
        rows, columns = torch.tril_indices(*gram.shape[-2:], device=gram.device)
        return gram[..., rows, columns]


@fields
class LowRank(_WithBase):
    """Low-rank representation mimicking of BinaryDM (Zheng et al., ICLR 2025, arXiv 2404.05662): base + weight * the
    mean over layers of

        ||(H_student - H_teacher) V||^2 / ||H_teacher V||^2,   V [d, rank d]

    with V the leading principal directions of the teacher's hidden states, taken once, before training. The first token
    of a window is left out, and tokens with a norm above the 99.9 percentile are scaled down to it, here and in V: a
    few massive activations would otherwise be all that V sees.
    """

    needs_hidden: ClassVar[bool] = True
    kind: Literal["lowrank"] = "lowrank"
    rank: float = Field(0.25, gt=0, le=1)
    seed: int = 0

    def preprocess(self, teacher: Outputs) -> LowRankLoss:
        return LowRankLoss(self, tuple(_basis(h, self.rank, self.seed) for h in teacher.hidden))


class Basis(NamedTuple):
    """Leading directions [d, rank] of a layer, and the norm that its tokens are scaled down to."""

    V: Tensor
    limit: Tensor


@dataclass(frozen=True)
class LowRankLoss:
    """`LowRank` with the directions of each layer."""

    spec: LowRank
    bases: tuple[Basis, ...]

    def __call__(self, student: Outputs, teacher: Outputs, tokens: Tensor) -> Tensor:
        return self.spec._base(student, teacher, tokens) + self.spec.weight * self.term(student, teacher)

    def term(self, student: Outputs, teacher: Outputs) -> Tensor:
        """The mean over layers of the relative squared error of hidden states [batch, length, d] within V."""
        total = 0
        for (s, t), (V, limit) in zip(_pairs(student, teacher), self.bases, strict=True):
            s, t = s[..., 1:, :].float(), t[..., 1:, :].float()
            factor = limit / t.norm(dim=-1, keepdim=True).maximum(limit)
            error, size = (((h * factor) @ V).square().sum() for h in (s - t, t))
            total = total + error / size.clamp_min(torch.finfo(size.dtype).tiny)
        return total / len(self.bases)


def _basis(hidden: Tensor, rank: float, seed: int) -> Basis:
    """Principal directions of hidden [..., length, d]: centred randomised PCA with two power iterations, as in the
    published code, but along the hidden dimension."""
    rows = hidden[..., 1:, :].detach().float().flatten(0, -2)  # [tokens, d]
    norms = rows.norm(dim=1, keepdim=True)
    limit = norms.flatten().kthvalue(max(1, int(0.999 * len(norms)))).values.clamp_min(torch.finfo(norms.dtype).tiny)
    rows = rows * (limit / norms.maximum(limit))
    rows = rows - rows.mean(0)
    width = max(1, round(rank * rows.shape[1]))
    start = torch.randn(rows.shape[1], width, generator=torch.Generator().manual_seed(seed), dtype=torch.float32).to(
        rows
    )
    V = torch.linalg.qr(start).Q
    for _ in range(3):  # a start and two iterations
        V = torch.linalg.qr(rows.T @ (rows @ V)).Q
    return Basis(V, limit)


def _pairs(student: Outputs, teacher: Outputs) -> list[tuple[Tensor, Tensor]]:
    if not student.hidden or len(student.hidden) != len(teacher.hidden):
        raise ValueError(f"{len(student.hidden)} hidden states of the student, {len(teacher.hidden)} of the teacher")
    return list(zip(student.hidden, teacher.hidden, strict=True))


OBJECTIVES: dict[str, type[Objective]] = {
    "ce": CrossEntropy, "kl": KL, "dad": DAD, "direction": Direction, "lowrank": LowRank,
}  # fmt: skip
"""By the `kind` that a recipe names."""
