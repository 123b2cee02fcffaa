"""The rules by which a block fills and a pass is composed, on plain numbers.

The scheduler follows them, and the planner counts the passes of a job by them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace

from flexbatch.policy.layer_window import LayerWindow, WindowSizes, passing_pages, window_sizes
from flexbatch.policy.limits import MAX_MICRO_BATCH_TOKENS, PAGE_TOKENS
from flexbatch.policy.policy import TIERS, Policy, Split


@dataclass(frozen=True)
class CacheSizes:
    """Pages of each tier, and the largest staged micro-batch."""

    gpu_pages: int
    cpu_pages: int
    disk_pages: int
    staging_pages: int
    """Pages of one micro-batch whose cache is not on the gpu tier: one staging buffer; there are two."""
    disk_sequences: int = 0
    tail_tokens: int = 0
    """Token rows of each disk sequence and layer that are held in host memory until their page is full."""
    parking_pages: int = 0
    """Of the cpu tier, pages for sequences that have stepped aside alone."""
    windows: WindowSizes | None = None
    """Of layers that keep only their window, whose pages are counted for themselves; None: all layers keep all."""

    def pages(self, tier: str) -> int:
        return {"gpu": self.gpu_pages, "cpu": self.cpu_pages, "disk": self.disk_pages}[tier]

    def window_pages(self, tier: str) -> int:
        """Pages of the layers that keep only their window."""
        return self.windows.pages[TIERS.index(tier)] if self.windows else 0

    @property
    def quotas(self) -> dict[str, int]:
        """By tier, what sequences may count in these layers; 0 where all layers keep all."""
        return dict(zip(TIERS, self.windows.quota if self.windows else (0, 0, 0), strict=True))

    def in_windows(self, pages: int) -> int:
        """Of a sequence that has so many pages, those that count in the layers that keep only their window."""
        return self.windows.of(pages) if self.windows else 0

    def part(self, parts: int) -> CacheSizes:
        """What one of so many parts of the block has of them."""
        gpu, cpu, disk = (-(-self.pages(tier) // parts) for tier in TIERS)
        return replace(
            self,
            gpu_pages=gpu,
            cpu_pages=cpu,
            disk_pages=disk,
            disk_sequences=-(-self.disk_sequences // parts),
            windows=self.windows and self.windows.part(parts),
        )

    def covers(self, other: CacheSizes) -> bool:
        """Whether a block that fits ``other`` fits here."""
        names = [each.name for each in fields(self) if each.name != "windows"]
        enough = all(getattr(self, name) >= getattr(other, name) for name in names)
        if self.windows is None or other.windows is None:
            return enough and self.windows is None
        return enough and self.windows.covers(other.windows)


def num_pages(num_tokens: int, page_tokens: int = PAGE_TOKENS) -> int:
    """Pages of ``num_tokens`` tokens, the last one partly filled."""
    return -(-num_tokens // page_tokens)


def sequences_on(cache: Split, block: int) -> dict[str, int]:
    """Sequences that each tier has pages for, of the longest: it may hold one more than its share."""
    return {
        tier: min(block, int(block * fraction + 1 - 1e-9) + (1 if 0 < fraction < 1 else 0)) if fraction > 0 else 0
        for tier, fraction in zip(TIERS, cache.fractions, strict=True)
    }


def off_gpu_sequences(policy: Policy, block: int) -> int:
    """Sequences of a micro-batch that go through staging, at most: all that are not on the gpu tier (one that the CPU
    attends while its prompt is read)."""
    if policy.cache.gpu >= 1:
        return 0
    even = -(-int(block * (1 - policy.cache.gpu) + 2) // max(1, min(policy.num_gpu_batches, block)))
    return min(policy.gpu_batch_size, block, even + 1)


def cache_sizes(
    policy: Policy,
    longest: Sequence[int],
    page_tokens: int = PAGE_TOKENS,
    max_query_nodes: int = 0,
    window: LayerWindow | None = None,
) -> CacheSizes:
    """Pages for a full block of a job's longest sequences on every tier's share.

    longest: pages to reserve for each sequence of the block, the largest first; no more than the block has. window: of
    the layers that have one.
    """
    block = len(longest)
    counts = sequences_on(policy.cache, block)
    on_tier = {tier: int(sum(longest[:count])) for tier, count in counts.items()}
    windows = None
    if window is not None:
        passing = passing_pages(policy, most_prompt_tokens(policy, max_query_nodes), page_tokens)
        ring = window.pages(1 + max_query_nodes, page_tokens)
        windows = window_sizes(longest, list(counts.values()), policy, passing, ring)
    on_disk = min(block, int(block * policy.cache.disk + 2)) if policy.cache.disk > 0 else 0
    return CacheSizes(
        gpu_pages=on_tier["gpu"],
        cpu_pages=on_tier["cpu"],
        disk_pages=on_tier["disk"],
        staging_pages=int(sum(longest[: off_gpu_sequences(policy, block)])),
        disk_sequences=on_disk,
        tail_tokens=2 * page_tokens + max_query_nodes if on_disk else 0,
        windows=windows,
    )


def most_prompt_tokens(policy: Policy, max_query_nodes: int = 0) -> int:
    """Prompt tokens that a micro-batch brings to a pass, at most: see `prompt_budget`."""
    return min(policy.prompt_tokens_per_micro_batch, micro_batch_tokens(policy, max_query_nodes))


def micro_batch_tokens(policy: Policy, max_query_nodes: int = 0) -> int:
    """Query tokens of one micro-batch, at most: every sequence's decode token with its tree, and one prompt chunk at
    least."""
    prompts = (
        policy.prompt_tokens_per_micro_batch
        if policy.prefill_budget
        else min(policy.prompt_tokens_per_micro_batch, MAX_MICRO_BATCH_TOKENS)
    )
    return policy.gpu_batch_size * (1 + max_query_nodes) + max(policy.chunk, prompts)


# Who gets in


def allowed_tiers(cache: Split) -> list[str]:
    """The tiers that sequences may be on."""
    return [tier for tier, fraction in zip(TIERS, cache.fractions, strict=True) if fraction > 0]


def largest_sequence(cache: Split, sizes: CacheSizes) -> int:
    """Pages that a sequence can have when nothing else runs."""
    return max(
        sizes.pages(tier) if tier == "gpu" else min(sizes.pages(tier), sizes.staging_pages)
        for tier in allowed_tiers(cache)
    )


def can_all_move(on_tier: Mapping[str, int], longest: int, pools: Mapping[str, int]) -> bool:
    """Whether sequences that are only ever moved can all go on to their ends: every tier has pages for all that those
    ``on_tier`` may reach; or all tiers together have, and of the ``longest`` one more each: then one of them has the
    pages free that another lacks."""
    if all(on_tier[tier] <= size for tier, size in pools.items()):
        return True
    return sum(on_tier.values()) + longest * sum(size > 0 for size in pools.values()) <= sum(pools.values())


def open_micro_batches(
    occupied: Sequence[int], staged: Sequence[int], tier: str, pages: int, batch_size: int, staging_pages: int
) -> list[int]:
    """Micro-batches with a free slot, and staging pages for all their sequences that are not on the gpu tier.

    occupied: sequences of each micro-batch. staged: pages of those that are not on the gpu tier. pages: what the next
    sequence may need.
    """
    return [
        k
        for k, count in enumerate(occupied)
        if count < batch_size and (tier == "gpu" or staged[k] + pages <= staging_pages)
    ]


def emptiest(candidates: Iterable[int], of_tier: Sequence[int], occupied: Sequence[int]) -> int:
    """The micro-batch that takes the next sequence, of ``candidates``: the one with the fewest sequences of its tier,
    so that micro-batches are alike, then the one with the fewest at all."""
    return min(candidates, key=lambda k: (of_tier[k], occupied[k]))


# What a pass reads


def prompt_budget(num_single: int, token_limit: int, budget: int, max_query_nodes: int = 0) -> int:
    """Prompt tokens that a micro-batch brings to a pass. num_single: its sequences that have one token to read, which
    ride along whatever the budget is. token_limit: query tokens that its buffers hold."""
    return min(token_limit - (1 + max_query_nodes) * num_single, budget)


def chunk_tokens(uncached: int, chunk: int, budget: int) -> int:
    """Tokens of a text with several uncached ones that are read in this pass, of ``budget``; 0: it waits."""
    return max(0, min(uncached, chunk, budget))
