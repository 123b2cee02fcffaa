"""Hidden states between layers, over the tiers."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from flexbatch.memory.files import DiskFile, align
from flexbatch.memory.handles import READY, Handle, together
from flexbatch.memory.tiers import Tiers
from flexbatch.memory.transfer import TransferQueues
from flexbatch.policy.balancer import TierBalancer
from flexbatch.policy.policy import TIERS, Split


@dataclass
class HiddenRows:
    """One micro-batch's hidden states between two layers: consecutive rows on the gpu, the cpu and the disk tier."""

    num_tokens: int
    counts: tuple[int, int, int]
    gpu: Tensor
    written: Handle = READY
    """Done when the cpu and disk rows have arrived on their tiers."""
    fetched: Tensor | None = None
    fetch: Handle = READY


class ActivationStore:
    """The hidden states [num_tokens, width] of every micro-batch between two layers.

    Rows go to the tiers in pages of ``page_tokens`` by error diffusion, so that over a pass each tier holds its
    share to within one page. What is all on the gpu tier is passed on without a copy.
    """

    def __init__(
        self,
        split: Split,
        num_micro_batches: int,
        max_tokens: int,
        width: int,
        dtype: torch.dtype,
        page_tokens: int,
        tiers: Tiers,
        queues: TransferQueues,
    ) -> None:
        self.split, self.page_tokens, self.dtype, self.width = split, page_tokens, dtype, width
        self.tiers, self.queues = tiers, queues
        self.row_bytes = width * dtype.itemsize
        self.stored: dict[int, HiddenRows] = {}
        self.counts: dict[int, tuple[int, int, int]] = {}
        self.realized = dict.fromkeys(TIERS, 0)
        """Hidden rows on each tier in the pass that had most of them: the split as it was realized."""
        rows = max_tokens + page_tokens
        self.host = (
            [tiers.cpu.allocate(f"activations {k}", rows * self.row_bytes) for k in range(num_micro_batches)]
            if split.cpu or split.disk
            else []
        )
        self.files: list[DiskFile] = []
        if split.disk:
            for k in range(num_micro_batches):
                num_bytes = align(rows * self.row_bytes)
                self.files.append(tiers.disk.open_file(f"activations {k}", tiers.offload_dir, num_bytes))

    @property
    def resident(self) -> bool:
        """Whether hidden states never leave the compute device."""
        return self.split.gpu == 1

    def plan(self, tokens_per_micro_batch: list[int]) -> None:
        """Cut the rows of every micro-batch of the coming pass over the tiers."""
        balancer = TierBalancer(self.split)
        for k, num_tokens in enumerate(tokens_per_micro_batch):
            if self.resident:
                # At once: page by page, a pass of 200,000 prompt tokens takes 30 ms to cut.
                balancer.place("gpu", num_tokens)
                self.counts[k] = (num_tokens, 0, 0)
                continue
            counts = dict.fromkeys(TIERS, 0)
            for start in range(0, num_tokens, self.page_tokens):
                rows = min(self.page_tokens, num_tokens - start)
                tier = balancer.choose(rows)
                balancer.place(tier, rows)
                counts[tier] += rows
            self.counts[k] = (counts["gpu"], counts["cpu"], counts["disk"])
        if sum(balancer.placed.values()) >= sum(self.realized.values()):
            self.realized = {tier: int(rows) for tier, rows in balancer.placed.items()}

    @property
    def realized_percent(self) -> dict[str, float]:
        """Per cent of the hidden rows on each tier, in the pass that had most of them."""
        total = sum(self.realized.values()) or 1
        return {tier: 100 * rows / total for tier, rows in self.realized.items()}

    def put(self, k: int, hidden: Tensor) -> None:
        """Store the hidden states of micro-batch ``k`` after a layer; the cpu and disk rows start for their tiers."""
        on_gpu, on_cpu, on_disk = self.counts[k]
        stored = self.stored[k] = HiddenRows(len(hidden), self.counts[k], hidden[:on_gpu])
        if on_cpu + on_disk == 0:
            stored.fetched = hidden
            return
        host = self.host_rows(k, on_cpu + on_disk)
        leaving = hidden[on_gpu:]
        stored.written = self.queues.d2h.submit(
            lambda: host.copy_(leaving, non_blocking=True), self.queues.mark(), f"activations {k}", leaving.nbytes
        )
        self.queues.d2h.guard(leaving)
        if on_disk:
            data = self.host[k][on_cpu * self.row_bytes : (on_cpu + on_disk) * self.row_bytes]
            stored.written = self.queues.disk_write.submit(
                lambda: self.files[k].write(data, 0), stored.written, f"activations {k}", len(data)
            )

    def set(self, k: int, hidden: Tensor) -> None:
        """Pass hidden states on within the compute device: the rows that the head reads, a few per sequence."""
        self.stored[k] = HiddenRows(len(hidden), (len(hidden), 0, 0), hidden, fetched=hidden)

    def host_rows(self, k: int, count: int) -> Tensor:
        """The first ``count`` rows [count, width] of micro-batch ``k`` in host memory."""
        return self.host[k][: count * self.row_bytes].view(self.dtype).view(count, self.width)

    def fetch(self, k: int) -> None:
        """Start fetching the hidden states of micro-batch ``k``; does nothing when they are there or not yet put."""
        stored = self.stored.get(k)
        if stored is None or stored.fetched is not None:
            return
        on_gpu, on_cpu, on_disk = stored.counts
        # Allocated on the compute stream, written on the link's: the copy waits for a mark of everything before it.
        fetched = stored.fetched = torch.empty(
            stored.num_tokens, self.width, dtype=self.dtype, device=self.queues.device
        )
        fetched[:on_gpu].copy_(stored.gpu)
        after = together(stored.written, self.queues.mark())
        if on_disk:
            data = self.host[k][on_cpu * self.row_bytes : (on_cpu + on_disk) * self.row_bytes]
            after = together(
                after,
                self.queues.disk_read.submit(lambda: self.files[k].read(data, 0), after, f"activations {k}", len(data)),
            )
        host = self.host_rows(k, on_cpu + on_disk)
        stored.fetch = self.queues.h2d.submit(
            lambda: fetched[on_gpu:].copy_(host, non_blocking=True), after, f"activations {k}", host.nbytes
        )
        self.queues.h2d.guard(fetched)

    def get(self, k: int) -> Tensor:
        """The hidden states of micro-batch ``k`` on the compute device; they leave the store."""
        self.fetch(k)
        stored = self.stored.pop(k)
        stored.fetch.wait()
        assert stored.fetched is not None
        return stored.fetched

    def synchronize(self) -> None:
        """Block until all rows have arrived where they are going. Re-raises the error of a transfer."""
        for stored in self.stored.values():
            together(stored.written, stored.fetch).synchronize()

    def check(self) -> None:
        """Invariant: every row has a tier."""
        for k, stored in self.stored.items():
            assert sum(stored.counts) == stored.num_tokens, (k, stored.counts, stored.num_tokens)

    def close(self) -> None:
        self.queues.synchronize()
        self.files.clear()
        self.stored.clear()
        self.host.clear()
        for pool in (self.tiers.cpu, self.tiers.disk):
            for what in [name for name in pool.used_bytes if name.startswith("activations")]:
                pool.free(what)
