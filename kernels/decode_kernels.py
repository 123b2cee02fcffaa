"""Attention of one query token a sequence over a quantized cache whose heads are not shared: no tensor cores.

A tensor core tile would be one sixteenth full, and would want its operands dequantized to 16 bits and moved to its own
layout. Here codes stay where they were loaded, become floats by two integer instructions, and scale and minimum are
applied to the sums of a group. Every key of a tile keeps an online softmax of its own, merged at the end, so that
threads of different keys never wait for each other within the loop.
"""

# mypy: allow-incomplete-defs, allow-untyped-defs
# Triton functions annotate their constants only: the other arguments have no Python type.

from __future__ import annotations

import triton
import triton.language as tl

from flexbatch.kernels.attention_tiles import TABLES
from flexbatch.kernels.launched import launched


@triton.jit
def _codes(words, BITS: tl.constexpr):
    """[keys, groups, words] of int32 to [keys, groups, elements] of 2^BITS + code: each code is shifted to the top
    of a float's mantissa."""
    SIZE: tl.constexpr = 32 // BITS * words.shape[2]
    SHAPE: tl.constexpr = (words.shape[0], words.shape[1], SIZE)
    x = tl.join(words << 7, words >> 9)
    x = tl.join(x << 8, x)
    if BITS == 4:
        x = tl.join(x << 4, x)
        x = (x & 0x00780000) | 0x41800000
    else:
        x = (x & 0x007F8000) | 0x43800000
    return x.reshape(SHAPE).to(tl.float32, bitcast=True)


@triton.jit
def _parameters(pair, dtype: tl.constexpr, BITS: tl.constexpr):
    """Scale, and minimum less what `_codes` adds, of pairs of two 16-bit floats."""
    scale = pair.to(tl.int16).to(dtype, bitcast=True).to(tl.float32)
    minimum = (pair >> 16).to(tl.int16).to(dtype, bitcast=True).to(tl.float32)
    return scale, minimum - scale * (1 << BITS)


@launched
@triton.jit(do_not_specialize=[*TABLES, "num_tokens", "max_pages"])
def decode_kernel(
    query, words, page_table, query_starts, context_lens, out, statistics, slopes, sinks, num_tokens, query_stride,
    row_quads, max_pages, scale, SPLIT: tl.constexpr, ALIBI: tl.constexpr, SINKS: tl.constexpr, HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr, PAGE_TOKENS: tl.constexpr, BITS: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_W: tl.constexpr,
    BLOCK_N: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Grid (heads x sequences, splits). words: token rows as int32, ``row_quads`` times four of them apart; heads of
    BLOCK_G groups of BLOCK_W words."""
    head = tl.program_id(0) % HEADS
    sequence = tl.program_id(0) // HEADS
    token = tl.load(query_starts + sequence).to(tl.int64)
    if tl.load(query_starts + sequence + 1) > token:
        element = tl.arange(0, BLOCK_G)[:, None] * (BLOCK_W * 32 // BITS) + tl.arange(0, BLOCK_W * 32 // BITS)[None, :]
        source = query + token * query_stride + head * HEAD_DIM + element
        q = tl.load(source).to(tl.float32) * (scale * 1.4426950408889634)  # scores in units of log 2
        slope = tl.load(slopes + head) * 1.4426950408889634 if ALIBI else scale
        context = tl.load(context_lens + sequence)
        table = page_table + sequence.to(tl.int64) * max_pages
        top, total, result = _attend(q, slope, words, table, context, head, row_quads, query.dtype.element_ty, ALIBI,
                                     HEADS, PAGE_TOKENS, BITS, BLOCK_G, BLOCK_W, BLOCK_N, STAGES)  # fmt: skip
        if SINKS:  # of one of the splits
            sink = tl.load(sinks + head).to(tl.float32) * 1.4426950408889634
            sink = tl.where(tl.program_id(1) == 0, sink, float("-inf"))
            before, top = top, tl.maximum(top, sink)
            floor = tl.where(top == float("-inf"), 0.0, top)
            total = total * tl.exp2(before - floor) + tl.exp2(sink - floor)
            result = result * tl.exp2(before - floor)
        index = token * HEADS + head
        if SPLIT:
            index += tl.program_id(1).to(tl.int64) * num_tokens * HEADS
            tl.store(statistics + index * 2, top)
            tl.store(statistics + index * 2 + 1, total)
        else:
            result = result / total
        tl.store(out + index * HEAD_DIM + element, result.to(out.dtype.element_ty))


@triton.jit
def _attend(
    q, slope, words, table, context, head, row_quads, dtype: tl.constexpr, ALIBI: tl.constexpr, HEADS: tl.constexpr,
    PAGE_TOKENS: tl.constexpr, BITS: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_W: tl.constexpr, BLOCK_N: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """A query q [BLOCK_G, elements of a group] against this program's split of the keys: the largest score, the sum of
    weights relative to it, and the weighted sum of values."""
    ELEMENTS: tl.constexpr = BLOCK_W * 32 // BITS
    HEAD_WORDS: tl.constexpr = BLOCK_G * BLOCK_W
    CODE_END: tl.constexpr = 2 * HEADS * HEAD_WORDS
    q_sum = tl.sum(q, 1)
    group = tl.arange(0, BLOCK_G)[None, :]
    word = tl.arange(0, BLOCK_G)[None, :, None] * BLOCK_W + tl.arange(0, BLOCK_W)[None, None, :]
    share = tl.cdiv(tl.cdiv(context, BLOCK_N), tl.num_programs(1)) * BLOCK_N
    lo = tl.program_id(1) * share
    hi = tl.minimum(lo + share, context)
    m = tl.full([BLOCK_N], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_N], tl.float32)
    acc = tl.zeros([BLOCK_N, BLOCK_G, ELEMENTS], tl.float32)
    base = tl.zeros([BLOCK_N, BLOCK_G], tl.float32)
    for start in tl.range(lo, hi, BLOCK_N, num_stages=STAGES):
        key = start + tl.arange(0, BLOCK_N)
        seen = key < hi
        page = tl.load(table + key // PAGE_TOKENS, mask=seen, other=0)
        row = words + (page.to(tl.int64) * PAGE_TOKENS + key % PAGE_TOKENS) * (row_quads * 4)
        code = row[:, None, None] + head * HEAD_WORDS + word
        pair = row[:, None] + CODE_END + head * BLOCK_G + group
        k = tl.load(code, mask=seen[:, None, None], other=0)
        k_pair = tl.load(pair, mask=seen[:, None], other=0)
        v = tl.load(code + HEADS * HEAD_WORDS, mask=seen[:, None, None], other=0)
        v_pair = tl.load(pair + HEADS * BLOCK_G, mask=seen[:, None], other=0)
        k_scale, k_minimum = _parameters(k_pair, dtype, BITS)
        score = tl.sum(tl.sum(_codes(k, BITS) * q[None, :, :], 2) * k_scale + k_minimum * q_sum[None, :], 1)
        if ALIBI:
            score -= slope * (context - 1 - key).to(tl.float32)
        score = tl.where(seen, score, float("-inf"))
        top = tl.maximum(m, score)
        floor = tl.where(top == float("-inf"), 0.0, top)
        weight = tl.exp2(score - floor)
        shrink = tl.exp2(m - floor)
        m = top
        total = total * shrink + weight
        v_scale, v_minimum = _parameters(v_pair, dtype, BITS)
        base = base * shrink[:, None] + weight[:, None] * v_minimum
        acc = acc * shrink[:, None, None] + (weight[:, None] * v_scale)[:, :, None] * _codes(v, BITS)
    top = tl.max(m, 0)
    rescale = tl.exp2(m - tl.where(top == float("-inf"), 0.0, top))
    result = tl.sum(acc * rescale[:, None, None], 0) + tl.sum(base * rescale[:, None], 0)[:, None]
    return top, tl.sum(total * rescale, 0), result
