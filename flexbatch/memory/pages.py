"""Who owns which page: the layout of a page, a pool of page ids with reference counts, and the page table of a
sequence."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from flexbatch.kernels import reference
from flexbatch.memory.files import align
from flexbatch.memory.prefix import Key, PrefixIndex
from flexbatch.policy.admission import CacheSizes
from flexbatch.policy.layer_window import LayerWindow


@dataclass(frozen=True)
class CacheLayout:
    """Sizes of the KV cache. One page id stands for ``page_tokens`` token rows in every layer."""

    num_layers: int
    num_kv_heads: int
    head_dim: int
    bits: int
    group: int
    page_tokens: int
    dtype: torch.dtype
    sides: int = 2
    """Keys and values; 1 for latent attention, whose keys are the values as well."""
    window: LayerWindow | None = None
    """Of the layers that have one."""
    window_layers: tuple[bool, ...] = ()
    """Which layers these are; empty where none is."""

    def windowed(self, sizes: CacheSizes) -> tuple[bool, ...]:
        """Of every layer, whether it keeps only its window in a cache of these sizes."""
        return self.window_layers if sizes.windows and self.window_layers else (False,) * self.num_layers

    def cache_bytes(self, sizes: CacheSizes, tier: str) -> int:
        """Bytes of the pages of all layers on a tier."""
        short = sum(self.windowed(sizes))
        pages = (self.num_layers - short) * sizes.pages(tier) + short * sizes.window_pages(tier)
        return pages * (self.disk_page_bytes if tier == "disk" else self.page_bytes)

    def staging_bytes(self, sizes: CacheSizes) -> int:
        """Bytes of one staging buffer."""
        short = sizes.windows if all(self.windowed(sizes)) else None
        return (min(sizes.staging_pages, short.staging) if short else sizes.staging_pages) * self.page_bytes

    @property
    def token_bytes(self) -> int:
        """Bytes of keys and values of one token in one layer."""
        return reference.token_bytes(
            self.num_kv_heads, self.head_dim, self.bits, self.group, self.dtype.itemsize, self.sides
        )

    @property
    def page_bytes(self) -> int:
        """Bytes of one page in one layer."""
        return self.page_tokens * self.token_bytes

    @property
    def disk_page_bytes(self) -> int:
        """Bytes of one page on disk, where pages start at aligned offsets."""
        return align(self.page_bytes)

    def num_pages(self, num_tokens: int) -> int:
        """Pages of ``num_tokens`` tokens, the last one partly filled."""
        return -(-num_tokens // self.page_tokens)

    def row_view(self, data: Tensor) -> Tensor:
        """uint8 [n * token_bytes] as token rows: [n, sides, num_kv_heads, head_dim] in the compute dtype, or [n,
        token_bytes] when quantized."""
        if self.bits == 16:
            return data.view(self.dtype).view(-1, self.sides, self.num_kv_heads, self.head_dim)
        return data.view(-1, self.token_bytes)


class PagePool:
    """Page ids of one tier, with reference counts: shared prefixes hold a page together.

    A page of a prompt that nobody holds any more is not forgotten at once: it stays in the prefix index, evictable,
    until it is needed (oldest first).
    """

    def __init__(self, tier: str, num_pages: int, page_tokens: int) -> None:
        self.tier, self.num_pages = tier, num_pages
        self.free_pages = list(range(num_pages - 1, -1, -1))
        self.references = [0] * num_pages
        self.prefixes = PrefixIndex(page_tokens)
        self.evictable: dict[int, None] = {}
        """Indexed pages without a holder, in the order of their release."""
        self.forgotten: Callable[[int], None] = lambda page: None
        """Is told of pages that leave the prefix index."""

    def forget(self, page: int) -> None:
        """Take a page out of the prefix index."""
        self.prefixes.forget(page)
        self.forgotten(page)

    @property
    def num_available(self) -> int:
        """Pages that `allocate` can hand out."""
        return len(self.free_pages) + len(self.evictable)

    def allocate(self, count: int) -> list[int]:
        """Returns ``count`` pages with one reference each, evicting the oldest evictable pages where too few are
        free."""
        assert count <= self.num_available, (
            f"{self.tier}: {count} pages wanted, {self.num_available} available of {self.num_pages}; admission must "
            "ask first"
        )
        while len(self.free_pages) < count:
            page = next(iter(self.evictable))
            del self.evictable[page]
            self.forget(page)
            self.free_pages.append(page)
        pages = [self.free_pages.pop() for _ in range(count)]
        for page in pages:
            self.references[page] = 1
        return pages

    def share(self, pages: list[int]) -> None:
        """Add one reference to each page."""
        for page in pages:
            assert self.references[page] > 0 or page in self.evictable, (
                f"{self.tier}: page {page} is shared but its content is gone"
            )
            self.evictable.pop(page, None)
            self.references[page] += 1

    def release(self, pages: list[int]) -> None:
        """Drop one reference to each page, the last page first: a page never outlives the pages before it in the
        index."""
        for page in reversed(pages):
            self.references[page] -= 1
            if self.references[page] > 0:
                continue
            if self.prefixes.is_ready(page):
                self.evictable[page] = None
            else:
                self.forget(page)
                self.free_pages.append(page)

    def unready(self, pages: list[int]) -> set[int]:
        """Those of a sequence's pages that others share and wait for it to fill."""
        return {page for page in pages if self.references[page] > 1 and not self.prefixes.is_ready(page)}

    def withdraw(self, pages: list[int]) -> None:
        """Let nobody else share those of a sequence's pages that it has not filled: it does not run."""
        for page in reversed(pages):
            if page in self.prefixes.keys and not self.prefixes.is_ready(page):
                self.forget(page)

    def evict_all(self) -> None:
        """Free the pages that nobody holds: a prompt that comes again is computed again."""
        for page in self.evictable:
            self.forget(page)
        self.free_pages += self.evictable
        self.evictable.clear()

    def check(self) -> None:
        """Invariants: every page is free, evictable or held, and only one of them; indexed pages are not free; who
        holds a page holds those before it."""
        assert len(set(self.free_pages)) == len(self.free_pages)
        free = set(self.free_pages)
        for page, references in enumerate(self.references):
            assert (references > 0) + (page in free) + (page in self.evictable) == 1 and references >= 0, (
                self.tier,
                page,
                references,
            )
        assert len(free) + len(self.evictable) + sum(references > 0 for references in self.references) == self.num_pages
        assert not free & set(self.prefixes.keys)
        assert self.evictable.keys() <= self.prefixes.ready, (self.tier, self.evictable.keys() - self.prefixes.ready)
        followers = [0] * self.num_pages
        for page, (before, _) in self.prefixes.keys.items():
            if before >= 0:
                followers[before] += self.references[page]
        assert all(count <= references for count, references in zip(followers, self.references, strict=True)), (
            self.tier,
            followers,
            self.references,
        )
        self.prefixes.check()


@dataclass(frozen=True)
class SequencePages:
    """The pages of one sequence as plain data: the part of its `PageTable` that a pass needs."""

    tier: str
    pages: tuple[int, ...]
    tail_slot: int = -1
    """Index of a disk sequence's open page in host memory (-1 on other tiers)."""
    cpu_attention: bool = False
    """Whether decode tokens of this cpu sequence are attended by the CPU, where the cache lies."""
    first: int = 0
    """Pages before these, which are not kept."""
    windows: SequencePages | None = None
    """The pages of layers that keep only their window; None where these have the same pages as the others."""

    def of(self, windowed: bool) -> SequencePages:
        """The pages of a layer. windowed: which keeps only its window."""
        return self.windows if windowed and self.windows is not None else self

    @cached_property
    def page_ids(self) -> np.ndarray:
        """``pages`` as int32."""
        return np.asarray(self.pages, dtype=np.int32)

    def slots(self, start: int, end: int, page_tokens: int) -> list[int]:
        """Token-row slots of tokens [start, end)."""
        return [self.pages[t // page_tokens - self.first] * page_tokens + t % page_tokens for t in range(start, end)]


@dataclass(frozen=True)
class Gather:
    """What is copied to staging for one micro-batch: existing pages, the cpu ones first, then those of disk
    sequences, each as (pages, number of tokens)."""

    cpu_pages: Tensor
    """[n] int32 page ids, on the compute device."""
    disk_pages: tuple[tuple[SequencePages, int], ...]
    num_disk_pages: int

    @property
    def num_pages(self) -> int:
        return self.cpu_pages.shape[0] + self.num_disk_pages


@dataclass
class PageTable:
    """The cache of one sequence: its tier, its pages there, and how many tokens are valid.

    ``tail_slot`` is the index of a disk sequence's open page in host memory (-1 on other tiers, and while parked: then
    the open page lies with the others).
    """

    tier: str
    pages: list[int] = field(default_factory=list)
    num_tokens: int = 0
    num_shared: int = 0
    """Leading pages that belong to a shared prefix and are never written."""
    tail_slot: int = -1
    cpu_attention: bool = False
    """Whether decode tokens of this cpu sequence are attended by the CPU, where the cache lies."""
    parked: bool = False
    """Whether the sequence does not run: no pass may read or write these pages."""
    windows: list[int] = field(default_factory=list)
    """Pages in the layers that keep only their window, for the tokens of ``pages[first_window:]`` that are seen."""
    first_window: int = 0
    waits: bool = False
    """Whether it shares a prefix whose pages in those layers it does not hold yet."""
    twins: dict[int, tuple[int, Key]] = field(default_factory=dict)
    """Pages of the prefix index with the tokens of its own, by their index, and their keys."""

    @cached_property
    def location(self) -> SequencePages:
        """The pages as plain data: they are the same until the sequence needs more."""
        assert not self.parked, "a parked sequence takes part in no pass"
        return self.held_pages

    @property
    def held_pages(self) -> SequencePages:
        """The same of one that may be parked."""
        windows = (
            SequencePages(self.tier, tuple(self.windows), self.tail_slot, self.cpu_attention, self.first_window)
            if self.windows or self.first_window
            else None
        )
        return SequencePages(self.tier, tuple(self.pages), self.tail_slot, self.cpu_attention, windows=windows)

    def extend(self, pages: list[int]) -> None:
        """Add pages for tokens to come."""
        self.pages += pages
        self.__dict__.pop("location", None)

    def moved(self, windows: list[int], first_window: int | None = None) -> None:
        """Other pages in the layers that keep only their window."""
        self.windows = windows
        self.first_window = self.first_window if first_window is None else first_window
        self.__dict__.pop("location", None)

    def check(self, page_tokens: int) -> None:
        """Invariants: no page twice, valid tokens have a page, shared pages are full, and only a disk sequence has a
        tail."""
        assert len(set(self.pages)) == len(self.pages), self.pages
        assert self.num_shared * page_tokens <= self.num_tokens <= len(self.pages) * page_tokens, (
            self.num_shared,
            self.num_tokens,
            len(self.pages),
        )
        has_tail = self.tier == "disk" and bool(self.pages) and not self.parked
        assert (self.tail_slot >= 0) == has_tail, (self.tier, self.tail_slot, self.parked)
        assert not self.cpu_attention or self.tier == "cpu", self.tier
