"""`ultralowbit eval`: metrics and tasks of several models, on the same texts and documents."""

from __future__ import annotations

import logging
import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path

import torch

from ultralowbit.checkpoint.files import hash_model
from ultralowbit.checkpoint.storage import json_digest
from ultralowbit.errors import InputError
from ultralowbit.eval import zeroshot
from ultralowbit.eval.base import Bos
from ultralowbit.eval.runner import (
    EvalText,
    check_comparable,
    measure_alone,
    measure_beside,
    open_model,
    pick_dtype,
    read_texts,
)
from ultralowbit.eval.schema import Evaluation, ModelResults
from ultralowbit.hub import open_tokenizer, resolve_model
from ultralowbit.progress import OnProgress, Progress
from ultralowbit.system import pick_device, release

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Wanted:
    """What to measure: every metric on the texts `sources`, and accuracy on `tasks`."""

    sources: tuple[str, ...] = ()
    fidelity: str | None = None
    """The original to compare with; without one the metrics that need one are left out."""
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
) -> Evaluation:
    """Measure each model, a folder or hub name; `fetch` gives its folder.

    `questions` are the tasks, where they have been read before. Texts, tokenizers and tasks are read before any model.
    Raises `InputError` for what cannot be read or compared.
    """
    if not wanted.sources and not wanted.tasks:
        raise InputError("nothing to measure: name a text with --ppl, or tasks with --tasks")
    if wanted.fidelity and not wanted.sources:
        raise InputError("--fidelity compares predictions on a text: name one with --ppl")
    where, original = pick_device(device), wanted.fidelity
    if wanted.tasks:
        zeroshot.require()
    folders = {model: fetch(model) for model in dict.fromkeys([*([original] if original else []), *models])}
    texts = {
        model: read_texts(
            folder, wanted.sources, context=wanted.context, max_tokens=wanted.max_tokens, bos=wanted.bos,
            trust_remote_code=trust_remote_code, progress=watch,
        )
        for model, folder in folders.items()
        if wanted.sources
    }  # fmt: skip
    if wanted.tasks and questions is None:
        questions = zeroshot.read_tasks(wanted.tasks, wanted.tasks_dir, watch.counter)
    for model in models if questions else ():
        open_tokenizer(folders[model], trust_remote_code)
    digests = {model: json_digest(hash_model(folder, watch)) for model, folder in folders.items()}
    results = {model: ModelResults(model=model, sha256=digest) for model, digest in digests.items()}
    if texts:
        _measure_texts(results, folders, texts, wanted, where, trust_remote_code, watch)
    for model in dict.fromkeys(models if questions else ()):
        results[model].tasks = _ask(model, folders[model], questions, wanted, where, trust_remote_code, watch)
    packages = ("ultralowbit", "torch", "transformers")
    versions = {name: version(name) for name in packages}
    return Evaluation(
        created=datetime.now(timezone.utc).isoformat(timespec="seconds"), command=command, fidelity_to=original,
        environment={**versions, "python": platform.python_version(), "device": str(where)},
        results=list(results.values()),
    )  # fmt: skip


def _measure_texts(
    results: dict[str, ModelResults],
    folders: Mapping[str, Path],
    texts: Mapping[str, Sequence[EvalText]],
    wanted: Wanted,
    device: torch.device,
    trust_remote_code: bool,
    watch: Progress,
) -> None:
    """Fill in the metrics of every model; side by side with the original if there is one."""
    original = wanted.fidelity
    if original is None:
        for model, folder in folders.items():
            results[model].metrics = measure_alone(
                folder, texts[model], device, dtype=wanted.dtype, trust_remote_code=trust_remote_code, progress=watch,
                label=model,
            )  # fmt: skip
        return
    others = [model for model in folders if model != original]
    for model in others:
        check_comparable(original, texts[original], model, texts[model])
    compared = measure_beside(
        folders[original], [folders[model] for model in others], texts[original], device, dtype=wanted.dtype,
        floor=True, trust_remote_code=trust_remote_code, progress=watch,
    )  # fmt: skip
    results[original].metrics, results[original].noise_floor = compared.original, compared.floor
    for model, measured in zip(others, compared.models, strict=True):
        results[model].metrics = measured


def _ask(
    model: str,
    folder: Path,
    questions: zeroshot.Tasks,
    wanted: Wanted,
    device: torch.device,
    trust_remote_code: bool,
    watch: Progress,
) -> zeroshot.ZeroShot:
    """Ask one model the tasks."""

    def stage(what: str) -> OnProgress:
        return watch.counter(f"{model}: {what}")

    net = open_model(folder, device, wanted.dtype or pick_dtype(folder, device), trust_remote_code)
    answers = zeroshot.evaluate(
        net, open_tokenizer(folder, trust_remote_code), questions, limit=wanted.limit, num_fewshot=wanted.num_fewshot,
        batch_size=wanted.batch_size, seed=wanted.seed, log_samples=wanted.log_samples, progress=stage,
    )  # fmt: skip
    if answers.truncated:
        log.warning(
            "%s: %d of %d requests of the tasks are longer than its context and lost their beginning",
            model, answers.truncated, answers.requests,
        )  # fmt: skip
    del net
    release(device)
    return answers
