"""What goes wrong, in one sentence each: what was found, what was expected and what to do."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager


class InputError(ValueError):
    """What the user gave cannot be used; the message is one sentence with what was found, expected and to be done."""


def reason(error: BaseException) -> str:
    """Another library's error on one line, to be quoted inside a sentence."""
    first = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    first = first.rstrip(".:").replace(". ", "; ")[:200]
    return f"{type(error).__name__}: {first}" if first else type(error).__name__


class FormatError(ValueError):
    """Stored tensors and the format that should describe them do not agree."""


class CheckpointError(ValueError):
    """A checkpoint is damaged, incomplete, or not one that this package wrote."""


class NoCheckpoint(CheckpointError, InputError):
    """What the user gave is no folder of a checkpoint at all."""


class DiskFull(OSError):
    """No space is left; what was committed is kept."""


class AnotherRankFailed(RuntimeError):
    """Another process of the same run has failed, and says why: this one ends without a word."""


class OutOfMemory(MemoryError):
    """Memory ran out; the message says while doing what. What was committed is kept."""


_ALLOCATOR = re.compile(r"^\[enforce fail at [^]]*\] [^.]*\. ")
"""The place in torch's source with which its allocator's message begins."""


FREE_SOME = "free some, then run the same command to go on"


def out_of_memory(error: Exception, doing: str, remedy: str = FREE_SOME) -> OutOfMemory | None:
    """The same as an `OutOfMemory`, or None where the error says something else; `doing` is what with which file, as in
    "reading model.safetensors", `remedy` what to do."""
    if isinstance(error, OutOfMemory):
        return error  # it names something nearer
    text = " ".join(str(error).split())
    known = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"  # torch's
    said = ("can't allocate memory", "Cannot allocate memory", "can't start new thread")  # which needs room for a stack
    if not known and not any(words in text for words in said):
        return None
    what = _ALLOCATOR.sub("", text).split(". ")[0].rstrip(".")
    return OutOfMemory(f"out of memory while {doing}{f' ({what})' if what else ''}: {remedy}")


@contextmanager
def naming_memory(doing: str, remedy: str = FREE_SOME) -> Iterator[None]:
    """Raise `OutOfMemory` in place of whatever says that memory ran out: Python, numpy, torch and the system each have
    their own."""
    try:
        yield
    except Exception as error:
        named = out_of_memory(error, doing, remedy)
        if named is None or named is error:
            raise
        raise named from error
