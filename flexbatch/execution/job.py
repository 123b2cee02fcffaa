"""What the planner knows of a job."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import numpy as np


@dataclass(frozen=True)
class Job:
    """What the planner knows of a job, in the order of its requests: the token rows that each may need, and its
    prompt's length."""

    cache_tokens: tuple[int, ...]
    prompt_tokens: tuple[int, ...]

    TYPICAL_REQUESTS: ClassVar[int] = 256
    TYPICAL_PROMPT: ClassVar[int] = 512
    TYPICAL_ANSWER: ClassVar[int] = 128

    @classmethod
    def of(cls, lengths: Iterable[tuple[int, int]], max_positions: int) -> Job:
        """The job of requests given as (prompt tokens, max_tokens). The context may end one earlier. The last token
        that a request generates needs no row, and the last one of a prompt that is only scored is not read."""
        pairs = [
            (prompt - 1, prompt - 1)
            if max_tokens == 0 and prompt > 1
            else (prompt, prompt + max(0, min(max_tokens, max_positions - prompt) - 1))
            for prompt, max_tokens in lengths
        ] or [(1, 1)]
        return cls(tuple(cache for _, cache in pairs), tuple(prompt for prompt, _ in pairs))

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

    def first(self, count: int) -> Job:
        """The job of its first requests alone."""
        return Job(self.cache_tokens[:count], self.prompt_tokens[:count])

    def repeated(self, count: int) -> Job:
        """At least ``count`` requests of these lengths: what comes later is expected to be like what came first."""
        times = -(-count // self.num_requests)
        return Job(self.cache_tokens * times, self.prompt_tokens * times) if times > 1 else self

    def longest_first(self) -> Job:
        pairs = sorted(zip(self.cache_tokens, self.prompt_tokens, strict=True), reverse=True)
        return Job(tuple(cache for cache, _ in pairs), tuple(prompt for _, prompt in pairs))

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

    @cached_property
    def mean_tokens(self) -> float:
        """Token rows of the average request."""
        return sum(self.cache_tokens) / self.num_requests
