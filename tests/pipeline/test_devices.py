"""Whole pipelines on the CPU, and on a GPU where there is one: every kind of recipe, and every use of a checkpoint."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ultralowbit.nn.hf import load
from ultralowbit.pipeline.compress import compress
from ultralowbit.pipeline.verify import verify


@pytest.fixture(scope="module")
def packed_on(two_blocks, short, tmp_path_factory):
    """packed_on(device): a checkpoint that was made there, once."""
    made: dict[str, Path] = {}

    def pack(device: torch.device) -> Path:
        if device.type not in made:
            made[device.type] = tmp_path_factory.mktemp(device.type) / "packed"
            compress(str(two_blocks), short("sign-2"), made[device.type], device=str(device))
        return made[device.type]

    return pack


@pytest.mark.slow
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")  # the host's are in test_second_device
def test_every_kind_of_recipe_is_as_close_to_the_weights_on_cuda(two_blocks, short, tmp_path, recipe_kind):
    errors = []
    for where in ("cuda", "cpu"):
        layers = compress(str(two_blocks), short(recipe_kind), tmp_path / where, device=where).manifest["layers"]
        errors.append([layer["error"] for layer in layers.values()])
    assert verify(tmp_path / "cuda") == []
    # a sum in another order turns a few signs that were near zero, after which later ones and blocks differ a little
    assert errors[0] == pytest.approx(errors[1], rel=0.1)


@pytest.mark.parametrize(
    ("use", "tolerance"),
    [("fp32", 3e-3), ("bf16", 0.1), ("fp16", 0.02), ("fuse", 3e-3), ("eval", 3e-3), ("measure", 0.1)],
)
def test_a_checkpoint_gives_the_same_numbers(two_blocks, packed_on, text, second_device, device, use, tolerance):
    packed = packed_on(device)
    there = second_device.uses(str(two_blocks), packed, text, device)[use]()
    here = second_device.uses(str(two_blocks), packed, text, torch.device("cpu"))[use]()
    assert there == pytest.approx(here, abs=tolerance)  # sums in another order, in the digits of the dtype


def test_a_checkpoint_writes_the_same(two_blocks, packed_on, text, second_device, device):
    packed = packed_on(device)
    there, here = (second_device.uses(str(two_blocks), packed, text, d) for d in (device, torch.device("cpu")))
    assert there["generate"]() == here["generate"]()
    assert there["sample"]() > 0


@pytest.mark.parametrize(("use", "expected"), [("verify", []), ("rerun", {}), ("resume", True)])
def test_a_run_can_be_verified_repeated_and_resumed(two_blocks, packed_on, text, second_device, device, use, expected):
    assert second_device.uses(str(two_blocks), packed_on(device), text, device)[use]() == expected


@pytest.mark.slow
def test_two_processes_share_a_device(packed_on, device):
    command = [sys.executable, "-m", "ultralowbit", "generate", packed_on(device), "a b c", "--max-new-tokens", "8"]
    running = [
        subprocess.Popen(
            [*map(str, command), "--device", str(device)], stdout=subprocess.PIPE, text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        for _ in range(2)
    ]  # fmt: skip
    first, second = (process.communicate()[0] for process in running)
    assert first == second and first.startswith("a b c")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_streams_do_not_disturb_one_another_on_cuda(packed_on):
    device = torch.device("cuda")
    model = load(packed_on(device), fuse=True, dtype=torch.float16).to(device)
    inputs = [torch.arange(start, start + 16, device=device)[None] for start in (4, 30)]
    with torch.no_grad():
        expected = [model(ids, use_cache=False).logits for ids in inputs]
        models = [model, load(packed_on(device), fuse=True, dtype=torch.float16).to(device)]
        streams = [torch.cuda.Stream(device) for _ in models]
        torch.cuda.synchronize(device)
        logits: list[list[torch.Tensor]] = [[], []]
        for _ in range(20):
            for own, net, stream, ids in zip(logits, models, streams, inputs, strict=True):
                with torch.cuda.stream(stream):
                    own.append(net(ids, use_cache=False).logits)
        torch.cuda.synchronize(device)
    for own, truth in zip(logits, expected, strict=True):
        assert all(torch.equal(one, truth) for one in own)
