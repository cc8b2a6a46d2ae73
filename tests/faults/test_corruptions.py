"""Whatever happens to a file, the result is the same as before or one sentence: no other logits, no foreign error."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import ultralowbit
from ultralowbit.checkpoint.config import DIGEST
from ultralowbit.checkpoint.files import read_metadata
from ultralowbit.errors import CheckpointError
from ultralowbit.hub import open_tokenizer
from ultralowbit.pipeline.compress import compress
from ultralowbit.pipeline.verify import verify
from ultralowbit.recipe import Recipe

SHARD = "model.safetensors"
# --- a packed checkpoint ---------------------------------------------------------------------------------------------


def logits(folder: Path) -> Tensor:
    with torch.no_grad():
        return ultralowbit.load(folder)(torch.arange(4, 20)[None]).logits


@pytest.fixture(scope="session")
def expected(undisturbed) -> Tensor:
    return logits(undisturbed)


@pytest.fixture(scope="session")
def sharded(source, every_format, tmp_path_factory) -> Path:
    """The packed checkpoint in several shards."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ultralowbit.checkpoint.merge.SHARD_BYTES", 15_000)
        patch.setattr("ultralowbit.pipeline.source.BATCH_TOKENS", 48)
        return compress(str(source), every_format, tmp_path_factory.mktemp("sharded") / "out").folder


def test_a_config_that_was_edited_never_gives_other_logits(undisturbed, expected, corrupt):
    names = ["config.json", "config.json", "generation_config.json"]
    corrupt(undisturbed, names, lambda folder: torch.equal(logits(folder), expected), 250)


def test_headers_that_were_edited_never_give_other_logits(undisturbed, expected, corrupt):
    corrupt(undisturbed, [SHARD], lambda folder: torch.equal(logits(folder), expected), 150)


def test_an_index_that_was_edited_never_gives_other_logits(sharded, expected, corrupt):
    names = ["model.safetensors.index.json"]
    corrupt(sharded, names, lambda folder: torch.equal(logits(folder), expected), 60)


def test_verify_sees_every_byte_of_the_weights(undisturbed, corrupt):
    """The weights are not hashed on each loading: what loads after such damage is what `verify` is there for."""

    def read(folder: Path) -> bool:
        try:
            logits(folder)  # no foreign error
        finally:
            problems = verify(folder)
        if problems:
            raise CheckpointError(problems[0])
        return False

    corrupt(undisturbed, [SHARD], read, 120, ["payload"])


def test_a_manifest_that_was_edited_is_refused_or_makes_no_difference(undisturbed, source, every_format, corrupt):
    weights = (undisturbed / SHARD).read_bytes()

    def read(folder: Path) -> bool:
        problems = verify(folder)
        compress(str(source), every_format, folder)  # already there, or refused
        if problems:
            raise CheckpointError(problems[0])
        return (folder / SHARD).read_bytes() == weights

    corrupt(undisturbed, ["manifest.json", "manifest.json", ".ultralowbit-local.json"], read, 120)


def test_tokenizer_files_and_recipes_are_read_or_refused(undisturbed, corrupt):
    def read(folder: Path) -> bool:
        open_tokenizer(folder)("abc")
        Recipe.load(folder / "recipe.yaml")
        return True

    corrupt(undisturbed, ["tokenizer.json", "tokenizer_config.json", "recipe.yaml"], read, 150)


# --- a source --------------------------------------------------------------------------------------------------------


def test_sources_are_compressed_or_refused(source, text, corrupt, tmp_path):
    """Any other value may be that of another model: what is asked is that nothing foreign is raised."""
    recipe = Recipe.model_validate(
        {
            "name": "few",
            "quantize": {"method": "gptq", "bits": 2, "group": 32},
            "ignore": ["*mlp*", "*.1.*"],
            "calibration": {"source": text, "samples": 2, "length": 16},
        }
    )

    def read(folder: Path) -> bool:
        compress(str(folder), recipe, folder / "../out", restart=True)
        return True

    corrupt(source, ["config.json", "config.json", "tokenizer_config.json", "tokenizer.json", SHARD], read, 150)


# --- a job -----------------------------------------------------------------------------------------------------------


def test_a_job_goes_on_to_the_same_bytes_or_refuses(unfinished, source, every_format, undisturbed, corrupt):
    weights = (undisturbed / SHARD).read_bytes()

    def read(folder: Path) -> bool:
        compress(str(source), every_format, folder / "out")
        return (folder / "out" / SHARD).read_bytes() == weights

    suffixes = {".json", ".bin", ".safetensors"}
    names = [str(path.relative_to(unfinished)) for path in sorted(unfinished.rglob("*")) if path.suffix in suffixes]
    assert {Path(name).suffix for name in names} == suffixes
    corrupt(unfinished, ["out.work/job.json", *names], read, 120)


# --- stored values ---------------------------------------------------------------------------------------------------


def parts_of(folder: Path) -> list[tuple[str, str, float]]:
    """Stored tensors that can hold what nothing can have written: file key, what is said of it, a value to put in."""
    tensors = load_file(folder / SHARD)
    packed = [name for name in tensors if ".weight_" in name]
    floats = [(name, "not finite", float("nan")) for name in packed if tensors[name].is_floating_point()]
    places = [(n, "", 255 if tensors[n].dtype == torch.uint8 else -1) for n in packed if n.endswith(PLACES)]
    return floats + places


PLACES = ("_index", "_mask", "_salient", "_channel_order")


def test_values_that_cannot_be_are_refused_when_they_are_loaded(undisturbed, copied, campaign):
    """Also where every digest fits, as after a mistake of whoever wrote the file."""
    parts = parts_of(undisturbed)
    assert {name.rpartition("_")[2] for name, _, _ in parts} >= {"scale", "salient", "index", "order"}
    config = read_metadata(undisturbed / SHARD)[DIGEST]

    def attempt(name: str, said: str, value: float) -> bool:
        folder = copied(undisturbed)
        tensors = load_file(folder / SHARD)
        tensors[name].view(-1)[-1] = value
        save_file(tensors, folder / SHARD, {"format": "pt", DIGEST: config})
        try:
            logits(folder)
        except CheckpointError as error:
            assert name in str(error) and said in str(error)
            raise
        return False

    for part in parts:
        campaign.attempt(part[0], lambda part=part: attempt(*part))
    campaign.check()
