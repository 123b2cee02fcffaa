"""The Triton kernels of products with a matrix in codes, for few tokens; `coded_linear` launches them.

The matrix is the left operand of the tensor cores: 64 or more of its rows feed them however few tokens there are. See
`code_tiles` for how codes become operands.
"""

# mypy: allow-incomplete-defs, allow-untyped-defs
# Triton functions annotate their constants only: the other arguments have no Python type.

from __future__ import annotations

import triton
import triton.language as tl

from flexbatch.kernels.code_tiles import elements_of_rows, of_numbers, rows_of_codes, scale_and_minimum
from flexbatch.kernels.launched import launched


@launched
@triton.jit(do_not_specialize=["num_tokens", "num_arrivals"])
def arrange_kernel(
    x, arranged, sums, arrivals, num_tokens, columns, x_stride, num_arrivals, BITS: tl.constexpr, GROUP: tl.constexpr
):
    """Grid (tokens, groups): x with the elements of each group in the order of `elements_of_rows`, and the sums of
    groups [groups, tokens] in float32. Sets ``arrivals`` to 0."""
    token = tl.program_id(0).to(tl.int64)
    group = tl.program_id(1)
    values = tl.load(x + token * x_stride + group * GROUP + elements_of_rows(GROUP, BITS))
    tl.store(arranged + token * columns + group * GROUP + tl.arange(0, GROUP), values)
    tl.store(sums + group * num_tokens + token, tl.sum(values.to(tl.float32), 0))
    for index in range(tl.program_id(0) * tl.num_programs(1) + group, num_arrivals, num_tokens * tl.num_programs(1)):
        tl.store(arrivals + index, 0)


@triton.jit
def _halves(x):
    """[rows, 2 * n] as two [rows, n], in the registers where they are."""
    return tl.split(tl.permute(x.reshape(x.shape[0], 2, x.shape[1] // 2), (0, 2, 1)))


@triton.jit
def _add_group(
    acc, code, pair, group, x_at, sum_at, num_tokens, lift, dtype: tl.constexpr, BITS: tl.constexpr,
    GROUP: tl.constexpr,
):  # fmt: skip
    """acc [rows, tokens] and the products of one group."""
    part = tl.load(x_at + group * GROUP)
    part_sum = tl.load(sum_at + group * num_tokens)
    scale, minimum = scale_and_minimum(pair, dtype)
    scale, minimum = of_numbers(scale, minimum, dtype, BITS)
    products = tl.dot(rows_of_codes(code, lift, dtype, BITS), tl.trans(part), input_precision="ieee")
    return (acc + products * scale[:, None]) + minimum[:, None] * part_sum[None, :]  # two fused operations


@triton.jit
def _add_two(
    acc, code, pair, group, x_at, sum_at, num_tokens, lift, dtype: tl.constexpr, BITS: tl.constexpr,
    GROUP: tl.constexpr,
):  # fmt: skip
    first, second = _halves(code)
    pair, next_pair = tl.split(pair)
    acc = _add_group(acc, first, pair, group, x_at, sum_at, num_tokens, lift, dtype, BITS, GROUP)
    return _add_group(acc, second, next_pair, group + 1, x_at, sum_at, num_tokens, lift, dtype, BITS, GROUP)


@launched
@triton.jit(do_not_specialize=["num_tokens"])
def coded_linear_kernel(
    arranged, sums, words, pairs, bias, partial, arrivals, out, num_tokens, num_rows, columns, lift,
    BIASED: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_T: tl.constexpr,
    PER_STEP: tl.constexpr, SPLITS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Grid (blocks of rows, SPLITS of the columns, blocks of tokens): out [tokens, rows]. words [rows, groups, words of
    a group], pairs [rows, groups] of scale and minimum; a step takes PER_STEP groups, 1, 2 or 4, of which there are
    whole steps. Of the programs of a block the last to arrive, by ``arrivals``, adds up what all of them wrote to
    partial [splits, tokens, rows], in their order."""
    dtype: tl.constexpr = arranged.dtype.element_ty
    WORDS: tl.constexpr = GROUP * BITS // 32
    row = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    token = tl.program_id(2) * BLOCK_T + tl.arange(0, BLOCK_T)
    safe = tl.minimum(row, num_rows - 1).to(tl.int64)
    safe_token = tl.minimum(token, num_tokens - 1)
    groups = tl.multiple_of(columns // GROUP, PER_STEP)
    share = tl.cdiv(tl.cdiv(groups, PER_STEP), tl.num_programs(1)) * PER_STEP
    lo = tl.program_id(1) * share
    hi = tl.minimum(lo + share, groups)
    code_at = words + safe[:, None] * (groups * WORDS) + tl.arange(0, PER_STEP * WORDS)[None, :]
    pair_at = pairs + safe * groups
    if PER_STEP > 1:
        pair_at = pair_at[:, None] + tl.arange(0, PER_STEP)[None, :]
    x_at = arranged + safe_token.to(tl.int64)[:, None] * columns + tl.arange(0, GROUP)[None, :]
    sum_at = sums + safe_token
    acc = tl.zeros([BLOCK_R, BLOCK_T], tl.float32)
    for group in tl.range(lo, hi, PER_STEP, num_stages=STAGES):
        code = tl.load(code_at + group * WORDS)
        pair = tl.load(pair_at + group)
        if PER_STEP == 1:
            acc = _add_group(acc, code, pair, group, x_at, sum_at, num_tokens, lift, dtype, BITS, GROUP)
        elif PER_STEP == 2:
            acc = _add_two(acc, code, pair, group, x_at, sum_at, num_tokens, lift, dtype, BITS, GROUP)
        else:
            code, next_code = _halves(code)
            pair, next_pair = _halves(pair)
            acc = _add_two(acc, code, pair, group, x_at, sum_at, num_tokens, lift, dtype, BITS, GROUP)
            acc = _add_two(acc, next_code, next_pair, group + 2, x_at, sum_at, num_tokens, lift, dtype, BITS, GROUP)
    inside = (row < num_rows)[:, None] & (token < num_tokens)[None, :]
    at = token.to(tl.int64)[None, :] * num_rows + row[:, None]
    last = True
    if SPLITS > 1:
        size = num_tokens.to(tl.int64) * num_rows
        tl.store(partial + tl.program_id(1) * size + at, acc, mask=inside)
        tl.debug_barrier()  # all threads have written before one of them says so
        arrived = tl.atomic_add(arrivals + tl.program_id(2) * tl.num_programs(0) + tl.program_id(0), 1, sem="acq_rel")
        last = arrived == SPLITS - 1
    if last:
        if SPLITS > 1:
            acc = tl.zeros([BLOCK_R, BLOCK_T], tl.float32)
            for split in tl.static_range(SPLITS):
                acc += tl.load(partial + split * size + at, mask=inside, other=0.0, cache_modifier=".cg")
        if BIASED:
            acc += tl.load(bias + safe).to(tl.float32)[:, None]
        tl.store(out + at, acc.to(out.dtype.element_ty), mask=inside)
