"""Rows and pages of the cache that move between passes: accepted paths of trees, and the pages of
sequences that step aside and come back. Codes are copied as they are, so that nothing is quantized twice."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from flexbatch.memory.cache_orders import Order
from flexbatch.memory.disk_cache import DiskCache
from flexbatch.memory.kvcache import KVCache
from flexbatch.memory.pages import PageTable, SequencePages

Move = tuple[SequencePages, int, tuple[int, ...]]
"""Of a sequence: the rows of these tokens go to that token and the ones after it."""


def keep_paths(cache: KVCache, accepted: Sequence[tuple[PageTable, int, Sequence[int]]]) -> None:
    """Commit the accepted path of each tree: rows of tokens ``sources`` move to ``start``, ``start`` + 1, ... on the
    sequence's tier.

    accepted: (table, start, sources), sources ascending and >= start. The rest of the tree is forgotten when
    num_tokens is set.
    """
    moves = [
        (table.location, start, tuple(sources))
        for table, start, sources in accepted
        if list(sources) != list(range(start, start + len(sources)))
    ]
    if moves:
        cache.synchronize()
        move_rows(cache, moves)


def move_rows(cache: KVCache, moves: Sequence[Move]) -> None:
    """Within the tiers of their sequences."""
    if cache.orders is not None:
        cache.orders.note("move_rows", moves)
    layout = cache.layout
    for tier, windowed in itertools.product(("gpu", "cpu"), sorted(set(cache.windowed))):
        slots, targets = list[int](), list[int]()
        for location, start, sources in moves:
            if location.tier == tier:
                pages = location.of(windowed)
                slots += [slot for t in sources for slot in pages.slots(t, t + 1, layout.page_tokens)]
                targets += pages.slots(start, start + len(sources), layout.page_tokens)
        if slots:
            stored = cache.storage[tier][windowed]
            data = stored.view(len(stored), -1, layout.token_bytes)
            data[:, torch.tensor(targets, device=data.device)] = data[:, torch.tensor(slots, device=data.device)]
    for location, start, sources in moves:
        if location.tier == "disk":
            assert cache.disk is not None
            for layer in range(layout.num_layers):
                cache.disk.move(location.of(cache.windowed[layer]), layer, sources, start)


def park(cache: KVCache, table: PageTable, tier: str) -> PageTable:
    """The pages of a sequence that does not run, or is about to stop, on ``tier``; the caller has seen that there are
    enough. On its own tier nothing is copied but a disk sequence's open page. The table given is empty afterward."""
    cache.synchronize()
    if tier == table.tier:
        if table.tail_slot >= 0:
            write_open_page(cache, table)
        if not table.parked:
            cache.close_tail(table)
            cache.num_open[tier] -= 1
        return handed_over(table, PageTable(tier, [], table.num_tokens, table.num_shared, parked=True))
    pages = cache.pools[tier].allocate(cache.layout.num_pages(table.num_tokens))
    parked = PageTable(tier, pages, table.num_tokens, parked=True)
    if cache.windows is not None:
        cache.windows.open(parked, ())
        cache.windows.begin(parked, table.num_tokens)
    copy_pages(cache, table, parked)
    cache.free(table)
    return parked


def restore(cache: KVCache, parked: PageTable, tier: str, cpu_attention: bool = False) -> PageTable:
    """The table of a sequence that goes on running, on ``tier``; the caller has seen that there are pages for what is
    parked. The table given is empty afterward."""
    # What sequences that have ended still have under way to these pages would lie over what is copied there.
    cache.synchronize()
    if tier == parked.tier:
        table = PageTable(tier, [], parked.num_tokens, parked.num_shared, cpu_attention=cpu_attention)
        handed_over(parked, table)
        if tier == "disk":
            assert cache.disk is not None
            table.tail_slot = cache.disk.open()
            read_open_page(cache, table)
        cache.count_open(tier)
        return table
    table = cache.open(tier, parked.num_tokens, cpu_attention=cpu_attention)
    if cache.windows is not None:
        cache.windows.begin(table, parked.num_tokens)
    copy_pages(cache, parked, table)
    table.num_tokens = parked.num_tokens
    cache.free(parked)
    return table


def handed_over(source: PageTable, target: PageTable) -> PageTable:
    """A table with the pages of another, which is empty afterward."""
    target.pages, target.windows, target.first_window = source.pages, source.windows, source.first_window
    target.twins, source.pages, source.windows = source.twins, [], []
    return target


def copy_pages(cache: KVCache, source: PageTable, target: PageTable) -> None:
    """All that a sequence has in its pages to those of another table."""
    if cache.orders is not None:
        cache.orders.note("copy_pages", as_it_is(source), as_it_is(target))
    for layer in range(cache.layout.num_layers):
        write(cache, target, layer, read(cache, source, layer), source.num_tokens)


def as_it_is(table: PageTable) -> PageTable:
    """A copy that stays, whatever becomes of the table."""
    return replace(table, pages=list(table.pages), windows=list(table.windows), twins={})


def follow(cache: KVCache, orders: Iterable[Order]) -> None:
    """Do what another rank has done to its heads of the cache since the last pass."""
    for name, arguments in orders:
        cache.synchronize()
        if name in TAIL_ORDERS:
            TAIL_ORDERS[name](cache.disk, *arguments)
        else:
            PAGE_ORDERS[name](cache, *arguments)


def read(cache: KVCache, table: PageTable, layer: int) -> Tensor:
    """The pages of a sequence in one layer: uint8 [pages, page_bytes], where they lie or on the host."""
    layout, location = cache.layout, table.held_pages.of(cache.windowed[layer])
    count = layout.num_pages(table.num_tokens) - location.first
    if table.tier != "disk":
        data = cache.pages[table.tier][layer]
        return data[torch.tensor(location.pages[:count], dtype=torch.int64, device=data.device)]
    assert cache.disk is not None
    pages = torch.empty(count, layout.page_bytes, dtype=torch.uint8)
    if table.parked:
        cache.disk.read_pages(location.pages[:count], layer, pages)
    else:
        cache.disk.read([(location, table.num_tokens)], layer, pages, cache.queues.disk_chunks)
    return pages


def write(cache: KVCache, table: PageTable, layer: int, pages: Tensor, num_tokens: int) -> None:
    """Fill the pages of a sequence of so many tokens in one layer."""
    location, layout = table.held_pages.of(cache.windowed[layer]), cache.layout
    if table.tier != "disk":
        data = cache.pages[table.tier][layer]
        indices = torch.tensor(location.pages[: len(pages)], dtype=torch.int64, device=data.device)
        data[indices] = pages.to(data.device)
        return
    assert cache.disk is not None
    host = pages.cpu()
    if table.parked:
        cache.disk.write_pages(location.pages[: len(host)], layer, host)
    else:
        start = location.first * layout.page_tokens
        cache.disk.append(location, layer, start, host.view(-1, layout.token_bytes)[: num_tokens - start], 0)


def write_open_page(cache: KVCache, table: PageTable) -> None:
    """Put what a disk sequence has in its tail to the other pages in the file."""
    if cache.orders is not None:
        cache.orders.note("write_open_page", as_it_is(table))
    disk, layout, slot = cache.disk, cache.layout, table.tail_slot
    assert disk is not None
    for layer in range(layout.num_layers):
        location = table.held_pages.of(cache.windowed[layer])
        flushed = disk.catch_up(location, layer)
        first, count = flushed // layout.page_tokens - location.first, table.num_tokens - flushed
        rows = torch.zeros(layout.num_pages(count) * layout.page_tokens, layout.token_bytes, dtype=torch.uint8)
        rows[:count] = disk.tails[layer, slot, :count]
        pages = rows.view(-1, layout.page_bytes)
        disk.write_pages(location.pages[first : first + len(pages)], layer, pages)


def read_open_page(cache: KVCache, table: PageTable) -> None:
    """Bring the open page of a disk sequence from the file to its tail."""
    if cache.orders is not None:
        cache.orders.note("read_open_page", as_it_is(table))
    disk, layout = cache.disk, cache.layout
    assert disk is not None
    index, rows = divmod(table.num_tokens, layout.page_tokens)
    disk.mark_flushed(table.tail_slot, index * layout.page_tokens)
    page = torch.empty(1, layout.page_bytes, dtype=torch.uint8)
    for layer in range(layout.num_layers if rows else 0):
        location = table.held_pages.of(cache.windowed[layer])
        disk.read_pages([location.pages[index - location.first]], layer, page)
        disk.tails[layer, table.tail_slot, :rows] = page.view(-1, layout.token_bytes)[:rows]


TAIL_ORDERS: dict[str, Callable[..., object]] = {"open_tail": DiskCache.open, "close_tail": DiskCache.close_tail}
PAGE_ORDERS: dict[str, Callable[..., object]] = {
    "move_rows": move_rows,
    "copy_pages": copy_pages,
    "write_open_page": write_open_page,
    "read_open_page": read_open_page,
}
"""With `TAIL_ORDERS`, all that changes what a cache holds beside passes."""
