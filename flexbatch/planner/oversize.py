"""Streams whose requests outgrow the block: a job is sized by the requests that were seen, and what comes later may
be longer."""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

from flexbatch.execution.batcher import Candidate
from flexbatch.job import Job
from flexbatch.policy.units import size_text
from flexbatch.validation.errors import DoesNotFitError

T = TypeVar("T")
Exceeded = Callable[[Job], dict[str, int]]
"""Bytes by tier that a job's block needs beyond the budgets, under any policy that can be had; empty when it fits."""


def job_of(candidates: Sequence[Candidate]) -> Job:
    return Job(
        tuple(candidate.num_cache_tokens for candidate in candidates),
        tuple(candidate.num_prompt_tokens for candidate in candidates),
    )


def holdable(job: Job, exceeded: Exceeded) -> Job:
    """The job without the requests for which even a block of their own exceeds the budgets; it is for the others
    that a block is made."""
    job = job.longest_first()
    first = bisect.bisect_left(
        range(job.num_requests), True, key=lambda i: not exceeded(Job((job.cache_tokens[i],), (job.prompt_tokens[i],)))
    )
    return Job(job.cache_tokens[first:], job.prompt_tokens[first:]) if first < job.num_requests else Job((1,), (1,))


def look_ahead(candidates: Iterator[Candidate], count: int) -> tuple[Job, Iterator[Candidate]]:
    """The job of the next ``count`` requests; and the requests."""
    peeked = list(itertools.islice(candidates, count))
    return job_of(peeked), itertools.chain(peeked, candidates)


def prepared(prepare: Callable[[Job], T], job: Job) -> T:
    """``prepare`` for as many of the longest requests of a job as the budgets hold. Raises DoesNotFitError when the
    longest alone does not fit."""
    count, job = job.num_requests, job.longest_first()
    while True:
        try:
            return prepare(job.first(count))
        except DoesNotFitError:
            if count == 1:
                raise
            count //= 2


def refusal(candidate: Candidate, exceeded: Exceeded, budgets: dict[str, int]) -> str:
    """Why no block within the budgets (bytes by tier) holds a request; empty where one does, if with nothing else in
    it."""
    missing = exceeded(job_of([candidate]))
    if not missing:
        return ""
    short = ", ".join(
        f"{size_text(size)} more on the {tier} tier than its budget of {size_text(budgets[tier])}"
        for tier, size in missing.items()
    )
    return (
        f"{candidate.num_prompt_tokens} prompt and up to {candidate.output.max_tokens} generated tokens need "
        f"{short}, in a block of their own. "
        "Lower max_tokens, raise the budgets, or move the cache to a larger tier with --percent"
    )
