"""The one thread that turns the engine: requests come in between passes, and what has ended goes back to who asked.

All calls of the engine are made here. Other threads leave orders, which are followed before the next pass; nothing that
they do, be it to encode a prompt or to read a file, is waited for while sequences run.
"""

from __future__ import annotations

import contextlib
import logging
import queue
import threading
import time
from collections.abc import Callable, Hashable, Iterable
from concurrent.futures import Future
from dataclasses import dataclass
from itertools import count
from typing import Any, Protocol

from flexbatch.apps.jobs.rows import RowRequest
from flexbatch.apps.serve.load import BlockMeter
from flexbatch.execution.sequence import Sequence
from flexbatch.request import Completion

logger = logging.getLogger("flexbatch")

INTERACTIVE, BATCH = 0, 1
"""Priorities of requests."""
BLOCKS_AHEAD = 2
"""Sequences of batches that are in the engine, in blocks: one runs, and one waits for slots that become free."""
FAILURES = 3
"""Passes that fail one after the other before the server gives up."""
GRACE_SECONDS = 2
"""From the order to stop on, answers that are on their way may end within this time."""
GATHER_SECONDS = 1.0
"""A run is sized for the requests that it begins with; the first lines of a batch have this time to come together."""
IDLE_SECONDS = 0.05
ENGINE_FAILED = "the engine failed while it ran this request"
"""The error of completions that nobody can do anything about; the log has the reason."""


def failed() -> Completion:
    return Completion([], finish_reason="error", error=ENGINE_FAILED)


@dataclass(frozen=True)
class Asked:
    """A prompt in the engine: ``on_end`` gets its completion, ``on_pass`` sees its sequences after every pass."""

    request: RowRequest
    on_end: Callable[[Completion], None]
    on_pass: Callable[[Sequence], None] | None = None
    feed: LineFeed | None = None
    """Of the batch that it is a line of."""

    @property
    def priority(self) -> int:
        return INTERACTIVE if self.feed is None else BATCH


class LineFeed(Protocol):
    """Where the lines of one batch come from."""

    def take(self) -> Asked | None:
        """The next line that is ready, None where none is at present. Never waits."""
        ...

    @property
    def gathered(self) -> bool:
        """Whether no more lines will come soon than are ready."""
        ...

    def take_back(self, asked: Asked) -> None:
        """A line whose pass failed is the next one again."""
        ...


class Serving:
    """Runs an `LLM` for requests of many threads. `run` is the engine's thread; the other methods may be called by any
    other one, and wait for nothing, but `snapshot`."""

    def __init__(self, llm: Any) -> None:
        self.llm, self.load = llm, BlockMeter()
        llm.watch(self.load)
        self._orders: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._keys = count()
        self._asked: dict[Hashable, Asked] = {}
        self._feeds: list[LineFeed] = []
        """Those of batches, the oldest first."""
        self._failures = self.num_of_batches = 0
        """Passes that have failed in a row; and sequences of batches in the engine, running ones and waiting ones."""
        self._gather_until = self._stop_by = 0.0
        self._in_run = False
        self._gate, self._closed = threading.Lock(), False
        self.stopping = threading.Event()

    # For other threads

    def ask(self, asked: Iterable[Asked]) -> list[Hashable]:
        """Let prompts be completed; returns their keys. All of them come between the same two passes."""
        keyed = {next(self._keys): each for each in asked}

        def order() -> None:
            for key, each in keyed.items():
                self._add(key, each)

        with self._gate:
            if not self._closed:
                self._orders.put(order)
                return list(keyed)
        for each in keyed.values():
            each.on_end(failed())
        return []

    def cancel(self, keys: Iterable[Hashable]) -> None:
        """Give prompts up before the next pass. Nothing comes of them any more."""
        gone = list(keys)
        self._orders.put(lambda: self._abort(gone))

    def attach(self, feed: LineFeed) -> None:
        self._orders.put(lambda: self._feeds.append(feed))

    def detach(self, feed: LineFeed) -> None:
        """Take no more lines of a batch, and give those up that are in the engine."""

        def order() -> None:
            if feed in self._feeds:
                self._feeds.remove(feed)
            self._abort([key for key, each in self._asked.items() if each.feed is feed])

        self._orders.put(order)

    def wake(self) -> None:
        """Lines have become ready."""
        self._orders.put(lambda: None)

    def stop(self) -> None:
        """End `run`, as soon as nobody waits for an answer that may come in time. A signal handler may call it."""
        self.stopping.set()
        self.wake()

    def snapshot(self, timeout: float) -> dict[str, Any] | None:
        """The engine's report between two passes; None where none has ended within ``timeout`` seconds."""
        found: Future[dict[str, Any]] = Future()

        def order() -> None:
            try:
                if not self._closed:
                    found.set_result(dict(self.llm.report()))
            except Exception as error:
                found.set_exception(error)

        self._orders.put(order)
        try:
            return found.result(timeout)
        except Exception:  # too late, or the engine has failed
            return None

    # The engine's thread

    def run(self) -> None:
        """Serves until `stop`. Raises what the engine raises when it fails again and again, and KeyboardInterrupt; in
        every case nobody waits any more then."""
        try:
            while not self.stopping.is_set() or self._finishes():
                self._follow_orders()
                if not self.stopping.is_set():
                    self._fill()
                if not self.llm.has_unfinished():
                    if self._in_run:
                        self.llm.step()  # the last ones were given up: it ends the run
                    self._in_run = False
                elif not self._gathers():
                    self._step()
        finally:
            self.stopping.set()
            self._end_all()

    def _finishes(self) -> bool:
        """Whether answers are on their way that may still end in time."""
        self._stop_by = self._stop_by or time.monotonic() + GRACE_SECONDS
        waiting = any(each.priority == INTERACTIVE for each in self._asked.values())
        return waiting and time.monotonic() < self._stop_by

    def _follow_orders(self) -> None:
        """All that have been left; waits for one where there is nothing to run."""
        timeout = 0.0
        if not self.llm.has_unfinished():
            timeout = IDLE_SECONDS if self._feeds else 3600.0
        while True:
            try:
                order = self._orders.get(timeout > 0, timeout)
            except queue.Empty:
                return
            order()
            timeout = 0.0

    def _add(self, key: Hashable, asked: Asked) -> None:
        row = asked.request
        self._asked[key] = asked
        if self._closed:
            return
        try:
            self.llm.add_request(
                row.token_ids,
                row.params,
                key,
                lora_request=row.lora,
                priority=asked.priority,
                source=None if asked.feed is None else "batches",
                on_pass=asked.on_pass,
            )
        except ValueError as error:
            del self._asked[key]
            asked.on_end(Completion([], finish_reason="error", error=str(error)))
        except Exception:
            logger.exception("a request could not be added")
            del self._asked[key]
            asked.on_end(failed())

    def _fill(self) -> None:
        """Take lines of batches, of the oldest first, until the block and what comes after it are full."""
        self.num_of_batches = sum(each.request.params.n for each in self._asked.values() if each.priority == BATCH)
        if not self._feeds:
            return
        left = BLOCKS_AHEAD * self.llm.policy.block_size - self.num_of_batches
        if not self._asked and not self._gather_until:
            self._gather_until = time.monotonic() + GATHER_SECONDS
        for feed in self._feeds:
            while left > 0 and (asked := feed.take()) is not None:
                left -= asked.request.params.n
                self._add(next(self._keys), asked)
        if left <= 0 or all(feed.gathered for feed in self._feeds):
            self._gather_until = 0.0

    def _gathers(self) -> bool:
        """Whether the first lines of a batch are waited for; never while anybody else waits or runs."""
        alone = all(each.priority == BATCH for each in self._asked.values())
        if alone and time.monotonic() < self._gather_until:
            time.sleep(0.005)
        else:
            self._gather_until = 0.0
        return bool(self._gather_until)

    def _step(self) -> None:
        self._in_run = True
        try:
            finished = self.llm.step()
        except Exception as error:
            self._failed(error)
            return
        self._failures = 0
        for key, completion in finished:
            self._asked.pop(key).on_end(completion)

    def _failed(self, error: Exception) -> None:
        """The engine has dropped what it ran. Lines of batches are run again, others are told."""
        self._failures += 1
        logger.error("a pass failed (%s of %s in a row): %s", self._failures, FAILURES, error, exc_info=error)
        if self._failures >= FAILURES:
            raise error
        asked, self._asked = self._asked, {}
        for each in asked.values():
            if each.feed is not None:
                each.feed.take_back(each)
            else:
                each.on_end(failed())

    def _abort(self, keys: Iterable[Hashable]) -> None:
        for key in keys:
            if self._asked.pop(key, None) is not None and not self._closed:
                self.llm.abort(key)

    def _end_all(self) -> None:
        """Nobody waits any more, nor will."""
        with self._gate:
            self._closed = True
        with contextlib.suppress(queue.Empty):
            while True:
                self._orders.get_nowait()()
        asked, self._asked = self._asked, {}
        for each in asked.values():
            if each.feed is None:
                each.on_end(failed())

    def check(self) -> None:
        """Invariant: no more lines of batches are here than were taken."""
        taken = sum(each.request.params.n for each in self._asked.values() if each.priority == BATCH)
        most = max((each.request.params.n for each in self._asked.values()), default=0)
        assert taken <= BLOCKS_AHEAD * self.llm.policy.block_size + most, taken
