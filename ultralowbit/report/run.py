"""What a compression cost, measured: report.json for programs, report.md for people, README.md for the hub."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from ultralowbit.checkpoint.card import CARD, is_edited
from ultralowbit.checkpoint.config import vocabulary
from ultralowbit.checkpoint.manifest import MANIFEST
from ultralowbit.checkpoint.size import LayerSize, measure_size
from ultralowbit.checkpoint.storage import sha256_file, write_atomic
from ultralowbit.data.calibration import Calibration
from ultralowbit.data.corpora import SOURCES, has_test_split, public_name
from ultralowbit.data.overlap import seen_share
from ultralowbit.errors import CheckpointError, FormatError, InputError, reason
from ultralowbit.eval.base import Measured
from ultralowbit.eval.runner import EvalText, pick_dtype, read_texts
from ultralowbit.eval.schema import first_mistake, read_file, write_file
from ultralowbit.hub import resolve_model
from ultralowbit.nn.original import read_any_config
from ultralowbit.pipeline.compress import Compressed, compress
from ultralowbit.pipeline.ranks import Ranks
from ultralowbit.progress import Progress
from ultralowbit.recipe import Recipe
from ultralowbit.report.card import card_text
from ultralowbit.report.gates import advice, collapsed, exceeded
from ultralowbit.report.markdown import public_command
from ultralowbit.report.measure import Models, plane_sparsity
from ultralowbit.report.schema import ORIGINAL, REPORT, Layer, Limits, ManifestRecord, Row, RunReport, SizeRecord
from ultralowbit.report.tables import render
from ultralowbit.system import forget_peak_memory, pick_device

log = logging.getLogger(__name__)

AUTO_TOKENS = 40_960
"""Tokens to measure on unless texts are named: twenty windows of 2048, enough to see what happened."""


@dataclass(frozen=True)
class Texts:
    """Which texts to measure on; `sources` None is the default of the recipe, cut to `AUTO_TOKENS`."""

    sources: tuple[str, ...] | None = None
    context: int | None = None
    max_tokens: int | None = None

    def for_recipe(self, recipe: Recipe) -> Texts:
        """The same with the sources and the number of tokens that stand in for None."""
        if self.sources is not None:
            return self
        return replace(self, sources=(default_source(recipe),), max_tokens=self.max_tokens or AUTO_TOKENS)

    def unlike(self, recipe: Recipe) -> str | None:
        """The text that is measured on by default, where it is none that the recipe calibrates on."""
        source = default_source(recipe) if self.sources is None and recipe.reads_text else None
        return None if source in recipe.calibration.shares else source

    def read(
        self, folder: Path, recipe: Recipe, trust_remote_code: bool = False, progress: Progress | None = None
    ) -> list[EvalText]:
        """Read the texts in the tokens of the checkpoint `folder`."""
        chosen = self.for_recipe(recipe)
        return read_texts(
            folder, chosen.sources, context=self.context, max_tokens=chosen.max_tokens,
            trust_remote_code=trust_remote_code, progress=progress,
        )  # fmt: skip


def default_source(recipe: Recipe) -> str:
    """The first dataset of the calibration that is on the hub and has a test split, else the text always there."""
    texts = recipe.calibration.shares if recipe.reads_text else ()
    away = [text for text in texts if text not in ("python-docs", "self") and not Path(text).expanduser().exists()]
    named = (text for text in away if text in SOURCES or "/" in text)
    return next((text for text in named if has_test_split(text)), "python-docs")


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
    known: Measured | None = None,
    load_from: str | None = None,
    thorough: bool = True,
    limits: Limits | None = None,
    ranks: Ranks | None = None,
) -> RunReport | None:
    """Compress `model` into the folder `out`, measure it before and after, and write report.json, report.md and a model
    card, README.md, there.

    Texts are read first, so that a mistake in them costs nothing, and are seen to hold none of what is trained on, or
    warned of. What an earlier report of the same checkpoint has measured stands; `known` are results of the original to
    be taken over. The card says to load from `load_from`, by default the name of the folder; a card that someone has
    edited is left alone. `thorough` runs both models side by side, where they fit into memory together, to see how far
    apart their predictions are, and lets the packed model write. The "exceeded" of the report says which `limits` do
    not hold. ranks: the processes that share the work, of which rank 0 measures; the others return None.
    """
    limits = limits or Limits()
    if limits and texts.sources == ():
        raise InputError("--max-ppl-ratio and --max-kl are checked on a text: name one with --eval")
    out, where, folder = out.expanduser(), pick_device(device), resolve_model(model)
    is_first = ranks is None or ranks.is_first
    wanted = texts.read(folder, recipe, trust_remote_code, watch) if is_first else []
    seen: dict[str, float] = {}
    forget_peak_memory()  # what this process did before is no cost of this run
    compressed = compress(
        model, recipe, out, device=device, restart=restart, trust_remote_code=trust_remote_code, progress=watch,
        ranks=ranks, on_texts=lambda read: seen.update(_seen(read, wanted)),
    )  # fmt: skip
    if not is_first:
        return None
    report = _begin(model, folder, recipe, out, compressed, command)
    report.vocabulary = vocabulary(read_any_config(folder, trust_remote_code))
    models = Models(folder, out, where, pick_dtype(folder, where), trust_remote_code, watch, model, recipe.name)
    models.measure(report, wanted, known or {}, thorough)
    report.seen, report.unlike = seen, texts.unlike(recipe)
    columns = min(layer.shape[1] for layer in report.layers)
    report.limits, report.advice = limits, advice(recipe, report.packed.size.bits, columns)
    report.hopeless = collapsed(report.original.metrics, report.vocabulary)
    gone = collapsed(report.packed.metrics, report.vocabulary)
    report.collapsed = [source for source in gone if source not in report.hopeless]
    report.exceeded = exceeded(limits, report.original.metrics, report.packed.metrics)
    write_file(out / REPORT, report)
    write_texts(report, model, folder, out, load_from or out.resolve().name, watch)
    return report


def _begin(
    model: str, folder: Path, recipe: Recipe, out: Path, compressed: Compressed, command: str | None
) -> RunReport:
    """The report before anything is measured; `CheckpointError` if the manifest is not one that `compress` writes."""
    try:
        return _from_manifest(model, folder, recipe, out, compressed, command)
    except (ValidationError, KeyError, TypeError, FormatError) as error:
        what = first_mistake(error) if isinstance(error, ValidationError) else reason(error)
        raise CheckpointError(
            f"{out / MANIFEST} is not as `ultralowbit compress` wrote it ({what}): copy it again, or give --restart"
        ) from error


def _from_manifest(
    model: str, folder: Path, recipe: Recipe, out: Path, compressed: Compressed, command: str | None
) -> RunReport:
    """The report with what an earlier one says of the very same checkpoint."""
    manifest, digest, packed_size = compressed.manifest, sha256_file(out / MANIFEST), measure_size(out)
    original = Row(label=ORIGINAL, size=SizeRecord.model_validate(measure_size(folder)))
    packed = Row(
        label=recipe.name, size=SizeRecord.model_validate(packed_size), peak_memory_bytes=compressed.peak_memory_bytes,
        seconds=round(sum(manifest["block_seconds"].values()), 3), plane_sparsity=plane_sparsity(out, manifest),
    )  # fmt: skip
    layers, calibration = manifest["layers"], manifest["calibration"]
    report = RunReport(
        created=datetime.now(timezone.utc).isoformat(timespec="seconds"), folder=out.resolve().name,
        command=command and public_command(command), model=public_name(model), recipe=recipe.with_sources(public_name),
        manifest=ManifestRecord(path=MANIFEST, sha256=digest), vocabulary=None, calibration=calibration,
        original=original, packed=packed, layers=_layers(packed_size.layers, layers),
        environment=manifest["environment"], fallbacks=compressed.fallbacks,
        notes={name: lines for name, lines in _notes(manifest).items() if lines},
        left_out=manifest.get("left_out", {}),
    )  # fmt: skip
    earlier = _earlier(out, digest)
    if earlier:
        report.original.metrics, report.packed.metrics = earlier.original.metrics, earlier.packed.metrics
        report.packed.divergence_by_depth = earlier.packed.divergence_by_depth
        report.packed.peak_memory_bytes = compressed.peak_memory_bytes or earlier.packed.peak_memory_bytes
        report.continuation, report.samples = earlier.continuation, earlier.samples
    return report


def _notes(manifest: dict[str, Any]) -> dict[str, list[str]]:
    """What stages note of Linears, of their rotation, and of the trainings of blocks and of the whole model."""
    stages = {"rotation": "rotation", "adapters": "preprocess", "fine-tuning": "finetune"}
    whole = {what: manifest.get(stage) for what, stage in stages.items()}
    trainings = {**(manifest.get("blockwise") or {}), **{what: fitted for what, fitted in whole.items() if fitted}}
    return {name: noted["notes"] for name, noted in {**manifest["layers"], **trainings}.items()}


def _seen(read: Mapping[str, Calibration], wanted: list[EvalText]) -> dict[str, float]:
    """Texts to measure on that hold a part of what is calibrated or trained on, which is warned of."""
    windows = [text.tokens for text in read.values()]
    shares = {text.source: share for text in wanted if (share := seen_share(windows, text.tokens)) > 0}
    for source, share in shares.items():
        log.warning("%.1f %% of the calibration text stands in %s: figures of it flatter", 100 * share, source)
    return shares


def _earlier(out: Path, digest: str) -> RunReport | None:
    """The report that is there already, if it is of the very same checkpoint."""
    try:
        report = read_file(out / REPORT, RunReport, "it is written anew")
    except InputError:
        return None
    return report if report.manifest.sha256 == digest else None


def _layers(sizes: tuple[LayerSize, ...], results: dict[str, dict]) -> list[Layer]:
    """What each packed Linear takes and how far its output is off, the worst first."""
    layers = [
        Layer(
            name=size.name, shape=size.shape, format=size.format, parts=size.parts, claimed_bits=size.claimed_bits,
            bytes=size.bytes, bits_per_weight=size.bits_per_weight,
            **{key: results[size.name].get(key) for key in ("error", "least_error", "fallback", "seconds")},
            trained=results[size.name].get("trained", False), notes=results[size.name].get("notes") or [],
        )
        for size in sizes
    ]  # fmt: skip
    return sorted(layers, key=lambda layer: (layer.fallback is None, -(layer.error or 0)))


def write_texts(report: RunReport, model: str, folder: Path, out: Path, load_from: str, watch: Progress) -> None:
    """Write the model card, unless someone has edited it, and report.md; both follow from report.json alone.

    `model` is what the user called the original, `folder` where it lies.
    """
    if is_edited(out / CARD):
        watch.say(f"{out / CARD} was edited since it was written: it is left as it is")
    else:
        write_atomic(out / CARD, card_text(report, model, folder, load_from).encode())
    write_atomic(out / "report.md", render("report.md.j2", **dict(report)).encode())
