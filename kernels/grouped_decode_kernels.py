"""Attention of one query token a sequence over a quantized cache whose heads are shared by up to eight query heads.

Tensor cores multiply codes: they are small integers, exact in 16 bits, so that scale and minimum of a group are applied
to its products, not to its elements. Keys are the left operand and the query heads of a key-value head the right one,
whose tile of eight is half as wide as the least on the left.
"""

# mypy: allow-incomplete-defs, allow-untyped-defs
# Triton functions annotate their constants only: the other arguments have no Python type.

from __future__ import annotations

import triton
import triton.language as tl

from flexbatch.kernels.attention_tiles import TABLES
from flexbatch.kernels.code_tiles import (
    columns_of_codes,
    elements_of_columns,
    elements_of_rows,
    of_numbers,
    rows_of_codes,
    scale_and_minimum,
)
from flexbatch.kernels.launched import launched


@triton.jit
def _scores(words, pair, q, q_sum, step, lift, BITS: tl.constexpr):
    """[keys, heads] of one group, in units of log 2. q [elements, heads], ``q_sum`` their sums times ``step``."""
    scale, minimum = scale_and_minimum(pair, q.dtype)
    scale, minimum = of_numbers(scale, minimum, q.dtype, BITS)
    products = tl.dot(rows_of_codes(words, lift, q.dtype, BITS), q, input_precision="ieee")
    return products * (scale * step)[:, None] + minimum[:, None] * q_sum[None, :]


@triton.jit
def _add_values(
    weight, pair, first, second, acc, base, shrink, lift, dtype: tl.constexpr, product: tl.constexpr,
    BITS: tl.constexpr,
):  # fmt: skip
    """Values of one group: acc [elements, heads] of weights times scales times codes, and what else they weigh, base
    [keys, heads]. Weights times scales are rounded to bfloat16, whose range holds them; what is lost is that of the
    distance from the middle code: a twentieth of what quantization to 4 bits loses."""
    MIDDLE: tl.constexpr = 1 << (BITS - 1)
    OFFSET: tl.constexpr = MIDDLE + (128 if product == tl.bfloat16 and BITS == 4 else 0)
    scale, minimum = scale_and_minimum(pair, dtype)
    scaled = (weight * scale[:, None]).to(product)
    minimum = minimum + MIDDLE * scale
    base = base * shrink[None, :] + (weight * minimum[:, None] - OFFSET * scaled.to(tl.float32))
    codes = columns_of_codes(first, second, lift, product, BITS)
    return tl.dot(codes, scaled, acc * shrink[None, :], input_precision="ieee"), base


@triton.jit
def _rows_at(words, table, key, hi, row_quads, PAGE_TOKENS: tl.constexpr, MASKED: tl.constexpr):
    """The token rows of keys, and whether they are keys of this split."""
    seen = key < hi
    entry = table + key // PAGE_TOKENS
    page = tl.load(entry, mask=seen, other=0) if MASKED else tl.load(entry)
    return words + (page.to(tl.int64) * PAGE_TOKENS + key % PAGE_TOKENS) * (row_quads * 4), seen


@triton.jit
def _load(address, seen, MASKED: tl.constexpr):
    return tl.load(address, mask=seen, other=0) if MASKED else tl.load(address)


@triton.jit
def _step(
    start, hi, m, total, acc0, acc1, base0, base1, q0, q1, sum0, sum1, step, words, table, head, row_quads, lift,
    MASKED: tl.constexpr, product: tl.constexpr, HEADS: tl.constexpr, PAGE_TOKENS: tl.constexpr, BITS: tl.constexpr,
    GROUPS: tl.constexpr, WORDS: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One step of the online softmax over keys [start, start + BLOCK_N), those of its second half between those of its
    first. ``total`` and the bases are summed over their keys at the end."""
    HALF: tl.constexpr = BLOCK_N // 2
    SIDE: tl.constexpr = HEADS * GROUPS * WORDS
    dtype: tl.constexpr = q0.dtype
    index = tl.arange(0, BLOCK_N)
    word = (head * GROUPS * WORDS + tl.arange(0, WORDS))[None, :]
    row, seen = _rows_at(words, table, start + index // 2 + index % 2 * HALF, hi, row_quads, PAGE_TOKENS, MASKED)
    early, early_seen = _rows_at(words, table, start + tl.arange(0, HALF), hi, row_quads, PAGE_TOKENS, MASKED)
    late, late_seen = _rows_at(words, table, start + HALF + tl.arange(0, HALF), hi, row_quads, PAGE_TOKENS, MASKED)
    pair = row + 2 * SIDE + head * GROUPS
    k0 = _load(row[:, None] + word, seen[:, None], MASKED)
    k_pair0 = _load(pair, seen, MASKED)
    v_pair0 = _load(pair + HEADS * GROUPS, seen, MASKED)
    early0 = _load(early[:, None] + SIDE + word, early_seen[:, None], MASKED)
    late0 = _load(late[:, None] + SIDE + word, late_seen[:, None], MASKED)
    score = _scores(k0, k_pair0, q0, sum0, step, lift, BITS)
    if GROUPS == 2:
        k1 = _load(row[:, None] + WORDS + word, seen[:, None], MASKED)
        k_pair1 = _load(pair + 1, seen, MASKED)
        score += _scores(k1, k_pair1, q1, sum1, step, lift, BITS)
    if MASKED:
        score = tl.where(seen[:, None], score, float("-inf"))
    top = tl.maximum(m, tl.max(score, 0))
    weight = tl.exp2(score - top[None, :])
    shrink = tl.exp2(m - top)
    total = total * shrink[None, :] + weight
    acc0, base0 = _add_values(weight, v_pair0, early0, late0, acc0, base0, shrink, lift, dtype, product, BITS)
    if GROUPS == 2:
        v_pair1 = _load(pair + HEADS * GROUPS + 1, seen, MASKED)
        early1 = _load(early[:, None] + SIDE + WORDS + word, early_seen[:, None], MASKED)
        late1 = _load(late[:, None] + SIDE + WORDS + word, late_seen[:, None], MASKED)
        acc1, base1 = _add_values(weight, v_pair1, early1, late1, acc1, base1, shrink, lift, dtype, product, BITS)
    return top, total, acc0, acc1, base0, base1


@triton.jit
def _attend(
    q0, q1, step, words, table, context, head, row_quads, sinks, lift, SINKS: tl.constexpr, product: tl.constexpr,
    HEADS: tl.constexpr, SHARED: tl.constexpr, BLOCK_H: tl.constexpr, PAGE_TOKENS: tl.constexpr, BITS: tl.constexpr,
    GROUPS: tl.constexpr, WORDS: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Queries [elements of a group, heads] against this program's split of the keys: the largest score of each head,
    the sum of weights relative to it, and the weighted sums of values [elements of a group, heads]."""
    sum0 = tl.sum(q0.to(tl.float32), 0) * step
    sum1 = tl.sum(q1.to(tl.float32), 0) * step
    share = tl.cdiv(tl.cdiv(context, BLOCK_N), tl.num_programs(1)) * BLOCK_N
    lo = tl.program_id(1) * share
    hi = tl.minimum(lo + share, context)
    whole = lo + tl.maximum(hi - lo, 0) // BLOCK_N * BLOCK_N
    m = tl.full([BLOCK_H], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_N, BLOCK_H], tl.float32)
    if SINKS:  # of one of the splits: the softmax begins as if a key with this score and no value had been added
        member = tl.arange(0, BLOCK_H)
        sink = tl.load(sinks + head * SHARED + member, mask=member < SHARED, other=0.0).to(tl.float32)
        first = tl.program_id(1) == 0
        m = tl.where(first, sink * 1.4426950408889634, m)
        total = tl.where(((tl.arange(0, BLOCK_N) == 0) & first)[:, None], 1.0, total)
    base0 = tl.zeros([BLOCK_N, BLOCK_H], tl.float32)
    base1 = base0
    acc0 = tl.zeros([q0.shape[0], BLOCK_H], tl.float32)
    acc1 = acc0
    for start in tl.range(lo, whole, BLOCK_N, num_stages=STAGES):
        m, total, acc0, acc1, base0, base1 = _step(
            start, hi, m, total, acc0, acc1, base0, base1, q0, q1, sum0, sum1, step, words, table, head, row_quads,
            lift, False, product, HEADS, PAGE_TOKENS, BITS, GROUPS, WORDS, BLOCK_N,
        )  # fmt: skip
    if whole < hi:
        m, total, acc0, acc1, base0, base1 = _step(
            whole, hi, m, total, acc0, acc1, base0, base1, q0, q1, sum0, sum1, step, words, table, head, row_quads,
            lift, True, product, HEADS, PAGE_TOKENS, BITS, GROUPS, WORDS, BLOCK_N,
        )  # fmt: skip
    return m, tl.sum(total, 0), acc0 + tl.sum(base0, 0)[None, :], acc1 + tl.sum(base1, 0)[None, :]


@launched
@triton.jit(do_not_specialize=[*TABLES, "num_tokens", "max_pages"])
def grouped_decode_kernel(
    query, words, page_table, query_starts, context_lens, out, statistics, sinks, num_tokens, query_stride, row_quads,
    max_pages, scale, lift, SPLIT: tl.constexpr, SINKS: tl.constexpr, product: tl.constexpr, HEADS: tl.constexpr,
    SHARED: tl.constexpr, BLOCK_H: tl.constexpr, HEAD_DIM: tl.constexpr, PAGE_TOKENS: tl.constexpr, BITS: tl.constexpr,
    GROUPS: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Grid (KV heads x sequences, splits). words: token rows as int32, ``row_quads`` times four of them apart; heads of
    one or two GROUPS. SHARED: query heads of a KV head, at most BLOCK_H. product: the dtype, bfloat16 or float32, in
    which weights are multiplied with values."""
    SIZE: tl.constexpr = HEAD_DIM // GROUPS
    WORDS: tl.constexpr = SIZE * BITS // 32
    head = tl.program_id(0) % HEADS
    sequence = tl.program_id(0) // HEADS
    token = tl.load(query_starts + sequence).to(tl.int64)
    if tl.load(query_starts + sequence + 1) > token:
        member = tl.arange(0, BLOCK_H)
        valid = (member < SHARED)[None, :]
        source = query + token * query_stride + ((head * SHARED + member) * HEAD_DIM)[None, :]
        source += elements_of_rows(SIZE, BITS)[:, None]
        q0 = tl.load(source, mask=valid, other=0.0)
        q1 = tl.load(source + (GROUPS - 1) * SIZE, mask=valid, other=0.0)
        context = tl.load(context_lens + sequence)
        table = page_table + sequence.to(tl.int64) * max_pages
        step = scale * 1.4426950408889634  # scores in units of log 2
        m, total, acc0, acc1 = _attend(
            q0, q1, step, words, table, context, head, row_quads, sinks, lift, SINKS, product, HEADS, SHARED,
            BLOCK_H, PAGE_TOKENS, BITS, GROUPS, WORDS, BLOCK_N, STAGES,
        )  # fmt: skip
        index = token * (HEADS * SHARED) + head * SHARED + member
        if SPLIT:
            index += tl.program_id(1).to(tl.int64) * num_tokens * (HEADS * SHARED)
            tl.store(statistics + index * 2, m, mask=member < SHARED)
            tl.store(statistics + index * 2 + 1, total, mask=member < SHARED)
        else:
            acc0 = acc0 / total[None, :]
            acc1 = acc1 / total[None, :]
        target = out + (index * HEAD_DIM)[None, :] + elements_of_columns(SIZE, BITS)[:, None]
        tl.store(target, acc0.to(out.dtype.element_ty), mask=valid)
        if GROUPS == 2:
            tl.store(target + SIZE, acc1.to(out.dtype.element_ty), mask=valid)
