"""Whether texts have pieces in common: what a model was calibrated or trained on, and what it is judged by."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

SPAN = 32
"""Tokens that two texts have in common where one holds a piece of the other: phrases are shorter."""
_BASE = 6364136223846793005  # of a rolling hash modulo 2^64, which int64 products are


def seen_share(texts: Iterable[Tensor], stream: Tensor) -> float:
    """The share of the texts, each of windows [windows, length], that stands in a stream [tokens]; by spans of `SPAN`
    tokens, whose hashes are compared. 0 where all windows are shorter."""
    there = _hashes(stream.unfold(0, SPAN, 1)) if len(stream) >= SPAN else torch.empty(0, dtype=torch.int64)
    spans = [_hashes(windows.unfold(1, SPAN, SPAN).reshape(-1, SPAN)) for windows in texts if windows.shape[1] >= SPAN]
    hashes = torch.cat(spans) if spans else torch.empty(0, dtype=torch.int64)
    return torch.isin(hashes, there).double().mean().item() if len(hashes) else 0.0


def apart(windows: Tensor, others: Tensor) -> Tensor:
    """[windows] bool: which windows [windows, length] have no `SPAN` tokens that stand in one of others [m, length];
    pieces of less than twice as many may be missed."""
    if windows.shape[1] < SPAN:
        return torch.ones(len(windows), dtype=torch.bool)
    there = _hashes(others.unfold(1, SPAN, 1).reshape(-1, SPAN))
    spans = windows.unfold(1, SPAN, SPAN)  # [windows, spans, SPAN]
    return ~torch.isin(_hashes(spans.reshape(-1, SPAN)), there).view(spans.shape[:2]).any(1)


def _hashes(spans: Tensor) -> Tensor:
    """[spans] int64 of [spans, SPAN] token ids."""
    hashes = torch.zeros(len(spans), dtype=torch.int64)
    for column in spans.unbind(1):
        hashes = hashes * _BASE + column + 1
    return hashes
