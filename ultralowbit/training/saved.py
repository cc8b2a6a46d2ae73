"""Files with tensors of a training and a text, whose bytes are checked when they are read."""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from safetensors import SafetensorError, safe_open
from torch import Tensor

from ultralowbit.checkpoint.storage import tensor_bytes, tensor_file, write_tensors
from ultralowbit.errors import InputError, reason


class Saved(NamedTuple):
    """What a file holds: a text, the names of the tensors, and each tensor when it is asked for."""

    text: str
    names: list[str]
    tensor: Callable[[str], Tensor]


def save(file: Path, tensors: Mapping[str, Tensor], text: str) -> None:
    """Write tensors from any device, one at a time, and a text, atomically."""
    write_tensors(file, tensors, {"text": text, "sha256": _digest(text, tensors, tensors.__getitem__)})


def accompany(tensors: Mapping[str, Tensor]) -> None:
    """Give this rank's shards of the tensors that another rank saves, each when its turn comes."""
    _digest("", tensors, tensors.__getitem__)
    deque(tensor_file(tensors, {}), maxlen=0)


@contextmanager
def opened(file: Path) -> Iterator[Saved]:
    """What `save` wrote; raises `InputError` where the file holds something else, as found now or by the caller."""
    try:
        with safe_open(file, framework="pt") as stored:
            names, metadata = list(stored.keys()), stored.metadata()
            if metadata["sha256"] != _digest(metadata["text"], names, stored.get_tensor):
                raise ValueError("its bytes have changed since they were written")
            yield Saved(metadata["text"], names, stored.get_tensor)
    except (SafetensorError, OSError, KeyError, TypeError, ValueError) as e:
        if isinstance(e, InputError):
            raise
        raise InputError(f"{file} is no state of a training ({reason(e)}): remove it to start anew") from e


def _digest(text: str, names: Iterable[str], tensor_of: Callable[[str], Tensor]) -> str:
    """Hex digest of what a file holds; its tensors are asked for one at a time."""
    digest = hashlib.sha256(text.encode())
    for name in sorted(names):
        tensor = tensor_of(name)
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor_bytes(tensor))
    return digest.hexdigest()
