"""The paged KV cache over the tiers: page tables of sequences, shared prefixes, and what they may take."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from flexbatch.memory.cache_orders import CacheOrders
from flexbatch.memory.cache_storage import CacheStorage
from flexbatch.memory.pages import CacheLayout, PagePool, PageTable
from flexbatch.memory.tiers import Tiers
from flexbatch.memory.transfer import TransferQueues
from flexbatch.memory.window_pages import WindowPages
from flexbatch.policy.admission import CacheSizes


class KVCache(CacheStorage):
    """Page pools of one model's cache, and the tables of its sequences."""

    def __init__(
        self,
        layout: CacheLayout,
        sizes: CacheSizes,
        tiers: Tiers,
        queues: TransferQueues,
        orders: CacheOrders | None = None,
    ) -> None:
        super().__init__(layout, sizes, tiers, queues, orders)
        self.pools = {tier: PagePool(tier, sizes.pages(tier), layout.page_tokens) for tier in ("gpu", "cpu", "disk")}
        self.windows = (
            WindowPages(layout.page_tokens, layout.window, sizes.windows, self.pools)
            if layout.window and sizes.windows and any(self.windowed)
            else None
        )
        self.num_open = dict.fromkeys(self.pools, 0)
        """Sequences with an open table, by tier."""
        self.peak_open = dict(self.num_open)
        """The same when there were most of them: the split as it was realized."""

    @property
    def resident(self) -> bool:
        """Whether every sequence that runs has its cache on the compute device."""
        return self.sizes.cpu_pages == self.sizes.parking_pages and not self.sizes.disk_pages

    @property
    def ring(self) -> int:
        """Pages of a sequence between two passes, at most, in layers that keep only their window; 0: none does."""
        return 0 if self.windows is None else self.windows.sizes.ring

    @property
    def realized_percent(self) -> dict[str, float]:
        """Per cent of the sequences on each tier, when the block held most of them."""
        total = sum(self.peak_open.values()) or 1
        return {tier: 100 * count / total for tier, count in self.peak_open.items()}

    # Tables

    def shareable(self, tier: str, prompt: Sequence[int], adapter: int = 0) -> list[int]:
        """Pages on ``tier`` that hold, or are about to hold, the beginning of a prompt, read with the same adapter. The
        last prompt token is never shared: its logits are needed."""
        found = self.pools[tier].prefixes.match(prompt, (len(prompt) - 1) // self.layout.page_tokens, adapter)
        return found if self.windows is None else found[: self.windows.usable(tier, found)]

    def open(
        self,
        tier: str,
        num_tokens: int,
        prompt: Sequence[int] = (),
        shared_pages: Sequence[int] = (),
        cpu_attention: bool = False,
        adapter: int = 0,
    ) -> PageTable:
        """A table with pages for ``num_tokens`` tokens on ``tier``; the caller has asked `can_open`. ``prompt`` enters
        the prefix index, under its ``adapter``. ``cpu_attention``: decode tokens are attended by the CPU."""
        shared, pool = list(shared_pages), self.pools[tier]
        known = []
        if self.windows is not None:
            found = pool.prefixes.match(prompt, len(prompt) // self.layout.page_tokens, adapter)
            known = self.windows.known(tier, found)
        pool.share(shared)
        pages = shared + pool.allocate(self.layout.num_pages(num_tokens) - len(shared))
        pool.prefixes.enter(pages, prompt, adapter)
        num_cached = len(shared) * self.layout.page_tokens
        table = PageTable(tier, pages, num_cached, num_shared=len(shared), cpu_attention=cpu_attention)
        if self.windows is not None:
            self.windows.open(table, known)
        if tier == "disk":
            assert self.disk is not None
            table.tail_slot = self.disk.open(table.num_tokens)
        self.count_open(tier)
        return table

    def count_open(self, tier: str) -> None:
        """One sequence more runs on ``tier``."""
        self.num_open[tier] += 1
        if sum(self.num_open.values()) >= sum(self.peak_open.values()):
            self.peak_open = dict(self.num_open)

    def can_open(
        self,
        tier: str,
        num_tokens: int,
        shared_pages: Sequence[int] = (),
        promised: int = 0,
        promised_windows: int = 0,
    ) -> bool:
        """Whether ``tier`` has pages for ``num_tokens`` tokens, of which ``shared_pages`` hold the first, beside
        ``promised`` pages for others, and ``promised_windows`` in layers that keep only their window."""
        pool, pages = self.pools[tier], self.layout.num_pages(num_tokens)
        reused = sum(page in pool.evictable for page in shared_pages)
        fits = pool.num_available - reused - promised >= pages - len(shared_pages)
        if self.windows is not None:
            fits = fits and self.windows.room(tier) - promised_windows >= self.windows.more(0, pages)
        return fits and (tier != "disk" or (self.disk is not None and bool(self.disk.free_tails)))

    def has_room(self, tier: str, pages: int, in_windows: int) -> bool:
        """Whether a tier has so many pages that nobody holds, and room for so many in layers that keep only their
        window."""
        fits = self.pools[tier].num_available >= pages
        return fits and (self.windows is None or self.windows.room(tier) >= in_windows)

    def extend(self, table: PageTable, num_tokens: int) -> bool:
        """Take pages for the first ``num_tokens`` tokens of a sequence; False, and none is taken, where its tier has
        too few."""
        pool, count = self.pools[table.tier], self.layout.num_pages(num_tokens) - len(table.pages)
        if count > pool.num_available:
            return False
        if count > 0:
            if self.windows is not None and not self.windows.grow(table, len(table.pages) + count):
                return False
            table.extend(pool.allocate(count))
        return True

    def hold(self, table: PageTable, num_tokens: int) -> None:
        """Take pages for a pass after which the sequence has so many tokens, in layers that keep only their window."""
        if self.windows is not None:
            self.windows.hold(table, num_tokens)

    def commit(self, table: PageTable, num_tokens: int) -> None:
        """The first ``num_tokens`` tokens of the sequence are in the cache and stay; full pages may be shared from
        now on."""
        before, full = table.num_tokens // self.layout.page_tokens, num_tokens // self.layout.page_tokens
        if full > before:
            self.pools[table.tier].prefixes.mark_ready(table.pages[before:full])
        if self.windows is not None:
            self.windows.commit(table, before, num_tokens)
        table.num_tokens = num_tokens

    def prefix_ready(self, table: PageTable) -> bool:
        """Whether the pages that a sequence shares are filled: before, it has to wait."""
        if not table.num_shared:
            return True
        prefixes = self.pools[table.tier].prefixes
        return all(prefixes.is_ready(page) for page in table.pages[: table.num_shared])

    def attach_prefix(self, table: PageTable) -> bool:
        """Let a sequence hold what it sees of the prefix that it shares, which has been read; False where that is
        gone, from layers that keep only their window."""
        return self.windows is None or self.windows.attach(table)

    def free(self, table: PageTable) -> None:
        """Release the pages of a table."""
        if not table.parked:
            self.close_tail(table)
            self.num_open[table.tier] -= 1
        if self.windows is not None:
            self.windows.free(table)
        self.pools[table.tier].release(table.pages)
        table.pages = []

    def close_tail(self, table: PageTable) -> None:
        """Let the tail of a disk sequence go to the next one. Its last rows may still be on their way there."""
        if table.tier == "disk":
            assert self.disk is not None
            self.synchronize()
            self.disk.close_tail(table.tail_slot)
            table.tail_slot = -1

    def forget_prefixes(self) -> None:
        """Forget prompts of sequences that are gone: what runs next reads its prompts itself."""
        for pool in self.pools.values():
            pool.evict_all()

    def check(self, tables: Sequence[PageTable] | None = None) -> None:
        """Invariants of pools, of the disk, and with ``tables`` (all that are open or parked) that every page has as
        many holders as it counts."""
        for pool in self.pools.values():
            pool.check()
        if self.disk is not None:
            self.disk.check()
        if tables is None:
            return
        for tier, pool in self.pools.items():
            holders = Counter(page for table in tables if table.tier == tier for page in table.pages)
            expected = [holders[page] for page in range(pool.num_pages)]
            assert pool.references == expected, (tier, pool.references, holders)
            running = sum(table.tier == tier and not table.parked for table in tables)
            assert self.num_open[tier] == running, (tier, self.num_open)
        tails = [table.tail_slot for table in tables if table.tier == "disk" and not table.parked]
        assert sorted(tails) == sorted(self.disk.flushed if self.disk is not None else []), tails
        for table in tables:
            table.check(self.layout.page_tokens)
        if self.windows is not None:
            self.windows.check(tables)
