"""Accuracy on tasks of lm-eval (https://github.com/EleutherAI/lm-evaluation-harness), asked of a model in memory.

Prompts, scores and standard errors are lm-eval's own, from `simple_evaluate`, and its full results are kept. This
module adds what a reader of the table needs: the level of chance, counted from the choices of the documents that were
asked, and averages that say which metric of which task they are over. lm-eval is optional, and imported when it is
first needed.
"""

from __future__ import annotations

import difflib
import fnmatch
import io
import json
import logging
import math
import os
import random
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, redirect_stdout
from copy import deepcopy
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import torch
from torch import nn

from ultralowbit.errors import InputError, reason
from ultralowbit.eval.scores import ACCURACIES, Average, Score, averages
from ultralowbit.progress import OnProgress

Stages = Callable[[str], OnProgress]
"""stages(what) begins a stage and gives the callback that is told (done, total)."""

BOOTSTRAP = 1000
"""Resamples for the standard error of the metrics that lm-eval has no formula for, such as LAMBADA's perplexity."""

_BATCH_TOKENS = {"cpu": 2048}
_BATCH_TOKENS_ELSEWHERE = 16_384
_BATCH_LOGITS = 1 << 29  # lm-eval holds a batch's logits whole, twice: 2 GB each in fp32


@dataclass(frozen=True)
class ZeroShot:
    """What a model scored, with lm-eval's own results."""

    scores: list[Score]
    averages: list[Average]
    truncated: int
    """Requests that lost their beginning because they are longer than the model's context, of `requests`."""
    requests: int
    seconds: float
    lm_eval: dict[str, Any] = field(repr=False)
    """All that `simple_evaluate` returned, as JSON values."""

    @property
    def version(self) -> str:
        """The version of lm-eval."""
        return self.lm_eval["lm_eval_version"]

    @property
    def table(self) -> str:
        """lm-eval's own table, and below it that of the groups if there are any."""
        from lm_eval.utils import make_table

        tables = [make_table(self.lm_eval)]
        if self.lm_eval.get("groups"):
            tables.append(make_table(self.lm_eval, "groups"))
        return "\n".join(tables)


@dataclass(frozen=True)
class Tasks:
    """Tasks whose documents have been read, to be asked of any number of models; made by `read_tasks`."""

    names: list[str]
    """Of what is scored: tasks, and groups that have a score of their own."""
    loaded: dict[str, Any]
    """Tasks and groups, as lm-eval's `TaskManager.load` gives them."""
    index: Mapping[str, Any]


def require() -> None:
    """Raise `InputError` unless lm-eval is installed."""
    try:
        import lm_eval  # noqa: F401
    except ImportError as error:
        raise InputError(
            "tasks are run by lm-eval, which is not installed: run `pip install 'ultralowbit[eval]'`"
        ) from error


def read_tasks(names: Sequence[str], folder: Path | None = None, progress: Stages | None = None) -> Tasks:
    """Find tasks by name and read their documents.

    A name is a task, a group, a tag or a pattern of lm-eval (`blimp_*`), first looked for in the YAML files of
    `folder`; those may run Python that lies beside them. Raises `InputError` for lm-eval not installed, an unknown name
    (with the nearest), and documents that cannot be read.
    """
    require()
    with _contained(progress):
        step = progress("finding tasks") if progress else None
        if step:
            step(0, 1)
        manager = _manager(names, folder)
        wanted = [match for name in names for match in _match(name, manager.all_tasks)]
        loaded: dict[str, dict[str, Any]] = {"tasks": {}, "groups": {}, "group_map": {}}
        scored: list[str] = []
        step = progress("reading tasks") if progress else None
        for done, name in enumerate(dict.fromkeys(wanted)):
            if step:
                step(done, len(wanted))
            try:
                parts = manager.load([name])
            except (StopIteration, IndexError) as error:  # lm-eval looks at the first document
                raise InputError(f"the task {name!r} has no document ({reason(error)}): check its data") from error
            except Exception as error:  # datasets lets through whatever the network, the cache and the parsers raise
                raise InputError(
                    f"the task {name!r} cannot be read ({reason(error)}): connect to the hub, or give --tasks-dir with "
                    "task files whose data are local"
                ) from error
            for key, part in loaded.items():
                part |= parts.get(key, {})
            scored += _scored(name, parts)
    return Tasks(list(dict.fromkeys(scored)), loaded, manager.task_index)


def _manager(names: Sequence[str], folder: Path | None) -> Any:
    """lm-eval's index of tasks. Its own 14,000 take ten seconds to find: without them where the folder is enough."""
    from lm_eval.tasks import TaskManager

    if folder is None:
        return TaskManager()
    if not folder.is_dir():
        raise InputError(f"--tasks-dir {str(folder)!r} is no folder: give the one that holds the tasks' .yaml files")
    local = TaskManager(include_path=str(folder), include_defaults=False)
    if not local.all_tasks:
        raise InputError(f"--tasks-dir {str(folder)!r} holds no .yaml file of a task: give the folder of such files")
    wanted = [match for name in names for match in fnmatch.filter(local.all_tasks, name) or [""]]
    enough = all(_closed(name, local.task_index) for name in wanted)
    return local if enough else TaskManager(include_path=str(folder))


def _closed(name: str, index: Mapping[str, Any]) -> bool:
    """Whether the index holds what the name stands for, members of groups included."""
    if name not in index:
        return False
    members = (index[name].cfg or {}).get("task")
    return not isinstance(members, list) or all(isinstance(m, str) and _closed(m, index) for m in members)


def _match(pattern: str, known: Sequence[str]) -> list[str]:
    matches = fnmatch.filter(known, pattern)
    if not matches:
        near = difflib.get_close_matches(pattern, known, n=1)
        hint = f"did you mean {near[0]!r}?" if near else "`lm_eval ls tasks` names lm-eval's, --tasks-dir adds your own"
        raise InputError(f"there is no task {pattern!r}: {hint}")
    return matches


def _scored(name: str, loaded: Mapping[str, Any]) -> list[str]:
    """What of a loaded name has a score: a group if it averages its members, else the members."""
    group = loaded.get("groups", {}).get(name)
    if group is None:
        return [*loaded["tasks"]]
    if group.has_aggregation:
        return [name]
    inner = {child.name: child for child in group.get_all_groups()}
    return [unit for child in group.child_names for unit in _scored(child, {"groups": inner, "tasks": [child]})]


def evaluate(
    model: nn.Module,
    tokenizer: Any,
    tasks: Tasks,
    *,
    limit: int | None = None,
    num_fewshot: int | None = None,
    batch_size: int | None = None,
    seed: int = 0,
    log_samples: bool = False,
    progress: Stages | None = None,
) -> ZeroShot:
    """Ask a causal LM, packed or not, the documents of the tasks, or the first `limit` of each.

    `num_fewshot` examples precede each, by default as many as the task says; `seed` draws them. `batch_size` is in
    requests, by default as many as make some 2048 tokens on a CPU and 16,384 elsewhere. `log_samples` keeps each prompt
    and answer in the results. Global random states are as they were; the same seed gives the same numbers. Raises
    `InputError` where lm-eval refuses.
    """
    require()
    import lm_eval
    from lm_eval.utils import handle_non_serializable

    started = time.perf_counter()
    with _contained(progress):
        try:
            lm = _lm()(
                pretrained=model, tokenizer=deepcopy(tokenizer), batch_size=batch_size or "auto", progress=progress
            )
            results = lm_eval.simple_evaluate(
                lm, tasks=[*tasks.loaded["tasks"]], task_manager=_Read(tasks), num_fewshot=num_fewshot, limit=limit,
                log_samples=log_samples, bootstrap_iters=BOOTSTRAP, random_seed=seed, numpy_random_seed=seed,
                torch_random_seed=seed, fewshot_random_seed=seed,
            )  # fmt: skip
        except (ValueError, AssertionError, KeyError, OverflowError) as error:
            raise InputError(
                f"lm-eval cannot run {', '.join(tasks.names)} ({reason(error)}): check the tasks' files and the "
                "number of few-shot examples"
            ) from error
        scores = [score for name in tasks.names for score in _scores(name, tasks, results)]
    plain = json.loads(json.dumps(results, default=handle_non_serializable))
    return ZeroShot(scores, averages(scores), lm.truncated, lm.requests, round(time.perf_counter() - started, 3), plain)


class _Read:
    """A task manager, to `simple_evaluate`, whose tasks have been read."""

    def __init__(self, tasks: Tasks) -> None:
        self.tasks, self.task_index = tasks, tasks.index

    def load(self, names: Sequence[str]) -> dict[str, Any]:
        return self.tasks.loaded


@cache
def _lm() -> type:
    """The class of lm-eval's models here: `HFLM` with batches by tokens, and what it leaves unsaid counted."""
    from lm_eval.models.huggingface import HFLM

    class LM(HFLM):
        def __init__(self, *, progress: Stages | None, **kwargs: Any) -> None:
            super().__init__(**kwargs)
            tokens = _BATCH_TOKENS.get(self.device.type, _BATCH_TOKENS_ELSEWHERE)
            self.tokens = min(tokens, _BATCH_LOGITS // self.model.config.get_text_config().vocab_size)
            self.progress = progress
            self.step: Callable[[int], object] | None = None
            self.size = self.end = self.truncated = self.requests = 0

        def _batch_scheduler(self, pos: int, n_reordered_requests: Sequence[Any]) -> int:
            """Requests come longest first: the first of a batch sets its size."""
            if pos in (0, self.end):
                _, context, continuation = n_reordered_requests[pos]
                self.size = self._fit(len(context) + len(continuation))
                self.end = pos + self.size
            return self.size

        def _detect_batch_size(self, requests: Any = None, pos: int = 0) -> int:
            return self._fit(self.max_length)

        def _fit(self, length: int) -> int:
            return max(1, self.tokens // min(length, self.max_length))

        def _loglikelihood_tokens(
            self, requests: list[Any], disable_tqdm: bool = False, override_bs: int | None = None
        ) -> list[tuple[float, bool]]:
            if override_bs is None:
                self.requests += len(requests)
                self.truncated += sum(len(a) + len(b) > self.max_length + 1 for _, a, b in requests)
            answers = super()._loglikelihood_tokens(requests, disable_tqdm or self.step is not None, override_bs)
            if self.step:
                self.step(len(requests))
            return answers

        def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
            """Its windows come in batches that know nothing of one another: one stage for all."""
            if self.progress:
                windows = sum(math.ceil(len(self.tok_encode(r.args[0])) / self.max_length) for r in requests)
                self.step = _steps(self.progress("windows of rolling likelihoods"), windows)
            try:
                return super().loglikelihood_rolling(requests, disable_tqdm=True)
            finally:
                self.step = None
                self.requests += len(requests)

    return LM


def _steps(report: Callable[[int, int], object], total: int) -> Callable[[int], None]:
    """step(n) for a report of (done, total), at most ten times a second."""
    done, last = 0, time.monotonic()

    def step(n: int) -> None:
        nonlocal done, last
        done += n
        if done >= total or time.monotonic() - last > 0.1:
            last = time.monotonic()
            report(done, total)

    return step


@contextmanager
def _contained(progress: Stages | None) -> Iterator[None]:
    """lm-eval without its traces: bars become stages of ours, random states are put back, and nothing is printed."""
    import datasets
    import lm_eval.api.model
    import lm_eval.api.task
    import lm_eval.evaluator
    import lm_eval.models.huggingface
    import tqdm as bars

    stages = {"Tokenizing inputs": "tokenizing requests", "Running loglikelihood requests": "requests"}

    class Bar:
        def __init__(
            self, iterable: Any = None, *, desc: str | None = None, total: int | None = None, disable: Any = 0, **_: Any
        ) -> None:
            self.iterable = iterable
            self.update = lambda n=1: None
            if progress and not disable:
                total = total if total is not None else len(iterable)
                self.update = _steps(progress(stages.get(desc, desc or "building requests")), total)

        def __iter__(self) -> Iterator[Any]:
            for item in self.iterable:
                yield item
                self.update(1)

        def close(self) -> None: ...

    with ExitStack() as undo:

        def put(owner: Any, name: str, value: Any) -> None:
            undo.callback(setattr, owner, name, getattr(owner, name))
            setattr(owner, name, value)

        for place in (bars, lm_eval.api.model, lm_eval.api.task, lm_eval.models.huggingface):
            put(place, "tqdm", Bar)
        # that of the working directory, where git complains if it is no repository
        put(lm_eval.evaluator, "get_git_commit_hash", lambda: None)
        log = logging.getLogger("lm_eval")
        undo.callback(log.setLevel, log.level)
        log.setLevel(logging.ERROR)
        if not datasets.are_progress_bars_disabled():
            undo.callback(datasets.enable_progress_bars)
            datasets.disable_progress_bars()
        if "DISABLE_MULTIPROC" not in os.environ:  # its bootstrap would fork a process that holds a model and threads
            undo.callback(os.environ.pop, "DISABLE_MULTIPROC")
            os.environ["DISABLE_MULTIPROC"] = "1"
        undo.callback(random.setstate, random.getstate())
        undo.callback(np.random.set_state, np.random.get_state())
        undo.enter_context(torch.random.fork_rng())
        undo.enter_context(redirect_stdout(io.StringIO()))
        yield


def _scores(name: str, tasks: Tasks, results: Mapping[str, Any]) -> list[Score]:
    """Every metric of a task or group, in lm-eval's order."""
    row = results["results"][name]
    group = tasks.loaded["groups"].get(name)
    members = [name] if group is None else [task.task_name for task in group.get_all_tasks()]
    scores = []
    for key, value in row.items():
        metric, comma, filter_name = key.partition(",")
        if not comma or metric.endswith("_stderr"):
            continue
        stderr = row.get(f"{metric}_stderr,{filter_name}")
        chance = None
        if metric in ACCURACIES:
            weighed = group is not None and _weighs(group, metric)
            chance = _mean_chance([tasks.loaded["tasks"][m] for m in members], results, weighed)
        scores.append(
            Score(
                task=name, metric=metric if filter_name == "none" else key, value=value,
                stderr=stderr if isinstance(stderr, float) else None, chance=chance,
                documents=sum(results["n-samples"][m]["effective"] for m in members),
                of=sum(results["n-samples"][m]["original"] for m in members), shots=results["n-shot"].get(name),
                version=str(results["versions"].get(name)),
                higher_is_better=results["higher_is_better"].get(name, {}).get(metric),
            )
        )  # fmt: skip
    return scores


def _weighs(group: Any, metric: str) -> bool:
    """Whether a group's mean counts documents, and not tasks, alike."""
    return next((entry.weight_by_size for entry in group.aggregate_metric_list if entry.metric == metric), False)


def _mean_chance(members: Sequence[Any], results: Mapping[str, Any], weighed: bool) -> float | None:
    chances = [_chance(task) for task in members]
    if None in chances:
        return None
    weights = [results["n-samples"][task.task_name]["effective"] if weighed else 1 for task in members]
    return fmean(chances, weights)


def _chance(task: Any) -> float | None:
    """Accuracy of a guess on the documents that a task has just asked."""
    if task.get_config("process_results") is not None:
        return None  # it may make anything of the answers
    if task.OUTPUT_TYPE != "multiple_choice":
        return 0.0
    asked = Counter(request.doc_id for request in task.instances)
    repeats = 2 if "acc_mutual_info" in task.aggregation() else 1  # which asks each choice also without its question
    right = dict.fromkeys(asked, 1)
    if getattr(task, "multiple_target", 0):
        right = {request.doc_id: len({*task.doc_to_target(request.doc)}) for request in task.instances}
    return fmean(right[doc] * repeats / asked[doc] for doc in asked)
