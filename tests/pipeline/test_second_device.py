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

USED = "sign-2"
"""The recipe whose checkpoint is used."""
TRAINED = ("preprocess", "blockwise", "finetune")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1800),  # four minutes where nothing else runs
    pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler"),
]


def ulp(values: torch.Tensor) -> torch.Tensor:
    """The step from each fp16 to the next."""
    return (values.view(torch.int16) + 1).view(torch.float16).sub(values).abs()


Came = dict[str, tuple[str | None, Any]]
"""Recipe or use -> what went wrong, if anything did, and what came of it."""


@pytest.fixture(scope="module")
def results(two_blocks, kinds, short, text, tmp_path_factory) -> dict[str, tuple[Path, Came]]:
    """Of the card and of the host: the folder with a result of each recipe, and what came of recipes and uses."""
    names = [USED, *(name for name in kinds if name != USED)]
    recipes = [short(name).model_dump(mode="json") for name in names]
    # compiled kernels of the host sum in another order than its torch, which is what the card here is made of
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads()), "ULTRALOWBIT_CPU": "reference"}
    both = {}
    for where in ("card", "cpu"):
        folder = tmp_path_factory.mktemp(where)
        (folder / "recipes.json").write_text(json.dumps(recipes))
        program = Path(__file__).with_name("second_device.py")
        command = [sys.executable, program, where, two_blocks, folder, text, folder / "recipes.json"]
        done = subprocess.run([*map(str, command)], capture_output=True, text=True, env=environment)
        assert done.returncode == 0, done.stderr[-3000:]
        both[where] = folder, json.loads(done.stdout.splitlines()[-1])
    return both


def test_the_device_tells_its_tensors_from_the_hosts(results):
    assert results["card"][1]["mixing"] == [None, None]


def test_a_recipe_runs_there_and_writes_what_it_writes_on_the_host(results, short, recipe_kind):
    wrong = {where: came[recipe_kind][0] for where, (_, came) in results.items()}
    assert wrong == {"card": None, "cpu": None}
    mine, theirs = (load_file(folder / recipe_kind / "model.safetensors") for folder, _ in results.values())
    assert mine.keys() == theirs.keys()
    if not any(getattr(short(recipe_kind), stage) for stage in TRAINED):  # optimizers sum in another order there
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
