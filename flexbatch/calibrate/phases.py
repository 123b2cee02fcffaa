"""What is being measured, said while it is, and how long each part took."""

from __future__ import annotations

import contextlib
import logging
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

logger = logging.getLogger("flexbatch")

BETWEEN = "between these"


class Phases:
    """Seconds by what was measured, one after another, in order; with what lies between them they are all there are
    since it began."""

    def __init__(
        self,
        say: Callable[[str], None] | None = None,
        clock: Callable[[], float] = time.monotonic,
        earlier_seconds: float = 0.0,
    ) -> None:
        """say: takes a line for each part that begins (default: the log). earlier_seconds: that count as well."""
        self.say, self.clock = say or (lambda line: logger.info("%s", line)), clock
        self.began = clock() - earlier_seconds
        self.seconds: dict[str, float] = {}
        self._last = ""

    def passed(self, what: str) -> None:
        """All that no part has by now was this."""
        self.seconds[what] = self.seconds.get(what, 0.0) + self.total - sum(self.seconds.values())
        self._last = what

    @contextlib.contextmanager
    def of(self, what: str, doing: str = "measuring") -> Iterator[None]:
        started = self.clock()
        last = f"{self._last} {self.seconds[self._last]:.1f} s, " if self._last else ""
        self.say(f"{doing} {what} ({last}{self.total:.1f} s so far)")
        yield
        self.seconds[what] = self.seconds.get(what, 0.0) + self.clock() - started
        self._last = what

    @property
    def total(self) -> float:
        return self.clock() - self.began

    @property
    def text(self) -> str:
        total = self.total
        parts = {**self.seconds, BETWEEN: total - sum(self.seconds.values())}
        return f"{', '.join(f'{what} {seconds:.1f} s' for what, seconds in parts.items())}; {total:.1f} s in all"


def process_age() -> float:
    """Seconds since this process began, its interpreter's start among them; 0 where the system does not tell."""
    try:
        fields = Path("/proc/self/stat").read_text().rsplit(")", 1)[1].split()
        return max(0.0, time.clock_gettime(time.CLOCK_BOOTTIME) - int(fields[19]) / os.sysconf("SC_CLK_TCK"))
    except (OSError, AttributeError, IndexError, ValueError):
        return 0.0
