"""`ultralowbit recipes`."""

from __future__ import annotations

from typing import Annotated

import typer

from ultralowbit.cli.console import cell, out, visible
from ultralowbit.cli.options import SmallOption, command_line
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
    name: Annotated[str, typer.Argument(help="shipped recipe or .yaml file")], small: SmallOption = False
) -> None:
    """Print a recipe with every value, also those that it leaves at their defaults, and what each means: the start of
    one of your own.

    [bold]ultralowbit recipes show sign-2 > mine.yaml[/]
    """
    from ultralowbit.recipe import Recipe

    text = Recipe.load(name, small=small).commented()
    command = command_line(["compress", "MODEL", "--recipe", name, "--out", "DIR"])
    change = "# Any value can be changed here, or on the command line: --set calibration.samples=64"
    out.out(f"# {visible(command)}\n{change}\n{text}", end="")
