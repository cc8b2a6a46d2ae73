"""The `ultralowbit` command. Exit codes: 0 done, 1 failed, 2 wrong usage or input, 3 done but with Linears that fell
back to round-to-nearest, 4 done but a quality gate failed, 130 interrupted."""

from __future__ import annotations

import errno
import os
import signal
import sys
import threading
import warnings
from importlib.metadata import version
from typing import Annotated, Any

import typer
from rich.text import Text
from typer.core import TyperGroup

from ultralowbit.cli import bench, compress, demo, evaluate, inspect, recipes, serve
from ultralowbit.cli.console import err, out, say, show_warnings, visible
from ultralowbit.cli.errors import FAILED, INTERRUPTED, USAGE, explain
from ultralowbit.cli.options import command_line
from ultralowbit.errors import AnotherRankFailed, InputError


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
        except AnotherRankFailed:
            raise typer.Exit(FAILED) from None
        except Exception as e:
            usage = type(e).__module__.startswith(("typer.", "click."))  # it has its own way to be shown
            debug = ctx.params.get("debug") or os.environ.get("ULTRALOWBIT_DEBUG")
            if usage or debug or getattr(e, "errno", None) == errno.EPIPE:
                raise
            err.print(Text.assemble(("error: ", "bold red"), visible(explain(e))), soft_wrap=True)
            raise typer.Exit(USAGE if isinstance(e, InputError) else FAILED) from None


def _interrupted(args: list[str]) -> None:
    err.print("[bold yellow]interrupted[/]")
    if {"compress", "demo", "methods"} & {*args[:2]}:  # --debug may come first
        again = command_line([arg for arg in args if arg != "--restart"])  # which would discard what is done
        err.print("finished blocks are kept; to go on, run:")
        say(f"  {again}", to=err)


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
bench_app = typer.Typer(no_args_is_help=True, rich_markup_mode="rich", help="Measure speed and memory.")


def _version(wanted: bool) -> None:
    if wanted:
        out.print(f"ultralowbit {version('ultralowbit')}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="print the version and exit")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="show tracebacks, as ULTRALOWBIT_DEBUG=1 does")] = False,
) -> None:
    """Compress language models to 1-4 true bits per weight, and see what it costs.

    Start with  [bold]ultralowbit demo[/]
    """
    show_warnings()


app.command("compress")(compress.compress)
app.command("eval")(evaluate.evaluate)
app.command("compare")(evaluate.compare)
app.command("generate")(evaluate.generate)
app.command("inspect")(inspect.inspect)
app.command("verify")(inspect.verify)
app.command("export")(inspect.export)
app.command("serve")(serve.serve)
app.command("demo")(demo.demo)
app.add_typer(recipes_app, name="recipes")
recipes_app.command("list")(recipes.recipes_list)
recipes_app.command("show")(recipes.recipes_show)
app.add_typer(bench_app, name="bench")
bench_app.command("gpu")(bench.bench_gpu)
bench_app.command("pipeline")(bench.bench_pipeline)
bench_app.command("quantize")(bench.bench_quantize)
bench_app.command("scale")(bench.bench_scale)
bench_app.command("training")(bench.bench_training)
bench_app.command("eval")(bench.bench_eval)
bench_app.command("methods")(bench.bench_methods)
bench_app.command("kernels")(bench.bench_kernels)
bench_app.command("decode")(bench.bench_decode)
bench_app.command("vllm")(bench.bench_vllm)


def main() -> None:
    """Run the command of this process's arguments."""
    _keep_interrupts()
    _quiet_libraries()
    app()


def _keep_interrupts() -> None:
    """SIGTERM is an interrupt too; one that lands in a finalizer is swallowed there, and sent again until it is not."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    show = sys.unraisablehook

    def hook(raised: Any) -> None:
        if raised.exc_type is KeyboardInterrupt:
            # to the main thread, so that it wakes up where it waits; not SIGINT, which background jobs ignore
            threading.Timer(0.1, signal.pthread_kill, [threading.main_thread().ident, signal.SIGTERM]).start()
        else:
            show(raised)

    sys.unraisablehook = hook


def _quiet_libraries() -> None:
    """Warnings and bars of the libraries below would tear the progress apart; their errors still come through."""
    from huggingface_hub.utils import disable_progress_bars
    from huggingface_hub.utils import logging as hub_logging

    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    disable_progress_bars()  # transformers then shows none either
    hub_logging.set_verbosity_error()
    warnings.filterwarnings("ignore")
