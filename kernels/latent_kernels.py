"""The Triton kernel of latent attention; `latent` launches it, `latent_reference` documents the rows.

The query rows of a sequence are its query tokens times all heads: every head reads the same rows. A program takes one
tile of them against all keys or one split of them. The latent part of a tile of keys is loaded once, for the scores and
as the values.
"""

# mypy: allow-incomplete-defs, allow-untyped-defs
# Triton functions annotate their constants only: the other arguments have no Python type.

from __future__ import annotations

import triton
import triton.language as tl

from flexbatch.kernels.attention_kernels import _find_sequence
from flexbatch.kernels.attention_tiles import TABLES
from flexbatch.kernels.launched import launched


@triton.jit
def _elements(
    rows, parameters, slot, element, seen, row_stride, parameter_stride, offset, END: tl.constexpr, BITS: tl.constexpr,
    GROUP: tl.constexpr,
):  # fmt: skip
    """Elements [keys, element] below END of the rows at ``slot`` in the dtype of the parameters."""
    within = seen[:, None] & (element < END)[None, :]
    if BITS == 16:
        found = tl.load(rows + (slot * row_stride)[:, None] + element[None, :], mask=within, other=0.0)
    else:
        per_byte: tl.constexpr = 8 // BITS
        code = tl.load(rows + (slot * row_stride)[:, None] + (element // per_byte)[None, :], mask=within, other=0)
        code = (code >> ((element % per_byte) * BITS)[None, :]) & ((1 << BITS) - 1)
        pair = parameters + (slot * parameter_stride + offset)[:, None] + (element // GROUP * 2)[None, :]
        scale = tl.load(pair, mask=within, other=0.0).to(tl.float32)
        minimum = tl.load(pair + 1, mask=within, other=0.0).to(tl.float32)
        found = tl.where(within, code.to(tl.float32) * scale + minimum, 0.0).to(parameters.dtype.element_ty)
    return found


@triton.jit
def _visible(visible, keys, own, prefix, first_token, tree_masks, mask_words, TREE: tl.constexpr):
    """Of the keys that are there, those that causality or the tree lets each query row see."""
    if TREE:
        bit = keys - prefix
        word = tree_masks + ((first_token + own).to(tl.int64) * mask_words)[:, None] + (bit // 32)[None, :]
        words = tl.load(word, mask=visible & (bit >= 0)[None, :], other=0)
        visible = visible & ((bit < 0)[None, :] | (((words >> (bit % 32)[None, :]) & 1) != 0))
    else:
        visible = visible & (keys[None, :] <= (prefix + own)[:, None])
    return visible


@triton.jit
def _store(
    out, statistics, index, valid, value, m, total, acc, num_rows, VALUES: tl.constexpr, SPLIT: tl.constexpr
):  # fmt: skip
    """Write a tile's result, or with SPLIT what `combine_kernel` needs of it. index: (token, head) of every row."""
    if SPLIT:
        index += tl.program_id(1).to(tl.int64) * num_rows
        tl.store(statistics + index * 2, m, mask=valid)
        tl.store(statistics + index * 2 + 1, total, mask=valid)
    else:
        acc = acc / total[:, None]
    target = out + (index * VALUES)[:, None] + value[None, :]
    tl.store(target, acc.to(out.dtype.element_ty), mask=valid[:, None] & (value < VALUES)[None, :])


# Sizes of a batch change from pass to pass; Triton would compile each anew that is 1 or a multiple of 16.
@launched
@triton.jit(do_not_specialize=[*TABLES, "num_sequences", "num_tokens", "max_pages", "mask_words"])
def latent_kernel(
    query, rows, parameters, page_table, query_starts, context_lens, out, statistics, tree_masks, num_sequences,
    num_tokens, row_stride, parameter_stride, offset, max_pages, mask_words, step, HEADS: tl.constexpr,
    WIDTH: tl.constexpr, VALUES: tl.constexpr, PAGE_TOKENS: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr,
    SPLIT: tl.constexpr, TREE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr,
    BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Grid (tiles, splits), the last tiles first, as in `attention_kernel`. ``step``: the scale in units of log 2."""
    tile = tl.num_programs(0) - 1 - tl.program_id(0)
    sequence = _find_sequence(query_starts, tile, num_sequences, HEADS, BLOCK_M)
    first_token = tl.load(query_starts + sequence)
    num_rows = (tl.load(query_starts + sequence + 1) - first_token) * HEADS
    row0 = (tile - (first_token * HEADS // BLOCK_M + sequence)) * BLOCK_M
    if row0 < num_rows:
        context = tl.load(context_lens + sequence)
        prefix = context - num_rows // HEADS
        row = row0 + tl.arange(0, BLOCK_M)
        valid = row < num_rows
        own = row // HEADS
        index = first_token.to(tl.int64) * HEADS + row
        value, rest = tl.arange(0, BLOCK_V), VALUES + tl.arange(0, BLOCK_R)
        source = query + (index * WIDTH)[:, None]
        q_value = tl.load(source + value[None, :], mask=valid[:, None] & (value < VALUES)[None, :], other=0.0)
        q_rest = tl.load(source + rest[None, :], mask=valid[:, None] & (rest < WIDTH)[None, :], other=0.0)
        end = context
        if not TREE:
            end = prefix + (tl.minimum(row0 + BLOCK_M, num_rows) - 1) // HEADS + 1
        share = tl.cdiv(tl.cdiv(end, BLOCK_N), tl.num_programs(1)) * BLOCK_N
        lo = tl.program_id(1) * share
        hi = tl.minimum(lo + share, end)
        m = tl.full([BLOCK_M], float("-inf"), tl.float32)
        total = tl.zeros([BLOCK_M], tl.float32)
        acc = tl.zeros([BLOCK_M, BLOCK_V], tl.float32)
        table = page_table + sequence.to(tl.int64) * max_pages
        for start in range(lo, hi, BLOCK_N):
            keys = start + tl.arange(0, BLOCK_N)
            seen = keys < hi
            page = tl.load(table + keys // PAGE_TOKENS, mask=seen, other=0)
            slot = page.to(tl.int64) * PAGE_TOKENS + keys % PAGE_TOKENS
            k_value = _elements(rows, parameters, slot, value, seen, row_stride, parameter_stride, offset, VALUES, BITS,
                                GROUP)  # fmt: skip
            k_rest = _elements(rows, parameters, slot, rest, seen, row_stride, parameter_stride, offset, WIDTH, BITS,
                               GROUP)  # fmt: skip
            score = tl.dot(q_value, tl.trans(k_value), input_precision="ieee")
            score = tl.dot(q_rest, tl.trans(k_rest), score, input_precision="ieee") * step
            visible = seen[None, :] & valid[:, None]
            visible = _visible(visible, keys, own, prefix, first_token, tree_masks, mask_words, TREE)
            score = tl.where(visible, score, float("-inf"))
            top = tl.maximum(m, tl.max(score, 1))
            floor = tl.where(top == float("-inf"), 0.0, top)  # nothing seen so far: -inf - -inf is no number
            weight = tl.exp2(score - floor[:, None])
            shrink = tl.exp2(m - floor)
            total = total * shrink + tl.sum(weight, 1)
            acc = tl.dot(weight.to(k_value.dtype), k_value, acc * shrink[:, None], input_precision="ieee")
            m = top
        _store(out, statistics, index, valid, value, m, total, acc, num_tokens * HEADS, VALUES, SPLIT)
