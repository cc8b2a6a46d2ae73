"""Perplexity against the published script, exact models, and models that collapse."""

from __future__ import annotations

import json
import logging
import math
from types import SimpleNamespace

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from ultralowbit.data.corpora import token_sha256
from ultralowbit.errors import InputError
from ultralowbit.eval import windows as windows_module
from ultralowbit.eval.base import Result
from ultralowbit.eval.perplexity import Perplexity, PerplexityMetric, perplexity
from ultralowbit.eval.windows import chunk_rows, token_stream

VOCAB = 64


@pytest.fixture(scope="module")
def llama():
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
        initializer_range=0.3,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def stream():
    return torch.randint(VOCAB, (1000,), generator=torch.Generator().manual_seed(1))


class Constant(nn.Module):
    """The same logits everywhere."""

    def __init__(self, logits, dtype=torch.float32):
        super().__init__()
        self.logits = torch.as_tensor(logits, dtype=dtype)

    def forward(self, ids, **kwargs):
        assert kwargs == {"use_cache": False}
        return SimpleNamespace(logits=self.logits.expand(*ids.shape, -1))


def published(model, ids, seqlen):
    """The evaluation loop that GPTQ's tables come from, in its own order of operations."""
    n = ids.numel() // seqlen
    nlls = []
    for i in range(n):
        batch = ids[None, i * seqlen : (i + 1) * seqlen]
        with torch.no_grad():
            logits = model(batch).logits
        loss = nn.CrossEntropyLoss()(logits[:, :-1].reshape(-1, logits.shape[-1]), batch[:, 1:].reshape(-1))
        nlls.append(loss.float() * seqlen)
    return torch.exp(torch.stack(nlls).sum() / (n * seqlen)).item()


@pytest.mark.parametrize("context", [2, 7, 64])
def test_agrees_with_the_published_script(llama, stream, context):
    measured = perplexity(llama, stream, context=context, source="x")
    assert measured.perplexity == pytest.approx(published(llama, stream, context), rel=1e-6)
    assert measured.perplexity == math.exp(measured.nll)
    assert (measured.windows, measured.context, measured.tokens) == (
        1000 // context,
        context,
        1000 // context * (context - 1),
    )
    windows = stream[: 1000 // context * context].view(-1, context)
    assert (measured.source, measured.dtype, measured.bos) == ("x", "float32", "text")
    assert measured.sha256 == token_sha256(windows)


def test_batch_size_and_chunks_do_not_matter(llama, stream, monkeypatch):
    measured = perplexity(llama, stream, context=31, batch_size=1)
    for batch_size in (3, 32, 1000, None):
        assert perplexity(llama, stream, context=31, batch_size=batch_size).nll == pytest.approx(measured.nll, abs=1e-7)
    monkeypatch.setitem(chunk_rows.__globals__, "_CHUNK", 5 * VOCAB)
    assert perplexity(llama, stream, context=31, batch_size=1).nll == pytest.approx(measured.nll, abs=1e-9)


def test_equal_logits_sum_equally_in_any_batch(stream):
    model = Constant(torch.linspace(-3, 3, VOCAB))
    measured = perplexity(model, stream, context=31, batch_size=1)
    for batch_size in (2, 5, 1000):
        assert perplexity(model, stream, context=31, batch_size=batch_size) == measured


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_uniform_model_is_as_perplexed_as_its_vocabulary(stream, dtype):
    measured = perplexity(Constant(torch.zeros(VOCAB), dtype), stream, context=10)
    assert measured.perplexity == pytest.approx(VOCAB, rel=1e-6)
    assert measured.dtype == str(dtype).removeprefix("torch.")


def test_low_precision_logits_are_upcast(stream):
    logits = torch.linspace(-8, 8, VOCAB).bfloat16()
    measured = perplexity(Constant(logits, torch.bfloat16), stream, context=10)
    targets = stream.view(-1, 10)[:, 1:]
    expected = logits.double().logsumexp(-1) - logits.double()[targets].mean()
    assert measured.nll == pytest.approx(expected.item(), rel=1e-6)


def test_collapse_is_reported_not_raised(stream):
    nan = perplexity(Constant(torch.full((VOCAB,), torch.nan)), stream, context=10)
    assert math.isnan(nan.nll)
    assert math.isnan(nan.perplexity)
    assert "nan" in str(nan)
    never = perplexity(Constant(torch.full((VOCAB,), 0.0).index_fill(0, stream[1:2], -torch.inf)), stream, context=10)
    assert (never.nll, never.perplexity) == (math.inf, math.inf)
    far = perplexity(Constant(torch.zeros(VOCAB).index_fill(0, torch.arange(1), 1e6)), stream, context=10)
    assert far.perplexity == math.inf
    assert 1e5 < far.nll < math.inf


def test_max_tokens_cuts_the_stream(llama, stream):
    measured = perplexity(llama, stream, context=16, max_tokens=100)
    assert measured == perplexity(llama, stream[:96], context=16)
    assert perplexity(llama, stream, context=16, max_tokens=5000) == perplexity(llama, stream, context=16)


def test_default_batch_is_about_2048_tokens(stream):
    sizes = []

    class Spy(Constant):
        def forward(self, ids, **kwargs):
            sizes.append(tuple(ids.shape))
            return super().forward(ids, **kwargs)

    perplexity(Spy(torch.zeros(VOCAB)), stream.repeat(3), context=500)
    assert sizes == [(4, 500), (2, 500)]
    sizes.clear()
    perplexity(Spy(torch.zeros(VOCAB)), stream.repeat(6), context=3000)
    assert sizes == [(1, 3000)] * 2


@pytest.mark.parametrize(
    ("free", "total", "vocab", "expected"),
    [
        (70e9, 80e9, 49152, 80e9 / 16 / (8 * 49152)),  # by what the card has in all: the same on every run
        (1e9, 80e9, 49152, 2048),
        (4e9, 80e9, 49152, 4e9 / 4 / (8 * 49152)),  # nearly full
        (70e9, 80e9, 100, 32768),
        (70e9, 80e9, 10**7, 2048),
    ],
)
def test_batches_on_a_card_are_as_large_as_its_memory_allows(monkeypatch, free, total, vocab, expected):
    monkeypatch.setattr(windows_module, "_device", lambda *_: torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (int(free), int(total)))
    models = [Constant(torch.zeros(VOCAB)), Constant(torch.zeros(VOCAB))]
    models[1].config = SimpleNamespace(vocab_size=vocab)
    models[0].config = SimpleNamespace(vocab_size=50)
    windows = torch.zeros(1, 512, dtype=torch.int64)
    assert windows_module.batch_windows(models, windows) == int(expected) // 512


def test_nothing_is_read_from_the_device_before_the_end(llama, stream):
    class NoWaiting(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            assert func is not torch.ops.aten._local_scalar_dense.default
            return func(*args, **kwargs or {})

    windows = stream[:992].view(-1, 31)
    measured = PerplexityMetric().start()
    with torch.no_grad():
        logits = llama(windows).logits
    with NoWaiting():
        measured.add(windows, logits, None)
    how = Result(source="x", windows=32, context=31, tokens=960, dtype="float32")
    assert measured.result(how).nll == pytest.approx(math.log(published(llama, stream[:992], 31)), rel=1e-6)


def test_progress_grad_and_mode(llama, stream):
    seen = []
    llama.train()
    try:
        perplexity(llama, stream, context=64, batch_size=4, progress=lambda *done: seen.append(done))
        assert llama.training
    finally:
        llama.eval()
    assert seen == [(4, 15), (8, 15), (12, 15), (15, 15)]
    assert torch.is_grad_enabled()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokens": torch.zeros(15)}, "15 tokens, expected at least 16"),
        ({"tokens": torch.zeros(0)}, "0 tokens, expected at least 16"),
        ({"max_tokens": 9}, "9 tokens, expected at least 16"),
        ({"tokens": torch.zeros(1, 64)}, r"\(1, 64\)"),
        ({"context": 1}, "expected at least 2"),
        ({"context": 65}, "64 positions"),
        ({"max_tokens": 0}, "max_tokens is 0"),
        ({"batch_size": 0}, "batch_size is 0"),
    ],
)
def test_bad_input(llama, stream, changes, message):
    with pytest.raises(InputError, match=message):
        perplexity(llama, **{"tokens": stream, "context": 16, **changes})


def test_report():
    measured = Perplexity(
        source="wikitext2", perplexity=5.4712, nll=1.69949, windows=166, context=2048, tokens=339802, dtype="bfloat16",
        sha256="ab",
    )  # fmt: skip
    line = str(measured)
    assert line == "wikitext2: perplexity 5.4712 (166 windows of 2048, 339802 tokens, bfloat16, bos text)"
    assert Perplexity(**json.loads(json.dumps(measured.to_dict()))) == measured


# -- the stream


def make_tokenizer(template):
    vocab = {"<s>": 0, "</s>": 1, "a": 2, "b": 3}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="a"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if template:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=template, special_tokens=[("<s>", 0), ("</s>", 1)]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="a", model_max_length=2
    )


@pytest.mark.parametrize(
    ("template", "text", "expected"),
    [
        (None, "a b a", [2, 3, 2]),
        ("<s> $A", "a b a", [0, 2, 3, 2]),
        ("<s> $A </s>", "a b a", [0, 2, 3, 2]),
        ("$A </s>", "a b </s>", [2, 3, 1]),
        ("<s> $A", "a b </s>", [0, 2, 3, 1]),  # the text's own end stays
        ("</s> $A", "a b", [1, 2, 3]),  # OPT starts with its end token
        ("</s> $A", "", [1]),
    ],
)
def test_token_stream(template, text, expected, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)  # caplog listens at the root
    tokenizer = make_tokenizer(template)
    tokens = token_stream(tokenizer, text)
    assert (tokens.tolist(), tokens.dtype) == (expected, torch.int64)
    plain = [{"a": 2, "b": 3, "</s>": 1}[word] for word in text.split()]
    assert token_stream(tokenizer, text, bos="none").tolist() == plain
    assert not caplog.records


def test_token_stream_refuses_another_bos():
    with pytest.raises(InputError, match="'window'"):
        token_stream(make_tokenizer(None), "a", bos="window")
