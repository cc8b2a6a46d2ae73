"""Under which names the Linears of experts are packed.

transformers keeps the weights of all experts of a layer in one tensor `...experts.down_proj`, and renames what a
checkpoint calls `...experts.3.down_proj.weight` to it: the names here are such as it does not rename.
"""

from __future__ import annotations

import re

_NUMBERS = re.compile(r"(\d+)")


def expert_linear(expert: int, projection: str) -> str:
    """The name of an expert's Linear within the module of all experts: `3.packed_down_proj`."""
    return f"{expert}.packed_{projection}"


def expert_of(linear: str) -> tuple[str, str] | None:
    """The name of the module of all experts that a Linear of this name is in, and its projection; None for any other
    Linear."""
    if ".packed_" not in linear:  # models have a hundred thousand names
        return None
    match = re.fullmatch(r"(.+)\.\d+\.packed_(\w+)", linear)
    return match and (match[1], match[2])


def natural(name: str) -> list[str | int]:
    """A key that sorts block 2 before block 10."""
    parts: list[str | int] = [*_NUMBERS.split(name)]
    parts[1::2] = map(int, parts[1::2])
    return parts


def weight_name(linear: str) -> str:
    """The name of the tensor in which transformers keeps the weight of a Linear: for an expert that of all."""
    place = expert_of(linear)
    return f"{linear}.weight" if place is None else ".".join(place)
