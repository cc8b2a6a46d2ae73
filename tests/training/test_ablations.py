"""What papers claim of their parts, in the direction claimed, on the embedded model and after little training.

Each claim is asked of the packed model: perplexity on text that is not the calibration's, mean over seeds of the
calibration's windows.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import ultralowbit
from ultralowbit.data.corpora import read_text
from ultralowbit.demo.run import CHECKPOINT
from ultralowbit.eval.perplexity import perplexity
from ultralowbit.eval.windows import token_stream
from ultralowbit.hub import open_tokenizer
from ultralowbit.pipeline.compress import compress
from ultralowbit.recipe import Recipe

pytestmark = pytest.mark.slow

SEEDS = (0,)
SHARED = Path(__file__).parents[3] / "shared"
STORIES = SHARED / "data/calib/tinystories_excerpt.txt"
CALIBRATION = {"source": "python-docs", "samples": 24, "length": 128}
PTQ161 = {"method": "ptq161"}
TUNE = {
    "objective": {"kind": "mse_nlc"},
    "training": {"lr": {"scale": 5e-4, "row": 1e-3, "column": 1e-3}, "epochs": 4, "batch": 2},
}


@pytest.fixture(scope="module")
def measured(tmp_path_factory) -> Callable[..., float]:
    """measured(quantize=..., stage=...) compresses the embedded model for each seed and is the mean perplexity."""
    tokens = token_stream(open_tokenizer(CHECKPOINT), read_text("python-docs", "test").text)[:2048]
    known: dict[str, float] = {}

    def one(recipe: Recipe) -> float:
        folder: Path = tmp_path_factory.mktemp("run") / "out"
        compress(str(CHECKPOINT), recipe, folder, device="cpu")
        return perplexity(ultralowbit.load(folder, dtype=torch.float32).dequantize(), tokens, context=256).perplexity

    def of(**stages: Any) -> float:
        key = str(stages)
        if key not in known:
            recipes = [
                Recipe.model_validate({"name": "ablation", "calibration": CALIBRATION | {"seed": seed}, **stages})
                for seed in SEEDS
            ]
            known[key] = sum(map(one, recipes)) / len(recipes)
        return known[key]

    return of


def test_ptq161_mask(measured):
    """Salient channels kept at 4 bits against none."""
    assert measured(quantize=PTQ161) < 0.8 * measured(quantize=PTQ161 | {"ratio": 0.0})


def test_ptq161_learned_scales(measured):
    """Scales learned block by block against the analytic ones."""
    assert measured(quantize=PTQ161, blockwise=TUNE) < measured(quantize=PTQ161)


def test_ptq161_preprocessing(measured):
    """A restorative LoRA before the quantization against none."""
    preprocess = {"rank": 16, "training": {"lr": {"adapter": 1e-3}, "epochs": 8, "batch": 8}}
    assert measured(preprocess=preprocess, quantize=PTQ161) < measured(quantize=PTQ161)


@pytest.mark.skipif(not STORIES.exists(), reason="needs a model and a text that are not the project's")
def test_pb_llm_hessian_salience(tmp_path):
    """Salient weights by w^2 / U_jj^2 against |w|, with columns compensated; not so on every model, see
    recipes/README.md."""
    model, text = SHARED / "models/babyllama-361", STORIES.read_text(encoding="utf-8")
    (tmp_path / "calibration.txt").write_text(text[:400_000])
    tokens = token_stream(open_tokenizer(model), text[400_000:])[:4096]
    summed = {}
    for salience in ("hessian", "magnitude"):
        calibration = {"source": str(tmp_path / "calibration.txt"), "samples": 64, "length": 256}
        recipes = [
            Recipe.model_validate(
                {
                    "name": "ablation", "calibration": calibration | {"seed": seed},
                    "quantize": {"method": "pb_llm", "salience": salience},
                }
            )
            for seed in SEEDS
        ]  # fmt: skip
        folders = [
            compress(str(model), r, tmp_path / f"{salience}-{i}", device="cpu").folder for i, r in enumerate(recipes)
        ]  # fmt: skip
        nets = [ultralowbit.load(folder, dtype=torch.float32).dequantize() for folder in folders]
        summed[salience] = sum(perplexity(net, tokens, context=256).perplexity for net in nets)
    assert summed["hessian"] < summed["magnitude"]


def test_db_llm_free_scales(measured):
    """Two free scales for each group against those tied as on the 2-bit grid, before any training."""
    assert measured(quantize={"method": "db_llm", "iterations": 15}) < measured(quantize={"method": "db_llm"})


def test_db_llm_distillation(measured):
    """Deviation-aware distillation against none."""
    stage = {"objective": {"kind": "dad"}, "training": {"lr": {"scale": 1e-3}, "epochs": 3, "batch": 4}}
    quantize = {"method": "db_llm"}
    assert measured(quantize=quantize, finetune=stage) < measured(quantize=quantize)


def test_refinement(measured):
    """Signs and scales refined after GPTQ against GPTQ alone, at one plane."""
    assert measured(quantize={"method": "sign", "refine": 3}) < 0.9 * measured(quantize={"method": "sign"})
