"""The Triton kernels of paged attention; `attention` launches them and documents the layout.

The query rows of a sequence are its query tokens times the heads of one group (row = token * group + head in group),
so that a key or value is loaded once for all of them. A program takes one tile of rows of one sequence and one KV
head, against all keys or one split of them (flash-decoding: Dao et al. 2023, "Flash-Decoding for long-context
inference"; the online softmax is FlashAttention-2's, Dao 2023).
"""

# mypy: allow-incomplete-defs, allow-untyped-defs
# Triton functions annotate their constants only: the other arguments have no Python type.

from __future__ import annotations

import triton
import triton.language as tl

from flexbatch.kernels.attention_tiles import TABLES, softmax_step
from flexbatch.kernels.launched import launched


@triton.jit
def _find_sequence(query_starts, tile, num_sequences, GROUP: tl.constexpr, BLOCK_M: tl.constexpr):
    """The last sequence whose first tile is not after ``tile``. First tiles are bounded from below, rows // BLOCK_M +
    s, without a prefix sum.

    One wide load instead of a binary search, whose loads wait for each other: ten of them took as long as the work
    of a short tile.
    """
    count = 0
    for first in range(0, num_sequences, 256):
        sequence = first + tl.arange(0, 256)
        start = tl.load(query_starts + sequence, mask=sequence < num_sequences, other=0)
        before = (sequence < num_sequences) & (start * GROUP // BLOCK_M + sequence <= tile)
        count += tl.sum(before.to(tl.int32), 0)
    return count - 1


@triton.jit
def _attend(
    row0, num_rows, first_token, context, head, query, query_stride, rows, parameters, table, row_stride,
    parameter_stride, out, statistics, num_tokens, slopes_of, sinks_of, positions, tree_masks, mask_words, window,
    scale, soft_cap, alibi_scale, BLOCK_M: tl.constexpr, SPLIT: tl.constexpr, GROUP: tl.constexpr, ALIBI: tl.constexpr,
    SINKS: tl.constexpr, WINDOW: tl.constexpr, SOFT_CAP: tl.constexpr, TREE: tl.constexpr, KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr, PAGE_TOKENS: tl.constexpr, BITS: tl.constexpr, GROUPS: tl.constexpr,
    BLOCK_G: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """A tile of BLOCK_M query rows from ``row0`` of one sequence, against this program's split of the keys."""
    PIECES: tl.constexpr = 2 if BITS == 4 else 1
    row = row0 + tl.arange(0, BLOCK_M)
    valid = row < num_rows
    # -1 beyond the sequence's last row: what is loaded for a query token is loaded where it is not negative.
    q = tl.where(valid, row // GROUP, -1)
    token = (first_token + q).to(tl.int64)
    query_head = head * GROUP + row % GROUP
    element = tl.arange(0, BLOCK_G * BLOCK_B) * PIECES
    source = query + (token * query_stride + query_head * HEAD_DIM)[:, None] + element[None, :]
    q0 = tl.load(source, mask=valid[:, None] & (element < HEAD_DIM)[None, :], other=0.0)
    q1 = tl.load(source + 1, mask=valid[:, None] & (element + 1 < HEAD_DIM)[None, :], other=0.0) if BITS == 4 else q0
    prefix = context - num_rows // GROUP
    position = tl.load(positions + token, mask=valid, other=0) if TREE else prefix + q
    slopes = tl.load(slopes_of + query_head) if ALIBI else scale
    lo, whole, hi = _key_range(row0, num_rows, context, prefix, position, valid, window, BLOCK_M, GROUP, WINDOW, TREE,
                               BLOCK_N)  # fmt: skip
    m = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    if SINKS:  # of one of the splits: the softmax begins as if a key with this score and no value had been added
        first = tl.program_id(1) == 0
        m = tl.where(first, tl.load(sinks_of + query_head).to(tl.float32) * 1.4426950408889634, m)
        total = tl.where(first, total + 1.0, total)
    acc0 = tl.zeros([BLOCK_M, BLOCK_G * BLOCK_B], tl.float32)
    acc1 = acc0 if BITS == 4 else total
    for start in range(lo, whole, BLOCK_N):
        m, total, acc0, acc1 = softmax_step(
            start, hi, m, total, acc0, acc1, q0, q1, rows, parameters, table, head, row_stride, parameter_stride,
            slopes, position, token, q, prefix, first_token, positions, tree_masks, mask_words, window, scale, soft_cap,
            alibi_scale, False, ALIBI, WINDOW, SOFT_CAP, TREE, KV_HEADS, HEAD_DIM, PAGE_TOKENS, BITS, GROUPS, BLOCK_G,
            BLOCK_B, BLOCK_N,
        )  # fmt: skip
    for start in range(whole, hi, BLOCK_N):
        m, total, acc0, acc1 = softmax_step(
            start, hi, m, total, acc0, acc1, q0, q1, rows, parameters, table, head, row_stride, parameter_stride,
            slopes, position, token, q, prefix, first_token, positions, tree_masks, mask_words, window, scale, soft_cap,
            alibi_scale, True, ALIBI, WINDOW, SOFT_CAP, TREE, KV_HEADS, HEAD_DIM, PAGE_TOKENS, BITS, GROUPS, BLOCK_G,
            BLOCK_B, BLOCK_N,
        )  # fmt: skip
    index = token * (KV_HEADS * GROUP) + query_head
    _store(out, statistics, index, element, valid, m, total, acc0, acc1, num_tokens, SPLIT, KV_HEADS * GROUP, HEAD_DIM,
           BITS)  # fmt: skip


@triton.jit
def _key_range(
    row0, num_rows, context, prefix, position, valid, window, BLOCK_M: tl.constexpr, GROUP: tl.constexpr,
    WINDOW: tl.constexpr, TREE: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """This program's split of the keys that a tile of query rows sees: its first key, the first that needs a mask
    (every row of the tile sees those before), and its end."""
    first_q = row0 // GROUP
    end = context if TREE else tl.minimum(context, prefix + (tl.minimum(row0 + BLOCK_M, num_rows) - 1) // GROUP + 1)
    begin = 0
    if WINDOW:
        lowest = tl.min(tl.where(valid, position, context))
        begin = lowest // window * window if WINDOW == 2 else tl.maximum(lowest - window + 1, 0)
        begin = begin // BLOCK_N * BLOCK_N
    share = tl.cdiv(tl.cdiv(end - begin, BLOCK_N), tl.num_programs(1)) * BLOCK_N
    lo = begin + tl.program_id(1) * share
    hi = tl.minimum(lo + share, end)
    whole = lo
    if not WINDOW:
        unmasked = tl.minimum(prefix if TREE else prefix + first_q + 1, hi)
        whole = tl.maximum(lo + (unmasked - lo) // BLOCK_N * BLOCK_N, lo)
    return lo, whole, hi


@triton.jit
def _store(
    out, statistics, index, element, valid, m, total, acc0, acc1, num_tokens, SPLIT: tl.constexpr,
    NUM_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, BITS: tl.constexpr,
):  # fmt: skip
    """Write a tile's result, or with SPLIT what `combine_kernel` needs of it. index: (token, head) of every row."""
    if SPLIT:
        index += tl.program_id(1).to(tl.int64) * num_tokens * NUM_HEADS
        tl.store(statistics + index * 2, m, mask=valid)
        tl.store(statistics + index * 2 + 1, total, mask=valid)
    else:
        acc0 = acc0 / total[:, None]
        acc1 = acc1 / total[:, None] if BITS == 4 else acc1
    target = out + (index * HEAD_DIM)[:, None] + element[None, :]
    tl.store(target, acc0.to(out.dtype.element_ty), mask=valid[:, None] & (element < HEAD_DIM)[None, :])
    if BITS == 4:
        tl.store(target + 1, acc1.to(out.dtype.element_ty), mask=valid[:, None] & (element + 1 < HEAD_DIM)[None, :])


# Sizes of a batch change from pass to pass. Triton compiles an integer that is 1, or a multiple of 16, anew, and so
# every number of splits as a constant (a second each, in the middle of a job); and a table that starts at a multiple of
# 16 bytes or does not: four kernels of up to 5 s each.
@launched
@triton.jit(do_not_specialize=[*TABLES, "num_sequences", "num_tokens", "max_pages", "mask_words", "window"])
def attention_kernel(
    query, rows, parameters, page_table, query_starts, context_lens, out, statistics, slopes, sinks, positions,
    tree_masks, num_sequences, num_tokens, query_stride, row_stride, parameter_stride, max_pages, mask_words, window,
    scale, soft_cap, alibi_scale, BLOCK_M: tl.constexpr, SMALL_M: tl.constexpr, SPLIT: tl.constexpr,
    GROUP: tl.constexpr, ALIBI: tl.constexpr, SINKS: tl.constexpr, WINDOW: tl.constexpr, SOFT_CAP: tl.constexpr,
    TREE: tl.constexpr, KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, PAGE_TOKENS: tl.constexpr, BITS: tl.constexpr,
    GROUPS: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_N: tl.constexpr, ONE_TILE: tl.constexpr,
):  # fmt: skip
    """Grid (KV heads x tiles, splits). Heads vary fastest: programs running together read neighboring memory.

    Later tiles of a prompt see more keys and start first, so that the last programs to finish are short. ONE_TILE:
    no sequence has more rows than a tile.
    """
    head = tl.program_id(0) % KV_HEADS
    tile = tl.program_id(0) // KV_HEADS
    if ONE_TILE:
        sequence = tile
    else:
        tile = tl.num_programs(0) // KV_HEADS - 1 - tile
        sequence = _find_sequence(query_starts, tile, num_sequences, GROUP, BLOCK_M)
    first_token = tl.load(query_starts + sequence)
    num_rows = (tl.load(query_starts + sequence + 1) - first_token) * GROUP
    row0 = tile * 0 if ONE_TILE else (tile - (first_token * GROUP // BLOCK_M + sequence)) * BLOCK_M
    table = page_table + sequence.to(tl.int64) * max_pages
    if row0 < num_rows:
        context = tl.load(context_lens + sequence)
        # Compile-time conditions: joined with the ones inside they would be taken at run time.
        if SMALL_M > 0:  # noqa: SIM102
            if num_rows <= SMALL_M:
                _attend(
                    row0, num_rows, first_token, context, head, query, query_stride, rows, parameters, table,
                    row_stride, parameter_stride, out, statistics, num_tokens, slopes, sinks, positions, tree_masks,
                    mask_words, window, scale, soft_cap, alibi_scale, SMALL_M, SPLIT, GROUP, ALIBI, SINKS, WINDOW,
                    SOFT_CAP, TREE, KV_HEADS, HEAD_DIM, PAGE_TOKENS, BITS, GROUPS, BLOCK_G, BLOCK_B, BLOCK_N,
                )  # fmt: skip
        if BLOCK_M > SMALL_M:  # noqa: SIM102
            if num_rows > SMALL_M:
                _attend(
                    row0, num_rows, first_token, context, head, query, query_stride, rows, parameters, table,
                    row_stride, parameter_stride, out, statistics, num_tokens, slopes, sinks, positions, tree_masks,
                    mask_words, window, scale, soft_cap, alibi_scale, BLOCK_M, SPLIT, GROUP, ALIBI, SINKS, WINDOW,
                    SOFT_CAP, TREE, KV_HEADS, HEAD_DIM, PAGE_TOKENS, BITS, GROUPS, BLOCK_G, BLOCK_B, BLOCK_N,
                )  # fmt: skip


@launched
@triton.jit(do_not_specialize=["num_rows"])
def combine_kernel(
    partial,
    statistics,
    out,
    num_rows,
    SPLITS: tl.constexpr,
    BLOCK_S: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One (token, head) from its splits. Grid (num_rows,); partial [SPLITS, num_rows, HEAD_DIM], statistics [SPLITS,
    num_rows, 2]."""
    split = tl.arange(0, BLOCK_S)
    element = tl.arange(0, BLOCK_D)
    index = split.to(tl.int64) * num_rows + tl.program_id(0)
    m = tl.load(statistics + index * 2, mask=split < SPLITS, other=float("-inf"))
    weight = tl.exp2(m - tl.max(m, 0))
    total = tl.sum(weight * tl.load(statistics + index * 2 + 1, mask=split < SPLITS, other=0.0), 0)
    parts = tl.load(
        partial + index[:, None] * HEAD_DIM + element[None, :],
        mask=(split < SPLITS)[:, None] & (element < HEAD_DIM)[None, :],
        other=0.0,
    )
    result = tl.sum(parts * weight[:, None], 0) / total
    tl.store(
        out + tl.program_id(0).to(tl.int64) * HEAD_DIM + element,
        result.to(out.dtype.element_ty),
        mask=element < HEAD_DIM,
    )
