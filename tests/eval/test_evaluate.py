"""`ultralowbit eval`: models side by side or one after another, and what cannot be compared is refused."""

from __future__ import annotations

import gc
import json
import weakref
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoConfig, PreTrainedTokenizerFast
from typer.testing import CliRunner

from ultralowbit.cli.app import app
from ultralowbit.errors import InputError
from ultralowbit.eval import runner
from ultralowbit.eval.evaluate import Wanted, evaluate_models
from ultralowbit.eval.perplexity import perplexity
from ultralowbit.eval.runner import open_model, read_texts
from ultralowbit.eval.schema import Evaluation, read_file, write_file
from ultralowbit.progress import Silent


@pytest.fixture(scope="module")
def tiny(tiny_config):
    """tiny(**changes): the configuration of the models here."""
    return lambda **changes: tiny_config(num_hidden_layers=2, num_key_value_heads=4, **changes)


@pytest.fixture(scope="module")
def folders(save_model, tiny, tmp_path_factory):
    """An original and two others with its tokenizer."""
    root = tmp_path_factory.mktemp("evaluation")
    return [str(save_model(tiny(), root / name, seed)) for seed, name in enumerate(("base", "one", "two"))]


@pytest.fixture
def evaluate(text):
    def evaluate(models, **wanted):
        options = {"sources": (text,), "max_tokens": 640, **wanted}
        return evaluate_models(models, Wanted(**options), device="cpu", watch=Silent())

    return evaluate


def test_perplexity_is_that_of_the_model_alone(folders, evaluate, text):
    evaluation = evaluate(folders[:2])
    for folder, row in zip(folders, evaluation.results, strict=False):
        (tokens,) = read_texts(folder=Path(folder), sources=[text], max_tokens=640)
        model = open_model(Path(folder), torch.device("cpu"), torch.float32)
        assert row.metrics == {"perplexity": [perplexity(model, tokens.tokens, context=64, source="text.txt")]}
        assert (row.noise_floor, row.tasks) == ({}, None)


def test_the_context_is_that_of_the_model_whatever_its_config_calls_it(save_model, text, tmp_path):
    config = AutoConfig.for_model("gpt2", vocab_size=96, n_embd=40, n_layer=2, n_head=4, n_positions=64)
    folder = save_model(config, tmp_path / "gpt2")
    assert "max_position_embeddings" not in json.loads((folder / "config.json").read_text())
    (tokens,) = read_texts(folder, [text])
    assert tokens.context == 64
    with pytest.raises(InputError, match="--context is 65, the model takes 2 to 64"):
        read_texts(folder, [text], context=65)


def test_fidelity(folders, evaluate, tmp_path):
    base, one, two = folders
    evaluation = evaluate([one, two], fidelity=base)
    rows = {row.model: row for row in evaluation.results}
    assert [*rows] == [base, one, two] and evaluation.fidelity_to == base
    alone = evaluate([base, one, two]).results
    assert [row.metrics["perplexity"] for row in alone] == [row.metrics["perplexity"] for row in evaluation.results]
    (floor,) = rows[base].noise_floor["fidelity"]
    assert (floor.dtype, floor.original_dtype) == ("bfloat16", "float32") and "fidelity" not in rows[base].metrics
    for model in (one, two):
        (fidelity,), (p,) = rows[model].metrics["fidelity"], rows[model].metrics["perplexity"]
        assert (fidelity.sha256, fidelity.tokens, fidelity.dtype) == (p.sha256, p.tokens, p.dtype)
        assert fidelity.kl_mean > 100 * floor.kl_mean > 0 and fidelity.top1 < floor.top1
    write_file(tmp_path / "eval.json", evaluation)
    assert read_file(tmp_path / "eval.json", Evaluation, "") == evaluation
    # of itself, named twice or not
    (row,) = evaluate([base, base], fidelity=base).results
    assert row.model == base and row.metrics == rows[base].metrics
    assert evaluate([two, one], fidelity=base).results[1].metrics == rows[two].metrics


def test_a_model_against_itself(folders, evaluate, tmp_path):
    (tmp_path / "same").symlink_to(folders[0])
    (fidelity,) = evaluate([str(tmp_path / "same")], fidelity=folders[0]).results[1].metrics["fidelity"]
    assert (fidelity.kl_mean, fidelity.kl_p99, fidelity.top1) == (0, 0, 1)


def test_models_that_do_not_fit_together_run_one_after_another(folders, evaluate, monkeypatch):
    together = evaluate(folders[1:], fidelity=folders[0])
    monkeypatch.setattr(runner, "available_memory", lambda: 200_000)  # one of them needs 260 kB
    opened, most = [], 0
    load = open_model

    def count(folder, device, dtype, trust):
        nonlocal most
        gc.collect()
        opened.append(weakref.ref(model := load(folder, device, dtype, trust)))
        most = max(most, sum(ref() is not None for ref in opened))
        return model

    monkeypatch.setattr(runner, "open_model", count)
    apart = evaluate(folders[1:], fidelity=folders[0])
    assert apart.results == together.results
    assert (len(opened), most) == (4, 1)


def test_other_tokens_are_refused(folders, evaluate, save_model, tiny, tmp_path, text):
    words = Tokenizer(models.WordLevel({"<unk>": 0, "a": 1}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.ByteLevel()
    other = save_model(tiny(), tmp_path / "other")
    (tmp_path / "other" / "tokenizer.json").unlink()
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>").save_pretrained(other)
    with pytest.raises(InputError, match=r"other cannot be compared.*tokenizers cut.*original that it was made from"):
        evaluate([str(other)], fidelity=folders[0], max_tokens=200)
    wide = save_model(tiny(vocab_size=128), tmp_path / "wide")
    with pytest.raises(InputError, match=r"vocabularies differ \(96 and 128"):
        evaluate([str(wide)], fidelity=folders[0])
    long = save_model(tiny(max_position_embeddings=128), tmp_path / "long")
    with pytest.raises(InputError, match="the same --context"):
        evaluate([str(long)], fidelity=folders[0])
    assert evaluate([str(long)], fidelity=folders[0], context=32).results[1].metrics["fidelity"][0].context == 32


def test_mistakes_cost_nothing(folders, evaluate, tmp_path, save_model, tiny, monkeypatch):
    monkeypatch.setattr(runner, "open_model", lambda *a: pytest.fail("a model was opened"))
    (tmp_path / "blank.txt").write_text(" \n")
    (tmp_path / "short.txt").write_text("abc")
    bare = save_model(tiny(), tmp_path / "bare")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (bare / name).unlink(missing_ok=True)
    for models_, wanted, said in (
        (folders, {"sources": (str(tmp_path / "blank.txt"),)}, "holds no text"),
        (folders, {"sources": (str(tmp_path / "short.txt"),)}, "3 tokens .* at least one window of 64"),
        ([str(bare)], {}, "no tokenizer"),
        (folders, {"sources": ()}, "nothing to measure"),
    ):
        with pytest.raises(InputError, match=said):
            evaluate(models_, **wanted)


def test_the_command(folders, text, tmp_path):
    base, one, _ = folders
    options = ["--ppl", text, "--max-tokens", "640", "--device", "cpu", "--fidelity", base]
    result = CliRunner().invoke(app, ["eval", one, *options, "--json", str(tmp_path / "found.json")])
    assert result.exit_code == 0, result.output
    written = json.loads((tmp_path / "found.json").read_text(), parse_constant=pytest.fail)
    assert written["command"].startswith("ultralowbit eval ") and {"torch", "device"} <= written["environment"].keys()
    for part in ("token perplexity", "KL mean", "noise floor", "same top-1", "bfloat16 against float32"):
        assert part in result.stdout
    assert f"{written['results'][1]['metrics']['fidelity'][0]['kl_mean']:.3g}" in result.stdout


def test_texts_of_one_name_are_told_apart(folders, evaluate, text, tmp_path):
    """Results name no folder, and the numbers of two texts never mix."""
    other = tmp_path / "deep" / Path(text).name
    other.parent.mkdir()
    other.write_text(Path(text).read_text()[::-1])
    (row,) = evaluate(folders[:1], sources=(text, str(other))).results
    first, second = row.metrics["perplexity"]
    assert (first.source, second.source) == ("text.txt", "text.txt (2)") and first.perplexity != second.perplexity
    longer = tmp_path / "longer.txt"  # of the same first windows
    longer.write_text(Path(text).read_text() + "more")
    (row,) = evaluate(folders[:1], sources=(text, str(longer))).results
    assert [result.source for result in row.metrics["perplexity"]] == ["text.txt", "longer.txt"]


def test_tokens_that_the_model_lacks_are_refused_before_it_is_opened(save_model, tiny, evaluate, tmp_path, monkeypatch):
    folder = save_model(tiny(), tmp_path / "narrow")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "vocab_size": 20}))
    monkeypatch.setattr(runner, "open_model", lambda *a: pytest.fail("a model was opened"))
    with pytest.raises(InputError, match=r"narrow makes token \d+ of .* the model has 20 tokens"):
        evaluate([str(folder)])


@pytest.mark.parametrize("dtype", ["int3", 7, ["float32"], "nn", "int64"])
def test_a_dtype_that_is_none_is_one_sentence(folders, tmp_path, dtype):
    (tmp_path / "config.json").write_text(json.dumps({"dtype": dtype}))
    with pytest.raises(InputError, match=r"expected one such as bfloat16"):
        runner.pick_dtype(tmp_path, torch.device("meta"))
