"""The model card of a packed checkpoint: a README.md with the fields that the hub reads and what its report found."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCardData

from ultralowbit.checkpoint.storage import sha256_file

CARD = "README.md"
_PASSED_ON = ("license", "license_name", "license_link", "language", "pipeline_tag")
_LICENSES = {  # what the text of a licence file begins with -> the hub's name of it
    "apache-2.0": r"\s*apache license\s+version 2\.0",
    "mit": r"\s*(the )?mit license",
    "bsd-3-clause": r"\s*bsd 3-clause license",
    "cc0-1.0": r"\s*(creative commons legal code\s+)?cc0 1\.0 universal",
}


def hub_id(model: str, folder: Path) -> str | None:
    """The name on the hub of the model whose files are in `folder`, if it is from there: what was asked for, or what
    the hub's cache is called."""
    cached = re.search(r"models--(.+?)--(.+?)/snapshots/", f"{folder}/")
    if cached:
        return f"{cached[1]}/{cached[2]}"
    return None if Path(model).expanduser().is_dir() else model.partition("@")[0]


def passed_on(source: Path) -> dict[str, Any]:
    """What the source says of itself and what holds for its compressed form too: licence, language, task.

    From the front matter of its README.md; without a licence there, from a licence file.
    """
    found: dict[str, Any] = {}
    try:
        text = (source / CARD).read_text(encoding="utf-8")
        front = re.match(r"\s*---\s*\n(.*?)\n---\s*(\n|$)", text, re.DOTALL)
        data = yaml.safe_load(front[1]) if front else None
        if isinstance(data, dict):
            found = {key: data[key] for key in _PASSED_ON if data.get(key)}
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        pass  # a source without a card
    if "license" not in found:
        files = sorted(p for p in source.glob("LICENSE*") if p.is_file())
        for path in files:
            head = path.read_text(encoding="utf-8", errors="replace")[:400].lower()
            known = [name for name, pattern in _LICENSES.items() if re.match(pattern, head)]
            found |= (
                {"license": known[0]}
                if known
                else {
                    "license": "other", "license_name": "that-of-the-original", "license_link": path.name,
                }
            )  # fmt: skip
            break
    return found


def public(source: str) -> str:
    """A text's name without the folders of this machine."""
    path = Path(source).expanduser()
    return path.name if path.is_file() else source


def metadata(report: dict[str, Any], source: Path, name: str) -> ModelCardData:
    """The front matter."""
    recipe, base = report["recipe"], hub_id(report["model"], source)
    methods = [recipe["quantize"]["method"], *(override["quantize"]["method"] for override in recipe["overrides"])]
    results = [
        EvalResult(
            task_type="text-generation",
            dataset_type=public(p["source"]),
            dataset_name=public(p["source"]),
            metric_type="perplexity",
            metric_name=f"perplexity, {p['windows']} windows of {p['context']} tokens, {p['dtype']}",
            metric_value=round(p["perplexity"], 4),
        )
        for p in report["packed"]["perplexity"]
        if math.isfinite(p["perplexity"])
    ]
    return ModelCardData(
        **{"pipeline_tag": "text-generation", **passed_on(source)},
        base_model=base,
        base_model_relation="quantized" if base else None,
        library_name="transformers",
        tags=[*dict.fromkeys(["ultralowbit", "quantized", recipe["name"], *methods])],
        recipe=recipe["name"],
        model_name=name,
        eval_results=results or None,
    )


def values(report: dict[str, Any], source: Path, name: str, load_from: str) -> dict[str, Any]:
    """What the template is filled with: the report, and the front matter."""
    before, after, near = (
        [{**p, "source": public(p["source"])} for p in report[row][key]]
        for row, key in (("original", "perplexity"), ("packed", "perplexity"), ("packed", "fidelity"))
    )
    known = {p["sha256"]: p for p in before}
    calibration = report["calibration"]
    return {
        **report,
        "original": {**report["original"], "perplexity": before},
        "packed": {**report["packed"], "perplexity": after, "fidelity": near},
        "calibration": calibration and {**calibration, "source": public(calibration["source"])},
        "collapsed": [public(source) for source in report["collapsed"]],
        "name": name,
        "load_from": load_from,
        "base": hub_id(report["model"], source),
        "original_name": source.resolve().name,
        "front_matter": metadata(report, source, name).to_yaml(),
        "pairs": [(known[p["sha256"]], p) for p in after if p["sha256"] in known],
        "loss": loss,
    }


def loss(before: dict[str, Any], after: dict[str, Any]) -> str:
    """How much worse the second perplexity is, in words."""
    a, b = float(before["nll"]), float(after["nll"])
    if not math.isfinite(b):
        return "the model is broken"
    percent = 100 * math.expm1(b - a)
    return f"{percent:+.3g} %, {b - a:+.3f} nats a token"


def edited(out: Path) -> bool:
    """Whether the card in a packed folder is another than the one whose hash its report.json holds."""
    try:
        ours = json.loads((out / "report.json").read_text(encoding="utf-8"))["card"]["sha256"]
    except (OSError, ValueError, KeyError, TypeError):
        ours = None
    path = out / CARD
    return path.exists() and sha256_file(path) != ours
