"""Perplexity by the protocol of the published tables: one token stream, windows that do not overlap."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from itertools import chain
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ultralowbit.data.corpora import token_sha256
from ultralowbit.errors import InputError

Bos = Literal["none", "text"]

_BATCH_TOKENS = 2048
_CHUNK = 1 << 20  # logits upcast at a time: larger fp32 buffers come as fresh pages, which cost more than the work
_CHUNK_ELSEWHERE = 1 << 24  # on a device where each chunk costs a launch and a wait


@dataclass(frozen=True)
class Perplexity:
    """exp(nll), and all that has to agree before two of them may be compared."""

    source: str
    perplexity: float
    nll: float
    """Mean negative log-likelihood, nats a token."""
    windows: int
    context: int
    """Tokens in a window, of which all but the first are predicted."""
    tokens: int
    """Predicted tokens."""
    dtype: str
    """Of the model's parameters; the loss is always fp32, its sum fp64."""
    bos: Bos
    sha256: str
    """Of the token windows, see `token_sha256`."""

    def to_dict(self) -> dict[str, Any]:
        """The fields; a collapsed model's perplexity stays nan or inf, which strict JSON lacks."""
        return asdict(self)

    def __str__(self) -> str:
        return (
            f"{self.source or 'text'}: perplexity {self.perplexity:.4f} ({self.windows} windows of {self.context}, "
            f"{self.tokens} tokens, {self.dtype}, bos {self.bos})"
        )


def token_stream(tokenizer: Any, text: str, *, bos: Bos = "text") -> Tensor:
    """Tokenise a text once: int64 [n].

    "text" keeps the tokenizer's own start token, once, as the published script does, but not an end token; "none" has
    no special tokens. Raises `InputError` for another `bos`.
    """
    if bos not in ("none", "text"):
        raise InputError(f"bos is {bos!r}, expected 'none' or 'text'")

    def encode(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=bos == "text", verbose=False)["input_ids"]

    ids = encode(text)
    # asked of another text: this one may itself end in what reads as the end token
    if bos == "text" and encode("a")[-1:] == [tokenizer.eos_token_id]:
        ids = ids[:-1]
    return torch.tensor(ids, dtype=torch.int64)


def perplexity(
    model: nn.Module,
    tokens: Tensor,
    *,
    context: int,
    max_tokens: int | None = None,
    batch_size: int | None = None,
    source: str = "",
    bos: Bos = "text",
    progress: Callable[[int, int], object] | None = None,
) -> Perplexity:
    """Perplexity of a causal LM on the stream tokens [n], of which the first `max_tokens` count.

    The stream is cut into windows of `context` tokens, the rest is dropped; each window predicts `context - 1` tokens
    from an empty past. `batch_size` is in windows (default: some 2048 tokens) and does not change how losses are
    summed; `source` and `bos` (see `token_stream`) are recorded; `progress` gets the windows done and in all. A
    collapsed model gives nan or inf. Raises `InputError` for a stream shorter than a window, or windows longer than the
    model's positions.
    """
    windows = cut(tokens, context, max_tokens)
    losses: list[float] = []
    for batch, logits in forward(model, windows, batch_size):
        losses += window_losses(logits, batch)
        if progress:
            progress(len(losses), len(windows))
    return from_losses(losses, windows, dtype_of(model, logits), source, bos)


def cut(tokens: Tensor, context: int, max_tokens: int | None = None) -> Tensor:
    """The stream [n], or its first `max_tokens`, in windows that do not overlap: int64 [windows, context].

    Raises `InputError` for what is no stream or too short for one window.
    """
    if tokens.ndim != 1:
        raise InputError(f"tokens have the shape {tuple(tokens.shape)}, expected one stream [n]: flatten them first")
    if context < 2:
        raise InputError(f"context is {context}, expected at least 2: a window predicts all but its first token")
    if max_tokens is not None and max_tokens < 1:
        raise InputError(f"max_tokens is {max_tokens}, expected at least 1, or None for the default")
    stream = tokens[:max_tokens].long()
    windows = stream[: len(stream) // context * context].view(-1, context)
    if not len(windows):
        raise InputError(
            f"the text has {len(stream)} tokens, expected at least {context} for one window: "
            "choose a smaller context or a longer text"
        )
    return windows


@torch.no_grad()
def forward(model: nn.Module, windows: Tensor, batch_size: int | None = None) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches of the windows [windows, context], each with the model's logits [batch, context, vocab] on its device.

    `batch_size` is in windows (default: some 2048 tokens). The model is in evaluation mode while it is asked. Raises
    `InputError` for windows longer than its positions.
    """
    context = windows.shape[1]
    positions = getattr(getattr(model, "config", None), "max_position_embeddings", None)
    if positions is not None and context > positions:
        raise InputError(f"context is {context}, but the model has {positions} positions: choose a context up to those")
    if batch_size is not None and batch_size < 1:
        raise InputError(f"batch_size is {batch_size}, expected at least 1, or None for the default")
    device = next(chain(model.parameters(), model.buffers()), windows).device
    training = model.training
    model.eval()
    try:
        for batch in windows.split(batch_size or batch_windows(context)):
            batch = batch.to(device)
            yield batch, model(batch, use_cache=False).logits
    finally:
        model.train(training)


def batch_windows(context: int) -> int:
    """Windows in a batch unless it is said."""
    return max(1, _BATCH_TOKENS // context)


def window_losses(logits: Tensor, ids: Tensor) -> list[float]:
    """Summed loss, in nats, of each window: logits [batch, context, vocab], ids [batch, context]."""
    return [_loss(*pair) for pair in zip(logits, ids, strict=True)]


def from_losses(losses: list[float], windows: Tensor, dtype: torch.dtype, source: str, bos: Bos) -> Perplexity:
    """The perplexity that the losses of all windows [windows, context] make."""
    count = windows.shape[0] * (windows.shape[1] - 1)
    nll = math.fsum(losses) / count
    return Perplexity(
        source=source,
        perplexity=_exp(nll),
        nll=nll,
        windows=windows.shape[0],
        context=windows.shape[1],
        tokens=count,
        dtype=str(dtype).removeprefix("torch."),
        bos=bos,
        sha256=token_sha256(windows),
    )


def dtype_of(model: nn.Module, logits: Tensor) -> torch.dtype:
    """Of the model's parameters, or of its logits where it has none."""
    return next((p.dtype for p in model.parameters() if p.is_floating_point()), logits.dtype)


def chunk_rows(logits: Tensor) -> int:
    """How many rows of logits [..., vocab] to work on at a time."""
    return max(1, (_CHUNK if logits.device.type == "cpu" else _CHUNK_ELSEWHERE) // logits.shape[-1])


def _loss(logits: Tensor, ids: Tensor) -> float:
    """Summed loss, in nats, of one window: logits [context, vocab], ids [context]."""
    rows = chunk_rows(logits)
    pairs = zip(logits[:-1].split(rows), ids[1:].split(rows), strict=True)
    return sum(F.cross_entropy(part.float(), target, reduction="none").double().sum().item() for part, target in pairs)


def _exp(nll: float) -> float:
    try:
        return math.exp(nll)
    except OverflowError:
        return math.inf
