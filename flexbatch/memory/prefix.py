"""The index behind shared prefixes: which page holds which beginning of a prompt."""

from __future__ import annotations

from collections.abc import Sequence

Key = tuple[int, tuple[int, ...]]
"""(page before it, for the first -1 less the number of the adapter; tokens of the page): exact, a hash collision cannot
share a wrong page."""


class PrefixIndex:
    """Full pages of prompts in one pool, as a tree: a page is known by the page before it and its own tokens.

    A page is entered when its sequence is admitted and is *ready* once its tokens are in the cache; sequences that
    share it wait for that.
    """

    def __init__(self, page_tokens: int) -> None:
        self.page_tokens = page_tokens
        self.pages: dict[Key, int] = {}
        self.keys: dict[int, Key] = {}
        self.ready: set[int] = set()

    def match(self, token_ids: Sequence[int], max_pages: int, adapter: int = 0) -> list[int]:
        """Pages that hold the beginning of ``token_ids`` as an adapter (0: none) reads it, at most ``max_pages``."""
        found: list[int] = []
        while len(found) < max_pages:
            page = self.pages.get(self.key(found, token_ids, adapter))
            if page is None:
                break
            found.append(page)
        return found

    def key(self, before: Sequence[int], token_ids: Sequence[int], adapter: int) -> Key:
        start = len(before) * self.page_tokens
        return (before[-1] if before else -1 - adapter, tuple(token_ids[start : start + self.page_tokens]))

    def enter(self, pages: Sequence[int], token_ids: Sequence[int], adapter: int = 0) -> None:
        """Enter the full pages of a prompt that is about to be prefilled; those that are known already stay."""
        for i in range(len(token_ids) // self.page_tokens):
            key = self.key(pages[:i], token_ids, adapter)
            if pages[i] in self.keys:
                continue
            if key in self.pages:
                # Another sequence fills a page with the same content: the pages after it hang on that one, not on ours.
                return
            self.pages[key] = pages[i]
            self.keys[pages[i]] = key

    def mark_ready(self, pages: Sequence[int]) -> None:
        """Note that the tokens of these pages are in the cache now."""
        self.ready.update(page for page in pages if page in self.keys)

    def is_ready(self, page: int) -> bool:
        return page in self.ready

    def forget(self, page: int) -> None:
        """Remove a page that is about to be reused."""
        key = self.keys.pop(page, None)
        if key is not None:
            del self.pages[key]
            self.ready.discard(page)

    def check(self) -> None:
        """Invariants: both directions agree; a page hangs on an entered page."""
        assert self.ready <= self.keys.keys()
        for key, page in self.pages.items():
            assert self.keys[page] == key
            assert key[0] < 0 or key[0] in self.keys, (page, key[0])
