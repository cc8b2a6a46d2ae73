"""`ultralowbit bench`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from ultralowbit.bench import kernels_gpu as gpu
from ultralowbit.bench.decode import decode_bench
from ultralowbit.bench.eval import eval_bench
from ultralowbit.bench.kernels_cpu import SHAPES, TOKENS, kernel_bench
from ultralowbit.bench.kernels_gpu import autotune_bench, gpu_bench, need_gpu
from ultralowbit.bench.models import Shape
from ultralowbit.bench.pipeline import pipeline_bench
from ultralowbit.bench.quantize import QUANTIZED, quantize_bench
from ultralowbit.bench.training import training_bench
from ultralowbit.cli.console import Watch, out
from ultralowbit.cli.errors import FAILED, FELL_BACK
from ultralowbit.cli.options import (
    ContextOption,
    DeviceOption,
    LimitOption,
    QuietOption,
    SmallOption,
    TasksDirOption,
    TrustOption,
    command_line,
    download,
    given,
    listed,
    numbers,
    sources,
)
from ultralowbit.cli.render import new_table, shout, show_comparison
from ultralowbit.errors import InputError
from ultralowbit.eval.evaluate import Wanted
from ultralowbit.recipe import shipped
from ultralowbit.report import sweep as methods_bench
from ultralowbit.report.run import Texts
from ultralowbit.system import pick_device


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


def bench_quantize(
    recipes: Annotated[
        list[str], typer.Option("--recipe", help="repeatable; the first is what the others are compared with")
    ] = list(QUANTIZED),  # noqa: B006
    hidden: Annotated[int, typer.Option(min=64, help="of the block; its MLP is 2.75 times as wide")] = 2048,
    json_file: Annotated[Path | None, typer.Option("--json", metavar="FILE", help="write the results here too")] = None,
) -> None:
    """Time in which the methods of recipes pack one block, as a multiple of GPTQ's.

    [bold]ultralowbit bench quantize --recipe gptq-2bit --recipe sign-2 --hidden 512[/]
    """
    quantize_bench(recipes, Shape.wide(hidden), json_file=json_file, say=lambda line: out.print(line, markup=False))


def bench_training(
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
    training_bench(
        length, batch, repeat, Shape.wide(hidden), device, json_file, say=lambda line: out.print(line, markup=False)
    )


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
    folder = download(model, quiet=False) if model else None
    eval_bench(
        folder, layers, context, tokens, repeat, device, json_file,
        say=lambda line: out.print(line, markup=False, soft_wrap=True),
    )  # fmt: skip


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
        list[str], typer.Option("--set", metavar="KEY=VALUE", help="a value of every recipe, such as quantize.bits=3")
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
    overrides = [f"calibration.{key}={value}" for key, value in given(samples=samples, length=length).items()]
    wanted = methods_bench.Methods(
        models=tuple(models), recipes=tuple(listed(recipes)) if recipes else tuple(shipped()),
        seeds=tuple(numbers(seeds)), settings=(*settings, *overrides), small=small, calibrations=tuple(calib),
        texts=Texts(sources(eval_sources), context, max_tokens), with_tracks=tracks,
        tasks=Wanted(tasks=tuple(listed(tasks)), tasks_dir=tasks_dir, limit=limit) if tasks else None,
    )  # fmt: skip
    for model in models:
        download(model, quiet)
    with Watch(quiet) as watch:
        comparison = methods_bench.run_sweep(
            wanted, out_folder, device=device, restart=restart, trust_remote_code=trust_remote_code, watch=watch,
            command=command_line(ctx.obj),
        )  # fmt: skip
    show_comparison(comparison)
    for found in (comparison["tracks"] or {"models": []})["models"]:
        table = new_table(f"{found['model']}: what is left", *found["rows"][0]["tracks"], left=1)
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
    where = need_gpu(device) if device.startswith("cuda") else pick_device(device)
    if where.type == "cuda" and tune:
        say(f"\nkernels/tuning.json, for the next release:\n{autotune_bench(where, say=say)}")
    elif where.type == "cuda":
        shapes = [tuple(map(int, wanted.split("x"))) for wanted in shape or ()]
        gpu_bench(
            where, shapes or gpu.SHAPES, tokens or gpu.TOKENS, formats or gpu.FORMATS, rounds, csv_file, decode, say
        )
    elif tune or formats:
        raise InputError(f"{'--tune' if tune else '--format'} is for a GPU, and --device is {where}: leave it out")
    else:
        kernel_bench(shape or SHAPES, tokens or TOKENS, rounds, threads, csv_file, say)


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
