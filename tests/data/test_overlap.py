"""Calibration text that stands in the evaluation text is noticed, wherever its windows begin."""

from __future__ import annotations

import pytest
import torch

from ultralowbit.data.overlap import SPAN, apart, seen_share

STREAM = torch.randint(50_000, (5000,), generator=torch.Generator().manual_seed(0))
OTHER = torch.randint(50_000, (4, 128), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("start", [0, 1, 777, 5000 - 256])
def test_a_window_from_the_stream_is_seen_wherever_it_begins(start):
    window = STREAM[start : start + 256]
    assert seen_share([window[None]], STREAM) == 1.0
    assert seen_share([window.view(2, 128), OTHER[:2]], STREAM) == 0.5


def test_other_text_is_not():
    assert seen_share([OTHER], STREAM) == 0.0
    near = STREAM[: 4 * SPAN].clone()
    near[5::SPAN] += 1  # one token of each span
    assert seen_share([near[None]], STREAM) == 0.0


def test_short_windows_and_streams_hold_no_span():
    assert seen_share([STREAM[None, : SPAN - 1]], STREAM) == 0.0
    assert seen_share([STREAM[None, :SPAN]], STREAM[: SPAN - 1]) == 0.0
    assert seen_share([], STREAM) == 0.0


def test_a_span_is_compared_as_a_whole():
    """Neither the order of tokens nor how they are split matters little."""
    span = STREAM[:SPAN]
    assert seen_share([span.flip(0)[None]], span) == 0.0 and seen_share([span[None]], span) == 1.0


def test_windows_that_lie_over_others_are_told_from_those_beside():
    windows = STREAM[:512].unfold(0, 128, 64)  # [7, 128], each over half of the next
    others = windows[[3]]
    assert apart(windows, others).tolist() == [True, True, False, False, False, True, True]
    assert apart(windows[:, : SPAN - 1], others).all() and apart(OTHER, others).all()
