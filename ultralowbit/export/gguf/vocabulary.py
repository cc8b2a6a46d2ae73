"""The tokenizer of a checkpoint as llama.cpp reads it, made of what transformers loads.

Byte-level BPE is "gpt2" to llama.cpp, with a name for how text is split into words; BPE over SentencePiece's pieces is
"llama", with a score a piece.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ultralowbit.errors import InputError
from ultralowbit.hub import open_tokenizer

if TYPE_CHECKING:
    from gguf import GGUFWriter

_SPACE = "\u2581"  # SentencePiece's
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = range(1, 7)  # gguf.TokenType

_GPT2, _DIGITS = "gpt2", "digits"
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_END = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_WORD = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CASED = rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+%s|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*%s"
_OTHER = r" ?[^\s\p{L}\p{N}]+"
_LLAMA3 = rf"{_CONTRACTIONS}|{_WORD}|\p{{N}}{{1,3}}|{_OTHER}[\r\n]*|{_END}"
_QWEN2 = rf"{_CONTRACTIONS}|{_WORD}|\p{{N}}|{_OTHER}[\r\n]*|{_END}"
_TEKKEN = rf"{_CASED % ('', '')}|\p{{N}}|{_OTHER}[\r\n/]*|{_END}"
_GPT4O = rf"{_CASED % (_CONTRACTIONS + '?', _CONTRACTIONS + '?')}|\p{{N}}{{1,3}}|{_OTHER}[\r\n/]*|{_END}"

_SPLITS = {
    ((_GPT2,), False): "gpt-2",
    ((_DIGITS, _GPT2), False): "smollm",
    ((_LLAMA3,), True): "llama-bpe",
    ((_LLAMA3,), False): "dbrx",
    ((_QWEN2,), False): "qwen2",
    ((_TEKKEN,), True): "tekken",
    ((_GPT4O,), False): "gpt-4o",
}
"""How words are split, step by step, and whether a word that is a token is one at once -> llama.cpp's name for it."""


@dataclass
class Vocabulary:
    """What a GGUF file says of a tokenizer; `texts`, `types` and `scores` have an entry for each row of the embeddings.

    split: llama.cpp's name for how words are split, of byte-level BPE; None for SentencePiece's pieces.
    """

    texts: list[str]
    types: list[int]
    split: str | None
    merges: list[str] = field(default_factory=list)
    scores: list[float] = field(default_factory=list)
    chat_template: str | list[dict[str, str]] | None = None
    special: dict[str, int] = field(default_factory=dict)
    """bos, eos, eot, unk, pad -> token"""
    added: dict[str, bool] = field(default_factory=dict)
    """bos, eos -> whether the tokenizer puts it around a text"""
    space_first: bool = False
    """Whether it puts a space before a text."""

    @classmethod
    def read(cls, folder: Path, rows: int, stops: Collection[int]) -> Vocabulary:
        """The tokenizer of a checkpoint whose embeddings have `rows` rows, and which stops at the tokens `stops`.

        Raises `InputError` for one that llama.cpp would read otherwise than transformers does.
        """
        tokenizer = open_tokenizer(folder)
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if backend is None:
            raise _unknown(folder, f"is a {type(tokenizer).__name__} in Python alone")
        parts = json.loads(backend.to_str())
        if len(tokenizer) > rows:
            raise InputError(
                f"the tokenizer of {folder} has {len(tokenizer)} tokens and the embeddings {rows} rows: llama.cpp "
                "reads no token without a row, use the tokenizer that belongs to the model"
            )
        model = parts["model"]
        if model["type"] != "BPE":
            raise _unknown(folder, f"is of the type {model['type']}")
        pieces = bool(model.get("byte_fallback"))
        vocabulary = cls(*_tokens(tokenizer, rows), None if pieces else _split(parts, folder))
        merges = [merge if isinstance(merge, list) else merge.split(" ") for merge in model["merges"]]
        if pieces:
            vocabulary._add_scores(merges, model.get("unk_token"))
        else:
            vocabulary.merges = [" ".join(merge) for merge in merges]
        template = tokenizer.chat_template
        named = isinstance(template, dict)
        vocabulary.chat_template = [{"name": n, "template": t} for n, t in template.items()] if named else template
        vocabulary._add_special(tokenizer, stops)
        return vocabulary

    def _add_scores(self, merges: list[list[str]], unknown: str | None) -> None:
        """The score of a piece falls with the rank of the merge that makes it: llama.cpp merges the best one first."""
        ranks: dict[str, int] = {}
        for rank, merge in enumerate(merges):
            ranks.setdefault("".join(merge), rank)
        self.scores = [-float(ranks.get(text, len(merges))) for text in self.texts]
        for token, text in enumerate(self.texts):
            if self.types[token] == _NORMAL and re.fullmatch("<0x[0-9A-F]{2}>", text):
                self.types[token] = _BYTE
            elif text == unknown:
                self.types[token] = _UNKNOWN

    def _add_special(self, tokenizer: Any, stops: Collection[int]) -> None:
        ids = {name: getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "unk", "pad")}
        others = [token for token in stops if token != ids["eos"]]
        ids["eot"] = others[0] if others else None
        self.special = {name: token for name, token in ids.items() if token is not None}
        tokens = tokenizer("a")["input_ids"]
        self.added = {"bos": tokens[0] == ids["bos"], "eos": tokens[-1] == ids["eos"]}
        first = tokenizer.convert_ids_to_tokens(tokens)[int(self.added["bos"])]
        self.space_first = first.startswith(_SPACE)

    def describe(self, writer: GGUFWriter) -> None:
        """Add the tokenizer, its special tokens and its chat templates to a file."""
        writer.add_tokenizer_model("gpt2" if self.split else "llama")
        writer.add_tokenizer_pre(self.split or "default")
        writer.add_token_list(self.texts)
        writer.add_token_types(self.types)
        if self.split:
            writer.add_token_merges(self.merges)
        else:
            writer.add_token_scores(self.scores)
            writer.add_add_space_prefix(self.space_first)
        for name, token in self.special.items():
            getattr(writer, f"add_{name}_token_id")(token)
        for name, adds in self.added.items():
            getattr(writer, f"add_add_{name}_token")(adds)
        if self.chat_template:
            writer.add_chat_template(self.chat_template)


def _tokens(tokenizer: Any, rows: int) -> tuple[list[str], list[int]]:
    """Text and type of the token of each row; rows without a token are unused."""
    of_id = {token: text for text, token in tokenizer.get_vocab().items()}
    added = tokenizer.added_tokens_decoder
    texts, types = [], []
    for token in range(rows):
        text = of_id.get(token)
        if text is None:
            text, kind = f"[PAD{token}]", _UNUSED
        elif token not in added:
            kind = _NORMAL
        elif added[token].special or re.fullmatch(r"<(\|.*\||unused.*|pad|mask)>", text):
            kind = _CONTROL
        else:
            text, kind = text.replace(_SPACE, " "), _USER_DEFINED
        texts.append(text)
        types.append(kind)
    return texts, types


def _split(parts: dict[str, Any], folder: Path) -> str:
    """llama.cpp's name for how byte-level BPE splits words."""
    model = parts["model"]
    if not model["merges"]:
        raise _unknown(folder, "has no merges")
    normalizer = (parts["normalizer"] or {}).get("type")
    if normalizer not in (None, "NFC"):
        raise _unknown(folder, f"changes texts first ({normalizer})")
    before = parts["pre_tokenizer"] or {}
    steps = [_step(step) for step in before.get("pretokenizers", [before])]
    name = _SPLITS.get((tuple(step for step in steps if step), bool(model.get("ignore_merges"))))
    if name is None:
        raise _unknown(folder, f"splits words by {json.dumps(before, ensure_ascii=False)[:200]}")
    return name


def _step(step: dict[str, Any]) -> str | None:
    """A step of a pre-tokenizer as `_SPLITS` names it, None for one that splits nothing."""
    kind, pattern = step.get("type"), step.get("pattern", {})
    if kind == "ByteLevel" and not step["add_prefix_space"]:
        return _GPT2 if step["use_regex"] else None
    if kind == "Digits" and step["individual_digits"]:
        return _DIGITS
    if kind == "Split" and "Regex" in pattern and step["behavior"] in ("Isolated", "Removed"):
        return pattern["Regex"]
    return json.dumps(step)  # no key of _SPLITS


def _unknown(folder: Path, what: str) -> InputError:
    return InputError(
        f"the tokenizer of {folder} {what}, which llama.cpp would read differently: expected BPE over SentencePiece's "
        "pieces, or over bytes with words split as GPT-2, SmolLM, Llama 3, Qwen 2, Tekken or GPT-4o do; export to "
        "dense instead"
    )
