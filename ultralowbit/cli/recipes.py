"""`ultralowbit recipes`."""

from __future__ import annotations

from typing import Annotated

import typer

from ultralowbit.cli.console import out
from ultralowbit.cli.options import SmallOption
from ultralowbit.cli.render import new_table
from ultralowbit.recipe import Recipe, shipped


def recipes_list() -> None:
    """Name the shipped recipes.

    [bold]ultralowbit recipes list[/]
    """
    table = new_table("recipe", "what it does")
    for name in shipped():
        table.add_row(name, Recipe.load(name).summary)
    out.print(table)


def recipes_show(
    name: Annotated[str, typer.Argument(help="a shipped recipe or a .yaml file")], small: SmallOption = False
) -> None:
    """Print a recipe with every value that it leaves at its default; save it to a file to make your own.

    [bold]ultralowbit recipes show sign-2 > mine.yaml[/]
    """
    out.out(
        f"# ultralowbit compress MODEL --recipe {name} --out DIR\n" + Recipe.load(name, small=small).to_yaml(), end=""
    )
