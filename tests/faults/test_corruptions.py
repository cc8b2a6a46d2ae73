"""Whatever happens to a file, the result is the same as before or one sentence: no other logits, no foreign error."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import ultralowbit
from ultralowbit.checkpoint.config import DIGEST
from ultralowbit.checkpoint.files import read_metadata
from ultralowbit.checkpoint.job import Job
from ultralowbit.errors import CheckpointError, InputError
from ultralowbit.hub import open_tokenizer
from ultralowbit.pipeline.compress import compress
from ultralowbit.pipeline.verify import verify
from ultralowbit.recipe import Recipe
from ultralowbit.training import loop
from ultralowbit.training.loop import fit

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
        try:
            open_tokenizer(folder)("abc")
        except InputError as error:
            assert "(tokenizer" in str(error), f"{error} names no file"
            raise
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
    tensors = [name for name in names if name.endswith(".safetensors")]
    corrupt(unfinished, tensors, read, 20, ["payload"])


TRAINING = {"lr": {"scale": 0.01}, "steps": 3, "batch": 2, "evaluations": 3}
STAGES = {
    "preprocess": {"preprocess": {"rank": 2, "held_out": 0.3, "training": {**TRAINING, "lr": {"adapter": 0.01}}}},
    "merged": {"preprocess": {"rank": 2, "held_out": 0.3, "training": {**TRAINING, "lr": {"adapter": 0.01}}}},
    "blockwise": {"blockwise": {"held_out": 0.3, "objective": {"kind": "mse"}, "training": TRAINING}},
    "finetune": {"finetune": {"held_out": 0.3, "objective": {"kind": "kl"}, "training": TRAINING}},
}


def killed_while_training(model: Path, recipe: Recipe, out: Path, merged: bool) -> None:
    """Leave behind what a run leaves that is killed when it has saved the state of its training for the second time, or
    when it has packed the first block of the model with merged adapters."""
    child = os.fork()
    if child == 0:
        saved = 0
        fit.__kwdefaults__["save_seconds"] = 0.0

        def save(self: Any, whole: Callable = loop._Fit._save) -> None:
            nonlocal saved
            whole(self)
            saved += 1
            if saved == 2 and not merged:
                os.kill(os.getpid(), signal.SIGKILL)

        def commit(self: Job, whole: Callable = Job.commit) -> None:
            whole(self)
            if merged and (self.work / "preprocess/model").exists() and self.state["blocks"]:
                os.kill(os.getpid(), signal.SIGKILL)

        loop._Fit._save, Job.commit = save, commit
        try:
            compress(str(model), recipe, out)
        finally:
            os._exit(1)
    assert os.WIFSIGNALED(os.waitpid(child, 0)[1])


@pytest.mark.parametrize("stage", STAGES)
def test_training_goes_on_to_the_same_bytes_or_refuses(source, text, corrupt, tmp_path, stage):
    calibration = {"source": text, "samples": 4, "length": 16}
    values = {"name": stage, "quantize": {"method": "sign"}, "ignore": ["*mlp*"], "calibration": calibration}
    recipe = Recipe.model_validate(values | STAGES[stage])
    weights = (compress(str(source), recipe, tmp_path / "whole").folder / SHARD).read_bytes()
    (tmp_path / "unfinished").mkdir()
    killed_while_training(source, recipe, tmp_path / "unfinished/out", stage == "merged")
    names = [
        str(path.relative_to(tmp_path / "unfinished"))
        for path in sorted((tmp_path / "unfinished").rglob("*"))
        if path.suffix in (".json", ".bin", ".safetensors")
    ]
    wanted = {"preprocess": "adapters.", "merged": "model/", "blockwise": "blockwise-", "finetune": "finetune."}
    states = [name for name in names if wanted[stage] in name]
    assert states

    def read(folder: Path) -> bool:
        compress(str(source), recipe, folder / "out")
        return (folder / "out" / SHARD).read_bytes() == weights

    corrupt(tmp_path / "unfinished", [*states, *names], read, 40)
    tensors = [name for name in states if name.endswith(".safetensors")]
    corrupt(tmp_path / "unfinished", tensors, read, 20, ["payload"])


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
