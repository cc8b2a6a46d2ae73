"""Arguments and options that commands share."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from huggingface_hub.utils import disable_progress_bars, enable_progress_bars

from ultralowbit.cli.console import err
from ultralowbit.errors import InputError
from ultralowbit.hub import resolve_model
from ultralowbit.recipe import Recipe

ModelArgument = Annotated[str, typer.Argument(metavar="MODEL", help="folder, or hub name like org/model@revision")]


FolderArgument = Annotated[Path, typer.Argument(metavar="DIR", help="folder of a checkpoint")]


DeviceOption = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, ...")]


TrustOption = Annotated[bool, typer.Option("--trust-remote-code", help="run Python code that comes with the model")]


QuietOption = Annotated[bool, typer.Option("--quiet", "-q", help="no progress, only warnings and results")]


SmallOption = Annotated[
    bool, typer.Option("--small", help="with the recipe's values for models of a few million parameters, if it has any")
]


TasksDirOption = Annotated[
    Path | None, typer.Option(metavar="FOLDER", help="lm-eval task files of your own (.yaml, and the Python they name)")
]


LimitOption = Annotated[int | None, typer.Option(min=1, help="documents of each task, by default all")]


ContextOption = Annotated[
    int | None, typer.Option(min=2, help="tokens in a window of perplexity, by default 2048 or what the model takes")
]


def given(**options: Any) -> dict[str, Any]:
    """Those that are not left out."""
    return {key: value for key, value in options.items() if value is not None}


def sources(named: list[str]) -> tuple[str, ...] | None:
    """`auto` is None and `none` is nothing, but neither goes with other texts."""
    if len(named) > 1 and {"auto", "none"} & {*named}:
        raise InputError(f"--eval {' --eval '.join(named)}: auto and none stand alone, drop them or the rest")
    return {("auto",): None, ("none",): ()}.get(tuple(named), tuple(named))


def default_name(model: str, recipe: Recipe) -> str:
    """What the folder is called unless --out says otherwise."""
    folder = Path(model).expanduser()
    name = folder.resolve().name if folder.is_dir() else model.partition("@")[0].rpartition("/")[2]
    return f"{name}-{recipe.name}"


def download(model: str, quiet: bool) -> Path:
    """The model's folder; while it is fetched from the hub, the hub's own bars show."""
    if quiet or not err.is_terminal:
        return resolve_model(model)
    enable_progress_bars()
    try:
        return resolve_model(model)
    finally:
        disable_progress_bars()


def count(text: str) -> int:
    if not text.isdecimal() or not int(text):
        raise InputError(f"--batch-size is {text!r}, expected auto or a number from 1")
    return int(text)


def dtype(name: str) -> torch.dtype:
    known = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if name not in known:
        raise InputError(f"--dtype is {name!r}, expected auto, {', '.join(known)}")
    return known[name]


def listed(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def numbers(text: str) -> list[int]:
    numbers = listed(text)
    if not numbers or not all(number.isdecimal() for number in numbers):
        raise InputError(f"--seeds is {text!r}, expected numbers with commas between them, such as 0,1,2")
    return [*dict.fromkeys(map(int, numbers))]


def command_line(args: list[str]) -> str:
    return shlex.join(["ultralowbit", *args])
