"""What a compression cost, measured: a table for the terminal, report.json for programs, report.md for people."""

from __future__ import annotations

import json
import logging
import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch

from ultralowbit.checkpoint.config import read_config_json
from ultralowbit.checkpoint.files import Source
from ultralowbit.checkpoint.manifest import MANIFEST
from ultralowbit.checkpoint.size import measure_size
from ultralowbit.checkpoint.storage import sha256_file, write_atomic, write_json
from ultralowbit.data.corpora import SOURCES
from ultralowbit.errors import InputError
from ultralowbit.eval.fidelity import Fidelity
from ultralowbit.eval.perplexity import Perplexity
from ultralowbit.eval.runner import (
    Compared,
    EvalText,
    depth,
    measure_divergence,
    measure_perplexity,
    open_model,
    pick_dtype,
    read_texts,
    too_large,
    unknown,
)
from ultralowbit.format.weight import Format, PackedWeight
from ultralowbit.hub import open_tokenizer, resolve_model
from ultralowbit.pipeline.compress import compress
from ultralowbit.progress import Progress
from ultralowbit.recipe import Recipe
from ultralowbit.report import card as cards
from ultralowbit.report.gates import Continuation, Limits, advice, continuation, exceeded
from ultralowbit.report.schema import SCHEMA_VERSION, stored_fidelity, stored_perplexity, strict
from ultralowbit.report.tables import render
from ultralowbit.system import forget_peak_memory, peak_memory, pick_device

log = logging.getLogger(__name__)

AUTO_TOKENS = 40_960
"""Tokens that perplexity is measured on unless texts are named: twenty windows of 2048, enough to see what happened."""


@dataclass(frozen=True)
class Texts:
    """Which texts to measure perplexity on; `sources` None is the default of the recipe, cut to `AUTO_TOKENS`."""

    sources: tuple[str, ...] | None = None
    context: int | None = None
    max_tokens: int | None = None

    def read(self, folder: Path, recipe: Recipe, trust_remote_code: bool = False) -> list[EvalText]:
        sources, max_tokens = self.sources, self.max_tokens
        if sources is None:
            sources, max_tokens = (default_source(recipe),), max_tokens or AUTO_TOKENS
        return read_texts(
            folder, sources, context=self.context, max_tokens=max_tokens, trust_remote_code=trust_remote_code
        )


def default_source(recipe: Recipe) -> str:
    """The calibration's own dataset, if on the hub (perplexity reads its test split), else the text always there."""
    source = recipe.calibration.source
    hub = source not in ("python-docs", "self") and not Path(source).expanduser().exists()
    return source if recipe.reads_text and hub and (source in SOURCES or "/" in source) else "python-docs"


def compress_and_measure(
    model: str,
    recipe: Recipe,
    out: Path,
    texts: Texts,
    *,
    device: str = "auto",
    restart: bool = False,
    trust_remote_code: bool = False,
    watch: Progress,
    command: str | None = None,
    known: Sequence[Perplexity] = (),
    load_from: str | None = None,
    thorough: bool = True,
    limits: Limits | None = None,
) -> dict[str, Any]:
    """Compress `model` into the folder `out`, measure it before and after, and write report.json, report.md and a model
    card, README.md, there.

    Texts are read first, so that a mistake in them costs nothing. What an earlier report of the same checkpoint has
    measured stands; `known` are perplexities of the original to be taken over. The card says to load from `load_from`,
    the folder's name by default; one that someone has edited is left alone. `thorough` runs both side by side, where
    they fit into memory together, to see how far apart their predictions are, and lets the packed model write. Returns
    the report, whose "exceeded" says which `limits` do not hold.
    """
    limits = limits or Limits()
    if limits and texts.sources == ():
        raise InputError("--max-ppl-ratio and --max-kl are checked on a text: name one with --eval")
    out = out.expanduser()
    where = pick_device(device)
    folder = resolve_model(model)
    watch.start("reading texts", 1)
    wanted = texts.read(folder, recipe, trust_remote_code)
    watch.step()
    there = (out / MANIFEST).exists() and not restart
    forget_peak_memory()  # what this process did before is no cost of this run
    compressed = compress(
        model, recipe, out, device=device, restart=restart, trust_remote_code=trust_remote_code, progress=watch
    )
    peak = None if there else peak_memory()
    digest = sha256_file(out / MANIFEST)
    old = _earlier(out, digest)

    def counter(label: str) -> Callable[[str], Callable[[int, int], None]]:
        return lambda what: watch.counter(f"{label}: {what}")

    size, packed_size = measure_size(folder).to_dict(), measure_size(out).to_dict()
    dtype = pick_dtype(folder, where)
    options: dict[str, Any] = {"dtype": dtype, "trust_remote_code": trust_remote_code}
    known, mine, near = [*known, *old.get("original", ())], [*old.get("packed", ())], [*old.get("fidelity", ())]
    by_depth = old.get("by_depth")
    if thorough:
        both = _side_by_side(
            model, folder, out, [text for text in wanted if not _of(near, text, dtype)], where, watch, options
        )
        known, mine, near = known + both.base, mine + both.models[0][0], near + both.models[0][1]
        if wanted and near and not by_depth and not too_large([(path, dtype) for path in (folder, out)], where):
            step = watch.counter("divergence by depth")
            by_depth = depth(folder, out, wanted[0], where, progress=step, **options).to_dict()
    no_room = None
    if unknown(wanted, dtype, known) and (why := too_large([(folder, dtype)], where)):
        no_room = f"not measured: it {why}"
        log.warning("the original is %s", no_room)
    before = (
        []
        if no_room
        else measure_perplexity(folder, wanted, where, known=known, progress=counter("original"), **options)
    )
    after = measure_perplexity(out, wanted, where, known=mine, progress=counter(recipe.name), **options)
    near = [f for text in wanted for f in _of(near, text, dtype)]
    manifest, vocabulary = compressed.manifest, _vocabulary(folder)
    report = {
        "schema_version": SCHEMA_VERSION, "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": command, "folder": str(out), "model": model, "recipe": recipe.model_dump(mode="json"),
        "manifest": {"path": MANIFEST, "sha256": digest}, "vocabulary": vocabulary,
        "calibration": manifest["calibration"], "original": _row("original", size, before, not_measured=no_room),
        "packed": _row(
            recipe.name, packed_size, after, fidelity=near, by_depth=by_depth,
            seconds=round(sum(manifest["block_seconds"].values()), 3), peak=peak or old.get("peak"),
            sparsity=_sparsity(out, manifest["layers"]),
        ),
        "continuation": old.get("continuation"), "limits": asdict(limits), "advice": advice(recipe),
        "collapsed": [p.source for p in after if collapsed(p.perplexity, vocabulary)],
        "fallbacks": compressed.fallbacks,
        "notes": {name: layer["notes"] for name, layer in manifest["layers"].items() if layer["notes"]},
        "layers": _layers(packed_size["layers"], manifest["layers"]), "environment": manifest["environment"],
    }  # fmt: skip
    report["exceeded"] = exceeded(limits, report["original"], report["packed"])
    if wanted and thorough and not report["continuation"]:
        report["continuation"] = _continue(out, None if no_room else folder, wanted[0], where, watch, options)
    name = (load_from or out.resolve().name).rpartition("/")[2]
    card = render("card.md.j2", cards.values(report, folder, name, load_from or name))
    if cards.edited(out):
        watch.say(f"{out / cards.CARD} was edited since it was written: it is left as it is")
        write(out, report)
    else:
        write(out, {**report, "card": {"path": cards.CARD, "sha256": sha256(card.encode()).hexdigest()}})
        write_atomic(out / cards.CARD, card.encode())
    return report


def _of(near: Iterable[Fidelity], text: EvalText, dtype: torch.dtype) -> list[Fidelity]:
    """Those on the tokens of a text in this dtype: one at most."""
    key = (text.source, text.sha256, str(dtype).removeprefix("torch."))
    return [f for f in near if (f.source, f.sha256, f.dtype) == key]


def _side_by_side(
    model: str,
    folder: Path,
    out: Path,
    texts: list[EvalText],
    device: torch.device,
    watch: Progress,
    options: dict[str, Any],
) -> Compared:
    """Both models over the texts, if they fit into memory together."""
    none = Compared([], [], [([], [])])
    if not texts:
        return none
    if why := too_large([(path, options["dtype"]) for path in (folder, out)], device):
        watch.say(
            f"the divergence from the original is not measured, since running both {why}: "
            f"`ultralowbit eval {out} --fidelity {model} --ppl TEXT` runs one after the other"
        )
        return none
    return measure_divergence(folder, [out], texts, device, progress=watch.counter, **options)


def _continue(
    out: Path, original: Path | None, text: EvalText, device: torch.device, watch: Progress, options: dict[str, Any]
) -> dict[str, Any]:
    """What the packed model writes; that it repeats a token is no collapse if the original does."""

    def write(folder: Path, label: str) -> Continuation:
        model = open_model(folder, device, **options)
        return continuation(
            model, open_tokenizer(folder, options["trust_remote_code"]), text.tokens,
            progress=watch.counter(f"{label}: continuing a text"),
        )  # fmt: skip

    packed = write(out, out.name)
    usual = packed.repeats and original is not None and write(original, "original").repeats
    return {**packed.to_dict(), "repeats": packed.repeats and not usual}


def _row(
    label: str,
    size: dict[str, Any],
    measured: list[Perplexity],
    *,
    fidelity: Sequence[Fidelity] = (),
    by_depth: dict[str, Any] | None = None,
    not_measured: str | None = None,
    seconds: float | None = None,
    peak: int | None = None,
    sparsity: Sequence[float] = (),
) -> dict[str, Any]:
    """One line of the table, and all that it is drawn from."""
    return {
        "label": label,
        "size": {key: value for key, value in size.items() if key != "layers"},
        "perplexity": [p.to_dict() for p in measured],
        "fidelity": [f.to_dict() for f in fidelity],
        "divergence_by_depth": by_depth,
        "not_measured": not_measured,
        "seconds": seconds,
        "peak_memory_bytes": peak,
        "plane_sparsity": list(sparsity),
    }


def _sparsity(out: Path, layers: dict[str, Any]) -> list[float]:
    """The share of zeros in each 0/1 plane of all packed Linears together, from the stored bits."""
    source, zeros, weights = Source(out), Counter(), Counter()
    for name, layer in layers.items():
        format, (rows, columns) = Format.from_dict(layer["layout"]), layer["shape"]
        if not any(getattr(segment, "alphabet", None) == "01" for segment in format.segments):
            continue
        parts = {part: f"{name}.{part}" for part in format.tensors(rows, columns)}
        stored = source.read([*parts.values()])
        packed = PackedWeight(format, (rows, columns), {part: stored[key] for part, key in parts.items()})
        for plane, share in enumerate(packed.sparsity):
            zeros[plane] += share * rows * columns
            weights[plane] += rows * columns
    return [zeros[plane] / weights[plane] for plane in sorted(weights)]


def collapsed(perplexity: float, vocabulary: int | None) -> bool:
    """Whether a model predicts worse than one that guesses among its tokens."""
    return not math.isfinite(perplexity) or (vocabulary is not None and perplexity > vocabulary)


def _vocabulary(folder: Path) -> int | None:
    config = read_config_json(folder)
    return (config.get("text_config") or config).get("vocab_size")


def _layers(sizes: list[dict[str, Any]], results: dict[str, Any]) -> list[dict[str, Any]]:
    """What each packed Linear takes and how far its output is off, the worst first."""
    rows = []
    for entry in sizes:
        result = results.get(entry["name"], {})
        rows.append({**entry, **{key: result.get(key) for key in ("error", "fallback", "notes", "seconds")}})
    return sorted(rows, key=lambda row: (row["fallback"] is None, -(row["error"] or 0)))


def _earlier(out: Path, digest: str) -> dict[str, Any]:
    """What a report that is there already has measured of the very same checkpoint."""
    try:
        report = json.loads((out / "report.json").read_text(encoding="utf-8"))
        if report["schema_version"] != SCHEMA_VERSION or report["manifest"]["sha256"] != digest:
            return {}
        found = {row: [stored_perplexity(p) for p in report[row]["perplexity"]] for row in ("original", "packed")}
        fidelity = [stored_fidelity(f) for f in report["packed"].get("fidelity", ())]
        peak, written = report["packed"]["peak_memory_bytes"], report.get("continuation")
        by_depth = report["packed"].get("divergence_by_depth")
        return {**found, "fidelity": fidelity, "by_depth": by_depth, "peak": peak, "continuation": written}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def write(out: Path, report: dict[str, Any]) -> None:
    """report.json and report.md; numbers that JSON lacks become the strings "nan" and "inf"."""
    write_json(out / "report.json", strict(report))
    write_atomic(out / "report.md", render("report.md.j2", report).encode())
