"""What report.json of a run, of the demo and of a comparison hold: one schema that writes them and reads them back."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_serializer

from ultralowbit.eval.base import Column
from ultralowbit.eval.fidelity import Depth
from ultralowbit.eval.schema import File, Record, Results
from ultralowbit.recipe import Recipe

REPORT = "report.json"
ORIGINAL = "original"
"""The label of the row of the model that was compressed."""


class SizeRecord(Record):
    """`ultralowbit.checkpoint.size.Size` without its layers; bytes, unless the name says bits or weights."""

    model_config = ConfigDict(from_attributes=True)

    linear_bytes: int
    linear_weights: int
    linear_bits_per_weight: float | None
    claimed_bits: float | None
    total_bytes: int
    total_weights: int
    model_bits_per_weight: float
    model_bits_before: float
    """If a packed embedding and head had 16 bits."""
    header_bytes: int
    file_bytes: int
    fp16_bytes: int
    compression: float
    budget: dict[str, int]
    other: dict[str, int]

    @property
    def bits(self) -> float:
        """Bits per Linear weight; an unpacked checkpoint stores all its weights alike."""
        return self.model_bits_per_weight if self.linear_bits_per_weight is None else self.linear_bits_per_weight


class Row(Record):
    """One model: a line of the table, and all that it is drawn from."""

    label: str
    size: SizeRecord
    metrics: Results = Field(default_factory=dict)
    not_measured: str | None = None
    """Why nothing was measured, in words."""
    divergence_by_depth: Depth | None = None
    seconds: float | None = None
    """Work on the blocks; None for an original."""
    peak_memory_bytes: int | None = None
    plane_sparsity: list[float] = Field(default_factory=list)
    """Share of zeros in each 0/1 plane of all packed Linears together."""


class PackedLinear(Record):
    """A packed Linear, and how far its output is off."""

    name: str
    shape: tuple[int, int]
    """(out, in)"""
    format: str
    bits_per_weight: float
    error: float | None
    """Share of the energy of its output that is lost on the calibration text; None where that was not measured."""
    trained: bool = False
    """Whether it was trained since: the error is that of what was packed before."""
    least_error: float | None = None
    """The share that any code of as many bits loses at least, for Gaussian rows: the rate-distortion bound."""
    fallback: str | None
    """Why it was rounded to nearest instead, in words."""

    @property
    def times_bound(self) -> float | None:
        """The error, divided by the least that is possible."""
        return self.error / self.least_error if self.error and self.least_error else None


class Layer(PackedLinear):
    """A packed Linear of one run, with what it takes."""

    parts: dict[str, int]
    claimed_bits: float
    bytes: int
    notes: list[str] = Field(default_factory=list)
    seconds: float | None = None


class CalibrationRecord(BaseModel):
    """The text that was calibrated on."""

    source: str
    samples: int
    length: int
    seed: int
    sha256: str


class Environment(Record):
    """Versions and hardware, of which more than these may be recorded."""

    model_config = ConfigDict(extra="allow")

    ultralowbit: str
    torch: str
    transformers: str
    python: str
    device: str
    threads: int


class ManifestRecord(Record):
    """The manifest that a report belongs to."""

    path: str
    sha256: str


class LeftOut(Record):
    """A part of the original that the packed model has no place for."""

    tensors: int
    weights: int


@dataclass(frozen=True)
class Limits:
    """What a compression may cost at most, on each text."""

    ppl_ratio: float | None = None
    """Perplexity of the packed model divided by that of the original."""
    kl: float | None = None
    """Mean KL divergence from the original, nats per token."""

    def __bool__(self) -> bool:
        return self.ppl_ratio is not None or self.kl is not None


class Written(Record):
    """What the packed model writes after the beginning of a text."""

    prompt: str
    text: str
    share: float
    """Share of the tokens of `text` that are the most frequent one."""
    repeats: bool
    """Whether it repeats itself where the original does not."""


class Sample(Record):
    """What both models write after a prompt, the likeliest token each time."""

    prompt: str
    original: str | None
    """None where it was not run."""
    packed: str


class RunReport(File):
    """report.json of a folder that `compress` wrote. It names models, texts and folders without their paths."""

    kind: Literal["run"] = "run"
    created: str
    command: str | None
    folder: str
    model: str
    recipe: Recipe
    manifest: ManifestRecord
    vocabulary: int | None
    calibration: CalibrationRecord | None
    original: Row
    packed: Row
    layers: list[Layer]
    """Those that fell back first, then by error, the largest first."""
    environment: Environment
    fallbacks: dict[str, str] = Field(default_factory=dict)
    notes: dict[str, list[str]] = Field(default_factory=dict)
    left_out: dict[str, LeftOut] = Field(default_factory=dict)
    seen: dict[str, float] = Field(default_factory=dict)
    """Of each text that it is measured on, the share of the calibration text that stands in it, where there is any."""
    unlike: str | None = None
    """The text that it was measured on because none was named, where that is not what it was calibrated on."""
    continuation: Written | None = None
    samples: list[Sample] = Field(default_factory=list)
    limits: Limits = Limits()
    exceeded: list[str] = Field(default_factory=list)
    """A sentence for each limit that does not hold."""
    collapsed: list[str] = Field(default_factory=list)
    """The texts that the packed model predicts worse than a guess, and the original does not."""
    hopeless: list[str] = Field(default_factory=list)
    """The texts that the original predicts worse than a guess."""
    advice: str = ""

    @field_serializer("recipe")
    def _plain(self, recipe: Recipe) -> dict[str, Any]:
        return recipe.model_dump(mode="json")


class DemoRow(Row):
    """One recipe of the demo, or its original."""

    sample: str
    collapsed: list[str] = Field(default_factory=list)
    fallbacks: dict[str, str] = Field(default_factory=dict)


class DemoReport(File):
    """report.json of `ultralowbit demo`."""

    kind: Literal["demo"] = "demo"
    command: str | None
    key: dict[str, Any]
    """All that the result depends on."""
    manifests: dict[str, str]
    """Recipe -> sha256 of its manifest."""
    prompt: str
    calibration: CalibrationRecord | None
    environment: Environment
    rows: list[DemoRow]


class Value(Record):
    """A number of a comparison: of one run, or of several that differ in the seed."""

    mean: float
    std: float | None = None
    values: list[float]


class Provenance(Record):
    """What every number of a run can be traced to."""

    folder: str
    """From the folder of the comparison."""
    manifest: str
    sha256: str
    model: str
    recipe: str
    seed: int
    command: str | None
    calibration: CalibrationRecord | None
    environment: Environment
    collapsed: list[str]
    fallbacks: dict[str, str]


class ComparedLayer(PackedLinear):
    """A packed Linear of a row; its errors are means over seeds."""


class ComparedRow(Record):
    """A line of a comparison."""

    label: str
    kind: Literal["original", "run", "reference", "told"]
    on_front: list[tuple[str, str]] = Field(default_factory=list)
    """Keys of the quality and of the size that nothing else beats in both."""
    metrics: dict[str, Value]
    """By the keys of the columns."""
    budget: dict[str, int]
    linear_weights: int
    layers: list[ComparedLayer] = Field(default_factory=list)
    by_depth: Depth | None = None
    written: dict[str, str] = Field(default_factory=dict)
    """Prompt -> what the model writes after it; of the first seed."""
    runs: list[Provenance] = Field(default_factory=list)

    def mean(self, key: str) -> float:
        """The number in a column; nan where there is none."""
        return self.metrics[key].mean if key in self.metrics else float("nan")


class ComparedModel(Record):
    """The original that the runs of a section were made from."""

    name: str
    sha256: str
    weights: int
    fp16_bytes: int
    vocabulary: int | None


class Section(Record):
    """All that compares with one original."""

    model: ComparedModel
    columns: list[Column]
    rows: list[ComparedRow]
    notes: list[str]
    slug: str = ""
    plots: list[str] = Field(default_factory=list)


class Failure(Record):
    """A run that gave no result."""

    label: str
    model: str
    error: str


class Comparison(File):
    """report.json of `ultralowbit compare` and `ultralowbit bench methods`."""

    kind: Literal["comparison"] = "comparison"
    created: str
    command: str | None
    title: str
    sections: list[Section]
    failed: list[Failure] = Field(default_factory=list)
    tracks: dict[str, Any] | None = Field(None, description="ratios to the original, see ultralowbit.eval.tracks")
