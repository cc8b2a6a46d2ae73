"""The demo model's text and checkpoint."""

import importlib.util
import math
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from ultralowbit.data.python_docs import corpus, documents
from ultralowbit.demo.train import CHECKPOINT, END, batches, evaluate

TRAINED_ON = (3, 11)  # other minor versions have other text
PERPLEXITY = 28.66  # measured on 3.11.7: the first 8192 held-out tokens, in windows of 256


def squeeze(text: str) -> str:
    return " ".join(text.split())


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(CHECKPOINT)


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(CHECKPOINT, dtype=torch.float32).eval()


def test_corpus_is_the_same_when_read_again():
    for split in ("train", "heldout"):
        first = corpus(split)
        documents.cache_clear()
        assert corpus(split) == first


def test_corpus_has_enough_text_and_no_other_split():
    assert len(corpus("heldout")) > 100_000
    assert len(corpus("train")) > 1_500_000
    with pytest.raises(ValueError, match="split"):
        documents("test")


def test_documents_repeat_no_document():
    for split in ("train", "heldout"):
        assert len(set(documents(split))) == len(documents(split))


def test_no_heldout_paragraph_is_in_train():
    train = squeeze(corpus("train"))
    paragraphs = [squeeze(paragraph) for paragraph in corpus("heldout").split("\n\n")]
    long = [paragraph for paragraph in paragraphs if len(paragraph) >= 120]
    assert len(long) > 200
    assert [paragraph for paragraph in long if paragraph in train] == []


def test_reading_the_corpus_imports_no_library_module():
    spec = importlib.util.find_spec("antigravity")
    assert spec is not None  # opens a web browser when it is imported
    corpus("train")
    assert "antigravity" not in sys.modules


def test_batches_shift_the_stream_and_leave_the_global_random_state():
    state = torch.random.get_rng_state()
    first, second = (list(batches(torch.arange(100), 5, 4, 8, seed)) for seed in (0, 1))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert [tuple(windows.shape) for windows in first] == [(4, 9)] * 5
    assert all(torch.equal(windows[:, 1:], windows[:, :-1] + 1) for windows in first)
    assert not all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_checkpoint_is_small_and_safe():
    files = {path.name: path.stat().st_size for path in CHECKPOINT.iterdir()}
    assert sum(files.values()) <= 10e6
    assert {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "README.md"} <= set(files)
    assert not {".bin", ".pt", ".pth", ".pkl"} & {path.suffix for path in CHECKPOINT.iterdir()}


def test_tokenizer_round_trips_and_adds_nothing(tokenizer):
    text = corpus("heldout")[:5000] + "\n\tdéjà vu  ≤ 1e-3"
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.decode(ids) == text
    assert tokenizer.eos_token_id not in ids
    assert tokenizer.bos_token == tokenizer.eos_token == END


def test_checkpoint_is_bfloat16_and_generates(model, tokenizer):
    assert AutoModelForCausalLM.from_pretrained(CHECKPOINT, dtype="auto").dtype is torch.bfloat16
    ids = tokenizer("The function returns", return_tensors="pt")
    out = model.generate(**ids, max_new_tokens=20, do_sample=False)
    assert len(tokenizer.decode(out[0])) > len("The function returns")


def test_checkpoint_has_its_measured_perplexity(model, tokenizer):
    tokens = torch.tensor(tokenizer(corpus("heldout"))["input_ids"][:8192])
    assert len(tokens) == 8192
    slack = 1.03 if sys.version_info[:2] == TRAINED_ON else 1.3  # 3.10, 3.12 and 3.13: 27.5 to 29.7
    assert math.exp(evaluate(model, tokens)) < slack * PERPLEXITY
