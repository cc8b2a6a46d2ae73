"""`ultralowbit bench`: a command for each thing that is timed."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ultralowbit.cli.console import Watch, cell, out, say
from ultralowbit.cli.errors import FAILED, FELL_BACK
from ultralowbit.cli.options import (
    CalibOption,
    ContextOption,
    CsvOption,
    DeviceOption,
    EvalOption,
    JsonOption,
    LengthOption,
    LimitOption,
    MaxTokensOption,
    QuietOption,
    RestartOption,
    SamplesOption,
    SettingsOption,
    SmallOption,
    TasksDirOption,
    TrustOption,
    command_line,
    download,
    eval_sources,
    given,
    listed,
    numbers,
    possible,
    torch_dtype,
)
from ultralowbit.cli.render import new_table, shout, show_comparison
from ultralowbit.errors import InputError

if TYPE_CHECKING:
    from ultralowbit.report.schema import Comparison

HiddenOption = Annotated[int, typer.Option(min=64, help="width of the block; its MLP is 2.75 times as wide")]
OriginalsArgument = Annotated[
    list[str], typer.Argument(metavar="MODEL", help="original model: a folder or a hub name, repeatable")
]
RecipeOption = Annotated[str, typer.Option(help="shipped recipe or .yaml file")]
NamesOption = Annotated[
    str | None,
    typer.Option(
        metavar="NAMES",
        help="recipes to run, with commas between them; all shipped by default; ulb-fast:1.6 is --bits 1.6 with it",
    ),
]
SeedsOption = Annotated[
    str, typer.Option(metavar="NUMBERS", help="seeds of the calibration windows, with commas between them")
]
CalibsOption = Annotated[
    list[str],
    typer.Option(
        metavar="SOURCE",
        help="calibration text instead of the recipe's own, repeatable; texts after the first are run with the first "
        "seed only, for the robustness track",
    ),
]
TasksOption = Annotated[
    str | None,
    typer.Option(metavar="NAMES", help="lm-eval tasks for the original and each recipe's first seed"),
]
TasksDtypeOption = Annotated[
    str,
    typer.Option(
        metavar="DTYPE",
        help="precision of models that are asked tasks: float32, bfloat16, float16; auto is float32 on a CPU, else the "
        "checkpoint's",
    ),
]
TracksOption = Annotated[
    bool, typer.Option("--tracks/--no-tracks", help="measure robustness and speed too, and print the tracks")
]
ShapesOption = Annotated[
    list[str] | None, typer.Option("--shape", metavar="OUTxIN", help="shape of a weight, repeatable")
]
TokensOption = Annotated[list[int] | None, typer.Option(min=1, help="number of input tokens, repeatable")]
FormatsOption = Annotated[
    list[str] | None, typer.Option("--format", metavar="NAME", help="format to time on a GPU, such as '1 plane g128'")
]


def bench_pipeline(
    layers: Annotated[list[int], typer.Option(min=1, help="depth of a random model, repeatable")] = [4, 22],  # noqa: B006
    samples: Annotated[int, typer.Option(min=1, help="number of calibration windows")] = 16,
    length: Annotated[int, typer.Option(min=2, help="tokens in a window")] = 512,
    recipe: RecipeOption = "gptq-2bit",
    ranks: Annotated[
        list[int],
        typer.Option(
            min=1, help="number of processes that share a compression, repeatable: 1 and 2 say what the second brings"
        ),
    ] = [1],  # noqa: B006
    out_folder: Annotated[
        Path | None, typer.Option("--out", callback=possible, help="folder to work in; a temporary one by default")
    ] = None,
    json_file: JsonOption = None,
) -> None:
    """Measure time and memory of compressing random models of some depths, beside the work that cannot be avoided.

    [bold]ultralowbit bench pipeline --layers 2 --layers 4 --samples 4[/]

    [bold]ultralowbit bench pipeline --layers 2 --ranks 1 --ranks 2[/]
    """
    from ultralowbit.bench.pipeline import pipeline_bench

    pipeline_bench(layers, samples, length, recipe, ranks, out_folder, json_file, say=say)


def bench_scale(
    model: Annotated[
        Path | None,
        typer.Argument(metavar="[MODEL]", help="folder with a config.json; by default Llama 70B's and DeepSeek-V3's"),
    ] = None,
    recipe: RecipeOption = "gptq-2bit",
    ranks: Annotated[list[int], typer.Option(min=1, help="number of processes, a card each, repeatable")] = [1, 8, 64],  # noqa: B006
    bf16: Annotated[float | None, typer.Option(help="10^12 flops a second of products in bf16")] = None,
    fp32: Annotated[float | None, typer.Option(help="10^12 flops a second of products in fp32")] = None,
    factors: Annotated[
        float | None, typer.Option(help="10^12 times m^3 a second, of the factors of m x m Hessians")
    ] = None,
    column: Annotated[float | None, typer.Option(help="microseconds for each column in the loops of methods")] = None,
    link: Annotated[float | None, typer.Option(help="GB that a process receives in a second")] = None,
    json_file: JsonOption = None,
) -> None:
    """Work out what compressing a large model would cost with many cards, from their rates; nothing heavy runs.

    Rates that are not given are those of an H200 as far as they were measured, and assumed ones; they are printed.

    [bold]ultralowbit bench scale --ranks 8 --ranks 64[/]

    [bold]ultralowbit bench scale ./model --recipe ulb-fast --ranks 4 --fp32 50[/]
    """
    from ultralowbit.bench.scale import Card, scale_bench

    card = Card(**given(bf16=bf16, fp32=fp32, factors=factors, column=column, link=link))
    scale_bench(model, recipe, ranks, card, json_file, say=say)


def bench_quantize(
    recipes: Annotated[
        list[str] | None,
        typer.Option("--recipe", help="recipe to time, repeatable; the first is what the others are compared with"),
    ] = None,
    hidden: HiddenOption = 2048,
    json_file: JsonOption = None,
) -> None:
    """Time how long the methods of recipes take to pack one block, as multiples of the first.

    [bold]ultralowbit bench quantize --recipe gptq-2bit --recipe sign-2 --hidden 512[/]
    """
    from ultralowbit.bench.models import Shape
    from ultralowbit.bench.quantize import QUANTIZED, quantize_bench

    quantize_bench(recipes or QUANTIZED, Shape.wide(hidden), json_file=json_file, say=say)


def bench_training(
    length: Annotated[int, typer.Option(min=2, help="tokens in a window")] = 512,
    batch: Annotated[int, typer.Option(min=1, help="windows in a step")] = 2,
    repeat: Annotated[int, typer.Option(min=1, help="steps to time of each kind")] = 5,
    hidden: HiddenOption = 2048,
    device: DeviceOption = "cpu",
    json_file: JsonOption = None,
) -> None:
    """Time a step of block-wise training, as a multiple of the block's own forward and backward pass.

    [bold]ultralowbit bench training --hidden 512 --length 2048 --batch 1[/]
    """
    from ultralowbit.bench.models import Shape
    from ultralowbit.bench.training import training_bench

    training_bench(length, batch, repeat, Shape.wide(hidden), device, json_file, say=say)


def bench_eval(
    model: Annotated[
        str | None, typer.Argument(metavar="MODEL", help="packed or original model; a random one by default")
    ] = None,
    layers: Annotated[int, typer.Option(min=1, help="depth of the random model, in TinyLlama-1.1B's shape")] = 4,
    context: Annotated[int, typer.Option(min=2, help="tokens in a window")] = 2048,
    tokens: Annotated[int, typer.Option(min=2, help="tokens to measure on")] = 8192,
    repeat: Annotated[int, typer.Option(min=1, help="times to run each batch; the fastest counts")] = 3,
    device: DeviceOption = "auto",
    json_file: JsonOption = None,
) -> None:
    """Time perplexity and divergence, as multiples of the forward passes that they need.

    [bold]ultralowbit bench eval model-sign-2[/]
    """
    from ultralowbit.bench.eval import eval_bench

    folder = download(model, quiet=False) if model else None
    eval_bench(folder, layers, context, tokens, repeat, device, json_file, say=say)


def bench_methods(
    ctx: typer.Context,
    models: OriginalsArgument,
    recipes: NamesOption = None,
    seeds: SeedsOption = "0,1,2",
    calib: CalibsOption = [],  # noqa: B006
    texts: EvalOption = ["auto"],  # noqa: B006
    context: ContextOption = None,
    max_tokens: MaxTokensOption = None,
    tasks: TasksOption = None,
    tasks_dir: TasksDirOption = None,
    limit: LimitOption = None,
    tasks_dtype: TasksDtypeOption = "auto",
    samples: SamplesOption = None,
    length: LengthOption = None,
    small: SmallOption = False,
    settings: SettingsOption = [],  # noqa: B006
    out_folder: Annotated[Path, typer.Option("--out", callback=possible, help="folder to write")] = Path(
        "bench-methods"
    ),
    tracks: TracksOption = True,
    device: DeviceOption = "auto",
    restart: RestartOption = False,
    trust_remote_code: TrustOption = False,
    quiet: QuietOption = False,
) -> None:
    """Run recipes on models and seeds, and compare them in one table: mean ± standard deviation beside the original.

    If it is killed, the same command goes on where it stopped. A run that fails is noted, and the others go on. Tracks
    say what is left of a model, as ratios to the original: language, tasks (those of --tasks, or what `eval --tasks
    --json` left in a run's folder), robustness to corrupted text, cost, size and speed.

    [bold]ultralowbit bench methods model --recipes sign-2,gptq-2bit --calib wikitext2 --eval wikitext2 --out bench[/]

    [bold]ultralowbit bench methods model --recipes ulb-fast:1.6,ulb-fast:2.05,pb-llm --seeds 0[/]
    """
    from ultralowbit.eval.evaluate import Wanted
    from ultralowbit.recipe import shipped
    from ultralowbit.report.run import Texts
    from ultralowbit.report.sweep import Methods, run_sweep

    windows = [f"calibration.{key}={value}" for key, value in given(samples=samples, length=length).items()]
    wanted = Methods(
        models=tuple(models), recipes=tuple(listed(recipes)) if recipes else tuple(shipped()),
        seeds=tuple(numbers("--seeds", seeds)), settings=(*settings, *windows), small=small, calibrations=tuple(calib),
        texts=Texts(eval_sources(texts), context, max_tokens), with_tracks=tracks,
        tasks=Wanted(
            tasks=tuple(listed(tasks)), tasks_dir=tasks_dir, limit=limit,
            dtype=torch_dtype(tasks_dtype, "--tasks-dtype"),
        ) if tasks else None,
    )  # fmt: skip
    for model in models:
        download(model, quiet)
    with Watch(quiet) as watch:
        comparison = run_sweep(
            wanted, out_folder, device=device, restart=restart, trust_remote_code=trust_remote_code, watch=watch,
            command=command_line(ctx.obj),
        )  # fmt: skip
    _show_sweep(comparison, out_folder)


def _show_sweep(comparison: Comparison, folder: Path) -> None:
    """The tables of a sweep; leaves with an exit code where a run failed or fell back."""
    show_comparison(comparison)
    for tracks in (comparison.tracks or {"models": []})["models"]:
        table = new_table(f"{tracks['model']}: what is left", *tracks["rows"][0]["tracks"], left=1)
        for row in tracks["rows"]:
            means = (f"{t['geometric']:.3f}" if t["ratios"] else "-" for t in row["tracks"].values())
            table.add_row(cell(row["label"]), *means)
        out.print(table)
        say("geometric means of ratios to the original, which are in report.json", "dim")
    for failure in comparison.failed:
        shout("FAILED", f"{failure.model}, {failure.label}: {failure.error}")
    say(f"{folder / 'report.html'}  report.md, report.json, plots, runs")
    if comparison.failed:
        raise typer.Exit(FAILED)
    if any(run.fallbacks for section in comparison.sections for row in section.rows for run in row.runs):
        raise typer.Exit(FELL_BACK)


def bench_kernels(
    shapes: ShapesOption = None,
    tokens: TokensOption = None,
    formats: FormatsOption = None,
    device: DeviceOption = "auto",
    rounds: Annotated[int, typer.Option(min=1, help="times to run each product")] = 30,
    threads: Annotated[int, typer.Option(min=1, help="threads to use on a CPU")] = 1,
    decode: Annotated[bool, typer.Option(help="also decode with a Llama of 7B's shape, on a GPU")] = True,
    tune: Annotated[bool, typer.Option("--tune", help="find the best tiles for this GPU instead")] = False,
    seconds: Annotated[float | None, typer.Option(min=1, help="time for --tune; until all is tried by default")] = None,
    csv_file: CsvOption = None,
) -> None:
    """Time products with packed weights beside torch's own.

    A GPU runs them in CUDA graphs, beside cuBLAS and a copy of as many bytes, and then decodes with a model. A CPU runs
    them beside bf16, fp32 and 4-bit integers.

    [bold]ultralowbit bench kernels --shape 4096x4096 --tokens 1[/]

    [bold]ultralowbit bench kernels --device cuda --csv kernels/bench.csv[/]

    [bold]ultralowbit bench kernels --tune --seconds 60[/]  stopped or interrupted, it prints the best so far
    """
    from ultralowbit.bench import kernels_cpu, kernels_gpu
    from ultralowbit.bench.models import FORMATS
    from ultralowbit.bench.tuning import tune_bench
    from ultralowbit.system import pick_device

    pairs = [_shape(text) for text in shapes or ()]
    where = kernels_gpu.need_gpu(device) if device.startswith("cuda") else pick_device(device)
    if seconds is not None and not tune:
        raise InputError("--seconds is the time of --tune: give both, or neither")
    if where.type == "cuda" and tune:
        tune_bench(
            where, seconds or math.inf, keep=lambda entry: say(f"\nthe entry for kernels/gpu/tuning.json:\n{entry}"),
            say=say,
        )  # fmt: skip
    elif where.type == "cuda":
        kernels_gpu.gpu_bench(
            where, pairs or kernels_gpu.SHAPES, tokens or kernels_gpu.TOKENS, formats or FORMATS, rounds, csv_file,
            decode, say,
        )  # fmt: skip
    elif tune or formats:
        raise InputError(f"{'--tune' if tune else '--format'} is for a GPU, and --device is {where}: leave it out")
    else:
        kernels_cpu.kernel_bench(
            shapes or kernels_cpu.SHAPES, tokens or kernels_cpu.TOKENS, rounds, threads, csv_file, say
        )


def _shape(text: str) -> tuple[int, int]:
    parts = text.split("x")
    if len(parts) != 2 or not all(part.isdecimal() for part in parts) or int(parts[1]) % 128 or not int(parts[0]):
        raise InputError(f"--shape is {text!r}, expected OUTxIN with IN a multiple of 128, as in 4096x4096")
    return int(parts[0]), int(parts[1])


def bench_decode(
    layers: Annotated[int, typer.Option(min=1, help="depth of random models in TinyLlama-1.1B's shape")] = 22,
    tokens: Annotated[int, typer.Option(min=1, help="tokens that each model writes in a turn")] = 8,
    rounds: Annotated[int, typer.Option(min=1, help="turns of each model; the fastest counts")] = 4,
    threads: Annotated[int, typer.Option(min=1, help="threads to use")] = 1,
    json_file: JsonOption = None,
) -> None:
    """Measure tokens a second and peak memory of random packed models on this CPU, beside the same model in bf16.

    [bold]ultralowbit bench decode --layers 4[/]
    """
    from ultralowbit.bench.decode import decode_bench

    decode_bench(layers, tokens, rounds, threads, json_file=json_file, say=say)


def bench_gpu(
    out_folder: Annotated[Path, typer.Option("--out", callback=possible, help="folder to write")] = Path("bench-gpu"),
    parts: Annotated[
        list[str], typer.Option("--part", metavar="NAME", help="part to run, repeatable; all but best by default")
    ] = [],  # noqa: B006
    minutes: Annotated[
        float | None,
        typer.Option(min=0.5, help="time for all parts together, 8 by default; with best what the parts may take"),
    ] = None,
    model: Annotated[
        str | None, typer.Option(metavar="MODEL", help="folder of the model to compress; a random one by default")
    ] = None,
    calib: CalibOption = None,
    text: Annotated[
        str | None, typer.Option("--eval", metavar="SOURCE", help="text to measure that model on; that of --calib")
    ] = None,
    device: DeviceOption = "auto",
) -> None:
    """Measure all there is to know of a GPU, in a few minutes: kernels, decoding, compressing, tests, profiles, tiles.

    Each part has a process and a limit of its own, and none stops the others. What was measured, and which targets it
    meets, stands in summary.md and summary.json of the folder; further runs with --part add to them. The part best, the
    recipe ulb-best at five numbers of bits on a model of yours, runs where it is named, and goes on where it was
    stopped. On a CPU all of it runs at sizes for tests.

    [bold]ultralowbit bench gpu --out h200[/]

    [bold]ultralowbit bench gpu --part best --model ./smollm2 --calib train.txt --eval wiki.test.raw --out h200[/]
    """
    from ultralowbit.bench.gpu import Task, device_bench

    task = Task(device, model and str(download(model, quiet=False)), calib, text)
    summary = device_bench(out_folder, task, parts, minutes and 60 * minutes, say=say)
    say(f"{out_folder / 'summary.md'}  summary.json, a log for each part")
    names = parts or summary["parts"]
    if any(summary["parts"][name]["status"] != "done" for name in names):
        raise typer.Exit(FAILED)


def bench_vllm(
    layers: Annotated[int, typer.Option(min=1, help="depth of random models in TinyLlama-1.1B's shape")] = 22,
    tokens: Annotated[int, typer.Option(min=1, help="tokens that each model writes in a turn")] = 16,
    rounds: Annotated[int, typer.Option(min=1, help="processes that run each model; the fastest counts")] = 2,
) -> None:
    """Measure tokens a second of random packed models in vLLM on this CPU, beside the same model in bf16.

    [bold]ultralowbit bench vllm --layers 4[/]
    """
    from ultralowbit.bench.vllm import vllm_bench

    vllm_bench(layers, tokens, rounds, say=say)
