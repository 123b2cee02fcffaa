"""What is being measured, said while it is, and how long each part took."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Iterator

logger = logging.getLogger("flexbatch")


class Phases:
    """Seconds by what was measured, in order."""

    def __init__(self, say: Callable[[str], None] | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        """say: takes a line for each part that begins (default: the log)."""
        self.say, self.clock = say or (lambda line: logger.info("%s", line)), clock
        self.seconds: dict[str, float] = {}

    @contextlib.contextmanager
    def of(self, what: str) -> Iterator[None]:
        started = self.clock()
        self.say(f"measuring {what}")
        yield
        self.seconds[what] = self.seconds.get(what, 0.0) + self.clock() - started

    @property
    def text(self) -> str:
        return ", ".join(f"{what} {seconds:.1f} s" for what, seconds in self.seconds.items())
