"""The waiting line of several engines: who of them gets how many of the requests, so that all end at the same time."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import islice

from flexbatch.execution.waiting import WaitingLine
from flexbatch.request import Request

SHARE_OF_BLOCK = 8
"""An engine takes an eighth of its block at a time: what it holds and cannot begin is out of the others' reach."""


def level_of(unfinished: int, slots: Sequence[int]) -> int:
    """The most requests that an engine should hold for all to have as much to do, as far as their slots go."""
    left, level, sizes = unfinished, 0, sorted(slots)
    for i, size in enumerate(sizes):
        step = min(size - level, -(-left // (len(sizes) - i)))
        level, left = level + step, left - step * (len(sizes) - i)
        if left <= 0:
            break
    return level


@dataclass
class Holding:
    """A request that an engine has, or has finished while rank 0 was busy."""

    request: Request
    engine: int
    finished: bool = False


class SharedLine(WaitingLine):
    """Rank 0's line. Its own engine, number 0, takes from it by `pop`, the others by `share`, each as it has free
    slots, and no more than its part of all that is unfinished. Every call holds the lock, as threads serve engines."""

    def __init__(self, engines: int) -> None:
        super().__init__()
        self.lock = threading.RLock()
        self.slots = [1] * engines
        """Sequences that each engine's block holds, as far as it has said."""
        self.holdings: dict[tuple[int, int], Holding] = {}
        """By (index, sample), until somebody was told of the completion."""
        self.held = [0] * engines
        """Requests that each engine has and has not finished."""
        self.on_waiting: Callable[[], None] = lambda: None
        """Called when somebody waits anew."""

    def allowance(self, engine: int) -> int:
        """How many more requests an engine may hold."""
        return level_of(len(self) + sum(self.held), self.slots) - self.held[engine]

    def pop(self) -> Request | None:
        with self.lock:
            return next(iter(self._take(0, 1)), None)

    def share(self, engine: int, free: int, slots: int) -> list[Request]:
        """What an engine with so many free slots gets: little at a time, and the last ones one by one."""
        with self.lock:
            self.slots[engine] = slots
            most = max(1, min(slots // SHARE_OF_BLOCK, len(self) // (2 * len(self.slots))))
            return self._take(engine, min(free, most))

    def _take(self, engine: int, count: int) -> list[Request]:
        taken: list[Request] = []
        while len(taken) < count and self.allowance(engine) > 0 and (request := super().pop()) is not None:
            self.holdings[request.index, request.sample] = Holding(request, engine)
            self.held[engine] += 1
            taken.append(request)
        return taken

    def add(self, requests: Iterable[Request]) -> None:
        with self.lock:
            super().add(requests)
        self.on_waiting()

    def finished(self, index: int, sample: int) -> Request | None:
        """The request that an engine has finished; None where nobody waits for it any more."""
        with self.lock:
            holding = self.holdings.get((index, sample))
            if holding is None or holding.finished:
                return None
            holding.finished = True
            self.held[holding.engine] -= 1
            return holding.request

    def done(self, index: int, sample: int) -> None:
        with self.lock:
            self.finished(index, sample)
            self.holdings.pop((index, sample), None)

    def returned(self, requests: Sequence[Request]) -> None:
        """An engine has not begun these: they wait again."""
        with self.lock:
            known = [each for each in requests if self.finished(each.index, each.sample)]
            for request in known:
                self.done(request.index, request.sample)
            super().add(known)

    def ahead(self, limit: int | None) -> list[Request]:
        """Of those that wait, the part that one engine is likely to get."""
        engines = len(self.slots)
        with self.lock:
            return list(islice(self, 0, None if limit is None else limit * engines, engines))

    def away(self) -> set[int]:
        with self.lock:
            return {index for (index, _), holding in self.holdings.items() if holding.engine}

    def keep(self, wanted: Callable[[Request], bool]) -> None:
        with self.lock:
            super().keep(wanted)
            for key in [key for key, holding in self.holdings.items() if not wanted(holding.request)]:
                self.done(*key)

    def clear(self) -> None:
        with self.lock:
            super().clear()
            self.holdings.clear()
            self.held = [0] * len(self.held)

    def check(self) -> None:
        """Invariants: nobody waits who was given to an engine, and engines hold what they were given."""
        with self.lock:
            super().check()
            assert not {(each.index, each.sample) for each in self} & self.holdings.keys()
            for engine, held in enumerate(self.held):
                found = [each for each in self.holdings.values() if each.engine == engine and not each.finished]
                assert held == len(found), (engine, held, found)


class DrawnLine(WaitingLine):
    """The line of another engine than rank 0's: asks for a share when it is empty and somebody is wanted."""

    def __init__(self, draw: Callable[[], Sequence[Request]]) -> None:
        super().__init__()
        self.draw = draw

    def pop(self) -> Request | None:
        if not len(self):
            self.add(self.draw())
        return super().pop()
