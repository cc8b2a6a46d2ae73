"""Arguments and options that commands share, and what their values mean."""

from __future__ import annotations

import os
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ultralowbit.cli.console import err
from ultralowbit.errors import InputError, reason

if TYPE_CHECKING:
    import torch

    from ultralowbit.recipe import Recipe

ModelArgument = Annotated[
    str, typer.Argument(metavar="MODEL", help="folder, .gguf file, or hub name like org/model@revision")
]
FolderArgument = Annotated[Path, typer.Argument(metavar="DIR", help="folder of a checkpoint")]
CalibOption = Annotated[
    str | None,
    typer.Option(
        metavar="SOURCE",
        help="text to calibrate and train on: a .txt, .jsonl or .parquet file, wikitext2, c4, ptb, org/name, "
        "python-docs, self",
    ),
]
SamplesOption = Annotated[int | None, typer.Option(help="number of calibration windows; 128 unless the recipe says")]
LengthOption = Annotated[
    int | None,
    typer.Option(help="tokens in a calibration window; 2048 unless the recipe says, and no more than the model takes"),
]
SeedOption = Annotated[int | None, typer.Option(help="seed with which windows are drawn from the calibration text")]
SmallOption = Annotated[
    bool, typer.Option("--small", help="use the recipe's values for models of a few million parameters, if it has any")
]
SettingsOption = Annotated[
    list[str], typer.Option("--set", metavar="KEY=VALUE", help="change any value of the recipe: quantize.bits=3")
]
EvalOption = Annotated[
    list[str],
    typer.Option(
        "--eval",
        metavar="SOURCE",
        help="text to measure perplexity on, repeatable; auto: the test split of the calibration's hub dataset, else "
        "python-docs, up to 40960 tokens; none: measure nothing",
    ),
]
ContextOption = Annotated[
    int | None,
    typer.Option(min=2, help="tokens in a window of perplexity; by default 2048, or fewer if the model takes no more"),
]
MaxTokensOption = Annotated[
    int | None, typer.Option(min=1, help="tokens of each text to measure perplexity on; all by default")
]
TasksDirOption = Annotated[
    Path | None, typer.Option(metavar="FOLDER", help="lm-eval task files of your own (.yaml, and the Python they name)")
]
LimitOption = Annotated[int | None, typer.Option(min=1, help="documents to ask of each task; all by default")]
DeviceOption = Annotated[str, typer.Option(help="device to run on: auto, cpu, cuda, cuda:1, ...")]
TrustOption = Annotated[bool, typer.Option("--trust-remote-code", help="run Python code that comes with the model")]
RestartOption = Annotated[bool, typer.Option("--restart", help="discard what an earlier run has written")]
QuietOption = Annotated[bool, typer.Option("--quiet", "-q", help="show no progress, only warnings and results")]


def possible(path: Path | None) -> Path | None:
    """The path that an option names; `InputError` where there can be none such: links in a circle, an unknown home."""
    try:
        if path is not None:
            path.expanduser().resolve()
    except (OSError, RuntimeError, ValueError) as error:
        raise InputError(f"{str(path)!r} cannot be written ({reason(error)}): name another place") from error
    return path


def writable(file: Path | None) -> Path | None:
    """The file that an option names; `InputError`, before any work, where its folder is missing, or it is a folder, a
    pipe or a device."""
    if file and ((os.path.lexists(file) and not file.is_file()) or not file.absolute().parent.is_dir()):
        what = (
            "is a folder" if file.is_dir() else "is no regular file" if os.path.lexists(file) else "lies in no folder"
        )
        raise InputError(f"the file to write, {str(file)!r}, {what}: name another, nothing has been measured")
    return file


JsonOption = Annotated[
    Path | None,
    typer.Option("--json", metavar="FILE", callback=writable, help="write the results to this file too"),
]
CsvOption = Annotated[
    Path | None,
    typer.Option("--csv", metavar="FILE", callback=writable, help="append the rows, and the machine, to this file"),
]


def given(**options: Any) -> dict[str, Any]:
    """The options that are not left out."""
    return {key: value for key, value in options.items() if value is not None}


def eval_sources(named: list[str]) -> tuple[str, ...] | None:
    """What --eval names: None for auto, nothing for none; neither goes with other texts."""
    if len(named) > 1 and {"auto", "none"} & {*named}:
        raise InputError(f"--eval {' --eval '.join(named)}: auto and none stand alone, drop them or the rest")
    return {("auto",): None, ("none",): ()}.get(tuple(named), tuple(named))


def default_name(model: str, recipe: Recipe) -> str:
    """What the folder is called unless --out says otherwise."""
    folder = Path(model).expanduser()
    name = folder.resolve().name if folder.is_dir() else model.partition("@")[0].rpartition("/")[2]
    return f"{name.removesuffix('.gguf')}-{recipe.name}"


def download(model: str, quiet: bool) -> Path:
    """The model's folder; while it is fetched from the hub, the hub's own bars show."""
    from huggingface_hub.utils import disable_progress_bars, enable_progress_bars

    from ultralowbit.hub import resolve_model

    if quiet or not err.is_terminal:
        return resolve_model(model)
    enable_progress_bars()
    try:
        return resolve_model(model)
    finally:
        disable_progress_bars()


def positive_number(option: str, text: str) -> int:
    """A whole number from 1; `InputError` names the option."""
    if not text.isdecimal() or not int(text):
        raise InputError(f"{option} is {text!r}, expected auto or a number from 1")
    return int(text)


def torch_dtype(name: str, option: str = "--dtype") -> torch.dtype | None:
    """What --dtype or an option like it names; None for auto."""
    import torch

    known = {"auto": None, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if name not in known:
        raise InputError(f"{option} is {name!r}, expected one of {', '.join(known)}")
    return known[name]


def listed(text: str) -> list[str]:
    """The parts of a text with commas between them."""
    return [part.strip() for part in text.split(",") if part.strip()]


def numbers(option: str, text: str) -> list[int]:
    """Distinct whole numbers with commas between them; `InputError` names the option."""
    parts = listed(text)
    if not parts or not all(part.isdecimal() for part in parts):
        raise InputError(f"{option} is {text!r}, expected numbers with commas between them, such as 0,1,2")
    return [*dict.fromkeys(map(int, parts))]


def command_line(args: list[str]) -> str:
    """The command as typed, quoted for a shell."""
    return shlex.join(["ultralowbit", *args])
