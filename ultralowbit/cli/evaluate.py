"""`ultralowbit eval`, `compare` and `generate`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from ultralowbit.cli.console import Watch, say, visible
from ultralowbit.cli.options import (
    ContextOption,
    DeviceOption,
    JsonOption,
    LimitOption,
    MaxTokensOption,
    ModelArgument,
    QuietOption,
    TasksDirOption,
    TrustOption,
    command_line,
    download,
    listed,
    positive_number,
    possible,
    torch_dtype,
)
from ultralowbit.cli.render import show_comparison, show_evaluation

ModelsArgument = Annotated[
    list[str], typer.Argument(metavar="MODEL", help="packed or original model: a folder or a hub name, repeatable")
]
PplOption = Annotated[
    list[str],
    typer.Option(
        "--ppl",
        metavar="SOURCE",
        help="text to measure token perplexity on, repeatable: a text file, wikitext2, c4, ptb, org/name, python-docs",
    ),
]
FidelityOption = Annotated[
    str | None, typer.Option(metavar="ORIGINAL", help="compare predictions with this model's, on the texts of --ppl")
]
TasksOption = Annotated[
    list[str],
    typer.Option(
        metavar="NAMES",
        help="ask lm-eval's tasks, groups or patterns, with commas between them: piqa,arc_easy,hellaswag; wikitext is "
        "its word perplexity",
    ),
]
FewshotOption = Annotated[
    int | None, typer.Option(min=0, help="examples before each document; by default as many as the task says")
]
BatchOption = Annotated[
    str, typer.Option(metavar="N", help="requests of tasks to run at a time; auto chooses by their length in tokens")
]
ExamplesSeedOption = Annotated[int, typer.Option(min=0, help="seed of the few-shot examples")]
SamplesFlag = Annotated[
    bool, typer.Option("--log-samples", help="keep each prompt and answer of the tasks in the --json file")
]
DtypeOption = Annotated[
    str,
    typer.Option(
        help="precision to run in: float32, bfloat16, float16; auto is float32 on a CPU, else the checkpoint's"
    ),
]
BosOption = Annotated[
    str, typer.Option(help="start token of a window: text, the one with which the tokenizer begins a text; none")
]
RunsArgument = Annotated[
    list[Path],
    typer.Argument(
        metavar="RUN",
        help="folder that `compress` wrote, a folder of such folders, or an original that was measured; repeatable",
    ),
]
ReferenceOption = Annotated[
    list[Path],
    typer.Option(
        "--reference",
        metavar="DIR",
        help="run or original of another model to draw beside them, such as a smaller one at more bits; repeatable",
    ),
]

ToldOption = Annotated[
    list[Path],
    typer.Option(
        "--told",
        metavar="FILE",
        help="YAML file of results of other programs, or of runs whose folders are gone, on the same model and "
        "windows, to draw beside them; repeatable",
    ),
]


def evaluate(
    ctx: typer.Context,
    models: ModelsArgument,
    sources: PplOption = [],  # noqa: B006 (typer reads it, nobody writes it)
    fidelity: FidelityOption = None,
    tasks: TasksOption = [],  # noqa: B006
    tasks_dir: TasksDirOption = None,
    limit: LimitOption = None,
    num_fewshot: FewshotOption = None,
    batch_size: BatchOption = "auto",
    seed: ExamplesSeedOption = 0,
    log_samples: SamplesFlag = False,
    context: ContextOption = None,
    max_tokens: MaxTokensOption = None,
    dtype: DtypeOption = "auto",
    bos: BosOption = "text",
    device: DeviceOption = "auto",
    trust_remote_code: TrustOption = False,
    json_file: JsonOption = None,
    quiet: QuietOption = False,
) -> None:
    """Measure packed and original models on the same texts and tasks.

    --ppl: token perplexity as in published tables, one stream in windows that do not overlap.

    --fidelity: how far predictions are from the original's, beside what rounding does to those.

    --tasks: lm-eval's questions, with chance levels (pip install 'ultralowbit\\[eval]').

    [bold]ultralowbit eval model-sign-2 --ppl wikitext2 --ppl c4 --fidelity model[/]

    [bold]ultralowbit eval model model-sign-2 --tasks piqa,arc_easy,hellaswag --limit 200[/]
    """
    from ultralowbit.eval.evaluate import Wanted, evaluate_models
    from ultralowbit.eval.schema import to_json

    wanted = Wanted(
        sources=tuple(sources), fidelity=fidelity, tasks=tuple(name for names in tasks for name in listed(names)),
        tasks_dir=tasks_dir, context=context, max_tokens=max_tokens, bos=bos, dtype=torch_dtype(dtype), limit=limit,
        num_fewshot=num_fewshot, seed=seed, log_samples=log_samples,
        batch_size=None if batch_size == "auto" else positive_number("--batch-size", batch_size),
    )  # fmt: skip
    with Watch(quiet) as watch:
        report = evaluate_models(
            models, wanted, device=device, trust_remote_code=trust_remote_code, watch=watch,
            fetch=lambda model: download(model, quiet), command=command_line(ctx.obj),
        )  # fmt: skip
    if json_file:
        json_file.write_text(json.dumps(to_json(report), indent=1) + "\n", encoding="utf-8")
    show_evaluation(report)


def compare(
    ctx: typer.Context,
    runs: RunsArgument,
    out_folder: Annotated[Path, typer.Option("--out", callback=possible, help="folder to write")] = Path("comparison"),
    references: ReferenceOption = [],  # noqa: B006
    told: ToldOption = [],  # noqa: B006
) -> None:
    """Compare finished runs on one page that opens from disk, with tables and plots of quality against size.

    Runs of different models, and perplexities on different windows, stand apart: those numbers do not compare. Runs
    that differ only in their seed are one row, mean ± standard deviation.

    [bold]ultralowbit compare model-sign-2 model-gptq-2bit model-gptq-3bit --out comparison[/]

    [bold]ultralowbit compare big-sign-1 big-sign-2 --reference small-gptq-4bit[/]

    [bold]ultralowbit compare big-sign-1 big-sign-2 --told others.yaml[/], of rows such as

    {source: llama.cpp b4500, rows: \\[{name: IQ2_XXS, bits: 2.06, values: {"perplexity on x.txt": 75}}]}
    """
    from ultralowbit.report.comparison import write_comparison

    show_comparison(write_comparison(runs, out_folder, references, told=told, command=command_line(ctx.obj)))
    say(f"{out_folder / 'report.html'}  report.md, report.json, plots")


def generate(
    model: ModelArgument,
    prompt: Annotated[str, typer.Argument(help="text to continue")],
    max_new_tokens: Annotated[int, typer.Option(min=1, help="tokens to write at most")] = 128,
    temperature: Annotated[float, typer.Option(min=0, help="randomness; 0 takes the likeliest token every time")] = 0.0,
    seed: Annotated[int, typer.Option(help="seed of the sampling")] = 0,
    int8: Annotated[
        bool, typer.Option("--int8", help="round the inputs of packed Linears to 8 bits, which is faster on a CPU")
    ] = False,
    device: DeviceOption = "auto",
    trust_remote_code: TrustOption = False,
) -> None:
    """Continue a prompt with a packed or original model, word by word.

    [bold]ultralowbit generate model-sign-2 "The import statement" --temperature 0.7[/]
    """
    from ultralowbit.eval.generation import generate as continue_prompt
    from ultralowbit.eval.runner import open_model, pick_dtype
    from ultralowbit.hub import open_tokenizer
    from ultralowbit.system import pick_device

    where = pick_device(device)
    folder = download(model, quiet=False)
    tokenizer = open_tokenizer(folder, trust_remote_code)
    net = open_model(folder, where, pick_dtype(folder, where), trust_remote_code, int8, fuse=True)
    shown = visible if sys.stdout.isatty() else str  # a model may write what drives a terminal
    continue_prompt(
        net, tokenizer, prompt, max_new_tokens=max_new_tokens, temperature=temperature, seed=seed,
        on_text=lambda piece: print(shown(piece), end="", flush=True),
    )  # fmt: skip
    print()
