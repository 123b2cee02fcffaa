"""Layers whose queries see a window of the keys before them: which pages of their cache are kept. Plain numbers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from flexbatch.policy.policy import Policy


@dataclass(frozen=True)
class LayerWindow:
    """The window of those layers of a model that have one. chunked: it does not slide, a query sees the keys from the
    last multiple of ``tokens`` on."""

    tokens: int
    chunked: bool = False

    def step(self, page_tokens: int) -> int:
        """Tokens that are let go together: pages, and of a chunked window whole chunks, so that what is left begins at
        a multiple of both and attention counts positions from there."""
        return math.lcm(self.tokens, page_tokens) if self.chunked else page_tokens

    def first_kept(self, num_tokens: int, page_tokens: int) -> int:
        """The first token, a multiple of ``page_tokens``, of what is kept for those from ``num_tokens`` on."""
        step = self.step(page_tokens)
        seen = num_tokens if self.chunked else max(0, num_tokens - self.tokens + 1)
        return seen // step * step

    def pages(self, query_tokens: int, page_tokens: int) -> int:
        """Pages of so many query tokens and of all that they see, at most, wherever their first token lies in its
        page."""
        before = self.step(page_tokens) - 1 if self.chunked else self.tokens - 1
        return (before + query_tokens + page_tokens - 2) // page_tokens + 1


@dataclass(frozen=True)
class WindowSizes:
    """Pages of the layers with a window, where these keep only what is seen; those of the other layers are counted
    beside them."""

    ring: int
    """Pages that a sequence holds between two passes, at most."""
    quota: tuple[int, int, int]
    """By tier: pages for what all its sequences hold between two passes."""
    pages: tuple[int, int, int]
    """By tier: these, and those of the prompt tokens of one pass, which are all kept until it is over."""
    staging: int = 0
    """Pages of a micro-batch in a pass, at most."""

    def of(self, pages: int) -> int:
        """Pages that a sequence holds here which has so many in the other layers."""
        return min(pages, self.ring)

    def part(self, parts: int) -> WindowSizes:
        """What one of so many parts of the block has of them."""
        quota, pages = ([-(-count // parts) for count in counts] for counts in (self.quota, self.pages))
        return WindowSizes(self.ring, (quota[0], quota[1], quota[2]), (pages[0], pages[1], pages[2]), self.staging)

    def covers(self, other: WindowSizes) -> bool:
        """Whether what fits ``other`` fits here."""
        mine, wanted = (*self.quota, *self.pages, self.staging), (*other.quota, *other.pages, other.staging)
        return self.ring == other.ring and all(has >= wants for has, wants in zip(mine, wanted, strict=True))

    def with_more(self, tier: int, pages: int, most: WindowSizes | None) -> WindowSizes:
        """With pages for sequences that have ``pages`` more in the other layers of a tier, no more than ``most`` has
        where that is given."""
        grown = []
        for name in ("quota", "pages"):
            counts = list(getattr(self, name))
            limit = counts[tier] + pages if most is None else getattr(most, name)[tier]
            counts[tier] = max(counts[tier], min(limit, counts[tier] + pages))
            grown.append((counts[0], counts[1], counts[2]))
        return WindowSizes(self.ring, grown[0], grown[1], self.staging)


def passing_pages(policy: Policy, prompt_tokens: int, page_tokens: int) -> int:
    """Pages of the chunks of prompts of one micro-batch in a pass beyond those that sequences hold between passes, at
    most. A chunk of c tokens needs (c + page - 2) / page of them."""
    chunks = min(policy.gpu_batch_size, prompt_tokens // 2)
    return (prompt_tokens + chunks * (page_tokens - 2)) // page_tokens


def window_sizes(
    longest: Sequence[int], counts: Sequence[int], policy: Policy, passing: int, ring: int
) -> WindowSizes | None:
    """For tiers with ``counts`` of the sequences that have ``longest`` pages in the other layers, the largest first.
    None where keeping everything takes no more. passing: pages that a pass takes more of each micro-batch."""
    if not longest or longest[0] <= ring:
        return None
    held = [sum(min(pages, ring) for pages in longest[:count]) for count in counts]
    whole = [int(sum(longest[:count])) for count in counts]
    # Whatever a pass brings, nobody has more pages here than in the other layers.
    most = policy.num_gpu_batches * passing
    pages = [min(all_of, quota + most) for all_of, quota in zip(whole, held, strict=True)]
    if sum(pages) >= sum(whole):
        return None
    staging = policy.gpu_batch_size * ring + passing
    return WindowSizes(ring, (held[0], held[1], held[2]), (pages[0], pages[1], pages[2]), staging)
