"""One forward pass over the windows of a text, from which every metric takes what it needs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import chain
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ultralowbit.checkpoint.config import positions
from ultralowbit.data.corpora import token_sha256
from ultralowbit.data.tokenize import encode, tokenize
from ultralowbit.errors import InputError, naming_memory
from ultralowbit.eval.base import Bos, Metric, Result, without_original

_BATCH_TOKENS = 2048
_MOST_BATCH_TOKENS = 32768  # on a device where a small batch leaves most of the processors idle
_CHUNK = 1 << 20  # logits upcast at a time: larger fp32 buffers come as fresh pages, which cost more than the work
_CHUNK_ELSEWHERE = 1 << 26  # on a device where each chunk costs some launches


def token_stream(tokenizer: Any, text: str, *, bos: Bos = "text") -> Tensor:
    """Tokenize a text once: int64 [n], with the special tokens that `framed` adds."""
    return framed(tokenizer, np.concatenate([*tokenize(tokenizer, [text])]), bos)


def framed(tokenizer: Any, ids: np.ndarray, bos: Bos) -> Tensor:
    """The tokens of a text [n], which have no special tokens, as the stream that is measured: int64 [n + k].

    "text" adds the tokenizer's own start token, once, as the published script does, but not an end token; "none" adds
    no special tokens. Raises `InputError` for another `bos`.
    """
    if bos not in ("none", "text"):
        raise InputError(f"bos is {bos!r}, expected 'none' or 'text'")
    stream = torch.from_numpy(ids.astype(np.int64))
    if bos == "none":
        return stream
    plain, whole = encode(tokenizer, "a"), tokenizer("a", verbose=False)["input_ids"]
    begin = next(k for k in range(len(whole) + 1) if whole[k : k + len(plain)] == plain)
    end = whole[begin + len(plain) :]
    if end[-1:] == [tokenizer.eos_token_id]:
        end = end[:-1]
    return torch.cat([torch.tensor(whole[:begin], dtype=torch.int64), stream, torch.tensor(end, dtype=torch.int64)])


def cut(tokens: Tensor, context: int, max_tokens: int | None = None) -> Tensor:
    """Cut the stream [n], or its first `max_tokens`, into windows that do not overlap: int64 [windows, context].

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
    """Yield batches of the windows [windows, context], each with the model's logits [batch, context, vocab], on its
    device.

    `batch_size` is in windows (default: what `batch_windows` says). The model is in evaluation mode while it is asked.
    Raises `InputError` for windows longer than its positions.
    """
    context = windows.shape[1]
    most = positions(model.config) if hasattr(model, "config") else None
    if most is not None and context > most:
        raise InputError(f"context is {context}, but the model has {most} positions: choose a context up to those")
    if batch_size is not None and batch_size < 1:
        raise InputError(f"batch_size is {batch_size}, expected at least 1, or None for the default")
    device = _device(model, windows)
    training = model.training
    model.eval()
    try:
        for batch in windows.split(batch_size or batch_windows([model], windows)):
            with naming_memory(
                f"running windows of {context} tokens through {getattr(model, 'name_or_path', 'a model')}",
                "free some, or give a shorter --context or --device cpu, then run the same command to go on",
            ):
                batch = batch.to(device)
                logits = model(batch, use_cache=False).logits
            yield batch, logits
    finally:
        model.train(training)


def measure(
    models: Sequence[nn.Module],
    tokens: Tensor,
    metrics: Mapping[str, Metric],
    *,
    context: int,
    original: nn.Module | None = None,
    max_tokens: int | None = None,
    batch_size: int | None = None,
    source: str = "",
    bos: Bos = "text",
    progress: Callable[[int, int], object] | None = None,
) -> list[dict[str, Result]]:
    """Measure causal LMs on the stream tokens [n], of which the first `max_tokens` count, in one forward pass each.

    The stream is cut into windows of `context` tokens and the rest is dropped; each window predicts `context - 1`
    tokens from an empty past. `batch_size` is in windows (default: what `batch_windows` says) and does not change how
    numbers are summed; `source` and `bos` (see `token_stream`) are recorded; `progress` gets the windows done and in
    all.

    Returns for each model a result by the name of its metric. With an `original` the list begins with its results, of
    the metrics that need none; without one only those are measured. Raises `InputError` for a stream shorter than a
    window, windows longer than a model's positions, and vocabularies that differ.
    """
    windows = cut(tokens, context, max_tokens)
    alone = without_original(metrics)
    asked = [model for model in (original, *models) if model is not None]
    wanted = [alone, *[metrics] * len(models)] if original is not None else [alone] * len(models)
    observers = [_Observer(model, chosen) for model, chosen in zip(asked, wanted, strict=True)]
    batch_size = batch_windows(asked, windows) if batch_size is None else batch_size
    passes = [forward(model, windows, batch_size) for model in asked]
    done = 0
    for batch, logits in passes[0]:
        observers[0].add(batch, logits, None)
        for observer, others in zip(observers[1:], passes[1:], strict=True):  # two models' logits at a time in memory
            theirs, predicted = next(others)
            observer.add(theirs, predicted, None if original is None else logits)
        done += len(batch)
        if progress:
            progress(done, len(windows))
    for each in passes:
        each.close()
    how = {
        "source": source, "windows": windows.shape[0], "context": context, "tokens": windows.shape[0] * (context - 1),
        "bos": bos, "sha256": token_sha256(windows),
    }  # fmt: skip
    return [observer.results(how, None if original is None else observers[0].dtype) for observer in observers]


class _Observer:
    """What the batches so far have shown of one model."""

    def __init__(self, model: nn.Module, metrics: Mapping[str, Metric]) -> None:
        self.model, self.metrics = model, metrics
        self.dtype: str | None = None
        self.accumulators = {name: metric.start() for name, metric in metrics.items()}

    def add(self, batch: Tensor, logits: Tensor, original: Tensor | None) -> None:
        self.dtype = self.dtype or dtype_of(self.model, logits)
        if original is not None and original.shape[-1] != logits.shape[-1]:
            raise InputError(
                f"the models' vocabularies differ ({original.shape[-1]} and {logits.shape[-1]} tokens), so their "
                "predictions cannot be compared: give the original that the model was made from"
            )
        for name, accumulator in self.accumulators.items():
            accumulator.add(batch, logits, original if self.metrics[name].needs_original else None)

    def results(self, how: Mapping[str, Any], original_dtype: str | None) -> dict[str, Result]:
        return {
            name: accumulator.result(
                Result(**how, dtype=self.dtype, original_dtype=original_dtype if metric.needs_original else None)
            )
            for (name, metric), accumulator in zip(self.metrics.items(), self.accumulators.values(), strict=True)
        }


def batch_windows(models: Sequence[nn.Module], windows: Tensor) -> int:
    """Windows in a batch unless it is said, for models that are asked the same windows [windows, context].

    Some 2048 tokens on a CPU, whose caches hold no more anyway; elsewhere as many as leave the logits of two models, in
    fp32, a sixteenth of the device's memory, and a quarter of what of it is free.
    """
    tokens = _BATCH_TOKENS
    device = _device(models[0], windows)
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        bytes_each = 2 * 4 * max(getattr(getattr(m, "config", None), "vocab_size", None) or 1 << 18 for m in models)
        tokens = max(_BATCH_TOKENS, min(_MOST_BATCH_TOKENS, total // 16 // bytes_each, free // 4 // bytes_each))
    return max(1, tokens // windows.shape[1])


def _device(model: nn.Module, windows: Tensor) -> torch.device:
    """Where the model is, or the windows if it holds no tensor."""
    return next(chain(model.parameters(), model.buffers()), windows).device


def dtype_of(model: nn.Module, logits: Tensor) -> str:
    """Name of the dtype of the model's parameters, or of its logits where it has none."""
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), logits.dtype)
    return str(dtype).removeprefix("torch.")


def chunk_rows(logits: Tensor) -> int:
    """How many rows of logits [..., vocab] to work on at a time."""
    return max(1, (_CHUNK if logits.device.type == "cpu" else _CHUNK_ELSEWHERE) // logits.shape[-1])
