"""Compress the model that comes with the package with several recipes, and compare them."""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from ultralowbit.checkpoint.manifest import MANIFEST
from ultralowbit.checkpoint.storage import sha256_file, write_atomic
from ultralowbit.errors import InputError
from ultralowbit.eval.generation import generate
from ultralowbit.eval.runner import open_model, pick_dtype
from ultralowbit.eval.schema import read_file, write_file
from ultralowbit.hub import open_tokenizer
from ultralowbit.progress import Progress
from ultralowbit.recipe import Recipe
from ultralowbit.report.markdown import public_command
from ultralowbit.report.run import Texts, compress_and_measure
from ultralowbit.report.schema import ORIGINAL, REPORT, DemoReport, DemoRow, RunReport
from ultralowbit.report.tables import render
from ultralowbit.system import pick_device

CHECKPOINT = Path(__file__).parent / "checkpoint"
RECIPES = ("gptq-4bit", "gptq-3bit", "gptq-2bit", "sign-2-g128", "sign-2", "sign-1")
SETTINGS = ("calibration.source=python-docs", "calibration.samples=48", "calibration.length=256")
"""Settings of every recipe: text that is always there, and as much of it as takes seconds."""
TEXTS = Texts(("python-docs",), max_tokens=16_384)
"""The text that perplexity is measured on."""
PROMPT = "Return a string"
TOKENS = 24
"""How many tokens each model writes after the prompt."""


def run_demo(
    out: Path,
    watch: Progress,
    *,
    device: str = "auto",
    restart: bool = False,
    command: str | None = None,
    checkpoint: Path = CHECKPOINT,
    recipes: tuple[str, ...] = RECIPES,
) -> DemoReport:
    """Compress the demo checkpoint with each recipe into a folder of `out`; report.json and report.md compare them.

    A run that was killed goes on where it stopped, and a finished one is only read. Raises `InputError` where the
    checkpoint is missing from the install.
    """
    if not (checkpoint / "config.json").exists():
        raise InputError(
            f"the demo checkpoint is not in this install ({checkpoint}): install ultralowbit again, or train it with "
            "`python -m ultralowbit.demo.train`"
        )
    chosen = [Recipe.load(name, SETTINGS) for name in recipes]
    where = pick_device(device)
    key = {
        "checkpoint": {path.name: sha256_file(path) for path in sorted(checkpoint.iterdir())},
        "recipes": [recipe.model_dump(mode="json") for recipe in chosen],
        "prompt": PROMPT,
        "device": where.type,
        "software": {name: version(name) for name in ("ultralowbit", "torch", "transformers")},
    }
    finished = None if restart else _finished(out, key)
    if finished:
        return finished
    rows: list[DemoRow] = []
    manifests = {}
    for recipe in chosen:
        watch.say(f"{recipe.name}: {recipe.summary}")
        folder = out / recipe.name
        run = compress_and_measure(
            str(checkpoint), recipe, folder, TEXTS, device=device, restart=restart, watch=watch,
            known=rows[0].metrics if rows else None, thorough=False,
        )  # fmt: skip
        if not rows:
            rows.append(_row(run, ORIGINAL, _sample(checkpoint, where)))
        rows.append(_row(run, "packed", _sample(folder, where)))
        manifests[recipe.name] = run.manifest.sha256
    report = DemoReport(
        command=command and public_command(command), key=key, manifests=manifests, prompt=PROMPT,
        calibration=run.calibration, environment=run.environment, rows=rows,
    )  # fmt: skip
    write_file(out / REPORT, report)
    write_atomic(out / "report.md", render("demo.md.j2", **dict(report)).encode())
    return report


def _row(run: RunReport, which: str, sample: str) -> DemoRow:
    """A row without the peak memory, which is that of one process for all recipes and says nothing of one of them."""
    packed = which == "packed"
    return DemoRow(
        **{**dict(getattr(run, which)), "peak_memory_bytes": None}, sample=sample,
        collapsed=run.collapsed if packed else [], fallbacks=run.fallbacks if packed else {},
    )  # fmt: skip


def _sample(folder: Path, device: torch.device) -> str:
    model = open_model(folder, device, pick_dtype(folder, device))
    return generate(model, open_tokenizer(folder), PROMPT, max_new_tokens=TOKENS)


def _finished(out: Path, key: dict[str, Any]) -> DemoReport | None:
    """The report of an earlier run, if it made what this one would."""
    try:
        report = read_file(out / REPORT, DemoReport, "it is written anew")
        there = {name: sha256_file(out / name / MANIFEST) for name in report.manifests}
    except (InputError, OSError):
        return None
    return report if report.key == key and there == report.manifests else None
