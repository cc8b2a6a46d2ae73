"""`ultralowbit demo`: the embedded model under several recipes, side by side."""

from __future__ import annotations

import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from ultralowbit.checkpoint.manifest import MANIFEST
from ultralowbit.checkpoint.storage import sha256_file, write_atomic, write_json
from ultralowbit.errors import InputError
from ultralowbit.eval.generation import generate
from ultralowbit.eval.runner import open_model, pick_dtype
from ultralowbit.hub import open_tokenizer
from ultralowbit.progress import Progress
from ultralowbit.recipe import Recipe
from ultralowbit.report.run import Texts, compress_and_measure
from ultralowbit.report.schema import SCHEMA_VERSION, stored_perplexity, strict
from ultralowbit.report.tables import render
from ultralowbit.system import pick_device

CHECKPOINT = Path(__file__).parent / "checkpoint"


RECIPES = ("gptq-4bit", "gptq-3bit", "gptq-2bit", "sign-2-g128", "sign-2", "sign-1")


SETTINGS = ("calibration.source=python-docs", "calibration.samples=48", "calibration.length=256")


TEXTS = Texts(("python-docs",), max_tokens=16_384)


PROMPT = "Return a string"


TOKENS = 24


def run_demo(
    out: Path,
    watch: Progress,
    *,
    device: str = "auto",
    restart: bool = False,
    command: str | None = None,
    checkpoint: Path = CHECKPOINT,
    recipes: tuple[str, ...] = RECIPES,
) -> dict[str, Any]:
    """Compress the demo checkpoint with each recipe into a folder of `out`; report.json and report.md compare them.

    A run that was killed goes on where it stopped, a finished one is only read. Returns the report.
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
    rows: list[dict[str, Any]] = []
    manifests = {}
    for recipe in chosen:
        watch.say(f"{recipe.name}: {recipe.summary}")
        folder = out / recipe.name
        known = [stored_perplexity(p) for p in rows[0]["perplexity"]] if rows else ()
        report = compress_and_measure(
            str(checkpoint), recipe, folder, TEXTS, device=device, restart=restart, watch=watch, known=known,
            thorough=False,
        )  # fmt: skip
        if not rows:
            rows.append(_row(report, "original", _sample(checkpoint, where)))
        rows.append(_row(report, "packed", _sample(folder, where)))
        manifests[recipe.name] = report["manifest"]["sha256"]
    report = {
        "schema_version": SCHEMA_VERSION,
        "command": command,
        "key": key,
        "manifests": manifests,
        "prompt": PROMPT,
        "calibration": report["calibration"],
        "environment": report["environment"],
        "rows": rows,
    }
    write_json(out / "report.json", strict(report))
    write_atomic(out / "report.md", render("demo.md.j2", report).encode())
    return report


def _row(report: dict[str, Any], which: str, sample: str) -> dict[str, Any]:
    packed = which == "packed"
    return {
        **report[which],
        "peak_memory_bytes": None,  # of one process that makes them all: it says nothing of one recipe
        "sample": sample,
        "collapsed": report["collapsed"] if packed else [],
        "fallbacks": report["fallbacks"] if packed else {},
    }


def _sample(folder: Path, device: torch.device) -> str:
    model = open_model(folder, device, pick_dtype(folder, device))
    return generate(model, open_tokenizer(folder), PROMPT, max_new_tokens=TOKENS)


def _finished(out: Path, key: dict[str, Any]) -> dict[str, Any] | None:
    """The report of an earlier run, if it made what this one would."""
    try:
        report = json.loads((out / "report.json").read_text(encoding="utf-8"))
        there = {name: sha256_file(out / name / MANIFEST) for name in report["manifests"]}
        return report if report["key"] == key and there == report["manifests"] else None
    except (OSError, ValueError, KeyError, TypeError):
        return None
