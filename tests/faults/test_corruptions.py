"""Whatever happens to a file, the result is the same as before or one sentence: no other logits, no foreign error."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
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
FAST = 12
"""Corruptions of each file in the fast suite."""

VALUES = [
    None, True, False, -1, 0, 1, 3, 2**31, 2**63, 1e-9, 1e308, float("nan"), float("inf"), "", "x", "silu", "F16",
    "bfloat16", "../x", "é\u0000\x1b[2J", [], {}, [[]], ["x"], [1, 2], {"a": {"b": 1}}, {"kind": "ints"}, "x" * 5000,
]  # fmt: skip
"""What may stand in the place of any value."""

WHOLE = [
    b"", b"[]", b"null", b'"x"', b"{", b"\xff\xfe{\x00}\x00", b"\xef\xbb\xbf{}", b"[" * 100_000, b'{"a":' * 50_000,
    b"{}", b"\x00" * 64, b"1e999", b"9" * 10_000, b"- a\n- b\n", b"a: &a [*a]\n",
    b"!!python/object/apply:os.getcwd []\n",
]  # fmt: skip
"""What may stand in the place of a whole file."""


# --- edits -----------------------------------------------------------------------------------------------------------


def places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every container in a JSON value, with a key or index of it."""
    if isinstance(value, dict | list):
        for key in list(value) if isinstance(value, dict) else range(len(value)):
            yield value, key
            yield from places(value[key])


def edited(value: Any, draw: Callable) -> Any:
    """A JSON value with one place changed: another value, no value, or one more."""
    container, key = draw(st.sampled_from(list(places(value))))
    action = draw(st.sampled_from(["replace", "replace", "replace", "delete", "add", "swap"]))
    if action == "replace":
        container[key] = draw(st.sampled_from(VALUES))
    elif action == "delete":
        del container[key]
    elif isinstance(container, dict):
        container["unknown" if action == "add" else str(key) + "2"] = container[key]
        if action == "swap":
            del container[key]
    else:
        container.append(container[key])
    return value


def edit_json(data: bytes, draw: Callable) -> bytes:
    return json.dumps(edited(json.loads(data), draw)).encode()


def edit_yaml(data: bytes, draw: Callable) -> bytes:
    return yaml.safe_dump(edited(yaml.safe_load(data), draw), allow_unicode=True).encode("utf-8", "replace")


def edit_header(data: bytes, draw: Callable) -> bytes:
    """Another value in the header of a safetensors file, or a length of it that is not its own."""
    length = int.from_bytes(data[:8], "little")
    if draw(st.booleans()) and draw(st.booleans()):
        return draw(st.sampled_from([0, 1, length - 1, length + 8, 2**40, 2**64 - 1])).to_bytes(8, "little") + data[8:]
    if draw(st.booleans()):
        at = draw(st.integers(8, 7 + length))
        return data[:at] + bytes([draw(st.integers(0, 255))]) + data[at + 1 :]
    header = edit_json(data[8 : 8 + length], draw)
    return len(header).to_bytes(8, "little") + header + data[8 + length :]


def edit_bytes(data: bytes, draw: Callable) -> bytes:
    """Bytes changed, cut, added or left out."""
    at = draw(st.integers(0, max(0, len(data) - 1)))
    action = draw(st.sampled_from(["flip", "flip", "zero", "cut", "insert", "append"]))
    if action == "flip":
        return data[:at] + bytes([data[at] ^ draw(st.integers(1, 255))]) + data[at + 1 :] if data else b"x"
    if action == "zero":
        return data[:at] + bytes(min(64, len(data) - at)) + data[at + 64 :]
    return {"cut": data[:at], "insert": data[:at] + b"\x00\xff" + data[at:], "append": data + b"junk"}[action]


def edit_payload(data: bytes, draw: Callable) -> bytes:
    start = 8 + int.from_bytes(data[:8], "little")
    return data[:start] + edit_bytes(data[start:], draw)


def edit_whole(data: bytes, draw: Callable) -> bytes:
    return draw(st.sampled_from(WHOLE))


EDITS = {
    ".json": [edit_json, edit_json, edit_json, edit_json, edit_bytes, edit_whole],
    ".yaml": [edit_yaml, edit_yaml, edit_yaml, edit_bytes, edit_whole],
    ".safetensors": [edit_header, edit_header, edit_header, edit_whole],
    ".bin": [edit_bytes, edit_whole],
}


@pytest.fixture(params=[FAST, pytest.param("slow", marks=pytest.mark.campaign)], ids=["few", "many"])
def corrupt(request, campaign, copied):
    """corrupt(folder, names, read, many=...): damages one of the files at a time and reads; `read(folder, before)` says
    whether all is as it was."""

    def run(folder: Path, names: list[str], read: Callable[[Path], bool], many: int, edits: Any = None) -> None:
        tries = many if request.param == "slow" else request.param

        @settings(
            max_examples=tries, deadline=None, database=None, derandomize=True, phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )  # fmt: skip
        @given(st.data())
        def attempt(data: st.DataObject) -> None:
            name = data.draw(st.sampled_from(names))
            edit = data.draw(st.sampled_from(edits or EDITS[Path(name).suffix]))
            damaged = copied(folder)
            before = (damaged / name).read_bytes()
            after = edit(before, data.draw)
            if after == before:
                return
            (damaged / name).write_bytes(after)
            campaign.attempt(f"{name} {edit.__name__} {_shown(before, after)}", lambda: read(damaged))

        attempt()
        campaign.check()

    return run


def _shown(before: bytes, after: bytes) -> str:
    """Where two contents part."""
    at = next((i for i, (a, b) in enumerate(zip(before, after, strict=False)) if a != b), min(len(before), len(after)))
    return f"at {at}: {before[max(0, at - 30) : at + 20]!r} -> {after[max(0, at - 30) : at + 20]!r}"


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

    corrupt(undisturbed, [SHARD], read, 120, [edit_payload])


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

    names = [str(path.relative_to(unfinished)) for path in sorted(unfinished.rglob("*")) if path.suffix in EDITS]
    assert {Path(name).suffix for name in names} == {".json", ".bin", ".safetensors"}
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
