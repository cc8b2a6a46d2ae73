"""How far the predictions of a model are from those of the original, on the windows of perplexity.

At each position, with the next-token distributions p of the original and q of another model,

    KL(p || q) = sum_v p(v) (log p(v) - log q(v))

in nats: 0 where they agree, and blind to whether either is right. It tells models apart on far fewer tokens than
perplexity does, whose own spread from text to text is larger than most differences. The original in another precision,
compared in the same way, is the noise floor: a divergence near it cannot be told from rounding.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ultralowbit.checkpoint.activations import Activations, lanes_of
from ultralowbit.data.corpora import token_sha256
from ultralowbit.errors import InputError
from ultralowbit.eval.base import Metric, Quantity, Result
from ultralowbit.eval.windows import chunk_rows, dtype_of, forward
from ultralowbit.units import format_bytes


@dataclass(frozen=True, kw_only=True)
class Fidelity(Result):
    """Statistics of KL(original || model) over the positions whose next token perplexity asks for."""

    kl_mean: float
    """Nats per position, as are the median and the 99th percentile."""
    kl_median: float
    kl_p99: float
    top1: float
    """Share of the positions where both hold the same token for the likeliest."""

    def __str__(self) -> str:
        return (
            f"{self.source or 'text'}: KL {self.kl_mean:.5f} nats (median {self.kl_median:.5f}, "
            f"p99 {self.kl_p99:.4f}), top-1 agreement {self.top1:.2%} ({self.windows} windows of {self.context}, "
            f"{self.tokens} tokens, {self.dtype} against {self.original_dtype})"
        )


def divergence(p: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
    """KL(p || q) and whether the likeliest token is the same, of logits [n, vocab]: fp32 [n] and bool [n].

    Equal logits give exactly 0. A token that p rules out adds nothing; nan in either gives nan, and no agreement.
    """
    log_p, log_q = p.float().log_softmax(-1), q.float().log_softmax(-1)
    prob = log_p.exp()
    kl = torch.linalg.vecdot(prob, log_p - log_q)
    odd = kl.isnan()
    if odd.any():  # 0 times infinity, unless q is nan
        terms = (prob[odd] * (log_p[odd] - log_q[odd])).masked_fill_(prob[odd] == 0, 0)
        kl[odd] = torch.where(log_q[odd].isnan().any(-1), torch.nan, terms.sum(-1))
    kl.clamp_(min=0)  # rounding can take it below
    return kl, (p.argmax(-1) == q.argmax(-1)) & ~kl.isnan()


def divergences(original: Tensor, logits: Tensor) -> tuple[Tensor, Tensor]:
    """`divergence` at each position of windows but the last, of logits [windows, context, vocab], some rows at a time.

    Returns fp32 and bool [windows, context - 1] on the device of `logits`; `original` may be on another one.
    """
    rows = chunk_rows(logits)
    pairs = zip(original.flatten(0, 1).split(rows), logits.flatten(0, 1).split(rows), strict=True)
    kl, same = zip(*(divergence(p.to(q.device), q) for p, q in pairs), strict=True)
    return torch.cat(kl).view(logits.shape[:2])[:, :-1], torch.cat(same).view(logits.shape[:2])[:, :-1]


class _Divergences:
    """KL divergence and agreement at each position so far; they stay where the logits are."""

    def __init__(self) -> None:
        self.kl: list[Tensor] = []
        self.same: list[Tensor] = []

    def add(self, tokens: Tensor, logits: Tensor, original: Tensor) -> None:
        kl, same = divergences(original, logits)
        self.kl.append(kl)
        self.same.append(same)

    def result(self, how: Result) -> Fidelity:
        kl = torch.cat(self.kl).cpu().double().flatten().numpy()
        median, p99 = (float(np.quantile(kl, share, method="inverted_cdf")) for share in (0.5, 0.99))
        top1 = torch.cat(self.same).double().mean().item()
        return Fidelity(**vars(how), kl_mean=float(kl.mean()), kl_median=median, kl_p99=p99, top1=top1)


class FidelityMetric(Metric):
    """Divergence from the original, which the model was made from."""

    name = "fidelity"
    result = Fidelity
    needs_original = True
    quantities = (
        Quantity("kl_mean", "KL mean, nats", "nats", "lower", "KL divergence", drawn=True),
        Quantity("kl_median", "median", "nats", "lower", "median of the KL divergence"),
        Quantity("kl_p99", "p99", "nats", "lower", "99th percentile of the KL divergence"),
        Quantity("top1", "same top-1", "percent", "higher", "share of positions with the same likeliest token"),
    )

    def start(self) -> _Divergences:
        return _Divergences()

    def sentence(self, result: Fidelity) -> str:
        mean, median, p99, top1 = self.cells(result)
        return (
            f"divergence from the original on {result.source}: {mean} nats per token (median {median}, 99th percentile "
            f"{p99}), with the same likeliest token at {top1} of positions"
        )


@dataclass(frozen=True, kw_only=True)
class Depth(Result):
    """KL(original || original with its first 1, 2, ... blocks those of the model): what the blocks up to each cost
    together. The embeddings and the head are the original's."""

    kl: tuple[float, ...]
    """Mean nats per position, one for each block."""


def by_depth(
    base: nn.Module,
    blocks: nn.ModuleList,
    others: nn.ModuleList,
    windows: Tensor,
    *,
    source: str = "",
    progress: Callable[[int, int], object] | None = None,
) -> Depth:
    """Measure how the divergence builds up along the blocks, with half a forward pass of `base` for each block.

    blocks: those of `base`, which are put back afterwards; others: those of the other model, as many and on the same
    device; windows: int64 [windows, context].
    """
    own, means = list(blocks), []
    logits = [p for _, p in forward(base, windows)]
    try:
        for k, block in enumerate(others):
            blocks[k] = block
            outputs: list[Any] = []  # a batch at a time
            handle = block.register_forward_hook(lambda module, args, out, outputs=outputs: outputs.append(out))
            kl = [divergences(p, q)[0] for (_, q), p in zip(forward(base, windows), logits, strict=True)]
            handle.remove()
            means.append(torch.cat(kl).cpu().double().mean().item())
            _replay(blocks[: k + 1], outputs)
            if progress:
                progress(k + 1, len(others))
    finally:
        for k, block in enumerate(own):
            blocks[k] = block
        for block in others:
            block.__dict__.pop("forward", None)
    dtype = dtype_of(base, logits[0])
    return Depth(
        source=source, kl=tuple(means), windows=windows.shape[0], context=windows.shape[1],
        tokens=windows.shape[0] * (windows.shape[1] - 1), dtype=dtype, original_dtype=dtype,
        sha256=token_sha256(windows),
    )  # fmt: skip


def _replay(blocks: Iterable[nn.Module], outputs: Iterable[Any]) -> None:
    """Have the first blocks of a model give what the last of them put out for each batch, instead of running."""
    batches, now = cycle(outputs), []

    def first(*args: Any, **kwargs: Any) -> Any:
        now[:] = [next(batches)]
        return now[0]

    def later(*args: Any, **kwargs: Any) -> Any:
        return now[0]

    for i, block in enumerate(blocks):
        block.forward = later if i else first


class _Recorded(nn.Module):
    """Gives the logits of the windows again, in order, as the model did that is no longer in memory."""

    def __init__(self, logits: Activations, dtype: torch.dtype) -> None:
        super().__init__()
        self.logits, self.at = logits, 0  # a window after the other
        self.stands_for = nn.Parameter(torch.empty(0, dtype=dtype), requires_grad=False)

    def forward(self, ids: Tensor, use_cache: bool = False) -> SimpleNamespace:
        logits = torch.stack([self.logits[k] for k in range(self.at, self.at + len(ids))])
        self.at = (self.at + len(ids)) % len(self.logits)
        return SimpleNamespace(logits=logits)


@contextmanager
def recorded(
    model: nn.Module,
    windows: Tensor,
    batch_size: int | None = None,
    progress: Callable[[int, int], object] | None = None,
) -> Iterator[nn.Module]:
    """Yield what stands in for the model on the windows [windows, context]: it gives exactly the model's logits, which
    lie in temporary files.

    For models that do not fit into memory together. Raises `InputError` where they do not fit either.
    """
    with tempfile.TemporaryDirectory(prefix="ultralowbit-") as folder:
        store: Activations | None = None
        done = 0
        for _, logits in forward(model, windows, batch_size):
            if store is None:
                dtype = dtype_of(model, logits)
                shape = (*windows.shape, logits.shape[-1])
                _check_disk(Path(folder), torch.Size(shape).numel() * logits.dtype.itemsize)
                lanes = range(len(lanes_of(len(windows))))
                store = Activations(Path(folder) / "logits", shape, logits.dtype, lanes)
            for window in logits:
                store[done].copy_(window)
                done += 1
            if progress:
                progress(done, len(windows))
        del model, logits, window  # the caller's hands are to be the last that hold the model
        yield _Recorded(store, getattr(torch, dtype))


def _check_disk(folder: Path, need: int) -> None:
    free = shutil.disk_usage(folder).free
    if need > 0.9 * free:
        raise InputError(
            f"the models do not fit into memory together, and the original's predictions take {format_bytes(need)} "
            f"of disk in {folder.parent}, where {format_bytes(free)} are free: measure fewer tokens, or set TMPDIR"
        )
