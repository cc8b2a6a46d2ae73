"""KL divergence and top-1 agreement: against a ten-line reference, on exact cases, and from a file."""

from __future__ import annotations

import json
import math
import random
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from ultralowbit.errors import InputError
from ultralowbit.eval.fidelity import Fidelity, by_depth, divergence, recorded
from ultralowbit.eval.metric import METRICS
from ultralowbit.eval.perplexity import perplexity
from ultralowbit.eval.windows import chunk_rows, cut, measure

VOCAB = 64


def observe(original, models, stream, **options):
    """Perplexities of the original and of the models, and the models' fidelities."""
    results = measure(models, stream, METRICS, original=original, **options)
    return [each["perplexity"] for each in results], [each["fidelity"] for each in results[1:]]


def llama(seed: int, vocab: int = VOCAB) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=vocab, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=64, initializer_range=0.3,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def base():
    return llama(0)


@pytest.fixture(scope="module")
def other(base):
    """The same model, every weight a little off."""
    model = llama(0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1 + 0.2 * torch.randn(p.shape, generator=generator))
    return model


@pytest.fixture(scope="module")
def stream():
    return torch.randint(VOCAB, (1000,), generator=torch.Generator().manual_seed(1))


def reference(base, other, stream, context):
    """Every distribution in fp64, all at once."""
    ids = stream[: len(stream) // context * context].view(-1, context)
    with torch.no_grad():
        p, q = (model(ids).logits[:, :-1].double().log_softmax(-1).flatten(0, 1) for model in (base, other))
    kl = (p.exp() * (p - q)).sum(-1)
    return kl, (p.argmax(-1) == q.argmax(-1)).double().mean().item()


@pytest.mark.parametrize("context", [2, 31, 64])
def test_agrees_with_the_definition(base, other, stream, context):
    (mine, theirs), (fidelity,) = observe(base, [other], stream, context=context, source="x")
    kl, top1 = reference(base, other, stream, context)
    assert kl.mean() > 0.05 and 0.1 < top1 < 0.95  # the case says something
    assert fidelity.kl_mean == pytest.approx(kl.mean().item(), rel=1e-5)
    ordered = kl.sort().values
    n = len(kl)
    assert fidelity.kl_median == pytest.approx(ordered[math.ceil(0.5 * n) - 1].item(), rel=1e-4)
    assert fidelity.kl_p99 == pytest.approx(ordered[math.ceil(0.99 * n) - 1].item(), rel=1e-4)
    assert fidelity.top1 == top1
    assert (fidelity.tokens, fidelity.source, fidelity.dtype, fidelity.original_dtype) == (n, "x", "float32", "float32")
    # and the perplexities are those of the models alone
    assert mine == perplexity(base, stream, context=context, source="x")
    assert theirs == perplexity(other, stream, context=context, source="x")
    assert fidelity.sha256 == mine.sha256 and fidelity.windows == mine.windows


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_is_exactly_as_itself(stream, dtype):
    model = llama(0).to(dtype)
    _, (fidelity,) = observe(model, [model], stream, context=50)
    assert (fidelity.kl_mean, fidelity.kl_median, fidelity.kl_p99, fidelity.top1) == (0, 0, 0, 1)
    assert fidelity.dtype == fidelity.original_dtype == str(dtype).removeprefix("torch.")


def test_the_noise_floor_lies_between_nothing_and_another_model(base, other, stream):
    rounded = llama(0).bfloat16()
    _, (floor, fidelity) = observe(base, [rounded, other], stream, context=64)
    assert 0 < floor.kl_mean < 0.1 * fidelity.kl_mean and fidelity.top1 < floor.top1 <= 1
    assert (floor.dtype, floor.original_dtype, fidelity.dtype) == ("bfloat16", "float32", "float32")


def test_batches_and_chunks_do_not_matter(base, other, stream, monkeypatch):
    _, (one,) = observe(base, [other], stream, context=31, batch_size=1)
    _, (many,) = observe(base, [other], stream, context=31, batch_size=1000)
    assert many.kl_mean == pytest.approx(one.kl_mean, rel=1e-5) and many.top1 == pytest.approx(one.top1, abs=2 / 960)
    monkeypatch.setitem(chunk_rows.__globals__, "_CHUNK", 5 * VOCAB)
    _, (chunked,) = observe(base, [other], stream, context=31, batch_size=1)
    assert chunked == one


def test_runs_repeat_and_leave_no_trace(base, other, stream):
    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
    base.train()
    try:
        first = observe(base, [other], stream, context=64)
        assert base.training and torch.is_grad_enabled()
    finally:
        base.eval()
    assert first == observe(base, [other], stream, context=64)
    assert states[:2] == (random.getstate(), np.random.get_state()[1].tolist())
    assert torch.equal(states[2], torch.get_rng_state())


def test_by_hand():
    p = torch.tensor([[0.5, 0.5, 0.0], [1.0, 0.0, 0.0], [0.25, 0.25, 0.5], [0.25, 0.25, 0.5]]).log()
    q = torch.tensor([[0.5, 0.25, 0.25], [0.5, 0.5, 0.0], [0.5, 0.5, 0.0], [0.25, 0.25, 0.5]]).log()
    kl, same = divergence(p, q)
    assert kl[:2].tolist() == pytest.approx([0.5 * math.log(2), math.log(2)])
    assert kl[2:].tolist() == [math.inf, 0]  # q rules out what p expects; the same
    assert same.tolist() == [True, True, False, True]


def test_collapse_is_reported(stream):
    model, broken = llama(0), llama(0)
    with torch.no_grad():
        broken.lm_head.weight.fill_(torch.nan)
    _, (fidelity,) = observe(model, [broken], stream, context=50)
    assert math.isnan(fidelity.kl_mean) and math.isnan(fidelity.kl_p99) and fidelity.top1 == 0


def test_nan_where_the_original_expects_nothing_is_still_nan():
    p = torch.tensor([[0.0, -torch.inf]])
    kl, same = divergence(p, torch.tensor([[0.0, torch.nan]]))
    assert kl.isnan().all() and not same.any()


def test_vocabularies_must_agree(base, stream):
    with pytest.raises(InputError, match=r"64 and 80 tokens.*original"):
        observe(base, [llama(0, 80)], stream, context=64)


def test_from_a_file_it_is_the_same(base, other, stream, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    windows = cut(stream, 30)
    seen = []
    with recorded(base, windows, batch_size=7, progress=lambda *done: seen.append(done)) as kept:
        assert list(tmp_path.rglob("*.bin"))
        for _ in range(2):  # it starts over by itself
            assert observe(kept, [other], stream, context=30, batch_size=7) == observe(
                base, [other], stream, context=30, batch_size=7
            )
    assert seen[-1] == (33, 33) and not list(tmp_path.iterdir())
    half = llama(0).bfloat16()
    with recorded(half, windows) as kept:
        assert observe(kept, [other], stream, context=30) == observe(half, [other], stream, context=30)


def test_a_file_that_does_not_fit_is_refused_in_words(base, stream, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 1000}))
    with pytest.raises(InputError, match="fewer tokens"), recorded(base, cut(stream, 30)):
        pass
    assert not list(Path(tmp_path).iterdir())


def test_report():
    fidelity = Fidelity(
        source="w", kl_mean=0.01234, kl_median=0.002, kl_p99=0.3, top1=0.934, windows=10, context=64, tokens=630,
        dtype="float32", original_dtype="bfloat16", bos="text", sha256="ab",
    )  # fmt: skip
    assert str(fidelity) == (
        "w: KL 0.01234 nats (median 0.00200, p99 0.3000), top-1 agreement 93.40% (10 windows of 64, 630 tokens, "
        "float32 against bfloat16)"
    )
    assert Fidelity(**json.loads(json.dumps(fidelity.to_dict()))) == fidelity


def test_divergence_builds_up_along_the_blocks(base, other, stream):
    """With all blocks replaced it is that of a model which shares all else; with some, that of one so assembled."""
    windows, kept = cut(stream[:96], 32), list(base.model.layers)
    done = []
    depths = by_depth(base, base.model.layers, other.model.layers, windows, progress=lambda *at: done.append(at))
    assert list(base.model.layers) == kept and done == [(1, 2), (2, 2)]
    assert (depths.windows, depths.context, depths.tokens, depths.dtype) == (3, 32, 93, "float32")
    for k, kl in enumerate(depths.kl, start=1):
        mixed = llama(0)
        for i in range(k):
            mixed.model.layers[i].load_state_dict(other.model.layers[i].state_dict())
        assert kl == pytest.approx(reference(base, mixed, stream[:96], 32)[0].mean().item(), rel=1e-4)


def test_what_blocks_before_put_out_is_not_computed_again(base, other, stream):
    ran, windows = [], cut(stream[:96], 32)
    blocks = [*base.model.layers, *other.model.layers]
    handles = [b.mlp.register_forward_hook(lambda *seen, i=i: ran.append(i)) for i, b in enumerate(blocks)]
    expected = by_depth(base, base.model.layers, other.model.layers, windows)
    assert [ran.count(i) / ran.count(2) for i in range(4)] == [1, 2, 1, 1]  # of the original's, of the other's
    for handle in handles:
        handle.remove()
    again = by_depth(base, base.model.layers, other.model.layers, windows)  # nothing is left of the first time
    assert again == expected


def test_equal_blocks_do_not_diverge_at_any_depth(base, stream):
    windows = cut(stream[:64], 32)
    assert by_depth(base, base.model.layers, llama(0).model.layers, windows).kl == (0.0, 0.0)


def test_blocks_are_put_back_after_a_failure(base, other, stream):
    kept = list(base.model.layers)

    def fail(*at):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        by_depth(base, base.model.layers, other.model.layers, cut(stream[:64], 32), progress=fail)
    assert list(base.model.layers) == kept
