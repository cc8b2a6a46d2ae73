"""Exit codes, and errors in one sentence."""

from __future__ import annotations

import errno

import torch

from ultralowbit.errors import CheckpointError, DiskFull, FormatError, InputError

FAILED, USAGE, FELL_BACK, QUALITY, INTERRUPTED = 1, 2, 3, 4, 130


def explain(error: Exception) -> str:
    """An error in one sentence that says what to do."""
    text = " ".join(str(error).split())
    if isinstance(error, DiskFull):
        return error.strerror
    if isinstance(error, InputError | CheckpointError | FormatError):
        return text
    if isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in text:
        what = text.split(". ")[0] or "allocation failed"
        return f"out of memory ({what}): free some, or use fewer --samples or a shorter --length"
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"no space left to write {error.filename or 'a file'}: free some, then run the same command to go on"
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}: {error.filename}" if error.filename else error.strerror
    kind = type(error).__name__
    return f"unexpected {kind}: {text} (ULTRALOWBIT_DEBUG=1 shows where; please report it)"
