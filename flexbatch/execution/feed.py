"""The items of a stream, drawn beside the passes."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from typing import Any

PAUSE_SECONDS, GATHER_SECONDS = 0.25, 1.0
"""Before a run begins, the items of a stream are looked at to size its cache: as many as come without a longer pause,
within this time after the first."""


class Feed:
    """The items of an iterable, drawn by a thread of its own, so that a slow one holds up no sequence in flight.

    No more items are drawn than are asked for.
    """

    def __init__(self, items: Iterable[Any], guard: Callable[[], AbstractContextManager[None]]) -> None:
        """guard: a context that the thread draws in."""
        self._ready: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._wanted: queue.SimpleQueue[int] = queue.SimpleQueue()
        """How many more items are to be drawn. By numbers: a semaphore for each item took longer than the item."""
        self._num_outstanding = 0
        self._closed = threading.Event()
        self.ended = False
        self._thread = threading.Thread(target=self._draw, args=(items, guard), name="stream items", daemon=True)
        self._thread.start()

    def _draw(self, items: Iterable[Any], guard: Callable[[], AbstractContextManager[None]]) -> None:
        with guard():
            try:
                source = iter(items)
                while not self._closed.is_set():
                    for _ in range(self._wanted.get()):
                        if self._closed.is_set():
                            return
                        self._ready.put((True, next(source)))
            except StopIteration:
                self._ready.put((False, None))
            except BaseException as error:
                self._ready.put((False, error))

    def take(self, limit: int, wait: bool) -> Iterator[Any]:
        """Items that are there, at most ``limit``. With ``wait``, one at least unless there is none, and those that
        follow without a pause. Raises what the iterable raised."""
        if limit > self._num_outstanding:
            self._wanted.put(limit - self._num_outstanding)
            self._num_outstanding = limit
        timeout, deadline = None if wait else 0.0, None
        for _ in range(limit):
            if self.ended:
                return
            try:
                is_item, item = self._ready.get(timeout is None or timeout > 0, timeout)
            except queue.Empty:
                return
            if not is_item:
                self.ended = True
                if item is not None:
                    raise item
                return
            self._num_outstanding -= 1
            if wait:
                deadline = deadline or time.monotonic() + GATHER_SECONDS
                timeout = max(0.0, min(PAUSE_SECONDS, deadline - time.monotonic()))
            yield item

    def wake(self) -> None:
        """Ends a `take` that waits, as the end of the items would. A signal handler may call it."""
        self._ready.put((False, None))

    def close(self) -> None:
        """Draw nothing more. An iterable that is slow to answer is left to end by itself."""
        self._closed.set()
        self._wanted.put(0)
        if self._thread is not threading.current_thread():
            self._thread.join(timeout=1.0)
