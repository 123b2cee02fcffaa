"""The items of a stream, drawn by a thread: in order, no more than are asked for, and an end or an error told once."""

from __future__ import annotations

import contextlib
import itertools
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from flexbatch.execution import feed as module
from flexbatch.execution.feed import Feed

SECONDS = 20.0
"""For what must happen, however busy the machine is."""


class Source:
    """Yields 0, 1, 2, ... and counts what is drawn; with ``held``, each waits until it is released."""

    def __init__(self, held: bool = False, error: BaseException | None = None, end: int | None = None) -> None:
        self.num_drawn = 0
        self.thread: threading.Thread | None = None
        self.asked = threading.Event()
        self.released = threading.Semaphore(0)
        self._held, self._error, self._end = held, error, end

    def __iter__(self) -> Iterator[int]:
        self.thread = threading.current_thread()
        for number in itertools.count() if self._end is None else range(self._end):
            self.asked.set()
            if self._held:
                self.released.acquire()
            self.num_drawn += 1
            yield number
        if self._error is not None:
            raise self._error


@contextlib.contextmanager
def feeding(items: Any) -> Iterator[Feed]:
    with contextlib.closing(Feed(items, contextlib.nullcontext)) as feed:
        yield feed


def everything(feed: Feed, limit: int) -> list[Any]:
    taken = []
    while not feed.ended:
        taken += feed.take(limit, wait=True)
    return taken


@pytest.mark.parametrize("limit", [1, 3, 10, 11])
def test_items_come_once_and_in_order(limit: int) -> None:
    with feeding(range(10)) as feed:
        assert everything(feed, limit) == list(range(10))
        assert list(feed.take(limit, wait=True)) == [], "after the end nothing comes, and nobody waits"


def test_no_more_are_drawn_than_are_asked_for() -> None:
    source = Source()
    with feeding(source) as feed:
        assert source.num_drawn == 0
        assert list(feed.take(3, wait=True)) == [0, 1, 2]
        # What was asked for once and has come is no longer outstanding.
        assert list(feed.take(2, wait=True)) == [3, 4]
        assert source.num_drawn == 5
    assert source.num_drawn == 5


def test_what_was_not_taken_is_not_asked_for_again() -> None:
    source = Source()
    with feeding(source) as feed:
        assert next(iter(feed.take(4, wait=True))) == 0
        assert list(feed.take(4, wait=True)) == [1, 2, 3, 4]
        assert source.num_drawn == 5


def test_without_waiting_only_what_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """A slow source holds up nobody; with ``wait``, one item is waited for and a pause ends the rest."""
    monkeypatch.setattr(module, "PAUSE_SECONDS", 0.01)
    source = Source(held=True)
    with feeding(source) as feed:
        assert list(feed.take(3, wait=False)) == []
        threading.Timer(0.05, source.released.release).start()
        assert list(feed.take(3, wait=True)) == [0]
        source.released.release(2)
        taken: list[int] = []
        while len(taken) < 2:
            taken += feed.take(1, wait=True)
        assert taken == [1, 2] and not feed.ended
        source.released.release(10)  # an item that was asked for may still be drawn when the feed closes


def test_items_that_follow_at_once_are_gathered_within_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """A source that never pauses does not hold the start of a run for ever: the deadline counts from the first item."""
    monkeypatch.setattr(module, "GATHER_SECONDS", 0.0)
    with feeding(range(10)) as feed:
        first = list(feed.take(10, wait=True))
        assert first and first == list(range(len(first)))
        assert first + everything(feed, 10) == list(range(10))


@pytest.mark.parametrize("error", [ValueError("mine"), KeyboardInterrupt(), MemoryError()], ids=repr)
def test_an_error_of_the_source_comes_after_its_items_and_once(error: BaseException) -> None:
    with feeding(Source(end=2, error=error)) as feed:
        taken = []
        with pytest.raises(type(error)) as found:
            while True:
                for item in feed.take(5, wait=True):
                    taken.append(item)
        assert found.value is error and taken == [0, 1]
        assert feed.ended and list(feed.take(5, wait=True)) == []


def test_what_is_no_iterable_is_an_error_of_the_first_take() -> None:
    with feeding(5) as feed, pytest.raises(TypeError, match="not iterable"):
        list(feed.take(1, wait=True))


def test_items_are_drawn_in_the_guard_and_in_a_thread_that_ends() -> None:
    """The guard is entered by the thread that draws, and left when the feed is closed."""
    entered: list[threading.Thread] = []
    left = threading.Event()

    @contextlib.contextmanager
    def guard() -> Iterator[None]:
        entered.append(threading.current_thread())
        yield
        left.set()

    source = Source()
    with contextlib.closing(Feed(source, guard)) as feed:
        assert list(feed.take(1, wait=True)) == [0]
        assert entered == [source.thread] and source.thread is not threading.current_thread()
    assert left.wait(SECONDS)
    assert source.thread is not None
    source.thread.join(SECONDS)
    assert not source.thread.is_alive() and source.num_drawn == 1


def test_closing_waits_for_no_source_that_is_slow() -> None:
    source = Source(held=True)
    feed = Feed(source, contextlib.nullcontext)
    assert list(feed.take(1, wait=False)) == []
    assert source.asked.wait(SECONDS)
    feed.close()
    source.released.release()  # the item that was being waited for
    assert source.thread is not None
    source.thread.join(SECONDS)
    assert not source.thread.is_alive() and source.num_drawn == 1
