"""Exporters: each turns a packed checkpoint into what another program reads, exactly or not at all."""

from __future__ import annotations

import importlib
import shutil
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any

from ultralowbit.errors import InputError
from ultralowbit.progress import Progress, Silent

EXPORTERS: dict[str, str] = {
    "dense": "ultralowbit.export.dense:DenseExporter",
    "gguf": "ultralowbit.export.gguf.exporter:GgufExporter",
}
"""Name -> where its class is; imported when it is asked for, since a target may need a package of its own."""


class Exporter(ABC):
    """One target: a dataclass whose fields are options, which `export` takes by name."""

    @abstractmethod
    def export(self, folder: Path, out: Path, progress: Progress) -> None:
        """Write the packed checkpoint `folder` to `out`, which does not exist yet: a file or a folder.

        Raises `InputError` before any work for a checkpoint that the target cannot hold exactly.
        """

    def companions(self, target: Path) -> list[Path]:
        """Files that `export` writes beside `target`."""
        return []


def exporter(name: str, **options: Any) -> Exporter:
    """The exporter of this name with its options; `InputError` names those that there are."""
    place = EXPORTERS.get(name)
    if place is None:
        raise InputError(f"there is no exporter {name!r}, expected one of {', '.join(sorted(EXPORTERS))}")
    module, _, attribute = place.partition(":")
    cls = getattr(importlib.import_module(module), attribute)
    known = [field.name for field in fields(cls)]
    if unknown := options.keys() - {*known}:
        names = ", ".join(f"--{option}" for option in sorted(unknown))
        raise InputError(
            f"the exporter {name} has no {names}, expected {' or '.join(known) or 'no options'}: leave it out"
        )
    return cls(**options)


def export(folder: Path | str, name: str, out: Path | str, progress: Progress | None = None, **options: Any) -> Path:
    """Turn a packed checkpoint into what another program reads; returns where it is.

    name: one of `EXPORTERS`; options: its fields; out: a new file or folder. Raises `InputError` where `out` exists or
    the target cannot hold the checkpoint exactly, and `CheckpointError` for a folder that is no packed checkpoint;
    nothing half-written is left.
    """
    target = Path(out).expanduser().resolve()
    chosen = exporter(name, **options)
    written = [target, *chosen.companions(target)]
    for path in written:
        if path.exists() and not (path.is_dir() and not any(path.iterdir())):
            raise InputError(f"{path} exists: choose another --out, or move it")
    with _beside(target) as place:
        chosen.export(Path(folder).expanduser(), place, progress or Silent())
        if target.is_dir():
            target.rmdir()
        for path in written:
            place.with_name(path.name).replace(path)
    return target


@contextmanager
def _beside(target: Path) -> Iterator[Path]:
    """A place on the same disk to write to first; what is left there is removed."""
    target.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        yield folder / target.name
    finally:
        shutil.rmtree(folder, ignore_errors=True)
