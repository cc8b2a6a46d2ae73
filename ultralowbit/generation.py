"""Continuing a prompt, with the text handed out as it is written."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers import PreTrainedModel, TextStreamer

from ultralowbit.hf import CheckpointError
from ultralowbit.text import InputError


class _Stream(TextStreamer):
    def __init__(self, tokenizer: Any, on_text: Callable[[str], object]) -> None:
        super().__init__(tokenizer, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        self.on_text = on_text

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        self.on_text(text)


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

    `on_text` gets the same text in pieces as it comes. The global random state stays as it was.
    """
    inputs = tokenizer(prompt, return_tensors="pt")
    if not inputs["input_ids"].shape[1]:
        raise InputError("the prompt has no tokens: give a few words to continue")
    sampling = {"do_sample": True, "temperature": temperature} if temperature else {"do_sample": False}
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(seed)
        try:
            tokens = model.generate(
                input_ids=inputs["input_ids"].to(model.device),
                attention_mask=inputs["attention_mask"].to(model.device),
                max_new_tokens=max_new_tokens,
                pad_token_id=tokenizer.eos_token_id,
                streamer=_Stream(tokenizer, on_text) if on_text else None,
                **sampling,
            )
        except RuntimeError as e:
            if not any(said in str(e) for said in ("probability tensor", "device-side assert")):  # on a CPU, on a GPU
                raise
            raise CheckpointError(
                "the model's probabilities are not finite: it collapsed, compress it with more bits"
            ) from e
    return tokenizer.decode(tokens[0], skip_special_tokens=True, clean_up_tokenization_spaces=False)
