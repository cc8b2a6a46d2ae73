"""`ultralowbit inspect`, `verify` and `export`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from ultralowbit.cli.console import Watch, out, say
from ultralowbit.cli.errors import FAILED
from ultralowbit.cli.options import FolderArgument, QuietOption, TrustOption, given, possible
from ultralowbit.cli.render import layer_table, size_table
from ultralowbit.errors import InputError
from ultralowbit.export.base import EXPORTERS


def inspect(
    folder: FolderArgument,
    as_json: Annotated[bool, typer.Option("--json", help="print JSON instead of tables")] = False,
) -> None:
    """Count the bits that a checkpoint stores, layer by layer, beside fp16 and what papers would claim.

    [bold]ultralowbit inspect model-sign-2[/]

    [bold]ultralowbit inspect model-sign-2 --json | jq .linear_bits_per_weight[/]
    """
    from ultralowbit.checkpoint.size import measure_size
    from ultralowbit.eval.schema import strict

    size = measure_size(folder)
    if as_json:
        print(json.dumps(strict(size.to_dict()), indent=1))
        return
    if size.layers:
        out.print(layer_table(size))
    out.print(size_table(size))


def verify(
    folder: FolderArgument,
    rerun: Annotated[bool, typer.Option("--rerun", help="also compress again, and compare the bytes")] = False,
    model: Annotated[
        str | None, typer.Option(metavar="MODEL", help="original model, if it no longer lies where it was")
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
    from ultralowbit.pipeline.verify import verify as find_problems

    if model and not rerun:
        raise InputError("--model is the original to compress again: give --rerun too, or leave it out")
    with Watch(quiet) as watch:
        watch.start("hashing", sum(path.stat().st_size for path in folder.glob("*") if path.is_file()))
        problems = find_problems(folder, watch.step)
    for problem in problems:
        say(f"not intact: {problem}", "bold red")
    if problems:
        raise typer.Exit(FAILED)
    say(f"{folder} is intact: every file is as it was written")
    if rerun:
        _rerun(folder, model, trust_remote_code, quiet)


def _rerun(folder: Path, model: str | None, trust_remote_code: bool, quiet: bool) -> None:
    from ultralowbit.pipeline.verify import rerun

    with Watch(quiet) as watch:
        again = rerun(folder, model, trust_remote_code=trust_remote_code, progress=watch)
    for name, how in again.different.items():
        say(f"not reproduced: {name} {how}", "bold red")
    if again.different:
        reasons = "; ".join(again.reasons) or "none is known: versions, machine, model and text are the same"
        say(f"likely reason: {reasons}")
        raise typer.Exit(FAILED)
    say(f"the run repeated: every file of {folder} has the same bytes again")
    if again.reasons:
        say(f"although {'; '.join(again.reasons)}")


def export(
    folder: FolderArgument,
    target: Annotated[str, typer.Option("--to", metavar="NAME", help=f"format to write: {', '.join(EXPORTERS)}")],
    out_path: Annotated[Path, typer.Option("--out", callback=possible, help="new file or folder to write")],
    embeddings: Annotated[
        str | None,
        typer.Option(metavar="TYPE", help="gguf: f16, or q8_0 to round the embeddings and the head to 8 bits"),
    ] = None,
    dequantize: Annotated[
        bool | None, typer.Option("--dequantize", help="gguf: write 16 bits for every packed weight")
    ] = None,
    quiet: QuietOption = False,
) -> None:
    """Turn a packed checkpoint into what another program reads.

    dense: a plain transformers checkpoint of the weights that the packed bytes mean.

    gguf: one file for llama.cpp, Ollama and LM Studio whose block types hold the packed weights exactly, with an Ollama
    Modelfile beside it. What they cannot hold is refused, with a recipe whose weights they do.

    [bold]ultralowbit export model-sign-2 --to dense --out model-sign-2-dense[/]

    [bold]ultralowbit export model-q1_0 --to gguf --out model.gguf[/]
    """
    from ultralowbit.export.base import export as export_checkpoint

    options = given(embeddings=embeddings, dequantize=dequantize or None)
    with Watch(quiet) as watch:
        written = export_checkpoint(folder, target, out_path, watch, **options)
    say(f"written: {written}")
