"""Reports and cards: whatever stands in them, they are read, written anew, or refused in one sentence."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from ultralowbit.cli.app import app
from ultralowbit.errors import InputError
from ultralowbit.progress import Silent
from ultralowbit.report.card import passed_on
from ultralowbit.report.run import Texts, compress_and_measure

FRONT = """---
license: apache-2.0
license_name: mine
language: [en, de]
tags: [text-generation]
base_model: org/name
pipeline_tag: text-generation
model-index:
- name: x
  results: []
---
# A model
"""


@pytest.fixture(scope="session")
def measured(source, every_format, text, tmp_path_factory) -> Path:
    """What `ultralowbit compress` leaves behind, measured on a text."""
    out = tmp_path_factory.mktemp("measured") / "out"
    texts = Texts((text,), context=16, max_tokens=64)
    compress_and_measure(str(source), every_format, out, texts, watch=Silent(), thorough=False)
    return out


def test_a_report_that_was_edited_is_measured_again_or_the_same(measured, source, every_format, text, corrupt):
    """Of a figure that was edited nobody can tell: what is asked is that nothing foreign is raised."""
    texts = Texts((text,), context=16, max_tokens=64)

    def read(folder: Path) -> bool:
        compress_and_measure(str(source), every_format, folder, texts, watch=Silent(), thorough=False)
        return True

    corrupt(measured, ["report.json"], read, 60)


def test_comparing_reports_that_were_edited(measured, corrupt, tmp_path):
    runner = CliRunner()

    def read(folder: Path) -> bool:
        result = runner.invoke(app, ["compare", str(folder), "--out", str(tmp_path / "comparison")])
        if result.exit_code in (1, 2) and result.stderr.startswith("error: ") and "unexpected" not in result.stderr:
            assert str(folder) in result.stderr, result.stderr
            raise InputError(result.stderr.removeprefix("error: ").strip())
        assert result.exit_code == 0, f"{result.output} {result.exception!r}"
        return True

    corrupt(measured, ["report.json", "report.json", "manifest.json"], read, 100)


def test_front_matter_that_was_edited(source, corrupt, tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model/README.md").write_text(FRONT)
    (tmp_path / "model/LICENSE").write_text("MIT License\n\nCopyright")

    def read(folder: Path) -> bool:
        assert passed_on(folder).keys() <= {"license", "license_name", "license_link", "language", "pipeline_tag"}
        return True

    corrupt(tmp_path / "model", ["README.md", "LICENSE"], read, 100, ["bytes", "whole", "front"])
