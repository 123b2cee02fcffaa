"""Ctrl-C in a long job: the first asks it to finish what it began, the second stops it."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType

from flexbatch.validation.errors import INTERRUPTED


class Interrupts:
    """The state that signals have asked for so far. ``draining`` is set from the first Ctrl-C on."""

    def __init__(self) -> None:
        self.draining = threading.Event()
        self.on_drain: Callable[[], None] | None = None
        """Says what is being finished. While it is None there is nothing to finish, and the first Ctrl-C stops at
        once."""
        self._stopping = False

    def handle(self, number: int, frame: FrameType | None) -> None:
        """Handles a signal. SIGTERM comes with a deadline (job schedulers, preempted machines), so it stops at once."""
        if self._stopping:
            os._exit(INTERRUPTED)
        if number == signal.SIGINT and self.on_drain is not None and not self.draining.is_set():
            self.draining.set()
            self.on_drain()
            return
        self._stopping = True
        self.draining.set()
        raise KeyboardInterrupt

    @contextlib.contextmanager
    def installed(self) -> Iterator[None]:
        """Handles SIGINT and SIGTERM in the body. Only the main thread may do so; elsewhere (a Ray actor) this
        changes nothing."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self.handle) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
