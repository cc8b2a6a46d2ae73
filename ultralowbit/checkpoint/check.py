"""Whether files hold what the format of a packed weight promises."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

from ultralowbit.format.weight import Format
from ultralowbit.format.words import TensorSpec


def is_in_block(name: str) -> bool:
    """Whether a name is that of something in a list of blocks, unlike the embedding's and the head's."""
    return re.search(r"\.\d+\.", name) is not None


def by_module(stored: Mapping[str, TensorSpec]) -> dict[str, dict[str, TensorSpec]]:
    """Name of a module -> its own tensors by their last name: `a.b.weight_scale` is `weight_scale` of `a.b`."""
    modules: dict[str, dict[str, TensorSpec]] = {}
    for key, spec in stored.items():
        module, _, name = key.rpartition(".")
        modules.setdefault(module, {})[name] = spec
    return modules


def weight_mismatches(name: str, format: Format, out_features: int, own: Mapping[str, TensorSpec]) -> Iterator[str]:
    """How a packed Linear's own tensors, beside its bias, differ from what its format stores: a clause for each, that
    begins with the tensor's full name."""
    weights = {key: spec for key, spec in own.items() if key != "bias"}
    return (f"{name}.{mismatch}" for mismatch in format.mismatches(weights, out_features))
