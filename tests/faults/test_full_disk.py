"""Where there is no room for a file: one sentence that names it, nothing half written, and the same command goes on."""

from __future__ import annotations

import resource
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from ultralowbit.errors import DiskFull
from ultralowbit.pipeline.compress import compress

SHARD = "model.safetensors"


def resized(folder: Path, kilobytes: int) -> bool:
    """Whether `folder` is now a file system of so many kilobytes."""
    return not subprocess.run(
        ["mount", "-o", f"remount,size={kilobytes}k", str(folder)], capture_output=True
    ).returncode


@pytest.fixture
def small_disk(tmp_path) -> Iterator[Path]:
    """A file system in memory, to be made larger and smaller."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("cannot mount a tmpfs here")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.parametrize("step", [48, pytest.param(4, marks=pytest.mark.campaign)], ids=["some", "many"])
def test_a_full_disk(source, every_format, undisturbed, small_disk, campaign, step):
    expected, full = (undisturbed / SHARD).read_bytes(), 0

    def attempt(kilobytes: int) -> bool:
        nonlocal full
        out = small_disk / "out"
        shutil.rmtree(out, ignore_errors=True)
        shutil.rmtree(small_disk / "out.work", ignore_errors=True)
        assert resized(small_disk, kilobytes)
        try:
            compress(str(source), every_format, out)
        except DiskFull as error:
            full += 1
            assert str(small_disk) in str(error)
            assert not out.exists()
            assert resized(small_disk, 4096)
            compress(str(source), every_format, out)
            return (out / SHARD).read_bytes() == expected
        return (out / SHARD).read_bytes() == expected

    for kilobytes in range(8, 320, step):
        campaign.attempt(f"{kilobytes} kB", lambda kilobytes=kilobytes: attempt(kilobytes))
    campaign.check()
    assert 0 < full < campaign.counts.total()


@pytest.mark.parametrize("step", [24_000, pytest.param(3_000, marks=pytest.mark.campaign)], ids=["some", "many"])
def test_files_that_may_not_be_so_large(source, every_format, undisturbed, behind_a_limit, tmp_path, campaign, step):
    expected = (undisturbed / SHARD).read_bytes()

    def limit(size: int) -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))

    def attempt(size: int) -> bool:
        out = tmp_path / str(size)
        said = behind_a_limit(lambda: limit(size), lambda: compress(str(source), every_format, out), DiskFull)
        if not said:
            return (out / SHARD).read_bytes() == expected
        assert said.startswith("DiskFull: "), said
        assert "larger than the system allows to write" in said
        assert not out.exists()
        compress(str(source), every_format, out)
        return (out / SHARD).read_bytes() == expected

    for size in range(100, len(expected) + 2 * step, step):
        campaign.attempt(f"{size} bytes", lambda size=size: attempt(size))
    campaign.check()
    assert campaign.counts["same"] == campaign.counts.total()
