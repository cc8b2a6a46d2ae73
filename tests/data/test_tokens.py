"""Long texts get exactly the tokens of one string, whatever the tokenizer; files of tokens are whole or made anew."""

from __future__ import annotations

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
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
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
    odd = [
        "\n\n",
        "\n",
        "  ",
        "     ",
        "\t",
        "e\u0301",
        "\U0001f600",
        "don't",
        "</s>",
        "1234567",
        ".",
        "\u4e2d",
        "...\n\n",
    ]
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
    trained.train_from_iterator([prose(1, 20_000)], trainer(**options))
    if pre_tokenizer is None:
        trained.pre_tokenizer = None
    trained.add_special_tokens([AddedToken("<pad>", lstrip=True)])
    trained.decoder = decoders.ByteLevel()
    made = PreTrainedTokenizerFast(tokenizer_object=trained, unk_token="<unk>", bos_token="<s>", eos_token="</s>")
    made.kind = kind
    return made


@pytest.fixture
def small(monkeypatch):
    """Chunks so short that a text of some pages has many; how many characters each encoded chunk has had."""
    monkeypatch.setattr(tokenize, "CHUNK", 1500)
    monkeypatch.setattr(tokenize, "OVERLAP", 300)
    monkeypatch.setattr(tokenize, "MARGIN", 8)
    sizes, whole = [], tokenize._encode
    monkeypatch.setattr(tokenize, "_encode", lambda backend, text: sizes.append(len(text)) or whole(backend, text))
    return sizes


def pieces_of(text: str, seed: int) -> list[str]:
    rng = random.Random(seed)
    cuts = sorted(rng.sample(range(len(text)), 40))
    return [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]


@pytest.mark.parametrize("seed", range(2, 6))
def test_a_long_text_has_the_tokens_of_one_string(tokenizer, small, seed):
    text = prose(seed, 30_000)
    made = [*tokenize.tokenize(tokenizer, pieces_of(text, seed))]
    assert np.array_equal(np.concatenate(made), encode(tokenizer, text))
    assert {part.dtype for part in made} == {np.dtype("int32")}
    assert len(made) > 1 or tokenizer.kind in ("whole unigram", "unknown")


@pytest.mark.parametrize("text", ["a" * 9000, "1" * 9000, " " * 9000, "\n" * 9000, "ab c" * 3000, "\u4e2d" * 5000])
def test_a_text_without_a_seam_is_one_chunk_in_the_end(tokenizer, small, text):
    made = np.concatenate([*tokenize.tokenize(tokenizer, [text])])
    assert np.array_equal(made, encode(tokenizer, text))
    assert sum(small) < 8 * len(text)


@pytest.mark.parametrize("text", ["", "a", "a b"])
def test_short_texts(tokenizer, text):
    assert np.concatenate([*tokenize.tokenize(tokenizer, [text])]).tolist() == encode(tokenizer, text)


def test_a_tokenizer_that_is_not_what_it_seems_gets_one_string(small):
    class Upper(PreTrainedTokenizerFast):
        def __call__(self, text, **kwargs):
            return super().__call__(text.upper(), **kwargs)

    vocab = {letter: i for i, letter in enumerate("abcABC ")}
    inner = Tokenizer(models.BPE(vocab, []))
    upper, text = Upper(tokenizer_object=inner), "ab c" * 3000
    assert np.concatenate([*tokenize.tokenize(upper, [text])]).tolist() == [vocab[c] for c in text.upper()]
    assert small == []


# -- kept


@pytest.fixture
def kept(tmp_path, monkeypatch, small):
    """What is kept of a text of 30,000 characters, in a folder of this test alone."""
    monkeypatch.setattr("huggingface_hub.utils._cache_assets.HF_ASSETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(tokens, "KEPT_FROM", 1000)
    (tmp_path / "a.txt").write_text(prose(3, 30_000))
    return lambda: sorted((tmp_path / "cache").rglob("*.uint16"))


@pytest.fixture
def gpt2():
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trained.train_from_iterator([prose(1, 20_000)], trainers.BpeTrainer(vocab_size=400, show_progress=False))
    return PreTrainedTokenizerFast(tokenizer_object=trained)


def test_a_text_is_tokenized_once(tmp_path, kept, gpt2, small):
    source, seen = str(tmp_path / "a.txt"), []
    first = text_tokens(source, "train", gpt2, progress=lambda *at: seen.append(at))
    assert np.array_equal(first, encode(gpt2, read_text(source, "train").text)) and first.dtype == np.uint16
    size = (tmp_path / "a.txt").stat().st_size
    assert seen[-1] == (size, size)
    assert len(kept()) == 1 and small
    assert kept()[0].stat().st_mode == (tmp_path / "a.txt").stat().st_mode  # for whom the umask says
    small.clear()
    again = text_tokens(source, "train", gpt2)
    assert isinstance(again, np.memmap) and np.array_equal(again, first)
    assert small == []


def test_another_text_or_tokenizer_is_another_file(tmp_path, kept, gpt2):
    source = tmp_path / "a.txt"
    text_tokens(str(source), "train", gpt2)
    source.write_text(source.read_text() + "x")
    text_tokens(str(source), "train", gpt2)
    gpt2.add_tokens(["the "])
    assert np.array_equal(text_tokens(str(source), "train", gpt2), encode(gpt2, source.read_text()))
    assert len(kept()) == 3


@pytest.mark.parametrize("damage", ["flip", "cut", "empty", "longer"])
def test_a_damaged_file_is_made_anew(tmp_path, kept, gpt2, damage, caplog):
    source = str(tmp_path / "a.txt")
    first = np.array(text_tokens(source, "train", gpt2))
    (path,) = kept()
    stored = path.read_bytes()
    flipped = bytes([stored[0] ^ 1]) + stored[1:]
    path.unlink()  # not written into: it is mapped
    path.write_bytes({"flip": flipped, "cut": stored[:-2], "empty": b"", "longer": stored + b"12"}[damage])
    assert np.array_equal(text_tokens(source, "train", gpt2), first)
    assert kept()[0].read_bytes() == stored
    assert "damaged" in caplog.text


def test_a_writer_that_fails_or_is_killed_leaves_nothing_that_is_read(tmp_path, kept, gpt2, monkeypatch):
    source, path = str(tmp_path / "a.txt"), tmp_path / "cache"
    whole = tokenize._seam
    monkeypatch.setattr(tokenize, "_seam", lambda *args: (_ for _ in ()).throw(RuntimeError("killed")))
    with pytest.raises(RuntimeError, match="killed"):
        text_tokens(source, "train", gpt2)
    assert not [file for file in path.rglob("*") if file.is_file()]
    monkeypatch.setattr(tokenize, "_seam", whole)
    text_tokens(source, "train", gpt2)
    (stored,) = kept()
    leftover = stored.with_name("tmpx.part")  # of a process that was killed
    leftover.write_bytes(b"half")
    tokens._make_room(stored)
    assert leftover.exists()  # it may be at work
    os.utime(leftover, (0, 0))
    tokens._make_room(stored)
    assert not leftover.exists() and stored.exists()


def test_the_files_not_used_for_longest_are_removed(tmp_path, kept, gpt2, monkeypatch):
    sources = []
    for number in range(3):
        sources.append(tmp_path / f"{number}.txt")
        sources[-1].write_text(prose(number, 20_000))
        text_tokens(str(sources[-1]), "train", gpt2)
        for age, path in enumerate(sorted(kept(), key=lambda path: path.stat().st_mtime, reverse=True)):
            os.utime(path, (1_000_000 - age, 1_000_000 - age))
    text_tokens(str(sources[0]), "train", gpt2)  # used now
    sizes = [path.stat().st_size for path in kept()]
    monkeypatch.setattr(tokens, "KEPT_BYTES", int(2.5 * max(sizes)))
    oldest = min(kept(), key=lambda path: path.stat().st_mtime)
    text_tokens(str(tmp_path / "a.txt"), "train", gpt2)
    assert oldest not in kept() and sum(path.stat().st_size for path in kept()) <= 2.5 * max(sizes)


def test_without_a_place_to_write_tokens_stay_in_memory(tmp_path, kept, gpt2, monkeypatch, caplog):
    (tmp_path / "cache").write_text("a file, where the folder should be")
    source = str(tmp_path / "a.txt")
    made = text_tokens(source, "train", gpt2)
    assert np.array_equal(made, encode(gpt2, read_text(source, "train").text))
    assert "stay in memory" in caplog.text


def test_only_the_first_tokens_are_made_where_no_more_are_wanted(tmp_path, kept, gpt2, small):
    source, seen = str(tmp_path / "a.txt"), []
    text = prose(3, 300_000)
    (tmp_path / "a.txt").write_text(text)
    first = text_tokens(source, "test", gpt2, most=700, progress=lambda *at: seen.append(at))
    assert first.tolist() == encode(gpt2, text[:10_000])[:700]
    assert sum(small) < 150_000 and kept() == [] and seen[-1] == (700, 700)


def test_the_key_is_the_same_in_another_process(tmp_path, gpt2):
    gpt2.save_pretrained(tmp_path)
    code = (
        "import sys; from transformers import AutoTokenizer; from ultralowbit.data import tokens; "
        "print(tokens._key(AutoTokenizer.from_pretrained(sys.argv[1]), 'x'))"
    )
    keys = {
        subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True).stdout
        for _ in range(2)
    }
    assert len(keys) == 1 and len(keys.pop().strip()) == 64
