"""Random calls of paged attention: pages in random order, NaN in every slot that nobody may read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from flexbatch.kernels import reference


@dataclass(frozen=True)
class Case:
    """Query tokens and context of each sequence, and the shape of the heads."""

    queries: tuple[int, ...]
    contexts: tuple[int, ...]
    num_heads: int = 4
    num_kv_heads: int = 2
    head_dim: int = 64
    dtype: torch.dtype = torch.float32
    bits: int = 16
    group: int = 32
    page_tokens: int = 8
    alibi: bool = False
    alibi_scale: float = 0.0
    window: int = 0
    chunked: bool = False
    soft_cap: float = 0.0
    sinks: bool = False
    tree: bool = False
    seed: int = 0

    def build(self, device: torch.device | str = "cpu") -> tuple[tuple[torch.Tensor, ...], dict[str, Any]]:
        """Positional and keyword arguments of `paged_attention`."""
        random = torch.Generator().manual_seed(self.seed)
        max_pages = max(-(-context // self.page_tokens) for context in self.contexts) + 1
        num_pages = len(self.contexts) * max_pages
        table = torch.randperm(num_pages, generator=random).view(len(self.contexts), max_pages).int()
        slots = torch.cat([self.slots_of(table[s], context) for s, context in enumerate(self.contexts)])
        key, value = (
            torch.randn(len(slots), self.num_kv_heads, self.head_dim, generator=random).to(self.dtype) for _ in range(2)
        )
        reference.append_rows(
            rows := self.garbage(num_pages * self.page_tokens, random), slots, key, value, self.bits, self.group
        )
        query = torch.randn(sum(self.queries), self.num_heads, self.head_dim, generator=random).to(self.dtype)
        starts = torch.tensor([0, *self.queries]).cumsum(0).int()
        options: dict[str, Any] = {
            "num_kv_heads": self.num_kv_heads,
            "page_tokens": self.page_tokens,
            "scale": self.head_dim**-0.5,
            "bits": self.bits,
        }
        options |= {
            "group": self.group,
            "window": self.window,
            "chunked": self.chunked,
            "soft_cap": self.soft_cap,
            "max_query_len": max(self.queries),
        }
        if self.alibi:
            options |= {
                "alibi_slopes": torch.rand(self.num_heads, generator=random) / 4,
                "alibi_scale": self.alibi_scale,
            }
        if self.sinks:
            # Some above all scores, some that count for nothing.
            options["sinks"] = torch.randn(self.num_heads, generator=random) * 3
        if self.tree:
            options |= self.random_trees(random)
        options = {name: x.to(device) if isinstance(x, torch.Tensor) else x for name, x in options.items()}
        return tuple(x.to(device) for x in (query, rows, table, starts, torch.tensor(self.contexts).int())), options

    def slots_of(self, pages: torch.Tensor, context: int) -> torch.Tensor:
        return (pages.long().unsqueeze(1) * self.page_tokens + torch.arange(self.page_tokens)).flatten()[:context]

    def garbage(self, num_slots: int, random: torch.Generator) -> torch.Tensor:
        if self.bits == 16:
            return torch.full((num_slots, 2, self.num_kv_heads, self.head_dim), float("nan"), dtype=self.dtype)
        row_bytes = reference.token_bytes(self.num_kv_heads, self.head_dim, self.bits, self.group, self.dtype.itemsize)
        return torch.full((num_slots, row_bytes), 0xFF, dtype=torch.uint8)  # parameters of all ones are NaN

    def random_trees(self, random: torch.Generator) -> dict[str, torch.Tensor]:
        """Every query token hangs on an earlier one of its sequence."""
        words = -(-max(self.queries) // 32)
        masks, positions = (
            torch.zeros(sum(self.queries), words * 32, dtype=torch.int64),
            torch.zeros(sum(self.queries), dtype=torch.int32),
        )
        begin = 0
        for queries, context in zip(self.queries, self.contexts, strict=True):
            for q, parent in enumerate(self.random_parents(queries, random)):
                if q:
                    masks[begin + q] = masks[begin + parent]
                masks[begin + q, q] = 1
                positions[begin + q] = context - queries + masks[begin + q].sum() - 1
            begin += queries
        packed = (masks.view(-1, words, 32) << torch.arange(32)).sum(-1)
        return {"tree_masks": torch.where(packed >= 1 << 31, packed - (1 << 32), packed).int(), "positions": positions}

    @staticmethod
    def random_parents(queries: int, random: torch.Generator) -> list[int]:
        """Chains of several drafts after one another, as these are merged: each begins anywhere in what is there.
        How long they are is drawn too, from nodes that hang on anything to a single chain, as of a prompt. In every
        second tree the last token hangs on the root, however deep others are."""
        new_chain = torch.rand(queries, generator=random) < torch.rand((), generator=random).square()
        anywhere = (torch.rand(queries, generator=random) * torch.arange(queries)).long()
        parents = torch.where(new_chain, anywhere, torch.arange(queries) - 1)
        if queries > 1 and torch.rand((), generator=random) < 0.5:
            parents[-1] = 0
        return parents.tolist()


CASES = {
    "decode": Case((1, 1, 1), (1, 37, 130), num_heads=8, head_dim=64),
    "mixed, many heads of one": Case(
        (1, 3, 0, 40), (10, 37, 5, 70), num_heads=6, num_kv_heads=1, head_dim=33, alibi=True
    ),
    "chunks, no groups": Case((5, 40), (37, 90), num_heads=2, head_dim=80),
    "window": Case((1, 5, 40), (100, 37, 90), head_dim=96, window=11),
    "window shorter than a block": Case((1, 3), (100, 37), head_dim=16, window=3),
    "window of chunks": Case((1, 5, 40, 1), (100, 37, 90, 66), head_dim=16, window=33, chunked=True),
    "soft cap": Case((1, 20), (70, 41), head_dim=112, soft_cap=3.0),
    "trees": Case((9, 37, 1), (10, 80, 60), num_heads=6, head_dim=64, tree=True),
    "ALiBi rounded as Falcon does": Case(
        (1, 40, 3), (300, 400, 520), num_heads=6, num_kv_heads=6, head_dim=16, alibi=True, alibi_scale=0.25
    ),
    "trees with rounded ALiBi": Case(
        (9, 34), (30, 380), num_heads=6, head_dim=24, tree=True, alibi=True, alibi_scale=0.2
    ),
    "trees, ALiBi and window": Case((9, 34), (30, 80), num_heads=6, head_dim=24, tree=True, alibi=True, window=6),
    "half precision": Case((2, 13, 1), (10, 60, 130), head_dim=128, dtype=torch.float16),
    "head of 256": Case((1, 2), (33, 20), num_heads=2, num_kv_heads=1, head_dim=256, dtype=torch.float16),
    "8 bits": Case((2, 13, 1), (10, 60, 70), head_dim=96, bits=8),
    "4 bits": Case((2, 13, 1), (10, 60, 70), head_dim=112, dtype=torch.float16, bits=4),
    "decode, 4 bits": Case((1, 1, 0, 1), (1, 37, 5, 130), num_heads=3, num_kv_heads=3, dtype=torch.float16, bits=4),
    "decode, 8 bits, ALiBi": Case(
        (1, 1), (70, 33), num_heads=2, head_dim=128, dtype=torch.float16, bits=8, group=64, alibi=True
    ),
    "sinks, window": Case((1, 5, 40), (100, 37, 90), num_heads=6, head_dim=24, window=11, sinks=True),
    "sinks, decode": Case((1, 1), (130, 3), num_heads=8, head_dim=64, sinks=True),
    "sinks, trees, 8 bits": Case((9, 20), (30, 80), num_heads=6, head_dim=24, tree=True, window=40, bits=8, sinks=True),
    "sinks, decode, 4 bits": Case(
        (1, 1, 0, 1), (1, 37, 5, 130), num_heads=3, num_kv_heads=3, dtype=torch.float16, bits=4, sinks=True
    ),
    "shared decode, 4 bits": Case(
        (1, 1, 0, 1), (1, 37, 5, 130), num_heads=8, head_dim=128, dtype=torch.float16, bits=4, group=64
    ),
    "shared decode, 8 bits": Case(
        (1, 1), (70, 33), num_heads=24, head_dim=64, dtype=torch.float16, bits=8, group=32, sinks=True, page_tokens=16
    ),
    "shared decode, 4 bits, one group": Case(
        (1, 1), (33, 96), num_heads=6, head_dim=64, dtype=torch.float16, bits=4, group=64, sinks=True
    ),
    "4 bits, short group": Case((1, 20), (40, 41), head_dim=34, bits=4),
}
WINDOWED = [
    (1, "", {}),
    (5, ", 4 bits", {"bits": 4, "group": 8}),
    (19, ", pages of 1", {"page_tokens": 1}),
    (40, "", {}),
    (64, ", 8 bits", {"bits": 8}),
    (64, ", soft cap", {"soft_cap": 3.0}),
    (100, ", ALiBi", {"alibi": True}),
    (32, ", in chunks", {"chunked": True}),
    (200, "", {}),
]
"""Shorter than a page, than a tree, than the context, and longer than all."""
CASES |= {
    f"trees, window of {window}{name}": Case(
        (9, 40, 1, 33), (30, 130, 60, 140), num_heads=6, head_dim=24, tree=True, window=window, **options
    )
    for window, name, options in WINDOWED
}


def awkward(dtype: torch.dtype, shape: tuple[int, ...], group: int, seed: int) -> torch.Tensor:
    """Vectors whose groups hold, by turns, what arithmetic treats apart: NaN (first, last, alone), infinities, zeros
    of both signs, the smallest and the largest numbers there are, a constant."""
    random, limits = torch.Generator().manual_seed(seed), torch.finfo(dtype)
    x, nan, inf = torch.randn(shape, generator=random).to(dtype), torch.nan, torch.inf
    smallest = limits.smallest_normal * limits.eps
    specials = [
        [nan], [-nan], [inf], [-inf], [inf, -inf], [nan, inf], [0.0, -0.0], [-0.0, 0.0],
        [limits.max / 4, -limits.max / 4], [1.25],
        [smallest, -smallest], [3 * smallest, limits.smallest_normal], [limits.smallest_normal * 8, -0.0],
    ]  # fmt: skip
    rows = x.view(-1, shape[-1])
    for i, part in enumerate(part for row in rows for part in row.split(group)):
        chosen = torch.tensor(specials[(i + seed) % len(specials)]).to(dtype)
        everywhere = torch.rand((), generator=random) < 0.5
        places = (
            torch.arange(len(part)) if everywhere else torch.randint(0, len(part), (len(chosen),), generator=random)
        )
        if everywhere or i % 3 == 0:
            part[places] = chosen[torch.randint(0, len(chosen), (len(places),), generator=random)]
        else:
            part[-1 if i % 2 else 0] = chosen[0]
    return x


def assert_same_rows(
    got: torch.Tensor, wanted: torch.Tensor, num_kv_heads: int, head_dim: int, bits: int, group: int, dtype: torch.dtype
) -> None:
    """Bit for bit; of a NaN in quantized rows only that it is one."""
    if bits == 16:
        assert torch.equal(got.view(torch.uint8), wanted.view(torch.uint8))
        return
    codes = 2 * num_kv_heads * reference.code_bytes(head_dim, bits)
    assert torch.equal(got[:, :codes], wanted[:, :codes])
    used = codes + 2 * num_kv_heads * reference.num_groups(head_dim, group) * 2 * dtype.itemsize
    ours, theirs = (rows[:, codes:used].clone().view(dtype) for rows in (got, wanted))
    assert torch.equal(ours.isnan(), theirs.isnan())
    integers = {2: torch.int16, 4: torch.int32}[dtype.itemsize]
    assert torch.equal(ours.view(integers)[~ours.isnan()], theirs.view(integers)[~ours.isnan()])
    assert torch.equal(got[:, used:], wanted[:, used:]), "the padding is written"


TOLERANCE = {torch.float32: 3e-6, torch.float16: 2e-3, torch.bfloat16: 2e-2}
