"""What campaigns share: a tiny model, a checkpoint with every format in it, what can happen to a file, and how an
attempt ended."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from transformers import AutoConfig

from ultralowbit.errors import CheckpointError, DiskFull, FormatError, InputError
from ultralowbit.pipeline.compress import compress
from ultralowbit.recipe import Recipe

LLAMA = {
    "vocab_size": 96,
    "hidden_size": 40,
    "intermediate_size": 56,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 0,
    "eos_token_id": 1,
}

OURS = (InputError, CheckpointError, FormatError, DiskFull)
"""The errors that say in one sentence what is wrong."""

EVERY_FORMAT = [
    {"match": "*q_proj", "quantize": {"method": "rtn", "bits": 3, "group": 32}},
    {"match": "*k_proj", "quantize": {"method": "sign", "planes": 2}},
    {"match": "*v_proj", "quantize": {"method": "db_llm", "group": 32}},
    {"match": "*o_proj", "quantize": {"method": "ptq161"}},
    {"match": "*gate_proj", "quantize": {"method": "billm"}},
    {"match": "*up_proj", "quantize": {"method": "pb_llm"}},
    {"match": "*.0.*down_proj", "quantize": {"method": "arb_rc"}},
]


class Campaign:
    """Counts how attempts end, and prints the counts: same (as if nothing had happened), refused in one sentence,
    different (another result without a word), foreign (an error that is not ours), hung."""

    def __init__(self, name: str) -> None:
        self.name, self.counts = name, Counter[str]()
        self.failures: list[str] = []

    def attempt(self, what: str, run: Callable[[], bool], seconds: int = 60) -> str:
        """Run one attempt; `run` says whether its result is the same as without the damage."""
        try:
            with _alarm(seconds):
                outcome, detail = ("same", "") if run() else ("different", "")
        except OURS as error:
            sentence = str(error)
            outcome = "refused" if sentence and "\n" not in sentence else "foreign"
            detail = f"{type(error).__name__}: {sentence}"
        except _Hung:
            outcome, detail = "hung", f"after {seconds} s"
        except Exception as error:
            outcome, detail = "foreign", f"{type(error).__name__}: {str(error)[:300]}"
        self.counts[outcome] += 1
        if outcome not in ("same", "refused"):
            self.failures.append(f"{what}: {outcome} {detail}")
        return outcome

    def check(self) -> None:
        """Print the counts; fail unless every attempt was refused or made no difference."""
        kinds = ("refused", "same", "different", "foreign", "hung")
        counts = ", ".join(f"{self.counts[kind]} {kind}" for kind in kinds)
        print(f"\n{self.name}: {self.counts.total()} tried, {counts}")
        assert not self.failures, "\n".join(self.failures[:20])


@pytest.fixture(scope="session")
def behind_a_limit() -> Callable[..., str]:
    """behind_a_limit(limit, run, refusal): `run` in a forked process after `limit`. What it said: class and message of
    an error of the class `refusal`, nothing if it ended well, else a text that begins with "foreign"."""

    def fork(limit: Callable[[], None], run: Callable[[], object], refusal: type[Exception]) -> str:
        reading, writing = os.pipe()
        pid = os.fork()
        if pid == 0:
            said = b""
            try:
                limit()
                run()
            except refusal as error:
                said = f"{type(error).__name__}: {error}".encode()
            except BaseException as error:
                said = f"foreign {type(error).__name__}: {error}".encode()
            os.write(writing, said)
            os._exit(0)
        os.close(writing)
        with open(reading, "rb") as pipe:
            said = pipe.read().decode()
        status = os.waitpid(pid, 0)[1]
        return said if status == 0 else f"foreign status {status}: {said}"

    return fork


class _Hung(BaseException):
    """An attempt took too long; no `except Exception` may swallow it."""


@contextmanager
def _alarm(seconds: int) -> Iterator[None]:
    def ring(*_: Any) -> None:
        raise _Hung

    before = signal.signal(signal.SIGALRM, ring)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


@pytest.fixture(autouse=True)
def small_batches(monkeypatch):
    """Three batches of two windows."""
    monkeypatch.setattr("ultralowbit.pipeline.source.BATCH_TOKENS", 48)


@pytest.fixture(scope="session")
def source(tmp_path_factory, save_model) -> Path:
    """A random Llama of two blocks, with its tokenizer."""
    return save_model(AutoConfig.for_model("llama", **LLAMA), tmp_path_factory.mktemp("model") / "llama")


@pytest.fixture(scope="session")
def every_format(text) -> Recipe:
    """A recipe whose Linears are stored in every format."""
    calibration = {"source": text, "samples": 6, "length": 24}
    return Recipe.model_validate(
        {
            "name": "every-format",
            "quantize": {"method": "gptq", "bits": 2, "group": 32},
            "overrides": EVERY_FORMAT,
            "calibration": calibration,
        }
    )


@pytest.fixture(scope="session")
def undisturbed(source, every_format, tmp_path_factory) -> Path:
    """What the recipe makes of the model when nobody interrupts."""
    root = tmp_path_factory.mktemp("undisturbed")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ultralowbit.pipeline.source.BATCH_TOKENS", 48)
        patch.chdir(root)
        return compress(str(source), every_format, "out").folder


@pytest.fixture(scope="session")
def unfinished(source, every_format, tmp_path_factory) -> Path:
    """A folder in which `out.work` was left behind after the first block."""
    root = tmp_path_factory.mktemp("unfinished")
    child = os.fork()
    if child == 0:
        from ultralowbit.pipeline.stream import BlockStream

        def commit(self: BlockStream, i: int, seconds: float, whole: Callable = BlockStream._commit) -> None:
            whole(self, i, seconds)
            os.kill(os.getpid(), signal.SIGKILL)

        BlockStream._commit = commit
        from ultralowbit.pipeline import source as reading

        reading.BATCH_TOKENS = 48
        os.chdir(root)
        try:
            compress(str(source), every_format, "out")
        finally:
            os._exit(1)
    assert os.WIFSIGNALED(os.waitpid(child, 0)[1])
    return root


@pytest.fixture
def copied(tmp_path) -> Callable[[Path], Path]:
    """copied(folder): a copy to be damaged, in place of the last one."""

    def copy(folder: Path) -> Path:
        shutil.rmtree(tmp_path / "damaged", ignore_errors=True)
        return Path(shutil.copytree(folder, tmp_path / "damaged"))

    return copy


@pytest.fixture
def campaign(request) -> Campaign:
    """The counts of this test."""
    return Campaign(request.node.name)


# --- what can happen to a file -----------------------------------------------------------------------------------

FAST = 12
"""Corruptions of each file in the fast suite."""

VALUES = [
    None, True, False, -1, 0, 1, 3, 2**31, 2**63, 10**400, 1e-9, 1e308, float("nan"), float("inf"), "", "x", "silu",
    "F16", "bfloat16", "../x", "é\u0000\x1b[2J", [], {}, [[]], ["x"], [1, 2], {"a": {"b": 1}}, {"kind": "ints"},
    "x" * 5000,
]  # fmt: skip
"""What may stand in the place of any value."""

WHOLE = [
    b"", b"[]", b"null", b'"x"', b"{", b"\xff\xfe{\x00}\x00", b"\xef\xbb\xbf{}", b"[" * 100_000, b'{"a":' * 50_000,
    b"{}", b"\x00" * 64, b"1e999", b"9" * 10_000, b"- a\n- b\n", b"a: &a [*a]\n",
    b"!!python/object/apply:os.getcwd []\n",
]  # fmt: skip
"""What may stand in the place of a whole file."""


def places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every container in a JSON value, with a key or index of it."""
    if isinstance(value, dict | list):
        for key in list(value) if isinstance(value, dict) else range(len(value)):
            yield value, key
            yield from places(value[key])


def edited(value: Any, draw: Callable) -> Any:
    """A JSON value with one place changed: another value, no value, or one more."""
    if not value:
        return draw(st.sampled_from(VALUES))
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


def edit_twice(data: bytes, draw: Callable) -> bytes:
    """A key that stands there twice, first or last with another value."""
    key = draw(st.sampled_from(sorted(json.loads(data)) or ["x"]))
    again = f"{json.dumps(key)}: {json.dumps(draw(st.sampled_from(VALUES)))}".encode()
    inner = data.strip()[1:-1]
    return b"{" + (again + b"," + inner if draw(st.booleans()) else inner + b"," + again) + b"}"


def edit_deep(data: bytes, draw: Callable) -> bytes:
    """A value that is nested so deeply that no parser may follow it."""
    container, key = draw(st.sampled_from(list(places(value := json.loads(data) or {"x": 1}))))
    container[key] = "deep"
    depth = draw(st.sampled_from([100, 900, 100_000]))
    deep = draw(st.sampled_from([b"[" * depth + b"]" * depth, b'{"a":' * depth + b"1" + b"}" * depth]))
    return json.dumps(value).encode().replace(b'"deep"', deep, 1)


def edit_encoding(data: bytes, draw: Callable) -> bytes:
    return data.decode().encode(draw(st.sampled_from(["utf-8-sig", "utf-16", "utf-16-le", "utf-32", "utf-7"])))


def edit_yaml(data: bytes, draw: Callable) -> bytes:
    return yaml.safe_dump(edited(yaml.safe_load(data), draw), allow_unicode=True).encode("utf-8", "replace")


def edit_front(data: bytes, draw: Callable) -> bytes:
    """Another value in the front matter of a Markdown file."""
    before, mark, rest = data.removeprefix(b"---\n").partition(b"\n---\n")
    return b"---\n" + edit_yaml(before, draw) + b"---\n" + rest if mark else data


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
    ".json": [*[edit_json] * 5, edit_twice, edit_deep, edit_encoding, edit_bytes, edit_whole],
    ".yaml": [*[edit_yaml] * 3, edit_encoding, edit_bytes, edit_whole],
    ".safetensors": [edit_header, edit_header, edit_header, edit_whole],
    ".bin": [edit_bytes, edit_whole],
}


@pytest.fixture(params=[FAST, pytest.param("slow", marks=pytest.mark.campaign)], ids=["few", "many"])
def corrupt(request, campaign, copied):
    """corrupt(folder, names, read, many=...): damages one of the files at a time and reads; `read(folder, before)` says
    whether all is as it was. `edits` names those of this file's that are made, by default what the suffix calls for."""

    def run(folder: Path, names: list[str], read: Callable[[Path], bool], many: int, edits: Sequence[str] = ()) -> None:
        tries = many if request.param == "slow" else request.param

        @settings(
            max_examples=tries, deadline=None, database=None, derandomize=True, phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )  # fmt: skip
        @given(st.data())
        def attempt(data: st.DataObject) -> None:
            name = data.draw(st.sampled_from(names))
            edit = data.draw(st.sampled_from([globals()[f"edit_{e}"] for e in edits] or EDITS[Path(name).suffix]))
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
