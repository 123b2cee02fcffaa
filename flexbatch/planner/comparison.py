"""Speculation beside plain decoding of the same requests, by turns, so that a machine that slows down in the middle of
a job slows both."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from flexbatch.planner.report import Statistics
from flexbatch.request import Request

MOST_SLICES = 8


@dataclass(frozen=True)
class Turn:
    """One run of a part of a job."""

    requests: Sequence[Request]
    drafted: bool
    """With speculation."""
    kept: bool = True
    """Whether it counts in the report of the job, and its completions are the job's: every request has one such turn
    with speculation and one without."""


def turns(requests: Sequence[Request], block_size: int) -> Iterator[Turn]:
    """The job in slices of whole blocks, each plainly and with speculation, the order changing from slice to slice. A
    job of less than two blocks is run whole, both ways twice: cut in slices it would decode with fewer sequences in
    flight, where speculation gains more than it does in the job."""
    if len(requests) < 2 * block_size:
        yield from (Turn(requests, drafted, kept) for drafted, kept in ((False, True), (True, True), (True, False)))
        yield Turn(requests, drafted=False, kept=False)
        return
    blocks = -(-len(requests) // block_size)
    size = -(-blocks // min(blocks, MOST_SLICES)) * block_size
    for number, first in enumerate(range(0, len(requests), size)):
        part = requests[first : first + size]
        for drafted in (False, True) if number % 2 == 0 else (True, False):
            yield Turn(part, drafted)


@dataclass(frozen=True)
class Measured:
    """What a turn took."""

    turn: Turn
    seconds: float
    tokens: int

    @property
    def rate(self) -> float:
        """Generated tokens a second."""
        return self.tokens / self.seconds if self.seconds else 0.0


@dataclass
class Comparison:
    """What the turns of all jobs took, with speculation and without."""

    kept_baseline: Statistics = field(default_factory=Statistics)
    """The turns without speculation that are kept: the jobs as they would have been."""
    pairs: list[tuple[Measured, Measured]] = field(default_factory=list)
    """The plain turn and the drafted one of a slice."""
    unpaired: Measured | None = None
    """The first turn of the present slice; dropped where the second one fails."""

    def add(self, turn: Turn, seconds: float, tokens: int) -> None:
        first, second = self.unpaired, Measured(turn, seconds, tokens)
        if first is None or first.turn.requests is not turn.requests or first.turn.drafted == turn.drafted:
            self.unpaired = second
            return
        self.unpaired = None
        self.pairs.append((first, second) if turn.drafted else (second, first))

    def describe(self) -> dict[str, Any]:
        """Sums over both kinds of turns, and what speculation gained; empty where nothing was compared."""
        baseline, drafted = ([pair[arm] for pair in self.pairs] for arm in (0, 1))
        baseline_seconds, drafted_seconds = (sum(each.seconds for each in arm) for arm in (baseline, drafted))
        baseline_tokens, drafted_tokens = (sum(each.tokens for each in arm) for arm in (baseline, drafted))
        if not baseline_tokens or not baseline_seconds or not drafted_seconds:
            return {}
        plain_rate = baseline_tokens / baseline_seconds
        return {
            "plain_seconds": baseline_seconds,
            "plain_tokens": baseline_tokens,
            "plain_tokens_per_second": plain_rate,
            "plain_passes": self.kept_baseline.passes,
            "compared_seconds": drafted_seconds,
            "compared_tokens": drafted_tokens,
            "speed_up": drafted_tokens / drafted_seconds / plain_rate,
            "speed_up_by_turn": [fast.rate / slow.rate for slow, fast in self.pairs if slow.rate],
        }

    def check(self) -> None:
        """Invariants: a pair is one slice, plainly first and then with speculation."""
        for baseline, drafted in self.pairs:
            assert baseline.turn.requests is drafted.turn.requests
            assert (baseline.turn.drafted, drafted.turn.drafted) == (False, True)
