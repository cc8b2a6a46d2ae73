"""`ultralowbit recipes`."""

from __future__ import annotations

from typing import Annotated

import typer

from ultralowbit.cli.console import cell, out
from ultralowbit.cli.options import SmallOption
from ultralowbit.cli.render import new_table


def recipes_list() -> None:
    """Name the shipped recipes, and say what each does.

    [bold]ultralowbit recipes list[/]
    """
    from ultralowbit.recipe import Recipe, shipped

    table = new_table("recipe", "what it does")
    for name in shipped():
        table.add_row(name, cell(Recipe.load(name).summary))
    out.print(table)


def recipes_show(
    name: Annotated[str, typer.Argument(help="a shipped recipe or a .yaml file")], small: SmallOption = False
) -> None:
    """Print a recipe with every value that it leaves at its default; save it to a file to make your own.

    [bold]ultralowbit recipes show sign-2 > mine.yaml[/]
    """
    from ultralowbit.recipe import Recipe

    text = Recipe.load(name, small=small).to_yaml()
    out.out(f"# ultralowbit compress MODEL --recipe {name} --out DIR\n{text}", end="")
