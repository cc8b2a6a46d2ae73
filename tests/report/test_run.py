"""Reports: strict JSON, a table that fits a terminal, and a collapse that nobody can miss."""

from __future__ import annotations

import io
import json
import math
import time

import pytest
from rich.console import Console

from ultralowbit.cli.console import Pace
from ultralowbit.cli.render import show
from ultralowbit.recipe import Recipe
from ultralowbit.report.run import collapsed, default_source, write
from ultralowbit.report.schema import stored_perplexity
from ultralowbit.report.tables import grid, table
from ultralowbit.units import format_bytes, format_seconds


def row(label: str, perplexity: float, packed: bool = True) -> dict:
    measured = {
        "source": "/some/where/python-docs", "perplexity": perplexity, "nll": math.log(perplexity), "windows": 20,
        "context": 2048, "tokens": 40940, "dtype": "float32", "bos": "text", "sha256": "a" * 64,
    }  # fmt: skip
    size = {
        "linear_bits_per_weight": 2.008 if packed else None, "claimed_bits": 2.0 if packed else None,
        "model_bits_per_weight": 5.584, "file_bytes": 2_939_160, "compression": 2.86,
    }  # fmt: skip
    return {
        "label": label, "size": size, "perplexity": [measured], "not_measured": None, "fidelity": [],
        "seconds": 3725.0 if packed else None, "peak_memory_bytes": 10**10 if packed else None,
    }  # fmt: skip


def whole(perplexity: float) -> dict:
    layer = {
        "name": "model.layers.0.q", "shape": [64, 64], "format": "64x1sign/row", "bits_per_weight": 1.25, "error": 0.1,
        "fallback": None,
    }  # fmt: skip
    names = ("ultralowbit", "torch", "transformers", "python", "device")
    return {
        "schema_version": 1, "created": "", "command": None, "folder": "out", "model": "m", "vocabulary": 96,
        "recipe": {"name": "sign-2", "summary": "two planes"}, "manifest": {"path": "manifest.json", "sha256": "b"},
        "calibration": None, "original": row("original", 7.25, packed=False), "packed": row("sign-2", perplexity),
        "collapsed": ["python-docs"] if collapsed(perplexity, 96) else [], "fallbacks": {}, "notes": {},
        "continuation": None, "exceeded": [], "advice": "Try more bits.", "layers": [layer],
        "environment": dict.fromkeys(names, "1"),
    }  # fmt: skip


@pytest.mark.parametrize("perplexity", [math.nan, math.inf])
def test_json_is_strict(tmp_path, perplexity):
    write(tmp_path, whole(perplexity))
    stored = json.loads((tmp_path / "report.json").read_text(), parse_constant=pytest.fail)
    assert stored["packed"]["perplexity"][0]["perplexity"] == str(perplexity)
    assert str(stored_perplexity(stored["packed"]["perplexity"][0]).perplexity) == str(perplexity)
    assert "**Collapsed.**" in (tmp_path / "report.md").read_text()


@pytest.mark.parametrize(("perplexity", "gone"), [(95.9, False), (96.5, True), (math.inf, True), (math.nan, True)])
def test_collapse_is_shouted(capsys, perplexity, gone):
    assert collapsed(perplexity, 96) is gone
    show(whole(perplexity))
    assert ("COLLAPSED" in capsys.readouterr().out) is gone


def test_the_table_fits_80_columns():
    terminal = Console(width=80, file=io.StringIO())
    terminal.print(table([row("original", 7.25, packed=False), row("sign-2-g128", 123456.0)]))
    text = terminal.file.getvalue()
    for part in ("original", "sign-2-g128", "7.250", "123,456", "2.008", "2.00", "2.94 MB", "1:02:05", "10.0 GB"):
        assert part in text
    assert "…" not in text


def test_columns_that_say_nothing_are_left_out():
    rows = [row("a", 2.0), row("b", 3.0)]
    for entry in rows:
        entry["peak_memory_bytes"] = None
    assert "peak memory" not in grid(rows)[0] and "time" in grid(rows)[0]


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (["calibration.source=wikitext2"], "wikitext2"),
        (["calibration.source=org/name"], "org/name"),
        (["calibration.source=self"], "python-docs"),
        (["calibration.source=pyproject.toml"], "python-docs"),
        (["quantize.method=rtn"], "python-docs"),  # reads no text, so none is to be fetched for it
    ],
)
def test_the_default_text(settings, expected):
    recipe = Recipe.model_validate({"name": "r", "quantize": {"method": "gptq"}})
    data = recipe.model_dump()
    for setting in settings:
        keys, value = setting.split("=")
        at = data
        for key in keys.split(".")[:-1]:
            at = at[key]
        at[keys.split(".")[-1]] = value
    if data["quantize"]["method"] == "rtn":
        data["quantize"] = {"method": "rtn"}
    assert default_source(Recipe.model_validate(data)) == expected


@pytest.mark.parametrize(
    ("count", "words"),
    [
        (0, "0 bytes"),
        (999, "999 bytes"),
        (1000, "1.00 kB"),
        (2_939_160, "2.94 MB"),
        (98_765_432, "98.8 MB"),
        (7e11, "700 GB"),
    ],
)
def test_bytes_in_words(count, words):
    assert format_bytes(count) == words


def test_time_in_words():
    assert [format_seconds(s) for s in (0.4, 12, 185, 3723)] == ["0 s", "12 s", "3:05", "1:02:03"]


def test_pace_leaves_out_what_an_earlier_run_did(monkeypatch):
    now = 0.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    pace = Pace("blocks", 10)
    pace.step(6)  # resumed
    assert pace.left is None
    now = 5.0
    pace.step(1)
    assert pace.left == 15.0
    now = 7.0
    assert pace.left == 13.0 and str(pace) == "7/10, 7 s elapsed, 13 s left"
