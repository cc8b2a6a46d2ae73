"""Calibration tokens: windows of a text, of documents, or of what the model itself writes."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ultralowbit.checkpoint.config import positions
from ultralowbit.data.corpora import is_collection, read_documents, token_sha256
from ultralowbit.data.tokenize import encode
from ultralowbit.data.tokens import text_tokens
from ultralowbit.errors import InputError, reason
from ultralowbit.nn.hf_names import cache_name
from ultralowbit.progress import OnProgress

_TRIES = 10_000  # documents drawn for one sample; in c4 one in fifty has 2048 tokens
_BATCH = 8  # samples written at once: 2048 tokens of a 7B model's keys and values are 1 GB each


@dataclass(frozen=True, eq=False)
class Calibration:
    """tokens [samples, length] int64 on the CPU, and what they were drawn from."""

    tokens: Tensor
    source: str
    seed: int

    @property
    def sha256(self) -> str:
        """Hex digest of the tokens' shape and values, see `token_sha256`."""
        return token_sha256(self.tokens)


def calibrate(
    source: str,
    tokenizer: Any,
    *,
    samples: int,
    length: int,
    seed: int,
    model_path: str | Path | None = None,
    device: str | torch.device = "cpu",
    trust_remote_code: bool = False,
    progress: OnProgress | None = None,
) -> Calibration:
    """Draw `samples` windows of `length` tokens from the train split of `source`, the same ones for the same seed.

    A text is tokenized as a whole, without special tokens (see `text_tokens`), and windows start at
    `random.Random(seed).randint(0, total - length - 1)`, one draw a sample: the published rule. A hub dataset of
    documents, such as c4, follows GPTQ: random documents until one has more than `length` tokens, then a random window
    of it. "self" is LLM-QAT's data-free corpus: the model in the folder `model_path`, run on `device` in its stored
    dtype, continues random tokens, greedily up to the third to fifth, then sampling; special tokens are left out.
    Python code that comes with it is run with `trust_remote_code` alone.

    Raises `InputError` if the text is shorter than `length + 1` tokens, or the source or the model cannot be read.
    """
    for name, value in (("samples", samples), ("length", length)):
        if value < 1:
            raise InputError(f"{name} is {value}, expected at least 1")
    progress = progress or (lambda done, total: None)
    rng = random.Random(seed)
    if source == "self":
        model = _load(model_path, device, trust_remote_code)
        tokens = _own_samples(tokenizer, samples, length, seed, model, progress)
    elif is_collection(source):
        tokens = _document_windows(source, tokenizer, samples, length, rng, progress)
    else:
        tokens = _text_windows(source, tokenizer, samples, length, rng, progress)
    return Calibration(tokens, source, seed)


def _text_windows(
    source: str, tokenizer: Any, samples: int, length: int, rng: random.Random, progress: OnProgress
) -> Tensor:
    ids = text_tokens(source, "train", tokenizer, progress=progress)
    if len(ids) <= length:
        raise InputError(
            f"{source!r} has {len(ids)} tokens, expected at least {length + 1} for windows of {length}: "
            "choose a shorter length or a longer text"
        )
    starts = [rng.randint(0, len(ids) - length - 1) for _ in range(samples)]
    return torch.stack([torch.from_numpy(ids[start : start + length].astype(np.int64)) for start in starts])


def _document_windows(
    source: str, tokenizer: Any, samples: int, length: int, rng: random.Random, progress: OnProgress
) -> Tensor:
    documents = read_documents(source, "train")
    tokens = torch.empty(samples, length, dtype=torch.int64)
    for done, window in enumerate(tokens, 1):
        ids = _long_document(source, documents, tokenizer, length, rng)
        start = rng.randint(0, len(ids) - length - 1)
        window.copy_(torch.tensor(ids[start : start + length]))
        progress(done * length, samples * length)
    return tokens


def _long_document(source: str, documents: Sequence[str], tokenizer: Any, length: int, rng: random.Random) -> list[int]:
    longest = 0
    for _ in range(_TRIES):
        ids = encode(tokenizer, documents[rng.randint(0, len(documents) - 1)])
        if len(ids) > length:
            return ids
        longest = max(longest, len(ids))
    raise InputError(
        f"the longest of {_TRIES} documents drawn from {source!r} has {longest} tokens, expected more than {length}: "
        "choose a shorter length, or join the documents in a local .txt file"
    )


def _own_samples(
    tokenizer: Any,
    samples: int,
    length: int,
    seed: int,
    model: Any,
    progress: OnProgress,
) -> Tensor:
    most = positions(model.config) or length
    if length > most:
        raise InputError(f"length is {length} but the model has {most} positions: choose a length up to those")
    allowed = _plain_ids(tokenizer, model)
    rng, generator = random.Random(seed), torch.Generator(model.device).manual_seed(seed)
    batches = []
    for start in range(0, samples, _BATCH):
        rows = min(_BATCH, samples - start)
        first = [rng.choice(allowed) for _ in range(rows)]
        greedy = [rng.randint(3, 5) for _ in range(rows)]
        batches.append(
            _continue(
                model,
                first,
                greedy,
                allowed,
                length,
                generator,
                lambda column, start=start, rows=rows: progress(start * length + rows * column, samples * length),
            )
        )
    return torch.cat(batches)


def _load(model_path: str | Path | None, device: str | torch.device, trust_remote_code: bool) -> Any:
    from transformers import AutoModelForCausalLM

    if model_path is None:
        raise InputError("calibration on 'self' needs the model that writes it: give model_path, or another source")
    try:
        model = AutoModelForCausalLM.from_pretrained(
            model_path, dtype="auto", use_safetensors=True, trust_remote_code=trust_remote_code
        )
        return model.to(device).eval()
    except (OSError, ValueError, RuntimeError, ImportError, AssertionError) as error:  # torch asserts that it has CUDA
        raise InputError(
            f"the model {str(model_path)!r} cannot be loaded on {device} to write its own samples ({reason(error)}): "
            "check the folder and the device, or calibrate on a text"
        ) from error


def _plain_ids(tokenizer: Any, model: Any) -> list[int]:
    """The ids of ordinary tokens, ascending: no special token ends a sample early or stands inside one."""
    special = {*tokenizer.all_special_ids}
    special.update(id for id, token in tokenizer.added_tokens_decoder.items() if token.special)
    for config in (model.config, model.generation_config):
        ends = getattr(config, "eos_token_id", None)
        special.update(ends if isinstance(ends, list | tuple) else () if ends is None else (ends,))
    rows = model.get_input_embeddings().num_embeddings
    plain = sorted(id for id in {*tokenizer.get_vocab().values()} - special if id < rows)
    if not plain:
        raise InputError("the tokenizer has only special tokens for this model: check that the two belong together")
    return plain


@torch.no_grad()
def _continue(
    model: Any,
    first: Sequence[int],
    greedy: Sequence[int],
    allowed: Sequence[int],
    length: int,
    generator: torch.Generator,
    progress: Callable[[int], object],
) -> Tensor:
    """Continue `first` [rows] to tokens [rows, length]: row r takes the likeliest of `allowed` up to token greedy[r],
    then samples at temperature 1."""
    device = model.device
    tokens = torch.empty(len(first), length, dtype=torch.int64, device=device)
    tokens[:, 0] = torch.tensor(first)
    until = torch.tensor(greedy, device=device)
    ids = torch.tensor(allowed, device=device)
    cache, name = None, cache_name(model)
    for column in range(1, length):
        # a model without such a cache reads its whole prefix again
        inputs = tokens[:, :column] if cache is None else tokens[:, column - 1 : column]
        output = model(input_ids=inputs, use_cache=True, **{name: cache})
        cache = getattr(output, name, None)
        odds = output.logits[:, -1].float()[:, ids].softmax(-1)  # [rows, allowed]
        if odds.isnan().any():
            raise InputError(
                f"the model's logits at token {column} of its own samples are not finite, expected numbers: "
                "check the checkpoint, or calibrate on a text"
            )
        drawn = torch.multinomial(odds, 1, generator=generator)[:, 0]
        tokens[:, column] = ids[torch.where(column < until, odds.argmax(-1), drawn)]
        progress(column + 1)
    return tokens.cpu()
