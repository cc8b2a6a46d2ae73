"""The key `output_feedback` through the pipeline: measured as on the whole model, gone on with, refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import ultralowbit
from ultralowbit.methods import output_feedback
from ultralowbit.nn.linear import PackedLinear
from ultralowbit.pipeline import sensitivity
from ultralowbit.pipeline.compress import compress
from ultralowbit.pipeline.estimate import estimate
from ultralowbit.pipeline.ranks import Ranks
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


@pytest.mark.parametrize("quantize", [{"method": "pb_llm"}, {"method": "rtn"}, {"method": "billm"}])
def test_methods_that_do_not_pack_rows_on_their_own_are_refused(recipe, quantize):
    with pytest.raises(ValueError, match="output_feedback goes with methods that pack each row on its own: gptq, sign"):
        recipe(quantize=quantize)
    with pytest.raises(ValueError, match="output_feedback goes with"):
        recipe(overrides=[{"match": "*", "quantize": quantize}])
