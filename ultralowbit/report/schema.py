"""What report.json holds."""

from __future__ import annotations

import math
from typing import Any

from ultralowbit.eval.fidelity import Fidelity
from ultralowbit.eval.perplexity import Perplexity

SCHEMA_VERSION = 1


def stored_perplexity(stored: dict[str, Any]) -> Perplexity:
    return Perplexity(**{**stored, "perplexity": float(stored["perplexity"]), "nll": float(stored["nll"])})


def stored_fidelity(stored: dict[str, Any]) -> Fidelity:
    return Fidelity(**{**stored, **{key: float(stored[key]) for key in ("kl_mean", "kl_median", "kl_p99")}})


def strict(value: Any) -> Any:
    """The same value in strict JSON."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, dict):
        return {key: strict(inner) for key, inner in value.items()}
    return [strict(inner) for inner in value] if isinstance(value, list | tuple) else value
