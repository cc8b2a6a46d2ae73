"""Limits hold or are named, what to try can be typed, and a repeated token is seen."""

from __future__ import annotations

import math
import re
from dataclasses import replace

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from ultralowbit.recipe import Recipe, at_bits, shipped
from ultralowbit.report.gates import Continuation, advice, collapsed, continuations, exceeded
from ultralowbit.report.schema import Limits


def rows(build, before: float | None, after: float, kl: float | None) -> tuple[dict, dict]:
    original = {} if before is None else {"perplexity": [build.perplexity(before)]}
    near = {} if kl is None else {"fidelity": [build.fidelity(kl)]}
    return original, {"perplexity": [build.perplexity(after)], **near}


@pytest.mark.parametrize(
    ("limits", "measured", "said"),
    [
        (Limits(), (10, math.nan, math.nan), []),
        (Limits(ppl_ratio=3), (10, 30, None), []),
        (Limits(ppl_ratio=3), (10, 30.1, None), ["3.01 times that of the original, --max-ppl-ratio allows 3"]),
        (Limits(ppl_ratio=3), (10, math.nan, None), ["nan times"]),
        (Limits(ppl_ratio=3), (10, math.inf, None), ["inf times"]),
        (Limits(ppl_ratio=3), (None, 30, None), ["cannot be checked"]),
        (Limits(kl=0.5), (10, 99, 0.5), []),
        (Limits(kl=0.5), (10, 10, 0.51), ["0.51 nats per token, --max-kl allows 0.5"]),
        (Limits(kl=0.5), (10, 10, math.nan), ["nan nats"]),
        (Limits(kl=0.5), (10, 10, None), ["cannot be checked"]),
        (Limits(ppl_ratio=1, kl=0.5), (10, 20, 1), ["2.00 times", "1 nats"]),
    ],
)
def test_limits(build, limits, measured, said):
    lines = exceeded(limits, *rows(build, *measured))
    assert len(lines) == len(said) and all(part in line for part, line in zip(said, lines, strict=True))
    assert bool(limits) == (limits != Limits())


@pytest.mark.parametrize(
    ("value", "vocabulary", "gone"),
    [(95.9, 96, False), (96.5, 96, True), (1e9, None, False), (math.inf, None, True), (math.nan, 96, True)],
)
def test_worse_than_a_guess_is_a_collapse(build, value, vocabulary, gone):
    assert collapsed({"perplexity": [build.perplexity(value)]}, vocabulary) == ["novels.txt"] * gone


@pytest.mark.parametrize("name", shipped())
def test_what_to_try_can_be_typed(name):
    recipe = Recipe.load(name)
    text = advice(recipe, 2.154, 4096)
    settings, bits = re.findall(r"--set (\S+?)\)", text), re.findall(r"--bits ([\d.]+)", text)
    assert text.startswith("Try ") and text.endswith(").") and bits and (settings or recipe.allocate is not None)
    for setting in settings:
        assert Recipe.load(name, [setting]) != recipe
    for number in bits:
        assert Recipe.load("ulb", at_bits("ulb", number, "")).allocate.bits == float(number) <= 4


def test_advice_goes_up():
    assert "--set quantize.planes=2" in advice(Recipe.load("sign-1"), 1.004, 4096)
    two = advice(Recipe.load("gptq-2bit"), 2.154, 256)
    assert all(part in two for part in ("quantize.bits=3", "quantize.group=64", "--samples 256"))
    assert "(--bits 2.2 --effort fast)" in two
    four = advice(Recipe.load("gptq-4bit"), 4.156, 4096)
    assert "quantize.bits=8" in four and "--effort" not in four
    assert "--samples" not in advice(Recipe.load("rtn-4bit"), 4.156, 4096)  # it reads no text
    assert "quantize.group" not in advice(Recipe.load("gptq-2bit", ["quantize.group=32"]), 2.2, 4096)
    skipped = Recipe.load("gptq-4bit", ["quantize.bits=8", "quantize.group=32", "calibration.samples=3"])
    assert advice(skipped, 8.5, 4096) == "Try more calibration text (--samples 6)."


def test_advice_is_what_the_readme_measures():
    """At any bits up to four ours is better than the papers', and a training is worth more than anything else."""
    fast, trained = (advice(Recipe.load(name), 2.05, 4096) for name in ("ulb-fast", "ulb"))
    assert fast.startswith("Try a short training (--bits 2 --effort default), more bits (--bits 2.5)")
    assert trained.startswith("Try more bits (--bits 2.5)") and "--recipe" not in fast + trained
    assert "group" not in fast + trained
    assert "(--bits 2.1)" in advice(Recipe.load("sign-2-distilled"), 2.008, 4096)  # it trains too
    most = advice(Recipe.load("ulb-fast", ["allocate.bits=4"]), 4, 4096)
    assert "more bits" not in most and "--effort default" in most


def test_groups_are_smaller_than_the_rows():
    assert "quantize.group" not in advice(Recipe.load("sign-2"), 2.5, 32)
    assert "quantize.group=32" in advice(Recipe.load("sign-2"), 2.5, 64)
    assert "quantize.group=64" in advice(Recipe.load("sign-2"), 2.5, 128)


class Words:
    def decode(self, ids: list[int]) -> str:
        return " ".join(map(str, ids))


@pytest.fixture(scope="module")
def llama():
    config = LlamaConfig(
        vocab_size=32, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4,
        max_position_embeddings=32, initializer_range=0.5, eos_token_id=1, tie_word_embeddings=False,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return LlamaForCausalLM(config).eval()


def test_continuations_take_the_likeliest_token(llama):
    """Each as if it were alone, whatever the lengths of the others."""
    tokens = torch.randint(32, (100,), generator=torch.Generator().manual_seed(1))
    seen, starts = [], [tokens[:8], tokens[20:21], tokens[30:35]]
    results = continuations(llama, Words(), starts, length=6, progress=lambda *done: seen.append(done))
    for start, continued in zip(starts, results, strict=True):
        ids = start.tolist()
        with torch.no_grad():
            for _ in range(6):
                ids.append(llama(torch.tensor([ids])).logits[0, -1].argmax().item())
        written = ids[len(start) :]
        assert continued.prompt == Words().decode(start.tolist()) and continued.text == Words().decode(written)
        assert continued.share == max(written.count(i) for i in written) / 6
    assert seen[-1] == (6, 6)
    short, cut = continuations(llama, Words(), [tokens[:3], tokens])  # in a context of 32
    assert len(short.prompt.split()) == 3 and len(short.text.split()) == 24
    assert len(cut.prompt.split()) == 8 and len(cut.text.split()) == 24  # so that the rest fits


def test_a_repeated_token_is_seen(llama):
    broken = LlamaForCausalLM(llama.config).eval()
    with torch.no_grad():
        broken.lm_head.weight.fill_(torch.nan)
    (continued,) = continuations(broken, Words(), [torch.arange(16)])
    assert (continued.share, continued.repeats) == (1, True)
    assert not replace(continued, share=0.4).repeats and Continuation("", "", 0.5).repeats
