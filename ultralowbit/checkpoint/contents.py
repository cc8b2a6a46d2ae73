"""What a folder holds, and what of it is ours: nothing else is ever removed or replaced."""

from __future__ import annotations

import os
from pathlib import Path

from ultralowbit.checkpoint.card import CARD, is_edited
from ultralowbit.checkpoint.manifest import MANIFEST, read_manifest
from ultralowbit.checkpoint.storage import UNFINISHED

WORK = ".ultralowbit-work"
"""The work folder of a job, where it lies in OUT."""

LOCAL = ".ultralowbit-local.json"
"""Where the model and the texts lay on this machine, for `verify --rerun`, and the memory that the run took; it is not
uploaded with the checkpoint."""

_BESIDE = {MANIFEST, LOCAL, CARD, "report.md", "report.json"}  # what is ours in a finished checkpoint, and not listed


def files_in(folder: Path) -> set[str]:
    """Names of all files and links in a folder and those below, but for a job's work folder; none where it is not."""
    names = set()
    for place, folders, files in os.walk(folder):
        here = Path(place)
        links = [name for name in folders if (here / name).is_symlink()]
        names |= {str((here / name).relative_to(folder)) for name in (*files, *links)}
        if here == folder and WORK in folders:
            folders.remove(WORK)
    return names


def own_files(folder: Path) -> set[str]:
    """Names of the files in a finished checkpoint that are ours: those that were written with it, its reports, a card
    that nobody has edited, and what a kill left half written. Raises `CheckpointError` where it is no checkpoint."""
    there = files_in(folder)
    ours = {*read_manifest(folder)["files"], *_BESIDE} | {n for n in there if Path(n).name.startswith(UNFINISHED)}
    return there & (ours - {CARD} if is_edited(folder / CARD) else ours)
