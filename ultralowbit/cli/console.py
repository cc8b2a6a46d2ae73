"""What a terminal shows: results on stdout; on stderr a bar with the time left, or plain lines where it is a log."""

from __future__ import annotations

import logging
import os
import re
import sys
import time
from collections.abc import Callable
from types import TracebackType

from rich.console import Console
from rich.highlighter import NullHighlighter
from rich.logging import RichHandler
from rich.progress import BarColumn, ProgressColumn, SpinnerColumn, Task, TextColumn
from rich.progress import Progress as Bars
from rich.table import Column
from rich.text import Text
from rich.theme import Theme

from ultralowbit.units import format_seconds

PLAIN_EVERY = 10.0
"""Seconds between the lines of a stage that nobody watches."""


def _console(stderr: bool) -> Console:
    stream = sys.stderr if stderr else sys.stdout
    # a pipe has no width: tables are not to be cut to a terminal's
    width = None if stream.isatty() or "COLUMNS" in os.environ else 160
    theme = Theme({"logging.level.warning": "bold yellow"})
    return Console(stderr=stderr, highlight=False, width=width, theme=theme)


out = _console(stderr=False)
err = _console(stderr=True)


def visible(text: str) -> str:
    """User text as it can be shown: control characters, with which a terminal could be driven, as their codes."""
    return re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", lambda match: f"\\x{ord(match[0]):02x}", text)


def cell(text: str, style: str = "") -> Text:
    """User text for a table or a panel: never read as markup."""
    return Text(visible(text), style=style)


def say(text: str, style: str = "", to: Console | None = None) -> None:
    """Print a line of user text on stdout, or on another console."""
    (to or out).print(cell(text, style), soft_wrap=True)


class _VisibleFormatter(logging.Formatter):
    """The message of a record, which may hold user text."""

    def format(self, record: logging.LogRecord) -> str:
        return visible(super().format(record))


def show_warnings() -> None:
    """Print what the package logs on stderr: also under --quiet, and above the bar of the progress."""
    log = logging.getLogger("ultralowbit")
    if not any(isinstance(handler, RichHandler) for handler in log.handlers):
        handler = RichHandler(console=err, show_time=False, show_path=False, highlighter=NullHighlighter())
        handler.setFormatter(_VisibleFormatter())
        log.addHandler(handler)


class Pace:
    """How far a stage is, and how long the rest takes at the pace so far."""

    def __init__(self, what: str, total: int) -> None:
        self.what, self.total = what, total
        self.done = self.skipped = 0
        self.began = self.last = time.monotonic()

    def step(self, n: int) -> None:
        self.last = time.monotonic()
        if self.last - self.began < 0.02:  # what an earlier run has done comes at once, and says nothing of the pace
            self.skipped += n
        self.done += n

    @property
    def elapsed(self) -> float:
        return time.monotonic() - self.began

    @property
    def left(self) -> float | None:
        """Seconds; None until a step has been timed."""
        worked = self.done - self.skipped
        if not worked:
            return None
        return max(0.0, (self.last - self.began) / worked * (self.total - self.done) - (time.monotonic() - self.last))

    def __str__(self) -> str:
        count = f"{self.done}/{self.total}" if self.total < 10_000 else f"{self.done / self.total:.0%}"
        left = "" if self.left is None or self.done >= self.total else f", {format_seconds(self.left)} left"
        return f"{count}, {format_seconds(self.elapsed)} elapsed{left}"


class _PaceColumn(ProgressColumn):
    def render(self, task: Task) -> Text:
        return Text(str(task.fields["pace"]))


class Watch:
    """`progress.Progress` on stderr, to be used as a context. `quiet` shows nothing: warnings go through `logging`."""

    def __init__(self, quiet: bool = False) -> None:
        self.quiet = quiet
        self.pace: Pace | None = None
        self.printed = 0.0
        self.bars: Bars | None = None
        if err.is_terminal and not quiet:
            what = TextColumn("{task.description}", markup=False, table_column=Column(no_wrap=True))
            columns = (SpinnerColumn(), what, BarColumn(None), _PaceColumn(table_column=Column(no_wrap=True)))
            self.bars = Bars(*columns, console=err, transient=True, expand=True, refresh_per_second=4)

    def __enter__(self) -> Watch:
        if self.bars:
            self.bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.bars:
            self.bars.stop()

    def start(self, what: str, total: int) -> None:
        self.pace = Pace(what, total)
        self.printed = self.pace.began
        if self.bars:
            for task in self.bars.task_ids:
                self.bars.remove_task(task)
            self.bars.add_task(visible(what), total=total, pace=self.pace)

    def step(self, n: int = 1) -> None:
        if self.pace is None:
            return
        self.pace.step(n)
        if self.bars:
            self.bars.update(self.bars.task_ids[-1], completed=self.pace.done)
        elif not self.quiet and time.monotonic() - self.printed > PLAIN_EVERY:
            self.printed = time.monotonic()
            self._line(f"{self.pace.what}: {self.pace}")

    def say(self, line: str) -> None:
        if not self.quiet:
            self._line(line)

    def _line(self, line: str) -> None:
        err.print(cell(line), soft_wrap=not err.is_terminal)

    def counter(self, what: str) -> Callable[[int, int], None]:
        """A `progress(done, total)` callback that shows as the stage `what`."""
        seen = 0

        def progress(done: int, total: int) -> None:
            nonlocal seen
            if not seen:
                self.start(what, total)
            self.step(done - seen)
            seen = done

        return progress
