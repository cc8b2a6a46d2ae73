"""The model card of a packed checkpoint: a README.md with the fields that the hub reads and what its report says."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from ultralowbit.checkpoint.card import CARD, signed
from ultralowbit.errors import InputError
from ultralowbit.eval.base import Metric, Result, without_original
from ultralowbit.eval.metric import METRICS
from ultralowbit.recipe import read_yaml
from ultralowbit.report.schema import RunReport
from ultralowbit.report.tables import render

_FRONT_BYTES = 1 << 16  # of a README.md that are looked at
_PASSED_ON = {"license": str, "license_name": str, "license_link": str, "language": list, "pipeline_tag": str}
_LICENSES = {  # what the text of a licence file begins with -> the hub's name of it
    "apache-2.0": r"\s*apache license\s+version 2\.0",
    "mit": r"\s*(the )?mit license",
    "bsd-3-clause": r"\s*bsd 3-clause license",
    "cc0-1.0": r"\s*(creative commons legal code\s+)?cc0 1\.0 universal",
}


def hub_id(model: str, folder: Path) -> str | None:
    """Name on the hub of the model whose files are in `folder`, or None if it is not from there.

    It is what the user asked for, or what the hub's cache is called.
    """
    cached = re.search(r"models--(.+?)--(.+?)/snapshots/", f"{folder}/")
    if cached:
        return f"{cached[1]}/{cached[2]}"
    return None if Path(model).expanduser().exists() else model.partition("@")[0]


def passed_on(source: Path) -> dict[str, Any]:
    """What the source says of itself that holds for its compressed form too: licence, language, task.

    It is taken from the front matter of its README.md, where values of another type than the hub's are ignored, as is
    front matter that is no plain YAML; without a licence there, from a licence file.
    """
    fields = _front_matter(source / CARD)
    kept = {key: value for key in _PASSED_ON if (value := _plain(fields.get(key), _PASSED_ON[key])) is not None}
    files = sorted(path for path in source.glob("LICENSE*") if path.is_file())
    if "license" not in kept and files:
        head = _head(files[0], 400).decode("utf-8", "replace").lower()
        known = next((name for name, pattern in _LICENSES.items() if re.match(pattern, head)), None)
        other = {"license": "other", "license_name": "that-of-the-original", "license_link": files[0].name}
        kept |= {"license": known} if known else other
    return kept


def _front_matter(path: Path) -> dict[str, Any]:
    """The front matter of a card; empty where there is none that can be read."""
    if not path.is_file():
        return {}
    try:
        text = _head(path, _FRONT_BYTES).decode("utf-8", "ignore")
        match = re.match(r"\s*---\s*\n(.*?)\n---\s*(\n|$)", text, re.DOTALL)
        fields = read_yaml(match[1], str(path)) if match else None
    except (OSError, InputError):
        return {}
    return fields if isinstance(fields, dict) else {}


def _head(path: Path, size: int) -> bytes:
    with path.open("rb") as f:
        return f.read(size)


def _plain(value: Any, kind: type) -> Any:
    """A text, or where `kind` is list also a list of texts; None for anything else."""
    if isinstance(value, str) and 0 < len(value) <= 200:
        return value
    texts = kind is list and isinstance(value, list) and 0 < len(value) <= 300
    return value if texts and all(_plain(each, str) is not None for each in value) else None


def metadata(report: RunReport, base: str | None, source: Path, name: str) -> ModelCardData:
    """The front matter; `base` is the original's name on the hub, `source` its folder."""
    recipe = report.recipe
    methods = [recipe.quantize.method, *(override.quantize.method for override in recipe.overrides)]
    results = [
        _eval_result(metric, result)
        for key, metric in METRICS.items()
        for result in report.packed.metrics.get(key, ())
        if math.isfinite(getattr(result, metric.quantities[0].field))
    ]
    return ModelCardData(
        **{"pipeline_tag": "text-generation", **passed_on(source)},
        base_model=base,
        base_model_relation="quantized" if base else None,
        library_name="transformers",
        tags=[*dict.fromkeys(["ultralowbit", "quantized", recipe.name, *methods])],
        recipe=recipe.name,
        model_name=name,
        eval_results=results or None,
    )


def _eval_result(metric: Metric, result: Result) -> EvalResult:
    quantity = metric.quantities[0]
    return EvalResult(
        task_type="text-generation",
        dataset_type=result.source,
        dataset_name=result.source,
        metric_type=metric.name,
        metric_name=f"{quantity.said}, {result.windows} windows of {result.context} tokens, {result.precision}",
        metric_value=float(f"{getattr(result, quantity.field):.6g}"),  # a divergence may be tiny
    )


def card_text(report: RunReport, model: str, source: Path, load_from: str) -> str:
    """The card; `model` is what the user called the original, `source` its folder, `load_from` where users find the
    packed one: a name on the hub or of a folder."""
    base, name = hub_id(model, source), load_from.rpartition("/")[2]
    pairs = [
        metric.change(before, after)
        for key, metric in without_original(METRICS).items()
        for before in report.original.metrics.get(key, ())
        for after in report.packed.metrics.get(key, ())
        if (before.source, before.sha256) == (after.source, after.sha256)
    ]
    body = render("card.md.j2", **dict(report), name=name, load_from=load_from, base=base, changes=pairs)
    template = "---\n{{ card_data }}\n---\n\n{{ body }}"
    card = ModelCard.from_template(metadata(report, base, source, name), template_str=template, body=body.rstrip())
    text = str(card).rstrip("\n") + "\n\n"
    return signed(text)
