"""The tests in gpu/ run on a GPU, or on the CPU in Triton's interpreter, which test_interpreter.py starts."""

from __future__ import annotations

import importlib.util
import os

import torch

RUNNABLE = importlib.util.find_spec("triton") and (torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET"))
collect_ignore = [] if RUNNABLE else ["gpu"]
