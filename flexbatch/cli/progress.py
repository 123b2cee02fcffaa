"""How far a run is: a bar on a terminal, a log line now and then elsewhere."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

from flexbatch.request import Completion

logger = logging.getLogger("flexbatch")

SECONDS_PER_LINE = 10.0


class Progress(AbstractContextManager["Progress"]):
    """Counts finished completions of `total`, and their tokens. Writes to stderr only."""

    def __init__(
        self, total: int, *, terminal: bool | None = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.total, self.done, self.tokens = total, 0, 0
        self._clock = clock
        self._started = self._said = clock()
        self._bar: Any = None
        if sys.stderr.isatty() if terminal is None else terminal:
            from tqdm import tqdm

            self._bar = tqdm(total=total, unit="prompt", file=sys.stderr, dynamic_ncols=True)

    def finished(self, completion: Completion) -> None:
        """One more completion has ended."""
        self.done += 1
        self.tokens += len(completion.token_ids)
        now = self._clock()
        if self._bar is not None:
            self._bar.set_postfix_str(f"{self._rate(now):,.0f} tokens/s", refresh=False)
            self._bar.update()
        elif now - self._said >= SECONDS_PER_LINE or self.done == self.total:
            self._said = now
            logger.info(
                "%d of %d completions, %d tokens, %.1f tokens/s", self.done, self.total, self.tokens, self._rate(now)
            )

    def _rate(self, now: float) -> float:
        return self.tokens / max(now - self._started, 1e-9)

    def __exit__(self, *error: object) -> None:
        if self._bar is not None:
            self._bar.close()
