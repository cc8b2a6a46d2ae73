"""Exit codes, and errors in one sentence."""

from __future__ import annotations

import errno

from ultralowbit.errors import CheckpointError, DiskFull, FormatError, InputError, out_of_memory

FAILED, USAGE, FELL_BACK, QUALITY, INTERRUPTED = 1, 2, 3, 4, 130

_FULL = {
    errno.ENOSPC: "no space is left",
    errno.EDQUOT: "the quota is used up",
    errno.EFBIG: "the file would be larger than the system allows",
}


def explain(error: Exception) -> str:
    """An error in one sentence that says what to do."""
    text = " ".join(str(error).split())
    if isinstance(error, DiskFull):
        return error.strerror
    if isinstance(error, InputError | CheckpointError | FormatError):
        return text
    if memory := out_of_memory(error, "running this command"):
        return str(memory)
    if isinstance(error, OSError) and error.errno in _FULL:
        where = error.filename or "a file"
        return f"{_FULL[error.errno]} to write {where}: make room, then run the same command to go on"
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}: {error.filename}" if error.filename else error.strerror
    kind = type(error).__name__
    return f"unexpected {kind}: {text} (ULTRALOWBIT_DEBUG=1 shows where; please report it)"
