"""The Triton kernels of products of many tokens with a matrix in codes; `coded_gemm` launches them.

Elements are expanded to 16 bits in the registers from which tensor cores take their left operand, and products add up
over all groups there: 64 tokens or more make up for the expansion, and what is read of the matrix is its codes. See
`code_tiles` for how codes become operands.
"""

# mypy: allow-incomplete-defs, allow-untyped-defs
# Triton functions annotate their constants only: the other arguments have no Python type.

from __future__ import annotations

import triton
import triton.language as tl

from flexbatch.kernels.code_tiles import ended, in_order_of_rows, weights_of_codes
from flexbatch.kernels.launched import launched


@launched
@triton.jit
def arrange_chunks_kernel(
    x, arranged, columns, x_stride, BITS: tl.constexpr, CHUNK: tl.constexpr, CHUNKS: tl.constexpr
):
    """Grid (tokens, blocks of chunks): x with the elements of each chunk in the order of `elements_of_rows`."""
    token = tl.program_id(0).to(tl.int64)
    chunk = tl.program_id(1) * CHUNKS + tl.arange(0, CHUNKS)
    inside = (chunk < columns // CHUNK)[:, None]
    start = chunk[:, None] * CHUNK
    element = start + tl.arange(0, CHUNK)[None, :]
    values = in_order_of_rows(tl.load(x + token * x_stride + element, mask=inside, other=0.0), BITS)
    tl.store(arranged + token * columns + element, values, mask=inside)


@launched
@triton.jit(do_not_specialize=["num_tokens"])
def coded_gemm_kernel(
    arranged, words, parameters, bias, out, num_tokens, num_rows, columns, lift, BIASED: tl.constexpr,
    BITS: tl.constexpr, GROUP: tl.constexpr, CHUNK: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_T: tl.constexpr,
    SPLITS: tl.constexpr, STAGES: tl.constexpr, COMPILED: tl.constexpr,
):  # fmt: skip
    """Grid (blocks of tokens, blocks of rows, SPLITS of the columns): out [tokens, rows], or what each split adds to
    it, [splits, tokens, rows] in float32. words [rows, words of a row], parameters [rows, groups, 2]; a step takes a
    chunk of a group."""
    dtype: tl.constexpr = arranged.dtype.element_ty
    WORDS: tl.constexpr = CHUNK * BITS // 32
    token = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    row = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    safe = tl.minimum(row, num_rows - 1).to(tl.int64)[:, None]
    safe_token = tl.minimum(token, num_tokens - 1).to(tl.int64)[:, None]
    chunks = columns // CHUNK
    lo = tl.program_id(2) * chunks // SPLITS
    hi = (tl.program_id(2) + 1) * chunks // SPLITS
    # Else zeros take the place of sums after a loop that may not run, and each of a step's products waits for the one
    # before.
    tl.assume(lo < hi)
    code_at = words + safe * (chunks * WORDS) + tl.arange(0, WORDS)[None, :]
    # Scale and minimum as two elements: as a word their tile would be loaded by few threads, sixteen values each.
    pair_at = parameters + safe * (columns // GROUP * 2) + tl.arange(0, 2)[None, :]
    x_at = arranged + safe_token * columns + tl.arange(0, CHUNK)[None, :]
    acc = tl.zeros([BLOCK_R, BLOCK_T], tl.float32)
    for chunk in tl.range(lo, hi, num_stages=STAGES):
        code = tl.load(code_at + chunk * WORDS)
        scale, minimum = tl.split(tl.load(pair_at + chunk * CHUNK // GROUP * 2))
        part = tl.load(x_at + chunk * CHUNK)
        matrix = weights_of_codes(code, scale, minimum, lift, dtype, BITS)
        acc = ended(tl.dot(matrix, tl.trans(part), acc, input_precision="ieee"), COMPILED)
    if BIASED:
        acc += tl.load(bias + safe).to(tl.float32)
    inside = (row < num_rows)[:, None] & (token < num_tokens)[None, :]
    at = (tl.program_id(2) * num_tokens + token).to(tl.int64)[None, :] * num_rows + row[:, None]
    tl.store(out + at, acc.to(out.dtype.element_ty), mask=inside)


@launched
@triton.jit
def add_splits_kernel(
    partial, bias, out, size, num_rows, BIASED: tl.constexpr, SPLITS: tl.constexpr, BLOCK: tl.constexpr
):
    """Grid (blocks of elements): partial [splits, size] to out [size], rows of ``num_rows`` with a bias."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < size
    total = tl.zeros([BLOCK], tl.float32)
    for split in tl.static_range(SPLITS):
        total += tl.load(partial + split * size + at, mask=inside, other=0.0)
    if BIASED:
        total += tl.load(bias + at % num_rows, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + at, total.to(out.dtype.element_ty), mask=inside)
