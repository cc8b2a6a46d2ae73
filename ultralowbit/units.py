"""How bytes, seconds and measured numbers are printed, said once."""

from __future__ import annotations

import math
import re
from collections.abc import Callable

from ultralowbit.errors import InputError


def format_seconds(seconds: float) -> str:
    """12 s, 3:05 or 1:02:03."""
    minutes, s = divmod(round(seconds), 60)
    hours, m = divmod(minutes, 60)
    return f"{hours}:{m:02}:{s:02}" if hours else f"{m}:{s:02}" if m else f"{s} s"


def format_bytes(count: float) -> str:
    """Bytes for people, in powers of 1000 as file managers and model hubs count."""
    if count < 1000:
        return f"{count:.0f} bytes"
    power = min(4, int(math.log10(count) / 3))
    value = count / 1000**power
    return f"{value:.{0 if value >= 100 else 1 if value >= 10 else 2}f} {'kMGT'[power - 1]}B"


def parse_bytes(text: str) -> int:
    """Bytes from 60MB, 1.5 GB, 900MiB or a plain number; `InputError` for anything else."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(?:([kKMGT]?)(i?)B?)\s*", text)
    if match is None:
        raise InputError(f"{text!r} is no size: give bytes with a unit, such as 60MB, 1.5GB or 900MiB")
    number, prefix, binary = match.groups()
    return int(float(number) * (1024 if binary else 1000) ** " KMGT".index(prefix.upper() or " "))


def format_number(value: float | str) -> str:
    """A perplexity with as many digits as mean something; takes the strings that `strict` makes of nan and inf."""
    value = float(value)
    if not math.isfinite(value):
        return str(value)
    return f"{value:,.0f}" if value >= 1000 else f"{value:.2f}" if value >= 100 else f"{value:.3f}"


_QUANTITIES: dict[str, Callable[[float], str]] = {
    "perplexity": format_number,
    "bits": "{:.3f}".format,
    "claimed": "{:.2f}".format,
    "bytes": format_bytes,
    "times": "{:.2f} x".format,
    "seconds": lambda seconds: f"{seconds:.1f} s" if seconds < 20 else format_seconds(seconds),
    "percent": lambda share: f"{100 * share:.1f} %",
    "nats": "{:.3g}".format,
}


def format_quantity(value: float, unit: str) -> str:
    """A measured number in its unit: perplexity, bits, claimed, bytes, times, seconds, percent, nats; any other unit
    gets four digits."""
    return _QUANTITIES.get(unit, "{:.4g}".format)(value)
