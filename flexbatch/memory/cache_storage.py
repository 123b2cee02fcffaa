"""The bytes of a KV cache on the tiers, and how they move: rows of every layer, staging, gather, append."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from flexbatch.kernels import ops
from flexbatch.memory.cache_orders import CacheOrders
from flexbatch.memory.disk_cache import DiskCache
from flexbatch.memory.handles import READY, Handle, together
from flexbatch.memory.pages import CacheLayout, Gather, SequencePages
from flexbatch.memory.tiers import Tiers
from flexbatch.memory.transfer import TransferQueues
from flexbatch.policy.admission import CacheSizes

FEW_BYTES = 1 << 16
"""Of new token rows, up to which the stream that computes takes them home itself: with the link they need 1 to 3 us,
to hand them to another stream takes an H200's host 40."""


class CacheStorage:
    """Storage and staging of one model's cache.

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
        self.few_bytes = FEW_BYTES if self.device.type == "cuda" else 0
        """Of rows that no transfer queue is asked to drain, at most."""
        self.windowed = layout.windowed(sizes)
        """Of every layer, whether it keeps only its window."""
        self.storage = {
            pool.tier: split_layers(
                pool.allocate("cache", layout.cache_bytes(sizes, pool.tier)),
                self.windowed,
                sizes.pages(pool.tier) * layout.page_bytes,
                sizes.window_pages(pool.tier) * layout.page_bytes,
            )
            for pool in (tiers.gpu, tiers.cpu)
        }
        """uint8 [layers, bytes] of those that keep everything, and of those that keep only their window."""
        staging_bytes = layout.staging_bytes(sizes)
        self.staging = (
            [tiers.gpu.allocate(f"cache staging {i}", staging_bytes) for i in range(2)] if staging_bytes else []
        )
        self.pages = {tier: [self.pages_of(tier, layer) for layer in range(layout.num_layers)] for tier in self.storage}
        """uint8 [pages, page_bytes] of every layer. Views are made once: every tick asks for some."""
        self.token_rows: dict[tuple[str, int], Tensor] = {}
        """Made as they are asked for: of a tier without pages nobody asks, and there are none."""
        self.staging_pages = [buffer.view(-1, layout.page_bytes) for buffer in self.staging]
        self.staging_token_rows = [layout.row_view(buffer) for buffer in self.staging]
        self.staging_free: list[Handle] = [READY, READY]
        self.disk: DiskCache | None = None
        self.disk_staging: list[Tensor] = []
        self.disk_copied: list[Handle] = [READY, READY]
        """Done when the device has read the host's staging buffers."""
        if sizes.disk_pages:
            self.disk = DiskCache(layout, sizes, tiers, orders)
            if self.device.type == "cuda":
                self.disk_staging = [tiers.cpu.allocate(f"cache disk staging {i}", staging_bytes) for i in range(2)]
        self.inputs_sent: Handle = READY
        self.drained: list[Handle] = [READY] * layout.num_layers
        self.draining: list[Handle] = [READY] * layout.num_layers

    def rows(self, tier: str, layer: int) -> Tensor:
        """Token rows of one layer on the gpu or cpu tier."""
        rows = self.token_rows.get((tier, layer))
        if rows is None:
            rows = self.token_rows[tier, layer] = self.layout.row_view(self.pages[tier][layer].view(-1))
        return rows

    def pages_of(self, tier: str, layer: int) -> Tensor:
        """In the storage of a tier, what `pages` has of a layer."""
        before = self.windowed[:layer].count(self.windowed[layer])
        return self.storage[tier][self.windowed[layer]][before].view(-1, self.layout.page_bytes)

    def staging_rows(self, buffer: int) -> Tensor:
        """Token rows of a staging buffer."""
        return self.staging_token_rows[buffer]

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
        pages = self.staging_pages[buffer]
        handles: list[Handle] = []
        num_cpu = work.cpu_pages.shape[0]
        if num_cpu:
            source = self.pages["cpu"][layer]
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

    def drain_cpu(self, layer: int, rows: Tensor, slots: Tensor) -> None:
        """Scatter packed token rows, which the current stream writes, to their slots on the cpu tier. slots: [n] int64
        on the compute device."""
        target = self.rows("cpu", layer)
        scatter = partial(ops.scatter_rows, rows, target, slots)
        if rows.nbytes <= self.few_bytes:
            # What the last pass drains, rows of sequences that have ended among it, would come to lie over these: pages
            # go from one to the next, and where nothing is gathered nobody else has waited for it.
            self.drained[layer].wait()
            scatter()
            self.queues.d2h.num_bytes += rows.nbytes
            handle = self.queues.mark()
        else:
            handle = self.queues.d2h.submit(scatter, self.queues.mark(), f"cache {layer}", rows.nbytes)
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
        for tensors in (self.storage, self.pages, self.token_rows):
            tensors.clear()
        for buffers in (self.staging, self.staging_pages, self.staging_token_rows, self.disk_staging):
            buffers.clear()
        for pool in (self.tiers.gpu, self.tiers.cpu):
            for what in [name for name in pool.used_bytes if name.startswith("cache")]:
                pool.free(what)


def split_layers(data: Tensor, windowed: Sequence[bool], whole: int, short: int) -> tuple[Tensor, Tensor]:
    """The bytes of a tier as [layers, bytes] of layers that keep everything, of ``whole`` bytes each, and of those that
    keep only their window, of ``short`` bytes each."""
    count = len(windowed) - sum(windowed)
    return data[: count * whole].view(count, whole), data[count * whole :].view(sum(windowed), short)
