"""How far the predictions of models are from those of the original, on the windows of perplexity.

At each position, with the next-token distributions p of the original and q of another model,

    KL(p || q) = sum_v p(v) (log p(v) - log q(v))

in nats: 0 where they agree, and blind to whether either is right. It tells models apart on far fewer tokens than
perplexity does, whose own spread from text to text is larger than most differences. The original in another precision,
compared in the same way, is the noise floor: a divergence near it cannot be told from rounding.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ultralowbit.checkpoint import Activations
from ultralowbit.eval.perplexity import CHUNK, Bos, Perplexity, cut, dtype_of, forward, from_losses, window_losses
from ultralowbit.text import InputError, token_sha256


@dataclass(frozen=True)
class Fidelity:
    """Statistics of KL(original || model) over positions, and all that has to agree before two may be compared."""

    source: str
    kl_mean: float
    """Nats a position, as are the median and the 99th percentile."""
    kl_median: float
    kl_p99: float
    top1: float
    """Share of the positions where both hold the same token for the likeliest."""
    windows: int
    context: int
    tokens: int
    """Positions: those whose next token perplexity asks for."""
    dtype: str
    base_dtype: str
    bos: Bos
    sha256: str
    """Of the token windows, see `token_sha256`."""

    def to_dict(self) -> dict[str, Any]:
        """The fields; a collapsed model's divergence stays nan or inf, which strict JSON lacks."""
        return asdict(self)

    def __str__(self) -> str:
        return (
            f"{self.source or 'text'}: KL {self.kl_mean:.5f} nats (median {self.kl_median:.5f}, "
            f"p99 {self.kl_p99:.4f}), top-1 agreement {self.top1:.2%} ({self.windows} windows of {self.context}, "
            f"{self.tokens} tokens, {self.dtype} against {self.base_dtype})"
        )


def divergence(p: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
    """KL(p || q) and whether the likeliest token is the same, of logits [n, vocab]: fp32 [n] and bool [n].

    Equal logits give exactly 0. A token that p rules out adds nothing; nan in either gives nan, and no agreement.
    """
    log_p, log_q = p.float().log_softmax(-1), q.float().log_softmax(-1)
    prob = log_p.exp()
    kl = (prob * (log_p - log_q)).masked_fill_(prob == 0, 0).sum(-1).clamp_(min=0)  # rounding can take it below
    kl[log_q.isnan().any(-1)] = torch.nan  # not only where p is 0
    return kl, (p.argmax(-1) == q.argmax(-1)) & ~kl.isnan()


def observe(
    base: nn.Module,
    models: Sequence[nn.Module],
    tokens: Tensor,
    *,
    context: int,
    max_tokens: int | None = None,
    batch_size: int | None = None,
    source: str = "",
    bos: Bos = "text",
    progress: Callable[[int, int], object] | None = None,
) -> tuple[list[Perplexity], list[Fidelity]]:
    """Perplexity of `base` and of each of the models, and the fidelity of each to `base`, from one forward pass each.

    The arguments are those of `perplexity`, whose numbers these are. Raises `InputError` also for models whose
    vocabularies differ.
    """
    windows = cut(tokens, context, max_tokens)
    everyone = (base, *models)
    losses: list[list[float]] = [[] for _ in everyone]
    dtypes: list[torch.dtype] = []
    found: list[list[tuple[Tensor, Tensor]]] = [[] for _ in models]
    for step in zip(*(forward(model, windows, batch_size) for model in everyone), strict=True):
        for (batch, logits), mine in zip(step, losses, strict=True):
            mine += window_losses(logits, batch)
        p = step[0][1]
        for (_, q), pairs in zip(step[1:], found, strict=True):
            pairs += _divergences(p, q)
        dtypes = dtypes or [dtype_of(model, logits) for model, (_, logits) in zip(everyone, step, strict=True)]
        if progress:
            progress(len(losses[0]), len(windows))
    perplexities = [from_losses(mine, windows, dtype, source, bos) for mine, dtype in zip(losses, dtypes, strict=True)]
    names = [p.dtype for p in perplexities]
    digest = token_sha256(windows)
    fidelities = []
    for pairs, name in zip(found, names[1:], strict=True):
        kl = torch.cat([kl for kl, _ in pairs]).double().numpy()
        same = torch.cat([same for _, same in pairs])
        median, p99 = (float(np.quantile(kl, share, method="inverted_cdf")) for share in (0.5, 0.99))
        fidelities.append(
            Fidelity(
                source=source, kl_mean=float(kl.mean()), kl_median=median, kl_p99=p99,
                top1=same.double().mean().item(), windows=windows.shape[0], context=windows.shape[1],
                tokens=len(kl), dtype=name, base_dtype=names[0], bos=bos, sha256=digest,
            )
        )  # fmt: skip
    return perplexities, fidelities


def _divergences(p: Tensor, q: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """`divergence` at the positions of logits [batch, context, vocab] that have a next token, a chunk at a time."""
    if p.shape[-1] != q.shape[-1]:
        raise InputError(
            f"the models' vocabularies differ ({p.shape[-1]} and {q.shape[-1]} tokens), so their predictions cannot be "
            "compared: give the original that the model was made from"
        )
    rows = max(1, CHUNK // p.shape[-1])
    for a, b in zip(p, q, strict=True):
        for pair in zip(a[:-1].split(rows), b[:-1].split(rows), strict=True):
            yield tuple(t.cpu() for t in divergence(pair[0].to(b.device), pair[1]))


class _Recorded(nn.Module):
    """Gives the logits of the windows again, in order, as the model did that is no longer in memory."""

    def __init__(self, logits: Tensor, dtype: torch.dtype) -> None:
        super().__init__()
        self.logits, self.at = logits, 0
        self.stands_for = nn.Parameter(torch.empty(0, dtype=dtype), requires_grad=False)

    def forward(self, ids: Tensor, use_cache: bool = False) -> SimpleNamespace:
        found = self.logits[self.at : self.at + len(ids)]
        self.at = (self.at + len(ids)) % len(self.logits)
        return SimpleNamespace(logits=found)


@contextmanager
def recorded(
    model: nn.Module,
    windows: Tensor,
    batch_size: int | None = None,
    progress: Callable[[int, int], object] | None = None,
) -> Iterator[nn.Module]:
    """In place of the model on the windows [windows, context]: its logits, exactly, from a temporary file.

    For models that do not fit into memory together. Raises `InputError` where the file does not fit either.
    """
    with tempfile.TemporaryDirectory(prefix="ultralowbit-") as folder:
        store: Activations | None = None
        done = 0
        for batch, logits in forward(model, windows, batch_size):
            if store is None:
                dtype = dtype_of(model, logits)
                shape = (*windows.shape, logits.shape[-1])
                _check_disk(Path(folder), torch.Size(shape).numel() * logits.dtype.itemsize)
                store = Activations(Path(folder) / "logits.bin", shape, logits.dtype, create=True)
            store.tensor[done : done + len(batch)] = logits.cpu()
            done += len(batch)
            if progress:
                progress(done, len(windows))
        yield _Recorded(store.tensor, dtype)


def _check_disk(folder: Path, need: int) -> None:
    free = shutil.disk_usage(folder).free
    if need > 0.9 * free:
        raise InputError(
            f"the models do not fit into memory together, and the original's predictions take {need / 1e9:.1f} GB of "
            f"disk in {folder.parent}, where {free / 1e9:.1f} GB are free: measure fewer tokens, or set TMPDIR"
        )
