"""What goes wrong, in one sentence each: what was found, what was expected and what to do."""

from __future__ import annotations


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


class DiskFull(OSError):
    """No space is left; what was committed is kept."""
