"""The paged KV cache over the tiers: page tables, staging, gather, append, commit, free."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from flexbatch.kernels import ops
from flexbatch.memory.cache_orders import CacheOrders
from flexbatch.memory.disk_cache import DiskCache
from flexbatch.memory.pages import CacheLayout, Gather, PagePool, PageTable, SequencePages
from flexbatch.memory.tiers import Tiers
from flexbatch.memory.transfer import READY, Handle, TransferQueues, together
from flexbatch.policy.admission import CacheSizes


class KVCache:
    """Page pools, storage and staging of one model's cache.

    Staging buffers alternate between ticks; each is handed over by handle: a gather into one waits for the attention
    that last read it. orders: of what is done between passes, for ranks that have other heads of the cache.
    """

    def __init__(
        self,
        layout: CacheLayout,
        sizes: CacheSizes,
        tiers: Tiers,
        queues: TransferQueues,
        orders: CacheOrders | None = None,
    ) -> None:
        self.layout, self.sizes, self.tiers, self.queues, self.orders = layout, sizes, tiers, queues, orders
        self.device = queues.device
        self.pools = {tier: PagePool(tier, sizes.pages(tier), layout.page_tokens) for tier in ("gpu", "cpu", "disk")}
        self.storage = {
            pool.tier: pool.allocate("cache", layout.num_layers * sizes.pages(pool.tier) * layout.page_bytes).view(
                layout.num_layers, -1
            )
            for pool in (tiers.gpu, tiers.cpu)
        }
        staging_bytes = sizes.staging_pages * layout.page_bytes
        self.staging = (
            [tiers.gpu.allocate(f"cache staging {i}", staging_bytes) for i in range(2)] if staging_bytes else []
        )
        self.staging_free: list[Handle] = [READY, READY]
        self.disk: DiskCache | None = None
        self.disk_staging: list[Tensor] = []
        self.disk_copied: list[Handle] = [READY, READY]
        """Done when the device has read the host's staging buffers."""
        if sizes.disk_pages:
            self.disk = DiskCache(layout, sizes, tiers, orders)
            if self.device.type == "cuda":
                self.disk_staging = [tiers.cpu.allocate(f"cache disk staging {i}", staging_bytes) for i in range(2)]
        self.num_open = dict.fromkeys(self.pools, 0)
        """Sequences with an open table, by tier."""
        self.peak_open = dict(self.num_open)
        """The same when there were most of them: the split as it was realized."""
        self.inputs_sent: Handle = READY
        self.drained: list[Handle] = [READY] * layout.num_layers
        self.draining: list[Handle] = [READY] * layout.num_layers

    @property
    def resident(self) -> bool:
        """Whether every sequence that runs has its cache on the compute device."""
        return self.sizes.cpu_pages == self.sizes.parking_pages and not self.sizes.disk_pages

    @property
    def realized_percent(self) -> dict[str, float]:
        """Per cent of the sequences on each tier, when the block held most of them."""
        total = sum(self.peak_open.values()) or 1
        return {tier: 100 * count / total for tier, count in self.peak_open.items()}

    # Tables

    def shareable(self, tier: str, prompt: Sequence[int], adapter: int = 0) -> list[int]:
        """Pages on ``tier`` that hold, or are about to hold, the beginning of a prompt, read with the same adapter. The
        last prompt token is never shared: its logits are needed."""
        return self.pools[tier].prefixes.match(prompt, (len(prompt) - 1) // self.layout.page_tokens, adapter)

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
        pool.share(shared)
        pages = shared + pool.allocate(self.layout.num_pages(num_tokens) - len(shared))
        pool.prefixes.enter(pages, prompt, adapter)
        num_cached = len(shared) * self.layout.page_tokens
        table = PageTable(tier, pages, num_cached, num_shared=len(shared), cpu_attention=cpu_attention)
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

    def can_open(self, tier: str, num_tokens: int, shared_pages: Sequence[int] = (), promised: int = 0) -> bool:
        """Whether ``tier`` has pages for ``num_tokens`` tokens, of which ``shared_pages`` hold the first, beside
        ``promised`` pages for others."""
        pool = self.pools[tier]
        reused = sum(page in pool.evictable for page in shared_pages)
        fits = pool.num_available - reused - promised >= self.layout.num_pages(num_tokens) - len(shared_pages)
        return fits and (tier != "disk" or (self.disk is not None and bool(self.disk.free_tails)))

    def extend(self, table: PageTable, num_tokens: int) -> bool:
        """Take pages for the first ``num_tokens`` tokens of a sequence; False, and none is taken, where its tier has
        too few."""
        pool, count = self.pools[table.tier], self.layout.num_pages(num_tokens) - len(table.pages)
        if count > pool.num_available:
            return False
        if count > 0:
            table.extend(pool.allocate(count))
        return True

    def commit(self, table: PageTable, num_tokens: int) -> None:
        """The first ``num_tokens`` tokens of the sequence are in the cache and stay; full pages may be shared from
        now on."""
        before, full = table.num_tokens // self.layout.page_tokens, num_tokens // self.layout.page_tokens
        if full > before:
            self.pools[table.tier].prefixes.mark_ready(table.pages[before:full])
        table.num_tokens = num_tokens

    def prefix_ready(self, table: PageTable) -> bool:
        """Whether the pages that a sequence shares are filled: before, it has to wait."""
        if not table.num_shared:
            return True
        prefixes = self.pools[table.tier].prefixes
        return all(prefixes.is_ready(page) for page in table.pages[: table.num_shared])

    def free(self, table: PageTable) -> None:
        """Release the pages of a table."""
        if not table.parked:
            self.close_tail(table)
            self.num_open[table.tier] -= 1
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

    # Rows

    def rows(self, tier: str, layer: int) -> Tensor:
        """Token rows of one layer on the gpu or cpu tier."""
        return self.layout.row_view(self.storage[tier][layer])

    def staging_rows(self, buffer: int) -> Tensor:
        """Token rows of a staging buffer."""
        return self.layout.row_view(self.staging[buffer])

    def begin_pass(self, inputs_sent: Handle) -> None:
        """Let this pass's gathers wait for what the last pass drained, and for the page ids that ``inputs_sent``
        promises.

        What was drained before that has to have arrived: a sequence that was left out of the last pass is read in this
        one.
        """
        together(*self.drained).synchronize()
        self.inputs_sent = inputs_sent
        self.drained, self.draining = self.draining, [READY] * self.layout.num_layers

    def gather(self, work: Gather, layer: int, buffer: int) -> Handle:
        """Copy existing pages of staged sequences into a staging buffer, in the order of ``work``."""
        if not work.num_pages:
            self.staging_free[buffer].wait()
            return READY
        after = together(self.staging_free[buffer], self.drained[layer], self.inputs_sent)
        pages = self.staging[buffer].view(-1, self.layout.page_bytes)
        handles: list[Handle] = []
        num_cpu = len(work.cpu_pages)
        if num_cpu:
            source = self.storage["cpu"][layer].view(-1, self.layout.page_bytes)
            num_bytes = num_cpu * self.layout.page_bytes
            gather = partial(ops.gather_pages, source, work.cpu_pages, pages[:num_cpu])
            handles.append(self.queues.pages.submit(gather, after, f"cache {layer}", num_bytes))
        if work.num_disk_pages:
            target = pages[num_cpu : work.num_pages]
            num_bytes = work.num_disk_pages * self.layout.page_bytes
            read = partial(self.read_disk, work, layer, buffer, target)
            handles.append(self.queues.disk_read.submit(read, after, f"cache {layer}", num_bytes))
        return together(*handles)

    def read_disk(self, work: Gather, layer: int, buffer: int, target: Tensor) -> Handle:
        """Runs on the disk's transfer queue, which does not wait for its copy: that queues behind slices of weights,
        and the next read need not."""
        assert self.disk is not None
        self.disk_copied[buffer].synchronize()
        host = (
            self.disk_staging[buffer].view(-1, self.layout.page_bytes)[: work.num_disk_pages]
            if self.disk_staging
            else target
        )
        self.disk.read(work.disk_pages, layer, host, self.queues.disk_chunks)
        if host is target:
            return READY
        self.queues.copy_to_device(host, target)
        self.disk_copied[buffer] = self.queues.mark()
        return self.disk_copied[buffer]

    def release_staging(self, buffer: int, done: Handle) -> None:
        """The next gather into ``buffer`` waits for ``done``, the last attention that reads it."""
        self.staging_free[buffer] = done

    def drain_cpu(self, layer: int, rows: Tensor, slots: Tensor, after: Handle) -> None:
        """Scatter packed token rows to their slots on the cpu tier. slots: [n] int64 on the compute device."""
        target = self.rows("cpu", layer)
        handle = self.queues.d2h.submit(
            lambda: ops.scatter_rows(rows, target, slots), after, f"cache {layer}", rows.nbytes
        )
        self.queues.d2h.guard(rows)
        self.queues.d2h.guard(slots)
        self.draining[layer] = together(self.draining[layer], handle)

    def drain_disk(
        self, layer: int, rows: Tensor, pages: Sequence[tuple[SequencePages, int, int, int]], after: Handle
    ) -> None:
        """Append packed token rows of disk sequences. pages: (pages, first token, number of rows, rows that may be
        rejected) in order."""
        disk, previous = self.disk, self.draining[layer]
        assert disk is not None

        def append() -> None:
            previous.synchronize()
            host = rows.cpu().reshape(len(rows), -1).view(torch.uint8)
            cursor = 0
            for location, start, count, keep in pages:
                disk.append(location, layer, start, host[cursor : cursor + count], keep)
                cursor += count

        self.draining[layer] = self.queues.disk_write.submit(
            append, together(after, self.drained[layer]), f"cache {layer}", rows.nbytes
        )

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

    def synchronize(self) -> None:
        """Block until everything drained has arrived. Re-raises the error of a transfer."""
        together(*self.draining, *self.drained).synchronize()

    def close(self) -> None:
        """Free all memory and files, also after a transfer that failed."""
        self.queues.synchronize()
        self.drained = self.draining = [READY] * self.layout.num_layers
        self.disk_copied = [READY, READY]
        if self.disk is not None:
            self.disk.close()
        self.storage.clear()
        self.staging.clear()
        self.disk_staging.clear()
        for pool in (self.tiers.gpu, self.tiers.cpu):
            for what in [name for name in pool.used_bytes if name.startswith("cache")]:
                pool.free(what)
