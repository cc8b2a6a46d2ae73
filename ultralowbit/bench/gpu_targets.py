"""What a GPU is to reach, and what it has: the tables of `ultralowbit bench gpu`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

Results = dict[str, Any]
"""Name of a part -> what it measured."""


@dataclass(frozen=True)
class Target:
    """A number that is to be at least, or at most, `bound`; `measured` finds it in the results of its part, and raises
    `LookupError` or `ValueError` (the least of nothing) where it was not measured."""

    part: str
    what: str
    least: bool
    bound: float
    measured: Callable[[Any], float]

    def verdict(self, results: Results, judged: bool) -> dict[str, Any]:
        """What was measured, and whether it is met: None where nothing was, or where it is not judged."""
        try:
            value = float(self.measured(results[self.part]))
        except (LookupError, ValueError):
            value = None
        met = None if value is None or not judged else (value >= self.bound if self.least else value <= self.bound)
        return {
            "what": self.what, "target": f"{'>=' if self.least else '<='} {self.bound:g}", "measured": value, "met": met
        }  # fmt: skip


BIG, SQUARE = (8192, 28672), (4096, 4096)


def _rows(result: Any, formats: tuple[str, ...], tokens: int, shape: tuple[int, int] | None = None) -> Iterator[Any]:
    """The rows of some formats, all where none are named, with so many tokens."""
    for row in result["rows"]:
        here = shape is None or (row["out"], row["columns"]) == shape
        if here and row["tokens"] == tokens and (not formats or row["format"] in formats):
            yield row


ONE, TIED, TWO = ("1 plane", "1 plane g128"), ("2 tied planes g128",), ("2 planes g128",)


def _of_copy(formats: tuple[str, ...]) -> Callable[[Any], float]:
    """The least share of a copy's bandwidth among products of one token that read 29 MB or more."""
    return lambda result: min(
        row["of_copy"] for row in _rows(result, formats, 1) if row["bits"] * row["out"] * row["columns"] >= 8 * 29e6
    )


def _x_cublas(formats: tuple[str, ...], tokens: int) -> Callable[[Any], float]:
    return lambda result: min(row["x_cublas"] for row in _rows(result, formats, tokens, BIG))


def _x_bf16(batch: int) -> Callable[[Any], float]:
    return lambda result: min(
        row["x_bf16"]
        for row in result["whole"]
        if (row["format"], row["way"], row["batch"]) == ("1 plane", "compiled", batch)
    )


SMOLLM2 = 28.52
"""Perplexity of SmolLM2-135M-Instruct on the first 16,384 tokens of WikiText-2 test, in windows of 512."""


def _best(bits: str, seconds: bool = False) -> Callable[[Any], float]:
    """Of a row of SmolLM2 by this protocol: seconds, or the perplexity."""

    def measured(result: Any) -> float:
        row = next((row for row in result["rows"] if row["bits"] == bits), None)
        if row is None or abs(_perplexity(row, "original") - SMOLLM2) > 0.1 or (seconds and row["seconds"] is None):
            raise LookupError(bits)
        return row["seconds"] if seconds else _perplexity(row, "packed")

    return measured


def _perplexity(row: Any, label: str) -> float:
    return row["metrics"][label]["perplexity"][0]["perplexity"]


TARGETS = (
    Target("kernels", "one token, 29 MB and more, 1 plane: share of copy bandwidth", True, 0.70, _of_copy(ONE)),
    Target("kernels", "the same, 2 tied planes", True, 0.75, _of_copy(TIED)),
    Target("kernels", "8192 x 28672, one token, 1 plane: times cuBLAS", True, 9, _x_cublas(ONE[:1], 1)),
    Target("kernels", "the same, 2 tied planes", True, 5, _x_cublas(TIED, 1)),
    Target("kernels", "the same, 2 planes", True, 4.5, _x_cublas(TWO, 1)),
    Target(
        "kernels", "4096 x 4096, one token, 1 plane, in a graph: us", False, 3,
        lambda result: min(row["us"] for row in _rows(result, ONE[:1], 1, SQUARE)),
    ),
    Target("kernels", "16 tokens, 1 plane: times cuBLAS", True, 5, _x_cublas(ONE[:1], 16)),
    Target("kernels", "64 tokens, 1 plane: times cuBLAS", True, 2.5, _x_cublas(ONE[:1], 64)),
    Target("kernels", "256 tokens, any format: times cuBLAS", True, 0.95, _x_cublas((), 256)),
    Target("kernels", "2048 tokens, any format: times cuBLAS", True, 0.95, _x_cublas((), 2048)),
    Target(
        "kernels", "4096 x 4096, one token, an eager call: us more than F.linear", False, 25,
        lambda result: max(row["us_alone"] - row["us_cublas_alone"] for row in _rows(result, (), 1, SQUARE)),
    ),
    Target("decode", "7B's shape, compiled, batch 1, 1 plane: times bf16", True, 4, _x_bf16(1)),
    Target("decode", "the same, batch 8", True, 3, _x_bf16(8)),
    Target("compress", "SmolLM2-135M, gptq-2bit, measuring included: s", False, 30, lambda result: result["seconds"]),
    Target("deep", "TinyLlama-1.1B's shape, sign-2-refined: s", False, 180, lambda result: result["whole_seconds"]),
    Target("eval", "measuring: times the forward passes", False, 1.2, lambda result: result["perplexity_ratio"]),
    Target("eval", "comparing: times the forward passes", False, 1.2, lambda result: result["divergence_ratio"]),
    Target("trained", "recipes that train and fail", False, 0, lambda result: result["failed"]),
    Target("tests", "tests that fail", False, 0, lambda result: result["failed"]),
    Target("tests", "the tests' time: s", False, 240, lambda result: result["seconds"]),
    *(
        Target("best", f"SmolLM2-135M, --bits {bits} --effort best: perplexity", False, bound, _best(bits))
        for bits, bound in (("2.05", 42), ("3.1", 31), ("2.6", 35), ("1.6", 65), ("1.05", 120))
    ),
    Target("best", "the first of them, measuring included: s", False, 600, _best("2.05", seconds=True)),
)  # fmt: skip


def verdicts(summary: dict[str, Any]) -> list[dict[str, Any]]:
    """Each target with what was measured; they are a GPU's, and judged on none else."""
    return [target.verdict(summary["results"], "cuda" in summary["machine"]) for target in TARGETS]


def summary_text(summary: dict[str, Any]) -> str:
    """summary.md: the machine, what became of each part, the targets, decoding."""
    about = ", ".join(f"{key} {value}" for key, value in summary["machine"].items())
    lines = ["# What was measured on this device", "", about, "", "| part | | seconds | |", "|---|---|---:|---|"]
    for name, part in summary["parts"].items():
        lines.append(f"| {name} | {part['status']} | {part['seconds']:.0f} | {part['reason'].replace('|', '/')} |")
    lines += ["", "## Targets, of an H200", ""]
    if "cuda" not in summary["machine"]:
        lines += ["This is no GPU: nothing here can meet or miss them.", ""]
    lines += ["| | target | measured | |", "|---|---:|---:|---|"]
    for row in summary["targets"]:
        value = "" if row["measured"] is None else f"{row['measured']:.4g}"
        verdict = {None: "" if value else "not measured", True: "met", False: "**missed**"}[row["met"]]
        lines.append(f"| {row['what']} | {row['target']} | {value} | {verdict} |")
    decoded = summary["results"].get("decode", {}).get("whole")
    if decoded:
        lines += ["", "## Decoding", "", f"A step of {decoded[0]['layers']} blocks, from steps of fewer.", ""]
        lines += ["| format | step | batch | ms | times bf16 |", "|---|---|---:|---:|---:|"]
        lines += [f"| {r['format']} | {r['way']} | {r['batch']} | {r['ms']:.3f} | {r['x_bf16']:.2f} |" for r in decoded]
    return "\n".join(lines) + "\n"
