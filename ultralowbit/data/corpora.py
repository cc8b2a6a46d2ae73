"""Text by name: a local file, one of the hub's usual corpora, or what every Python carries."""

from __future__ import annotations

import codecs
import difflib
import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ultralowbit.errors import InputError, reason

if TYPE_CHECKING:
    from torch import Tensor


Split = Literal["train", "test"]


SEPARATOR = "\n\n"  # between documents where no published protocol says otherwise


PIECE = 1 << 20
"""Bytes of a text file that are read at a time."""


_ROWS = 256  # of a table, that are read at a time


_ALTERNATIVES = "a local .txt, .jsonl or .parquet file, 'self' (calibration only) or 'python-docs'"


_INSTALL = "run `pip install 'ultralowbit[data]'`"


_SUFFIXES = {".txt", ".md", ".raw", ".tokens", ".json", ".jsonl", ".parquet"}


@dataclass(frozen=True)
class Text:
    """One text and where it is from; `split` is "file" for a local file, which has none."""

    source: str
    split: str
    text: str

    @property
    def sha256(self) -> str:
        """Hex digest of the text's UTF-8 bytes."""
        return hashlib.sha256(self.text.encode()).hexdigest()


@dataclass(frozen=True)
class _Hub:
    """How a hub dataset is loaded and joined; `splits` and `files` are by our split's name."""

    path: str
    config: str | None = None
    revision: str | None = None
    splits: Mapping[str, str] = field(default_factory=lambda: {"train": "train", "test": "test"})
    files: Mapping[str, str] | None = None
    separator: str = SEPARATOR
    lines: bool = False  # rows are the lines of one text, not documents
    test_rows: int | None = None


_HUB = {
    "wikitext2": _Hub("Salesforce/wikitext", "wikitext-2-raw-v1", lines=True),
    # One shard each, and in test what the papers report ("c4-new"): 1100 documents joined with spaces.
    "c4": _Hub(
        "allenai/c4",
        splits={"train": "train", "test": "validation"},
        files={"train": "en/c4-train.00000-of-01024.json.gz", "test": "en/c4-validation.00000-of-00008.json.gz"},
        separator=" ",
        test_rows=1100,
    ),
    # The dataset is a script, which `datasets` no longer runs: the hub's own parquet conversion is read instead.
    "ptb": _Hub(
        "ptb-text-only/ptb_text_only",
        revision="refs/convert/parquet",
        splits={"train": "train", "test": "validation"},
        lines=True,
    ),
}


SOURCES = (*_HUB, "python-docs", "self")
"""The names that are neither a file nor `org/name`; "self" is text the model writes, for calibration only."""


def read_text(source: str, split: Split) -> Text:
    """Read one text; documents are joined by a blank line, c4's by a space as in the published script.

    `source` is a local file (.jsonl, .json and .parquet hold documents, any other suffix is UTF-8 text), "python-docs"
    (in every Python), "wikitext2", "c4", "ptb", or a hub dataset `org/name` or `org/name:config`, which is downloaded
    whole. The field "text" is read, or the only field of strings. Raises `InputError` for whatever cannot be read.
    """
    stored = _open(source, split)
    return Text(source, stored.split, "".join(_joined(source, stored)))


def read_pieces(source: str, split: Split) -> Iterator[str]:
    """What `read_text` reads, in pieces that follow one another: `PIECE` bytes of a text file, else a document each.

    Raises `InputError` as `read_text` does; for what stands in the text, only once that is reached.
    """
    return _joined(source, _open(source, split))


def read_documents(source: str, split: Split) -> list[str]:
    """The documents that `read_text` joins: a text file, wikitext2, ptb or python-docs is one. Raises `InputError`."""
    stored = _open(source, split)
    if stored.is_one:
        return ["".join(_joined(source, stored))]
    return [*_checked(source, stored.parts)]


def is_collection(source: str) -> bool:
    """Whether `source` is a hub dataset whose rows are separate documents, as c4's are. Raises `InputError`."""
    place = _find(source)
    return isinstance(place, _Hub) and not place.lines


@cache
def has_test_split(source: str) -> bool:
    """Whether a source has a test split, as far as the hub tells; raises `InputError` for a name that is none."""
    place = _find(source)
    if not isinstance(place, _Hub) or source in _HUB:
        return True
    try:
        from datasets import get_dataset_split_names

        return "test" in get_dataset_split_names(place.path, place.config)
    except Exception:  # datasets lets through whatever the network and the cache raise
        return False


def public_name(source: str) -> str:
    """What a model or a text is called without the folders of this machine: of a path that exists its last part."""
    path = Path(source).expanduser()
    return path.resolve().name if path.exists() else source


def token_sha256(tokens: Tensor) -> str:
    """Hex digest of the shape, as in "(128, 2048)", and the tokens' little-endian int32 bytes."""
    digest = hashlib.sha256(str(tuple(tokens.shape)).encode())
    digest.update(tokens.cpu().numpy().astype("<i4").tobytes())
    return digest.hexdigest()


@dataclass(frozen=True)
class _Stored:
    """What a source holds, to be read once."""

    parts: Iterator[str]
    """Documents, or what the one document consists of."""
    separator: str
    split: str
    """To be recorded."""
    is_one: bool
    """Whether the parts are no documents of their own."""


def _open(source: str, split: str) -> _Stored:
    if split not in ("train", "test"):
        raise InputError(f"split is {split!r}, expected 'train' or 'test'")
    place = _find(source)
    if isinstance(place, _Hub):
        return _Stored(_hub_parts(source, place, split), place.separator, split, place.lines)
    if place is None:
        from ultralowbit.data.python_docs import corpus

        return _Stored(iter([corpus("train" if split == "train" else "heldout")]), SEPARATOR, split, True)
    suffix = place.suffix.lower()
    if suffix == ".parquet":
        return _Stored(_parquet_documents(source, place), SEPARATOR, "file", False)
    pieces = _file_pieces(source, place)
    if suffix in (".json", ".jsonl"):
        return _Stored(_json_documents(source, _lines(pieces)), SEPARATOR, "file", False)
    return _Stored(pieces, "", "file", True)


def _joined(source: str, stored: _Stored) -> Iterator[str]:
    for number, part in enumerate(_checked(source, stored.parts)):
        if number and stored.separator:
            yield stored.separator
        yield part


def _checked(source: str, parts: Iterable[str]) -> Iterator[str]:
    """The parts; `InputError` at their end if all of them were blank."""
    blank = True
    for part in parts:
        blank = blank and not part.strip()
        yield part
    if blank:
        raise InputError(f"{source!r} holds no text, expected at least one document that is not blank: choose another")


def _find(source: str) -> Path | _Hub | None:
    """The file or the hub dataset that `source` names; None is python-docs."""
    path = os.path.expanduser(source)
    if os.path.isfile(path):
        return Path(path)
    if source in _HUB:
        return _HUB[source]
    if source == "python-docs":
        return None
    if source == "self":
        raise InputError("'self' is text that the model writes for its own calibration: to read a text, name " + _NAMED)
    if os.path.isdir(path):
        raise InputError(f"{source!r} is a directory, expected one text file: give a .txt, .jsonl or .parquet in it")
    if os.path.exists(path):
        raise InputError(f"{source!r} is not a regular file: save the text to a .txt, .jsonl or .parquet file")
    if source.startswith((".", "/", "~")) or source.count("/") > 1 or Path(source).suffix in _SUFFIXES:
        raise InputError(f"there is no file {source!r}: check the path, or give {_ALTERNATIVES}")
    if match := re.fullmatch(r"([\w.-]+/[\w.-]+)(?::([\w.-]+))?", source):
        return _Hub(match[1], match[2])
    if near := difflib.get_close_matches(source.lower(), SOURCES, n=1):
        raise InputError(f"there is no file and no source {source!r}: did you mean {near[0]!r}?")
    raise InputError(f"there is no file and no source {source!r}: name {_NAMED}")


_NAMED = f"a local file, a hub dataset org/name, or one of {', '.join(name for name in SOURCES if name != 'self')}"


def _file_pieces(source: str, path: Path) -> Iterator[str]:
    """The text of a UTF-8 file, without a byte order mark."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    try:
        with path.open("rb") as file:
            begin = len(codecs.BOM_UTF8) if file.read(len(codecs.BOM_UTF8)) == codecs.BOM_UTF8 else 0
            file.seek(begin)
            while data := file.read(PIECE):
                begin = file.tell() - len(data) - len(decoder.getstate()[0])
                yield decoder.decode(data)
            begin = file.tell() - len(decoder.getstate()[0])
            decoder.decode(b"", final=True)
    except UnicodeDecodeError as error:
        raise InputError(
            f"{source!r} is not UTF-8 (byte {begin + error.start}), expected plain text, .jsonl, .json or .parquet: "
            "convert or decompress it first"
        ) from error
    except OSError as error:
        raise InputError(f"{source!r} cannot be read ({reason(error)}): check the file's permissions") from error


def _lines(pieces: Iterable[str]) -> Iterator[str]:
    parts: list[str] = []
    for piece in pieces:
        end, *others = piece.split("\n")
        parts.append(end)
        for line in others:
            yield "".join(parts)
            parts = [line]
    yield "".join(parts)


def _json_documents(source: str, lines: Iterable[str]) -> Iterator[str]:
    rows = _json_rows(source, iter(lines))
    first = next(rows, None)
    if first is None:
        return
    if not isinstance(first, dict):
        raise InputError(f"record 1 of {source!r} is a {type(first).__name__}, expected an object with a text field")
    name = _text_field(source, list(first), [key for key, value in first.items() if isinstance(value, str)])
    # a null is no document, but a field that is missing is a mistake
    values = (row[name] if isinstance(row, dict) and name in row else ... for row in chain([first], rows))
    for document in _strings(source, name, values):
        try:
            document.encode()
        except UnicodeEncodeError as error:  # JSON can escape half a surrogate pair
            raise InputError(f"{source!r} holds an unpaired surrogate, which is no character: remove it") from error
        yield document


def _json_rows(source: str, lines: Iterator[str]) -> Iterator[Any]:
    """The values on the lines, read one by one where the first is an object; else those of the file as a whole, which
    may be one list or one object on several lines."""
    head: list[str] = []
    for line in lines:
        head.append(line)
        if line.strip():
            break
    if not _is_object(head[-1]):
        text = "\n".join([*head, *lines])
        try:
            rows = json.loads(text)
        except (ValueError, RecursionError) as error:
            if text.lstrip().startswith("["):
                raise _no_json(repr(source), reason(error)) from error
            head = text.split("\n")
        else:
            yield from rows if isinstance(rows, list) else [rows]
            return
    for number, line in enumerate(chain(head, lines), 1):
        if line.strip():
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                what = error.msg if isinstance(error, json.JSONDecodeError) else reason(error)
                raise _no_json(f"line {number} of {source!r}", what) from error
            yield row


def _is_object(line: str) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False


def _no_json(where: str, what: str) -> InputError:
    return InputError(f"{where} is not JSON ({what}), expected an object a line or one list: correct it")


def _parquet_documents(source: str, path: Path) -> Iterator[str]:
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError as error:
        raise InputError(f"{source!r} is a parquet file, which needs the package pyarrow: {_INSTALL}") from error
    try:
        with pq.ParquetFile(path) as file:
            schema = file.schema_arrow
            strings = [field.name for field in schema if _is_text(field.type)]
            name = _text_field(source, schema.names, strings)
            batches = file.iter_batches(_ROWS, columns=[name])
            yield from _strings(source, name, (value for batch in batches for value in batch.column(0).to_pylist()))
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise InputError(f"{source!r} is not a readable parquet file ({reason(error)}): write it again") from error


def _is_text(kind: Any) -> bool:
    """Whether a column of this Arrow type holds strings, in any of the ways in which writers store them."""
    import pyarrow.types as of

    if of.is_dictionary(kind):
        return _is_text(kind.value_type)
    is_view = getattr(of, "is_string_view", lambda kind: False)  # since pyarrow 16
    return of.is_string(kind) or of.is_large_string(kind) or is_view(kind)


def _hub_parts(source: str, hub: _Hub, split: str) -> Iterator[str]:
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise InputError(
            f"{source!r} is on the hub, which needs the package datasets: {_INSTALL}, or give {_ALTERNATIVES}"
        ) from error
    name = hub.splits[split]
    # A part of a dataset never has the sizes that its card promises, so a part is not checked against them.
    options: dict[str, Any] = (
        {"data_files": {name: hub.files[split]}, "verification_mode": "no_checks"} if hub.files else {}
    )
    try:
        rows = load_dataset(hub.path, hub.config, split=name, revision=hub.revision, **options)
        if split == "test" and hub.test_rows is not None:
            rows = rows.select(range(min(hub.test_rows, len(rows))))
        fields = rows.features
    except Exception as error:  # datasets lets through whatever the network, the cache and the parsers raise
        raise InputError(
            f"the {name} split of {source!r} cannot be read from the hub ({reason(error)}): "
            f"check the name, the connection and `hf auth login`, or give {_ALTERNATIVES}"
        ) from error
    strings = [key for key, value in fields.items() if getattr(value, "dtype", None) in ("string", "large_string")]
    column = _text_field(source, list(fields), strings)
    batches = rows.select_columns([column]).iter(_ROWS)
    return _strings(source, column, (value for batch in batches for value in batch[column]))


def _text_field(source: str, fields: Sequence[str], strings: Sequence[str]) -> str:
    if "text" in fields:
        return "text"
    if len(strings) == 1:
        return strings[0]
    raise InputError(
        f"{source!r} has the fields {', '.join(map(repr, fields)) or 'none'}, expected 'text' or exactly one field of "
        "strings: rename the field that holds the text to 'text'"
    )


def _strings(source: str, name: str, values: Iterable[Any]) -> Iterator[str]:
    """`values` without nulls, which are no documents."""
    for number, value in enumerate(values, 1):
        if not isinstance(value, str | None):
            raise InputError(f"record {number} of {source!r} has no string in the field {name!r}: fix or remove it")
        if value is not None:
            yield value
