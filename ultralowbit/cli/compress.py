"""`ultralowbit compress`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ultralowbit.cli.console import Watch, say
from ultralowbit.cli.errors import FELL_BACK, QUALITY
from ultralowbit.cli.goal import BitsOption, EffortOption, Goal, RecipeOption, SizeOption
from ultralowbit.cli.options import (
    CalibOption,
    ContextOption,
    DeviceOption,
    EvalOption,
    LengthOption,
    MaxTokensOption,
    ModelArgument,
    QuietOption,
    RestartOption,
    SamplesOption,
    SeedOption,
    SettingsOption,
    SmallOption,
    TrustOption,
    command_line,
    default_name,
    download,
    eval_sources,
    given,
    possible,
)
from ultralowbit.cli.render import show
from ultralowbit.errors import CheckpointError, InputError

if TYPE_CHECKING:
    from ultralowbit.recipe import Recipe
    from ultralowbit.report.run import Texts
    from ultralowbit.report.schema import RunReport

OutOption = Annotated[
    Path | None, typer.Option("--out", callback=possible, help="folder to write; <model>-<recipe> by default")
]
RatioOption = Annotated[
    float | None, typer.Option(min=0, help="exit 4 if perplexity is more than this many times the original's")
]
KLOption = Annotated[
    float | None,
    typer.Option(min=0, help="exit 4 if predictions diverge by more than this from the original's, in nats per token"),
]
PushOption = Annotated[
    str | None, typer.Option(metavar="ORG/NAME", help="upload the folder to the hub once it is whole and verified")
]
PrivateOption = Annotated[bool, typer.Option("--private", help="make the hub model private, if it is new")]
DryRunOption = Annotated[
    bool, typer.Option("--dry-run", help="print the bits, memory, disk and time to expect, and run nothing")
]


def compress(
    ctx: typer.Context,
    model: ModelArgument,
    recipe: RecipeOption = None,
    bits: BitsOption = None,
    size: SizeOption = None,
    effort: EffortOption = None,
    out_folder: OutOption = None,
    calib: CalibOption = None,
    samples: SamplesOption = None,
    length: LengthOption = None,
    seed: SeedOption = None,
    small: SmallOption = False,
    settings: SettingsOption = [],  # noqa: B006 (typer reads it, nobody writes it)
    texts: EvalOption = ["auto"],  # noqa: B006
    context: ContextOption = None,
    max_tokens: MaxTokensOption = None,
    max_ppl_ratio: RatioOption = None,
    max_kl: KLOption = None,
    device: DeviceOption = "auto",
    push_to_hub: PushOption = None,
    private: PrivateOption = False,
    dry_run: DryRunOption = False,
    restart: RestartOption = False,
    trust_remote_code: TrustOption = False,
    quiet: QuietOption = False,
) -> None:
    """Compress a model into a packed checkpoint and measure what it cost.

    Killed at any moment, the same command goes on where it stopped. The folder ends up with report.md, report.json and
    a model card, README.md. Several processes share the work, and write the same bytes, under torchrun.

    [bold]ultralowbit compress meta-llama/Llama-3.2-1B --bits 2 --effort fast --calib wikitext2[/]

    [bold]ultralowbit compress ./model --recipe gptq-2bit --set quantize.group=64 --calib notes.txt --out small[/]
    """
    from ultralowbit.pipeline.ranks import Ranks
    from ultralowbit.report.run import Texts, compress_and_measure
    from ultralowbit.report.schema import Limits

    with Ranks.join() as ranks:
        goal, calibration = Goal(recipe, bits, size, effort), given(source=calib, seed=seed)
        every = [*settings, *_windows(samples, length)]
        chosen = goal.load(model, every, device, trust_remote_code, small=small, texts=calibration)
        measured, limits = Texts(eval_sources(texts), context, max_tokens), Limits(max_ppl_ratio, max_kl)
        folder = out_folder or Path(default_name(model, chosen))
        if dry_run:
            if ranks.is_first:
                _say_plan(model, chosen, ranks.device(device), trust_remote_code, folder, ranks.size, measured)
            return
        _check_push(push_to_hub, private)
        download(model, quiet)
        with Watch(quiet or not ranks.is_first) as watch:
            report = compress_and_measure(
                model, chosen, folder, measured, device=device, restart=restart, trust_remote_code=trust_remote_code,
                watch=watch, command=command_line(ctx.obj), load_from=push_to_hub, ranks=ranks, limits=limits,
            )  # fmt: skip
    if report is not None:
        _finish(report, folder, push_to_hub, private)


def _windows(samples: int | None, length: int | None) -> list[str]:
    """Settings of the calibration windows that options ask for."""
    return [f"calibration.{key}={value}" for key, value in given(samples=samples, length=length).items()]


def _say_plan(
    model: str, recipe: Recipe, device: str, trust_remote_code: bool, folder: Path, ranks: int, measured: Texts
) -> None:
    """Print what the run would need, also that what it measures afterwards is not counted; `InputError` where it could
    not write its folder."""
    from ultralowbit.checkpoint.job import Job
    from ultralowbit.pipeline.estimate import estimate

    Job.check(folder)
    planned = estimate(model, recipe, device, trust_remote_code, folder, ranks)
    if sources := measured.for_recipe(recipe).sources:
        note = f"measuring on {' and '.join(sources)} is not in the estimates (--eval none leaves it out)"
        planned = replace(planned, notes=[*planned.notes, note])
    say(str(planned))


def _check_push(repo: str | None, private: bool) -> None:
    """Raise `InputError`, before any work, where the result could not be uploaded."""
    from ultralowbit.hub import check_push

    if private and not repo:
        raise InputError("--private needs a model on the hub: give --push-to-hub ORG/NAME too")
    if repo:
        check_push(repo)


def _finish(report: RunReport, folder: Path, repo: str | None, private: bool) -> None:
    """Show the report, upload what passed its gates, and leave with the exit code that says what did not."""
    show(report, folder)
    if report.exceeded:
        if repo:
            say(f"not uploaded to {repo}: the quality gate failed", "yellow")
        raise typer.Exit(QUALITY)
    if repo:
        _push(folder, repo, private)
    if report.fallbacks:
        raise typer.Exit(FELL_BACK)


def _push(folder: Path, repo: str, private: bool) -> None:
    """Upload a folder whose files are all as they were written."""
    from ultralowbit.hub import push
    from ultralowbit.pipeline.verify import verify

    if problems := verify(folder):
        raise CheckpointError(f"{folder} is not pushed: {problems[0]}")
    say(f"pushed to {push(folder, repo, private=private)}")
