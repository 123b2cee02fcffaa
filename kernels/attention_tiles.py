"""One step of paged attention inside a Triton program: a tile of keys and values is found, loaded, scored and added to
an online softmax. `attention_kernels` calls it for every tile.

Arguments that many of these functions share: ``keys`` [BLOCK_N] are the positions of a tile's keys in their sequence,
``seen`` says which of them are loaded, ``slot`` [BLOCK_N] are their token rows, and ``prefix`` is the number of keys
that were cached before this pass. MASKED is false for tiles whose keys are seen by every query row.
"""

# mypy: allow-incomplete-defs, allow-untyped-defs
# Triton functions annotate their constants only: the other arguments have no Python type.

from __future__ import annotations

import triton
import triton.language as tl

TABLES = ("page_table", "query_starts", "context_lens", "positions", "tree_masks")
"""Tensors that a pass cuts anywhere: those of prompts behind 33 sequences that decode do not start at a multiple of 16
bytes, those behind 32 do."""


@triton.jit
def dequantized(
    rows, parameters, slot, seen, vector, row_stride, parameter_stride, VECTORS: tl.constexpr, HEAD_DIM: tl.constexpr,
    BITS: tl.constexpr, GROUPS: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_B: tl.constexpr,
):  # fmt: skip
    """Two tiles [keys, BLOCK_G * BLOCK_B] of one quantized vector: at 4 bits its even and its odd elements, at 8 bits
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
    """x, rounded to the nearest bfloat16, ties to even; the interpreter's own conversion truncates."""
    bits = x.to(tl.int32, bitcast=True)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) & -65536).to(tl.float32, bitcast=True)


@triton.jit
def masked_scores(
    score, slopes, position, token, q, keys, prefix, first_token, hi, positions, tree_masks, mask_words, window, scale,
    soft_cap, alibi_scale, MASKED: tl.constexpr, ALIBI: tl.constexpr, WINDOW: tl.constexpr, SOFT_CAP: tl.constexpr,
    TREE: tl.constexpr,
):  # fmt: skip
    """Raw products [query rows, keys] to masked scores in units of log 2; without ALiBi and soft cap the caller folds
    the scale into the exponent. ``position`` is that of each query row."""
    LOG2_E: tl.constexpr = 1.4426950408889634
    if SOFT_CAP:  # tanh(x) = 2 sigmoid(2 x) - 1
        score = 2.0 * tl.sigmoid(2.0 * score * (scale / soft_cap)) - 1.0
    if SOFT_CAP or ALIBI:
        score = score * ((soft_cap if SOFT_CAP else scale) * LOG2_E)
    key_position = keys
    if TREE and MASKED:
        in_tree = (keys >= prefix) & (keys < hi)
        depth = tl.load(positions + first_token + keys - prefix, mask=in_tree, other=0)
        key_position = tl.where(keys < prefix, keys, depth)
    distance = position[:, None] - key_position[None, :]
    if ALIBI == 2:
        product = _rounded(_rounded(slopes)[:, None] * _rounded(key_position.to(tl.float32))[None, :])
        score = score + (alibi_scale * LOG2_E) * (product - slopes[:, None] * position.to(tl.float32)[:, None])
    elif ALIBI:
        score = score - (slopes * LOG2_E)[:, None] * distance.to(tl.float32)
    if MASKED:
        visible = (keys < hi)[None, :]
        if TREE:
            bit = keys - prefix
            inside = (bit >= 0)[None, :] & visible & (q >= 0)[:, None]
            words = tl.load(tree_masks + token[:, None] * mask_words + (bit // 32)[None, :], mask=inside, other=0)
            visible = visible & ((keys < prefix)[None, :] | (((words >> (bit % 32)[None, :]) & 1) != 0))
        else:
            visible = visible & (distance >= 0)
        if WINDOW == 2:
            visible = visible & (key_position[None, :] >= (position // window * window)[:, None])
        elif WINDOW:
            visible = visible & (distance < window)
        score = tl.where(visible, score, float("-inf"))
    return score


@triton.jit
def softmax_step(
    start, hi, m, total, acc0, acc1, q0, q1, rows, parameters, table, head, row_stride, parameter_stride, slopes,
    position, token, q, prefix, first_token, positions, tree_masks, mask_words, window, scale, soft_cap, alibi_scale,
    MASKED: tl.constexpr, ALIBI: tl.constexpr, WINDOW: tl.constexpr, SOFT_CAP: tl.constexpr, TREE: tl.constexpr,
    KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, PAGE_TOKENS: tl.constexpr, BITS: tl.constexpr, GROUPS: tl.constexpr,
    BLOCK_G: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One step of the online softmax over keys [start, start + BLOCK_N): the new maximum ``m``, sum of weights
    ``total`` and weighted sums of values ``acc0``, ``acc1`` (at 4 bits those of even and of odd elements)."""
    keys = start + tl.arange(0, BLOCK_N)
    seen = keys < hi
    entry = table + keys // PAGE_TOKENS
    page = tl.load(entry, mask=seen, other=0) if MASKED else tl.load(entry)
    slot = page.to(tl.int64) * PAGE_TOKENS + keys % PAGE_TOKENS
    element = tl.arange(0, BLOCK_G * BLOCK_B)[None, :]
    base = rows + (slot * row_stride + head * HEAD_DIM)[:, None] + element
    BARE: tl.constexpr = not MASKED and HEAD_DIM == BLOCK_G * BLOCK_B
    within = (element < HEAD_DIM) & seen[:, None] if MASKED else element < HEAD_DIM
    if BITS == 16:
        k = tl.load(base) if BARE else tl.load(base, mask=within, other=0.0)
        score = tl.dot(q0, tl.trans(k), input_precision="ieee")
    else:
        k0, k1 = dequantized(rows, parameters, slot, seen, head, row_stride, parameter_stride,
                             2 * KV_HEADS, HEAD_DIM, BITS, GROUPS, BLOCK_G, BLOCK_B)  # fmt: skip
        score = tl.dot(q0, tl.trans(k0), input_precision="ieee")
        if BITS == 4:
            score = tl.dot(q1, tl.trans(k1), score, input_precision="ieee")
    score = masked_scores(
        score, slopes, position, token, q, keys, prefix, first_token, hi, positions, tree_masks, mask_words, window,
        scale, soft_cap, alibi_scale, MASKED, ALIBI, WINDOW, SOFT_CAP, TREE,
    )  # fmt: skip
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
        v0, v1 = dequantized(rows, parameters, slot, seen, KV_HEADS + head, row_stride, parameter_stride,
                             2 * KV_HEADS, HEAD_DIM, BITS, GROUPS, BLOCK_G, BLOCK_B)  # fmt: skip
        acc0 = tl.dot(weight, v0, acc0, input_precision="ieee")
        if BITS == 4:
            acc1 = tl.dot(weight, v1, acc1 * shrink[:, None], input_precision="ieee")
    return top, total, acc0, acc1
