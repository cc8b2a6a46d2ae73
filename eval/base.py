"""What a metric is: numbers of a model, taken from its logits on windows of a text, and how they are shown.

A metric is one file with three parts: a `Result` with its numbers, an `Accumulator` that is fed batch by batch, and a
`Metric` that joins the two and says how each number is named and printed. `ultralowbit.eval.metric.METRICS` lists them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, Literal, Protocol

from torch import Tensor

from ultralowbit.units import format_quantity

Bos = Literal["none", "text"]
"""Which start token a text gets: see `ultralowbit.eval.windows.token_stream`."""


@dataclass(frozen=True, kw_only=True)
class Result:
    """What was measured on one text. The fields here say how; two results compare only where all of them agree."""

    source: str
    """Name of the text, without folders."""
    windows: int
    context: int
    """Tokens in a window, of which all but the first are predicted."""
    tokens: int
    """Predicted tokens."""
    dtype: str
    """Of the model's parameters."""
    original_dtype: str | None = None
    """Of the parameters of the original that the model was compared with; None where a metric needs no original."""
    bos: Bos = "text"
    sha256: str = ""
    """Digest of the token windows, see `ultralowbit.data.corpora.token_sha256`."""

    def to_dict(self) -> dict[str, Any]:
        """The fields; the numbers of a collapsed model stay nan or inf, which strict JSON lacks."""
        return asdict(self)

    @property
    def precision(self) -> str:
        """The dtype, and that of the original where it is another."""
        other = self.original_dtype not in (None, self.dtype)
        return f"{self.dtype} against {self.original_dtype}" if other else self.dtype

    @property
    def protocol(self) -> str:
        """How it was measured, in words."""
        special = ", no special tokens" if self.bos == "none" else ""
        return (
            f"{self.source}: {self.windows} windows of {self.context} tokens that do not overlap{special}, "
            f"{self.tokens:,} predicted, {self.dtype}, sha256 {self.sha256[:12]}"
        )


Measured = dict[str, list[Result]]
"""What was measured of one model: name of the metric -> one result for each text."""


class Accumulator(Protocol):
    """Takes one batch of windows after the other and makes a result of them."""

    def add(self, tokens: Tensor, logits: Tensor, original: Tensor | None) -> None:
        """Take a batch.

        tokens: int64 [batch, context]; logits: the model's, [batch, context, vocab], on the tokens' device; original:
        the original's logits of the same shape, which may be on another device, or None for a metric without one.
        """

    def result(self, how: Result) -> Result:
        """The result of all batches; its fields begin with those of `how`, as in `Perplexity(**vars(how), nll=nll)`."""


@dataclass(frozen=True)
class Quantity:
    """One number of a result, and how tables and plots show it."""

    field: str
    """The attribute of the result."""
    title: str
    """The head of its column, such as "KL mean, nats"."""
    unit: str
    """A key of `ultralowbit.units.format_quantity`."""
    better: Literal["lower", "higher"] | None
    said: str
    """What it is, in the words of a sentence, such as "KL divergence"."""
    drawn: bool = False
    """Whether the page of `compare` has a plot of it against size."""


@dataclass(frozen=True)
class Column:
    """A column of the page of `compare`: all its numbers compare."""

    key: str
    """Its name in report.json."""
    group: str
    """The heading above its title."""
    title: str
    unit: str
    better: Literal["lower", "higher"] | None = None
    protocol: str | None = None
    """How it was measured; None for what is counted."""
    windows: str = ""
    """What of the protocol is true of all that was measured on the same windows."""
    drawn: str = ""
    """Its name on the axis of a plot against size; empty for what is not drawn."""
    metric: str | None = None
    """Name of the metric, or "tasks"; None for what is counted."""
    relative: bool = False
    """Whether it is a distance from the original, whose own value is only what rounding it costs."""


Readings = dict[str, tuple[Column, float]]
"""What was measured of one model: the column's key -> the column and the number."""


class Metric(ABC):
    """One line of `METRICS`. A new one sets the five attributes, writes `start`, and is shown everywhere."""

    name: ClassVar[str]
    """Key in JSON files and of `METRICS`."""
    result: ClassVar[type[Result]]
    quantities: ClassVar[Sequence[Quantity]]
    """The numbers of a result; the first is the one that short tables and the model card name."""
    needs_original: ClassVar[bool] = False
    """Whether it compares with the original: then it is measured where both models run over the same windows."""

    @abstractmethod
    def start(self) -> Accumulator:
        """An accumulator for one model and one text."""

    def cells(self, result: Result) -> list[str]:
        """The numbers of a result as tables print them."""
        return [format_quantity(getattr(result, q.field), q.unit) for q in self.quantities]

    def sentence(self, result: Result) -> str:
        """The result in words, for report.md, the model card and the terminal."""
        numbers = [f"{q.said} {cell}" for q, cell in zip(self.quantities, self.cells(result), strict=True)]
        return f"{self.name} on {result.source}: {', '.join(numbers)}"

    def change(self, before: Result, after: Result) -> str:
        """What became of the first quantity of the original, in words."""
        first = self.quantities[0]
        return (
            f"{first.said} on {after.source} went from {self.cells(before)[0]} to {self.cells(after)[0]}"
            f"{self.loss(before, after)}"
        )

    def loss(self, before: Result, after: Result) -> str:
        """How large the change is, in words that follow the sentence of `change`; nothing unless a metric knows."""
        return ""

    def readings(self, result: Result, original: str = "", digest: str | None = None) -> Readings:
        """The columns of `compare` that a result stands in. `original` names what it was compared with; two of one name
        are told apart by the `digest` of their files, where that is known."""
        how = windows = result.protocol
        window = f"{result.sha256[:16]}:{result.dtype}:{result.bos}"
        if self.needs_original:
            how = f"{how}, against {original} in {result.original_dtype}"
            window = f"{digest or original}:{window}:{result.original_dtype}"
        alone = len(self.quantities) == 1
        readings = {}
        for q in self.quantities:
            axis = f"{q.said} on {result.source}{', nats' if q.unit == 'nats' else ''}" if q.drawn else ""
            column = Column(
                key=f"{q.field}:{window}",
                group=self.name if alone else f"{self.name} on {result.source}",
                title=result.source if alone else q.title,
                unit=q.unit, better=q.better, protocol=f"{q.said}, {how}", windows=windows, drawn=axis,
                metric=self.name, relative=self.needs_original,
            )  # fmt: skip
            readings[column.key] = column, getattr(result, q.field)
        return readings


def without_original(metrics: Mapping[str, Metric]) -> dict[str, Metric]:
    """Those that look at one model alone, and so can be measured of the original too."""
    return {name: metric for name, metric in metrics.items() if not metric.needs_original}
