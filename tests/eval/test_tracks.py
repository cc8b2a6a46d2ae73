"""Tracks: the original against itself is 1 everywhere, ratios are those of the definition, corruption is seeded."""

from __future__ import annotations

import json
import math
import random
from copy import deepcopy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForCausalLM

from ultralowbit.eval.perplexity import perplexity
from ultralowbit.eval.tracks import CORRUPTIONS, Observed, Track, across, corrupt, robustness, speed, tracks
from ultralowbit.eval.windows import token_stream

WORDS = "The quick brown Fox jumps over 13 lazy dogs, and nobody minds at all. " * 20
CONFIG = LlamaConfig(
    vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2,
    num_key_value_heads=2, max_position_embeddings=64,
)  # fmt: skip


@pytest.fixture(scope="module")
def model():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return LlamaForCausalLM(CONFIG).eval()


FULL = Observed(
    nll={"a": 3.1, "b": 2.7},
    accuracy={"piqa": (0.61, 0.5), "lambada": (0.3, 0.0)},
    robustness={"clean": 1.3, "typos": 1.5, "casing": 1.37, "whitespace": 1.301, "long": 3.1, "short": 3.3},
    recalibrated={"other": 3.1},
    seconds=12.7,
    spread=0.0,
    bits={"linear": 16.0, "model": 16.0},
    speed={"prompt": 911.3, "decoding": 40.7},
)


def test_the_original_against_itself_is_exactly_1():
    full = tracks(FULL, FULL)
    assert [len(track.ratios) for track in full.values()] == [2, 2, 5, 2, 2, 2]
    for track in (*full.values(), across({"llama": [full], "opt": [full, full]})):
        assert {*track.ratios.values(), track.quadratic, track.geometric, track.minimum} == {1.0}
        assert not track.missing


def test_a_measured_model_against_itself_is_exactly_1(model, tokenizer):
    seen = [robustness(model, tokenizer, WORDS, context=16, max_tokens=300) for _ in range(2)]
    track = tracks(Observed(robustness=seen[0]), Observed(robustness=seen[1]))["robustness"]
    assert {*track.ratios.values()} == {1.0} and {*CORRUPTIONS} <= {*track.ratios}


def test_ratios_by_hand():
    packed = Observed(
        nll={"a": 6.2, "b": math.inf},
        accuracy={"piqa": (0.555, 0.5), "lambada": (0.0, 0.0), "new": (0.5, 0.25)},
        robustness={"clean": 2.0, "typos": 2.4, "casing": 1.9, "whitespace": 2.001, "long": 6.2, "short": 6.3},
        recalibrated={"other": 12.4},
        seconds=25.4,
        spread=6.2,
        bits={"linear": 2.0, "model": 4.0},
        speed={"decoding": 81.4},
    )
    by_track = {name: track.ratios for name, track in tracks(FULL, packed).items()}
    assert by_track["language"] == {"a": 0.5, "b": 0.0}
    assert by_track["tasks"] == {"piqa": pytest.approx(0.5), "lambada": 0.0}
    # the floor: casing makes it better, which counts as nothing; whitespace costs neither anything
    assert by_track["robustness"] == {
        "typos": pytest.approx(0.5), "casing": pytest.approx(7.0), "whitespace": 1.0,
        "long windows": pytest.approx(0.5), "calibration on other": 0.5,
    }  # fmt: skip
    sure = Observed(accuracy={"a": (1.0, 1.0)})  # one choice
    assert tracks(sure, sure)["tasks"].missing == {"a": "the original does no better than a guess"}
    assert by_track["cost"] == {"time": 0.5, "seeds": 0.5}
    assert by_track["complexity"] == {"linear": 8.0, "model": 4.0}
    assert by_track["inference"] == {"decoding": 2.0}


def test_a_collapsed_model_has_nothing_left():
    broken = dict.fromkeys(FULL.robustness, math.nan)
    broken_tracks = tracks(FULL, Observed(nll={"a": math.nan}, robustness=broken))
    assert broken_tracks["language"].ratios == {"a": 0.0} and broken_tracks["language"].geometric == 0.0
    assert all(math.isfinite(r) for r in broken_tracks["robustness"].ratios.values())
    assert broken_tracks["robustness"].ratios["long windows"] == 0.0 == broken_tracks["robustness"].ratios["typos"]


def test_what_has_no_ratio_says_why():
    no_gain = Observed(robustness={"clean": 1.0, "long": 3.0, "short": 3.001}, accuracy={"piqa": (0.49, 0.5)})
    flat = tracks(no_gain, no_gain)
    assert flat["robustness"].missing.keys() == {"long windows"} and flat["tasks"].missing.keys() == {"piqa"}
    assert flat["language"].ratios == {}
    assert "quadratic" not in flat["language"].to_dict()


@given(st.lists(st.floats(0.01, 100), min_size=1, max_size=6))
def test_means_are_ordered(values):
    track = Track({str(i): v for i, v in enumerate(values)})
    assert track.minimum <= track.geometric * (1 + 1e-9) and track.geometric <= track.quadratic * (1 + 1e-9)
    assert track.to_dict()["quadratic"] == pytest.approx(math.sqrt(sum(v * v for v in values) / len(values)))
    json.dumps(track.to_dict(), allow_nan=False)


def test_families_count_alike():
    def of(*ratios: float) -> dict[str, Track]:
        return {"language": Track({str(i): r for i, r in enumerate(ratios)}), "tasks": Track({})}

    assert across({"llama": [of(1.0), of(0.5)], "opt": [of(0.5)], "none": [of()]}).ratios == {"llama": 0.75, "opt": 0.5}


# -- corruption


@pytest.mark.parametrize("kind", CORRUPTIONS)
def test_corruption_is_seeded_and_touches_a_tenth(kind):
    state = random.getstate()
    corrupted = corrupt(WORDS, kind, 1)
    assert corrupted == corrupt(WORDS, kind, 1) != corrupt(WORDS, kind, 2)
    assert random.getstate() == state
    words, changed = WORDS.split(), corrupted.split()
    if kind == "typos":
        assert len(words) == len(changed)
        different = sum(a != b for a, b in zip(words, changed, strict=True))
        assert 0.03 * len(words) < different < 0.12 * len(words)
        assert not any("1" in a and a != b for a, b in zip(words, changed, strict=True))  # numbers stay
    elif kind == "casing":
        assert corrupted.lower() == WORDS.lower() and corrupted != WORDS
    else:
        assert "".join(corrupted.split()) == "".join(words) and len(changed) < len(words)


@settings(max_examples=30, deadline=None)
@given(st.text(max_size=60), st.sampled_from(CORRUPTIONS))
def test_any_text_can_be_corrupted(text, kind):
    assert isinstance(corrupt(text, kind), str)


def test_nats_a_byte_and_windows(model, tokenizer):
    steps = []
    measured = robustness(model, tokenizer, WORDS, context=16, progress=lambda done, total: steps.append((done, total)))
    ids = token_stream(tokenizer, WORDS)
    clean = perplexity(model, ids, context=16)
    assert measured["clean"] == clean.nll * len(ids) / len(WORDS.encode()) and measured["long"] == clean.nll
    assert measured["short"] == perplexity(model, ids[: len(ids) // 16 * 16], context=4).nll
    assert steps == [(i, 4) for i in (1, 2, 3, 4)]


def test_speed_is_measured_in_turns(model):
    calls = []

    def counted(name: str) -> torch.nn.Module:
        copy = deepcopy(model)
        copy.register_forward_pre_hook(
            lambda _, args, kwargs: calls.append((name, (*args, kwargs.get("input_ids"))[0].shape[1])), with_kwargs=True
        )
        return copy

    rates = speed([counted("a"), counted("b")], torch.arange(12), new_tokens=3, repeats=1)
    assert all(rate > 0 for one in rates for rate in one.values()) and len(rates) == 2
    turn = [(name, n) for name in "ab" for n in (12, 1, 1, 1)]
    assert calls == 2 * turn
