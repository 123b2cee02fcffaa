"""A job walked by the scheduler's own rules where prompts begin alike: who shares which pages, who waits until these
are filled, and how long pages are kept that nobody holds any more."""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from flexbatch.policy.admission import CacheSizes, num_pages
from flexbatch.policy.in_flight import MicroBatch, Reading
from flexbatch.policy.limits import PAGE_TOKENS
from flexbatch.policy.policy import Policy
from flexbatch.policy.walk import Walker
from flexbatch.policy.workload import RequestLengths


class SharedPages:
    """The pages of one tier that hold beginnings of prompts, by the number of the beginning: `memory.pages.PagePool` on
    numbers. All other pages are only counted."""

    def __init__(self, num_pages: int, kept: Sequence[int] = ()) -> None:
        """kept: beginnings of earlier jobs, in the order of their release."""
        self.num_pages = num_pages
        self.holders: dict[int, int] = {}
        """Sequences that hold each beginning; all of these are about to be filled, or are."""
        self.evictable: dict[int, None] = dict.fromkeys(kept)
        """Beginnings that nobody holds, in the order of their release."""
        self.ready: set[int] = set(kept)

    def match(self, request: RequestLengths) -> tuple[int, ...]:
        """The beginnings that a prompt finds here: without its last token, whose logits are wanted."""
        most = min(len(request.beginnings), (request.prompt - 1) // PAGE_TOKENS)
        count = 0
        while count < most and self.is_known(request.beginnings[count]):
            count += 1
        return request.beginnings[:count]

    def is_known(self, beginning: int) -> bool:
        return beginning in self.holders or beginning in self.evictable

    def share(self, beginnings: Sequence[int]) -> None:
        for each in beginnings:
            self.evictable.pop(each, None)
            self.holders[each] = self.holders.get(each, 0) + 1

    def enter(self, beginnings: Sequence[int]) -> tuple[int, ...]:
        """Those of a prompt that it fills itself, behind what it shares; up to one that another sequence fills."""
        count = next((i for i, each in enumerate(beginnings) if self.is_known(each)), len(beginnings))
        self.holders.update(dict.fromkeys(beginnings[:count], 1))
        return tuple(beginnings[:count])

    def release(self, beginnings: Sequence[int]) -> int:
        """Let go of beginnings that are filled. Returns how many of them others hold."""
        still_held = 0
        for each in reversed(beginnings):
            self.holders[each] -= 1
            if self.holders[each]:
                still_held += 1
            else:
                del self.holders[each]
                self.evictable[each] = None
        return still_held

    def evict(self, others: int) -> None:
        """Forget the oldest beginnings that nobody holds, where ``others`` pages leave no room for them."""
        while self.evictable and len(self.holders) + len(self.evictable) + others > self.num_pages:
            oldest = next(iter(self.evictable))
            del self.evictable[oldest]
            self.ready.discard(oldest)

    def check(self) -> None:
        """Invariants: what nobody holds is filled, and nothing is on both sides."""
        assert self.evictable.keys() <= self.ready <= self.holders.keys() | self.evictable.keys()
        assert not self.holders.keys() & self.evictable.keys() and all(count > 0 for count in self.holders.values())


@dataclass
class Held:
    """The pages of a running sequence that hold beginnings of prompts: those that it found, and those that it fills."""

    shared: tuple[int, ...]
    own: tuple[int, ...]
    filled: int = 0
    """Of its own."""


class PrefixWalker(Walker):
    """`Walker` of a job whose requests know their ``beginnings``, in pools that keep all layers whole."""

    def __init__(
        self,
        requests: Sequence[RequestLengths],
        policy: Policy,
        sizes: CacheSizes,
        token_limit: int,
        kept: Mapping[str, Sequence[int]],
    ) -> None:
        assert sizes.windows is None, "beginnings are shared otherwise where layers keep only their window"
        super().__init__(requests, policy, sizes, token_limit)
        self.shared = {tier: SharedPages(sizes.pages(tier), kept.get(tier, ())) for tier in self.allowed}
        self.held: dict[Reading, Held] = {}
        self.order: list[Reading] = []
        """Those that decode, in the order of `decoding.Decoding`: the last one takes the place of one that goes."""
        self.entries: dict[Reading, int] = {}
        self.joining: list[Reading] = []

    def has_pages(self, tier: str, request: RequestLengths, pages: int) -> bool:
        shared = self.shared[tier].match(request)
        return super().has_pages(tier, request, pages - self.saved(tier, shared))

    def saved(self, tier: str, shared: Sequence[int]) -> int:
        """Pages that need not be available: shared ones that somebody holds. The others are available now."""
        return sum(each in self.shared[tier].holders for each in shared)

    def admit(self) -> None:
        self.evict_displaced()
        super().admit()

    def count(self, reading: Reading, sign: int) -> None:
        super().count(reading, sign)
        pages = self.shared[reading.tier]
        if sign < 0:
            held = self.held.pop(reading)
            self.free[reading.tier] -= pages.release([*held.shared, *held.own])
            return
        shared = pages.match(reading.request)
        self.free[reading.tier] += self.saved(reading.tier, shared)
        pages.share(shared)
        self.held[reading] = Held(shared, pages.enter(reading.request.beginnings[len(shared) :]))
        reading.uncached -= PAGE_TOKENS * len(shared)
        self.evict_displaced(reading.tier)

    def evict_displaced(self, *tiers: str) -> None:
        """Evict what the pages that were taken until now leave no room for. Nothing is, as long as all that are
        reserved leave it."""
        for tier in tiers or self.allowed:
            pages = self.shared[tier]
            if pages.evictable and self.free[tier] < len(pages.evictable):
                pages.evict(sum(self.others(each) for each in self.held if each.tier == tier))

    def others(self, reading: Reading) -> int:
        """Pages that a sequence has taken beside beginnings: all of its prompt's from the start, others as it grows."""
        request, held = reading.request, self.held[reading]
        generated = 0 if reading.began is None else min(self.now - 1 - reading.began, request.output - 1)
        return num_pages(request.prompt + max(0, generated)) - len(held.shared) - len(held.own)

    def read(self, batch: MicroBatch) -> tuple[tuple[float, float, float, int], list[Reading]]:
        found = super().read(batch)
        batch.reading.sort(key=lambda each: each.admitted)
        return found

    def ready(self, readings: list[Reading]) -> tuple[list[Reading], list[Reading]]:
        now: list[Reading] = []
        later: list[Reading] = []
        for each in readings:
            (now if self.shared[each.tier].ready.issuperset(self.held[each].shared) else later).append(each)
        return now, later

    def commit(self, complete: list[Reading]) -> None:
        """Sequences are released in the order of the scheduler: pages are evicted in that order. First go those that
        decode."""
        self.evict_displaced()
        for each in sorted(self.joining, key=lambda each: each.admitted):
            self.entries[each] = len(self.order)
            self.order.append(each)
        self.joining = []
        for each in [*complete, *(each for batch in self.batches for each in (*batch.reading, *batch.single))]:
            self.fill(each)
        ending: list[Reading] = []
        while self.ends and self.ends[0][0] == self.now:
            ending.append(heapq.heappop(self.ends)[2])
        for each in sorted(ending, key=lambda each: (each.micro_batch.index, self.entries[each])):
            self.leave(each)
            self.end(each)
        for each in sorted(complete, key=lambda each: (each.micro_batch.index, each.admitted)):
            self.first_token(each)
            if each in self.held:
                self.joining.append(each)

    def fill(self, reading: Reading) -> None:
        """Mark what a sequence has filled so far of its own beginnings."""
        held, read = self.held[reading], (reading.request.prompt - reading.uncached) // PAGE_TOKENS
        filled = min(len(held.own), max(0, read - len(held.shared)))
        self.shared[reading.tier].ready.update(held.own[held.filled : filled])
        held.filled = filled

    def leave(self, reading: Reading) -> None:
        entry, last = self.entries.pop(reading), self.order.pop()
        if last is not reading:
            self.order[entry], self.entries[last] = last, entry

    def check(self) -> None:
        super().check()
        assert self.held.keys() == set() or self.num_running == len(self.held)
        for pages in self.shared.values():
            pages.check()
