"""What tests on several devices share: short recipes of every kind, and what can be done with a checkpoint."""

from __future__ import annotations

import importlib.util
import itertools
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from types import ModuleType

import pytest
import torch
from transformers import AutoModelForCausalLM

import ultralowbit
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
    """short(name): a shipped recipe on little text; what trains takes two steps, what refines one round, and rows are
    heard in two parts."""

    def load(name: str) -> Recipe:
        settings = [f"calibration.source={text}", "calibration.samples=6", "calibration.length=24"]
        recipe = Recipe.load(name, small=True)
        settings += ["output_feedback.parts=2"] * (recipe.output_feedback is not None)
        settings += ["quantize.refine=1"] * (getattr(recipe.quantize, "refine", 0) > 1)
        for stage in TRAINED:
            spec = getattr(recipe, stage)
            settings += [f"{stage}.training.steps=2", f"{stage}.held_out=0.2"] * (spec is not None)
            settings += [f"{stage}.data=null"] * (getattr(spec, "data", None) is not None)
        return Recipe.load(name, settings, small=True)

    return load


@pytest.fixture
def dies(monkeypatch) -> Callable[[str], AbstractContextManager[None]]:
    """dies(name): while the context lasts, a run is killed where it calls what has this name, and is so before it
    ends."""

    class Killed(BaseException): ...

    def die(*_: object) -> None:
        raise Killed

    @contextmanager
    def dies(name: str) -> Iterator[None]:
        with monkeypatch.context() as patched, pytest.raises(Killed):
            patched.setattr(name, die)
            yield

    return dies


Gradients = Callable[..., Iterator[dict[str, tuple[torch.Tensor, torch.Tensor]]]]


@pytest.fixture(scope="session")
def whole_gradients() -> Gradients:
    """whole_gradients(folder, tokens, names): for each window of tokens [windows, length], from one backward pass
    through the whole model, what enters each Linear and the gradient of log p(y) at what leaves it."""

    def gradients(folder: Path, tokens: torch.Tensor, names: list[str]) -> Iterator[dict]:
        model = AutoModelForCausalLM.from_pretrained(folder).eval().requires_grad_(False)
        generator = torch.Generator().manual_seed(0)
        for window in tokens:
            seen: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
            hooks = [
                model.get_submodule(name).register_forward_hook(
                    lambda _, args, out, name=name, seen=seen: seen.update({name: (args[0], out)})
                )
                for name in names
            ]
            embedded = model.get_input_embeddings()(window[None]).requires_grad_(True)
            log_p = model(inputs_embeds=embedded, use_cache=False).logits[0].log_softmax(-1)
            draw = torch.rand(len(log_p), 1, generator=generator)
            y = torch.searchsorted(log_p.detach().exp().cumsum(-1), draw).clamp_max(95)
            found = torch.autograd.grad(log_p.gather(1, y).sum(), [out for _, out in seen.values()])
            yield {name: (x, g) for (name, (x, _)), g in zip(seen.items(), found, strict=True)}
            for hook in hooks:
                hook.remove()

    return gradients


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


@pytest.fixture(scope="session")
def forked(tmp_path_factory) -> Iterator[Callable[..., tuple[int, str]]]:
    """forked(n, arguments, **changes): Python with these arguments as n ranks; an exit code that is not 0, if one is
    not, and what they print. Nothing is imported anew: that takes longer than most compressions here."""
    folder, runs = tmp_path_factory.mktemp("forked"), itertools.count()
    here = str(Path(ultralowbit.__file__).parents[1])
    environment = {**os.environ, "PYTHONPATH": here, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(Path(__file__).with_name("forks.py"))]
    with subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as server:

        def run(n: int, arguments: list[str], **changes: str) -> tuple[int, str]:
            out = folder / f"{next(runs)}.txt"
            wanted = {"arguments": arguments, "size": n, "changes": changes, "out": str(out)}
            print(json.dumps(wanted), file=server.stdin, flush=True)
            codes = json.loads(server.stdout.readline())
            return next(filter(None, codes), 0), out.read_text()

        yield run
