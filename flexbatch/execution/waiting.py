"""The requests that wait for the engine, the most urgent first."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from itertools import chain, islice

from flexbatch.execution.sequence import Sequence
from flexbatch.request import Request


class WaitingLine:
    """Requests by their priority, smaller numbers first, and those of one priority in the order in which they came.

    Whoever shares one between threads holds a lock around each call.
    """

    def __init__(self) -> None:
        self._lines: dict[int, deque[Request]] = {}
        """One for each priority that somebody waits with."""

    def __len__(self) -> int:
        return sum(map(len, self._lines.values()))

    def __iter__(self) -> Iterator[Request]:
        return chain.from_iterable(self._lines[priority] for priority in sorted(self._lines))

    @property
    def priority(self) -> int | None:
        """That of the first; None where nobody waits."""
        return min(self._lines, default=None)

    def add(self, requests: Iterable[Request]) -> None:
        for request in requests:
            self._lines.setdefault(request.priority, deque()).append(request)

    def pop(self) -> Request | None:
        """The first, which waits no longer; None where nobody does."""
        if (priority := self.priority) is None:
            return None
        request = self._lines[priority].popleft()
        if not self._lines[priority]:
            del self._lines[priority]
        return request

    def done(self, index: int, sample: int) -> None:
        """A request that has waited here has ended."""

    def ahead(self, limit: int | None) -> list[Request]:
        """The first requests; None: all."""
        return list(islice(self, limit))

    def away(self) -> set[int]:
        """Indices of the prompts that run elsewhere."""
        return set()

    def keep(self, wanted: Callable[[Request], bool]) -> None:
        """Let the others go."""
        lines = {priority: deque(filter(wanted, line)) for priority, line in self._lines.items()}
        self._lines = {priority: line for priority, line in lines.items() if line}

    def clear(self) -> None:
        self._lines.clear()

    def check(self) -> None:
        """Invariants: no line is empty, and each holds requests of its own priority."""
        for priority, line in self._lines.items():
            assert line and all(request.priority == priority for request in line), priority


def begun(started: Iterable[Sequence], waiting: Iterable[Sequence]) -> set[int]:
    """The requests of which something is in flight: who waits with tokens has generated them in an earlier block."""
    return {each.request.index for each in (*started, *(each for each in waiting if each.num_output_tokens))}
