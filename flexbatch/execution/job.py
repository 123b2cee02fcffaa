"""What the planner knows of a job."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import islice
from typing import ClassVar

import numpy as np


@dataclass(frozen=True)
class Job:
    """What the planner knows of a job, in the order of its requests: the token rows that each may need, its prompt's
    length, and where answers of other requests have been seen, the token rows that it is likely to need.

    ``likely_tokens`` are drawn from those answers: what holds for all of them together holds for the job, and not for
    a single request.
    """

    cache_tokens: tuple[int, ...]
    prompt_tokens: tuple[int, ...]
    likely_tokens: tuple[int, ...] = ()

    TYPICAL_REQUESTS: ClassVar[int] = 256
    TYPICAL_PROMPT: ClassVar[int] = 512
    TYPICAL_ANSWER: ClassVar[int] = 128

    @classmethod
    def of(cls, lengths: Iterable[tuple[int, int]], max_positions: int, likely: Iterable[int] = ()) -> Job:
        """The job of requests given as (prompt tokens, max_tokens), with their likely answers where these are known.
        The context may end one earlier. The last token that a request generates needs no row, and the last one of a
        prompt that is only scored is not read."""

        pairs = list(lengths) or [(1, 0)]
        prompts, most = np.array(pairs, dtype=np.int64).T
        scored = (most == 0) & (prompts > 1)

        def rows(answers: np.ndarray) -> tuple[int, ...]:
            grown = prompts + np.maximum(0, np.minimum(answers, max_positions - prompts) - 1)
            return tuple(np.where(scored, prompts - 1, grown).tolist())

        drawn = np.fromiter(islice(likely, len(pairs)), dtype=np.int64)
        known = rows(drawn) if len(drawn) == len(pairs) else ()
        return cls(rows(most), tuple(np.where(scored, prompts - 1, prompts).tolist()), known)

    @classmethod
    def typical(cls, max_positions: int) -> Job:
        """Before any prompt is known: so many requests of typical lengths, within the model's context."""
        return cls.alike(cls.TYPICAL_REQUESTS, cls.TYPICAL_PROMPT, cls.TYPICAL_ANSWER, max_positions)

    @classmethod
    def alike(cls, count: int, prompt: int, max_tokens: int, max_positions: int) -> Job:
        """``count`` requests of the same lengths, within the model's context."""
        prompt = min(prompt, max(1, max_positions - 1))
        one = cls.of([(prompt, max_tokens)], max_positions)
        return cls(one.cache_tokens * count, one.prompt_tokens * count)

    def assuming(self, share: float) -> Job:
        """The job with answers of this share of the length that they are expected to have."""
        if share >= 1:
            return self
        pairs = zip(self.expected_tokens, self.prompt_tokens, strict=True)
        return replace(self, likely_tokens=tuple(prompt + int(share * (rows - prompt)) for rows, prompt in pairs))

    def first(self, count: int) -> Job:
        """The job of its first requests alone."""
        return self._chosen(range(min(count, self.num_requests)))

    def after(self, count: int) -> Job:
        """The job without its first requests."""
        return self._chosen(range(count, self.num_requests))

    def of_every(self, count: int) -> Job:
        """The job of every ``count``-th request: what one of as many engines may expect to get of it, or one of as many
        parts of a pipeline's block."""
        return self if count == 1 else self._chosen(range(0, self.num_requests, count))

    def repeated(self, count: int) -> Job:
        """At least ``count`` requests of these lengths: what comes later is expected to be like what came first."""
        times = -(-count // self.num_requests)
        return Job(*(column * times for column in self._columns)) if times > 1 else self

    def longest_first(self) -> Job:
        pairs = list(zip(self.cache_tokens, self.prompt_tokens, strict=True))
        return self._chosen(sorted(range(self.num_requests), key=lambda i: pairs[i], reverse=True))

    @property
    def _columns(self) -> tuple[tuple[int, ...], ...]:
        return self.cache_tokens, self.prompt_tokens, self.likely_tokens

    def _chosen(self, indices: Iterable[int]) -> Job:
        order = list(indices)
        return Job(*(tuple(column[i] for i in order) if column else () for column in self._columns))

    @property
    def num_requests(self) -> int:
        return len(self.cache_tokens)

    # A job may have a million requests, and a search asks for these hundreds of times.

    @cached_property
    def descending(self) -> np.ndarray:
        """The token rows of every request, the most first."""
        return np.sort(np.asarray(self.cache_tokens))[::-1]

    @cached_property
    def longest(self) -> int:
        return int(self.descending[0])

    @cached_property
    def longest_prompt(self) -> int:
        return max(self.prompt_tokens)

    @property
    def expected_tokens(self) -> tuple[int, ...]:
        """Token rows of every request, by what is known of it."""
        return self.likely_tokens or self.cache_tokens

    @cached_property
    def mean_tokens(self) -> float:
        """Token rows of the average request, by what is known of it."""
        return sum(self.expected_tokens) / self.num_requests

    def rows_to_reserve(self, block: int, safety: float) -> list[int]:
        """Token rows of the sequences of a full block, the longest first: of the longest requests, or where likely
        ones are known, one that reaches all that it may, and others with the rows that a sequence in flight has on
        average, with a margin of ``safety`` standard deviations of their sum.

        A block that takes the whole job at once is as full as its answers are long. One that is filled again and again
        meets the longer ones more often, as they stay for more passes, and each at any time of its growth.
        """
        if not self.likely_tokens:
            rows: list[int] = self.descending[:block].tolist()
            return rows
        mean, square = self._whole if block >= self.num_requests else self._in_flight
        deviation = math.sqrt(max(0.0, square - mean**2) / max(1, block))
        one = min(self.longest, math.ceil(mean + safety * deviation))
        return [self.longest, *[one] * (min(block, self.num_requests) - 1)]

    @cached_property
    def _whole(self) -> tuple[float, float]:
        """Means of the likely token rows and of their squares at the end of the answers."""
        rows = np.asarray(self.likely_tokens, dtype=float)
        return float(rows.mean()), float((rows**2).mean())

    @cached_property
    def _in_flight(self) -> tuple[float, float]:
        """The same of a sequence that is met at any time."""
        prompts = np.asarray(self.prompt_tokens, dtype=float)
        grown = np.asarray(self.likely_tokens, dtype=float) - prompts
        mean = np.average(prompts + grown / 2, weights=1 + grown)
        square = np.average(prompts**2 + prompts * grown + grown**2 / 3, weights=1 + grown)
        return float(mean), float(square)
