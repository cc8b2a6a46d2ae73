"""Every stage of every recipe on a device that is not the host's: what a GPU would refuse is refused here too."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from ultralowbit.recipe import Recipe, shipped

USED = "sign-2"
"""The recipe whose checkpoint is used."""
TRAINED = ("preprocess", "blockwise", "finetune")
STAGES = (*TRAINED, "rotate", "error_correction", "allocate")

pytestmark = [pytest.mark.slow, pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")]


def ulp(values: torch.Tensor) -> torch.Tensor:
    """The step from each fp16 to the next."""
    return (values.view(torch.int16) + 1).view(torch.float16).sub(values).abs()


def different() -> list[str]:
    """The shipped recipes that differ in more than values: one of each method with the same stages."""
    kinds: dict[tuple, str] = {}
    for name in shipped():
        recipe = Recipe.load(name, small=True)
        stages = tuple(getattr(recipe, stage) is not None for stage in STAGES)
        kinds.setdefault((type(recipe.quantize), stages), name)
    return list(kinds.values())


def short(name: str, text: str) -> Recipe:
    """A shipped recipe on little text; what trains takes two steps."""
    settings = [f"calibration.source={text}", "calibration.samples=6", "calibration.length=24"]
    recipe = Recipe.load(name, small=True)
    for stage in TRAINED:
        spec = getattr(recipe, stage)
        settings += [f"{stage}.training.steps=2", f"{stage}.held_out=0.2"] * (spec is not None)
        settings += [f"{stage}.data=null"] * (getattr(spec, "data", None) is not None)
    return Recipe.load(name, settings, small=True)


@pytest.fixture(scope="module")
def source(save_model, tiny_config, tmp_path_factory) -> Path:
    return save_model(tiny_config(num_hidden_layers=2), tmp_path_factory.mktemp("second") / "model")


Came = dict[str, tuple[str | None, Any]]
"""Recipe or use -> what went wrong, if anything did, and what came of it."""


@pytest.fixture(scope="module")
def results(source, text, tmp_path_factory) -> dict[str, tuple[Path, Came]]:
    """Of the card and of the host: the folder with a result of each recipe, and what came of recipes and uses."""
    recipes = [short(name, text).model_dump(mode="json") for name in [USED, *(n for n in different() if n != USED)]]
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    both = {}
    for where in ("card", "cpu"):
        folder = tmp_path_factory.mktemp(where)
        (folder / "recipes.json").write_text(json.dumps(recipes))
        program = Path(__file__).with_name("second_device.py")
        command = [sys.executable, program, where, source, folder, text, folder / "recipes.json"]
        done = subprocess.run([*map(str, command)], capture_output=True, text=True, env=environment)
        assert done.returncode == 0, done.stderr[-3000:]
        both[where] = folder, json.loads(done.stdout.splitlines()[-1])
    return both


def test_the_device_tells_its_tensors_from_the_hosts(results):
    assert results["card"][1]["mixing"] == [None, None]


@pytest.mark.parametrize("name", different())
def test_a_recipe_runs_there_and_writes_what_it_writes_on_the_host(results, text, name):
    wrong = {where: came[name][0] for where, (_, came) in results.items()}
    assert wrong == {"card": None, "cpu": None}
    mine, theirs = (load_file(folder / name / "model.safetensors") for folder, _ in results.values())
    assert mine.keys() == theirs.keys()
    if not any(getattr(short(name, text), stage) for stage in TRAINED):  # optimizers sum in another order there
        for key, there in theirs.items():  # a sum in another order may round one fp16 the other way
            same = (mine[key] == there) if mine[key].dtype != torch.float16 else (mine[key] - there).abs() <= ulp(there)
            assert same.all() and (mine[key] == there).float().mean() > 0.95, key


@pytest.mark.parametrize(
    ("use", "tolerance"),
    [("fp32", 3e-3), ("bf16", 0.1), ("fp16", 0.01), ("fuse", 3e-3), ("eval", 3e-3), ("measure", 3e-3)],
)
def test_a_checkpoint_gives_the_same_numbers_there(results, use, tolerance):
    (wrong, there), (broken, here) = (came[use] for _, came in results.values())
    assert (wrong, broken) == (None, None)
    # logits are up to 4, and some scales one fp16 apart, which is a thousandth; bf16 has an eighth of its digits
    assert there == pytest.approx(here, abs=tolerance)


@pytest.mark.parametrize("use", ["generate", "sample"])
def test_a_checkpoint_writes_the_same_there(results, use):
    (wrong, there), (broken, here) = (came[use] for _, came in results.values())
    assert (wrong, broken) == (None, None) and there == here and here


@pytest.mark.parametrize(("use", "expected"), [("verify", []), ("rerun", {}), ("resume", True)])
@pytest.mark.parametrize("where", ["card", "cpu"])
def test_a_run_can_be_verified_repeated_and_resumed(results, where, use, expected):
    assert results[where][1][use] == [None, expected]
