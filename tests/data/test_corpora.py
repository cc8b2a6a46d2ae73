"""Texts by name: every local format, every alias, every way to fail, always in one sentence."""

from __future__ import annotations

import contextlib
import hashlib
import json
import struct
import sys

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from datasets import Dataset, Features, Value
from datasets.exceptions import DatasetNotFoundError
from hypothesis import given
from hypothesis import strategies as st

from ultralowbit.data.corpora import Text, _json_documents, is_collection, read_documents, read_text, token_sha256
from ultralowbit.errors import InputError, reason


def refused(source, *words, split="train"):
    with pytest.raises(InputError) as error:
        read_text(str(source), split)
    message = str(error.value)
    assert "\n" not in message
    for word in words:
        assert word in message
    return message


@pytest.fixture
def hub(monkeypatch):
    """Answers of load_dataset: a dict by split, or an exception; `calls` records what was asked."""

    class Hub:
        rows: dict | Exception = {}  # noqa: RUF012 - replaced by each test
        calls: list = []  # noqa: RUF012

        def load(self, path, name=None, *, split, **options):
            self.calls.append((path, name, split, {k: v for k, v in options.items() if v is not None}))
            if isinstance(self.rows, Exception):
                raise self.rows
            return Dataset.from_dict(self.rows)

    hub = Hub()
    hub.calls = []
    monkeypatch.setattr("datasets.load_dataset", hub.load)
    return hub


# -- local files


@pytest.mark.parametrize("suffix", ["txt", "raw", "tokens", "md", "py"])
def test_other_suffixes_are_read_whole(tmp_path, suffix):
    path = tmp_path / f"a.{suffix}"
    path.write_bytes(" été\r\n\n = x = \n".encode())
    text = read_text(str(path), "test")
    assert text == Text(str(path), "file", " été\r\n\n = x = \n")
    assert text.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert read_documents(str(path), "train") == [text.text]
    assert not is_collection(str(path))


def test_byte_order_mark_is_not_text(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"\xef\xbb\xbfhello")
    assert read_text(str(path), "train").text == "hello"


@pytest.mark.parametrize(
    "content",
    [
        '{"text": "one", "id": "x"}\n{"text": "two", "id": "y"}\n',
        '\n{"text": "one"}\r\n\r\n{"text": "two"}',
        '[{"text": "one"}, {"text": "two"}]',
        '[\n {"text": "one"},\n {"text": null},\n {"text": "two"}\n]\n',
        '{"body": "one", "n": 1}\n{"body": "two", "n": 2}\n',
    ],
)
@pytest.mark.parametrize("suffix", ["json", "jsonl", "JSONL"])
def test_json(tmp_path, content, suffix):
    path = tmp_path / f"a.{suffix}"
    path.write_text(content, newline="")
    assert read_documents(str(path), "train") == ["one", "two"]
    assert read_text(str(path), "train").text == "one\n\ntwo"
    assert not is_collection(str(path))


def test_one_json_object_over_several_lines(tmp_path):
    path = tmp_path / "a.json"
    path.write_text('{\n "text": "one\u2028line"\n}')
    assert read_documents(str(path), "train") == ["one\u2028line"]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ('{"a": "x", "b": "y"}', ["'a', 'b'", "'text'", "rename"]),
        ('{"a": 1}', ["'a'"]),
        ("{}", ["none"]),
        ('{"text": ["a"]}', ["record 1", "'text'"]),
        ('{"text": null, "url": "u"}\n{"text": 5}', ["record 2", "'text'"]),
        ('{"text": "a"}\n{"url": "u"}', ["record 2", "'text'"]),
        ('{"text": "a"}\n["b"]', ["record 2"]),
        ('["a", "b"]', ["record 1", "str"]),
        ("5", ["record 1", "int"]),
        ('{"text": "a"}\n\n{"text": oops}\n', ["line 3", "not JSON", "Expecting value"]),
        ('[{"text": "a"},\n]', ["not JSON", "line"]),
        ("[" * 100_000, ["not JSON"]),
        ('{"text": "\\ud800"}', ["surrogate"]),
        ("", ["no text"]),
        ("[]", ["no text"]),
        ('{"text": ""}\n{"text": " \\n"}\n{"text": null}', ["no text"]),
    ],
)
def test_bad_json(tmp_path, content, words):
    path = tmp_path / "a.jsonl"
    path.write_text(content)
    refused(path, str(path), *words)


@given(st.text())
def test_any_text_is_documents_or_an_input_error(text):
    with contextlib.suppress(InputError):
        assert all(isinstance(document, str) for document in _json_documents("x", text.split("\n")))


@given(st.lists(st.text(st.characters(exclude_categories=["Cs"])), min_size=1))
def test_jsonl_round_trip(documents):
    lines = [json.dumps({"text": document}, ensure_ascii=False) for document in documents]
    assert [*_json_documents("x", lines)] == documents


@pytest.mark.parametrize("features", [{"text": "string", "id": "string"}, {"body": "large_string", "n": "int64"}])
def test_parquet(tmp_path, features):
    name, other = features
    rows = {name: ["one", None, "two"], other: ["1", "2", "3"] if features[other] == "string" else [1, 2, 3]}
    path = tmp_path / "a.parquet"
    Dataset.from_dict(rows, features=Features({k: Value(v) for k, v in features.items()})).to_parquet(path)
    assert read_documents(str(path), "test") == ["one", "two"]
    assert read_text(str(path), "test") == Text(str(path), "file", "one\n\ntwo")


@pytest.mark.parametrize("kind", [pa.string_view(), pa.dictionary(pa.int32(), pa.string())], ids=str)
@pytest.mark.parametrize("name", ["text", "body"])
def test_strings_of_every_kind_in_parquet(tmp_path, kind, name):
    path = tmp_path / "a.parquet"
    table = pa.table({name: pa.array(["one", None, "two"], pa.string()).cast(kind), "n": [1, 2, 3]})
    pq.write_table(table, path)
    assert read_documents(str(path), "test") == ["one", "two"]


@pytest.mark.parametrize("kind", [pa.string(), pa.dictionary(pa.int32(), pa.string())], ids=str)
def test_parquet_that_is_not_utf8(tmp_path, kind):
    broken = pa.StringArray.from_buffers(2, *(pa.py_buffer(b) for b in (struct.pack("<3i", 0, 2, 4), b"ok\xff\xfe")))
    if pa.types.is_dictionary(kind):
        broken = pa.DictionaryArray.from_arrays(pa.array([0, 1], pa.int32()), broken)
    pq.write_table(pa.table({"text": broken}), tmp_path / "a.parquet")
    refused(tmp_path / "a.parquet", "is not a readable parquet file")
    refused(tmp_path / "a.parquet", "utf-8")


def test_bad_parquet(tmp_path, monkeypatch):
    path = tmp_path / "a.parquet"
    path.write_bytes(b"PAR1 is not enough")
    refused(path, "parquet")
    Dataset.from_dict({"a": ["x"], "b": ["y"]}).to_parquet(path)
    refused(path, "'a', 'b'")
    Dataset.from_dict({"text": [[1, 2]]}).to_parquet(path)
    refused(path, "record 1")
    Dataset.from_dict({"text": []}, features=Features({"text": Value("string")})).to_parquet(path)
    refused(path, "no text")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    refused(path, "pip install 'ultralowbit[data]'")


def test_bad_files(tmp_path, monkeypatch):
    path = tmp_path / "a.txt"
    path.write_bytes(b"caf\xe9")
    refused(path, "UTF-8", "byte 3")
    for blank in (b"", b" \n\t\n"):
        path.write_bytes(blank)
        refused(path, "no text")
    refused(tmp_path, "directory")
    refused("/dev/null", "regular file")
    monkeypatch.chdir(tmp_path)
    for name in ("./b", "~/no/such", "b.txt", "data/b.jsonl", "a/b/c", "x" * 5000 + ".txt", "a\0.txt"):
        refused(name, "no file", "'python-docs'")


def test_home_is_expanded(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text("hello")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert read_text("~/a.txt", "train").text == "hello"


# -- names


def test_python_docs(monkeypatch):
    monkeypatch.setattr("ultralowbit.data.python_docs.corpus", lambda split: f"the {split} text")
    assert read_text("python-docs", "train") == Text("python-docs", "train", "the train text")
    assert read_text("python-docs", "test") == Text("python-docs", "test", "the heldout text")
    assert read_documents("python-docs", "test") == ["the heldout text"]
    assert not is_collection("python-docs")


@pytest.mark.parametrize(
    ("name", "near"),
    [("wikitext", "wikitext2"), ("C4", "c4"), ("WikiText-2", "wikitext2"), ("python_docs", "python-docs")],
)
def test_near_names(name, near):
    refused(name, f"did you mean '{near}'?")


def test_unknown_names():
    for name in ("zzzzzz", "", "a b/c d", "org/name:"):
        refused(name, "wikitext2, c4, ptb, python-docs")
    refused("self", "calibration", "wikitext2")
    refused("python-docs", "'validation'", "'test'", split="validation")


def test_wikitext2(hub):
    hub.rows = {"text": ["", " = A = \n", "", " b \n"]}
    text = read_text("wikitext2", "test")
    assert text == Text("wikitext2", "test", "\n\n = A = \n\n\n\n\n b \n")
    assert read_documents("wikitext2", "train") == [text.text]
    assert [call[:3] for call in hub.calls] == [
        ("Salesforce/wikitext", "wikitext-2-raw-v1", "test"),
        ("Salesforce/wikitext", "wikitext-2-raw-v1", "train"),
    ]
    assert not is_collection("wikitext2")


def test_c4_is_one_shard_and_its_test_1100_documents(hub):
    hub.rows = {"text": [f"d{n}" for n in range(1200)], "timestamp": ["t"] * 1200, "url": ["u"] * 1200}
    assert read_documents("c4", "train") == hub.rows["text"]
    assert read_text("c4", "test") == Text("c4", "test", " ".join(hub.rows["text"][:1100]))
    assert [(path, split, options["data_files"]) for path, _, split, options in hub.calls] == [
        ("allenai/c4", "train", {"train": "en/c4-train.00000-of-01024.json.gz"}),
        ("allenai/c4", "validation", {"validation": "en/c4-validation.00000-of-00008.json.gz"}),
    ]
    assert is_collection("c4")


def test_ptb(hub):
    hub.rows = {"sentence": ["a b", "c <unk>"]}
    assert read_text("ptb", "test").text == "a b\n\nc <unk>"
    assert read_documents("ptb", "train") == ["a b\n\nc <unk>"]
    assert hub.calls[0] == ("ptb-text-only/ptb_text_only", None, "validation", {"revision": "refs/convert/parquet"})
    assert not is_collection("ptb")


def test_any_hub_dataset(hub):
    hub.rows = {"content": ["one", None, "two"], "n": [1, 2, 3]}
    assert read_documents("org/some.name", "train") == ["one", "two"]
    assert read_text("org/some.name:config-1", "test").text == "one\n\ntwo"
    assert [call[:3] for call in hub.calls] == [("org/some.name", None, "train"), ("org/some.name", "config-1", "test")]
    assert is_collection("org/some.name")
    hub.rows = {"a": ["x"], "b": ["y"]}
    refused("org/name", "'a', 'b'")
    hub.rows = {"text": [["x"]]}
    refused("org/name", "record 1")
    hub.rows = {"text": [""]}
    refused("org/name", "no text")


@pytest.mark.parametrize(
    "error",
    [
        ConnectionError("Couldn't reach 'allenai/c4' on the Hub (LocalEntryNotFoundError)\nmore"),
        DatasetNotFoundError("Dataset 'allenai/c4' is a gated dataset on the Hub. Visit it to ask for access."),
        ValueError("Unknown split \"test\". Should be one of ['train']."),
        RuntimeError("Dataset scripts are no longer supported, but found x.py"),
        FileNotFoundError(),
    ],
)
@pytest.mark.parametrize("source", ["wikitext2", "c4", "ptb", "org/name"])
def test_hub_failures_name_the_alternatives(hub, error, source):
    hub.rows = error
    message = refused(source, repr(source), ".jsonl", "'self'", "'python-docs'", type(error).__name__)
    assert ". " not in message


def test_datasets_is_optional(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    refused("c4", "pip install 'ultralowbit[data]'", "'python-docs'")


# -- helpers


def test_token_sha256_is_of_shape_and_little_endian_int32():
    tokens = torch.tensor([[1, 2], [3, 70_000]])
    expected = hashlib.sha256(b"(2, 2)" + b"\1\0\0\0\2\0\0\0\3\0\0\0\x70\x11\1\0").hexdigest()
    assert token_sha256(tokens) == expected
    assert token_sha256(tokens.int()) == expected
    assert token_sha256(tokens.T.contiguous().T) == expected
    assert token_sha256(tokens.flatten()) != expected


def test_reason_is_one_line():
    assert reason(ValueError("\n a. b.\nc")) == "ValueError: a; b"
    assert reason(KeyError()) == "KeyError"
