"""Any value of any stage of a recipe is refused before the work, or the run comes to its end."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ultralowbit.errors import InputError
from ultralowbit.pipeline.compress import compress
from ultralowbit.recipe import Recipe

TRAINING = {
    "epochs": 1.0, "steps": 2, "batch": 2, "accumulation": 1, "warmup": 0.1, "final_lr": 0.05, "weight_decay": 0.0,
    "betas": [0.9, 0.99], "clip_norm": 0.3, "evaluations": 1, "patience": 1, "seed": 0, "autocast": "off",
}  # fmt: skip
METHODS = {
    "gptq": {"bits": 2, "group": 32, "symmetric": False, "damp": 0.01},
    "sign": {"planes": 2, "group": None, "iterations": 2, "refine": 1, "damp": 0.01},
    "db_llm": {"group": 32, "iterations": 1, "damp": 0.01},
    "pb_llm": {"ratio": 0.1, "damp": 0.01},
    "ptq161": {"ratio": 0.2, "passes": 1, "damp": 0.01},
    "billm": {"block": 32, "damp": 0.01},
    "arb_rc": {"block": 32, "iterations": 1, "damp": 0.01},
}


@pytest.fixture(
    scope="module", params=["gptq", *(pytest.param(m, marks=pytest.mark.campaign) for m in METHODS if m != "gptq")]
)
def folder(request, text, tmp_path_factory) -> Path:
    """A folder with a recipe of every stage, whose every value stands there."""
    data = {"source": text, "samples": 4, "length": 16, "seed": 0}
    recipe = {
        "name": "whole",
        "summary": "",
        "rotate": {"inputs": "folded", "others": "online", "tied": "untie", "seed": 0},
        "error_correction": {},
        "preprocess": {
            "rank": 2, "alpha": 4.0, "dropout": 0.1, "targets": ["*"], "exclude": [], "held_out": 0.3, "data": data,
            "training": {"lr": {"adapter": 0.01}, **TRAINING},
        },
        "quantize": {"method": request.param, **METHODS[request.param]},
        "blockwise": {"held_out": 0.3, "objective": {"kind": "mse"}, "training": {"lr": {"scale": 0.01}, **TRAINING}},
        "finetune": {
            "held_out": 0.3, "objective": {"kind": "kl"}, "training": {"lr": {"scale": 0.01}, **TRAINING}, "data": data,
        },
        "calibration": {**data, "clip_tokens": None},
        "ignore": ["*mlp*", "*.1.*", "*k_proj"],
        "overrides": [{"match": "*q_proj", "quantize": {"method": "rtn", "bits": 3, "group": 32, "symmetric": True}}],
    }  # fmt: skip
    if request.param in ("billm", "arb_rc"):
        del recipe["blockwise"], recipe["finetune"]  # their formats are not trained
    path = tmp_path_factory.mktemp("recipe") / "recipe.yaml"
    path.write_text(json.dumps(recipe))  # which is YAML, without aliases
    return path.parent


def test_every_value_is_checked_before_the_work(folder, source, corrupt, copied):
    def read(damaged: Path) -> bool:
        recipe = Recipe.load(damaged / "recipe.yaml")
        try:
            compress(str(source), recipe, damaged / "out")
        except InputError:
            assert not (damaged / "out.work").exists(), "the work had begun"
            raise
        return True

    assert read(copied(folder))
    corrupt(folder, ["recipe.yaml"], read, 60, ["yaml"])
