"""The lines of one batch on their way into the block that all share; to the pipeline of a job it is the engine."""

from __future__ import annotations

import queue
import threading
import time
from collections import deque
from collections.abc import Hashable, Iterable, Iterator
from functools import partial
from typing import Any

from flexbatch.apps.jobs.rows import RowRequest
from flexbatch.apps.serve.serving import GATHER_SECONDS, Asked, Serving
from flexbatch.request import Completion

READY_LINES = 512
"""Lines that are encoded and wait here, at most; what is in the engine is counted there."""


class BatchStopped(Exception):
    """A batch does not go on: it was cancelled, has expired, or the server stops."""


class BatchFeed:
    """Draws the items of a pipeline in a thread of its own, a few ahead of the engine, and hands out completions.

    `stream` belongs to the pipeline's thread, `take` and `take_back` to the engine's; `stop` may be called by any.
    """

    def __init__(self, serving: Serving) -> None:
        self._serving = serving
        self._changed = threading.Condition()
        self._ready: deque[Asked] = deque()
        self._answers: queue.SimpleQueue[tuple[Hashable, Completion] | None] = queue.SimpleQueue()
        self._outstanding = 0
        """Items that were drawn and have no completion yet."""
        self._drawn = self._stopped = False
        self._began = time.monotonic()

    def stream(self, items: Iterable[Any]) -> Iterator[tuple[Hashable, Completion]]:
        """Items of `LLM.stream` in, (key, completion) out. Raises BatchStopped."""
        threading.Thread(target=self._draw, args=(items,), name="batch lines", daemon=True).start()
        self._serving.attach(self)
        try:
            while (answer := self._answers.get()) is not None:
                yield answer
            if self._stopped:
                raise BatchStopped
        finally:
            self.stop()
            self._serving.detach(self)

    def stop(self) -> None:
        with self._changed:
            self._stopped = True
            self._ready.clear()
            self._changed.notify_all()
        self._answers.put(None)

    def _draw(self, items: Iterable[Any]) -> None:
        for key, token_ids, params, _, lora in items:
            row = RowRequest(0, 0, 0, token_ids=token_ids, params=params, lora=lora)
            asked = Asked(row, partial(self._answer, key), feed=self)
            with self._changed:
                while len(self._ready) >= READY_LINES and not self._stopped:
                    self._changed.wait()
                if self._stopped:
                    return
                self._ready.append(asked)
                self._outstanding += 1
            self._serving.wake()
        with self._changed:
            self._drawn = True
            self._end_if_done()
        self._serving.wake()

    def _answer(self, key: Hashable, completion: Completion) -> None:
        with self._changed:
            if self._stopped:
                return
            self._answers.put((key, completion))
            self._outstanding -= 1
            self._end_if_done()

    def _end_if_done(self) -> None:
        if self._drawn and not self._outstanding:
            self._answers.put(None)

    # The engine's thread

    def take(self) -> Asked | None:
        with self._changed:
            if not self._ready:
                return None
            self._changed.notify_all()
            return self._ready.popleft()

    @property
    def gathered(self) -> bool:
        return self._drawn or self._stopped or time.monotonic() - self._began > GATHER_SECONDS

    def take_back(self, asked: Asked) -> None:
        with self._changed:
            if not self._stopped:
                self._ready.appendleft(asked)

    def check(self) -> None:
        """Invariant: what is ready was drawn."""
        with self._changed:
            assert self._stopped or len(self._ready) <= self._outstanding, (len(self._ready), self._outstanding)
