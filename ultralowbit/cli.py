"""The `ultralowbit` command. Exit codes: 0 done, 1 failed, 2 wrong usage or input, 3 done but with Linears that fell
back to round-to-nearest, 4 done but a quality gate failed, 130 interrupted."""

from __future__ import annotations

import _thread
import errno
import json
import os
import shlex
import signal
import sys
import threading
import warnings
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from huggingface_hub.utils import disable_progress_bars, enable_progress_bars
from huggingface_hub.utils import logging as hub_logging
from rich import box
from rich.markup import escape
from rich.panel import Panel
from rich.table import Table
from transformers.utils import logging
from typer.core import TyperGroup

import ultralowbit
from ultralowbit import bench_gpu as gpu
from ultralowbit import bench_methods as methods_bench
from ultralowbit import compare as comparisons
from ultralowbit import evaluation
from ultralowbit import report as reports
from ultralowbit.bench import SOLVED, Shape, decode_bench, eval_bench, pipeline_bench, solve_bench, tune_bench
from ultralowbit.checkpoint import DiskFull
from ultralowbit.console import Watch, err, out
from ultralowbit.demo import run as demos
from ultralowbit.eval.size import Size
from ultralowbit.eval.size import measure as measure_size
from ultralowbit.format import FormatError
from ultralowbit.generation import generate as write_text
from ultralowbit.hf import CheckpointError
from ultralowbit.hub import check_push, open_tokenizer, push, resolve_model
from ultralowbit.kernels.bench import SHAPES, TOKENS, kernel_bench
from ultralowbit.measure import open_model, pick_dtype
from ultralowbit.pipeline import pick_device
from ultralowbit.plan import plan
from ultralowbit.quality import Limits
from ultralowbit.recipe import Recipe, shipped
from ultralowbit.text import InputError
from ultralowbit.verify import rerun as run_again
from ultralowbit.verify import verify as find_problems

FAILED, USAGE, FELL_BACK, QUALITY, INTERRUPTED = 1, 2, 3, 4, 130


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


def explain(error: Exception) -> str:
    """An error in one sentence that says what to do."""
    text = " ".join(str(error).split())
    if isinstance(error, DiskFull):
        return error.strerror
    if isinstance(error, InputError | CheckpointError | FormatError):
        return text
    if isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in text:
        what = text.split(". ")[0] or "allocation failed"
        return f"out of memory ({what}): free some, or use fewer --samples or a shorter --length"
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"no space left to write {error.filename or 'a file'}: free some, then run the same command to go on"
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}: {error.filename}" if error.filename else error.strerror
    kind = type(error).__name__
    return f"unexpected {kind}: {text} (ULTRALOWBIT_DEBUG=1 shows where; please report it)"


def command_line(args: list[str]) -> str:
    return shlex.join(["ultralowbit", *args])


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
bench_app = typer.Typer(no_args_is_help=True, rich_markup_mode="rich", help="Measure speed and memory.")
app.add_typer(bench_app, name="bench")

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


@app.command()
def compress(
    ctx: typer.Context,
    model: ModelArgument,
    recipe: Annotated[str, typer.Option(help="a shipped recipe (see `recipes list`) or a .yaml file")],
    out_folder: Annotated[
        Path | None, typer.Option("--out", help="folder to write, by default <model>-<recipe>")
    ] = None,
    calib: Annotated[
        str | None,
        typer.Option(
            metavar="SOURCE",
            help="calibration text, and what stages train on: a .txt, .jsonl or .parquet file, wikitext2, c4, ptb, "
            "org/name, python-docs, self",
        ),
    ] = None,
    samples: Annotated[int | None, typer.Option(help="calibration windows")] = None,
    length: Annotated[int | None, typer.Option(help="tokens in a calibration window")] = None,
    seed: Annotated[int | None, typer.Option(help="of the windows of these texts")] = None,
    small: SmallOption = False,
    settings: Annotated[
        list[str], typer.Option("--set", metavar="KEY=VALUE", help="any value of the recipe, such as solve.bits=3")
    ] = [],  # noqa: B006 (typer reads it, nobody writes it)
    eval_sources: Annotated[
        list[str],
        typer.Option(
            "--eval",
            metavar="SOURCE",
            help="text to measure perplexity on, repeatable; auto: the test split of the calibration's hub dataset, "
            "else python-docs, up to 40960 tokens; none: skip",
        ),
    ] = ["auto"],  # noqa: B006
    context: ContextOption = None,
    max_tokens: Annotated[int | None, typer.Option(min=1, help="of each text that perplexity is measured on")] = None,
    max_ppl_ratio: Annotated[
        float | None, typer.Option(min=0, help="exit 4 if perplexity comes out more times the original's than this")
    ] = None,
    max_kl: Annotated[
        float | None, typer.Option(min=0, help="exit 4 if predictions diverge more than this, in nats a token")
    ] = None,
    device: DeviceOption = "auto",
    push_to_hub: Annotated[
        str | None, typer.Option(metavar="ORG/NAME", help="upload the folder to the hub once it is whole and verified")
    ] = None,
    private: Annotated[bool, typer.Option("--private", help="make the hub model private, if it is new")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="bits, memory, disk and time to expect; nothing is run")
    ] = False,
    restart: Annotated[bool, typer.Option("--restart", help="discard what an earlier run has written")] = False,
    trust_remote_code: TrustOption = False,
    quiet: QuietOption = False,
) -> None:
    """Compress a model into a packed checkpoint and measure what it cost.

    Killed at any moment, the same command goes on where it stopped. The folder ends up with report.md, report.json and
    a model card, README.md.

    [bold]ultralowbit compress meta-llama/Llama-3.2-1B --recipe sign-2 --calib wikitext2[/]

    [bold]ultralowbit compress ./model --recipe gptq-2bit --set solve.group=64 --calib notes.txt --out small[/]
    """
    windows = _given(samples=samples, length=length)
    given = [f"calibration.{key}={value}" for key, value in windows.items()]
    chosen = Recipe.load(recipe, [*settings, *given], small=small, texts=_given(source=calib, seed=seed))
    texts = reports.Texts(_sources(eval_sources), context, max_tokens)
    folder = out_folder or Path(default_name(model, chosen))
    if dry_run:
        out.print(str(plan(model, chosen, device, trust_remote_code, folder)), markup=False, soft_wrap=True)
        return
    if private and not push_to_hub:
        raise InputError("--private is of a model on the hub: give --push-to-hub ORG/NAME too")
    if push_to_hub:
        check_push(push_to_hub)
    _download(model, quiet)
    with Watch(quiet) as watch:
        report = reports.run(
            model, chosen, folder, texts, device=device, restart=restart, trust_remote_code=trust_remote_code,
            watch=watch, command=command_line(ctx.obj), load_from=push_to_hub,
            limits=Limits(max_ppl_ratio, max_kl),
        )  # fmt: skip
    show(report)
    if report["exceeded"]:
        if push_to_hub:
            out.print(f"[yellow]not uploaded to {escape(push_to_hub)}: the quality gate failed[/]", soft_wrap=True)
        raise typer.Exit(QUALITY)
    if push_to_hub:
        _push(folder, push_to_hub, private)
    if report["fallbacks"]:
        raise typer.Exit(FELL_BACK)


def _given(**options: Any) -> dict[str, Any]:
    """Those that are not left out."""
    return {key: value for key, value in options.items() if value is not None}


def _push(folder: Path, repo: str, private: bool) -> None:
    """Upload a folder whose files are all as they were written."""
    if problems := find_problems(folder):
        raise CheckpointError(f"{folder} is not pushed: {problems[0]}")
    out.print(f"pushed to {push(folder, repo, private=private)}", soft_wrap=True)


def _sources(named: list[str]) -> tuple[str, ...] | None:
    """`auto` is None and `none` is nothing, but neither goes with other texts."""
    if len(named) > 1 and {"auto", "none"} & {*named}:
        raise InputError(f"--eval {' --eval '.join(named)}: auto and none stand alone, drop them or the rest")
    return {("auto",): None, ("none",): ()}.get(tuple(named), tuple(named))


def default_name(model: str, recipe: Recipe) -> str:
    """What the folder is called unless --out says otherwise."""
    folder = Path(model).expanduser()
    name = folder.resolve().name if folder.is_dir() else model.partition("@")[0].rpartition("/")[2]
    return f"{name}-{recipe.name}"


def _download(model: str, quiet: bool) -> Path:
    """The model's folder; while it is fetched from the hub, the hub's own bars show."""
    if quiet or not err.is_terminal:
        return resolve_model(model)
    enable_progress_bars()
    try:
        return resolve_model(model)
    finally:
        disable_progress_bars()


def show(report: dict[str, Any]) -> None:
    """The table of a report, and below it what nobody may miss."""
    original, packed = report["original"], report["packed"]
    out.print(reports.table([original, packed]))
    for line in reports.protocol(packed["perplexity"]):
        out.print(f"[dim]{escape(line)}[/]")
    for line in [*reports.divergence_lines(packed["fidelity"]), *reports.sparsity_lines(packed)]:
        out.print(f"[dim]{escape(line)}[/]", soft_wrap=True)
    if original["not_measured"]:
        out.print(f"[yellow]original {escape(original['not_measured'])}[/]")
    for source in report["collapsed"]:
        shout(
            "COLLAPSED",
            f"On {source} the packed model predicts worse than a guess among the {report['vocabulary']} tokens of its "
            f"vocabulary: it is not usable. {report['advice']}",
        )
    written = report["continuation"]
    if written and written["repeats"]:
        shout(
            "COLLAPSED",
            f"After {written['prompt']!r} the packed model writes {written['text']!r}: it is not usable. "
            f"{report['advice']}",
        )
    if report["fallbacks"]:
        lines = [f"{name}: {why}" for name, why in report["fallbacks"].items()]
        more = [f"and {len(lines) - 5} more, see report.md"] if len(lines) > 5 else []
        shout(
            f"{len(lines)} OF {len(report['layers'])} LINEARS FELL BACK TO ROUND-TO-NEAREST",
            "\n".join(lines[:5] + more),
        )
    if report["exceeded"]:
        shout("QUALITY GATE FAILED", "\n".join([*(f"{line}." for line in report["exceeded"]), report["advice"]]))
    out.print(f"{report['folder']}  [dim]README.md, report.md, report.json[/]", soft_wrap=True)


def shout(title: str, text: str) -> None:
    width = min(out.width, 100)
    out.print(Panel(escape(text), title=title, border_style="bold red", title_align="left", width=width))


@app.command()
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
        print(json.dumps(reports.strict(size.to_dict()), indent=1))
        return
    if size.layers:
        out.print(_layer_table(size))
    out.print(_size_table(size))


def _layer_table(size: Size) -> Table:
    table = _table("layer", "shape", "format", *(("bytes", "bits", "claimed")))
    for layer in size.layers:
        table.add_row(
            layer.name, "x".join(map(str, layer.shape)), layer.format, f"{layer.bytes:,}",
            f"{layer.bits_per_weight:.3f}", f"{layer.claimed_bits:.2f}",
        )  # fmt: skip
    return table


def _size_table(size: Size) -> Table:
    table = _table("stored", "", "bytes", "in fp16", "bits per weight", "claimed", left=1)
    if size.layers:
        table.add_row(
            "packed linears", str(len(size.layers)), f"{size.linear_bytes:,}", f"{2 * size.linear_weights:,}",
            f"{size.linear_bits_per_weight:.3f}", f"{size.claimed_bits:.2f}",
        )  # fmt: skip
    for kind, count in size.other.items():
        if count:
            table.add_row(kind, "", f"{count:,}")
    table.add_row("headers of the files", "", f"{size.header_bytes:,}")
    table.add_section()
    bits = f"{size.model_bits_per_weight:.3f}"
    table.add_row("whole model", "", f"{size.file_bytes:,}", f"{size.fp16_bytes:,}", bits)
    return table


def _table(*headers: str, left: int = 3) -> Table:
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False)
    for i, header in enumerate(headers):
        table.add_column(header, justify="left" if i < left else "right", overflow="fold")
    return table


@app.command()
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


@app.command("eval")
def evaluate(
    ctx: typer.Context,
    models: Annotated[list[str], typer.Argument(metavar="MODEL", help="packed or original: folders or hub names")],
    sources: Annotated[
        list[str],
        typer.Option(
            "--ppl",
            metavar="SOURCE",
            help="text to measure token perplexity on, repeatable: a text file, wikitext2, c4, ptb, org/name, "
            "python-docs",
        ),
    ] = [],  # noqa: B006 (typer reads it, nobody writes it)
    fidelity: Annotated[
        str | None,
        typer.Option(metavar="ORIGINAL", help="compare predictions with this model's, on the texts of --ppl"),
    ] = None,
    tasks: Annotated[
        list[str],
        typer.Option(
            metavar="NAMES",
            help="lm-eval's tasks, groups or patterns, with commas between them: piqa,arc_easy,hellaswag; wikitext is "
            "its word perplexity",
        ),
    ] = [],  # noqa: B006
    tasks_dir: TasksDirOption = None,
    limit: LimitOption = None,
    num_fewshot: Annotated[
        int | None, typer.Option(min=0, help="examples before each document, by default what the task says")
    ] = None,
    batch_size: Annotated[
        str, typer.Option(metavar="N", help="requests of tasks at a time; auto: by their length in tokens")
    ] = "auto",
    seed: Annotated[int, typer.Option(min=0, help="of the few-shot examples")] = 0,
    log_samples: Annotated[
        bool, typer.Option("--log-samples", help="keep each prompt and answer of the tasks in --json")
    ] = False,
    context: ContextOption = None,
    max_tokens: Annotated[int | None, typer.Option(min=1, help="of each text, by default all")] = None,
    dtype: Annotated[str, typer.Option(help="auto is float32 on a CPU, elsewhere the checkpoint's")] = "auto",
    bos: Annotated[str, typer.Option(help="text: with the tokenizer's own start token; none: without")] = "text",
    device: DeviceOption = "auto",
    trust_remote_code: TrustOption = False,
    json_file: Annotated[Path | None, typer.Option("--json", metavar="FILE", help="write the results here too")] = None,
    quiet: QuietOption = False,
) -> None:
    """Measure packed and original models on the same texts and tasks.

    --ppl: token perplexity as in published tables, one stream in windows that do not overlap.

    --fidelity: how far predictions are from the original's, beside what rounding does to those.

    --tasks: lm-eval's questions, with chance levels (pip install 'ultralowbit\\[eval]').

    [bold]ultralowbit eval model-sign-2 --ppl wikitext2 --ppl c4 --fidelity model[/]

    [bold]ultralowbit eval model model-sign-2 --tasks piqa,arc_easy,hellaswag --limit 200[/]
    """
    if json_file and not json_file.absolute().parent.is_dir():
        raise InputError(f"--json {str(json_file)!r} lies in no folder: make it first, nothing has been measured")
    wanted = evaluation.Wanted(
        sources=tuple(sources), fidelity=fidelity,
        tasks=tuple(name for names in tasks for name in _listed(names)),
        tasks_dir=tasks_dir, context=context, max_tokens=max_tokens, bos=bos,
        dtype=None if dtype == "auto" else _dtype(dtype), limit=limit, num_fewshot=num_fewshot,
        batch_size=None if batch_size == "auto" else _count(batch_size), seed=seed, log_samples=log_samples,
    )  # fmt: skip
    with Watch(quiet) as watch:
        report = evaluation.run(
            models, wanted, device=device, trust_remote_code=trust_remote_code, watch=watch,
            fetch=lambda model: _download(model, quiet), command=command_line(ctx.obj),
        )  # fmt: skip
    if json_file:
        json_file.write_text(json.dumps(evaluation.to_json(report), indent=1) + "\n", encoding="utf-8")
    _show_evaluation(report)


def _show_evaluation(report: dict[str, Any]) -> None:
    rows = report["results"]
    for row in rows:
        if row["tasks"]:
            out.print(f"{row['model']}, lm-eval {row['tasks'].version}:", markup=False, soft_wrap=True)
            out.print(row["tasks"].table, markup=False, soft_wrap=True)
    for grid, left in (
        (evaluation.perplexity_grid(rows), 2),
        (evaluation.fidelity_grid(rows), 2),
        (evaluation.task_grid(rows), 2),
    ):
        if len(grid) > 1:
            table = _table(*grid[0], left=left)
            for line in grid[1:]:
                table.add_row(*map(escape, line))
            out.print(table)
    for line in evaluation.average_notes(rows):
        out.print(f"[dim]{escape(line)}[/]", soft_wrap=True)


def _count(text: str) -> int:
    if not text.isdecimal() or not int(text):
        raise InputError(f"--batch-size is {text!r}, expected auto or a number from 1")
    return int(text)


def _dtype(name: str) -> torch.dtype:
    known = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if name not in known:
        raise InputError(f"--dtype is {name!r}, expected auto, {', '.join(known)}")
    return known[name]


@app.command()
def compare(
    ctx: typer.Context,
    runs: Annotated[
        list[Path],
        typer.Argument(metavar="RUN", help="folders that compress wrote, folders of such, or measured original models"),
    ],
    out_folder: Annotated[Path, typer.Option("--out", help="folder to write")] = Path("comparison"),
    references: Annotated[
        list[Path],
        typer.Option(
            "--reference", metavar="DIR",
            help="a run or original of another model to draw beside them, such as a smaller one at more bits",
        ),
    ] = [],  # noqa: B006
) -> None:  # fmt: skip
    """Set finished runs side by side: one page that opens from disk, with tables and plots of quality against size.

    Runs of different models, and perplexities on different windows, stand apart: those numbers do not compare. Runs
    that differ only in their seed are one row, mean ± standard deviation.

    [bold]ultralowbit compare model-sign-2 model-gptq-2bit model-gptq-3bit --out comparison[/]

    [bold]ultralowbit compare big-sign-1 big-sign-2 --reference small-gptq-4bit[/]
    """
    comparison = comparisons.compare(runs, out_folder, references, command=command_line(ctx.obj))
    show_comparison(comparison)
    out.print(f"{out_folder / 'report.html'}  [dim]report.md, report.json, plots[/]", soft_wrap=True)


def show_comparison(comparison: dict[str, Any]) -> None:
    """The columns of a comparison that a terminal has room for, and why something stands apart."""
    for section in comparison["sections"]:
        if len(comparison["sections"]) > 1:
            out.print(f"[bold]{escape(section['model']['name'])}[/]")
        columns = [c for c in section["columns"] if c["drawn"] or c["key"] in ("linear_bits", "file_bytes", "seconds")]
        table = _table("", *(f"{c['group']}\n{c['title']}" for c in columns), left=1)
        for row in section["rows"]:
            label = f"[bold]{escape(row['label'])}[/]" if row["on_front"] else escape(row["label"])
            table.add_row(label, *(comparisons.cell(row, column) for column in columns))
        out.print(table)
        for line in [*section["notes"], *(column["protocol"] for column in columns if column["drawn"])]:
            out.print(f"[dim]{escape(line)}[/]")


@app.command()
def generate(
    model: ModelArgument,
    prompt: Annotated[str, typer.Argument(help="text to continue")],
    max_new_tokens: Annotated[int, typer.Option(min=1, help="tokens to write at most")] = 128,
    temperature: Annotated[float, typer.Option(min=0, help="0 takes the likeliest token every time")] = 0.0,
    seed: Annotated[int, typer.Option(help="of the sampling")] = 0,
    int8: Annotated[
        bool, typer.Option("--int8", help="round the inputs of packed Linears to 8 bits: faster on a CPU")
    ] = False,
    device: DeviceOption = "auto",
    trust_remote_code: TrustOption = False,
) -> None:
    """Continue a prompt with a packed or original model, word by word.

    [bold]ultralowbit generate model-sign-2 "The import statement" --temperature 0.7[/]
    """
    where = pick_device(device)
    folder = _download(model, quiet=False)
    tokenizer = open_tokenizer(folder, trust_remote_code)
    net = open_model(folder, where, pick_dtype(folder, where), trust_remote_code, int8, fuse=True)
    write_text(
        net, tokenizer, prompt, max_new_tokens=max_new_tokens, temperature=temperature, seed=seed,
        on_text=lambda piece: print(piece, end="", flush=True),
    )  # fmt: skip
    print()


@app.command()
def demo(
    ctx: typer.Context,
    out_folder: Annotated[Path, typer.Option("--out", help="folder to write")] = Path("ultralowbit-demo"),
    device: DeviceOption = "auto",
    restart: Annotated[bool, typer.Option("--restart", help="discard what an earlier run has written")] = False,
    quiet: QuietOption = False,
) -> None:
    """Compress the tiny model that comes with the package with several recipes, and compare them in one table.

    Needs no network and takes a minute or two; run again, it only prints.

    [bold]ultralowbit demo[/]
    """
    # products so small gain little from a second thread, and on a busy machine the two wait for one another for minutes
    torch.set_num_threads(1)
    with Watch(quiet) as watch:
        result = demos.run(out_folder, watch, device=device, restart=restart, command=command_line(ctx.obj))
    out.print(reports.table(result["rows"]))
    for line in reports.protocol(result["rows"][0]["perplexity"]):
        out.print(f"[dim]{escape(line)}[/]")
    out.print()
    samples = _table("", f"what it writes after {result['prompt']!r}", left=2)
    for row in result["rows"]:
        samples.add_row(row["label"], escape(" ".join(row["sample"].split())))
    out.print(samples)
    out.print()
    for row in result["rows"]:
        if row["collapsed"]:
            shout("COLLAPSED", f"{row['label']} predicts worse than a guess among the tokens of the vocabulary.")
    out.print(f"{out_folder}  [dim]report.md, report.json and a folder for each recipe[/]", soft_wrap=True)
    out.print(
        f"[dim]to see them as plots on one page: ultralowbit compare {escape(str(out_folder))}[/]", soft_wrap=True
    )
    if any(row["fallbacks"] for row in result["rows"]):
        shout("FELL BACK", "Some Linears were rounded to nearest instead: see the recipes' report.md.")
        raise typer.Exit(FELL_BACK)


@bench_app.command("pipeline")
def bench_pipeline(
    layers: Annotated[list[int], typer.Option(help="depth of a random model, repeatable")] = [4, 22],  # noqa: B006
    samples: Annotated[int, typer.Option(help="calibration windows")] = 16,
    length: Annotated[int, typer.Option(help="tokens in a window")] = 512,
    recipe: Annotated[str, typer.Option(help="a shipped recipe or a .yaml file")] = "gptq-2bit",
    out_folder: Annotated[
        Path | None, typer.Option("--out", help="folder to work in, by default a temporary one")
    ] = None,
    json_file: Annotated[Path | None, typer.Option("--json", metavar="FILE", help="write the results here too")] = None,
) -> None:
    """Time and memory of compressing random models of two depths, beside the work that cannot be avoided.

    [bold]ultralowbit bench pipeline --layers 2 --layers 4 --samples 4[/]
    """
    pipeline_bench(
        layers, samples, length, recipe, out_folder, json_file, say=lambda line: out.print(line, markup=False)
    )


@bench_app.command("solve")
def bench_solve(
    recipes: Annotated[
        list[str], typer.Option("--recipe", help="repeatable; the first is what the others are compared with")
    ] = list(SOLVED),  # noqa: B006
    hidden: Annotated[int, typer.Option(min=64, help="of the block; its MLP is 2.75 times as wide")] = 2048,
    json_file: Annotated[Path | None, typer.Option("--json", metavar="FILE", help="write the results here too")] = None,
) -> None:
    """Time in which the methods of recipes pack one block, as a multiple of GPTQ's.

    [bold]ultralowbit bench solve --recipe gptq-2bit --recipe sign-2 --hidden 512[/]
    """
    solve_bench(recipes, Shape.wide(hidden), json_file=json_file, say=lambda line: out.print(line, markup=False))


@bench_app.command("tune")
def bench_tune(
    length: Annotated[int, typer.Option(min=2, help="tokens in a window")] = 512,
    batch: Annotated[int, typer.Option(min=1, help="windows in a step")] = 2,
    repeat: Annotated[int, typer.Option(min=1, help="steps that are timed, of each")] = 5,
    hidden: Annotated[int, typer.Option(min=64, help="of the block; its MLP is 2.75 times as wide")] = 2048,
    device: DeviceOption = "cpu",
    json_file: Annotated[Path | None, typer.Option("--json", metavar="FILE", help="write the results here too")] = None,
) -> None:
    """Time of a step of block-wise tuning, as a multiple of the block's own forward and backward pass.

    [bold]ultralowbit bench tune --hidden 512 --length 2048 --batch 1[/]
    """
    tune_bench(
        length, batch, repeat, Shape.wide(hidden), device, json_file, say=lambda line: out.print(line, markup=False)
    )


@bench_app.command("eval")
def bench_eval(
    model: Annotated[
        str | None, typer.Argument(metavar="[MODEL]", help="packed or original; else a random one")
    ] = None,
    layers: Annotated[int, typer.Option(min=1, help="of the random model, in TinyLlama-1.1B's shape")] = 4,
    context: Annotated[int, typer.Option(min=2, help="tokens in a window")] = 2048,
    tokens: Annotated[int, typer.Option(min=2, help="to measure on")] = 8192,
    repeat: Annotated[int, typer.Option(min=1, help="times each batch is run; the fastest counts")] = 3,
    device: DeviceOption = "auto",
    json_file: Annotated[Path | None, typer.Option("--json", metavar="FILE", help="write the results here too")] = None,
) -> None:
    """What measuring perplexity and divergence costs beside the forward passes that it needs.

    [bold]ultralowbit bench eval model-sign-2[/]
    """
    folder = _download(model, quiet=False) if model else None
    eval_bench(
        folder, layers, context, tokens, repeat, device, json_file,
        say=lambda line: out.print(line, markup=False, soft_wrap=True),
    )  # fmt: skip


@bench_app.command("methods")
def bench_methods(
    ctx: typer.Context,
    models: Annotated[list[str], typer.Argument(metavar="MODEL", help="originals: folders or hub names")],
    recipes: Annotated[
        str | None, typer.Option(metavar="NAMES", help="with commas between them; all shipped ones by default")
    ] = None,
    seeds: Annotated[str, typer.Option(metavar="NUMBERS", help="of the calibration windows, with commas")] = "0,1,2",
    calib: Annotated[
        list[str],
        typer.Option(
            metavar="SOURCE",
            help="calibration text, the recipe's own by default; those after the first are run with the first seed, "
            "for the robustness track",
        ),
    ] = [],  # noqa: B006
    eval_sources: Annotated[
        list[str],
        typer.Option("--eval", metavar="SOURCE", help="text to measure perplexity on, repeatable; as compress --eval"),
    ] = ["auto"],  # noqa: B006
    context: ContextOption = None,
    max_tokens: Annotated[int | None, typer.Option(min=1, help="of each text that perplexity is measured on")] = None,
    tasks: Annotated[
        str | None,
        typer.Option(metavar="NAMES", help="lm-eval's, of the original and each recipe's first seed; as eval --tasks"),
    ] = None,
    tasks_dir: TasksDirOption = None,
    limit: LimitOption = None,
    samples: Annotated[int | None, typer.Option(help="calibration windows")] = None,
    length: Annotated[int | None, typer.Option(help="tokens in a calibration window")] = None,
    small: SmallOption = False,
    settings: Annotated[
        list[str], typer.Option("--set", metavar="KEY=VALUE", help="a value of every recipe, such as solve.bits=3")
    ] = [],  # noqa: B006
    out_folder: Annotated[Path, typer.Option("--out", help="folder to write")] = Path("bench-methods"),
    tracks: Annotated[
        bool, typer.Option("--tracks/--no-tracks", help="measure robustness and speed too, and print the tracks")
    ] = True,
    device: DeviceOption = "auto",
    restart: Annotated[bool, typer.Option("--restart", help="discard what an earlier run has written")] = False,
    trust_remote_code: TrustOption = False,
    quiet: QuietOption = False,
) -> None:
    """Run recipes on models and seeds: one table, mean ± standard deviation beside fp16, and the page of compare.

    Killed at any moment, the same command goes on where it stopped; a run that fails is noted and the others go on.
    Tracks say what is left of a model in ratios to the original: language, tasks (of --tasks, or where `eval --tasks
    --json` left results in a run's folder), robustness to corrupted text, cost, size, speed.

    [bold]ultralowbit bench methods model --recipes sign-2,gptq-2bit --calib wikitext2 --eval wikitext2 --out bench[/]
    """
    given = [f"calibration.{key}={value}" for key, value in _given(samples=samples, length=length).items()]
    wanted = methods_bench.Methods(
        models=tuple(models), recipes=tuple(_listed(recipes)) if recipes else tuple(shipped()),
        seeds=tuple(_numbers(seeds)), settings=(*settings, *given), small=small, calibrations=tuple(calib),
        texts=reports.Texts(_sources(eval_sources), context, max_tokens), with_tracks=tracks,
        tasks=evaluation.Wanted(tasks=tuple(_listed(tasks)), tasks_dir=tasks_dir, limit=limit) if tasks else None,
    )  # fmt: skip
    for model in models:
        _download(model, quiet)
    with Watch(quiet) as watch:
        comparison = methods_bench.run(
            wanted, out_folder, device=device, restart=restart, trust_remote_code=trust_remote_code, watch=watch,
            command=command_line(ctx.obj),
        )  # fmt: skip
    show_comparison(comparison)
    for found in (comparison["tracks"] or {"models": []})["models"]:
        table = _table(f"{found['model']}: what is left", *found["rows"][0]["tracks"], left=1)
        for row in found["rows"]:
            cells = (f"{t['geometric']:.3f}" if t["ratios"] else "-" for t in row["tracks"].values())
            table.add_row(escape(row["label"]), *cells)
        out.print(table)
        out.print("[dim]geometric means of ratios to the original, which are in report.json[/]")
    for entry in comparison["failed"]:
        shout("FAILED", f"{entry['model']}, {entry['label']}: {entry['error']}")
    out.print(f"{out_folder / 'report.html'}  [dim]report.md, report.json, plots, runs[/]", soft_wrap=True)
    if comparison["failed"]:
        raise typer.Exit(FAILED)
    if any(run["fallbacks"] for s in comparison["sections"] for row in s["rows"] for run in row["runs"]):
        raise typer.Exit(FELL_BACK)


def _listed(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def _numbers(text: str) -> list[int]:
    numbers = _listed(text)
    if not numbers or not all(number.isdecimal() for number in numbers):
        raise InputError(f"--seeds is {text!r}, expected numbers with commas between them, such as 0,1,2")
    return [*dict.fromkeys(map(int, numbers))]


@bench_app.command("kernels")
def bench_kernels(
    shape: Annotated[list[str] | None, typer.Option(metavar="OUTxIN", help="of weights, repeatable")] = None,
    tokens: Annotated[list[int] | None, typer.Option(min=1, help="of x, repeatable")] = None,
    formats: Annotated[
        list[str] | None, typer.Option("--format", help=f"on a GPU, repeatable: {', '.join(gpu.FORMATS)}")
    ] = None,
    device: DeviceOption = "auto",
    rounds: Annotated[int, typer.Option(min=1, help="times that each product is run")] = 30,
    threads: Annotated[int, typer.Option(min=1, help="of a CPU")] = 1,
    decode: Annotated[bool, typer.Option(help="on a GPU, also decode with a Llama of 7B's shape")] = True,
    tune: Annotated[bool, typer.Option("--tune", help="find the tiles for this GPU instead")] = False,
    csv_file: Annotated[
        Path | None, typer.Option("--csv", metavar="FILE", help="append the rows, and the machine, here")
    ] = None,
) -> None:
    """Time products with packed weights beside torch's own: on a GPU in CUDA graphs, beside cuBLAS and a copy of as
    many bytes, then decoding; on a CPU beside bf16, fp32 and 4-bit integers.

    [bold]ultralowbit bench kernels --shape 4096x4096 --tokens 1[/]

    [bold]ultralowbit bench kernels --device cuda --csv kernels/bench.csv[/]
    """
    say = lambda line: out.print(line, markup=False, highlight=False, soft_wrap=True)  # noqa: E731
    for wanted in shape or ():
        parts = wanted.split("x")
        if len(parts) != 2 or not all(part.isdecimal() for part in parts) or int(parts[1]) % 128 or not int(parts[0]):
            raise InputError(f"--shape is {wanted!r}, expected OUTxIN with IN a multiple of 128, as in {SHAPES[0]}")
    where = gpu.need_gpu(device) if device.startswith("cuda") else pick_device(device)
    if where.type == "cuda" and tune:
        say(f"\nkernels/tuning.json, for the next release:\n{gpu.tune_bench(where, say=say)}")
    elif where.type == "cuda":
        shapes = [tuple(map(int, wanted.split("x"))) for wanted in shape or ()]
        gpu.gpu_bench(
            where, shapes or gpu.SHAPES, tokens or gpu.TOKENS, formats or gpu.FORMATS, rounds, csv_file, decode, say
        )
    elif tune or formats:
        raise InputError(f"{'--tune' if tune else '--format'} is for a GPU, and --device is {where}: leave it out")
    else:
        kernel_bench(shape or SHAPES, tokens or TOKENS, rounds, threads, csv_file, say)


@bench_app.command("decode")
def bench_decode(
    layers: Annotated[int, typer.Option(min=1, help="of random models in TinyLlama-1.1B's shape")] = 22,
    tokens: Annotated[int, typer.Option(min=1, help="to write in a turn")] = 8,
    rounds: Annotated[int, typer.Option(min=1, help="turns; the fastest counts")] = 4,
    threads: Annotated[int, typer.Option(min=1, help="of the CPU")] = 1,
    json_file: Annotated[Path | None, typer.Option("--json", metavar="FILE", help="write the results here too")] = None,
) -> None:
    """Tokens a second and peak memory of random packed models on this CPU, beside the same model in bf16.

    [bold]ultralowbit bench decode --layers 4[/]
    """
    decode_bench(
        layers, tokens, rounds, threads, json_file=json_file,
        say=lambda line: out.print(line, markup=False, soft_wrap=True),
    )  # fmt: skip


@recipes_app.command("list")
def recipes_list() -> None:
    """Name the shipped recipes.

    [bold]ultralowbit recipes list[/]
    """
    table = _table("recipe", "what it does")
    for name in shipped():
        table.add_row(name, Recipe.load(name).summary)
    out.print(table)


@recipes_app.command("show")
def recipes_show(
    name: Annotated[str, typer.Argument(help="a shipped recipe or a .yaml file")], small: SmallOption = False
) -> None:
    """Print a recipe with every value that it leaves at its default; save it to a file to make your own.

    [bold]ultralowbit recipes show sign-2 > mine.yaml[/]
    """
    out.out(
        f"# ultralowbit compress MODEL --recipe {name} --out DIR\n" + Recipe.load(name, small=small).to_yaml(), end=""
    )


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
