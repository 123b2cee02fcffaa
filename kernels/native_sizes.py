"""Memory that a call of the compiled attention takes beside its tensors, at most: what a planner counts before there
is a call."""

from __future__ import annotations

# As in native_attention.h. The widest vectors there are; narrower ones take less.
LANES, KEYS, TILE, SPLIT_ELEMENTS, SPLIT_KEYS, SPLIT_QUERIES, ITEM_BYTES = 16, 32, 64, 1 << 19, 512, 32, 40


def split_keys(heads: int, head_dim: int) -> int:
    """Keys of one part of a cut context, whose items have so many heads."""
    keys = -(-(SPLIT_ELEMENTS // (2 * heads * head_dim)) // KEYS) * KEYS
    return min(max(keys, 2 * KEYS), SPLIT_KEYS)


def workspace_bytes(
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    sequences: int,
    tokens: int,
    most_queries: int,
    longest: int,
    threads: int,
) -> int:
    """An upper bound for ``sequences`` with together ``tokens`` query tokens, ``most_queries`` each and ``longest``
    keys at most.

    Every thread has a scratch. Sequences of few query tokens are cut, and of those at most one more than there are
    threads has partial results at a time.
    """
    if sequences == 0:
        return 0
    group, width = num_heads // num_kv_heads, -(-head_dim // LANES) * LANES
    few = LANES * num_kv_heads * (2 * width + KEYS + 2) + LANES + 4 * width
    many = TILE * (2 * width + KEYS + 4) + 2 * KEYS * width
    tiles = num_kv_heads * (24 * width + LANES * (KEYS + 3)) + KEYS * (width + LANES)
    queries = min(most_queries, SPLIT_QUERIES)
    slot = items = 0
    for count, heads in ((min(queries, max(1, LANES // group)), num_kv_heads), (queries, 1)):
        parts = -(-longest // split_keys(heads, head_dim))
        slot = max(slot, parts * count * num_heads * (head_dim + 2) + 16)
        items = max(items, parts * num_kv_heads // heads * -(-count * group // TILE))
    num_items = sequences * items + num_kv_heads * (tokens * group // TILE + sequences)
    num_floats = threads * (max(few, many, tiles) + 16) + min(sequences, threads + 1) * slot
    return 4 * num_floats + ITEM_BYTES * num_items + 12 * sequences + 6 * 64
