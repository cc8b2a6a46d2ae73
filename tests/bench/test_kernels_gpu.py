"""The GPU benchmark without a GPU: everything but the clock runs on a CPU, and no speed is asserted."""

from __future__ import annotations

import csv
import math

import pytest
import torch
from transformers import LlamaConfig
from typer.testing import CliRunner

from ultralowbit.bench import kernels_gpu as bench_gpu
from ultralowbit.bench.decode import Decoder, decode_bench_gpu
from ultralowbit.bench.kernels_gpu import FORMATS, check_csv, copies, error_of, product_bench, race
from ultralowbit.bench.models import random_llama
from ultralowbit.cli.app import app
from ultralowbit.errors import InputError
from ultralowbit.format.testing import random_packed
from ultralowbit.nn.linear import PackedLinear

CPU = torch.device("cpu")
TINY = LlamaConfig(
    hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
    vocab_size=96, max_position_embeddings=256,
)  # fmt: skip


@pytest.fixture
def two_copies(monkeypatch):
    monkeypatch.setattr("ultralowbit.bench.timing.cache_bytes", lambda device: 0)


def test_products_of_every_format(tmp_path, two_copies):
    said, file = [], tmp_path / "bench.csv"
    for _ in range(2):
        check_csv(file, CPU)
        rows = product_bench(CPU, [(48, 512)], [1, 3], rounds=2, csv_file=file, say=said.append)
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


@pytest.mark.parametrize("name", [None, "ptq161"])
def test_steps_write_what_generate_writes(name):
    model = random_llama(TINY, CPU, torch.float32, FORMATS.get(name))
    assert sum(isinstance(m, PackedLinear) for m in model.modules()) == (0 if name is None else 14)
    assert not any(tensor.is_meta for tensor in model.state_dict().values())
    first = torch.tensor([[5], [77]])
    decoder = Decoder(model, first, 12)
    written = [decoder.token.clone()]
    for _ in range(10):
        decoder.step()
        written.append(decoder.token.clone())
    fixed = {"do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    expected = model.generate(first, attention_mask=torch.ones_like(first), max_new_tokens=10, **fixed)
    assert torch.equal(torch.cat(written, 1), expected)


def test_decode_bench():
    said = []
    rows = decode_bench_gpu(CPU, ["1 plane", "pb-llm"], [1, 2], TINY, steps=2, rounds=2, say=said.append)
    assert [(row["format"], row["batch"]) for row in rows] == [
        (name, batch) for name in ("bf16", "1 plane", "pb-llm") for batch in (1, 2)
    ]
    assert all(row["tokens_per_second"] > 0 for row in rows) and rows[0]["x_bf16"] == rows[1]["x_bf16"] == 1
    assert len(said) == len(rows) + 3


def test_tuning_finds_the_cheapest():
    triton_tune = pytest.importorskip("ultralowbit.kernels.gpu.autotune")
    from ultralowbit.kernels.gpu.dispatch import Tile, read_tuning

    start = read_tuning("", 7)
    best = dict(zip(start.tiles, (Tile(64, 1, 4), Tile(256, 4, 2)), strict=False))

    def cost(tuning, tokens):
        size, tile = tuning.tile(tokens)
        if tile == Tile(128, 4, 4):
            return math.inf  # no room
        wrong = sum(abs(math.log2(a / b)) for a, b in zip(vars(tile).values(), vars(best[size]).values(), strict=True))
        return tokens * (1 + wrong + abs(tuning.programs - 3))

    said = []
    tuning = triton_tune.tune(cost, lambda tokens: 70.0, start, said.append)
    assert dict(tuning.tiles) == best and tuning.programs == 3 and tuning.gemm_tokens == 64
    assert triton_tune.tune(cost, lambda tokens: 0.0, tuning, said.append).gemm_tokens == tuning.gemv_tokens
    text = triton_tune.entry("Some GPU", tuning)
    assert text.startswith('"Some GPU": {') and "processors" not in text and '"gemm_tokens": 64' in text


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_one_sentence_says_so():
    for more in ([], ["--tune"]):
        result = CliRunner().invoke(app, ["bench", "kernels", "--device", "cuda", *more])
        said = " ".join(result.stderr.split())
        assert result.exit_code == 2 and not result.stdout
        assert said.startswith("error: --device is cuda, and torch") and "finds no GPU" in said
    result = CliRunner().invoke(app, ["bench", "kernels", "--tune"])
    assert result.exit_code == 2 and "--tune is for a GPU, and --device is cpu" in " ".join(result.stderr.split())
