"""Sequences that have stepped aside: a tier ran out of pages for those that came before them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from flexbatch.execution.promises import Promises
from flexbatch.execution.sequence import Sequence
from flexbatch.memory.kvcache import KVCache
from flexbatch.memory.page_moves import park
from flexbatch.memory.pages import PageTable
from flexbatch.policy.policy import TIERS
from flexbatch.policy.step_aside import StepAsideCosts


@dataclass
class Preemptions:
    """How often sequences stepped aside in a run, and what became of their pages."""

    kept: int = 0
    """Stayed where they were: not their tier was short but the staging of their micro-batch."""
    moved: int = 0
    dropped: int = 0
    moved_bytes: int = 0
    recomputed_tokens: int = 0

    @property
    def total(self) -> int:
        return self.kept + self.moved + self.dropped

    def __iadd__(self, other: Preemptions) -> Preemptions:
        for name in self.__dataclass_fields__:
            setattr(self, name, getattr(self, name) + getattr(other, name))
        return self


class Aside:
    """The sequences that have stepped aside, the most urgent first and then the oldest, and their pages.

    Pages are moved to a lower tier that has them free, or dropped and their tokens read anew, whichever costs less.
    A quantized cache is moved always: keys and values that are computed anew differ in the last bit, as matrices of
    other shapes are multiplied in another order, and where they are rounded to codes that is a step of the code now
    and then. What is moved keeps its codes.
    """

    def __init__(
        self, cache: KVCache, costs: StepAsideCosts, promised: Promises, orphaned: Callable[[str, set[int]], None]
    ) -> None:
        """promised: pages that sequences which run are expected to take, a live view. orphaned:
        told of pages on a tier that were given up before they were filled, and that others wait for."""
        self.cache, self.costs, self.promised, self.orphaned = cache, costs, promised, orphaned
        self.sequences: list[Sequence] = []
        self.counts = Preemptions()

    @property
    def recomputes(self) -> bool:
        """Whether tokens may be read anew."""
        return self.cache.layout.bits == 16

    def page_bytes(self, table: PageTable) -> int:
        layout, short = self.cache.layout, sum(self.cache.windowed)
        whole = layout.num_pages(table.num_tokens) * (layout.num_layers - short)
        return (whole + len(table.windows) * short) * layout.page_bytes

    def target(self, table: PageTable) -> str | None:
        """The tier for the pages of a sequence, other than theirs; None: they are dropped. Raises RuntimeError where
        they may not be dropped and no tier has as many free: admission sees to it that one has."""
        cache, promised, count = self.cache, self.promised, self.cache.layout.num_pages(table.num_tokens)
        in_windows = cache.sizes.in_windows(count)
        lower = TIERS[TIERS.index(table.tier) + 1 :]
        free = [
            tier
            for tier in lower
            if cache.has_room(tier, count + promised.pages[tier], in_windows + promised.in_windows[tier])
        ]
        if self.recomputes:
            return self.costs.cheapest(table.num_tokens, self.page_bytes(table), table.tier, free)
        free = free or [tier for tier in TIERS if tier != table.tier and cache.has_room(tier, count, in_windows)]
        if not free:
            raise RuntimeError(f"{count} pages of a quantized cache on {table.tier} have to move, and no tier has them")
        return min(free, key=lambda tier: self.costs.moving(self.page_bytes(table), table.tier, tier))

    def begun(self, table: PageTable) -> bool:
        """Whether a sequence has read anything itself: a shared prefix that others have filled is all that it has
        before its first chunk."""
        return table.num_tokens > table.num_shared * self.cache.layout.page_tokens

    def add(self, sequence: Sequence, table: PageTable, in_place: bool = False, drop: bool = False) -> None:
        """Let a sequence wait that has left the block. in_place: its tier is not short of pages. drop: whatever that
        costs."""
        self.sequences.append(sequence)
        self.sequences.sort(key=lambda each: each.precedence)
        sequence.table = None
        if not self.begun(table):
            self.free(table)
        elif in_place:
            self.counts.kept += 1
            sequence.parked = self.kept_in_place(table)
        elif not drop and self.send_away(sequence, table):
            self.counts.moved += 1
        else:
            self.counts.dropped += 1
            if drop:
                self.give_up(sequence, table)

    def kept_in_place(self, table: PageTable) -> PageTable:
        """The pages where they are. Those that are not filled yet are nobody else's to share until it runs again: who
        came for them has its slot, perhaps, and would wait for it for ever."""
        parked = self.parked(table, table.tier)
        self.cache.pools[parked.tier].withdraw(parked.pages)
        return parked

    def parked(self, table: PageTable, tier: str) -> PageTable:
        """The pages on ``tier``, with an end to the waiting of others for those that are not filled yet."""
        before, unready = table.tier, self.cache.pools[table.tier].unready(table.pages)
        parked = park(self.cache, table, tier)
        self.orphaned(before, unready)
        return parked

    def give_up(self, sequence: Sequence, table: PageTable) -> None:
        """Free pages whose tokens will be read anew."""
        assert self.recomputes or not self.begun(table), "the codes of a quantized cache would not come again"
        self.counts.recomputed_tokens += table.num_tokens
        sequence.parked = None
        self.free(table)

    def send_away(self, sequence: Sequence, table: PageTable) -> bool:
        """Make the pages of a sequence available on their tier; whether they were moved, and not dropped."""
        tier = self.target(table)
        if tier is None:
            self.give_up(sequence, table)
            return False
        self.counts.moved_bytes += self.page_bytes(table)
        sequence.parked = self.parked(table, tier)
        return True

    def reclaim(self, tier: str, spared: Sequence | None = None) -> bool:
        """Make the pages that the youngest has left on ``tier`` available; False where nobody but ``spared`` has
        any."""
        for sequence in reversed(self.sequences):
            if sequence.parked is not None and sequence.parked.tier == tier and sequence is not spared:
                self.send_away(sequence, sequence.parked)
                return True
        return False

    def lets_pass(self, sequence: Sequence) -> bool:
        """Whether nobody here goes before a sequence that is new."""
        return not self.sequences or sequence.precedence < self.sequences[0].precedence

    def reclaim_any(self, tiers: Iterable[str], spared: Sequence | None = None) -> bool:
        """The same on the first of the tiers where anybody has pages."""
        return any(self.reclaim(tier, spared) for tier in tiers)

    def empty(self) -> list[Sequence]:
        """Hand out all that wait, to be read anew elsewhere."""
        sequences, self.sequences = self.sequences, []
        for sequence in sequences:
            if sequence.parked is not None:
                self.give_up(sequence, sequence.parked)
        return sequences

    def take_counts(self) -> Preemptions:
        """What happened since the last call."""
        counts, self.counts = self.counts, Preemptions()
        return counts

    def free(self, table: PageTable) -> None:
        """Release pages; those that others wait for go with an end to their waiting."""
        unready = self.cache.pools[table.tier].unready(table.pages)
        self.cache.free(table)
        self.orphaned(table.tier, unready)

    def remove(self, wanted: Callable[[Sequence], bool]) -> None:
        """Let those of them go for good that are ``wanted``."""
        for sequence in [each for each in self.sequences if wanted(each)]:
            self.sequences.remove(sequence)
            table, sequence.parked = sequence.parked, None
            if table is not None:
                self.free(table)

    def check(self) -> None:
        """Invariants: the most urgent first, and then the oldest; none runs, and what is parked is whole."""
        order = [sequence.precedence for sequence in self.sequences]
        assert order == sorted(set(order)), order
        for sequence in self.sequences:
            assert sequence.status == "waiting", sequence.status
            sequence.check()
            assert sequence.parked is None or (sequence.parked.parked and sequence.parked.pages)
