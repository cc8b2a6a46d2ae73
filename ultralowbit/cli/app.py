"""The `ultralowbit` command. Exit codes: 0 done, 1 failed, 2 wrong usage or input, 3 done but with Linears that fell
back to round-to-nearest, 4 done but a quality gate failed, 130 interrupted."""

from __future__ import annotations

import _thread
import errno
import os
import signal
import sys
import threading
import warnings
from typing import Annotated, Any

import typer
from huggingface_hub.utils import disable_progress_bars
from huggingface_hub.utils import logging as hub_logging
from rich.markup import escape
from transformers.utils import logging
from typer.core import TyperGroup

import ultralowbit
from ultralowbit.cli import bench, compress, demo, evaluate, inspect, recipes
from ultralowbit.cli.console import err, out
from ultralowbit.cli.errors import FAILED, INTERRUPTED, USAGE, explain
from ultralowbit.cli.options import command_line
from ultralowbit.errors import InputError


class Commands(TyperGroup):
    """Turns every error into one sentence on stderr and its exit code."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        ctx.obj = list(args)  # as typed: what a resumed run and a report quote
        return super().parse_args(ctx, args)

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            _interrupted(ctx.obj)
            raise typer.Exit(INTERRUPTED) from None
        except Exception as e:
            usage = type(e).__module__.startswith(("typer.", "click."))  # it has its own way to be shown
            debug = ctx.params.get("debug") or os.environ.get("ULTRALOWBIT_DEBUG")
            if usage or debug or getattr(e, "errno", None) == errno.EPIPE:
                raise
            err.print(f"[bold red]error:[/] {escape(explain(e))}", soft_wrap=True)
            raise typer.Exit(USAGE if isinstance(e, InputError) else FAILED) from None


def _interrupted(args: list[str]) -> None:
    err.print("[bold yellow]interrupted[/]")
    if {"compress", "demo", "methods"} & {*args[:2]}:  # --debug may come first
        again = command_line([arg for arg in args if arg != "--restart"])  # which would discard what is done
        err.print("finished blocks are kept; to go on, run:")
        err.print(f"  {again}", markup=False, soft_wrap=True)


app = typer.Typer(
    cls=Commands,
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Exit codes: 0 done, 1 failed, 2 wrong usage or input, 3 done with fallbacks, 4 done but a quality gate "
    "failed, 130 interrupted.",
)


recipes_app = typer.Typer(no_args_is_help=True, rich_markup_mode="rich", help="List and show recipes.")


app.add_typer(recipes_app, name="recipes")
recipes_app.command("list")(recipes.recipes_list)
recipes_app.command("show")(recipes.recipes_show)


bench_app = typer.Typer(no_args_is_help=True, rich_markup_mode="rich", help="Measure speed and memory.")


app.add_typer(bench_app, name="bench")
for _name in ("pipeline", "quantize", "training", "eval", "methods", "kernels", "decode"):
    bench_app.command(_name)(getattr(bench, f"bench_{_name}"))


def _version(wanted: bool) -> None:
    if wanted:
        out.print(f"ultralowbit {ultralowbit.__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="print the version and exit")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="show tracebacks, as ULTRALOWBIT_DEBUG=1 does")] = False,
) -> None:
    """Compress language models to 1-2 true bits per weight, and see what it costs.

    Start with  [bold]ultralowbit demo[/]
    """


for _name, _command in (
    ("compress", compress.compress), ("inspect", inspect.inspect), ("verify", inspect.verify),
    ("eval", evaluate.evaluate), ("compare", evaluate.compare), ("generate", evaluate.generate), ("demo", demo.demo),
):  # fmt: skip
    app.command(_name)(_command)


def main() -> None:
    """Run the command of this process's arguments."""
    _keep_interrupts()
    _quiet_libraries()
    app()


def _keep_interrupts() -> None:
    """SIGTERM is an interrupt too; one that lands in a finalizer is swallowed there, and sent again until it is not."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    show = sys.unraisablehook

    def hook(found: Any) -> None:
        if found.exc_type is KeyboardInterrupt:
            # not SIGINT, which background jobs ignore
            threading.Timer(0.1, _thread.interrupt_main, [signal.SIGTERM]).start()
        else:
            show(found)

    sys.unraisablehook = hook


def _quiet_libraries() -> None:
    """Warnings and bars of the libraries below would tear the progress apart; their errors still come through."""
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    disable_progress_bars()
    hub_logging.set_verbosity_error()
    warnings.filterwarnings("ignore")
