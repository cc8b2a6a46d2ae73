"""Texts as tokens, in several threads and without ever being one string.

A chunk of text begins `OVERLAP` characters before the end of the one before it, wherever that falls. The two are joined
at a seam in the overlap, which is tokenized alone too: a place where a word of the pre-tokenizer begins, and around
which the overlap and both chunks have the same tokens, `MARGIN` on either side. The tokens are then those of the whole
text: normalizers and pre-tokenizers read from left to right and look at what is near, so that from a common border on
they do the same, and a word is encoded for itself.

Where a word is longer than that (to the tokenizers of Llama 2 and Gemma, all of a text is one word), a seam may lie
inside it if it is encoded by byte pairs: of all ways to cut it, its encoding is the one in which any two neighbours are
the encoding of their own text (else a merge would have crossed between them), and so are any two neighbours here.

Where there is no such place, the chunks become one.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
from tokenizers import Tokenizer
from tokenizers.models import BPE

CHUNK = 1 << 18
"""Characters that a thread tokenizes at a time."""
OVERLAP = 1 << 10
"""Characters that two neighbouring chunks have in common."""
MARGIN = 16
"""Tokens on either side of a seam that must be the same in both chunks."""
_THREADS = 32  # at most: a chunk in work takes some 20 MB
_SAMPLE = 1 << 12  # characters on which the Rust tokenizer is compared with the one around it


def tokenize(tokenizer: Any, pieces: Iterable[str]) -> Iterator[np.ndarray]:
    """The tokens of a text that comes in pieces, int32 [n] each, one after another; without special tokens.

    They are those that the tokenizer makes of the text as one string. That is what it gets where the text is short, and
    where it is written in Python.
    """
    chunks = _chunks(pieces)
    first, second = next(chunks), next(chunks, None)
    backend = _backend(tokenizer, first) if second is not None else None
    if backend is not None:
        yield from _joined(backend, _encoded(backend, chain([first, second], chunks)))
        return
    text = first if second is None else "".join([first, second[OVERLAP:], *(chunk[OVERLAP:] for chunk in chunks)])
    yield np.array(encode(tokenizer, text), dtype=np.int32)


def encode(tokenizer: Any, text: str) -> list[int]:
    """The tokens of a text in memory, without special tokens."""
    # verbose=False drops the warning that the text is longer than the model's context: it is cut into windows
    return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]


def rust_tokenizer(tokenizer: Any) -> Tokenizer | None:
    """What does the work in a tokenizer of transformers, with the settings of a call; None where Python does it."""
    encode(tokenizer, "a")  # which sets truncation and padding
    backend = getattr(tokenizer, "backend_tokenizer", None)
    return backend if isinstance(backend, Tokenizer) else None


def _backend(tokenizer: Any, text: str) -> Tokenizer | None:
    backend, sample = rust_tokenizer(tokenizer), text[:_SAMPLE]
    if backend is None or backend.encode(sample, add_special_tokens=False).ids != encode(tokenizer, sample):
        return None
    return backend


def _chunks(pieces: Iterable[str]) -> Iterator[str]:
    """`CHUNK` characters each and the `OVERLAP` that the next begins with; the last may be longer, and is not short
    unless it is the only one."""
    rest = ""
    for piece in pieces:
        rest += piece
        at = 0
        while len(rest) - at >= CHUNK + 4 * OVERLAP:
            yield rest[at : at + CHUNK + OVERLAP]
            at += CHUNK
        rest = rest[at:]
    yield rest


@dataclass(frozen=True)
class _Encoded:
    """A chunk, its tokens int32 [n], and those of its last `OVERLAP` characters alone, with the word of each."""

    text: str
    ids: np.ndarray
    end: np.ndarray
    words: Sequence[int | None]


def _encode(backend: Tokenizer, text: str) -> _Encoded:
    (whole,) = backend.encode_batch_fast([text], add_special_tokens=False)
    end = backend.encode(text[-OVERLAP:], add_special_tokens=False)
    return _Encoded(text, np.array(whole.ids, dtype=np.int32), np.array(end.ids, dtype=np.int32), end.word_ids)


def _encoded(backend: Tokenizer, texts: Iterable[str]) -> Iterator[_Encoded]:
    """The chunks in their order, of which a few are in work."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    threads = min(cores, _THREADS)
    waiting: deque[Future[_Encoded]] = deque()
    with ThreadPoolExecutor(threads) as pool:
        try:
            for text in texts:
                waiting.append(pool.submit(_encode, backend, text))
                if len(waiting) > threads + 1:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()


def _joined(backend: Tokenizer, chunks: Iterator[_Encoded]) -> Iterator[np.ndarray]:
    model = backend.model
    unknown = backend.token_to_id(getattr(model, "unk_token", None) or "")
    last, skip = next(chunks), 0  # its first tokens are given already, by the chunk before it
    for chunk in chunks:
        seam = _seam(last, chunk.ids, isinstance(model, BPE), unknown)
        if seam is not None:
            yield last.ids[skip : len(last.ids) - len(last.end) + seam]
            last, skip = chunk, seam
            continue
        texts = [last.text, chunk.text[OVERLAP:]]
        while sum(map(len, texts)) < 2 * len(last.text) and (more := next(chunks, None)) is not None:
            texts.append(more.text[OVERLAP:])  # twice the text each time, so that all of it is read a few times at most
        last = _encode(backend, "".join(texts))
    yield last.ids[skip:]


def _seam(left: _Encoded, right: np.ndarray, byte_pairs: bool, unknown: int | None) -> int | None:
    """The place among the tokens of the overlap at which the tokens of the chunk `left` go over into those of the next,
    `right`; None where there is none."""
    end, words = left.end, left.words

    def places(alike: np.ndarray) -> range:
        first = len(end) - _agreed(left.ids[::-1], end[::-1], alike[::-1]) + MARGIN
        return range(first, _agreed(right, end, alike) - MARGIN + 1)

    seams = [k for k in places(np.ones(len(end), dtype=bool)) if words[k - 1] != words[k]]
    if not seams and byte_pairs:
        # inside a word, unknown text of any length can be one token
        alike = end != (-1 if unknown is None else unknown)
        seams = [k for k in places(alike) if words[k - MARGIN] == words[k + MARGIN - 1]]
    return seams[len(seams) // 2] if seams else None


def _agreed(ids: np.ndarray, end: np.ndarray, alike: np.ndarray) -> int:
    """How many tokens both begin with, all of them such that equal ones stand for the same text (`alike`)."""
    n = min(len(ids), len(end))
    differing = np.flatnonzero((ids[:n] != end[:n]) | ~alike[:n])
    return int(differing[0]) if len(differing) else n
