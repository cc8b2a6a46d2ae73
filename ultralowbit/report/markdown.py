"""Other people's text in Markdown and in shell commands: escaped once, here."""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Sequence
from pathlib import Path


def escape(text: object) -> str:
    """The text on one line, so that Markdown shows it as it is: no emphasis, links, HTML, headings or table cells."""
    line = re.sub(r"([\\`*_{}\[\]<>#|~!&])", r"\\\1", " ".join(str(text).split()))
    return re.sub(r"(?<=[A-Za-z0-9])\\_(?=[A-Za-z0-9])", "_", line)  # within a word it is no emphasis


def code(text: object) -> str:
    """The text as a code span: fenced with more backticks than it holds in a row."""
    line = " ".join(str(text).split())
    fence = "`" * (1 + max((len(run) for run in re.findall("`+", line)), default=0))
    room = " " if line.startswith("`") or line.endswith("`") else ""
    return f"{fence}{room}{line}{room}{fence}"


def table(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table of cells that are escaped already; the first column is text, the others are numbers."""
    rule = ["---", *["---:"] * (len(headers) - 1)]
    return "\n".join(f"| {' | '.join(line)} |" for line in [headers, rule, *rows])


_FOLDERS = re.compile(r"(?:~[\w.-]*|\.\.|(?<![\w.~-]))/(?:[^/,:={}\[\]'\"]+/)*")
"""Of an absolute path, or of one that leads up, within a longer text."""


def public_command(command: str) -> str:
    """A command line without the folders of this machine, for which "..." stands: `.../my.txt`."""
    return shlex.join(_public(word) for word in shlex.split(command))


def _public(word: str) -> str:
    option, equals, value = word.rpartition("=")
    path = Path(value)
    is_path = path.is_absolute() or value.startswith(("~", ".")) or os.path.exists(value)  # else org/name is on the hub
    if is_path and path.name and path.name != value.removeprefix("./").rstrip("/"):
        value = f".../{path.name}"
    elif not is_path:
        value = _FOLDERS.sub(".../", value)
    return f"{option}{equals}{value}"
