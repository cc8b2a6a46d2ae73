"""What the specs of trained stages make of a text's windows."""

from __future__ import annotations

import torch

from ultralowbit.training.specs import Finetune

CPU = torch.device("cpu")
TEXT = torch.randint(1000, (4096,), generator=torch.Generator().manual_seed(0))
SPEC = Finetune.model_validate({"objective": {"kind": "kl"}, "held_out": 0.25, "training": {"lr": {"scale": 1e-3}}})


def test_what_lies_over_held_out_windows_is_not_trained_on():
    starts = [0, 100, 1000, 1900, 2000, 3000, 1950, 3500]  # the last two are held out
    tokens = torch.stack([TEXT[start : start + 128] for start in starts])
    training, held_out, notes = SPEC.windows(tokens, CPU)
    assert torch.equal(held_out, tokens[6:]) and torch.equal(training, tokens[[0, 1, 2, 5]])
    assert notes == ("2 windows that share text with those held out were not trained on",)


def test_windows_that_lie_apart_are_all_trained_on():
    training, held_out, notes = SPEC.windows(TEXT.view(32, 128), CPU)
    assert len(training) == 24 and len(held_out) == 8 and notes == ()


def test_a_text_that_is_too_short_for_windows_of_its_own_is_trained_on_all_the_same():
    tokens = TEXT[:160].unfold(0, 128, 4)  # all lie over each other
    for some in (tokens, tokens[:1]):
        training, held_out, notes = SPEC.windows(some, CPU)
        assert len(training) == max(1, len(some) - len(held_out)) and notes == ()
