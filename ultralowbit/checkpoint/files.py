"""Which files hold a checkpoint's weights, and what is in them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ultralowbit.errors import CheckpointError
from ultralowbit.format.words import TensorSpec

_DTYPES = {  # the names safetensors headers use
    "BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8, "I16": torch.int16, "I32": torch.int32, "I64": torch.int64,
    "F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64,
}  # fmt: skip


def read_headers(files: list[str] | list[Path]) -> dict[str, TensorSpec]:
    """Name -> dtype and shape of every tensor in safetensors files; raises `CheckpointError` naming a bad file."""
    found: dict[str, TensorSpec] = {}
    for file in files:
        try:
            with safe_open(str(file), framework="pt") as shard:
                for name in shard.keys():  # noqa: SIM118 (a safe_open is no mapping)
                    part = shard.get_slice(name)
                    found[name] = TensorSpec(_DTYPES.get(part.get_dtype()), tuple(part.get_shape()))
        except (SafetensorError, OSError) as e:
            raise CheckpointError(f"{file} is not a complete safetensors file ({e}): copy or compress it again") from e
    return found


class Source:
    """The safetensors files of a checkpoint folder, read a few tensors at a time.

    Raises `CheckpointError` naming the file where one is missing, cut or unreadable.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        index = folder / "model.safetensors.index.json"
        if index.exists():
            try:
                self.file_of: dict[str, str] = json.loads(index.read_text())["weight_map"]
                self.files = sorted(set(self.file_of.values()))
            except (ValueError, KeyError, TypeError, AttributeError) as e:
                raise CheckpointError(f"{index} is not a readable index ({e!r}): download the model again") from e
        else:
            self.files = sorted(p.name for p in folder.glob("*.safetensors"))
            self.file_of = {name: file for file in self.files for name in read_headers([folder / file])}
        self.specs: dict[str, TensorSpec] = read_headers([folder / file for file in self.files])
        for name in self.file_of:
            if name not in self.specs:
                raise CheckpointError(f"{index} promises {name}, which no shard holds: download the model again")

    def read(self, names: Sequence[str]) -> dict[str, Tensor]:
        """The named tensors, in their stored dtype, on the CPU. The files are closed before it returns, so that
        their pages do not stay in this process's memory."""
        tensors = {}
        with ExitStack() as stack:
            shards: dict[str, Any] = {}
            for name in names:
                file = self.file_of[name]
                try:
                    if file not in shards:
                        shards[file] = stack.enter_context(safe_open(str(self.folder / file), framework="pt"))
                    tensors[name] = shards[file].get_tensor(name).clone()
                except (SafetensorError, OSError) as e:
                    raise CheckpointError(
                        f"{self.folder / file} cannot be read at {name} ({e}): download the model again"
                    ) from e
        return tensors


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files that the folder's index names or, without an index, all in it.

    Raises `CheckpointError` where there is none, or one that the index names is missing.
    """
    index = folder / "model.safetensors.index.json"
    if index.exists():
        try:
            files = [folder / name for name in sorted({*json.loads(index.read_text())["weight_map"].values()})]
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as e:
            raise CheckpointError(f"{index} is not a readable index ({e!r}): copy or compress it again") from e
    else:
        files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise CheckpointError(
            f"{folder} has no safetensors file, expected at least one: give the folder of a checkpoint"
        )
    for file in files:
        if not file.is_file():
            raise CheckpointError(
                f"{file} is missing, though the index names it: copy or compress the checkpoint again"
            )
    return files
