"""Where the host's time goes in the turns of a run: functions of the engine, timed while a benchmark uses it."""

from __future__ import annotations

import threading
import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from typing import Any

Parts = Mapping[str, tuple[Any, str]]
"""By its name in the results: the class or module that has the function, and the function's name there."""
TURN = "turn"
"""The part of which one is a pass."""


class PartTimes:
    """Seconds of the parts of all turns within a ``with``. Threads add up each in its own."""

    def __init__(self, parts: Parts, counted: str | None = None) -> None:
        """counted: the part whose results have their lengths summed in `count`."""
        self.parts, self.counted = parts, counted
        self.seconds: dict[tuple[str, int], float] = defaultdict(float)
        self.turns = self.count = 0

    def __enter__(self) -> PartTimes:
        self.originals = {part: getattr(*function) for part, function in self.parts.items()}
        for part, (owner, name) in self.parts.items():
            setattr(owner, name, self.timed(part, self.originals[part]))
        return self

    def __exit__(self, *error: object) -> None:
        for part, (owner, name) in self.parts.items():
            setattr(owner, name, self.originals[part])

    def timed(self, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            begun = time.perf_counter()
            try:
                found = function(*args)
            finally:
                self.seconds[part, threading.get_ident()] += time.perf_counter() - begun
                self.turns += part == TURN
            self.count += len(found) if part == self.counted else 0
            return found

        return call

    def per_turn(self) -> dict[str, float]:
        """Milliseconds of a turn."""
        sums: dict[str, float] = defaultdict(float)
        for (part, _), seconds in self.seconds.items():
            sums[part] += seconds
        return {part: round(1e3 * sums[part] / max(1, self.turns), 3) for part in self.parts}
