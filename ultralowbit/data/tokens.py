"""The tokens of texts by name, made once: those of long texts are kept in files that are mapped into memory.

The files lie in the assets of the hub's cache (`HF_ASSETS_CACHE`, by default ~/.cache/huggingface/assets), in
ultralowbit/tokens. A file's name is a digest of all that its tokens depend on, the text and the tokenizer; it appears
under that name once it is whole, and ends in a digest of its bytes, by which it is checked whenever it is used. Of more
than `KEPT_BYTES` the files that were not used for longest are removed.
"""

from __future__ import annotations

import hashlib
import logging
import os
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from ultralowbit.checkpoint.storage import follow_umask, json_digest
from ultralowbit.data.corpora import Split, read_pieces
from ultralowbit.data.tokenize import rust_tokenizer, tokenize
from ultralowbit.errors import InputError, reason
from ultralowbit.progress import OnProgress

KEPT_FROM = 1 << 20
"""Bytes of text from which its tokens are kept: shorter ones take less than a second."""
KEPT_BYTES = 4 << 30
_LAYOUT = 1  # of the files, and of how they are made
_STALE = 86_400.0  # seconds after which the file of a writer that was killed is removed
_PIECE = 1 << 22  # tokens that are checked at a time

log = logging.getLogger(__name__)


def text_tokens(
    source: str, split: Split, tokenizer: Any, *, most: int | None = None, progress: OnProgress | None = None
) -> np.ndarray:
    """The tokens of the text that `read_text` reads, or its first `most`, without special tokens: [n] uint16 where the
    vocabulary allows it, else int32.

    `progress` gets the bytes of text read and in all, or with `most` the tokens. Raises `InputError` as `read_text`
    does.
    """
    progress = progress or (lambda done, total: None)
    dtype = _dtype(tokenizer)
    if most is not None:
        return _first(tokenize(tokenizer, read_pieces(source, split)), most, progress).astype(dtype)
    digest, nbytes = _measured(read_pieces(source, split))

    def made() -> Iterator[np.ndarray]:
        pieces = _counted(read_pieces(source, split), nbytes, progress)
        return (part.astype(dtype) for part in tokenize(tokenizer, pieces))

    key = _key(tokenizer, digest) if nbytes >= KEPT_FROM else None
    return np.concatenate([*made()]) if key is None else _kept(source, key, dtype, made)


def _dtype(tokenizer: Any) -> np.dtype:
    most = max(tokenizer.get_vocab().values())
    return np.dtype("<u2" if most < 1 << 16 else "<i4")


def _first(parts: Iterator[np.ndarray], most: int, progress: OnProgress) -> np.ndarray:
    read: list[np.ndarray] = []
    there = 0
    for part in parts:
        read.append(part)
        there += len(part)
        progress(min(there, most), most)
        if there >= most:
            break
    return np.concatenate(read)[:most]


def _measured(pieces: Iterable[str]) -> tuple[str, int]:
    """Hex digest and number of a text's UTF-8 bytes."""
    digest, nbytes = hashlib.sha256(), 0
    for piece in pieces:
        encoded = piece.encode()
        digest.update(encoded)
        nbytes += len(encoded)
    return digest.hexdigest(), nbytes


def _counted(pieces: Iterable[str], total: int, progress: OnProgress) -> Iterator[str]:
    done = 0
    for piece in pieces:
        yield piece
        done += len(piece.encode())
        progress(done, total)


def _key(tokenizer: Any, text: str) -> str | None:
    """Digest of a text's digest and of the tokenizer as it is in memory, which its files and settings made; None for a
    tokenizer that is written in Python, and cannot be told from another."""
    backend = rust_tokenizer(tokenizer)
    if backend is None:
        return None
    kind = type(tokenizer)
    return json_digest(
        {
            "layout": _LAYOUT,
            "text": text,
            "tokenizer": hashlib.sha256(backend.to_str().encode()).hexdigest(),
            "class": f"{kind.__module__}.{kind.__qualname__}",
            "special tokens are text": backend.encode_special_tokens,
            "software": [version("tokenizers"), version("transformers")],
        }
    )


def _kept(source: str, key: str, dtype: np.dtype, made: Callable[[], Iterator[np.ndarray]]) -> np.ndarray:
    """The tokens in the file of this key, which is made if need be; in memory where that cannot be written."""
    from huggingface_hub import cached_assets_path

    try:
        folder = Path(cached_assets_path("ultralowbit", "tokens", "texts"))
        path = folder / f"{key}.{dtype.name}"
        tokens = _mapped(path, dtype)
        if tokens is None:
            _write(path, made())
            _make_room(path)
            tokens = _mapped(path, dtype)
    except InputError:
        raise
    except (OSError, ValueError) as error:  # a ValueError is what the hub's client raises where a file is in the way
        log.warning("the tokens of %s stay in memory, and are not kept (%s)", source, reason(error))
        tokens = None
    return np.concatenate([*made()]) if tokens is None else tokens


def _mapped(path: Path, dtype: np.dtype) -> np.ndarray | None:
    """The tokens in a file; None where there is none, or it is damaged."""
    end = hashlib.sha256().digest_size
    if not path.is_file():
        return None
    count, odd = divmod(path.stat().st_size - end, dtype.itemsize)
    if count > 0 and not odd:
        tokens = np.memmap(path, dtype, mode="r", shape=(count,))
        digest = hashlib.sha256()
        for at in range(0, count, _PIECE):
            digest.update(tokens[at : at + _PIECE])
        with path.open("rb") as file:
            file.seek(-end, os.SEEK_END)
            if file.read() == digest.digest():
                os.utime(path)  # used now
                return tokens
    log.warning("%s is damaged: the text is tokenized again", path)
    return None


def _write(path: Path, parts: Iterable[np.ndarray]) -> None:
    """Write a file that is there whole or not at all, whoever else writes it and whenever this process is killed."""
    handle, name = tempfile.mkstemp(dir=path.parent, suffix=".part")
    part_file = Path(name)
    try:
        digest = hashlib.sha256()
        with os.fdopen(handle, "wb") as file:
            for part in parts:
                digest.update(part)
                file.write(part.data)
            file.write(digest.digest())
            file.flush()
            os.fsync(file.fileno())
        follow_umask(part_file)
        part_file.replace(path)
    finally:
        part_file.unlink(missing_ok=True)


def _make_room(path: Path) -> None:
    """Remove what killed writers left, and of too many files those that were not used for longest; not `path`."""
    there = []
    for file in path.parent.iterdir():
        with suppress(OSError):  # another process removes it too
            stat = file.stat()
            if file.suffix == ".part":
                if time.time() - stat.st_mtime > _STALE:
                    file.unlink()
            elif file != path:
                there.append((stat.st_mtime, stat.st_size, file))
    room = KEPT_BYTES - path.stat().st_size
    for _, size, file in sorted(there, reverse=True):
        room -= size
        if room < 0:
            with suppress(OSError):
                file.unlink()
