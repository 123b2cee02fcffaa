"""Page ids: owned once, counted right, shared only when they hold the same beginning of a prompt, free after
release."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from flexbatch.memory.pages import CacheLayout, PagePool, PageTable
from flexbatch.memory.prefix import PrefixIndex

PAGE_TOKENS = 2
NUM_PAGES = 12
PROMPTS = st.lists(st.integers(0, 1), min_size=1, max_size=9).map(tuple)
"""Two token ids and short pages: most prompts share something."""


@dataclass
class Holder:
    """A sequence in the model: its prompt, its pages, how many it shares, and whether its prompt has been read."""

    prompt: tuple[int, ...]
    pages: list[int]
    num_shared: int
    filled: bool = False


class PagesMachine(RuleBasedStateMachine):
    """A pool against the list of its holders and what each page holds."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = PagePool("cpu", NUM_PAGES, PAGE_TOKENS)
        self.holders: list[Holder] = []
        self.content: dict[int, tuple[int, ...]] = {}
        """Page -> the prompt up to its end, once that has been read; what a page with other content must not be
        shared for."""

    @rule(prompt=PROMPTS, more=st.integers(0, 3))
    def open(self, prompt: tuple[int, ...], more: int) -> None:
        shared = self.pool.prefixes.match(prompt, (len(prompt) - 1) // PAGE_TOKENS)
        for i, page in enumerate(shared):
            known = self.content.get(page) if self.pool.prefixes.is_ready(page) else self.expected(page)
            assert known == prompt[: (i + 1) * PAGE_TOKENS], "a page of another prompt is shared"
        need = -(-(len(prompt) + more) // PAGE_TOKENS) - len(shared)
        kept = sum(page in self.pool.evictable for page in shared)
        if need > self.pool.num_available - kept:
            with pytest.raises(AssertionError, match="admission must ask first"):
                self.pool.allocate(self.pool.num_available + 1)
            return
        self.pool.share(shared)
        fresh = self.pool.allocate(need)
        held = {page for holder in self.holders for page in holder.pages}
        assert not held & set(fresh) and len(set(fresh)) == need and not set(shared) & set(fresh), (
            "a page is owned twice"
        )
        for page in fresh:
            self.content.pop(page, None)
        self.pool.prefixes.enter([*shared, *fresh], prompt)
        self.holders.append(Holder(prompt, [*shared, *fresh], len(shared)))

    def expected(self, page: int) -> tuple[int, ...] | None:
        """What the owner of a page that is not ready is about to write."""
        owner = next(holder for holder in self.holders if page in holder.pages[holder.num_shared :])
        return owner.prompt[: (owner.pages.index(page) + 1) * PAGE_TOKENS]

    def readable(self) -> list[Holder]:
        return [
            h for h in self.holders if not h.filled and all(map(self.pool.prefixes.is_ready, h.pages[: h.num_shared]))
        ]

    @precondition(lambda self: self.readable())
    @rule(choice=st.randoms(use_true_random=False))
    def fill(self, choice) -> None:
        holder = choice.choice(self.readable())
        full = len(holder.prompt) // PAGE_TOKENS
        for i in range(holder.num_shared, full):
            self.content[holder.pages[i]] = holder.prompt[: (i + 1) * PAGE_TOKENS]
        self.pool.prefixes.mark_ready(holder.pages[holder.num_shared : full])
        holder.filled = True

    @precondition(lambda self: any(holder.filled for holder in self.holders))
    @rule(choice=st.randoms(use_true_random=False))
    def release(self, choice) -> None:
        holder = choice.choice([holder for holder in self.holders if holder.filled])
        self.holders.remove(holder)
        self.pool.release(holder.pages)

    @rule()
    def abort(self) -> None:
        while self.holders:
            self.pool.release(self.holders.pop().pages)
        assert self.pool.num_available == NUM_PAGES

    @rule()
    def forget(self) -> None:
        self.pool.evict_all()
        assert not self.pool.evictable

    @invariant()
    def agrees(self) -> None:
        self.pool.check()
        for page in range(NUM_PAGES):
            assert self.pool.references[page] == sum(page in holder.pages for holder in self.holders)
        held = {page for holder in self.holders for page in holder.pages}
        assert self.pool.num_available == NUM_PAGES - len(held)

    def teardown(self) -> None:
        self.abort()
        self.pool.check()


PagesMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=25, deadline=None)
TestPages = PagesMachine.TestCase


def test_a_released_prompt_is_found_until_its_room_is_needed() -> None:
    pool = PagePool("gpu", 4, PAGE_TOKENS)
    first = pool.allocate(2)
    pool.prefixes.enter(first, (1, 2, 3, 4))
    pool.prefixes.mark_ready(first)
    pool.release(first)
    assert pool.prefixes.match((1, 2, 3, 4, 5), 2) == first and pool.num_available == 4
    pool.allocate(3)  # evicts one kept page: the last of the prompt, as the first is of no less use
    assert pool.prefixes.match((1, 2, 3, 4, 5), 2) == first[:1]
    pool.check()


def test_a_page_whose_content_is_gone_cannot_be_shared() -> None:
    pool = PagePool("gpu", 2, PAGE_TOKENS)
    pages = pool.allocate(1)
    pool.release(pages)
    with pytest.raises(AssertionError, match="its content is gone"):
        pool.share(pages)


@given(first=PROMPTS, second=PROMPTS)
def test_two_prompts_share_their_common_full_pages(first: tuple[int, ...], second: tuple[int, ...]) -> None:
    index = PrefixIndex(PAGE_TOKENS)
    index.enter(range(10, 20), first)
    common = next(
        (i for i, (a, b) in enumerate(zip(first, second, strict=False)) if a != b), min(len(first), len(second))
    )
    assert index.match(second, 10) == list(range(10, 10 + common // PAGE_TOKENS))
    index.check()
    for page in reversed(range(10, 20)):
        index.forget(page)
        index.check()
    assert not index.pages and not index.keys


@given(start=st.integers(0, 20), count=st.integers(0, 20), page_tokens=st.integers(1, 7))
def test_slots_follow_the_page_table(start: int, count: int, page_tokens: int) -> None:
    pages = [3 * i + 5 for i in range(40)]
    slots = PageTable("gpu", pages, start + count).location.slots(start, start + count, page_tokens)
    assert [(slot // page_tokens, slot % page_tokens) for slot in slots] == [
        (pages[t // page_tokens], t % page_tokens) for t in range(start, start + count)
    ]


@pytest.mark.parametrize(
    "table",
    [
        PageTable("gpu", [1, 1], 2),
        PageTable("gpu", [1], 3),
        PageTable("gpu", [1, 2], 1, num_shared=1),
        PageTable("disk", [1], 1),
        PageTable("gpu", [1], 1, tail_slot=0),
        PageTable("gpu", [1], 1, cpu_attention=True),
    ],
)
def test_a_wrong_table_is_noticed(table: PageTable) -> None:
    with pytest.raises(AssertionError):
        table.check(PAGE_TOKENS)


@given(
    bits=st.sampled_from([16, 8, 4]),
    heads=st.integers(1, 5),
    head_dim=st.integers(1, 130),
    page_tokens=st.integers(1, 20),
    tokens=st.integers(1, 60),
)
def test_sizes_of_a_layout(bits: int, heads: int, head_dim: int, page_tokens: int, tokens: int) -> None:
    layout = CacheLayout(2, heads, head_dim, bits, 64, page_tokens, torch.float32)
    assert (layout.num_pages(tokens) - 1) * page_tokens < tokens <= layout.num_pages(tokens) * page_tokens
    assert layout.page_bytes <= layout.disk_page_bytes < layout.page_bytes + 4096 and layout.disk_page_bytes % 4096 == 0
    rows = layout.row_view(torch.zeros(layout.page_bytes, dtype=torch.uint8))
    assert len(rows) == page_tokens and rows[0].nbytes == layout.token_bytes
