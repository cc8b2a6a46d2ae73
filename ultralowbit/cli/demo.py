"""`ultralowbit demo`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ultralowbit.cli.console import Watch, cell, out, say
from ultralowbit.cli.errors import FELL_BACK
from ultralowbit.cli.options import DeviceOption, QuietOption, RestartOption, command_line, possible
from ultralowbit.cli.render import new_table, rows_table, shout


def demo(
    ctx: typer.Context,
    out_folder: Annotated[Path, typer.Option("--out", callback=possible, help="folder to write")] = Path(
        "ultralowbit-demo"
    ),
    device: DeviceOption = "auto",
    restart: RestartOption = False,
    quiet: QuietOption = False,
) -> None:
    """Compress the tiny model that comes with the package with several recipes, and compare them in one table.

    The demo needs no network and takes a minute or two; a second run only prints the table again.

    [bold]ultralowbit demo[/]
    """
    import torch

    from ultralowbit.demo.run import run_demo
    from ultralowbit.eval.metric import protocols

    # products so small gain little from a second thread, and on a busy machine the two wait for one another for minutes
    torch.set_num_threads(1)
    with Watch(quiet) as watch:
        report = run_demo(out_folder, watch, device=device, restart=restart, command=command_line(ctx.obj))
    out.print(rows_table(report.rows))
    for line in protocols(report.rows[0].metrics):
        say(line, "dim")
    out.print()
    samples = new_table("", f"what it writes after {report.prompt!r}", left=2)
    for row in report.rows:
        samples.add_row(row.label, cell(" ".join(row.sample.split())))
    out.print(samples)
    out.print()
    for row in report.rows:
        if row.collapsed:
            shout("COLLAPSED", f"{row.label} predicts worse than a guess among the tokens of the vocabulary.")
    say(f"{out_folder}  report.md, report.json and a folder for each recipe")
    say(f"to see them as plots on one page: {command_line(['compare', str(out_folder)])}", "dim")
    if any(row.fallbacks for row in report.rows):
        shout("FELL BACK", "Some Linears were rounded to nearest instead: see the recipes' report.md.")
        raise typer.Exit(FELL_BACK)
