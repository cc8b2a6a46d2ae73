"""What campaigns share: a tiny model, a checkpoint with every format in it, and how an attempt ended."""

from __future__ import annotations

import os
import shutil
import signal
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
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
