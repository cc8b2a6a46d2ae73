"""`ultralowbit inspect` and `verify`."""

from __future__ import annotations

import json
from typing import Annotated

import typer
from rich.markup import escape

from ultralowbit.checkpoint.size import measure_size
from ultralowbit.cli.console import Watch, out
from ultralowbit.cli.errors import FAILED
from ultralowbit.cli.options import FolderArgument, QuietOption, TrustOption
from ultralowbit.cli.render import layer_table, size_table
from ultralowbit.errors import InputError
from ultralowbit.pipeline.verify import rerun as run_again
from ultralowbit.pipeline.verify import verify as find_problems
from ultralowbit.report.schema import strict


def inspect(
    folder: FolderArgument,
    as_json: Annotated[bool, typer.Option("--json", help="print JSON")] = False,
) -> None:
    """Count the bits that a checkpoint stores, layer by layer, beside fp16 and what papers would claim.

    [bold]ultralowbit inspect model-sign-2[/]

    [bold]ultralowbit inspect model-sign-2 --json | jq .linear_bits_per_weight[/]
    """
    size = measure_size(folder)
    if as_json:
        print(json.dumps(strict(size.to_dict()), indent=1))
        return
    if size.layers:
        out.print(layer_table(size))
    out.print(size_table(size))


def verify(
    folder: FolderArgument,
    rerun: Annotated[bool, typer.Option("--rerun", help="repeat the run too, and compare the bytes it writes")] = False,
    model: Annotated[
        str | None, typer.Option(metavar="MODEL", help="where the original is now, if not where it was")
    ] = None,
    trust_remote_code: TrustOption = False,
    quiet: QuietOption = False,
) -> None:
    """Hash a packed checkpoint again; exit 1 and name the file if it is not what was written.

    With --rerun, also compress again as its recipe.yaml and manifest.json say, into a temporary folder: on the same
    machine with the same versions every file has the same bytes.

    [bold]ultralowbit verify model-sign-2[/]

    [bold]ultralowbit verify model-sign-2 --rerun --model ./model[/]
    """
    if model and not rerun:
        raise InputError("--model is the original to compress again: give --rerun too")
    with Watch(quiet) as watch:
        watch.start("hashing", sum(path.stat().st_size for path in folder.glob("*") if path.is_file()))
        problems = find_problems(folder, watch.step)
    for problem in problems:
        out.print(f"[bold red]not intact:[/] {escape(problem)}", soft_wrap=True)
    if problems:
        raise typer.Exit(FAILED)
    out.print(f"{folder} is intact: every file is as it was written", soft_wrap=True)
    if rerun:
        with Watch(quiet) as watch:
            again = run_again(folder, model, trust_remote_code=trust_remote_code, progress=watch)
        for name, how in again.different.items():
            out.print(f"[bold red]not reproduced:[/] {escape(name)} {how}", soft_wrap=True)
        if again.different:
            reasons = "; ".join(again.reasons) or "none is known: versions, machine, model and text are the same"
            out.print(f"likely reason: {reasons}", markup=False, soft_wrap=True)
            raise typer.Exit(FAILED)
        out.print(f"the run repeated: every file of {folder} has the same bytes again", soft_wrap=True)
        if again.reasons:
            out.print(f"although {'; '.join(again.reasons)}", markup=False, soft_wrap=True)
