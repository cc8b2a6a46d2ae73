"""What tests on several devices share: short recipes of every kind, and what can be done with a checkpoint."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

from ultralowbit.recipe import Recipe, shipped

TRAINED = ("preprocess", "blockwise", "finetune")
STAGES = (*TRAINED, "rotate", "error_correction", "allocate")


def different() -> list[str]:
    """The shipped recipes that differ in more than values: one of each method with the same stages."""
    kinds: dict[tuple, str] = {}
    for name in shipped():
        recipe = Recipe.load(name, small=True)
        stages = tuple(getattr(recipe, stage) is not None for stage in STAGES)
        kinds.setdefault((type(recipe.quantize), stages), name)
    return list(kinds.values())


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Tests that ask for a `recipe_kind` run with each."""
    if "recipe_kind" in metafunc.fixturenames:
        metafunc.parametrize("recipe_kind", different())


@pytest.fixture(scope="session")
def kinds() -> list[str]:
    return different()


@pytest.fixture(scope="session")
def short(text) -> Callable[[str], Recipe]:
    """short(name): a shipped recipe on little text; what trains takes two steps, and rows are heard in two parts."""

    def load(name: str) -> Recipe:
        settings = [f"calibration.source={text}", "calibration.samples=6", "calibration.length=24"]
        recipe = Recipe.load(name, small=True)
        settings += ["output_feedback.parts=2"] * (recipe.output_feedback is not None)
        for stage in TRAINED:
            spec = getattr(recipe, stage)
            settings += [f"{stage}.training.steps=2", f"{stage}.held_out=0.2"] * (spec is not None)
            settings += [f"{stage}.data=null"] * (getattr(spec, "data", None) is not None)
        return Recipe.load(name, settings, small=True)

    return load


@pytest.fixture(scope="session")
def two_blocks(save_model, tiny_config, tmp_path_factory) -> Path:
    return save_model(tiny_config(num_hidden_layers=2), tmp_path_factory.mktemp("two") / "model")


@pytest.fixture(scope="session")
def second_device() -> ModuleType:
    """The program second_device.py as a module: its `uses` run on any device."""
    spec = importlib.util.spec_from_file_location("second_device", Path(__file__).with_name("second_device.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
