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


@triton.jit(do_not_specialize=["num_tokens"])
def arrange_kernel(x, arranged, sums, num_tokens, columns, x_stride, BITS: tl.constexpr, GROUP: tl.constexpr):
    """Grid (tokens, groups): x with the elements of each group in the order of `elements_of_rows`, and the sums of
    groups [groups, tokens] in float32."""
    token = tl.program_id(0).to(tl.int64)
    group = tl.program_id(1)
    values = tl.load(x + token * x_stride + group * GROUP + elements_of_rows(GROUP, BITS))
    tl.store(arranged + token * columns + group * GROUP + tl.arange(0, GROUP), values)
    tl.store(sums + group * num_tokens + token, tl.sum(values.to(tl.float32), 0))


@triton.jit(do_not_specialize=["num_tokens"])
def coded_linear_kernel(
    arranged, sums, words, pairs, bias, out, num_tokens, num_rows, columns, BIASED: tl.constexpr, BITS: tl.constexpr,
    GROUP: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_T: tl.constexpr, PER_STEP: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Grid (blocks of rows, splits of the columns, blocks of tokens): out [splits, tokens, rows]. words [rows, groups,
    words of a group], pairs [rows, groups] of scale and minimum; a step takes PER_STEP groups. BIASED: one split."""
    dtype: tl.constexpr = arranged.dtype.element_ty
    WORDS: tl.constexpr = GROUP * BITS // 32
    row = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    token = tl.program_id(2) * BLOCK_T + tl.arange(0, BLOCK_T)
    safe = tl.minimum(row, num_rows - 1).to(tl.int64)
    safe_token = tl.minimum(token, num_tokens - 1)
    groups = columns // GROUP
    share = tl.cdiv(tl.cdiv(groups, PER_STEP), tl.num_programs(1)) * PER_STEP
    lo = tl.program_id(1) * share
    hi = tl.minimum(lo + share, groups)
    code_at = words + safe[:, None] * (groups * WORDS) + tl.arange(0, WORDS)[None, :]
    pair_at = pairs + safe * groups
    x_at = arranged + safe_token.to(tl.int64)[:, None] * columns + tl.arange(0, GROUP)[None, :]
    acc = tl.zeros([BLOCK_R, BLOCK_T], tl.float32)
    for start in tl.range(lo, hi, PER_STEP, num_stages=STAGES):
        for group in tl.static_range(PER_STEP):
            code = tl.load(code_at + (start + group) * WORDS)
            pair = tl.load(pair_at + (start + group))
            part = tl.load(x_at + (start + group) * GROUP)
            part_sum = tl.load(sums + (start + group) * num_tokens + safe_token)
            scale, minimum = scale_and_minimum(pair, dtype)
            scale, minimum = of_numbers(scale, minimum, dtype, BITS)
            products = tl.dot(rows_of_codes(code, dtype, BITS), tl.trans(part), input_precision="ieee")
            acc += products * scale[:, None] + minimum[:, None] * part_sum[None, :]
    if BIASED:
        acc += tl.load(bias + safe).to(tl.float32)[:, None]
    target = out + tl.program_id(1).to(tl.int64) * num_tokens * num_rows + token.to(tl.int64)[None, :] * num_rows
    inside = (row < num_rows)[:, None] & (token < num_tokens)[None, :]
    tl.store(target + row[:, None], acc.to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["size"])
def sum_of_splits_kernel(partial, bias, out, size, num_rows, BIASED: tl.constexpr, SPLITS: tl.constexpr,
                         BLOCK: tl.constexpr):  # fmt: skip
    """out [size] of partial [SPLITS, size], in their order, and the bias of each of num_rows."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < size
    total = tl.zeros([BLOCK], tl.float32)
    for split in tl.static_range(SPLITS):
        total += tl.load(partial + split * size + at, mask=inside, other=0.0)
    if BIASED:
        total += tl.load(bias + at % num_rows, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + at, total.to(out.dtype.element_ty), mask=inside)
