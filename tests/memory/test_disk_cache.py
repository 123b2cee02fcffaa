"""Disk sequences: full pages in the file, the open page in host memory, whatever the chunks in which tokens come."""

from __future__ import annotations

import random
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from flexbatch.memory import disk_cache
from flexbatch.memory.disk_cache import DiskCache, aligned_empty
from flexbatch.memory.pages import CacheLayout, SequencePages
from flexbatch.memory.transfer import TransferQueues
from flexbatch.policy.admission import CacheSizes
from tests.memory.rigs import open_tiers

PAGE_TOKENS, LAYERS, PAGES, SEQUENCES, MAX_NODES = 4, 2, 8, 2, 5
LAYOUT = CacheLayout(LAYERS, 1, 3, 16, 64, PAGE_TOKENS, torch.float32)


@contextmanager
def open_cache(tail_tokens: int = 2 * PAGE_TOKENS + MAX_NODES) -> Iterator[tuple[DiskCache, TransferQueues]]:
    with tempfile.TemporaryDirectory() as folder, open_tiers(Path(folder)) as (tiers, queues):
        cache = DiskCache(LAYOUT, CacheSizes(0, 0, PAGES, 0, SEQUENCES, tail_tokens), tiers)
        assert not list(Path(folder).iterdir()), "a killed run would leave the file behind"
        assert tiers.disk.used_bytes == {"cache": LAYERS * PAGES * LAYOUT.disk_page_bytes}
        cache.check()
        yield cache, queues
        cache.check()
        cache.close()
        assert not tiers.disk.used_bytes and not tiers.cpu.used_bytes


def rows_of(count: int, seed: int) -> torch.Tensor:
    return torch.randint(
        0, 256, (count, LAYOUT.token_bytes), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8
    )


def read(
    cache: DiskCache, queues: TransferQueues, tables: list[tuple[SequencePages, int]], layer: int
) -> list[torch.Tensor]:
    """Rows of every sequence, as the staging buffer gets them."""
    pages = torch.zeros(sum(LAYOUT.num_pages(count) for _, count in tables), LAYOUT.page_bytes, dtype=torch.uint8)
    cache.read(tables, layer, pages, queues.disk_chunks)
    rows, cursor = [], 0
    for _, count in tables:
        used = LAYOUT.num_pages(count)
        rows.append(pages[cursor : cursor + used].reshape(-1, LAYOUT.token_bytes)[:count])
        cursor += used
    return rows


CHUNKS = st.lists(st.tuples(st.integers(1, 9), st.integers(0, MAX_NODES)), min_size=1, max_size=6)


@settings(max_examples=60, deadline=None)
@given(chunks=CHUNKS, other=CHUNKS, pages=st.permutations(range(PAGES)), accept=st.randoms(use_true_random=False))
@example(chunks=[(9, 0)], other=[(9, 2)], pages=list(range(PAGES)), accept=random.Random(0))
def test_rows_are_read_as_they_were_appended(
    chunks: list[tuple[int, int]], other: list[tuple[int, int]], pages: list[int], accept
) -> None:
    """Two sequences by turns, in chunks of any size, some with drafted tokens of which a part is taken back; pages
    next to each other or not."""
    with open_cache() as (cache, queues):
        tables = [
            SequencePages("disk", tuple(pages[:4]), tail_slot=cache.open()),
            SequencePages("disk", tuple(pages[4:]), tail_slot=cache.open()),
        ]
        known = [torch.empty(LAYERS, 0, LAYOUT.token_bytes, dtype=torch.uint8)] * 2
        for turn, (first, second) in enumerate(zip(chunks, other, strict=False)):
            for i, (count, drafted) in enumerate((first, second)):
                start = known[i].shape[1]
                if start + count + drafted > 4 * PAGE_TOKENS:
                    continue
                path = sorted(accept.sample(range(drafted), accept.randint(0, drafted)))
                fresh = torch.stack([rows_of(count + drafted, 100 * turn + 10 * i + layer) for layer in range(LAYERS)])
                for layer in range(LAYERS):
                    cache.append(tables[i], layer, start, fresh[layer], drafted)
                    if path:
                        cache.move(tables[i], layer, [start + count + position for position in path], start + count)
                known[i] = torch.cat(
                    [known[i], fresh[:, :count], fresh[:, [count + position for position in path]]], dim=1
                )
                cache.check()
            for layer in range(LAYERS):
                found = read(cache, queues, [(tables[i], known[i].shape[1]) for i in (1, 0)], layer)
                assert torch.equal(found[0], known[1][layer]) and torch.equal(found[1], known[0][layer])
        for table in tables:
            cache.close_tail(table.tail_slot)
        assert sorted(cache.free_tails) == [0, 1]


def test_a_shared_prefix_is_read_from_the_pages_of_another() -> None:
    with open_cache() as (cache, queues):
        first, second = (
            SequencePages("disk", (3, 4), tail_slot=cache.open()),
            SequencePages("disk", (3, 5), tail_slot=cache.open()),
        )
        prompt, end = rows_of(PAGE_TOKENS, 1), rows_of(2, 2)
        cache.append(first, 0, 0, prompt, 0)
        cache.mark_flushed(second.tail_slot, PAGE_TOKENS)
        cache.append(second, 0, PAGE_TOKENS, end, 0)
        assert torch.equal(read(cache, queues, [(second, PAGE_TOKENS + 2)], 0)[0], torch.cat([prompt, end]))


def test_neighbors_in_the_file_are_one_request(monkeypatch: pytest.MonkeyPatch) -> None:
    with open_cache() as (cache, _):
        assert cache.runs([4, 5, 6, 2, 1, 3]) == [(0, 4, 3), (3, 2, 1), (4, 1, 1), (5, 3, 1)]
        assert cache.runs([]) == []
        monkeypatch.setattr(disk_cache, "READ_CHUNK_BYTES", 2 * LAYOUT.disk_page_bytes)
        assert cache.runs([0, 1, 2, 3, 4]) == [(0, 0, 2), (2, 2, 2), (4, 4, 1)]


def test_pages_that_are_whole_blocks_go_straight_to_their_place() -> None:
    """Without a copy: the layout of most models at 16 bits."""
    layout = CacheLayout(1, 4, 32, 16, 64, PAGE_TOKENS, torch.float32)
    assert layout.page_bytes == layout.disk_page_bytes == 4096
    with tempfile.TemporaryDirectory() as folder, open_tiers(Path(folder)) as (tiers, queues):
        cache = DiskCache(layout, CacheSizes(0, 0, PAGES, 0, 1, PAGE_TOKENS), tiers)
        table = SequencePages("disk", (2, 3, 4, 0), tail_slot=cache.open())
        rows = torch.randint(0, 256, (14, layout.token_bytes), dtype=torch.uint8)
        cache.append(table, 0, 0, rows, 0)
        for pages_out in (aligned_empty(4 * layout.page_bytes), aligned_empty(4 * layout.page_bytes + 64)[64:]):
            pages = pages_out.view(4, -1)
            cache.read([(table, 14)], 0, pages, queues.disk_chunks)
            assert torch.equal(pages.view(-1, layout.token_bytes)[:14], rows)
        cache.close()


def test_a_tail_that_overflows_is_noticed() -> None:
    with open_cache(tail_tokens=PAGE_TOKENS) as (cache, _):
        table = SequencePages("disk", (0, 1), tail_slot=cache.open())
        with pytest.raises(AssertionError, match="5 open tokens do not fit a tail of 4"):
            cache.append(table, 0, 0, rows_of(5, 0), keep=5)


def test_a_tail_that_is_lost_is_noticed() -> None:
    with open_cache() as (cache, _):
        slot = cache.open()
        del cache.flushed[slot]
        with pytest.raises(AssertionError):
            cache.check()
        cache.free_tails.append(slot)
