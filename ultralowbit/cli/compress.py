"""`ultralowbit compress`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from ultralowbit.cli.console import Watch, out
from ultralowbit.cli.errors import FELL_BACK, QUALITY
from ultralowbit.cli.options import (
    ContextOption,
    DeviceOption,
    ModelArgument,
    QuietOption,
    SmallOption,
    TrustOption,
    command_line,
    default_name,
    download,
    given,
    sources,
)
from ultralowbit.cli.render import show
from ultralowbit.errors import CheckpointError, InputError
from ultralowbit.hub import check_push, push
from ultralowbit.pipeline.estimate import estimate
from ultralowbit.pipeline.verify import verify as find_problems
from ultralowbit.recipe import Recipe
from ultralowbit.report.gates import Limits
from ultralowbit.report.run import Texts, compress_and_measure


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
        list[str], typer.Option("--set", metavar="KEY=VALUE", help="any value of the recipe, such as quantize.bits=3")
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

    [bold]ultralowbit compress ./model --recipe gptq-2bit --set quantize.group=64 --calib notes.txt --out small[/]
    """
    windows = given(samples=samples, length=length)
    overrides = [f"calibration.{key}={value}" for key, value in windows.items()]
    chosen = Recipe.load(recipe, [*settings, *overrides], small=small, texts=given(source=calib, seed=seed))
    texts = Texts(sources(eval_sources), context, max_tokens)
    folder = out_folder or Path(default_name(model, chosen))
    if dry_run:
        out.print(str(estimate(model, chosen, device, trust_remote_code, folder)), markup=False, soft_wrap=True)
        return
    if private and not push_to_hub:
        raise InputError("--private is of a model on the hub: give --push-to-hub ORG/NAME too")
    if push_to_hub:
        check_push(push_to_hub)
    download(model, quiet)
    with Watch(quiet) as watch:
        report = compress_and_measure(
            model, chosen, folder, texts, device=device, restart=restart, trust_remote_code=trust_remote_code,
            watch=watch, command=command_line(ctx.obj), load_from=push_to_hub, limits=Limits(max_ppl_ratio, max_kl),
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


def _push(folder: Path, repo: str, private: bool) -> None:
    """Upload a folder whose files are all as they were written."""
    if problems := find_problems(folder):
        raise CheckpointError(f"{folder} is not pushed: {problems[0]}")
    out.print(f"pushed to {push(folder, repo, private=private)}", soft_wrap=True)
