"""Comparisons: what stands in one column compares, what does not stands apart, and the page is whole in itself."""

from __future__ import annotations

import itertools
import json
import math
import re
import shutil
import subprocess
from copy import deepcopy
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from ultralowbit.checkpoint.storage import json_digest, sha256_file
from ultralowbit.cli.app import app
from ultralowbit.errors import InputError
from ultralowbit.eval.fidelity import Depth
from ultralowbit.eval.schema import Evaluation, ModelResults, read_file, to_json, write_file
from ultralowbit.eval.scores import Score, averages
from ultralowbit.eval.zeroshot import ZeroShot
from ultralowbit.progress import Silent
from ultralowbit.report import labels, plots, style
from ultralowbit.report.columns import cell, how_measured
from ultralowbit.report.comparison import collect, front, write_comparison
from ultralowbit.report.figures import pictures
from ultralowbit.report.run import write_texts
from ultralowbit.report.runs import find_runs, read_run
from ultralowbit.report.schema import ComparedRow, Comparison, RunReport, Section

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


def tasks(value: float) -> ZeroShot:
    score = Score("", "acc", 0.0, 0.01, 0.25, documents=100, of=200, shots=0, version="1.0", higher_is_better=True)
    scores = [replace(score, task=name, value=value + i / 50) for i, name in enumerate("ab")]
    return ZeroShot(scores, averages(scores), 0, 200, 1.0, {"results": {"a": {"acc,none": 0}}})


@pytest.fixture
def evaluation(build):
    """evaluation(name=(perplexity, divergence, accuracy)): what `ultralowbit eval --fidelity models/tiny` writes."""

    def make(**models: tuple[float, float, float]) -> Evaluation:
        results = []
        for name, (p, kl, accuracy) in models.items():
            near = {"metrics": {"perplexity": [build.perplexity(p)], "fidelity": [build.fidelity(kl)]}}
            if name == "tiny":
                floor = build.fidelity(kl, dtype="bfloat16")
                near = {"metrics": {"perplexity": [build.perplexity(p)]}, "noise_floor": {"fidelity": [floor]}}
            results.append(ModelResults(model=name, **near, tasks=tasks(accuracy)))
        return Evaluation(created="", fidelity_to="models/tiny", results=results)

    return make


def rows(section: Section) -> dict[str, ComparedRow]:
    return {row.label: row for row in section.rows}


class Page(HTMLParser):
    """Tags that balance, links, the cells of tables, and ids."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open, self.links, self.ids, self.cells, self.loaded = [], [], [], [], []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attributes):
        values = dict(attributes)
        self.ids += [values["id"]] if "id" in values else []
        self.links += [values["href"]] if tag == "a" else []
        self.loaded += [values[key] for key in ("src", "srcset", "data") if key in values]
        self.loaded += [values["href"]] if tag in ("link", "image") else []
        if tag == "td":
            self.cells.append("")
        if tag not in ("meta", "link", "br", "img"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        if self.open and self.open[-1] == tag:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "td" in self.open[-2:]:
            self.cells[-1] += data


def test_the_page_is_whole_in_itself(run, build, tmp_path):
    a = run("runs/a<b>&c", "sign-<2>", 2.1, [build.perplexity(62.5)])
    b = run("runs/b", "gptq", 3.15, [build.perplexity(55.25)])
    out = tmp_path / "deep/out"
    write_comparison([a, b], out, command="ultralowbit compare <a>")
    text = (out / "report.html").read_text()
    page = Page(text)
    assert len(page.ids) == len({*page.ids})
    assert page.loaded == [] and "@import" not in text and "url(http" not in text
    assert not re.search(r'(src|href)="(https?:)?//', text)
    assert "sign-<2>" not in text and "sign-&lt;2&gt;" in text
    for link in page.links:
        assert (out / unquote(link)).exists(), link
    assert {"62.500", "55.250", "2.100", "50.000"} <= {*page.cells}
    for folder in (a, b):
        assert sha256_file(folder / "manifest.json") in text
    colours = {name: set(re.findall(rf"var\(--{name}\)", text)) for name in style.COLOURS}
    assert all(colours[name] for name in ("ink", "muted", "paper", "accent", "s1"))
    drawings = re.findall(r"<svg.*?</svg>", text, re.DOTALL)
    assert len(drawings) == 2 * len({*(out / "plots").glob("*.png")}) > 6
    for drawing in drawings:
        assert not {c.lower() for c in re.findall(r"#[0-9a-f]{6}\b", drawing)}, (
            "a colour that does not follow the theme"
        )
    assert any("<text" in d and ">gptq</text>" in d for d in drawings)  # text is text


def test_names_are_drawn_as_they_are(run, build, tmp_path):
    name = r"$\frac{a}$ x"
    write_comparison([run("a", name, 2.1, [build.perplexity(62.5, source=name)])], tmp_path / "out")
    pictures = [picture.read_text() for picture in (tmp_path / "out/plots").glob("*.svg")]
    assert any(f">{name}</text>" in picture for picture in pictures)


def test_the_same_numbers_in_json_and_markdown(run, build, tmp_path):
    folders = [run("a", "sign-2", 2.1, [build.perplexity(62.5)]), run("b", "g|ptq", 3.15, [build.perplexity(math.inf)])]
    write_comparison(folders, tmp_path / "out")
    stored = json.loads((tmp_path / "out/report.json").read_text(), parse_constant=pytest.fail)
    assert stored["sections"][0]["columns"][0]["group"] == "perplexity"
    (section,) = read_file(tmp_path / "out/report.json", Comparison, "").sections
    quality = section.columns[0].key
    means = {row.label: row.mean(quality) for row in section.rows}
    assert means == {"original": 50.0, "g|ptq": math.inf, "sign-2": 62.5}
    assert rows(section)["original"].mean("linear_bits") == 16
    markdown = (tmp_path / "out/report.md").read_text()
    header = next(line for line in markdown.splitlines() if line.startswith("|  |"))
    for line in markdown.splitlines():
        if "62.500" in line or "g\\|ptq |" in line:
            assert line.replace("\\|", "").count("|") == header.count("|")
    assert all((tmp_path / "out" / path).exists() for path in section.plots)
    html = (tmp_path / "out/report.html").read_text()
    assert "Triangles at the edge are off the scale: g|ptq (inf)." in html
    assert 'data-sort="Infinity"' in html and 'data-sort="inf"' not in html


def test_seeds_are_one_row(run, build, tmp_path):
    for seed, value in enumerate((60.0, 62.0, 64.0)):
        run(f"runs/{seed}", "sign-2", 2.1, [build.perplexity(value)], seed=seed)
    run("runs/other", "sign-2", 2.25, [build.perplexity(58.0)])
    (section,) = collect([tmp_path / "runs"], tmp_path)
    by_label = rows(section)
    (seeds,) = (row for row in by_label.values() if len(row.runs) == 3)
    quality = section.columns[0]
    value = seeds.metrics[quality.key]
    assert (value.mean, value.std, value.values) == (62.0, 2.0, [60.0, 62.0, 64.0])
    assert [run.seed for run in seeds.runs] == [0, 1, 2]
    assert len({*by_label}) == 3  # the two are told apart by their folders
    assert cell(seeds, quality) == "62.000 ± 2.000"


def test_the_seed_of_what_is_trained_on_is_a_seed_too(run, build, tmp_path):
    for seed in (0, 1):
        data = {"source": "c.txt", "seed": seed}
        run(f"runs/{seed}", "db-llm", 2.5, [build.perplexity(60.0)], seed=seed, trained_on=data)
    run("runs/more", "db-llm", 2.5, [build.perplexity(60.0)], trained_on={"source": "d.txt", "seed": 0})
    (section,) = collect([tmp_path / "runs"], tmp_path)
    assert sorted(len(row.runs) for row in rows(section).values() if row.kind == "run") == [1, 2]


def test_divergence_by_depth_is_drawn_for_those_on_the_same_windows(run, build, tmp_path):
    depth = Depth(source="w.txt", kl=(0.1, 0.3), tokens=10, windows=1, context=11, dtype="float32", sha256="a")
    for seed, kl in ((0, (0.1, 0.3)), (1, (0.3, 0.5))):
        by_depth = replace(depth, kl=kl)
        run(f"runs/{seed}", "sign-2", 2.1, [build.perplexity(60.0)], seed=seed, by_depth=by_depth)
    run("runs/other", "sign-1", 1.1, [build.perplexity(80.0)], by_depth=replace(depth, sha256="b"))
    run("runs/without", "gptq", 3.1, [build.perplexity(55.0)])
    (section,) = collect([tmp_path / "runs"], tmp_path)
    by_label = rows(section)
    assert by_label["sign-2"].by_depth.kl == pytest.approx((0.2, 0.4)) and by_label["gptq"].by_depth is None
    drawn = [plot.name for plot in pictures(section) if plot.name.startswith("divergence-by-depth")]
    assert drawn == ["divergence-by-depth", "divergence-by-depth-2"]


def test_the_same_run_twice_is_no_second_seed(run, build, tmp_path):
    folder = run("a", "sign-2", 2.1, [build.perplexity(62.5)])
    shutil.copytree(folder, tmp_path / "copy")
    (section,) = collect([folder, folder, tmp_path / "copy"], tmp_path)
    assert len(rows(section)["sign-2"].runs) == 1
    assert "is the same run as" in section.notes[0]


@pytest.mark.parametrize("change", [{"sha256": "b" * 64, "context": 512}, {"dtype": "bfloat16"}, {"bos": "none"}])
def test_other_windows_stand_apart(run, build, tmp_path, change):
    a = run("a", "sign-2", 2.1, [build.perplexity(62.5)])
    b = run("b", "gptq", 3.15, [build.perplexity(55.0, **change)])
    (section,) = collect([a, b], tmp_path)
    one, other = [column.key for column in section.columns if column.group == "perplexity"]
    by_label = rows(section)
    assert one in by_label["sign-2"].metrics and other not in by_label["sign-2"].metrics
    assert other in by_label["gptq"].metrics and one not in by_label["gptq"].metrics
    assert "several ways that do not compare" in section.notes[0]
    assert "(1) is of sign-2:" in section.notes[1] and "(2) is of gptq:" in section.notes[2]
    assert len([plot for plot in pictures(section) if "perplexity" in plot.name]) == 2


def test_a_folder_of_runs_may_be_called_like_a_work_folder(run, build, tmp_path):
    run("my.workspace/a", "sign-2", 2.1, [build.perplexity(62.5)])
    run("my.workspace/b.work/checkpoint", "sign-2", 2.1, [build.perplexity(62.5)])  # one that is being made
    assert [found.folder.name for found in find_runs([tmp_path / "my.workspace"])[0]] == ["a"]


def test_a_broken_model_of_an_unknown_vocabulary_is_off_the_scale(run, build, tmp_path):
    folders = [run("a", "sign-2", 2.1, [build.perplexity(62.5)]), run("b", "gptq", 3.1, [build.perplexity(math.inf)])]
    (section,) = collect(folders, tmp_path)
    section.model.vocabulary = None
    plot = pictures(section)[0]
    assert "off the scale: gptq (inf)" in plot.caption
    plot.draw(style.WIDE)


def test_windows_are_described_once(run, build, tmp_path):
    near = {"fidelity": [build.fidelity(0.3)]}
    a = run("a", "sign-2", 2.1, [build.perplexity(62.5)], **near)
    (section,) = collect([a], tmp_path)
    windows = "novels.txt: 62 windows of 256 tokens that do not overlap, 15,810 predicted, float32, sha256 aaaaaaaaaaaa"
    assert how_measured(section.columns, section.notes) == [
        f"perplexity, {windows}", "KL divergence, the same windows of novels.txt, against tiny in float32",
    ]  # fmt: skip
    other = {"fidelity": [build.fidelity(0.3, sha256="b" * 64)]}
    b = run("b", "gptq", 3.1, [build.perplexity(62.5, tokens="b")], **other)
    (section,) = collect([a, b], tmp_path)
    assert [note.partition(" is of ")[0] for note in section.notes[1:]] == [
        f"{what} on novels.txt{unit} ({i})"
        for what, unit in (("Perplexity", ""), ("KL divergence", ", nats")) for i in (1, 2)
    ]  # fmt: skip
    assert how_measured(section.columns, section.notes) == []  # the notes say it


def test_a_run_alone_is_on_no_front(run, build, tmp_path):
    a = run("a", "sign-2", 2.1, [build.perplexity(62.5)])
    write_comparison([a], tmp_path / "out")
    assert all("Pareto" not in (tmp_path / "out" / name).read_text() for name in ("report.md", "report.html"))
    assert "1 run." in (tmp_path / "out/report.html").read_text()
    run("b", "gptq", 3.15, [build.perplexity(58.0)])
    write_comparison([a, tmp_path / "b"], tmp_path / "out")
    assert all("Pareto" in (tmp_path / "out" / name).read_text() for name in ("report.md", "report.html"))


def test_the_same_windows_under_another_name_are_one_column(run, build, tmp_path):
    a = run("a", "sign-2", 2.1, [build.perplexity(62.5)])
    b = run("b", "gptq", 3.15, [build.perplexity(55.0, source="copy.txt")])
    (section,) = collect([a, b], tmp_path)
    assert [column.group for column in section.columns].count("perplexity") == 1


def test_other_models_stand_apart_and_references_beside(run, build, tmp_path):
    a = run("a", "sign-2", 2.1, [build.perplexity(62.5)])
    b = run("b", "gptq", 4.15, [build.perplexity(58.0)], model="small")
    assert [section.slug for section in collect([a, b], tmp_path)] == ["tiny", "small"]
    (section,) = collect([a], tmp_path, references=[b])
    reference = rows(section)["small, gptq"]
    assert reference.kind == "reference" and reference.mean(section.columns[0].key) == 58.0

    c = run("c", "gptq", 4.15, [build.perplexity(9.0, tokens="c")], model="other")
    with pytest.raises(InputError, match="measured in other ways than every run"):
        collect([a], tmp_path, references=[c])


def test_fidelity_and_tasks_come_from_eval_json(run, build, evaluation, tmp_path):
    a = run(
        "a", "sign-2", 2.1, [build.perplexity(62.5)], evaluated=evaluation(a=(62.5, 0.3, 0.4), tiny=(50.0, 0.001, 0.5))
    )
    b = run("b", "gptq", 3.15, [build.perplexity(55.0)], evaluated=evaluation(whatever=(55.0, 0.1, 0.5)))
    (section,) = collect([a, b], tmp_path)
    columns = {(c.group, c.title): c.key for c in section.columns}
    assert [*columns][:5] == [
        ("perplexity", "novels.txt"),
        *(("fidelity on novels.txt", title) for title in ("KL mean, nats", "median", "p99", "same top-1")),
    ]
    row = rows(section)["sign-2"]
    assert row.mean(columns["fidelity on novels.txt", "p99"]) == 1.5
    assert row.mean(columns["accuracy", "a acc"]) == 0.4
    assert row.mean(columns["accuracy", "mean"]) == pytest.approx(0.41)
    assert {"kl-divergence-on-novels-txt-nats", "mean-accuracy"} <= {plot.name for plot in pictures(section)}
    assert {"74.1 %", "0.3"} <= {cell(row, column) for column in section.columns}
    original = rows(section)["original"]
    assert original.mean(columns["fidelity on novels.txt", "KL mean, nats"]) == 0.001  # what rounding it costs
    assert original.mean(columns["accuracy", "a acc"]) == 0.5
    assert any("chance 25.0%" in (column.protocol or "") for column in section.columns)


def test_fidelity_comes_from_the_report_too(run, build, evaluation, tmp_path):
    a = run("a", "sign-2", 2.1, [build.perplexity(62.5)], fidelity=[build.fidelity(0.3)])
    b = run("b", "gptq", 3.15, [build.perplexity(55.0)], evaluated=evaluation(whatever=(55.0, 0.1, 0.5)))
    (section,) = collect([a, b], tmp_path)
    (column,) = (column for column in section.columns if column.title == "KL mean, nats")
    assert [rows(section)[name].mean(column.key) for name in ("sign-2", "gptq")] == [0.3, 0.1]


def test_eval_json_of_many_models_is_read_by_name(run, build, tmp_path):
    values = {"models/tiny": 40.0, "a/": 44.0, "../b": 48.0}
    results = [
        ModelResults(model=name, metrics={"perplexity": [build.perplexity(value, "d", source="wiki")]})
        for name, value in values.items()
    ]
    measured = Evaluation(created="", results=results)  # as older releases wrote it, without digests
    a = run("a", "sign-2", 2.1, [build.perplexity(62.5)], evaluated=measured)
    reading = read_run(a)
    assert sorted(value for _, value in reading.readings.values()) == [44.0, 62.5]
    assert sorted(value for _, value in reading.original.values()) == [40.0, 50.0]
    for place, why in (
        ("c", "none of which is this folder"),
        ("other/tiny", "which tiny is which"),
        ("twice/a", "which a is which"),
    ):
        if place == "twice/a":
            measured.results.append(measured.results[1].model_copy(update={"model": "elsewhere/a"}))
        folder = run(place, "sign-2", 2.2, [build.perplexity(62.5)], evaluated=measured)
        with pytest.raises(InputError, match=why):
            read_run(folder)


def test_eval_json_is_read_by_the_digests_of_its_models(run, build, tmp_path):
    """Folders of one name, also one that is called like its original, do not share numbers."""
    originals = {name: json_digest({"model.safetensors": name}) for name in ("tiny", "small")}
    digests = {"x/tiny": json_digest({"config.json": "x/tiny"}), "y/tiny": json_digest({"config.json": "y/tiny"})}
    results = [
        ModelResults(model=name, sha256=digest, metrics={"fidelity": [build.fidelity(kl, sha256="d" * 64)]})
        for kl, (name, digest) in enumerate({**digests, "models/tiny": originals["tiny"]}.items(), 1)
    ]
    measured = Evaluation(created="", fidelity_to="models/tiny", results=results)
    for name, kl in (("x/tiny", 1.0), ("y/tiny", 2.0)):
        reading = read_run(run(name, "sign-2", 2.1, [build.perplexity(62.5)], evaluated=measured))
        assert [v for c, v in reading.readings.values() if c.title == "KL mean, nats"] == [kl]
        assert [v for c, v in reading.original.values() if c.title == "KL mean, nats"] == [3.0]
    other = run("z/tiny", "sign-2", 2.1, [build.perplexity(62.5)], evaluated=measured)
    with pytest.raises(InputError, match="none of which is this folder as it is: measure again"):
        read_run(other)  # also one whose weights were compressed anew since
    write_file(other / "eval.json", Evaluation(created="", results=results[:1]))
    with pytest.raises(InputError, match="x/tiny, none of which"):
        read_run(other)
    results[0] = results[0].model_copy(update={"sha256": json_digest({"config.json": "w/tiny"})})
    results[2] = results[2].model_copy(update={"sha256": originals["small"]})
    measured = Evaluation(created="", fidelity_to="models/tiny", results=results)
    run("w/tiny", "sign-2", 2.2, [build.perplexity(62.5)], evaluated=measured)
    (section,) = collect([tmp_path / "w", tmp_path / "x"], tmp_path)
    assert len([c for c in section.columns if c.title.startswith("KL mean")]) == 2  # against another model of that name


def test_runs_that_were_not_measured_are_refused(run, build, tmp_path):
    folder = run("a", "sign-2", 2.1, [build.perplexity(62.5)])
    report = read_run(folder).report

    def refused(match: str) -> None:
        with pytest.raises(InputError, match=match):
            write_comparison([folder], tmp_path / "out")

    other = report.manifest.model_copy(update={"sha256": "0"})
    write_file(folder / "report.json", report.model_copy(update={"manifest": other}))
    refused("is of another checkpoint")
    (folder / "report.json").write_text(json.dumps({**to_json(report), "schema_version": 1}))
    refused("another release")
    (folder / "report.json").write_text(json.dumps({**to_json(report), "packed": {"label": 5}}))
    refused(r"report\.json is damaged, or of something else \(packed\.label: ")
    (folder / "report.json").unlink()
    refused("nothing in it is measured: run the `ultralowbit compress` command")
    (folder / "manifest.json").write_text("{}")
    refused("is not one that")
    (folder / "manifest.json").unlink()
    refused(r"holds no manifest\.json")
    (folder / "config.json").write_text("{}")
    refused("measure it first with `ultralowbit eval")
    shutil.rmtree(folder)
    refused("no such folder")
    assert not (tmp_path / "out").exists()


VALUES = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=8), st.just([]), st.just({}), st.just([[1]])
)


def places(value, at=()):
    """Every key path of a JSON value."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, each in inner:
        yield (*at, key)
        yield from places(each, (*at, key))


def test_any_value_anywhere_in_a_report_is_read_or_refused(run, build, tmp_path):
    """Damage is one sentence that names the file and the key, or a number that can be shown."""
    depth = Depth(source="w.txt", kl=(0.1, 0.3), tokens=10, windows=1, context=11, dtype="float32", sha256="a")
    near = [build.fidelity(0.3)]
    folder = run("a", "sign-2", 2.1, [build.perplexity(62.5)], fidelity=near, by_depth=depth)
    run("b", "sign-2", 2.1, [build.perplexity(61.5)], fidelity=near, by_depth=depth, seed=1)
    stored = json.loads((folder / "report.json").read_text())
    outcomes = []

    @settings(max_examples=300, deadline=None)
    @given(keys=st.sampled_from([*places(stored)]), value=VALUES)
    def damaged(keys, value):
        copied = deepcopy(stored)
        place = copied
        for step in keys[:-1]:
            place = place[step]
        place[keys[-1]] = value
        (folder / "report.json").write_text(json.dumps(copied))
        try:
            (section,) = collect([folder, tmp_path / "b"], tmp_path)
        except InputError as error:
            assert str(folder / "report.json") in str(error) and "\n" not in str(error)
            outcomes.append("refused")
        else:
            pictures(section)
            json.dumps(to_json(section), allow_nan=False)
            outcomes.append("read")

    damaged()
    assert outcomes.count("refused") > 100 and "read" in outcomes


def test_other_reports_are_not_overwritten(run, build, tmp_path):
    folder = run("a", "sign-2", 2.1, [build.perplexity(62.5)])
    with pytest.raises(InputError, match="choose another --out"):
        write_comparison([folder], folder)
    for text in ('{"schema_version": 1}', '{"kind": "demo"}', "[", "[" * 100_000, '{"kind": ["comparison"]}'):
        (tmp_path / "report.json").write_text(text)
        with pytest.raises(InputError, match="choose another --out"):
            write_comparison([folder], tmp_path)
    (tmp_path / "report.json").write_text('{"kind": "comparison"}')  # its own are
    with pytest.raises(InputError, match="no such folder"):
        write_comparison(["nowhere"], tmp_path)


def test_the_command(run, build, tmp_path, monkeypatch):
    run("a", "sign-2", 2.1, [build.perplexity(62.5)])
    run("b", "gptq", 3.15, [build.perplexity(5000.0)], fallbacks={"x": "y"}, no_text=True)
    monkeypatch.chdir(tmp_path)
    result = CliRunner(env={"COLUMNS": "160"}).invoke(app, ["compare", "a", "b", "--out", "c"])
    assert result.exit_code == 0, result.output
    assert "62.500" in result.stdout and "c/report.html" in result.stdout
    text = Path("c/report.html").read_text()
    assert "gptq collapsed." in text and "is not what its recipe says" in text
    missing = CliRunner().invoke(app, ["compare", "nowhere"])
    assert missing.exit_code == 2 and missing.stderr.count("\n") == 1


def test_matplotlib_is_asked_for_in_one_sentence(run, build, tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    with pytest.raises(InputError, match=r"pip install 'ultralowbit\[report\]'"):
        write_comparison([run("a", "sign-2", 2.1, [build.perplexity(62.5)])], tmp_path / "out")


@pytest.mark.parametrize(
    ("points", "expected"),
    [
        ([(1, 9), (2, 5), (3, 6), (4, 1)], [0, 1, 3]),
        ([(1, 9), (1, 9)], [0, 1]),  # neither beats the other
        ([(1, 9), (1, 8)], [1]),
        ([(2, 2), (1, 2)], [1]),
    ],
)
def test_front(points, expected):
    assert front(dict(enumerate(points))) == expected
    assert front(dict(enumerate((x, -y) for x, y in points)), higher=True) == expected


def test_spread_moves_little_and_enough():
    assert labels.spread([0.0, 100.0], 14) == [0.0, 100.0]
    assert labels.spread([5.0, 5.0], 14) == [-2.0, 12.0]
    placed = labels.spread([30.0, 0.0, 1.0, 2.0], 10)
    assert sorted(placed) == [-9.0, 1.0, 11.0, 30.0] and placed[0] == 30.0
    chain = sorted(labels.spread([0.0, 1.0, 12.0, 13.0, 20.0], 10))
    assert all(b - a >= 10 - 1e-9 for a, b in itertools.pairwise(chain))


@pytest.mark.parametrize("span", [(30.2, 110.0), (1.0, 4.2), (0.0003, 0.4), (12.0, 9e6), (101.0, 260.0)])
def test_ticks_are_few_and_inside(span):
    ticks = plots.nice_ticks(*span)
    assert 1 <= len(ticks) <= 6 and all(span[0] <= tick <= span[1] for tick in ticks)


@pytest.mark.parametrize("width", [style.WIDE, style.NARROW])
def test_names_of_points_do_not_overlap(width):
    """Twenty runs, most of them close together."""
    points = [labels.Point(f"recipe-{i}", 1.9 + 0.02 * i, 34 + (7 * i % 5), 33, 40, i % 3 == 0) for i in range(16)]
    points += [labels.Point(f"far-{i}", 1 + i, 110 - 10 * i, 100, 110, True) for i in range(4)]
    figure = plots.scatter([("file, MB", points)], "perplexity", ("original 30", 30.0))(width)
    boxes = [text.get_window_extent() for text in figure.axes[0].texts]
    covered = [(a, b) for i, a in enumerate(boxes) for b in boxes[:i] if a.padded(-1).overlaps(b.padded(-1))]
    assert len(boxes) == 21 and not covered
    frame = figure.bbox
    assert all(frame.x0 <= box.x0 and box.x1 <= frame.x1 for box in boxes)


@pytest.mark.parametrize("width", [style.WIDE, style.NARROW])
@pytest.mark.parametrize("count", [1, 5, 8, 9, 13, 14])
def test_legends_fit(width, count):
    labels = [("sign-2-g128", "gptq-3bit", "billm", "arb-rc")[i % 4] + str(i) for i in range(count)]
    rows = [("mlp.up_proj", [0.01 * (i + 1) for i in range(count)]), ("self_attn.o_proj", [0.02] * count)]
    figure = plots.dots(rows, labels, "error")(width)
    figure.draw_without_rendering()
    (legend,) = figure.legends
    box = legend.get_window_extent()
    assert box.x0 >= 0 and box.x1 <= width and [text.get_text() for text in legend.get_texts()] == labels
    assert box.y0 >= figure.axes[0].bbox.y1 - 1


def test_blocks_without_a_packed_linear_are_gaps(run, build, tmp_path):
    folder = run("a", "sign-2", 2.1, [build.perplexity(62.5)], without=".1.")
    (section,) = collect([folder], tmp_path)
    (plot,) = (plot for plot in pictures(section) if plot.name == "error-by-depth")
    (axes,) = plot.draw(style.WIDE).axes
    first, gap, last = axes.get_lines()[0].get_ydata()
    assert math.isnan(gap) and axes.get_ylim()[0] < first < last < axes.get_ylim()[1]


def test_means_over_fewer_linears_say_so(run, build, tmp_path):
    whole = run("a", "sign-2", 2.1, [build.perplexity(62.5)])
    some = run("b", "mixed", 2.2, [build.perplexity(61.5)])
    report = read_file(some / "report.json", RunReport, "")
    report.layers[0].error, report.layers[1].trained = None, True
    write_file(some / "report.json", report)
    write_comparison([whole, some], tmp_path / "out")
    captions = [
        plot.caption for plot in pictures(collect([whole, some], tmp_path)[0]) if plot.name.startswith("error-")
    ]
    of = "5 of 6 measured, 1 before they were trained"
    assert captions and all(caption.endswith(f" Of mixed, {of}.") for caption in captions)
    assert (tmp_path / "out/report.html").read_text().count(f"with the largest error, {of}") == 1
    write_texts(report, "tiny", tmp_path, some, "tiny", Silent())
    said = (some / "report.md").read_text()
    assert f"These 6 of 6 Linears have the largest error ({of}), which" in said


def test_long_names_leave_room():
    name = "a-recipe-with-a-very-long-name-" * 4
    assert labels.short("sign-2", 6) == "sign-2"
    assert labels.short("sign-2-g128-x", 9) == "sign…28-x"
    figure = plots.bars([("seconds", [(name + str(i), 5.0, "5 s") for i in range(3)])])(style.NARROW)
    figure.draw_without_rendering()
    assert figure.axes[0].bbox.width > style.NARROW / 2


@pytest.mark.skipif(CHROMIUM is None, reason="needs a browser")
def test_a_browser_draws_it(run, build, tmp_path):
    """At the width of a phone, in both themes: nothing sticks out, the paper has the theme's colour, sorting works."""
    for i, bits in enumerate((1.1, 2.1, 3.15)):
        run(
            f"runs/{i}", "a-recipe-with-a-very-long-name-that-nobody-should-use-" * 2 + str(i), bits,
            [build.perplexity(120 / bits, source="a_text_with_a_long_name_and_no_spaces_at_all_in_it.txt")],
        )  # fmt: skip
    write_comparison([tmp_path / "runs"], tmp_path / "out")
    script = """<iframe id=f style="width:390px;height:800px;border:0"></iframe><script>
    f.onload = () => { const d = f.contentDocument, t = d.querySelector("table"), b = t.tHead.rows[1].cells[2];
      b.querySelector("button").click();
      const bits = [...t.tBodies[0].rows].map(r => r.cells[2].textContent);
      document.title = JSON.stringify({bits, sticksOut: d.documentElement.scrollWidth - d.documentElement.clientWidth,
        paper: getComputedStyle(d.body).backgroundColor,
        shown: [...d.querySelectorAll("figure svg")].filter(s => s.getBoundingClientRect().width > 0).length,
        figures: d.querySelectorAll("figure").length}); };
    f.src = "out/report.html";</script>"""
    (tmp_path / "frame.html").write_text(script)
    for dark in (False, True):
        command = [
            CHROMIUM, "--headless=new", "--no-sandbox", "--disable-gpu", "--allow-file-access-from-files", "--dump-dom",
            f"--user-data-dir={tmp_path / 'profile'}", f"--blink-settings=preferredColorScheme={int(not dark)}",
            "--virtual-time-budget=5000", (tmp_path / "frame.html").as_uri(),
        ]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
        match = re.search(r"<title>(.*?)</title>", done.stdout)
        if match is None:
            pytest.skip(f"the browser does not run here: {done.stderr[-300:]}")
        page = json.loads(match[1])
        assert page["sticksOut"] == 0
        assert page["bits"] == sorted(page["bits"], key=float)
        assert page["shown"] == page["figures"] > 3
        paper = style.COLOURS["paper"][dark]
        assert page["paper"] == f"rgb({', '.join(str(int(paper[i : i + 2], 16)) for i in (1, 3, 5))})"
