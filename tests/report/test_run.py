"""Reports: strict JSON, tables that fit a terminal, a collapse that nobody can miss, figures that outlive a kill."""

from __future__ import annotations

import gc
import html
import io
import json
import math
import shutil
import time
from dataclasses import replace
from pathlib import Path
from weakref import WeakSet

import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

from ultralowbit.checkpoint.card import CARD, is_edited
from ultralowbit.checkpoint.contents import LOCAL
from ultralowbit.cli.app import app
from ultralowbit.cli.console import Pace
from ultralowbit.cli.render import rows_table, show
from ultralowbit.data.corpora import has_test_split
from ultralowbit.errors import InputError
from ultralowbit.eval.runner import open_model
from ultralowbit.eval.schema import Evaluation, read_file, write_file
from ultralowbit.hub import open_tokenizer
from ultralowbit.progress import Silent
from ultralowbit.recipe import Recipe
from ultralowbit.report.comparison import write_comparison
from ultralowbit.report.gates import continuations
from ultralowbit.report.run import default_source, write_texts
from ultralowbit.report.runs import read_plain, read_run
from ultralowbit.report.schema import RunReport
from ultralowbit.report.tables import bits_map, grid
from ultralowbit.units import format_bytes, format_seconds


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_broken_model_is_read_back_from_strict_json(build, tmp_path, value):
    report = build.report(value)
    write_file(tmp_path / "report.json", report)
    write_texts(report, "tiny", tmp_path, tmp_path, "tiny", Silent())
    json.loads((tmp_path / "report.json").read_text(), parse_constant=pytest.fail)
    (measured,) = read_file(tmp_path / "report.json", RunReport, "").packed.metrics["perplexity"]
    assert str(measured.perplexity) == str(value)
    assert "**Collapsed.**" in (tmp_path / "report.md").read_text()
    card = (tmp_path / "README.md").read_text()
    assert "**It does not work.**" in card and ": the model is broken." in card


@pytest.mark.parametrize(("value", "gone"), [(95.9, False), (96.5, True), (math.nan, True)])
def test_collapse_is_shouted(build, capsys, value, gone):
    show(build.report(value, vocabulary=96), Path("out"))
    assert ("COLLAPSED" in capsys.readouterr().out) is gone


def test_the_table_fits_80_columns(build):
    report = build.report(123456.0, bits=2.008, recipe=build.recipe("sign-2-g128"))
    terminal = Console(width=80, file=io.StringIO())
    terminal.print(rows_table([report.original, report.packed]))
    text = terminal.file.getvalue()
    for part in ("original", "sign-2-g128", "50.000", "123,456", "2.008", "2.00", "2.89 MB", "1:02:05", "10.0 GB"):
        assert part in text
    assert "…" not in text


def test_columns_that_say_nothing_are_left_out(build):
    report = build.report()
    rows = [report.original, report.packed.model_copy(update={"peak_memory_bytes": None})]
    assert "peak memory" not in grid(rows)[0] and "time" in grid(rows)[0]


@pytest.mark.parametrize(
    ("bits", "lines"),
    [
        ([2.008, 1.004, 4.016, 3.012], ["mlp.up_proj       24", "self_attn.q_proj  13"]),
        ([2.5, 10.0, 2.25, 2.0], ["mlp.up_proj        2.5  2.2", "self_attn.q_proj  10.0  2.0"]),
        ([2.0, 16.0, 4.0, 4.0], ["mlp.up_proj        2  4", "self_attn.q_proj  16  4"]),
        ([2.0, 2.0, 2.0, 2.0], []),
    ],
)
def test_the_map_of_bits_has_the_digits_that_it_needs(build, bits, lines):
    layers = build.report().layers[:4]
    layers = [layer.model_copy(update={"bits_per_weight": b}) for layer, b in zip(layers, bits, strict=True)]
    assert bits_map(layers) == lines


def test_two_texts_are_two_columns(build):
    texts = [build.perplexity(60.0), build.perplexity(70.0, "b", source="wiki.txt")]
    report = build.report(metrics={"perplexity": texts})
    report.original.metrics = {"perplexity": [replace(texts[1], perplexity=40.0)]}
    headers, original, packed = grid([report.original, report.packed])
    at = [headers.index(f"perplexity {name}") for name in ("novels.txt", "wiki.txt")]
    assert [original[i] for i in at] == ["-", "40.000"] and [packed[i] for i in at] == ["60.000", "70.000"]


@pytest.fixture
def compress(save_model, tiny_config, text, tmp_path, monkeypatch):
    """compress(*options) runs the command into `packed`; returns its result and the folder."""
    config = tiny_config(hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2)
    model = save_model(config, tmp_path / "deep/tiny")
    monkeypatch.chdir(tmp_path)

    def run(*options: str):
        command = ["compress", str(model), "--recipe", "rtn-4bit", "--out", "packed", "--device", "cpu", "-q"]
        texts = [] if "--eval" in options else ["--eval", text]
        result = CliRunner().invoke(app, [*command, *texts, "--max-tokens", "640", *options])
        return result, tmp_path / "packed"

    return run


def stop(*args, **kwargs):
    raise KeyboardInterrupt


@pytest.mark.parametrize(
    "at",
    [
        "measure.measure_beside", "measure.measure_alone", "measure.measure_depth", "measure.continuations",
        "run._begin", "run.write_texts", "run.card_text", "run.render",
    ],
)  # fmt: skip
def test_a_kill_after_compressing_costs_no_figure(compress, monkeypatch, at):
    """Wherever it comes, the same command makes up for it: with the memory, and with a card that is its own."""
    with monkeypatch.context() as patch:
        patch.setattr(f"ultralowbit.report.{at}", stop)
        result, folder = compress()
        assert result.exit_code == 130, result.output
        memory = json.loads((folder / LOCAL).read_text())["peak_memory_bytes"]
        assert memory > 2**20
    result, folder = compress()
    assert result.exit_code == 0, result.output
    report = read_file(folder / "report.json", RunReport, "")
    assert report.packed.peak_memory_bytes == memory
    assert report.packed.metrics.keys() == {"perplexity", "fidelity"} and report.continuation
    assert (folder / CARD).exists() and not is_edited(folder / CARD)
    assert "edited" not in result.output and (folder / "report.md").exists()


def test_eval_json_of_a_folder_that_is_called_like_its_original(compress, text, tmp_path):
    """The digests that `eval` writes are those that `compare` finds, of a packed folder and of a plain one."""
    assert compress("--out", "tiny", "--eval", "none")[0].exit_code == 0
    folders = [tmp_path / "deep/tiny", tmp_path / "tiny"]
    command = ["eval", *map(str, folders), "--ppl", text, "--max-tokens", "640", "--json", "tiny/eval.json"]
    result = CliRunner().invoke(app, [*command, "--device", "cpu"])
    assert result.exit_code == 0, result.output
    shutil.copy(tmp_path / "tiny/eval.json", tmp_path / "deep/tiny")
    run, plain = read_run(folders[1]), read_plain(folders[0])
    rows = read_file(tmp_path / "tiny/eval.json", Evaluation, "").results
    before, after = (row.metrics["perplexity"][0].perplexity for row in rows)
    assert before != after
    assert [[value for _, value in r.values()] for r in (plain.readings, run.original, run.readings)] == [
        [before], [before], [after],
    ]  # fmt: skip


def test_each_model_is_opened_once(compress, monkeypatch):
    """For perplexity, fidelity, the divergence by depth and what it writes; where two have no room, one is there at a
    time, and both are measured."""
    opened, live, measure = [], WeakSet(), "ultralowbit.report.measure"

    def opening(folder, *more):
        opened.append(folder.name)
        live.add(model := open_model(folder, *more))
        return model

    monkeypatch.setattr(f"{measure}.open_model", opening)
    assert compress()[0].exit_code == 0
    assert sorted(opened) == ["packed", "tiny"] and not live

    def too_large(folders, device):
        gc.collect()
        return "needs more" if len(folders) + len(live) > 1 else None

    monkeypatch.setattr(f"{measure}.too_large", too_large)
    result, folder = compress("--restart")
    assert result.exit_code == 0, result.output
    report = read_file(folder / "report.json", RunReport, "")
    assert report.original.metrics["perplexity"] and report.packed.metrics["perplexity"] and not live
    assert not report.packed.metrics.get("fidelity")
    assert all(sample.original is not None for sample in report.samples)


def test_both_models_write_after_the_same_prompts(compress, monkeypatch, tmp_path):
    """In report.json, report.md and on the page of `compare`; prompts that the model has no words for are left out."""
    monkeypatch.setattr("ultralowbit.report.measure.PROMPTS", ("abc", "", "a `b`\nc"))
    result, folder = compress()
    assert result.exit_code == 0, result.output
    samples = read_file(folder / "report.json", RunReport, "").samples
    assert [sample.prompt for sample in samples] == ["abc", "a `b`\nc"]
    for name, label in (("deep/tiny", "original"), ("packed", "packed")):
        model, tokenizer = (
            open_model(tmp_path / name, torch.device("cpu"), torch.float32),
            open_tokenizer(tmp_path / name),
        )
        for sample in samples:
            ids = tokenizer(sample.prompt, return_tensors="pt")["input_ids"][0]
            assert getattr(sample, label) == continuations(model, tokenizer, [ids])[0].text
    write_comparison([folder], tmp_path / "page")
    pages = [folder / "report.md", tmp_path / "page/report.md", tmp_path / "page/report.html"]
    for page in map(Path.read_text, pages):
        shown = " ".join(html.unescape(page).split())
        for text in (text for s in samples for text in (s.prompt, s.original, s.packed)):
            assert " ".join(json.dumps(text).split()) in shown
    monkeypatch.setattr("ultralowbit.report.measure.open_model", lambda *a: pytest.fail("they write again"))
    result, _ = compress()
    assert result.exit_code == 0 and read_file(folder / "report.json", RunReport, "").samples == samples


def test_a_packed_model_writes_alone_where_the_original_has_no_room(compress, monkeypatch):
    monkeypatch.setattr("ultralowbit.report.measure.too_large", lambda models, device: "needs more")
    result, folder = compress()
    assert result.exit_code == 0, result.output
    samples = read_file(folder / "report.json", RunReport, "").samples
    assert samples and all(sample.original is None and sample.packed for sample in samples)
    assert "- original:" not in (folder / "report.md").read_text()


def test_calibrating_on_what_is_measured_is_told(compress, text, tmp_path):
    """On the screen, in report.json, report.md and the card; not where the texts are others."""
    Path(tmp_path / "other.txt").write_text("".join(sorted(Path(text).read_text())))
    for calibration, seen in ((text, True), (str(tmp_path / "other.txt"), False)):
        calibrated = ["--recipe", "gptq-4bit", "--calib", calibration, "--length", "32", "--max-tokens", "99999"]
        result, folder = compress(*calibrated, "--restart")
        assert result.exit_code == 0, result.output
        shares = read_file(folder / "report.json", RunReport, "").seen
        assert list(shares) == [Path(text).name] * seen and all(0 < share <= 1 for share in shares.values())
        assert ("figures of it flatter" in " ".join(result.output.split())) is seen
        for name in ("report.md", CARD):
            assert ("**Seen before.**" in (folder / name).read_text()) is seen


def test_it_is_told_before_the_work(compress, text, monkeypatch):
    def work(*_):
        raise InputError("the work begins")

    monkeypatch.setattr("ultralowbit.pipeline.compress.BlockStream", work)
    result, _ = compress("--recipe", "gptq-4bit", "--calib", text, "--length", "32", "--max-tokens", "99999")
    said = " ".join(result.output.split())
    assert said.index("figures of it flatter") < said.index("the work begins")


def test_a_default_text_of_another_kind_is_told(compress, text, monkeypatch):
    """On the screen, in report.json, report.md and the card; not where one was named, or none was calibrated on."""
    monkeypatch.setattr("ultralowbit.report.run.AUTO_TOKENS", 640)
    calibrated = ["--recipe", "gptq-4bit", "--calib", text, "--length", "32", "--samples", "4"]
    cases = (["--eval", "auto", *calibrated], True), (calibrated, False), (["--eval", "auto"], False)
    for options, told in cases:
        result, folder = compress(*options, "--restart")
        assert result.exit_code == 0, result.output
        words = "measured on python-docs, which is not the calibration's kind of text: give --eval"
        assert (words in " ".join(result.output.split())) is told
        assert read_file(folder / "report.json", RunReport, "").unlike == ("python-docs" if told else None)
        for name in ("report.md", CARD):
            assert ("**Another kind of text.**" in (folder / name).read_text()) is told


def test_an_original_that_guesses_is_told_of_itself(compress):
    """Not as a collapse of what was made from it: on the screen, in report.md and the card."""
    result, folder = compress()
    report = read_file(folder / "report.json", RunReport, "")
    assert report.original.metrics["perplexity"][0].perplexity > report.vocabulary  # it is random
    assert report.hopeless == ["text.txt"] and not report.collapsed
    assert "THE ORIGINAL GUESSES" in result.output and "than a guess" in result.output
    assert "the packed model predicts worse" not in " ".join(result.output.split())
    for name in ("report.md", CARD):
        assert "**The original guesses.** On text.txt" in (folder / name).read_text()


def test_the_vocabulary_is_that_of_the_model_whatever_its_config_says(compress, save_model, tiny_config, tmp_path):
    """Llama's own where config.json is silent."""
    small = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    folder = save_model(tiny_config(**small, vocab_size=32_000), tmp_path / "deep/tiny")
    config = json.loads((folder / "config.json").read_text())
    del config["vocab_size"]
    (folder / "config.json").write_text(json.dumps(config))
    result, packed = compress()
    assert result.exit_code == 0, result.output
    assert read_file(packed / "report.json", RunReport, "").vocabulary == 32_000


@pytest.mark.parametrize("part", ["environment", "calibration", "layers"])
def test_a_manifest_that_was_edited_is_one_sentence(compress, part):
    """Also where what is left of it satisfies all that the packed model needs to load."""
    _, folder = compress()
    manifest = json.loads((folder / "manifest.json").read_text())
    name = next(iter(manifest["layers"]))
    manifest |= {
        "environment": {"environment": {}}, "calibration": {"calibration": {"source": 7}},
        "layers": {"layers": {**manifest["layers"], name: {**manifest["layers"][name], "layout": 5}}},
    }[part]  # fmt: skip
    (folder / "manifest.json").write_text(json.dumps(manifest))
    result, _ = compress()
    assert result.exit_code == 1 and result.stderr.count("\n") == 1, result.output
    assert "manifest.json" in result.stderr and "unexpected" not in result.stderr


def test_a_new_card_replaces_the_one_of_before(compress):
    """Our own card of another report, left there by a kill before the new one was written, is no edited one."""
    _, folder = compress()
    before = (folder / CARD).read_text()
    assert compress("--max-tokens", "320")[0].exit_code == 0
    after = (folder / CARD).read_text()
    assert "5 windows of 64" in after and after != before and not is_edited(folder / CARD)


@pytest.mark.parametrize("damage", ["", '{"schema_version": 1}', '{"packed": 7}', "[" * 100_000])
def test_a_damaged_report_is_measured_again(compress, damage):
    _, folder = compress()
    whole = read_file(folder / "report.json", RunReport, "")
    (folder / "report.json").write_text(damage)
    assert compress()[0].exit_code == 0
    again = read_file(folder / "report.json", RunReport, "")
    assert again.packed.metrics == whole.packed.metrics and again.original == whole.original


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (["calibration.source=wikitext2"], "wikitext2"),
        (["calibration.source=org/name"], "org/name"),
        (["calibration.source=org/train-only"], "python-docs"),
        (["calibration.source=self"], "python-docs"),
        (["calibration.source=pyproject.toml"], "python-docs"),
        (["quantize.method=rtn"], "python-docs"),  # reads no text, so none is to be fetched for it
    ],
)
def test_the_default_text(settings, expected, monkeypatch):
    splits = {"org/name": ["train", "test"], "org/train-only": ["train"]}
    monkeypatch.setattr("datasets.get_dataset_split_names", lambda path, config: splits[path])
    has_test_split.cache_clear()
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
