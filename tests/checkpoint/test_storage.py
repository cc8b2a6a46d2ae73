"""Digests of many files: the same as one after the other, with all bytes counted, and ended by what goes wrong. Files
that are written beside others."""

from __future__ import annotations

import hashlib
import os

import pytest

from ultralowbit.checkpoint.storage import UNFINISHED, sha256_files, write_atomic


def test_digests_are_those_of_each_file(tmp_path):
    paths = [tmp_path / str(i) for i in range(9)]
    for i, path in enumerate(paths):
        path.write_bytes(bytes([i]) * (i * 1000))
    read: list[int] = []
    expected = {path: hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}
    assert sha256_files(iter(paths), read.append) == expected and [*sha256_files(paths)] == paths
    assert sum(read) == sum(path.stat().st_size for path in paths)
    assert sha256_files([]) == {}


def test_what_goes_wrong_ends_the_others(tmp_path):
    """Eight files of 200 reads each: an interrupt in the first read leaves nothing going on."""
    paths = [tmp_path / str(i) for i in range(8)]
    for path in paths:
        with path.open("wb") as f:
            f.truncate(200 << 23)  # holes

    calls: list[int] = []

    def interrupted(nbytes: int) -> None:
        calls.append(nbytes)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sha256_files(paths, interrupted)
    assert 1 <= len(calls) <= len(paths)
    with pytest.raises(FileNotFoundError):
        sha256_files([tmp_path / "missing", *paths[:1]])


@pytest.mark.parametrize("name", ["report.json", "n" * 255, os.fsdecode(b"\xff")], ids=["short", "long", "no utf-8"])
def test_a_file_is_written_beside_whatever_lies_there(tmp_path, name):
    """What is half-written after a kill has a name of its own, which the next writing replaces."""

    def killed():
        yield b"half"
        raise KeyboardInterrupt

    mine = tmp_path / "report.json.tmp"
    mine.write_text("mine")
    with pytest.raises(KeyboardInterrupt):
        write_atomic(tmp_path / name, killed())
    (left,) = {path.name for path in tmp_path.iterdir()} - {mine.name}
    assert left.startswith(UNFINISHED)
    write_atomic(tmp_path / name, b"whole")
    assert (tmp_path / name).read_bytes() == b"whole" and mine.read_text() == "mine"
    assert len([*tmp_path.iterdir()]) == 2
