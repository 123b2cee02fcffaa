"""A job walked by the scheduler's own rules, on numbers: which passes it takes and what each of them carries."""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Sequence

import numpy as np

from flexbatch.policy import admission
from flexbatch.policy.admission import CacheSizes
from flexbatch.policy.balancer import TierBalancer
from flexbatch.policy.expected_pages import ExpectedPages
from flexbatch.policy.in_flight import MicroBatch, Reading
from flexbatch.policy.pass_load import PassLoad
from flexbatch.policy.policy import TIERS, Policy
from flexbatch.policy.rounds import Rounds
from flexbatch.policy.walked import Walk
from flexbatch.policy.workload import RequestLengths

MAX_ALIKE = 32
"""Passes that one row stands for, at most, where the same sequences decode in all of them: their contexts grow by one
token a pass, and the row has the mean."""


class Walker:
    """Block, pools and requests of one walk; `step` is a pass, or a run of alike ones."""

    def __init__(
        self,
        requests: Sequence[RequestLengths],
        policy: Policy,
        sizes: CacheSizes | None,
        token_limit: int,
        expected: ExpectedPages | None = None,
    ) -> None:
        """sizes: pages of the pools; None where only the slots of the block limit who gets in. expected: where pages
        are reserved for likely answers; else each sequence reserves all that it will have."""
        self.expected = expected if sizes else None
        self.running: list[Reading] = []
        """Where pages are reserved for likely answers: the sequences in flight."""
        self.policy, self.sizes, self.token_limit = policy, sizes, token_limit
        self.budget = policy.prompt_tokens_per_micro_batch
        self.waiting = deque(requests)
        self.batches = [MicroBatch(index) for index in range(policy.num_gpu_batches)]
        none = [0] * policy.num_gpu_batches
        self.occupied, self.staged, self.of_tier = [*none], [*none], {tier: [*none] for tier in TIERS}
        """By micro-batch: sequences, pages of those that are not on the gpu tier, and sequences of each tier."""
        self.decoding, self.context = 0, 0
        """Of the whole block: sequences that decode, and the tokens that these attend to."""
        self.allowed = admission.allowed_tiers(policy.cache)
        self.balancer = TierBalancer(policy.cache)
        self.on_one_tier = len(self.allowed) == 1
        self.emptiest_first = [(0, index) for index in range(policy.num_gpu_batches)]
        """Where all are on one tier: a heap of (sequences, micro-batch), which keeps counts that hold no more. A search
        walks blocks of many micro-batches often."""
        self.free = {tier: sizes.pages(tier) for tier in self.allowed} if sizes else {}
        self.free_windows = sizes.quotas if sizes else {}
        """Of layers that keep only their window."""
        self.largest = admission.largest_sequence(policy.cache, sizes) if sizes else 0
        self.free_tails = sizes.disk_sequences if sizes else 0
        self.ends: list[tuple[int, int, Reading]] = []
        """(pass after which a decoding sequence is done, tie breaker, the sequence)."""
        self.rounds = Rounds(policy.admission_passes)
        self.num_admitted, self.num_running = 0, 0
        self.rows: list[tuple[float, ...]] = []

    @property
    def now(self) -> int:
        """Passes so far."""
        return self.rounds.now

    # Admission, as in `Scheduler.has_work` and `Block`

    def admit(self) -> None:
        before = self.num_admitted
        if not self.waiting or self.num_running >= self.policy.block_size or self.rounds.waits(self.num_running):
            return
        self.estimate()
        self.let_in()
        if self.waiting and self.num_admitted > before:
            self.rounds.filled(self.num_running)

    def let_in(self) -> None:
        """All that find a place and pages."""
        while self.waiting and self.num_running < self.policy.block_size:
            request = self.waiting[0]
            if self.sizes and request.pages > self.largest:
                self.waiting.popleft()  # refused
                continue
            pages = self.pages_of(request)
            if self.on_one_tier and self.is_open(first := self.emptiest(), pages):
                if not self.has_pages(tier := self.allowed[0], request, pages):
                    return
                self.enter(self.waiting.popleft(), tier, [first], pages)
                continue
            open_batches = {
                tier: batches
                for tier in self.allowed
                if self.has_pages(tier, request, pages) and (batches := self.open_micro_batches(tier, pages))
            }
            if not open_batches:
                return
            tier = self.balancer.choose(1, list(open_batches)) if len(self.allowed) > 1 else self.allowed[0]
            self.enter(self.waiting.popleft(), tier, open_batches[tier], pages)

    def pages_of(self, request: RequestLengths) -> int:
        """Pages to reserve for a sequence that is about to run: for a likely answer, whatever its own is, but no more
        than there are, which hold it alone."""
        if self.expected is None:
            return request.pages
        return min(self.largest, self.expected.of_one(request.prompt, self.num_running + 1))

    def estimate(self) -> None:
        """Reserve anew for all that run, where that is for likely answers."""
        if self.expected is None or not self.running or self.sizes is None:
            return
        generated = np.array([0 if each.began is None else self.now - each.began for each in self.running])
        rows = np.array([each.request.prompt for each in self.running]) + generated
        for each, pages in zip(self.running, self.expected.together(rows, generated).tolist(), strict=True):
            self.take(each, each.pages, pages)
            each.pages = pages

    def has_pages(self, tier: str, request: RequestLengths, pages: int) -> bool:
        if self.sizes is None:
            return True
        enough = self.free[tier] >= pages and self.free_windows[tier] >= self.sizes.in_windows(pages)
        return enough and (tier != "disk" or self.free_tails > 0)

    def open_micro_batches(self, tier: str, pages: int) -> list[int]:
        batch_size, staging = self.policy.gpu_batch_size, self.sizes.staging_pages if self.sizes else 0
        return admission.open_micro_batches(
            self.occupied, self.staged, "gpu" if self.sizes is None else tier, pages, batch_size, staging
        )

    def is_open(self, micro_batch: int, pages: int) -> bool:
        """Whether a micro-batch of one tier with a free slot has staging for so many pages more."""
        if self.sizes is None or self.allowed[0] == "gpu":
            return True
        return self.staged[micro_batch] + pages <= self.sizes.staging_pages

    def emptiest(self) -> int:
        """The first of the micro-batches with the fewest sequences."""
        while (first := self.emptiest_first[0])[0] != self.occupied[first[1]]:
            heapq.heappop(self.emptiest_first)
        return first[1]

    def enter(self, request: RequestLengths, tier: str, open_batches: list[int], pages: int) -> None:
        batch = self.batches[admission.emptiest(open_batches, self.of_tier[tier], self.occupied)]
        self.num_admitted += 1
        reading = Reading(request, tier, batch, request.prompt, pages, self.num_admitted)
        self.count(reading, 1)
        (batch.single if reading.uncached == 1 else batch.reading).append(reading)

    def count(self, reading: Reading, sign: int) -> None:
        """Take (1) or give back (-1) a slot and its pages."""
        tier, index = reading.tier, reading.micro_batch.index
        self.num_running += sign
        self.occupied[index] += sign
        self.of_tier[tier][index] += sign
        if self.on_one_tier:
            heapq.heappush(self.emptiest_first, (self.occupied[index], index))
        else:
            self.balancer.place(tier, sign)
        if self.sizes is None:
            return
        self.take(reading, *((0, reading.pages) if sign > 0 else (reading.pages, 0)))
        if tier == "disk":
            self.free_tails -= sign
        if self.expected is not None:
            (self.running.append if sign > 0 else self.running.remove)(reading)

    def take(self, reading: Reading, before: int, pages: int) -> None:
        """Reserve so many pages for it, instead of those ``before``."""
        assert self.sizes is not None
        self.free[reading.tier] -= pages - before
        self.free_windows[reading.tier] -= self.sizes.in_windows(pages) - self.sizes.in_windows(before)
        if reading.tier != "gpu":
            self.staged[reading.micro_batch.index] += pages - before

    # Passes, as in `queries.token_counts` and `Scheduler.commit`

    def step(self) -> None:
        """A pass, or as many as change nothing but the length of contexts."""
        reading_batches = [batch for batch in self.batches if batch.reading or batch.single]
        complete: list[Reading] = []
        if not reading_batches:
            left = self.ends[0][0] - self.now
            left = int(min(left, self.rounds.left(self.num_running))) if self.waiting else left
            while left:
                count = min(left, MAX_ALIKE)
                self.row(count, self.decoding, self.context + self.decoding * (count + 1) / 2)
                self.context, left = self.context + self.decoding * count, left - count
        else:
            read = [self.read(batch) for batch in reading_batches]
            totals = [sum(column) for column in zip(*(numbers for numbers, _ in read), strict=True)]
            self.context += self.decoding
            self.row(1, self.decoding, self.context, *totals)
            complete = [reading for _, readings in read for reading in readings]
        self.commit(complete)

    def commit(self, complete: list[Reading]) -> None:
        """The end of a pass in which these prompts were read to their ends."""
        for reading in complete:
            self.first_token(reading)
        while self.ends and self.ends[0][0] == self.now:
            self.end(heapq.heappop(self.ends)[2])

    def read(self, batch: MicroBatch) -> tuple[tuple[float, float, float, int], list[Reading]]:
        """((prompt tokens, tokens of earlier chunks, query-key pairs, complete prompts), whose these are) of a pass."""
        num_single, (complete, batch.single) = len(batch.single), self.ready(batch.single)
        tokens, before, pairs = len(complete), 0, 0.0
        for each in complete:
            before, pairs = before + each.request.prompt - 1, pairs + each.request.prompt
            each.uncached = 0
        budget = admission.prompt_budget(batch.decoding + num_single, self.token_limit, self.budget)
        (reading, unfinished), chunk = self.ready(batch.reading), self.policy.prefill_chunk
        met = 0
        for each in reading:
            take = admission.chunk_tokens(each.uncached, chunk, budget)
            if take == 0:
                break
            start = each.request.prompt - each.uncached
            tokens, before, pairs = tokens + take, before + start, pairs + take * (start + (take + 1) / 2)
            budget, each.uncached = budget - take, each.uncached - take
            met += 1
            (complete if each.uncached == 0 else batch.single if each.uncached == 1 else unfinished).append(each)
        batch.reading = unfinished + reading[met:] if met else batch.reading
        return (tokens, before, pairs, len(complete)), complete

    def ready(self, readings: list[Reading]) -> tuple[list[Reading], list[Reading]]:
        """Those that read in this pass, and those that wait for pages which others fill."""
        return readings, []

    def first_token(self, reading: Reading) -> None:
        """A prompt was read: its sequence decodes from the next pass on, or is done."""
        reading.began = self.now - 1
        left = reading.request.output - 1
        if left <= 0:
            self.count(reading, -1)
            return
        reading.micro_batch.decoding += 1
        self.decoding += 1
        self.context += reading.request.prompt
        heapq.heappush(self.ends, (self.now + left, reading.admitted, reading))

    def end(self, reading: Reading) -> None:
        reading.micro_batch.decoding -= 1
        self.decoding -= 1
        self.context -= reading.request.prompt + reading.request.output - 1
        self.count(reading, -1)

    def row(self, count: int, decoding: int, context: float, *prompts: float) -> None:
        self.rows.append((count, self.num_running, self.num_admitted, decoding, context, *(prompts or (0, 0, 0, 0))))
        self.rounds.now += count

    def check(self) -> None:
        """Invariants: what is taken is what runs, and nothing is left behind."""
        assert self.num_running == sum(self.occupied) >= 0
        assert all(0 <= occupied <= self.policy.gpu_batch_size for occupied in self.occupied) and min(self.staged) >= 0
        assert self.decoding == sum(batch.decoding for batch in self.batches) == len(self.ends)
        assert self.expected or min([*self.free.values(), *self.free_windows.values()], default=0) >= 0
        assert self.free_tails >= 0 and len(self.running) == (self.num_running if self.expected else 0)
        self.balancer.check()


def walk(
    requests: Sequence[RequestLengths],
    policy: Policy,
    sizes: CacheSizes | None = None,
    token_limit: int | None = None,
    expected: ExpectedPages | None = None,
) -> Walk:
    """Every pass of a job of ``requests``, in their order of arrival, each of which generates all of its ``output``.
    Prompts that begin alike are read for themselves: see `prefix_walk.PrefixWalker`.

    sizes: pages of the pools, without which the block's slots alone limit who gets in. token_limit: query tokens that a
    micro-batch's buffers hold (default: as many as they are made for). expected: what is reserved where admission goes
    by likely answers; nobody steps aside in the walk, and the pools may be short for as long as somebody would.
    """
    return all_passes(Walker(requests, policy, sizes, token_limit or admission.micro_batch_tokens(policy), expected))


def all_passes(walker: Walker) -> Walk:
    """All passes of a walker's requests."""
    walker.admit()
    while walker.num_running:
        walker.step()
        walker.admit()
    assert not walker.waiting, "the next request finds no pages though nothing runs"
    walker.check()
    rows = np.asarray(walker.rows, dtype=float).reshape(-1, 9).T
    return Walk(PassLoad(*rows[3:]), rows[0], rows[1], rows[2])
