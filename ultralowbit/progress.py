"""What long work tells whoever watches it; `console.Watch` shows it on a terminal."""

from __future__ import annotations

from typing import Protocol


class Progress(Protocol):
    """Stages of known length, and lines worth reading."""

    def start(self, what: str, total: int) -> None:
        """A stage of `total` steps begins."""

    def step(self, n: int = 1) -> None:
        """n steps of the stage are done."""

    def say(self, line: str) -> None:
        """Something worth a line: a packed block, a warning."""


class Silent:
    """Watches nothing."""

    def start(self, what: str, total: int) -> None: ...

    def step(self, n: int = 1) -> None: ...

    def say(self, line: str) -> None: ...
