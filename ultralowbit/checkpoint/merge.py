"""Putting safetensors files together without loading them: the per-block files of a job become a few shards."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ultralowbit.checkpoint.config import TENSORS_DIGEST, tensors_digest
from ultralowbit.checkpoint.files import INDEX, WEIGHTS, read_raw_header
from ultralowbit.checkpoint.storage import (
    DTYPES,
    encode_header,
    json_bytes,
    lay_out,
    raise_disk_full,
    sync_folder,
    write_json,
)
from ultralowbit.format.words import TensorSpec

SHARD_BYTES = 5_000_000_000
"""Largest shard, that of transformers; a single tensor may be larger."""

_CHUNK = 1 << 23


@dataclass(frozen=True)
class _Entry:
    """One tensor as it lies in a file: the bytes from `start` on, `size` of them."""

    file: Path
    name: str
    dtype: str
    shape: list[int]
    start: int
    size: int


def merge_tensors(
    sources: Sequence[Path], folder: Path, metadata: Mapping[str, str], limit: int | None = None
) -> list[Path]:
    """Write the tensors of all `sources` into `folder` as transformers would: `model.safetensors`, or shards of at most
    `limit` bytes (by default `SHARD_BYTES`) and their index. `metadata` goes into every header. Returns the files.

    Raises `DiskFull`. The sources are whole files that this process or an earlier one has checked.
    """
    limit = limit or SHARD_BYTES
    shards: list[list[_Entry]] = [[]]
    size = 0  # of the last shard
    for entry in (entry for source in sources for entry in _entries(source)):
        if shards[-1] and size + entry.size > limit:
            shards.append([])
            size = 0
        shards[-1].append(entry)
        size += entry.size
    names = [_file_name(i, len(shards)) for i in range(1, len(shards) + 1)]
    for name, entries in zip(names, shards, strict=True):
        _write(folder / name, entries, metadata)
    if len(shards) > 1:
        weight_map = {e.name: name for name, entries in zip(names, shards, strict=True) for e in entries}
        total = sum(e.size for entries in shards for e in entries)
        write_json(folder / INDEX, _index(weight_map, total))
    sync_folder(folder)
    return [folder / name for name in names]


def most_beside(tensors: Mapping[str, TensorSpec], metadata: Mapping[str, str], nbytes: int) -> int:
    """How many bytes headers and index take, at most, where `merge_tensors` writes tensors of these names, dtypes and
    digits of shapes, `nbytes` in all: a few bytes a tensor more than they will."""
    files = 1 if nbytes <= SHARD_BYTES else 2 * nbytes // SHARD_BYTES + 1  # any two in turn hold more than a limit
    called = {dtype: name for name, dtype in DTYPES.items()}
    entries = {
        name: {"dtype": called[spec.dtype], "shape": spec.shape, "data_offsets": [nbytes] * 2}
        for name, spec in tensors.items()
    }
    about = encode_header({"__metadata__": _about(metadata, {})})
    headers = len(json.dumps(entries, separators=(",", ":"))) + files * (len(about) + 7)  # padded to eights
    weight_map = dict.fromkeys(tensors, _file_name(files, files))
    return headers + (files > 1) * len(json_bytes(_index(weight_map, nbytes)))


def _file_name(i: int, files: int) -> str:
    return WEIGHTS if files == 1 else f"model-{i:05d}-of-{files:05d}.safetensors"


def _index(weight_map: Mapping[str, str], total: int) -> dict[str, Any]:
    return {"metadata": {"total_size": total}, "weight_map": weight_map}


def _about(metadata: Mapping[str, str], header: Mapping[str, Any]) -> dict[str, str]:
    """What a file's header says of the file itself."""
    return {"format": "pt", **metadata, TENSORS_DIGEST: tensors_digest(header)}


def _entries(file: Path) -> Iterator[_Entry]:
    """The tensors of a file in the order of their bytes."""
    header, start = read_raw_header(file)
    header.pop("__metadata__", None)
    for name, tensor in sorted(header.items(), key=lambda item: item[1]["data_offsets"][0]):
        begin, end = tensor["data_offsets"]
        yield _Entry(file, name, tensor["dtype"], tensor["shape"], start + begin, end - begin)


def _write(path: Path, entries: Sequence[_Entry], metadata: Mapping[str, str]) -> None:
    by_name = {e.name: e for e in entries}
    header = lay_out((e.name, e.dtype, e.shape, e.size) for e in entries)
    try:
        with path.open("wb") as out:
            out.write(encode_header({**header, "__metadata__": _about(metadata, header)}))
            for e in (by_name[name] for name in header):
                with e.file.open("rb") as source:
                    source.seek(e.start)
                    for at in range(0, e.size, _CHUNK):
                        out.write(source.read(min(_CHUNK, e.size - at)))
            out.flush()
            os.fsync(out.fileno())
    except OSError as e:
        path.unlink(missing_ok=True)
        raise_disk_full(e, path)
