"""Reports for tests, built through the schema: none is written by hand."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from ultralowbit.checkpoint.size import KINDS, PART_KINDS
from ultralowbit.checkpoint.storage import sha256_file
from ultralowbit.eval.fidelity import Fidelity
from ultralowbit.eval.perplexity import Perplexity
from ultralowbit.eval.schema import write_file
from ultralowbit.recipe import Recipe
from ultralowbit.report.gates import collapsed
from ultralowbit.report.schema import ORIGINAL, Environment, Layer, ManifestRecord, Row, RunReport, SizeRecord

HOW = {"source": "novels.txt", "windows": 62, "context": 256, "tokens": 15810, "dtype": "float32", "sha256": "a" * 64}
ENVIRONMENT = Environment(ultralowbit="1", torch="2", transformers="5", python="3", device="cpu", threads=1)


def perplexity(value: float, tokens: str = "a", **changes: Any) -> Perplexity:
    """A perplexity on the windows that `tokens` stands for."""
    nll = math.log(value) if value > 0 else value
    return Perplexity(**{**HOW, "sha256": tokens * 64, **changes}, perplexity=value, nll=nll)


def fidelity(value: float, **changes: Any) -> Fidelity:
    """A divergence whose other numbers follow from its mean."""
    numbers = {"kl_mean": value, "kl_median": value / 2, "kl_p99": 5 * value, "top1": math.exp(-value)}
    return Fidelity(**{**HOW, "original_dtype": "float32", **changes}, **numbers)


def size(bits: float | None) -> SizeRecord:
    """A model of 3 M Linear weights in so many bits, None for one that is not packed, and 1 M others in fp16."""
    weights, embeddings = 3_145_728, 2 * 1_048_576
    linear = int(weights * (bits or 16) / 8)
    budget = dict.fromkeys((*PART_KINDS, *KINDS, "file headers"), 0)
    budget |= {"embeddings": embeddings, "file headers": 1000}
    budget["unquantized linears" if bits is None else "sign planes"] = linear
    total = linear + embeddings
    return SizeRecord(
        linear_bits_per_weight=bits, claimed_bits=bits and math.floor(bits), linear_bytes=linear,
        linear_weights=weights if bits else 0, total_weights=weights + embeddings // 2, total_bytes=total,
        model_bits_per_weight=8 * total / (weights + embeddings // 2),
        model_bits_before=8 * total / (weights + embeddings // 2), file_bytes=total + 1000, header_bytes=1000,
        fp16_bytes=2 * weights + embeddings, compression=8.4e6 / total, budget=budget, other={},
    )  # fmt: skip


def layers(bits: float, error: Callable[[int], float | None], blocks: int = 3) -> list[Layer]:
    """Two Linears for each block."""
    return [
        Layer(
            name=f"model.layers.{i}.{kind}", shape=(64, 96), format="96x1sign/row", parts={"planes": 768},
            claimed_bits=1.0, bytes=768, bits_per_weight=bits, error=error(i), fallback=None,
        )
        for i in range(blocks)
        for kind in ("mlp.up_proj", "self_attn.q_proj")
    ]  # fmt: skip


def recipe(name: str = "sign-2", seed: int = 0, **changes: Any) -> Recipe:
    """The recipe sign-2 under another name."""
    data = {"name": name, "quantize": {"method": "sign", "planes": 2}, "summary": "two planes"}
    return Recipe.model_validate({**data, "calibration": {"source": "c.txt", "samples": 8, "seed": seed}, **changes})


def report(value: float = 62.5, *, bits: float = 2.1, vocabulary: int = 4096, **changes: Any) -> RunReport:
    """The report of a model whose perplexity went from 50 to `value`."""
    chosen = changes.pop("recipe", recipe())
    metrics = changes.pop("metrics", {"perplexity": [perplexity(value)]})
    before = [replace(p, perplexity=50.0, nll=math.log(50)) for p in metrics["perplexity"]]
    packed = Row(label=chosen.name, size=size(bits), metrics=metrics, seconds=3725.0, peak_memory_bytes=10**10)
    values = {
        "created": "today", "command": "ultralowbit compress x", "folder": "out", "model": "tiny", "recipe": chosen,
        "manifest": ManifestRecord(path="manifest.json", sha256="b" * 64), "vocabulary": vocabulary,
        "calibration": {**chosen.calibration.model_dump(), "sha256": "f" * 64}, "advice": "Try more bits.",
        "original": Row(label=ORIGINAL, size=size(None), metrics={"perplexity": before}), "packed": packed,
        "layers": layers(bits, lambda i: 0.02 * (i + 1) / bits), "environment": ENVIRONMENT,
        "collapsed": collapsed(metrics, vocabulary),
    }  # fmt: skip
    return RunReport(**{**values, **changes})


@pytest.fixture(scope="session")
def build() -> SimpleNamespace:
    """The builders of this file."""
    return SimpleNamespace(perplexity=perplexity, fidelity=fidelity, size=size, recipe=recipe, report=report)


@pytest.fixture
def run(tmp_path) -> Callable[..., Path]:
    """run(folder, recipe, bits, [measured]) writes what `compress` leaves behind, but for the weights."""

    def write(name: str, label: str, bits: float, measured: list[Perplexity], *, model="tiny", seed=0, **more) -> Path:
        folder = tmp_path / name
        folder.mkdir(parents=True)
        calibration = {"source": "c.txt", "samples": 8, "length": 256, "seed": seed}
        no_text = more.get("no_text")
        made = layers(bits, lambda i: None if no_text else 0.02 * (i + 1) / bits + 0.001 * seed)
        made = [layer for layer in made if more.get("without", "nothing") not in layer.name]
        fingerprint = {
            "model": {"model.safetensors": model}, "recipe": {"quantize": {"bits": bits}, "calibration": calibration},
            "calibration": {"sha256": f"{seed}"}, "software": {}, "compute": {},
        }  # fmt: skip
        if more.get("trained_on"):
            fingerprint["recipe"]["finetune"] = {"data": more["trained_on"]}
        if no_text:
            del fingerprint["recipe"]["calibration"]
        manifest = {
            "fingerprint": fingerprint, "model": model, "files": {"config.json": name}, "block_seconds": {},
            "environment": {},
            "layers": {layer.name: {"shape": layer.shape, "format": layer.format} for layer in made},
        }  # fmt: skip
        (folder / "manifest.json").write_text(json.dumps(manifest))
        written = report(
            bits=bits, model=model, recipe=recipe(label, seed), layers=made, fallbacks=more.get("fallbacks", {}),
            metrics={"perplexity": measured, **({"fidelity": more["fidelity"]} if "fidelity" in more else {})},
            manifest=ManifestRecord(path="manifest.json", sha256=sha256_file(folder / "manifest.json")),
        )  # fmt: skip
        written.packed.seconds, written.packed.peak_memory_bytes = 60.0 * bits + seed, 10**9
        written.packed.divergence_by_depth = more.get("by_depth")
        (folder / "report.md").write_text("")
        write_file(folder / "report.json", written)
        if more.get("evaluated"):
            write_file(folder / "eval.json", more["evaluated"])
        return folder

    return write
