"""Long texts get exactly the tokens of one string, whatever the tokenizer, and files of tokens are whole or made anew."""

from __future__ import annotations

import hashlib
import json
import os
import random
import subprocess
import sys

import numpy as np
import pytest
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from ultralowbit.data import tokenize, tokens
from ultralowbit.data.corpora import read_text
from ultralowbit.data.tokenize import encode
from ultralowbit.data.tokens import text_tokens

GPT4 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPACE = "\u2581"


def _llama2():
    return normalizers.Sequence([normalizers.Prepend(SPACE), normalizers.Replace(" ", SPACE)])


KINDS = {
    "gpt2": (models.BPE(), None, pre_tokenizers.ByteLevel(add_prefix_space=False)),
    "prefix space": (models.BPE(), None, pre_tokenizers.ByteLevel(add_prefix_space=True)),
    "gpt4": (
        models.BPE(ignore_merges=True),
        normalizers.NFC(),
        pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(GPT4), "isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        ),
    ),
    "llama2": (models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True), _llama2(), None),
    "unknown": (models.BPE(unk_token="<unk>", fuse_unk=True), _llama2(), None),
    "metaspace": (models.BPE(unk_token="<unk>"), None, pre_tokenizers.Metaspace(prepend_scheme="first", split=False)),
    "unigram": (models.Unigram(), normalizers.NFKC(), pre_tokenizers.Metaspace()),
    "whole unigram": (models.Unigram(), None, pre_tokenizers.Metaspace(split=False)),
    "wordpiece": (models.WordPiece(unk_token="<unk>"), normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()),
    "words": (models.WordLevel(unk_token="<unk>"), None, pre_tokenizers.WhitespaceSplit()),
}


def prose(seed: int, length: int) -> str:
    """Words, numbers, runs of spaces and newlines, accents apart from their letters, emoji, special tokens as text."""
    rng = random.Random(seed)
    words = ["".join(rng.choice("abcdeilmnorstu") for _ in range(rng.randint(1, 9))) for _ in range(400)]
    odd = ["\n\n", "\n", "  ", "     ", "\t", "e\u0301", "\U0001f600", "don't", "</s>", "1234567", ".", "\u4e2d\u6587", "...\n\n"]
    parts: list[str] = []
    while sum(map(len, parts)) < length:
        parts += [rng.choice(words if rng.random() < 0.85 else odd) + rng.choice(["", " ", " "]) for _ in range(200)]
    return "".join(parts)


@pytest.fixture(scope="module", params=KINDS)
def tokenizer(request):
    kind = request.param
    model, normalizer, pre_tokenizer = KINDS[kind]
    trained = Tokenizer(model)
    if normalizer is not None:
        trained.normalizer = normalizer
    # what has no words is trained on words, or it would take all of a text for one
    trained.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never") if pre_tokenizer is None else pre_tokenizer
    options = {"special_tokens": ["<unk>", "<s>", "</s>"], "vocab_size": 500, "show_progress": False}
    trainer = {
        models.BPE: trainers.BpeTrainer, models.Unigram: trainers.UnigramTrainer,
        models.WordPiece: trainers.WordPieceTrainer, models.WordLevel: trainers.WordLevelTrainer,
    }[type(model)]  # fmt: skip
    if trainer is trainers.UnigramTrainer:
        options["unk_token"] = "<unk>"
    if kind == "unknown":
        options["limit_alphabet"] = 20
    trained.train_from_iterator(prose(1, 20_000).split("\n"), trainer(**options))
    if pre_tokenizer is None:
        trained.pre_tokenizer = None
    trained.add_special_tokens([AddedToken("<pad>", lstrip=True)])
    trained.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=trained, unk_token="<unk>", bos_token="<s>", eos_token="</s>")
