"""Every stage of every recipe on a device that is not the host's: what a GPU would refuse is refused here too."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from ultralowbit.pipeline.compress import compress
from ultralowbit.recipe import Recipe, shipped

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


@pytest.fixture(scope="module")
def on_card(source, text, tmp_path_factory) -> tuple[Path, dict[str, str | None]]:
    """The folder with a result of each recipe, and what went wrong."""
    folder = tmp_path_factory.mktemp("card")
    recipes = [short(name, text).model_dump(mode="json") for name in different()]
    (folder / "recipes.json").write_text(json.dumps(recipes))
    program = Path(__file__).with_name("second_device.py")
    command = [sys.executable, program, source, folder, folder / "recipes.json"]
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder, json.loads(done.stdout.splitlines()[-1])


def test_the_device_tells_its_tensors_from_the_hosts(on_card):
    assert on_card[1]["mixing"] is None


@pytest.mark.parametrize("name", different())
def test_a_recipe_runs_there_and_writes_what_it_writes_on_the_host(on_card, source, text, tmp_path, name):
    folder, wrong = on_card
    assert wrong[name] is None
    recipe = short(name, text)
    compress(str(source), recipe, tmp_path / "host", device="cpu")
    mine, theirs = load_file(folder / name / "model.safetensors"), load_file(tmp_path / "host" / "model.safetensors")
    assert mine.keys() == theirs.keys()
    if not any(getattr(recipe, stage) for stage in TRAINED):  # optimizers sum in another order there
        for key, there in theirs.items():  # a sum in another order may round one fp16 the other way
            same = (mine[key] == there) if mine[key].dtype != torch.float16 else (mine[key] - there).abs() <= ulp(there)
            assert same.all() and (mine[key] == there).float().mean() > 0.95, key
