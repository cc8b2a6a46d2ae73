"""The tests in gpu/ in Triton's interpreter: it must be chosen before a kernel is defined, so in another process."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

FOLDER = Path(__file__).parent / "gpu"


def test_the_kernels_in_the_interpreter():
    pytest.importorskip("triton")
    run = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", str(FOLDER)]
    env = os.environ | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(run, capture_output=True, text=True, cwd=FOLDER.parents[2], env=env)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    assert int(re.search(r"(\d+) passed", done.stdout)[1]) > 50, done.stdout[-2000:]
