"""The cost of measuring, beside the forward passes that it needs."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ultralowbit.bench.models import Shape, write_model
from ultralowbit.bench.timing import now
from ultralowbit.eval.metric import METRICS
from ultralowbit.eval.perplexity import perplexity
from ultralowbit.eval.runner import open_model, pick_dtype
from ultralowbit.eval.windows import batch_windows, measure
from ultralowbit.system import pick_device


def eval_bench(
    model: Path | str | None = None,
    layers: int = 4,
    context: int = 2048,
    tokens: int = 8192,
    repeat: int = 3,
    device: str = "auto",
    json_file: Path | str | None = None,
    shape: Shape | None = None,
    say: Callable[[str], object] = print,
) -> dict[str, Any]:
    """Time perplexity, and divergence between two models, beside bare forward passes over the same batches.

    `model` is a checkpoint folder, packed or not; without one, a random Llama. Tokens are random; each batch is run
    `repeat` times in turns, and the fastest of each counts. Returns, and writes to `json_file`, what `say` is told.
    """
    where, shape = pick_device(device), shape or Shape()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(model) if model else write_model(Path(folder) / "model", layers, shape)
        net = open_model(path, where, pick_dtype(path, where))
    config = net.config.get_text_config()
    context = min(context, config.max_position_embeddings or context)
    count = max(context, tokens // context * context)
    windows = torch.randint(config.vocab_size, (count,), generator=torch.Generator().manual_seed(0)).view(-1, context)

    seconds = _raced(net, windows, where, repeat)
    result: dict[str, Any] = {
        "model": str(model or f"random Llama of {layers} layers, {shape}"), "tokens": count, "context": context,
        "dtype": str(net.dtype).removeprefix("torch."), "device": str(where), "threads": torch.get_num_threads(),
        "torch": torch.__version__, "seconds": seconds, "perplexity_ratio": seconds["perplexity"] / seconds["forward"],
        "divergence_ratio": seconds["divergence"] / seconds["two forwards"],
    }  # fmt: skip
    say(f"{result['model']}: {count} tokens in windows of {context}, {result['dtype']} on {where}")
    say(f"forward passes {seconds['forward']:.2f} s; perplexity takes {result['perplexity_ratio']:.3f} times that")
    say(
        f"forward passes of two models {seconds['two forwards']:.2f} s; their perplexities and divergence take "
        f"{result['divergence_ratio']:.3f} times that"
    )
    if json_file is not None:
        Path(json_file).write_text(json.dumps(result, indent=1) + "\n")
    return result


def _raced(net: nn.Module, windows: Tensor, where: torch.device, repeat: int) -> dict[str, float]:
    """Seconds of bare forward passes and of measuring on windows [windows, context], the fastest of `repeat` turns."""
    context = windows.shape[1]

    def timed(f: Callable[[], object]) -> float:
        started = now(where)
        f()
        return now(where) - started

    def bare(batch: Tensor, passes: int) -> None:
        with torch.no_grad():
            for _ in range(passes):
                net(batch, use_cache=False)

    seconds = dict.fromkeys(("forward", "perplexity", "two forwards", "divergence"), 0.0)
    for batch in windows.split(batch_windows([net], windows)):
        there, stream = batch.to(where), batch.flatten()
        runs = {
            "forward": partial(bare, there, 1),
            "perplexity": partial(perplexity, net, stream, context=context),
            "two forwards": partial(bare, there, 2),
            "divergence": partial(measure, [net], stream, METRICS, context=context, original=net),
        }
        rounds = [{what: timed(run) for what, run in runs.items()} for _ in range(repeat)]
        for what in seconds:
            seconds[what] += min(times[what] for times in rounds)
    return seconds
