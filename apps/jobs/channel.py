"""A bounded channel between two threads, which also carries the end and the failure of its producer."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

T = TypeVar("T")


class Canceled(Exception):
    """The consumer has gone: the producer should stop too."""


class Channel(Generic[T]):
    """At most ``capacity`` values wait in it. Iterating ends when the producer closes it, with the producer's error
    if it had one, behind all its values."""

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._values: deque[T] = deque()
        self._changed = threading.Condition()
        self._closed = self._canceled = False
        self._error: BaseException | None = None

    def put(self, value: T) -> None:
        """Waits for free capacity. Raises Canceled when the channel is closed or nobody will read it."""
        with self._changed:
            while len(self._values) >= self._capacity and not self._canceled and not self._closed:
                self._changed.wait()
            if self._canceled or self._closed:
                raise Canceled
            self._values.append(value)
            self._changed.notify_all()

    def close(self, error: BaseException | None = None) -> None:
        with self._changed:
            self._closed, self._error = True, self._error or error
            self._changed.notify_all()

    def cancel(self) -> None:
        with self._changed:
            self._canceled = True
            self._values.clear()
            self._changed.notify_all()

    def __iter__(self) -> Iterator[T]:
        for value in self.until(lambda: None):
            assert value is not None
            yield value[0]

    def until(self, deadline: Callable[[], float | None]) -> Iterator[tuple[T] | None]:
        """Yields the values, each in a tuple, and None whenever the deadline (of `time.monotonic`, None for never;
        asked again for every value) has passed without one."""
        while True:
            end = deadline()
            with self._changed:
                while not self._values and not self._closed and not self._canceled:
                    left = None if end is None else end - time.monotonic()
                    if left is not None and left <= 0:
                        break
                    self._changed.wait(left)
                item: tuple[T] | None = None
                if self._values:
                    item = (self._values.popleft(),)
                    self._changed.notify_all()
                elif self._closed or self._canceled:
                    if self._error is not None:
                        raise self._error
                    return
            yield item
