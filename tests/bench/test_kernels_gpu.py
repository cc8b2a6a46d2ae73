"""The GPU benchmark without a GPU: everything but the clock runs on a CPU, and no speed is asserted."""

from __future__ import annotations

import csv
import math
from dataclasses import replace
from itertools import cycle

import pytest
import torch
from transformers import LlamaConfig
from typer.testing import CliRunner

from ultralowbit.bench import kernels_gpu as bench_gpu
from ultralowbit.bench.decode import Decoder, decode_bench_gpu
from ultralowbit.bench.kernels_gpu import FORMATS, check_csv, copies, error_of, product_bench, race
from ultralowbit.bench.models import random_llama
from ultralowbit.bench.tuning import Search, entry
from ultralowbit.cli.app import app
from ultralowbit.errors import InputError
from ultralowbit.format.testing import random_packed
from ultralowbit.nn.linear import PackedLinear
from ultralowbit.units import format_seconds

CPU = torch.device("cpu")
TINY = LlamaConfig(
    hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
    vocab_size=96, max_position_embeddings=256,
)  # fmt: skip


@pytest.fixture
def two_copies(monkeypatch):
    monkeypatch.setattr("ultralowbit.bench.timing.cache_bytes", lambda device: 0)


def test_products_of_every_format(tmp_path, two_copies, device):
    said, file = [], tmp_path / "bench.csv"
    for _ in range(2):
        check_csv(file, device)
        rows = product_bench(device, [(48, 512)], [1, 3], rounds=2, csv_file=file, say=said.append)
    assert [(row.format, row.tokens) for row in rows] == [(name, n) for name in FORMATS for n in (1, 3)]
    for row in rows:
        assert row.us > 0 and row.us_alone > 0 and row.x_cublas > 0 and row.of_copy > 0 and math.isnan(row.x_gemlite)
        assert row.error < 2**-7
        format = FORMATS[row.format](512)
        assert row.bits == random_packed(format, 48).bits_per_weight > format.claimed_bits
    with file.open() as stream:
        written = list(csv.DictReader(stream))
    assert len(written) == 2 * len(rows) and written[0]["torch"] == torch.__version__
    assert sum("[48, 512]" in line for line in said) == 2


def test_a_wrong_product_is_not_timed(monkeypatch, two_copies):
    monkeypatch.setattr(bench_gpu, "packed_matmul", lambda x, tensors, layout: torch.ones(len(x), 48))
    with pytest.raises(RuntimeError, match=r"1 plane of \[48, 512\] with 1 tokens is wrong"):
        product_bench(CPU, [(48, 512)], [1], ["1 plane"], rounds=1, say=lambda line: None)


def test_a_file_with_other_columns_is_refused(tmp_path):
    file = tmp_path / "bench.csv"
    file.write_text("date,device\n")
    with pytest.raises(InputError, match="other columns"):
        check_csv(file, CPU)


def test_copies_do_not_fit_the_cache(monkeypatch):
    monkeypatch.setattr("ultralowbit.bench.timing.cache_bytes", lambda device: 50 << 20)
    assert copies(2 << 20, CPU) == 100 and copies(1 << 30, CPU) == 2


def test_entries_take_turns():
    order = []
    times = race({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, CPU, 3)
    assert order == ["a", "b"] * 4 and [len(t) for t in times.values()] == [3, 3]
    assert all(seconds == sorted(seconds) for seconds in times.values())


def test_the_error_is_that_of_all_rows():
    packed = random_packed(FORMATS["pb-llm"](512), 40)
    x = torch.randn(2, 512, generator=torch.Generator().manual_seed(0))
    exact = x.double() @ packed.dequantize().double().T
    assert error_of(exact, x, packed) < 1e-12
    y = exact.clone()
    y[1, 39] += 1
    assert error_of(y, x, packed) == pytest.approx(1 / exact.norm().item())


@pytest.mark.parametrize(
    ("name", "compiled"),
    [(None, False), ("ptq161", False), *(pytest.param(n, True, marks=pytest.mark.slow) for n in (None, "1 plane"))],
)
def test_steps_write_what_generate_writes(name, compiled, device):
    model = random_llama(TINY, device, torch.float32, FORMATS.get(name))
    assert sum(isinstance(m, PackedLinear) for m in model.modules()) == (0 if name is None else 14)
    assert not any(tensor.is_meta for tensor in model.state_dict().values())
    first = torch.tensor([[5], [77]], device=device)
    decoder = Decoder(model, first, 12, compiled)
    written = [decoder.token.clone()]
    for _ in range(10):
        decoder.step()
        written.append(decoder.token.clone())
    fixed = {"do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    expected = model.generate(first, attention_mask=torch.ones_like(first), max_new_tokens=10, **fixed)
    assert torch.equal(torch.cat(written, 1), expected)


def test_decode_bench(device):
    said = []
    rows = decode_bench_gpu(
        device, ["1 plane", "pb-llm"], [1, 2], TINY, steps=2, rounds=2, ways=["eager", "graph"], say=said.append
    )
    assert [(row["format"], row["way"], row["batch"]) for row in rows] == [
        (name, way, batch) for name in ("bf16", "1 plane", "pb-llm") for way in ("eager", "graph") for batch in (1, 2)
    ]
    assert all(row["tokens_per_second"] > 0 for row in rows) and [row["x_bf16"] for row in rows[:4]] == [1] * 4
    assert len(said) == len(rows) + 3


def wrong(tile, right):
    return sum(abs(math.log2(a / b)) for a, b in zip(vars(tile).values(), vars(right).values(), strict=True))


@pytest.fixture
def tuned():
    """The tuning to start from, the best, and what fields and unpacking cost: a search must find the best."""
    dispatch = pytest.importorskip("ultralowbit.kernels.gpu.dispatch")
    start = replace(dispatch.read_tuning("", 7), programs=2)
    tiles = dict(zip(start.tiles, cycle((dispatch.Tile(64, 1, 4), dispatch.Tile(256, 4, 2))), strict=False))
    unpacked = dict(zip(start.unpacked_tiles, cycle((dispatch.Tile(128, 8, 4), dispatch.Tile(64, 4, 3))), strict=False))
    best = replace(start, tiles=tiles, unpacked_tiles=unpacked, programs=3, gemm_tokens=48, unpacked_tokens=256)

    def fields(tuning, tokens):
        size, tile = tuning.tile(tokens)
        if tile.rows == 128 and tile.warps == 4:
            return math.inf  # no room
        return tokens * (1 + wrong(tile, tiles[size]) + abs(tuning.programs - 3))

    def unpacking(tuning, tokens):
        size = 64 if tokens <= 64 else 128
        return 40 + tokens / 4 + wrong(tuning.unpacked_tiles[size], unpacked[size])

    return start, best, (fields, unpacking)


def test_tuning_finds_the_cheapest(tuned):
    start, best, costs = tuned
    said = []
    search = Search(*costs, lambda tokens: 110.0, start, said.append)
    assert search.run() and search.best == best
    assert said[0].startswith("  1/") and "1 programs for each multiprocessor" in said[0]
    assert said[-1].split()[0] == f"{len(said)}/{len(said)}" and "0 s left" in said[-1]
    assert "fields" not in said[-1] and "unpacked" not in said[-1]  # both have lost before
    cheap = Search(*costs, lambda tokens: 0.0, best, said.append)
    assert cheap.run() and cheap.best.gemm_tokens == cheap.best.unpacked_tokens == best.gemv_tokens
    text = entry("Some GPU", best)
    assert text.startswith('"Some GPU": {') and "processors" not in text and '"gemm_tokens": 48' in text


def test_a_search_without_time_keeps_the_best_so_far(tuned):
    start, best, costs = tuned
    said, seconds = [], iter(range(100))
    search = Search(*costs, lambda tokens: 110.0, start, said.append, clock=lambda: next(seconds))
    assert not search.run(seconds=4)  # each try takes a second
    assert search.best == replace(start, programs=best.programs)
    assert len(said) == 5 and said[-1].startswith("stopped after 4 s")
    done, tries = map(int, said[1].split()[0].split("/"))
    assert f"about {format_seconds(tries - done)} left" in said[1]


def test_an_interrupted_search_keeps_the_best_so_far(tuned):
    start, best, (fields, unpacking) = tuned

    def interrupted(tuning, tokens):
        if tuning.programs == 6:
            raise KeyboardInterrupt
        return fields(tuning, tokens)

    search = Search(interrupted, unpacking, lambda tokens: 110.0, start, lambda line: None)
    with pytest.raises(KeyboardInterrupt):
        search.run()
    assert search.best == replace(start, programs=best.programs)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_one_sentence_says_so():
    for more in ([], ["--tune"]):
        result = CliRunner().invoke(app, ["bench", "kernels", "--device", "cuda", *more])
        said = " ".join(result.stderr.split())
        assert result.exit_code == 2 and not result.stdout
        assert said.startswith("error: --device is cuda, and torch") and "finds no GPU" in said
    result = CliRunner().invoke(app, ["bench", "kernels", "--tune"])
    assert result.exit_code == 2 and "--tune is for a GPU, and --device is cpu" in " ".join(result.stderr.split())
    result = CliRunner().invoke(app, ["bench", "kernels", "--seconds", "60"])
    assert result.exit_code == 2 and "--seconds is the time of --tune" in " ".join(result.stderr.split())
