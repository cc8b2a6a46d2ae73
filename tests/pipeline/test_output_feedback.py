"""The key `output_feedback` through the pipeline: measured as on the whole model, gone on with, refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import ultralowbit
from ultralowbit.bench.models import write_headers
from ultralowbit.methods import output_feedback
from ultralowbit.nn.linear import PackedLinear
from ultralowbit.pipeline import sensitivity
from ultralowbit.pipeline.compress import compress
from ultralowbit.pipeline.estimate import estimate
from ultralowbit.pipeline.ranks import Ranks
from ultralowbit.pipeline.rates import Rates
from ultralowbit.pipeline.sensitivity import Outputs, sensitivities
from ultralowbit.pipeline.source import open_decoder
from ultralowbit.pipeline.verify import rerun
from ultralowbit.progress import Silent
from ultralowbit.recipe import Recipe


@pytest.fixture(scope="module")
def source(tmp_path_factory, save_model, tiny_config) -> Path:
    return save_model(tiny_config(), tmp_path_factory.mktemp("model") / "llama")


@pytest.fixture
def recipe(text) -> Callable[..., Recipe]:
    """recipe(key=value, ...): sign planes with output feedback on two of four windows of a local text."""

    def make(**values: Any) -> Recipe:
        data = {"name": "test", "quantize": {"method": "sign"}, "output_feedback": {"windows": 2}}
        data["calibration"] = {"source": text, "samples": 4, "length": 24}
        return Recipe.model_validate(data | values)

    return make


def test_the_information_is_that_of_the_whole_model(source, recipe, whole_gradients, tmp_path, monkeypatch):
    monkeypatch.setattr(sensitivity, "ROWS", 40)  # a Linear with more outputs has several matrices
    decoder = open_decoder(source, torch.device("cpu"))
    tokens = torch.randint(96, (3, 20), generator=torch.Generator().manual_seed(1))
    names = [n for i in range(len(decoder.blocks)) for n in decoder.linears(i)]
    got: dict[str, list[torch.Tensor]] = {}
    outputs = Outputs(names, 2, lambda i, matrices: got.update(matrices))
    assert sensitivities(decoder, recipe(), {}, tokens, tmp_path / "s", Silent(), Ranks(), 0, outputs) == {}
    expected = dict.fromkeys(names, 0)
    for window in whole_gradients(source, tokens[:2], names):
        for name, (_, g) in window.items():
            expected[name] = expected[name] + g[0].T @ g[0]
    assert {name: [len(H) for H in parts] for name, parts in got.items()} == {
        name: [len(rows) for rows in torch.arange(len(H)).split(40)] for name, H in expected.items()
    }
    assert any(len(parts) > 1 for parts in got.values())
    for name, H in expected.items():
        for rows, part in zip(torch.arange(len(H)).split(40), got[name], strict=True):
            torch.testing.assert_close(part, H[rows][:, rows], rtol=1e-3, atol=1e-5 * H.abs().max().item())


@pytest.mark.parametrize("allocate", [None, {"bits": 2.2, "windows": 3}], ids=["alone", "with allocation"])
def test_a_killed_run_measures_once_and_ends_with_the_same_bytes(source, recipe, tmp_path, monkeypatch, dies, allocate):
    wanted = recipe(allocate=allocate, rotate={}, error_correction={})
    whole = compress(str(source), wanted, tmp_path / "whole", device="cpu")
    plain = compress(str(source), wanted.model_copy(update={"output_feedback": None}), tmp_path / "plain", device="cpu")
    assert whole.manifest["files"] != plain.manifest["files"]
    packed = {n for n, m in ultralowbit.load(tmp_path / "whole").named_modules() if isinstance(m, PackedLinear)}
    assert whole.manifest["outputs"].keys() == packed
    assert all(0 < gain < 1 for gain in whole.manifest["outputs"].values())

    with dies("ultralowbit.pipeline.stream.BlockStream._commit"):
        compress(str(source), wanted, tmp_path / "out", device="cpu")
    with monkeypatch.context() as patched:
        patched.setattr(sensitivity, "sensitivities", None)  # nobody calls it
        assert (
            compress(str(source), wanted, tmp_path / "out", device="cpu").manifest["files"] == whole.manifest["files"]
        )
    assert rerun(tmp_path / "out").different == {}


def test_the_estimate_counts_it(source, recipe, tmp_path):
    with_it, without = (estimate(str(source), r, "cpu", out=tmp_path) for r in (recipe(), recipe(output_feedback=None)))
    assert with_it.seconds["what matters"] > 0 and "what matters" not in without.seconds
    assert with_it.disk["what enters every block"] == 2 * 24 * (3 + 1) * 64 * 4
    linears = [m.weight for n, m in AutoModelForCausalLM.from_pretrained(source).named_modules() if "_proj" in n]
    kept = sum(4 * len(w) * min(len(w), output_feedback.ROWS) for w in linears)
    assert with_it.disk["Fisher information of outputs"] == kept


def test_the_estimate_counts_each_part_of_the_rows(source, recipe, tmp_path, monkeypatch):
    """Each goes through all columns, here a second a column; Linears of the model have 64 or 96 rows."""
    rates = Rates(single=1e15, half=1e15, factor=0.0, hashing=1e15, rounding=lambda method: (1.0, 0.0))
    monkeypatch.setattr("ultralowbit.pipeline.estimate.measured_rates", lambda device: rates)
    for module in ("rates", "workload"):
        monkeypatch.setattr(f"ultralowbit.pipeline.{module}.ROWS", 80)
    columns = {n: m.weight.shape for n, m in AutoModelForCausalLM.from_pretrained(source).named_modules() if "_p" in n}
    parts = 8 * sum(m * (2 if n > 80 else 1) for n, m in columns.values())
    feedback = {"parts": 8, "windows": 2}
    for given, expected in ((None, sum(m for _, m in columns.values())), (feedback, parts)):
        planned = estimate(str(source), recipe(output_feedback=given), "cpu", out=tmp_path)
        assert planned.seconds["rounding"] == pytest.approx(expected)


@pytest.mark.parametrize("few", [10, 1000])
def test_the_estimate_counts_the_predictions_of_a_few_tokens(tiny_config, recipe, tmp_path, monkeypatch, few):
    folder = write_headers(tmp_path / "model", tiny_config(vocab_size=50_000))
    monkeypatch.setattr("ultralowbit.pipeline.memory.LOGITS", few * 50_000)
    planned = estimate(str(folder), recipe(), "cpu", out=tmp_path)
    assert planned.memory["predictions of a few tokens"] == min(few, 24) * 50_000 * 3 * 4


@pytest.mark.parametrize("quantize", [{"method": "pb_llm"}, {"method": "rtn"}, {"method": "billm"}])
def test_methods_that_do_not_pack_rows_on_their_own_are_refused(recipe, quantize):
    with pytest.raises(ValueError, match="output_feedback goes with methods that pack each row on its own: gptq, sign"):
        recipe(quantize=quantize)
    with pytest.raises(ValueError, match="output_feedback goes with"):
        recipe(overrides=[{"match": "*", "quantize": quantize}])
