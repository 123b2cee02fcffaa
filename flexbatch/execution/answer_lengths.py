"""How long answers are: a distribution that is learned in the run, and the tokens that it says to reserve."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Collection, Hashable, Iterable
from collections.abc import Sequence as Many
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from flexbatch.execution.job import Job
from flexbatch.execution.sequence import Sequence
from flexbatch.policy.limits import RESERVED_DEVIATIONS
from flexbatch.policy.survival import NOTHING_SEEN, PASSES_AHEAD, Survival
from flexbatch.request import Request

REMEMBERED = 1024
"""Latest answers of a source that the estimate is made of: lengths may change along a job."""
ENOUGH = 32
"""Answers that a plan is made for, at least."""
GOLDEN = 0.6180339887498949
REFRESHED_EVERY = 8
"""Finished answers, or passes, after which the estimate is made anew."""


@dataclass(frozen=True)
class Likely:
    """Lengths that were seen, in ascending order, and the share of answers that end there or before: the same estimate
    without ``PRIOR`` and without bins, which made the passes of a job 5 to 20 % more than it took. Plans are made for
    it; memory is not reserved by it."""

    lengths: np.ndarray
    share: np.ndarray

    @classmethod
    def of(cls, lengths: np.ndarray, ended: np.ndarray) -> Likely:
        order = np.lexsort((~ended, lengths))
        at_risk = np.arange(len(order), 0, -1)
        return cls(lengths[order], 1 - np.cumprod(1 - ended[order] / at_risk))

    def quantile(self, share: float, limit: int) -> int:
        """The length that this share of the answers does not exceed; ``limit`` where more were seen to go on."""
        index = int(np.searchsorted(self.share, share))
        return limit if index == len(self.lengths) else min(limit, max(1, int(self.lengths[index])))

    def check(self) -> None:
        assert (np.diff(self.lengths) >= 0).all() and (np.diff(self.share) >= -1e-9).all()
        assert len(self.lengths) == len(self.share) and (self.share >= 0).all() and (self.share <= 1 + 1e-9).all()


NONE_LIKELY = Likely.of(np.zeros(0), np.zeros(0, dtype=bool))


@dataclass
class Seen:
    """Answers of one source: their lengths, whether each came to its end, and what follows from them."""

    lengths: deque[int] = field(default_factory=lambda: deque(maxlen=REMEMBERED))
    ended: deque[bool] = field(default_factory=lambda: deque(maxlen=REMEMBERED))
    survival: Survival = NOTHING_SEEN
    """What memory is reserved by."""
    likely: Likely = NONE_LIKELY
    """What plans are made for."""


class AnswerLengths:
    """How long the answers of a run were so far, by the source of their rows, and what to reserve for those in flight
    and to come.

    Sequences grow and end at different times, so that all of them together never have what each will have at its end.
    What is reserved is what they are expected to have when that is the most. ``safety``: standard deviations of that
    sum which are reserved beyond its mean; less of it overbooks more. ``reserve="all"`` reserves what each may reach,
    ``max_tokens``.
    """

    def __init__(self, reserve: str = "expected", safety: float = RESERVED_DEVIATIONS) -> None:
        self.reserve, self.safety = reserve, safety
        self.sources: dict[Hashable, Seen] = {}
        self.num_seen = self.stale = 0
        """Answers seen, and answers and passes since the last estimate."""
        self.next_comparison = ENOUGH
        """Answers at which they are compared with the plan: twice as many each time."""

    @property
    def learns(self) -> bool:
        return self.reserve == "expected"

    @property
    def knows(self) -> bool:
        """Whether any answer was seen: before that all is reserved, and no estimate changes."""
        return self.learns and self.num_seen > 0

    def observe(self, sequence: Sequence) -> None:
        """Take in an answer that has ended. What ran to its limit by its own request says nothing of others."""
        if self.learns and sequence.params.may_end_early and sequence.output.finish is not None and not sequence.error:
            seen = self.sources.setdefault(sequence.request.source, Seen())
            seen.lengths.append(sequence.num_output_tokens)
            seen.ended.append(sequence.output.finish.reason == "stop")
            self.num_seen += 1
            self.stale += 1

    def comparison_due(self) -> bool:
        """Whether the plan is to be compared with them now; not again before as many more were seen."""
        if self.num_seen < self.next_comparison:
            return False
        self.next_comparison = self.num_seen + min(self.num_seen, REMEMBERED)
        return True

    def update(self, started: Collection[Sequence]) -> None:
        """A pass goes by: make the estimates anew now and then, with the answers of ``started`` sequences, which
        still grow."""
        self.stale += 1
        if not self.knows or self.stale < REFRESHED_EVERY:
            return
        self.stale = 0
        growing: dict[Hashable, list[int]] = {}
        for sequence in started:
            if sequence.params.may_end_early:
                growing.setdefault(sequence.request.source, []).append(sequence.num_output_tokens)
        for source, seen in self.sources.items():
            others = growing.get(source, [])
            lengths = np.array([*seen.lengths, *others], dtype=float)
            ended = np.array([*seen.ended, *[False] * len(others)], dtype=bool)
            seen.survival, seen.likely = Survival.of(lengths, ended), Likely.of(lengths, ended)

    def occupied(self, sequences: Many[Sequence]) -> tuple[np.ndarray, np.ndarray]:
        """Mean and variance of the token rows of each sequence after some of ``PASSES_AHEAD``: [passes, sequences]. It
        has as many more by then, or has ended and has none: at its limit for certain."""
        length, generated, limit, least = np.array(
            [(len(s.token_ids), s.num_output_tokens, s.output.max_tokens, s.params.min_tokens) for s in sequences]
        ).T
        left = np.maximum(0, limit - generated)
        ahead = PASSES_AHEAD[: 1 + np.searchsorted(PASSES_AHEAD, left.max())]
        grown = np.minimum(ahead[:, None], left)
        alive = np.ones(grown.shape)
        by_source: dict[Hashable, list[int]] = {}
        for i, sequence in enumerate(sequences):
            if sequence.params.may_end_early and sequence.request.source in self.sources:
                by_source.setdefault(sequence.request.source, []).append(i)
        for source, own in by_source.items():
            survival, surely = self.sources[source].survival, np.maximum(generated[own], least[own])
            alive[:, own] = survival.at(np.maximum(generated[own] + grown[:, own], surely)) / survival.at(surely)
        # Between two of these times it may still be there.
        alive[1:][ahead[:-1, None] >= left] = 0
        rows = length + grown
        return rows * alive, rows**2 * alive * (1 - alive)

    def rows_of_one(self, sequence: Sequence, in_flight: int) -> int:
        """Token rows to reserve for a sequence that is about to join others, ``in_flight`` with it: the most that it
        is expected to have at any time, and its share of the margin."""
        if not self.knows:
            return sequence.num_prompt_tokens + sequence.output.max_tokens
        means, variances = self.occupied([sequence])
        return math.ceil((means + self.safety * np.sqrt(variances / max(1, in_flight))).max())

    def rows_together(self, sequences: Many[Sequence]) -> list[int]:
        """Token rows to reserve for each of those in flight: what all of them are expected to have, with a margin, at
        the time when that is the most."""
        if not self.knows or not sequences:
            return [each.num_prompt_tokens + each.output.max_tokens for each in sequences]
        means, variances = self.occupied(sequences)
        deviations = np.maximum(np.sqrt(variances.sum(axis=1)), 1e-9)
        most = int((means.sum(axis=1) + self.safety * deviations).argmax())
        shares = self.safety * variances[most] / deviations[most]
        return np.ceil(means[most] + shares).astype(int).tolist()

    def draw(self, requests: Iterable[tuple[Request, int]]) -> list[int]:
        """Answers that are spread as those that were seen, of requests and the tokens that each may generate: for a
        plan. Empty before enough were seen, and where every request runs to its limit whatever was seen."""
        if not self.learns or self.num_seen < ENOUGH:
            return []
        found, drawn = [], dict.fromkeys(self.sources, 0)
        for request, limit in requests:
            source = request.source
            if request.params.may_end_early and source in drawn:
                drawn[source] += 1
                # Multiples of the golden ratio fill the interval evenly, however many there are.
                limit = self.sources[source].likely.quantile(drawn[source] * GOLDEN % 1, limit)
            found.append(limit)
        return found if any(drawn.values()) else []

    def job(self, requests: Iterable[Request], context: int) -> Job:
        """The lengths of requests: what they may reach, and what is likely by the answers seen so far."""
        limits = [(each, each.params.tokens_within(context - len(each.prompt_token_ids))) for each in requests]
        lengths = [(len(request.prompt_token_ids), limit) for request, limit in limits]
        return Job.of(lengths, context, self.draw(limits))

    def report(self) -> dict[str, Any]:
        """Answers seen and their mean length, by source."""
        return {
            "" if source is None else str(source): {
                "answers": len(seen.lengths),
                "mean_tokens": float(np.mean(seen.lengths)),
            }
            for source, seen in self.sources.items()
        }

    def check(self) -> None:
        """Invariants: every length has its end, and every estimate falls from 1."""
        assert self.learns or not self.sources
        assert self.num_seen >= sum(len(seen.lengths) for seen in self.sources.values())
        for seen in self.sources.values():
            assert len(seen.lengths) == len(seen.ended) <= REMEMBERED
            seen.survival.check()
            seen.likely.check()
