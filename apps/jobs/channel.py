"""A bounded hand-over between two threads that carries the end and the failure of its producer too."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterator
from typing import Generic, TypeVar

T = TypeVar("T")


class Cancelled(Exception):
    """The consumer has gone: the producer should stop too."""


class Channel(Generic[T]):
    """At most ``capacity`` values wait in it. Iterating ends when the producer closes it, with the producer's error if it had one, behind all its values."""

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._values: deque[T] = deque()
        self._changed = threading.Condition()
        self._closed = self._cancelled = False
        self._error: BaseException | None = None

    def put(self, value: T) -> None:
        """Waits for room. Raises Cancelled when the channel is closed or nobody will read it."""
        with self._changed:
            while len(self._values) >= self._capacity and not self._cancelled and not self._closed:
                self._changed.wait()
            if self._cancelled or self._closed:
                raise Cancelled
            self._values.append(value)
            self._changed.notify_all()

    def close(self, error: BaseException | None = None) -> None:
        with self._changed:
            self._closed, self._error = True, self._error or error
            self._changed.notify_all()

    def cancel(self) -> None:
        with self._changed:
            self._cancelled = True
            self._values.clear()
            self._changed.notify_all()

    def __iter__(self) -> Iterator[T]:
        while True:
            with self._changed:
                while not self._values and not self._closed and not self._cancelled:
                    self._changed.wait()
                if not self._values:
                    if self._error is not None:
                        raise self._error
                    return
                value = self._values.popleft()
                self._changed.notify_all()
            yield value
