"""A job beside what was expected of it: passes, waves, the tail, and the time of all of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from collections.abc import Sequence as Many
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from flexbatch.execution.block_sizes import BlockSizes
from flexbatch.execution.job import Job
from flexbatch.execution.observer import RunObserver
from flexbatch.execution.pass_batch import PassBatch
from flexbatch.execution.scheduler import Scheduler
from flexbatch.execution.sequence import Sequence
from flexbatch.memory.kvcache import KVCache
from flexbatch.memory.prefix import Key
from flexbatch.planner.choose import with_budget, without_reserves
from flexbatch.planner.engine_plan import EnginePlan
from flexbatch.planner.problem import model_shape, workload_of
from flexbatch.policy.admission import CacheSizes, num_pages
from flexbatch.policy.hardware import Hardware
from flexbatch.policy.limits import PAGE_TOKENS
from flexbatch.policy.plan import price
from flexbatch.policy.policy import TIERS
from flexbatch.policy.trajectory import JobPasses, passes_of, passes_with_prefixes
from flexbatch.policy.workload import Workload
from flexbatch.request import Request

KeptPages = Mapping[str, tuple[tuple[int, Key], ...]]
"""By tier the pages, with their keys, of prompts of earlier jobs that nobody holds, in the order in which they will be
forgotten."""


def kept_pages(cache: KVCache) -> KeptPages:
    """Of a cache in which nothing runs."""
    return {
        tier: tuple((page, pool.prefixes.keys[page]) for page in pool.evictable) for tier, pool in cache.pools.items()
    }


@dataclass(frozen=True)
class Beginnings:
    """Numbers for full pages of prompts: the same one where prompts are alike up to its end and read with the same
    adapter."""

    of_prompts: tuple[tuple[int, ...], ...]
    kept: dict[str, tuple[int, ...]]
    """Of earlier jobs, by tier."""
    alike: bool
    """Whether any prompt begins as another one does, or one of an earlier job."""

    @classmethod
    def of(cls, requests: Many[Request], read: Many[int], kept: KeptPages) -> Beginnings:
        """Of the prompts so many tokens are ``read``."""
        numbers: dict[tuple[int, tuple[int, ...]], int] = {}
        there = {tier: numbers_of(dict(pages), numbers) for tier, pages in kept.items()}
        found, alike = [], False
        for request, tokens in zip(requests, read, strict=True):
            before, own = -1 - request.adapter, list[int]()
            for start in range(0, tokens // PAGE_TOKENS * PAGE_TOKENS, PAGE_TOKENS):
                page = tuple(request.prompt_token_ids[start : start + PAGE_TOKENS])
                known = len(numbers)
                before = numbers.setdefault((before, page), known)
                alike = alike or before < known
                own.append(before)
            found.append(tuple(own))
        return cls(tuple(found), there, alike)


def numbers_of(keys: dict[int, Key], numbers: dict[tuple[int, tuple[int, ...]], int]) -> tuple[int, ...]:
    """Of pages of one tier; whoever is kept is kept with what comes before it."""
    known: dict[int, int] = {}
    for page in keys:
        behind = [page]
        while (before := keys[behind[-1]][0]) >= 0 and before not in known:
            behind.append(before)
        for each in reversed(behind):
            before, tokens = keys[each]
            known[each] = numbers.setdefault((known.get(before, before), tokens), len(numbers))
    return tuple(known[page] for page in keys)


@dataclass(frozen=True)
class Forecast:
    """A job, and the plan and the sizes of the block that run it."""

    engine_plan: EnginePlan
    job: Job
    sizes: BlockSizes
    requests: Many[Request] = ()
    """Of the job in their order, where prompts that begin alike are to be looked for."""
    kept: KeptPages = field(default_factory=dict)
    """In the block's cache, when the job begins."""

    @property
    def looks_for_beginnings(self) -> bool:
        """Whether passes are counted with the pages that prompts share: where all that decides about these is known."""
        known = len(self.requests) == self.job.num_requests <= Workload.MAX_IN_ORDER and not self.job.likely_tokens
        alone = self.engine_plan.deployment.passes_in_flight == 1 and self.sizes.cache.windows is None
        return known and alone and all(each.params.prompt_logprobs is None for each in self.requests)

    @cached_property
    def passes(self) -> JobPasses:
        """Of the job, or of each of several parts of the block."""
        parts = self.engine_plan.deployment.passes_in_flight
        workload, policy = workload_of(self.job.of_every(parts)), self.engine_plan.policy
        if self.looks_for_beginnings:
            found = Beginnings.of(self.requests, self.job.prompt_tokens, self.kept)
            if found.alike:
                lengths = zip(workload.requests, found.of_prompts, strict=True)
                requests = [dataclasses.replace(each, beginnings=beginnings) for each, beginnings in lengths]
                return passes_with_prefixes(requests, policy, self.sizes.cache, found.kept)
        return passes_of(workload, policy, sizes=self.cache_of_a_part(parts))

    def cache_of_a_part(self, parts: int) -> CacheSizes:
        """Parts of a block take pages from the same cache: where that holds the whole job, no sequence of a part with
        longer ones waits."""
        cache = self.sizes.cache
        needed = sum(num_pages(rows) for rows in self.job.cache_tokens)
        return cache if needed <= sum(cache.pages(tier) for tier in TIERS) else cache.part(parts)

    def describe(self, hardware: Hardware | None) -> dict[str, Any]:
        """What the job should take, every answer as long as it may get; in seconds where the machine's rates are
        known."""
        found = self.engine_plan
        parts = found.deployment.passes_in_flight
        workload, passes = workload_of(self.job.of_every(parts)), self.passes
        facts = {
            "sequences": self.job.num_requests,
            "waves": -(-self.job.num_requests // max(1, parts * round(float(passes.in_flight.max())))),
            "predicted_passes": parts * round(float(passes.counts.sum())),
            "tail_passes": parts * round(passes.tail_passes),
            "tail_sequences": passes.tail_sequences,
            "assumed_answer_tokens": workload.mean_output,
        }
        if hardware is None:
            return facts
        config, model = found.config, found.model
        shape = model_shape(
            config.model,
            found.deployment.most_layers,
            found.dtype.itemsize,
            config.weight_bits,
            model.prequantized,
            found.deployment.adapters,
        )
        plan = price(shape, without_reserves(hardware), workload, with_budget(found.policy), passes)
        return {**facts, "predicted_seconds": plan.seconds, "tail_seconds": plan.tail_seconds}


class JobRecord(RunObserver):
    """Counts the passes, seconds and answers of a job that was known whole when it began. Nothing is predicted before
    somebody asks."""

    def __init__(self, forecast: Forecast) -> None:
        self.forecast = forecast
        self.passes, self.seconds = 0, 0.0
        self.answers, self.answer_tokens = 0, 0
        self.rest: Forecast | None = None
        """Of what was left at the last re-plan for other lengths, which came after so many passes and seconds."""
        self.passes_before, self.seconds_before = 0, 0.0

    def going_on(self, rest: Forecast) -> JobRecord:
        """Itself, now that what is left runs in another block."""
        self.rest, self.passes_before, self.seconds_before = rest, self.passes, self.seconds
        return self

    def after_pass(self, scheduler: Scheduler, batch: PassBatch, seconds: float) -> None:
        self.passes += 1
        self.seconds += seconds

    def after_sequence(self, sequence: Sequence) -> None:
        self.answers += 1
        self.answer_tokens += sequence.num_output_tokens

    def describe(self, hardware: Hardware | None) -> dict[str, Any]:
        """Predicted and measured; where lengths were learned on the way, also what was predicted then."""
        found = self.forecast.describe(hardware)
        if self.rest is not None:
            rest = self.rest.describe(hardware)
            found["replanned_passes"] = self.passes_before + rest["predicted_passes"]
            found["replanned_answer_tokens"] = rest["assumed_answer_tokens"]
            if "predicted_seconds" in rest:
                found["replanned_seconds"] = self.seconds_before + rest["predicted_seconds"]
        return {
            **found,
            "measured_passes": self.passes,
            "measured_seconds": self.seconds,
            "measured_answer_tokens": self.answer_tokens / self.answers if self.answers else 0.0,
        }
