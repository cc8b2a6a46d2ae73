"""What long work tells whoever watches it; the command line shows it on a terminal."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

OnProgress = Callable[[int, int], object]
"""Called with what is done and what there is in all."""


class Progress(Protocol):
    """Stages of known length, and lines worth reading. Warnings are not among them: those are logged."""

    def start(self, what: str, total: int) -> None:
        """A stage of `total` steps begins."""

    def step(self, n: int = 1) -> None:
        """n steps of the stage are done."""

    def say(self, line: str) -> None:
        """Something worth a line, such as a packed block."""

    def counter(self, what: str) -> OnProgress:
        """A callback that shows as the stage `what`, which begins when it is first called."""


class Silent:
    """Watches nothing."""

    def start(self, what: str, total: int) -> None: ...

    def step(self, n: int = 1) -> None: ...

    def say(self, line: str) -> None: ...

    def counter(self, what: str) -> OnProgress:
        return lambda done, total: None
