"""Results that others tell stand beside the runs of a comparison, and are never taken for measured ones."""

from __future__ import annotations

import re

import pytest
import yaml

from ultralowbit.errors import InputError
from ultralowbit.report.comparison import collect, write_comparison
from ultralowbit.report.figures import pictures
from ultralowbit.report.told import EXAMPLE, Told

PERPLEXITY = "perplexity on novels.txt"
ROWS = [
    {"name": "IQ2_XXS", "bits": 2.06, "values": {PERPLEXITY: 60.0}},
    {"name": "auto-round", "bits": 2.28, "file": 1.0e6, "values": {PERPLEXITY: 58.0}},
    {"name": "Q1_0", "bits": 1.1, "values": {PERPLEXITY: 1.0e6}},
    {"name": "no bits", "file": 2.0e6, "values": {PERPLEXITY: 90.0}},
]


@pytest.fixture
def told(tmp_path):
    def write(rows=ROWS, source="Their own code.", **more):
        path = tmp_path / "others.yaml"
        path.write_text(yaml.safe_dump({"source": source, "rows": rows, **more}))
        return path

    return write


def test_they_stand_beside_the_runs(run, build, told, tmp_path):
    folders = [run("a", "sign-2", 2.1, [build.perplexity(62.5)]), run("b", "gptq", 3.15, [build.perplexity(58.5)])]
    (section,) = collect(folders, tmp_path, told=[Told.read(told())])
    names = ["original", "gptq", "sign-2", "auto-round", "IQ2_XXS", "Q1_0", "no bits"]
    assert [row.label for row in section.rows] == names
    key = section.columns[0].key
    others = {row.label: row for row in section.rows if row.kind == "told"}
    assert others["IQ2_XXS"].mean("linear_bits") == 2.06 and others["IQ2_XXS"].mean(key) == 60.0
    assert others["auto-round"].metrics.keys() == {key, "linear_bits", "file_bytes"}
    # a size that is not told beats none
    on_front = {row.label: {size for _, size in row.on_front} for row in section.rows}
    assert on_front["IQ2_XXS"] == {"linear_bits"} and on_front["auto-round"] >= {"linear_bits"}
    assert not on_front["sign-2"] & {"linear_bits"} and on_front["no bits"] == set()
    (note,) = (note for note in section.notes if "told, not measured here" in note)
    assert note.endswith("Their own code.") and "auto-round" in note and "gptq" not in note
    plot = pictures(section)[0]
    assert "Squares are told by others" in plot.caption and "Triangles at the edge" in plot.caption
    plot.draw(640)


def test_the_page_and_the_table_have_them(run, build, told, tmp_path):
    folder = run("a", "sign-2", 2.1, [build.perplexity(62.5)])
    write_comparison([folder], tmp_path / "out", told=[told()])
    text = (tmp_path / "out/report.md").read_text()
    assert re.search(r"\| \*\*auto-round\*\* \| 58\.000 \| 2\.280 \|", text), text
    assert "told, not measured here" in text
    assert 'class="told"' in (tmp_path / "out/report.html").read_text()


def test_runs_that_are_gone_are_drawn_as_runs(run, build, told, tmp_path):
    folder = run("a", "sign-2", 2.1, [build.perplexity(62.5)])
    (section,) = collect([folder], tmp_path, told=[Told.read(told(measured=True))])
    assert {row.kind for row in section.rows[1:]} == {"run"} and len(section.rows) == 2 + len(ROWS)
    (note,) = (note for note in section.notes if "of runs that are not at hand" in note)
    assert "auto-round" in note and "sign-2" not in note
    for plot in pictures(section):
        assert "told by others" not in plot.caption
        plot.draw(640)
    write_comparison([folder], tmp_path / "out", told=[told(measured=True)])
    assert "**auto-round**" in (tmp_path / "out/report.md").read_text()


@pytest.mark.parametrize(
    ("rows", "sentence"),
    [
        ([{"name": "x", "values": {"perplexity on other.txt": 3.0}}], r"which no run was measured on, .*novels\.txt"),
        ([{"name": "x", "values": {}}], "rows.0.values"),
        ([{"name": "x", "bits": -1, "values": {PERPLEXITY: 3.0}}], "rows.0.bits"),
        ([{"name": "x", "bits": "two", "values": {PERPLEXITY: 3.0}}], "rows.0.bits"),
        ([{"name": "x", "bpw": 2, "values": {PERPLEXITY: 3.0}}], "rows.0.bpw"),
        ([], "rows"),
    ],
)
def test_mistakes_are_named_before_anything_is_written(run, build, told, tmp_path, rows, sentence):
    folder = run("a", "sign-2", 2.1, [build.perplexity(62.5)])
    with pytest.raises(InputError, match=sentence):
        write_comparison([folder], tmp_path / "out", told=[told(rows)])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("content", [b"\xff\xfe", b"rows: [", b"just words", b""])
def test_other_files_are_refused(tmp_path, content):
    path = tmp_path / "x.yaml"
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"x\.yaml"):
        Told.read(path)
    with pytest.raises(InputError, match="cannot be read"):
        Told.read(tmp_path / "none.yaml")


def test_the_example_is_one(tmp_path):
    (tmp_path / "x.yaml").write_text(EXAMPLE)
    assert Told.read(tmp_path / "x.yaml").rows[0].bits == 2.06
