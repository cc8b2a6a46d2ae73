"""What `compress` is asked for: a recipe, so many bits a weight, or a file of so many bytes."""

from __future__ import annotations

from enum import StrEnum
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer

from ultralowbit.errors import InputError
from ultralowbit.units import parse_bytes

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ultralowbit.recipe import Recipe


class Effort(StrEnum):
    """How much work goes into `--bits` and `--size`."""

    FAST = "fast"
    DEFAULT = "default"
    BEST = "best"


_OWN = ("allocate", "allocate.bits", "name")
"""Keys of the recipe that `--bits` and `--size` decide."""
OURS = {Effort.FAST: "ulb-fast", Effort.DEFAULT: "ulb", Effort.BEST: "ulb-best"}

RecipeOption = Annotated[
    str | None, typer.Option(help="shipped recipe (`ultralowbit recipes list`) or .yaml file; instead of --bits")
]
BitsOption = Annotated[
    float | None,
    typer.Option(
        metavar="BITS",
        help="true bits a packed weight, such as 1.7, from a little over 1 (a plane and its scales) to 4: the best "
        "that we know for them",
    ),
]
SizeOption = Annotated[
    str | None, typer.Option(metavar="SIZE", help="file size instead of bits, such as 60MB or 1.5GB; all tensors count")
]
EffortOption = Annotated[
    Effort | None,
    typer.Option(
        help="work for --bits and --size; fast: nothing is trained; default: the model is trained end to end for a "
        "short time; best: for a long time, on a GPU"
    ),
]


class Goal(NamedTuple):
    """The options of the command line that say what the result should be."""

    recipe: str | None
    bits: float | None
    size: str | None
    effort: Effort | None

    def load(self, model: str, settings: Sequence[str], device: str, trust_remote_code: bool, **options: Any) -> Recipe:
        """The recipe that goes there, with settings applied; `InputError` unless exactly one goal is given."""
        from ultralowbit.pipeline.estimate import bits_for_size
        from ultralowbit.recipe import Recipe, at_bits, key_of

        goals = {"--recipe": self.recipe, "--bits": self.bits, "--size": self.size}
        given = [name for name, value in goals.items() if value is not None]
        if len(given) != 1:
            there = f"{' and '.join(given)} are given" if given else "neither --bits nor --size nor --recipe is given"
            raise InputError(f"{there}: say one of them, such as --bits 2, --size 60MB or --recipe gptq-3bit")
        if self.recipe is not None:
            if self.effort is not None:
                raise InputError("--effort goes with --bits and --size: a recipe says itself what is done")
            return Recipe.load(self.recipe, settings, **options)
        name = OURS[self.effort or Effort.DEFAULT]
        bits, recipe = self.bits, Recipe.load(name, settings, **options)
        if recipe.allocate is None:
            raise InputError(
                f"{given[0]} shares planes out among Linears, which --set allocate=null turns off: leave that out, or "
                f"give --recipe {name} instead of {given[0]}"
            )
        set_twice = [key for key in _OWN if key in map(key_of, settings)]
        if set_twice:
            raise InputError(f"{given[0]} says itself what --set {set_twice[0]} would: leave one of them out")
        if bits is not None and not 1 <= bits < 5:  # where exactly it begins and ends is the model's
            raise InputError(
                f"--bits is {bits:g}, expected true bits a packed weight from 1 to about 4, such as 1.7; for more give "
                "a recipe, such as --recipe gptq-4bit --set quantize.bits=8"
            )
        if self.size is not None:
            bits = bits_for_size(model, recipe, parse_bytes(self.size), device, trust_remote_code)
        label = f"{bits:g}bit" if self.size is None else self.size
        return Recipe.load(name, [*settings, *at_bits(name, bits, label)], **options)
