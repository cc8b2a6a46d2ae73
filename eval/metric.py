"""The table of metrics. A new one is a file like `perplexity.py` and a line here: it is then measured by `eval` and
`compress`, and stands in their tables, in report.json, report.md and the model card, and on the page of `compare`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ultralowbit.eval.base import Measured, Metric, Readings, Result
from ultralowbit.eval.fidelity import FidelityMetric
from ultralowbit.eval.perplexity import PerplexityMetric

METRICS: dict[str, Metric] = {
    "perplexity": PerplexityMetric(),
    "fidelity": FidelityMetric(),
}


def by_metric(texts: Sequence[Mapping[str, Result]]) -> Measured:
    """The results on several texts, each by metric, as a list for each metric; metrics without results are left out."""
    return {name: results for name in METRICS if (results := [text[name] for text in texts if name in text])}


def sentences(measured: Measured) -> list[str]:
    """In words what tables of a model beside its original cannot hold: metrics with several numbers, or relative to
    the original."""
    return [
        metric.sentence(result)
        for name, metric in METRICS.items()
        if metric.needs_original or len(metric.quantities) > 1
        for result in measured.get(name, ())
    ]


def protocols(*rows: Measured) -> list[str]:
    """How the texts were measured, one line for each way: two numbers compare only where these lines agree."""
    results = (result for measured in rows for of_metric in measured.values() for result in of_metric)
    return list(dict.fromkeys(result.protocol for result in results))


def readings(measured: Measured, original: str = "", digest: str | None = None) -> Readings:
    """The columns of `compare` that the results stand in, see `Metric.readings`."""
    columns: Readings = {}
    for name, metric in METRICS.items():
        for result in measured.get(name, ()):
            columns |= metric.readings(result, original, digest)
    return columns
