"""The original and the packed model of one run: measured side by side where there is room, else one by one."""

from __future__ import annotations

import logging
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ultralowbit.checkpoint.files import Source
from ultralowbit.checkpoint.packed import packed_weight
from ultralowbit.eval.base import Measured, without_original
from ultralowbit.eval.metric import METRICS, by_metric
from ultralowbit.eval.runner import (
    EvalText,
    known_results,
    measure_alone,
    measure_beside,
    measure_depth,
    open_model,
    too_large,
)
from ultralowbit.format.weight import Format
from ultralowbit.hub import open_tokenizer
from ultralowbit.progress import Progress
from ultralowbit.report.gates import Continuation, continuations
from ultralowbit.report.schema import RunReport, Sample, Written
from ultralowbit.system import release

log = logging.getLogger(__name__)

START = 16
"""Tokens of a text that a model continues."""

PROMPTS = (
    "The capital of France is",
    "Once upon a time, there was a little girl who",
    "Water boils when",
    "Question: What is 7 plus 5?\nAnswer:",
    "def factorial(n):",
)
"""What every model is asked to continue: a fact, a story, an explanation, arithmetic and code."""


@dataclass(frozen=True)
class Models:
    """An original, what was made from it, and how both are run."""

    folder: Path
    """Of the original."""
    packed: Path
    device: torch.device
    dtype: torch.dtype
    trust_remote_code: bool
    watch: Progress
    model: str
    """What the user called the original."""
    recipe: str
    _kept: dict[Path, PreTrainedModel] = field(default_factory=dict, init=False, repr=False)

    def measure(self, report: RunReport, texts: list[EvalText], known: Measured, thorough: bool) -> None:
        """Fill in all that is measured on the texts; what the report or `known` holds of them already stands."""
        before, after = _joined(known, report.original.metrics), report.packed.metrics
        missing = [text for text in texts if len(self._known(after, text)) < len(METRICS)]
        if thorough and missing and self._fit_together(missing):
            both = measure_beside(
                self.folder, [self.packed], missing, self.device, dtype=self.dtype,
                trust_remote_code=self.trust_remote_code, progress=self.watch, opening=self._open,
            )  # fmt: skip
            before, after = _joined(before, both.original), _joined(after, both.models[0])
        relative = by_metric([self._known(after, text, relative=True) for text in texts])
        report.packed.metrics = {**self._alone(self.packed, texts, after, self.recipe), **relative}
        report.original.not_measured = self._no_room(texts, before)
        room = report.original.not_measured is None
        report.original.metrics = self._alone(self.folder, texts, before, "original") if room else {}
        if thorough and texts:
            self._measure_depth(report, texts[0])
            if report.continuation is None:
                self._let_write(report, texts[0], room)
        self._drop()

    def _open(self, folder: Path, device: torch.device, dtype: torch.dtype, trust_remote_code: bool) -> PreTrainedModel:
        """A model that is opened once for all that is measured of it, unless there is no room for both."""
        if folder not in self._kept:
            if self._kept:
                self._too_large(folder)  # which makes room
            self._kept[folder] = open_model(folder, device, dtype, trust_remote_code)
        return self._kept[folder]

    def _drop(self) -> None:
        self._kept.clear()
        release(self.device)

    def _known(self, known: Measured, text: EvalText, relative: bool = False) -> dict[str, Any]:
        names = [name for name, metric in METRICS.items() if metric.needs_original or not relative]
        return known_results(known, text, self.dtype, names)

    def _alone(self, folder: Path, texts: list[EvalText], known: Measured, label: str) -> Measured:
        return measure_alone(
            folder, texts, self.device, dtype=self.dtype, known=known, trust_remote_code=self.trust_remote_code,
            progress=self.watch, label=label, opening=self._open,
        )  # fmt: skip

    def _too_large(self, *folders: Path) -> str | None:
        """Say why these should not be in memory together; what else is kept is dropped where it leaves them no room."""
        wanted = [(folder, self.dtype) for folder in folders]
        why = too_large([each for each in wanted if each[0] not in self._kept], self.device)
        if why and self._kept:
            self._drop()
            why = too_large(wanted, self.device)
        return why

    def _fit_together(self, texts: list[EvalText]) -> bool:
        """Whether both models fit into memory; if not, says what to do instead."""
        why = self._too_large(self.folder, self.packed)
        if why:
            self.watch.say(
                f"the divergence from the original is not measured, since running both {why}: "
                f"`ultralowbit eval {self.packed} --fidelity {self.model} --ppl TEXT` runs one after the other"
            )
        return why is None

    def _no_room(self, texts: list[EvalText], known: Measured) -> str | None:
        """Why the original cannot be measured, in words; None where it can be or has been."""
        alone = without_original(METRICS)
        if all(len(known_results(known, text, self.dtype, alone)) == len(alone) for text in texts):
            return None
        why = self._too_large(self.folder)
        if why:
            log.warning("the original is not measured: it %s", why)
        return why and f"not measured: it {why}"

    def _measure_depth(self, report: RunReport, text: EvalText) -> None:
        near = report.packed.metrics.get("fidelity")
        if near and not report.packed.divergence_by_depth and not self._too_large(self.folder, self.packed):
            report.packed.divergence_by_depth = measure_depth(
                self.folder, self.packed, text, self.device, dtype=self.dtype,
                trust_remote_code=self.trust_remote_code, progress=self.watch.counter("divergence by depth"),
                opening=self._open,
            )  # fmt: skip

    def _let_write(self, report: RunReport, text: EvalText, room: bool) -> None:
        """What the models write after the beginning of a text, and after each prompt; that the packed model repeats a
        token is no collapse if the original does so too."""
        packed = self._written(self.packed, text, self.recipe)
        original = self._written(self.folder, text, "original") if room else {}
        first, usual = packed.pop(None), original.pop(None, None)
        repeats = first.repeats and not (usual is not None and usual.repeats)
        report.continuation = Written(prompt=first.prompt, text=first.text, share=first.share, repeats=repeats)
        report.samples = [
            Sample(prompt=prompt, original=original[prompt].text if original else None, packed=written.text)
            for prompt, written in packed.items()
        ]

    def _written(self, folder: Path, text: EvalText, label: str) -> dict[str | None, Continuation]:
        """Continuations by prompt, that of the text under None."""
        model = self._open(folder, self.device, self.dtype, self.trust_remote_code)
        tokenizer, rows = open_tokenizer(folder, self.trust_remote_code), model.get_input_embeddings().num_embeddings
        starts: dict[str | None, Tensor] = {None: text.tokens[:START]}
        for prompt in PROMPTS:
            ids = tokenizer(prompt, return_tensors="pt")["input_ids"][0]
            if len(ids) and ids.max() < rows:  # a tokenizer may have words that the model has not
                starts[prompt] = ids.long()
        written = continuations(
            model, tokenizer, [*starts.values()], progress=self.watch.counter(f"{label}: writing")
        )  # fmt: skip
        return dict(zip(starts, written, strict=True))


def _joined(first: Measured, second: Measured) -> Measured:
    return {name: [*first.get(name, ()), *second.get(name, ())] for name in METRICS}


def plane_sparsity(out: Path, manifest: dict[str, Any]) -> list[float]:
    """The share of zeros in each 0/1 plane of all packed Linears together, from the stored bits."""
    source, zeros, weights = Source(out), Counter(), Counter()
    for name, layer in manifest["layers"].items():
        format, (rows, columns) = Format.from_dict(layer["layout"]), layer["shape"]
        if not any(getattr(segment, "alphabet", None) == "01" for segment in format.segments):
            continue
        packed = packed_weight(name, layer, source.read([f"{name}.{part}" for part in format.row_axes]))
        for plane, share in enumerate(packed.sparsity):
            zeros[plane] += share * rows * columns
            weights[plane] += rows * columns
    return [zeros[plane] / weights[plane] for plane in sorted(weights)]
