"""Models in memory.

decoder    how Hugging Face decoders are built: blocks, Linears, what blocks are called with
inputs     which Linears share an input
linear     a Linear whose weight stays packed
fused      packed Linears that share an input, multiplied at once
lora       adapters of peft on packed Linears
quantizer  what transformers is told of packed checkpoints
hf_names   what transformers does not document
hf         `load`
"""

from __future__ import annotations

import importlib.metadata

from ultralowbit.errors import InputError

OLDEST_TRANSFORMERS = (5, 10)
"""Older ones store and load weights in other ways."""


def refuse_old(version: str) -> None:
    """Raise `InputError` for a release of transformers before `OLDEST_TRANSFORMERS`."""
    if tuple(map(int, version.split(".")[:2])) < OLDEST_TRANSFORMERS:
        oldest = ".".join(map(str, OLDEST_TRANSFORMERS))
        raise InputError(
            f"transformers {version} is installed, expected {oldest} or newer: run `pip install --upgrade transformers`"
        )


refuse_old(importlib.metadata.version("transformers"))  # here, before a module of this package imports it
