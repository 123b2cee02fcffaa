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


@triton.jit
def _find_sequence(query_starts, tile, num_sequences, GROUP: tl.constexpr, BLOCK_M: tl.constexpr):
    """The last sequence whose first tile is not after ``tile``. First tiles are bounded from below, rows // BLOCK_M +
    s, without a prefix sum.

    One wide load in place of a binary search, whose loads wait for each other: ten of them took as long as the work
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
def _slots(
    table,
    keys,
    start,
    seen,
    MASKED: tl.constexpr,
    PAGE_TOKENS: tl.constexpr,
    PAGE_SLICES: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Token rows of the keys. PAGE_SLICES: one load a page instead of one a key; ``start`` lies on a page's
    boundary."""
    if PAGE_SLICES:
        PAGES: tl.constexpr = BLOCK_N // PAGE_TOKENS
        first = start + tl.arange(0, PAGES) * PAGE_TOKENS
        page = (
            tl.load(table + first // PAGE_TOKENS, mask=seen, other=0)
            if MASKED
            else tl.load(table + first // PAGE_TOKENS)
        )
        slot = (page.to(tl.int64)[:, None] * PAGE_TOKENS + tl.arange(0, PAGE_TOKENS)[None, :]).reshape((BLOCK_N,))
    else:
        page = (
            tl.load(table + keys // PAGE_TOKENS, mask=seen, other=0) if MASKED else tl.load(table + keys // PAGE_TOKENS)
        )
        slot = page.to(tl.int64) * PAGE_TOKENS + keys % PAGE_TOKENS
    return slot


@triton.jit
def _expand(rows, parameters, slot, seen, vector, row_stride, parameter_stride, VECTORS: tl.constexpr, HEAD_DIM: tl.constexpr, BITS: tl.constexpr,
            GROUPS: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_B: tl.constexpr):  # fmt: skip
    """Two tiles [keys, BLOCK_G * BLOCK_B] of one quantised vector: 4 bits, its even and its odd elements; 8 bits,
    all elements twice."""
    CODE_BYTES: tl.constexpr = (HEAD_DIM * BITS + 7) // 8
    CODE_END: tl.constexpr = VECTORS * CODE_BYTES // (parameters.dtype.element_ty.primitive_bitwidth // 8)
    group = tl.arange(0, BLOCK_G)[None, :, None]
    byte = group * BLOCK_B + tl.arange(0, BLOCK_B)[None, None, :]
    slot = slot[:, None, None]
    seen = seen[:, None, None]
    codes = tl.load(rows + slot * row_stride + vector * CODE_BYTES + byte, mask=seen & (byte < CODE_BYTES), other=0)
    pair = parameters + slot * parameter_stride + CODE_END + (vector * GROUPS + group) * 2
    scale = tl.load(pair, mask=seen & (group < GROUPS), other=0.0).to(tl.float32)
    minimum = tl.load(pair + 1, mask=seen & (group < GROUPS), other=0.0).to(tl.float32)
    even = codes & 15 if BITS == 4 else codes
    odd = codes >> 4 if BITS == 4 else codes
    shape: tl.constexpr = (slot.shape[0], BLOCK_G * BLOCK_B)
    even = (even.to(tl.float32) * scale + minimum).to(parameters.dtype.element_ty).reshape(shape)
    odd = (odd.to(tl.float32) * scale + minimum).to(parameters.dtype.element_ty).reshape(shape)
    return even, odd


@triton.jit
def _rounded(x):
    """To the nearest bfloat16, ties to even; the interpreter's own conversion truncates."""
    bits = x.to(tl.int32, bitcast=True)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) & -65536).to(tl.float32, bitcast=True)


@triton.jit
def _scores(score, slopes, place, token, q, keys, prefix, first_token, hi, positions, tree_masks, mask_words, window, scale, soft_cap, alibi_scale,
            MASKED: tl.constexpr, ALIBI: tl.constexpr, WINDOW: tl.constexpr, SOFT_CAP: tl.constexpr, TREE: tl.constexpr):  # fmt: skip
    """Raw products to masked scores in units of log 2; without ALiBi and soft cap the caller folds the scale into
    the exponent."""
    LOG2_E: tl.constexpr = 1.4426950408889634
    if SOFT_CAP:  # tanh(x) = 2 sigmoid(2 x) - 1
        score = 2.0 * tl.sigmoid(2.0 * score * (scale / soft_cap)) - 1.0
    if SOFT_CAP or ALIBI:
        score = score * ((soft_cap if SOFT_CAP else scale) * LOG2_E)
    key_place = keys
    if TREE and MASKED:
        key_place = tl.where(
            keys < prefix,
            keys,
            tl.load(positions + first_token + keys - prefix, mask=(keys >= prefix) & (keys < hi), other=0),
        )
    distance = place[:, None] - key_place[None, :]
    if ALIBI == 2:
        bias = (
            _rounded(_rounded(slopes)[:, None] * _rounded(key_place.to(tl.float32))[None, :])
            - slopes[:, None] * place.to(tl.float32)[:, None]
        )
        score = score + (alibi_scale * LOG2_E) * bias
    elif ALIBI:
        score = score - (slopes * LOG2_E)[:, None] * distance.to(tl.float32)
    if MASKED:
        visible = (keys < hi)[None, :]
        if TREE:
            bit = keys - prefix
            inside = (bit >= 0)[None, :] & visible
            words = tl.load(
                tree_masks + token[:, None] * mask_words + (bit // 32)[None, :],
                mask=inside & (q >= 0)[:, None],
                other=0,
            )
            visible = visible & ((keys < prefix)[None, :] | (((words >> (bit % 32)[None, :]) & 1) != 0))
        else:
            visible = visible & (distance >= 0)
        if WINDOW:
            visible = visible & (distance < window)
        score = tl.where(visible, score, float("-inf"))
    return score


@triton.jit
def _block(start, hi, m, total, acc0, acc1, q0, q1, rows, parameters, table, head, row_stride, parameter_stride,
           slopes, place, token, q, prefix, first_token, positions, tree_masks, mask_words, window, scale, soft_cap, alibi_scale,
           MASKED: tl.constexpr, ALIBI: tl.constexpr, WINDOW: tl.constexpr, SOFT_CAP: tl.constexpr, TREE: tl.constexpr,
           KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, PAGE_TOKENS: tl.constexpr, BITS: tl.constexpr, GROUPS: tl.constexpr,
           BLOCK_G: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_N: tl.constexpr, PAGE_SLICES: tl.constexpr):  # fmt: skip
    """One step of the online softmax: keys [start, start + BLOCK_N)."""
    keys = start + tl.arange(0, BLOCK_N)
    seen = keys < hi
    if PAGE_SLICES:
        slot = _slots(
            table,
            keys,
            start,
            start + tl.arange(0, BLOCK_N // PAGE_TOKENS) * PAGE_TOKENS < hi,
            MASKED,
            PAGE_TOKENS,
            True,
            BLOCK_N,
        )
    else:
        slot = _slots(table, keys, start, seen, MASKED, PAGE_TOKENS, False, BLOCK_N)
    element = tl.arange(0, BLOCK_G * BLOCK_B)[None, :]
    base = rows + (slot * row_stride + head * HEAD_DIM)[:, None] + element
    BARE: tl.constexpr = not MASKED and HEAD_DIM == BLOCK_G * BLOCK_B
    within = (element < HEAD_DIM) & seen[:, None] if MASKED else element < HEAD_DIM
    if BITS == 16:
        k = tl.load(base) if BARE else tl.load(base, mask=within, other=0.0)
        score = tl.dot(q0, tl.trans(k), input_precision="ieee")
    else:
        k0, k1 = _expand(
            rows,
            parameters,
            slot,
            seen,
            head,
            row_stride,
            parameter_stride,
            2 * KV_HEADS,
            HEAD_DIM,
            BITS,
            GROUPS,
            BLOCK_G,
            BLOCK_B,
        )
        score = tl.dot(q0, tl.trans(k0), input_precision="ieee")
        if BITS == 4:
            score = tl.dot(q1, tl.trans(k1), score, input_precision="ieee")
    score = _scores(score, slopes, place, token, q, keys, prefix, first_token, hi, positions, tree_masks, mask_words, window, scale, soft_cap, alibi_scale,
                    MASKED, ALIBI, WINDOW, SOFT_CAP, TREE)  # fmt: skip
    FOLDED: tl.constexpr = not ALIBI and not SOFT_CAP
    step = scale * 1.4426950408889634
    top = tl.maximum(m, tl.max(score, 1) * step if FOLDED else tl.max(score, 1))
    floor = tl.where(top == float("-inf"), 0.0, top) if MASKED else top  # all masked so far: -inf - -inf is no number
    weight = tl.exp2(score * step - floor[:, None] if FOLDED else score - floor[:, None])
    shrink = tl.exp2(m - floor)
    total = total * shrink + tl.sum(weight, 1)
    weight = weight.to(q0.dtype)
    acc0 = acc0 * shrink[:, None]
    if BITS == 16:
        v = tl.load(base + KV_HEADS * HEAD_DIM) if BARE else tl.load(base + KV_HEADS * HEAD_DIM, mask=within, other=0.0)
        acc0 = tl.dot(weight, v, acc0, input_precision="ieee")
    else:
        v0, v1 = _expand(
            rows,
            parameters,
            slot,
            seen,
            KV_HEADS + head,
            row_stride,
            parameter_stride,
            2 * KV_HEADS,
            HEAD_DIM,
            BITS,
            GROUPS,
            BLOCK_G,
            BLOCK_B,
        )
        acc0 = tl.dot(weight, v0, acc0, input_precision="ieee")
        if BITS == 4:
            acc1 = tl.dot(weight, v1, acc1 * shrink[:, None], input_precision="ieee")
    return top, total, acc0, acc1


@triton.jit
def _attend(row0, num_rows, first_token, context, head, query, query_stride, rows, parameters, table, row_stride, parameter_stride, out, statistics,
            num_tokens, slopes_of, positions, tree_masks, mask_words, window, scale, soft_cap, alibi_scale, BLOCK_M: tl.constexpr, SPLIT: tl.constexpr,
            GROUP: tl.constexpr, ALIBI: tl.constexpr, WINDOW: tl.constexpr, SOFT_CAP: tl.constexpr, TREE: tl.constexpr, KV_HEADS: tl.constexpr,
            HEAD_DIM: tl.constexpr, PAGE_TOKENS: tl.constexpr, BITS: tl.constexpr, GROUPS: tl.constexpr, BLOCK_G: tl.constexpr,
            BLOCK_B: tl.constexpr, BLOCK_N: tl.constexpr, PAGE_SLICES: tl.constexpr):  # fmt: skip
    """A tile of BLOCK_M query rows from ``row0`` of one sequence, against this program's split of the keys."""
    PIECES: tl.constexpr = 2 if BITS == 4 else 1
    NUM_HEADS: tl.constexpr = KV_HEADS * GROUP
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
    place = tl.load(positions + token, mask=valid, other=0) if TREE else prefix + q
    slopes = tl.load(slopes_of + query_head) if ALIBI else scale
    first_q = row0 // GROUP
    end = context if TREE else tl.minimum(context, prefix + (tl.minimum(row0 + BLOCK_M, num_rows) - 1) // GROUP + 1)
    begin = 0
    if WINDOW:
        begin = tl.maximum(tl.min(tl.where(valid, place, context)) - window + 1, 0) // BLOCK_N * BLOCK_N
    share = tl.cdiv(tl.cdiv(end - begin, BLOCK_N), tl.num_programs(1)) * BLOCK_N
    lo = begin + tl.program_id(1) * share
    hi = tl.minimum(lo + share, end)
    whole = lo  # keys before this need no mask: every row of the tile sees them
    if not WINDOW:
        whole = tl.maximum(
            lo + (tl.minimum(prefix if TREE else prefix + first_q + 1, hi) - lo) // BLOCK_N * BLOCK_N, lo
        )
    m = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc0 = tl.zeros([BLOCK_M, BLOCK_G * BLOCK_B], tl.float32)
    acc1 = acc0 if BITS == 4 else total
    for start in range(lo, whole, BLOCK_N):
        m, total, acc0, acc1 = _block(start, hi, m, total, acc0, acc1, q0, q1, rows, parameters, table, head, row_stride, parameter_stride,
                                      slopes, place, token, q, prefix, first_token, positions, tree_masks, mask_words, window, scale, soft_cap, alibi_scale,
                                      False, ALIBI, WINDOW, SOFT_CAP, TREE, KV_HEADS, HEAD_DIM, PAGE_TOKENS, BITS, GROUPS, BLOCK_G, BLOCK_B,
                                      BLOCK_N, PAGE_SLICES)  # fmt: skip
    for start in range(whole, hi, BLOCK_N):
        m, total, acc0, acc1 = _block(start, hi, m, total, acc0, acc1, q0, q1, rows, parameters, table, head, row_stride, parameter_stride,
                                      slopes, place, token, q, prefix, first_token, positions, tree_masks, mask_words, window, scale, soft_cap, alibi_scale,
                                      True, ALIBI, WINDOW, SOFT_CAP, TREE, KV_HEADS, HEAD_DIM, PAGE_TOKENS, BITS, GROUPS, BLOCK_G, BLOCK_B,
                                      BLOCK_N, PAGE_SLICES)  # fmt: skip
    index = token * NUM_HEADS + query_head
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
# every number of splits as a constant (a second each, in the middle of a job).
@triton.jit(do_not_specialize=["num_sequences", "num_tokens", "max_pages", "mask_words", "window"])
def attention_kernel(query, rows, parameters, page_table, query_starts, context_lens, out, statistics, slopes, positions, tree_masks,
                      num_sequences, num_tokens, query_stride, row_stride, parameter_stride, max_pages, mask_words, window, scale, soft_cap, alibi_scale,
                      BLOCK_M: tl.constexpr, SMALL_M: tl.constexpr, SPLIT: tl.constexpr, GROUP: tl.constexpr, ALIBI: tl.constexpr,
                      WINDOW: tl.constexpr, SOFT_CAP: tl.constexpr, TREE: tl.constexpr, KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr,
                      PAGE_TOKENS: tl.constexpr, BITS: tl.constexpr, GROUPS: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_B: tl.constexpr,
                      BLOCK_N: tl.constexpr, PAGE_SLICES: tl.constexpr, ONE_TILE: tl.constexpr):  # fmt: skip
    """Grid (KV heads x tiles, splits). Heads vary fastest: programs running together read neighbouring memory.

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
        if SMALL_M > 0:  # noqa: SIM102 (a compile-time condition: joined with the next one it would be taken at run time)
            if num_rows <= SMALL_M:
                _attend(row0, num_rows, first_token, context, head, query, query_stride, rows, parameters, table, row_stride, parameter_stride, out,
                        statistics, num_tokens, slopes, positions, tree_masks, mask_words, window, scale, soft_cap, alibi_scale, SMALL_M, SPLIT, GROUP, ALIBI,
                        WINDOW, SOFT_CAP, TREE, KV_HEADS, HEAD_DIM, PAGE_TOKENS, BITS, GROUPS, BLOCK_G, BLOCK_B, BLOCK_N, PAGE_SLICES)  # fmt: skip
        if BLOCK_M > SMALL_M:  # noqa: SIM102
            if num_rows > SMALL_M:
                _attend(row0, num_rows, first_token, context, head, query, query_stride, rows, parameters, table, row_stride, parameter_stride, out,
                        statistics, num_tokens, slopes, positions, tree_masks, mask_words, window, scale, soft_cap, alibi_scale, BLOCK_M, SPLIT, GROUP, ALIBI,
                        WINDOW, SOFT_CAP, TREE, KV_HEADS, HEAD_DIM, PAGE_TOKENS, BITS, GROUPS, BLOCK_G, BLOCK_B, BLOCK_N, PAGE_SLICES)  # fmt: skip


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
