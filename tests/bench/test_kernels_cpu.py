"""The kernel benchmark runs and reports what it promises; no speed is asserted."""

from __future__ import annotations

import csv
import math

import torch

from ultralowbit.bench.kernels_cpu import kernel_bench, processor
from ultralowbit.kernels import cpu


def test_kernel_bench(tmp_path, monkeypatch):
    monkeypatch.setattr("ultralowbit.bench.kernels_cpu.cache_bytes", lambda: 0)  # two copies of a weight will do
    threads, said = torch.get_num_threads(), []
    for _ in range(2):
        rows = kernel_bench(["64x256"], [1, 3], rounds=2, csv_file=tmp_path / "bench.csv", say=said.append)
    assert torch.get_num_threads() == threads
    assert len(rows) == 2 * (3 + 5 * 2) and all(row.us > 0 and row.spread >= 0 for row in rows)
    bf16, fp32, int4, packed = rows[0], rows[1], rows[2], rows[3]
    assert (bf16.bits, fp32.bits, int4.bits, packed.bits) == (16, 32, 4.25, 1 + 16 / 256)
    assert bf16.x_bf16 == 1 and math.isnan(bf16.x_fp32) and packed.x_bf16 == bf16.us / packed.us
    assert all(row.error < (0.05 if "int8" in row.path else 0.01) for row in rows)
    if cpu.instruction_sets():
        assert {row.path for row in rows} == {"torch", "exact_matmul", "int8_matmul"}
    with (tmp_path / "bench.csv").open() as stream:
        written = list(csv.DictReader(stream))
    assert len(written) == 2 * len(rows) and written[-1]["product"] == rows[-1].product
    assert written[0]["device"] == processor() and written[0]["isa"] == cpu.isa()
    assert sum("[3, 256] x [64, 256]" in line for line in said) == 2
