"""Pages of layers that keep only their window: taken as passes need them, and given back as the window moves on."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

from flexbatch.memory.pages import PagePool, PageTable
from flexbatch.memory.prefix import Key
from flexbatch.policy.layer_window import LayerWindow, WindowSizes
from flexbatch.policy.policy import TIERS


class WindowPool:
    """Page ids of one tier for these layers, with reference counts.

    A page stands beside a page of the other layers that holds the same tokens. Beside one of the prefix index it is
    not forgotten at once when nobody holds it any more: whoever shares that prefix may need it, until it is taken
    (oldest first).
    """

    def __init__(self, tier: str, num_pages: int, quota: int) -> None:
        """quota: pages that all sequences may hold between two passes; what is beyond is for those of one pass."""
        self.tier, self.num_pages, self.quota = tier, num_pages, quota
        self.taken = 0
        """Of the quota."""
        self.free_pages = list(range(num_pages - 1, -1, -1))
        self.references = [0] * num_pages
        self.beside: dict[int, int] = {}
        """Of pages of the prefix index, the page here with the same tokens."""
        self.owner: dict[int, int] = {}
        """The same from here to there."""
        self.evictable: dict[int, None] = {}
        """Pages beside one of the index without a holder, in the order of their release."""
        self.peak = 0
        """Pages that were held at the same time, at most."""

    @property
    def num_held(self) -> int:
        return self.num_pages - len(self.free_pages) - len(self.evictable)

    def allocate(self, count: int) -> list[int]:
        """Returns ``count`` pages with one reference each."""
        assert count <= len(self.free_pages) + len(self.evictable), (
            f"{self.tier}: {count} pages of window layers wanted, {self.num_held} of {self.num_pages} are held, where "
            f"sequences may hold {self.taken} of {self.quota} between passes"
        )
        while len(self.free_pages) < count:
            self.forget(self.owner[next(iter(self.evictable))])
        pages = [self.free_pages.pop() for _ in range(count)]
        for page in pages:
            self.references[page] = 1
        self.peak = max(self.peak, self.num_held)
        return pages

    def share(self, pages: Sequence[int]) -> None:
        """Add one reference to each page."""
        for page in pages:
            self.evictable.pop(page, None)
            self.references[page] += 1
        self.peak = max(self.peak, self.num_held)

    def release(self, pages: Sequence[int]) -> None:
        """Drop one reference to each page."""
        for page in pages:
            self.references[page] -= 1
            if not self.references[page]:
                if page in self.owner:
                    self.evictable[page] = None
                else:
                    self.free_pages.append(page)

    def note(self, indexed: int, page: int) -> None:
        """``page`` has the tokens of a page of the prefix index, if no other is known to."""
        if indexed not in self.beside and page not in self.owner:
            self.beside[indexed], self.owner[page] = page, indexed

    def forget(self, indexed: int) -> None:
        """A page has left the prefix index, or what is beside it is needed."""
        page = self.beside.pop(indexed, None)
        if page is not None:
            del self.owner[page]
            if page in self.evictable:
                del self.evictable[page]
                self.free_pages.append(page)

    def check(self, holders: Mapping[int, int], quota: int) -> None:
        """Invariants: every page is free, evictable or held, by as many as it counts; both directions agree."""
        free = set(self.free_pages)
        assert len(free) == len(self.free_pages)
        for page, references in enumerate(self.references):
            assert references == holders.get(page, 0), (self.tier, page, references, holders)
            assert (references > 0) + (page in free) + (page in self.evictable) == 1, (self.tier, page, references)
        assert self.evictable.keys() <= self.owner.keys() and not free & self.owner.keys()
        assert {page: indexed for indexed, page in self.beside.items()} == self.owner
        assert self.taken == quota <= self.quota, (self.tier, self.taken, quota, self.quota)


class WindowPages:
    """The pages of all sequences in these layers. A `PageTable` has them from its first page that is still seen on.

    Between two passes a sequence counts as holding as many as in the other layers, up to a ring's; a pass takes more
    for its chunks of prompts, for which the pools have room. So nobody finds too few in the middle of a pass.
    """

    def __init__(
        self, page_tokens: int, window: LayerWindow, sizes: WindowSizes, pools: Mapping[str, PagePool]
    ) -> None:
        """pools: of the pages of the other layers, by tier."""
        self.page_tokens, self.window, self.sizes, self.pools = page_tokens, window, sizes, pools
        self.by_tier = {
            tier: WindowPool(tier, pages, quota)
            for tier, pages, quota in zip(TIERS, sizes.pages, sizes.quota, strict=True)
        }
        for tier, pool in pools.items():
            pool.forgotten = self.by_tier[tier].forget

    # What sequences count as holding

    def room(self, tier: str) -> int:
        """Pages that those on a tier may hold beside what they count as holding."""
        return self.by_tier[tier].quota - self.by_tier[tier].taken

    def more(self, before: int, after: int) -> int:
        """What it counts for that a sequence has ``after`` pages in the other layers, and not ``before``."""
        return self.sizes.of(after) - self.sizes.of(before)

    def known(self, tier: str, pages: Sequence[int]) -> list[tuple[int, Key]]:
        """Pages of the prefix index with the beginning of a prompt, with their keys: a table that is opened may drive
        some of them out."""
        keys = self.pools[tier].prefixes.keys
        return [(page, keys[page]) for page in pages]

    def open(self, table: PageTable, known: Sequence[tuple[int, Key]]) -> None:
        """Count a new table. known: as found before it took its pages."""
        table.twins = {i: known[i] for i in range(table.num_shared, len(known))}
        table.waits = table.num_shared > 0
        self.count(table.tier, 0, len(table.pages))

    def grow(self, table: PageTable, pages: int) -> bool:
        """Let a sequence have so many pages in the other layers; False where its tier has too few here."""
        if self.more(len(table.pages), pages) > self.room(table.tier):
            return False
        self.count(table.tier, len(table.pages), pages)
        return True

    def count(self, tier: str, before: int, after: int) -> None:
        self.by_tier[tier].taken += self.more(before, after)

    # Passes

    def hold(self, table: PageTable, num_tokens: int) -> None:
        """Take pages for the first ``num_tokens`` tokens, as far as these have pages in the other layers."""
        end = min(-(-num_tokens // self.page_tokens), len(table.pages))
        missing = end - table.first_window - len(table.windows)
        if missing > 0:
            table.moved(windows=table.windows + self.by_tier[table.tier].allocate(missing))

    def begin(self, table: PageTable, num_tokens: int) -> None:
        """Take pages for what is kept of the first ``num_tokens`` tokens of a table that has none."""
        first = self.window.first_kept(num_tokens, self.page_tokens) // self.page_tokens
        table.moved(windows=[], first_window=first)
        self.hold(table, num_tokens)

    def commit(self, table: PageTable, before: int, num_tokens: int) -> None:
        """Let go of what no token from ``num_tokens`` on sees. Those of its pages that were not full before (``before``
        were) stand beside pages of the prefix index from now on."""
        pool, prefixes = self.by_tier[table.tier], self.pools[table.tier].prefixes
        for index in range(before, num_tokens // self.page_tokens):
            indexed = table.pages[index]
            if not prefixes.is_ready(indexed) and index in table.twins:
                # Another sequence has the same tokens in the index, and lacks what is beside them.
                twin, key = table.twins.pop(index)
                indexed = twin if prefixes.keys.get(twin) is key else indexed
            if prefixes.is_ready(indexed):
                pool.note(indexed, table.windows[index - table.first_window])
        first = self.window.first_kept(num_tokens, self.page_tokens) // self.page_tokens
        passed = first - table.first_window
        if passed > 0:
            pool.release(table.windows[:passed])
            table.moved(windows=table.windows[passed:], first_window=first)

    def free(self, table: PageTable) -> None:
        """Release all pages of a table that is about to give up those of the other layers."""
        self.by_tier[table.tier].release(table.windows)
        self.count(table.tier, len(table.pages), 0)
        table.moved(windows=[])

    # Shared prefixes

    def needed(self, num_pages: int) -> range:
        """Of a shared prefix, the pages that the tokens behind it see."""
        return range(
            self.window.first_kept(num_pages * self.page_tokens, self.page_tokens) // self.page_tokens, num_pages
        )

    def usable(self, tier: str, found: Sequence[int]) -> int:
        """Pages of a prefix that may be shared: what tokens behind them see is there, or about to be read."""
        beside, prefixes = self.by_tier[tier].beside, self.pools[tier].prefixes
        there = [page in beside or not prefixes.is_ready(page) for page in found]
        return next((n for n in range(len(found), 0, -1) if all(there[i] for i in self.needed(n))), 0)

    def attach(self, table: PageTable) -> bool:
        """Hold the pages of a shared prefix, once it is read; False where they are gone."""
        pool, needed = self.by_tier[table.tier], self.needed(table.num_shared)
        pages = [pool.beside.get(table.pages[index]) for index in needed]
        if None in pages:
            return False
        windows = [page for page in pages if page is not None]
        pool.share(windows)
        table.waits = False
        table.moved(windows=windows, first_window=needed.start)
        return True

    def check(self, tables: Sequence[PageTable]) -> None:
        """Invariants of the pools, and of ``tables``: all that are open or parked."""
        for tier, pool in self.by_tier.items():
            mine = [table for table in tables if table.tier == tier]
            holders = Counter(page for table in mine for page in table.windows)
            pool.check(holders, sum(self.sizes.of(len(table.pages)) for table in mine))
            assert pool.beside.keys() <= self.pools[tier].prefixes.ready, tier
        for table in tables:
            assert len(set(table.windows)) == len(table.windows), table.windows
            first = self.window.first_kept(table.num_tokens, self.page_tokens) // self.page_tokens
            end = table.first_window + len(table.windows)
            assert table.waits or not table.pages or table.first_window == first, (table.first_window, first)
            assert table.waits or not table.pages or end * self.page_tokens >= table.num_tokens, (end, table.num_tokens)
