"""Whose turn it is: an engine has one block, and one call at a time that runs sequences in it.

A call that runs from beginning to end (`generate`) waits for one in another thread. A stream is different: between two
completions it rests, with its sequences in the block, for as long as its reader likes, who may be waiting for the very
call that would wait for the stream. So whatever comes while a stream is open is refused at once, as is a call out of a
callback of a run. Closing the engine ends an open stream.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Generator, Iterator
from typing import TypeVar

from flexbatch.validation.errors import EngineBusyError, EngineClosedError

T = TypeVar("T")


class Turns:
    """The turns of one engine."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        """Held while anything runs. Reentrant, as a stream that nobody holds any more may be finalized anywhere."""
        self._entrance = threading.Lock()
        """Held by whoever waits for the lock: a thread that runs pass after pass would take it again before another one
        that waits has woken up."""
        self._gate = threading.Lock()
        """Held while ``_open_to_requests`` changes, and while a request is added beside a pass."""
        self._runner: int | None = None
        """The thread whose call runs."""
        self._stream: Generator | None = None
        self._helpers: set[int] = set()
        """Threads that work for a stream: what they call is called by it."""
        self._open_to_requests = False
        """Whether callbacks of what runs may add and abort requests."""
        self.closed = False

    @contextlib.contextmanager
    def whole(self, what: str) -> Iterator[None]:
        """For a call that is over when the body is."""
        self._check_own(what)
        self._check_free(what)
        with self._running(what):
            self._check_free(what)
            yield

    @contextlib.contextmanager
    def step(self) -> Iterator[None]:
        """For one pass over requests that were added one by one; its callbacks may add and abort others."""
        with self.whole("step"):
            with self._gate:
                self._open_to_requests = True
            try:
                yield
            finally:
                with self._gate:
                    self._open_to_requests = False

    @contextlib.contextmanager
    def addition(self, what: str) -> Iterator[None]:
        """For adding a request: beside steps, out of their callbacks, and while a pass runs in another thread, whose
        end it does not wait for. It runs before the next pass."""
        with self._gate:
            at_once = self._open_to_requests
            if at_once:
                yield
        if not at_once:
            with self.change(what):
                yield

    @contextlib.contextmanager
    def change(self, what: str) -> Iterator[None]:
        """For aborting a request: beside steps, out of their callbacks, too. It waits for a pass in another thread."""
        inside = self._runner == threading.get_ident() and self._open_to_requests
        if not inside:
            self._check_own(what)
            self._check_free(what)
        with self._lock if inside else self._turn():
            self.check_open(what)
            self._check_free(what)
            yield

    @contextlib.contextmanager
    def helper(self) -> Iterator[None]:
        """For a thread that works for a stream."""
        self._helpers.add(threading.get_ident())
        try:
            yield
        finally:
            self._helpers.discard(threading.get_ident())

    def stream(self, run: Generator[T, None, None]) -> Generator[T, None, None]:
        """What ``run`` yields. Its turn lasts from the first item that is asked for until it ends or is closed."""
        self._check_own("stream")
        self._check_free("stream")
        with self._running("stream"):
            self._check_free("stream")
            self._stream = run
        try:
            while True:
                with self._running("stream"):
                    try:
                        item = next(run)
                    except StopIteration:
                        return
                yield item
        finally:
            with self._lock:
                run.close()
                if self._stream is run:
                    self._stream = None

    @contextlib.contextmanager
    def closing(self) -> Iterator[Generator | None]:
        """For closing the engine: nothing begins any more. Yields an open stream, which the body has to close."""
        with self._running("close"):
            self.closed = True
            stream, self._stream = self._stream, None
            yield stream

    def check_open(self, what: str) -> None:
        if self.closed:
            raise EngineClosedError(f"{what}: this LLM is closed, and its memory is freed; make a new one")

    def check(self) -> None:
        """Invariant: nothing runs and no stream is open in a closed engine."""
        assert not self.closed or (self._stream is None and self._runner is None), (self._stream, self._runner)

    @contextlib.contextmanager
    def _turn(self) -> Iterator[None]:
        """The lock, for a thread that does not have it."""
        with self._entrance:
            self._lock.acquire()
        try:
            yield
        finally:
            self._lock.release()

    @contextlib.contextmanager
    def _running(self, what: str) -> Iterator[None]:
        self._check_own(what)
        with self._turn():
            self.check_open(what)
            self._runner = threading.get_ident()
            try:
                yield
            finally:
                self._runner = None

    def _check_own(self, what: str) -> None:
        if threading.get_ident() in (self._runner, *self._helpers):
            raise EngineBusyError(
                f"{what} was called by what this LLM is running (a callback, or the items of a stream); "
                "call it after the run, or use a second LLM"
            )

    def _check_free(self, what: str) -> None:
        if self._stream is not None:
            raise EngineBusyError(
                f"{what} was called while a stream of this LLM is open, whose sequences fill the block; read the "
                "stream to its end or call its close(), put what is to run into its items, or use a second LLM"
            )
