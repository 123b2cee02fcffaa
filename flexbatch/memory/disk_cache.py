"""The KV cache of disk sequences: full pages in a file, the open page in host memory."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from flexbatch.memory.cache_orders import CacheOrders
from flexbatch.memory.files import ALIGNMENT, READ_CHUNK_BYTES, map_all
from flexbatch.memory.pages import CacheLayout, SequencePages
from flexbatch.memory.tiers import Tiers
from flexbatch.policy.admission import CacheSizes


class DiskCache:
    """Pages [num_layers, num_pages] in one file, and for every disk sequence a tail of ``tail_tokens`` token rows per
    layer in host memory.

    Tokens from ``flushed`` (a multiple of page_tokens) on lie in the tail; a page is written when it is full and none
    of its tokens can be rejected any more.
    """

    def __init__(self, layout: CacheLayout, sizes: CacheSizes, tiers: Tiers, orders: CacheOrders | None = None) -> None:
        """Raises DoesNotFitError, OffloadError."""
        self.orders = orders
        self.layout, self.tail_tokens = layout, sizes.tail_tokens
        self.disk, self.host = tiers.disk, tiers.cpu
        pages = (sizes.window_pages("disk") if windowed else sizes.disk_pages for windowed in layout.windowed(sizes))
        self.first_pages = list(itertools.accumulate(pages, initial=0))
        """Pages in the file before those of each layer."""
        self.file = self.disk.open_file("cache", tiers.offload_dir, layout.cache_bytes(sizes, "disk"))
        num_sequences, tail_tokens = sizes.disk_sequences, sizes.tail_tokens
        tail = self.host.allocate("cache tails", layout.num_layers * num_sequences * tail_tokens * layout.token_bytes)
        self.tails = tail.view(layout.num_layers, num_sequences, tail_tokens, layout.token_bytes)
        self.flushed: dict[int, list[int]] = {}
        self.free_tails = list(range(num_sequences - 1, -1, -1))

    def open(self, num_tokens: int = 0) -> int:
        """The slot of a tail for a sequence whose first ``num_tokens`` (whole pages) are on disk already: a shared
        prefix."""
        if self.orders is not None:
            self.orders.note("open_tail", num_tokens)
        slot = self.free_tails.pop()
        self.mark_flushed(slot, num_tokens)
        return slot

    def mark_flushed(self, slot: int, num_tokens: int) -> None:
        """Note that the first ``num_tokens`` (whole pages) of the sequence are on disk."""
        self.flushed[slot] = [num_tokens] * self.layout.num_layers

    def close_tail(self, slot: int) -> None:
        """Free the tail of a sequence that is gone."""
        if self.orders is not None:
            self.orders.note("close_tail", slot)
        del self.flushed[slot]
        self.free_tails.append(slot)

    def offset(self, layer: int, page: int) -> int:
        return (self.first_pages[layer] + page) * self.layout.disk_page_bytes

    def catch_up(self, location: SequencePages, layer: int) -> int:
        """Tokens of a sequence that are on disk, or are not kept any more: those before its pages leave the tail."""
        tail, flushed = self.tails[layer, location.tail_slot], self.flushed[location.tail_slot]
        passed = location.first * self.layout.page_tokens - flushed[layer]
        if passed > 0:
            left = tail[passed:].clone()
            tail[: len(left)] = left
            flushed[layer] += passed
        return flushed[layer]

    def append(self, location: SequencePages, layer: int, start: int, rows: Tensor, keep: int) -> None:
        """Append token rows [n, token_bytes] (uint8, host) of tokens from ``start`` on.

        The last ``keep`` of them may be rejected (nodes of a tree): they stay in the tail, as does the open page.
        """
        layout, tail = self.layout, self.tails[layer, location.tail_slot]
        flushed = self.catch_up(location, layer)
        end, open_rows = start + len(rows), start - flushed
        full_until = max(flushed, (end - keep) // layout.page_tokens * layout.page_tokens)
        assert end - full_until <= self.tail_tokens, (
            f"{end - full_until} open tokens do not fit a tail of {self.tail_tokens}"
        )
        if full_until == flushed:
            # A decode pass completes a page once in page_tokens times; otherwise nothing moves but the new rows.
            tail[open_rows : open_rows + len(rows)].copy_(rows)
            return
        known = torch.cat([tail[:open_rows], rows])
        complete = known[: full_until - flushed].view(-1, layout.page_bytes)
        first, last = (tokens // layout.page_tokens - location.first for tokens in (flushed, full_until))
        self.write_pages(location.pages[first:last], layer, complete)
        rest = known[full_until - flushed :]
        tail[: len(rest)].copy_(rest)
        self.flushed[location.tail_slot][layer] = full_until

    def runs(self, pages: Sequence[int]) -> list[tuple[int, int, int]]:
        """(index in ``pages``, first page, number of pages) of neighbors in the file, at most READ_CHUNK_BYTES
        each: one request instead of many."""
        longest, runs = max(1, READ_CHUNK_BYTES // self.layout.disk_page_bytes), list[tuple[int, int, int]]()
        for index, page in enumerate(pages):
            first, start, count = runs[-1] if runs else (0, -1, 0)
            if page == start + count and 0 < count < longest:
                runs[-1] = (first, start, count + 1)
            else:
                runs.append((index, page, 1))
        return runs

    def read(
        self, sequences: Sequence[tuple[SequencePages, int]], layer: int, pages_out: Tensor, threads: ThreadPoolExecutor
    ) -> None:
        """Fill ``pages_out`` [total pages, page_bytes] (uint8, host) with the pages of every (location, num_tokens),
        one sequence after another."""
        layout = self.layout
        jobs, cursor = [], 0
        for location, num_tokens in sequences:
            flushed = self.catch_up(location, layer)
            full_pages = flushed // layout.page_tokens - location.first
            jobs += [(cursor + index, page, count) for index, page, count in self.runs(location.pages[:full_pages])]
            count = layout.num_pages(num_tokens) - location.first
            open_rows = num_tokens - flushed
            if open_rows > 0:
                flat = pages_out[cursor + full_pages : cursor + count].view(-1, layout.token_bytes)
                flat[:open_rows].copy_(self.tails[layer, location.tail_slot, :open_rows])
            cursor += count

        @torch.inference_mode()  # worker threads have a mode of their own
        def read_run(job: tuple[int, int, int]) -> None:
            index, page, count = job
            self.read_run(page, layer, pages_out[index : index + count])

        map_all(threads, read_run, jobs)

    def read_run(self, page: int, layer: int, target: Tensor) -> None:
        """Fill ``target`` [n, page_bytes] with n neighbors in the file from ``page`` on."""
        layout, count = self.layout, len(target)
        if layout.page_bytes == layout.disk_page_bytes and target.data_ptr() % ALIGNMENT == 0:
            self.file.read(target.view(-1), self.offset(layer, page))
            return
        buffer = aligned_empty(count * layout.disk_page_bytes)
        self.file.read(buffer, self.offset(layer, page))
        target.copy_(buffer.view(count, -1)[:, : layout.page_bytes])

    def read_pages(self, pages: Sequence[int], layer: int, target: Tensor) -> None:
        """Fill ``target`` [pages, page_bytes] with pages of the file, open ones among them."""
        for index, page, count in self.runs(pages):
            self.read_run(page, layer, target[index : index + count])

    def write_pages(self, pages: Sequence[int], layer: int, source: Tensor) -> None:
        """Write ``source`` [pages, page_bytes] (uint8, host) to pages of the file."""
        layout = self.layout
        for index, page, count in self.runs(pages):
            buffer = aligned_empty(count * layout.disk_page_bytes)
            buffer.view(count, -1)[:, : layout.page_bytes].copy_(source[index : index + count])
            self.file.write(buffer, self.offset(layer, page))

    def move(self, location: SequencePages, layer: int, sources: Sequence[int], destination: int) -> None:
        """Copy, within the tail, the rows of tokens ``sources`` to tokens ``destination``, ``destination`` + 1, ...
        (the accepted path of a tree)."""
        flushed = self.catch_up(location, layer)
        tail = self.tails[layer, location.tail_slot]
        rows = tail[torch.tensor([source - flushed for source in sources])]
        tail[destination - flushed : destination - flushed + len(rows)].copy_(rows)

    def check(self) -> None:
        """Invariants: tails are owned once; flushed counts are whole pages."""
        assert sorted([*self.free_tails, *self.flushed]) == list(range(self.tails.shape[1])), (
            self.free_tails,
            self.flushed.keys(),
        )
        for flushed in self.flushed.values():
            assert all(count % self.layout.page_tokens == 0 for count in flushed), flushed

    def close(self) -> None:
        self.tails = torch.empty(0)
        self.host.free("cache tails")
        self.disk.free("cache")


def aligned_empty(num_bytes: int) -> Tensor:
    """uint8 [num_bytes] on the host at a multiple of ALIGNMENT, as direct transfers need it; torch aligns to 64
    bytes."""
    buffer = torch.empty(num_bytes + ALIGNMENT, dtype=torch.uint8)
    start = -buffer.data_ptr() % ALIGNMENT
    return buffer[start : start + num_bytes]
