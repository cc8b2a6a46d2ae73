"""Continuing a prompt, with the text handed out as it is written."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList, PreTrainedModel, TextStreamer

from ultralowbit.checkpoint.config import positions
from ultralowbit.errors import CheckpointError, InputError

log = logging.getLogger(__name__)


class _Stream(TextStreamer):
    def __init__(self, tokenizer: Any, on_text: Callable[[str], object]) -> None:
        super().__init__(tokenizer, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        self.on_text = on_text

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        self.on_text(text)


class _Samples(LogitsProcessor):
    """Raises where nothing can be sampled at a temperature: on a GPU sampling itself would end the process."""

    def __init__(self, temperature: float) -> None:
        self.temperature = temperature

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        largest = scores.amax(-1)
        if not largest.isfinite().all():
            raise CheckpointError("the model's probabilities are not finite: it collapsed, compress it with more bits")
        if not (largest / self.temperature).isfinite().all():
            raise InputError(f"a temperature of {self.temperature:g} is too small to sample at: 0 takes the likeliest")
        return scores


def generate(
    model: PreTrainedModel,
    tokenizer: Any,
    prompt: str,
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    seed: int = 0,
    on_text: Callable[[str], object] | None = None,
) -> str:
    """The prompt and what the model writes after it: the likeliest tokens at temperature 0, else samples.

    `on_text` gets the same text in pieces as it comes. The global random state stays as it was. It ends with the
    model's context; `InputError` where the prompt leaves no room in it.
    """
    inputs = tokenizer(prompt, return_tensors="pt")
    if not inputs["input_ids"].shape[1]:
        raise InputError("the prompt has no tokens: give a few words to continue")
    max_new_tokens = _within_context(model, inputs["input_ids"].shape[1], max_new_tokens)
    sampling = {"do_sample": False}
    if temperature:
        checks = LogitsProcessorList([_Samples(temperature)])
        sampling = {"do_sample": True, "temperature": temperature, "logits_processor": checks}
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(seed)
        tokens = model.generate(
            input_ids=inputs["input_ids"].to(model.device),
            attention_mask=inputs["attention_mask"].to(model.device),
            max_new_tokens=max_new_tokens,
            pad_token_id=tokenizer.eos_token_id,
            streamer=_Stream(tokenizer, on_text) if on_text else None,
            **sampling,
        )
    return tokenizer.decode(tokens[0], skip_special_tokens=True, clean_up_tokenization_spaces=False)


def _within_context(model: PreTrainedModel, prompt: int, wanted: int) -> int:
    """How many tokens can be written after a prompt of so many, where so many are wanted; fewer are warned of."""
    context = positions(model.config)
    if context is None or prompt + wanted <= context:
        return wanted
    if prompt >= context:
        raise InputError(
            f"the prompt has {prompt} tokens and the model's context is {context}: give at most {context - 1} of them"
        )
    log.warning(
        "the model's context is %d tokens, of which the prompt takes %d: at most %d are written instead of %d",
        context, prompt, context - prompt, wanted,
    )  # fmt: skip
    return context - prompt
