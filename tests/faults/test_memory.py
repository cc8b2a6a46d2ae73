"""Where memory runs out: one sentence that says while doing what with which file, and the same command goes on."""

from __future__ import annotations

import resource
from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import AutoConfig

import ultralowbit
from ultralowbit.errors import OutOfMemory
from ultralowbit.pipeline.compress import compress
from ultralowbit.recipe import Recipe

SHARD = "model.safetensors"
WIDE = {
    "vocab_size": 2048, "hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256,
}  # fmt: skip


@pytest.fixture(autouse=True)
def small_batches() -> None:
    """Batches as large as they are."""


@pytest.fixture(scope="module")
def wide(save_model, tmp_path_factory) -> Path:
    """A model of a few MB, whose activations take more."""
    return save_model(AutoConfig.for_model("llama", **WIDE), tmp_path_factory.mktemp("wide") / "llama")


@pytest.fixture(scope="module")
def in_little_memory(behind_a_limit) -> Callable[[int, Callable[[], object]], str]:
    """in_little_memory(more, run): `run` in a process that may take so many more bytes of addresses; what it said."""

    def limit(more: int) -> None:
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        limit = pages * resource.getpagesize() + more
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))

    return lambda more, run: behind_a_limit(lambda: limit(more), run, OutOfMemory)


@pytest.fixture(scope="module")
def calibrated(text) -> Recipe:
    """A recipe whose activations take 16 MB in each of their files."""
    calibration = {"source": text, "samples": 128, "length": 128}
    quantize = {"method": "gptq", "bits": 2, "group": 32}
    return Recipe.model_validate({"name": "calibrated", "quantize": quantize, "calibration": calibration})


@pytest.fixture(scope="module")
def unlimited(wide, calibrated, tmp_path_factory) -> Path:
    return compress(str(wide), calibrated, tmp_path_factory.mktemp("unlimited") / "out").folder


@pytest.mark.parametrize("step", [40, pytest.param(4, marks=pytest.mark.campaign)], ids=["some", "many"])
def test_compressing_in_little_memory(wide, calibrated, unlimited, in_little_memory, tmp_path, campaign, step):
    expected, places = (unlimited / SHARD).read_bytes(), set()

    def attempt(megabytes: int) -> bool:
        out = tmp_path / str(megabytes)
        said = in_little_memory(megabytes << 20, lambda: compress(str(wide), calibrated, out))
        if said:
            assert said.startswith("OutOfMemory: out of memory while ") and "\n" not in said, said
            assert str(wide) in said or str(tmp_path) in said, said
            places.add(said.split(" while ")[1].split()[0])
            assert not out.exists()
            compress(str(wide), calibrated, out)
        return (out / SHARD).read_bytes() == expected

    for megabytes in range(0, 120, step):
        campaign.attempt(f"{megabytes} MB", lambda megabytes=megabytes: attempt(megabytes))
    campaign.check()
    assert "reading" in places


@pytest.mark.parametrize("step", [20, pytest.param(2, marks=pytest.mark.campaign)], ids=["some", "many"])
def test_loading_in_little_memory(unlimited, in_little_memory, campaign, step):
    refused = 0

    def attempt(megabytes: int) -> bool:
        nonlocal refused
        said = in_little_memory(megabytes << 20, lambda: ultralowbit.load(unlimited))
        refused += bool(said)
        assert not said or (said.startswith("OutOfMemory: out of memory while ") and str(unlimited) in said), said
        return True

    for megabytes in range(0, 120, step):
        campaign.attempt(f"{megabytes} MB", lambda megabytes=megabytes: attempt(megabytes))
    campaign.check()
    assert 0 < refused < campaign.counts.total()
