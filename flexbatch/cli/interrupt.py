"""Ctrl-C in a long job: after the first the sequences in flight end and no others begin, the second stops it."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import TYPE_CHECKING, Any

from flexbatch.cli.hangup import hangup_signals, note
from flexbatch.validation.errors import INTERRUPTED

if TYPE_CHECKING:
    from flexbatch.cli.progress import JobMeter


class Interrupts:
    """The state that signals have asked for so far. ``draining`` is set from the first Ctrl-C on."""

    def __init__(self) -> None:
        self.draining = threading.Event()
        self.on_drain: Callable[[], str] | None = None
        """Has no more sequences begin, and returns a line about those that are in flight. While it is None there is
        nothing to finish, and the first Ctrl-C stops at once."""
        self.stopping = False
        """Whether a signal has asked to stop at once."""
        self.ended_session = 0
        """Signals that came as one with the end of the session: SIGHUP, and what systemd sends with it."""
        self.before: dict[int, Any] = {}
        """The handlers in whose place these are."""

    def handle(self, number: int, frame: FrameType | None) -> None:
        """Handles a signal. SIGTERM comes with a deadline (job schedulers, preempted machines), so it stops at once,
        and so does SIGHUP."""
        if number == signal.SIGHUP:
            note(self.before.get(number))
            self.ended_session = max(self.ended_session, 1)
        if self.stopping:
            if number == signal.SIGHUP:
                return
            if number == signal.SIGTERM and self.ended_session == 1:
                self.ended_session = 2
                return
            os._exit(INTERRUPTED)
        if number == signal.SIGINT and self.on_drain is not None and not self.draining.is_set():
            self.draining.set()
            tell(self.on_drain())
            return
        self.stopping = True
        self.draining.set()
        raise KeyboardInterrupt

    @contextlib.contextmanager
    def installed(self) -> Iterator[None]:
        """Handles SIGINT, SIGTERM and SIGHUP in the body. Only the main thread may do so; elsewhere (a Ray actor) this
        changes nothing."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        for number in (signal.SIGINT, signal.SIGTERM, *hangup_signals()):
            self.before[number] = signal.signal(number, self.handle)
        try:
            yield
        finally:
            for number, handler in self.before.items():
                signal.signal(number, handler)


def drained(llm: Any, meter: JobMeter, resume: str | None) -> str:
    """Has an `LLM` begin no more sequences; returns what the user is told meanwhile. Takes no lock: it is called by a
    signal handler."""
    count, meter.draining = llm.drain(), True
    kept = f"what is done is kept; go on with: {resume}" if resume else "nothing is kept without --output FILE"
    return (
        f"interrupted: the {count:,} sequences in flight are being finished, no others begin (Ctrl-C again stops now); "
        f"{kept}"
    )


def tell(line: str) -> None:
    """A line on stderr, out of a signal handler: what it interrupts may be writing there by way of Python's buffer.
    Whoever read it may have gone."""
    start = "\n" if os.isatty(2) else ""  # below a bar
    with contextlib.suppress(OSError):
        os.write(2, f"{start}{line}\n".encode(errors="backslashreplace"))
