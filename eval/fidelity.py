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

from ultralowbit.checkpoint.activations import Activations
from ultralowbit.data.corpora import token_sha256
from ultralowbit.errors import InputError
from ultralowbit.eval.perplexity import Bos, Perplexity, chunk_rows, cut, dtype_of, forward, from_losses, window_losses


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
    kl = torch.linalg.vecdot(prob, log_p - log_q)
    odd = kl.isnan()
    if odd.any():  # 0 times infinity, unless q is nan
        terms = (prob[odd] * (log_p[odd] - log_q[odd])).masked_fill_(prob[odd] == 0, 0)
        kl[odd] = torch.where(log_q[odd].isnan().any(-1), torch.nan, terms.sum(-1))
    kl.clamp_(min=0)  # rounding can take it below
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
    seen = [_Seen(model) for model in (base, *models)]
    passes = [forward(one.model, windows, batch_size) for one in seen]
    for batch, p in passes[0]:
        seen[0].add(batch, p)
        for one, others in zip(seen[1:], passes[1:], strict=True):  # two models' logits are in memory at a time
            _, q = next(others)
            one.add(batch, q)
            one.compare(p, q)
        if progress:
            progress(len(seen[0].losses), len(windows))
    for one in passes:
        one.close()
    perplexities = [from_losses(one.losses, windows, one.dtype, source, bos) for one in seen]
    return perplexities, [
        one.fidelity(mine, perplexities[0].dtype) for one, mine in zip(seen[1:], perplexities[1:], strict=True)
    ]


class _Seen:
    """What the batches so far have shown of one model."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.dtype: torch.dtype | None = None
        self.losses: list[float] = []
        self.found: list[tuple[Tensor, Tensor]] = []

    def add(self, batch: Tensor, logits: Tensor) -> None:
        self.dtype = self.dtype or dtype_of(self.model, logits)
        self.losses += window_losses(logits, batch)

    def compare(self, p: Tensor, q: Tensor) -> None:
        """Take the original's logits and the model's, both [batch, context, vocab], where there is a next token."""
        if p.shape[-1] != q.shape[-1]:
            raise InputError(
                f"the models' vocabularies differ ({p.shape[-1]} and {q.shape[-1]} tokens), so their predictions "
                "cannot be compared: give the original that the model was made from"
            )
        rows = chunk_rows(q)
        for a, b in zip(p, q, strict=True):
            for pair in zip(a[:-1].split(rows), b[:-1].split(rows), strict=True):
                kl, same = divergence(pair[0].to(b.device), pair[1])
                self.found.append((kl.cpu(), same.cpu()))

    def fidelity(self, mine: Perplexity, base_dtype: str) -> Fidelity:
        kl = torch.cat([kl for kl, _ in self.found]).double().numpy()
        median, p99 = (float(np.quantile(kl, share, method="inverted_cdf")) for share in (0.5, 0.99))
        return Fidelity(
            source=mine.source, kl_mean=float(kl.mean()), kl_median=median, kl_p99=p99,
            top1=torch.cat([same for _, same in self.found]).double().mean().item(), windows=mine.windows,
            context=mine.context, tokens=mine.tokens, dtype=mine.dtype, base_dtype=base_dtype, bos=mine.bos,
            sha256=mine.sha256,
        )  # fmt: skip


@dataclass(frozen=True)
class Depth:
    """KL(original || original with its first 1, 2, ... blocks those of the model), mean nats a position: what the
    blocks up to each cost together. The embeddings and the head are the original's."""

    source: str
    kl: tuple[float, ...]
    windows: int
    context: int
    tokens: int
    dtype: str
    sha256: str
    """Of the token windows, see `token_sha256`."""

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def by_depth(
    base: nn.Module,
    blocks: nn.ModuleList,
    others: nn.ModuleList,
    windows: Tensor,
    *,
    source: str = "",
    progress: Callable[[int, int], object] | None = None,
) -> Depth:
    """The divergence that builds up along the blocks, on windows [windows, context]: a forward pass of `base` for each.

    blocks: of `base`, which are put back; others: of the other model, as many, on the same device.
    """
    kept, found = list(blocks), []
    logits = [p for _, p in forward(base, windows)]
    try:
        for k, block in enumerate(others):
            blocks[k] = block
            sums = 0.0
            for (_, q), p in zip(forward(base, windows), logits, strict=True):
                rows = chunk_rows(q)
                for pair in zip(p[:, :-1].flatten(0, 1).split(rows), q[:, :-1].flatten(0, 1).split(rows), strict=True):
                    sums += divergence(*pair)[0].double().sum().item()
            found.append(sums / (windows.shape[0] * (windows.shape[1] - 1)))
            if progress:
                progress(k + 1, len(others))
    finally:
        for k, block in enumerate(kept):
            blocks[k] = block
    return Depth(
        source=source, kl=tuple(found), windows=windows.shape[0], context=windows.shape[1],
        tokens=windows.shape[0] * (windows.shape[1] - 1), dtype=str(dtype_of(base, logits[0])).removeprefix("torch."),
        sha256=token_sha256(windows),
    )  # fmt: skip


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
        del model, logits  # the caller's hands are to be the last that hold the model
        yield _Recorded(store.tensor, dtype)


def _check_disk(folder: Path, need: int) -> None:
    free = shutil.disk_usage(folder).free
    if need > 0.9 * free:
        raise InputError(
            f"the models do not fit into memory together, and the original's predictions take {need / 1e9:.1f} GB of "
            f"disk in {folder.parent}, where {free / 1e9:.1f} GB are free: measure fewer tokens, or set TMPDIR"
        )
