"""Which files hold a checkpoint's weights, and what is in them: the one reader, which chooses as transformers does.

transformers loads `model.safetensors` where there is one, whatever else lies beside it; otherwise the shards that
`model.safetensors.index.json` names, each of them whole, whichever shard the index puts a tensor into.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from ultralowbit.checkpoint.storage import DTYPES, read_json, sha256_files
from ultralowbit.errors import CheckpointError, InputError, naming_memory
from ultralowbit.format.words import TensorSpec
from ultralowbit.progress import Progress

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files that hold the weights of a checkpoint folder, as transformers would choose them.

    Raises `CheckpointError` where there is none, the index is malformed, or a file that it names is missing.
    """
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    index = folder / INDEX
    if not index.is_file():
        others = [path.name for path in sorted(folder.glob("*.safetensors")) if path.is_file()]
        beside = f", only {', '.join(others[:3])}, which transformers would not load either" if others else ""
        raise CheckpointError(
            f"{folder} has no {WEIGHTS} and no {INDEX}{beside}: give the folder of a whole checkpoint"
        )
    stored = read_json(index, "copy or download it again")
    weight_map = stored.get("weight_map")
    names = [*weight_map.values()] if isinstance(weight_map, dict) else []
    names = sorted({*names}) if all(isinstance(name, str) for name in names) else []
    if not names or not all(Path(name).name == name for name in names):
        raise CheckpointError(
            f"weight_map in {index} does not name a file of this folder for each tensor: copy or download it again"
        )
    if not isinstance(stored.get("metadata"), dict):
        raise CheckpointError(f"metadata in {index} is no object, as transformers needs: copy or download it again")
    files = [folder / name for name in names]
    for file in files:
        if not os.path.isfile(file):  # unlike Path's, for any name
            raise CheckpointError(f"{file} is missing, though {INDEX} names it: copy or download it again")
    return files


def refuse_missing_folder(name: str) -> None:
    """Raise `InputError` for the name of no folder, where a hub model cannot have it either."""
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise InputError(f"there is no such folder {name!r}: check the path, or give a hub name like org/model")


def hash_model(folder: Path, progress: Progress) -> dict[str, str]:
    """Name -> sha256 of config.json and of each file of weights: what tells a checkpoint from all others, whatever its
    folder is called."""
    paths = [folder / "config.json", *weight_files(folder)]
    progress.start("hashing the model", sum(path.stat().st_size for path in paths))
    return {path.name: digest for path, digest in sha256_files(paths, progress.step).items()}


def read_headers(files: Sequence[str | Path]) -> dict[str, TensorSpec]:
    """Name -> dtype and shape of every tensor in safetensors files; dtype is None where torch has none like it.

    Raises `CheckpointError` for a file that is cut or no safetensors file, and for a tensor that two of them hold.
    """
    return {name: spec for _, name, spec in _tensors(files)}


def _tensors(files: Sequence[str | Path]) -> Iterator[tuple[Path, str, TensorSpec]]:
    seen: set[str] = set()
    for file in map(Path, files):
        for name, spec in _header(file).items():
            if name in seen:
                raise CheckpointError(f"{name} is stored twice, the second time in {file}: copy the checkpoint again")
            seen.add(name)
            yield file, name, spec


def read_metadata(file: str | Path) -> dict[str, str]:
    """The metadata in the header of a safetensors file; raises `CheckpointError` as `read_headers` does."""
    with _opened(file) as shard:
        return shard.metadata() or {}


def read_raw_header(file: Path) -> tuple[dict[str, Any], int]:
    """The header of a whole safetensors file as it stands there, and where the bytes of its tensors begin."""
    with file.open("rb") as f:
        length = int.from_bytes(f.read(8), "little")
        return json.loads(f.read(length)), 8 + length


def _header(file: Path) -> dict[str, TensorSpec]:
    with _opened(file) as shard:
        slices = {name: shard.get_slice(name) for name in shard.keys()}  # noqa: SIM118 (a safe_open is no mapping)
        return {n: TensorSpec(DTYPES.get(s.get_dtype()), tuple(s.get_shape())) for n, s in slices.items()}


@contextmanager
def _opened(file: str | Path) -> Iterator[Any]:
    """A safetensors file, mapped into memory; every error of the body is the file's, and names it."""
    try:
        with naming_memory(f"reading {file}"), safe_open(str(file), framework="pt") as shard:
            yield shard
    except (SafetensorError, OSError) as e:
        raise CheckpointError(f"{file} is not a complete safetensors file ({e}): copy or compress it again") from e


class Source:
    """The weights of a checkpoint folder, read a few tensors at a time.

    files: names of the files that hold them; specs: dtype and shape of each tensor. Raises `CheckpointError` naming the
    file where one is missing, cut or unreadable.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        paths = weight_files(folder)
        self.files = [path.name for path in paths]
        self.file_of: dict[str, str] = {}
        self.specs: dict[str, TensorSpec] = {}
        self._stamps = self._stamp()
        for file, name, spec in _tensors(paths):
            self.file_of[name], self.specs[name] = file.name, spec

    def check_unchanged(self) -> None:
        """Raise `CheckpointError` where a file has been written to, or replaced, since it was opened."""
        for name, stamp in self._stamp().items():
            if stamp != self._stamps[name]:
                raise CheckpointError(
                    f"{self.folder / name} has changed while it was read: leave the model alone, and run the same "
                    "command again"
                )

    def _stamp(self) -> dict[str, tuple[int, ...] | None]:
        stamps: dict[str, tuple[int, ...] | None] = {}
        for name in (*self.files, "config.json"):
            try:
                stat = (self.folder / name).stat()
                stamps[name] = (stat.st_ino, stat.st_size, stat.st_mtime_ns)
            except OSError:
                stamps[name] = None
        return stamps

    def read(self, names: Sequence[str]) -> dict[str, Tensor]:
        """The named tensors, in their stored dtype, on the CPU. The files are closed before it returns, so that
        their pages do not stay in this process's memory."""
        tensors = {}
        with ExitStack() as stack:
            shards: dict[str, Any] = {}
            for name in names:
                file = self.file_of[name]
                try:
                    with naming_memory(f"reading {name} of {self.folder / file}"):
                        if file not in shards:
                            shards[file] = stack.enter_context(safe_open(str(self.folder / file), framework="pt"))
                        tensors[name] = shards[file].get_tensor(name).clone()
                except (SafetensorError, OSError) as e:
                    raise CheckpointError(
                        f"{self.folder / file} cannot be read at {name} ({e}): download the model again"
                    ) from e
        return tensors
