"""`ultralowbit eval`: perplexity, fidelity and tasks of several models, on the same texts and documents."""

from __future__ import annotations

import logging
import platform
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from ultralowbit.errors import InputError
from ultralowbit.eval import zeroshot
from ultralowbit.eval.perplexity import Bos
from ultralowbit.eval.runner import (
    check_comparable,
    measure_divergence,
    measure_perplexity,
    open_model,
    pick_dtype,
    read_texts,
)
from ultralowbit.hub import open_tokenizer, resolve_model
from ultralowbit.progress import Progress
from ultralowbit.report.schema import strict
from ultralowbit.system import pick_device, release

SCHEMA_VERSION = 1

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Wanted:
    """What to measure: perplexity on `sources`, fidelity to a model there, accuracy on `tasks`."""

    sources: tuple[str, ...] = ()
    fidelity: str | None = None
    tasks: tuple[str, ...] = ()
    tasks_dir: Path | None = None
    context: int | None = None
    max_tokens: int | None = None
    bos: Bos = "text"
    dtype: torch.dtype | None = None
    limit: int | None = None
    num_fewshot: int | None = None
    batch_size: int | None = None
    seed: int = 0
    log_samples: bool = False


def evaluate_models(
    models: Sequence[str],
    wanted: Wanted,
    *,
    device: str = "auto",
    trust_remote_code: bool = False,
    watch: Progress,
    fetch: Callable[[str], Path] = resolve_model,
    command: str | None = None,
    questions: zeroshot.Tasks | None = None,
) -> dict[str, Any]:
    """Measure each model, a folder or hub name; `fetch` gives its folder. `questions` are the tasks, if they have been
    read before. Returns what --json holds.

    Texts, tokenizers and tasks are read before any model. Raises `InputError` for what cannot be read or compared.
    """
    if not wanted.sources and not wanted.tasks:
        raise InputError("nothing to measure: name a text with --ppl, or tasks with --tasks")
    if wanted.fidelity and not wanted.sources:
        raise InputError("--fidelity compares predictions on a text: name one with --ppl")
    where = pick_device(device)
    if wanted.tasks:
        zeroshot.require()
    base = wanted.fidelity
    folders = {model: fetch(model) for model in dict.fromkeys([*([base] if base else []), *models])}
    texts = {
        model: read_texts(
            folder, wanted.sources, context=wanted.context, max_tokens=wanted.max_tokens, bos=wanted.bos,
            trust_remote_code=trust_remote_code,
        )
        for model, folder in folders.items()
        if wanted.sources
    }  # fmt: skip
    rows: dict[str, dict[str, Any]] = {
        model: {"model": model, "perplexity": [], "fidelity": [], "noise_floor": [], "tasks": None} for model in folders
    }

    def stage(model: str) -> Callable[[str], Callable[[int, int], None]]:
        return lambda what: watch.counter(f"{model}: {what}")

    if wanted.tasks:
        tokenizers = {model: open_tokenizer(folders[model], trust_remote_code) for model in models}
        questions = questions or zeroshot.read_tasks(wanted.tasks, wanted.tasks_dir, watch.counter)
    options: dict[str, Any] = {"trust_remote_code": trust_remote_code}
    if base:
        others = [model for model in folders if model != base]
        for model in others:
            check_comparable(base, texts[base], model, texts[model])
        found = measure_divergence(
            folders[base], [folders[model] for model in others], texts[base], where, dtype=wanted.dtype, floor=True,
            progress=watch.counter, **options,
        )  # fmt: skip
        rows[base] |= {"perplexity": found.base, "noise_floor": found.floor}
        for model, (perplexity, fidelity) in zip(others, found.models, strict=True):
            rows[model] |= {"perplexity": perplexity, "fidelity": fidelity}
    elif wanted.sources:
        for model, folder in folders.items():
            rows[model]["perplexity"] = measure_perplexity(
                folder, texts[model], where, dtype=wanted.dtype, progress=stage(model), **options
            )
    for model in dict.fromkeys(models if questions else ()):
        net = open_model(folders[model], where, wanted.dtype or pick_dtype(folders[model], where), trust_remote_code)
        answers = zeroshot.evaluate(
            net, tokenizers[model], questions, limit=wanted.limit, num_fewshot=wanted.num_fewshot,
            batch_size=wanted.batch_size, seed=wanted.seed, log_samples=wanted.log_samples, progress=stage(model),
        )  # fmt: skip
        if answers.truncated:
            log.warning(
                "%s: %d of %d requests of the tasks are longer than its context and lost their beginning",
                model, answers.truncated, answers.requests,
            )  # fmt: skip
        rows[model]["tasks"] = answers
        del net
        release(where)
    packages = ("ultralowbit", "torch", "transformers")
    return {
        "schema_version": SCHEMA_VERSION, "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": command,
        "environment": {
            **{name: version(name) for name in packages}, "python": platform.python_version(), "device": str(where),
        },
        "fidelity_to": base, "results": list(rows.values()),
    }  # fmt: skip


def to_json(report: dict[str, Any]) -> dict[str, Any]:
    """The report in strict JSON values."""

    def plain(value: Any) -> Any:
        if isinstance(value, list):
            return [plain(each) for each in value]
        return value.to_dict() if hasattr(value, "to_dict") else value

    rows = [{key: plain(value) for key, value in row.items()} for row in report["results"]]
    return strict({**report, "results": rows})
