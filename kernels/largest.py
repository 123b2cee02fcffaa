"""The largest logit of every row, read once in the type in which they were multiplied."""

# mypy: allow-incomplete-defs, allow-untyped-defs
# Triton functions annotate their constants only: the other arguments have no Python type.

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from flexbatch.kernels.launched import launched

BLOCK = 4096


@launched
@triton.jit(do_not_specialize=["first"])  # another one for every part of a vocabulary
def _largest_kernel(logits, peaks, token_ids, first, columns, stride, BLOCK: tl.constexpr):
    """One row. Of equal logits every lane keeps its first, and the row the first of its lanes."""
    row = tl.program_id(0).to(tl.int64)
    best = tl.full([BLOCK], float("-inf"), tl.float32)
    token_of = tl.zeros([BLOCK], tl.int32)
    nan = tl.zeros([BLOCK], tl.int32)
    for start in range(0, columns, BLOCK):
        column = start + tl.arange(0, BLOCK)
        value = tl.load(logits + row * stride + column, mask=column < columns, other=float("-inf")).to(tl.float32)
        nan |= (value != value).to(tl.int32)
        larger = value > best
        best = tl.where(larger, value, best)
        token_of = tl.where(larger, column, token_of)
    peak = tl.max(best, 0)
    token = tl.min(tl.where(best == peak, token_of, 2147483647), 0)
    peak = tl.where(tl.max(nan, 0) > 0, float("nan"), peak)
    taken = (peak > tl.load(peaks + row)) | (peak != peak)
    tl.store(peaks + row, peak, mask=taken)
    tl.store(token_ids + row, (first + token).to(tl.int64), mask=taken)


def keep_largest(logits: Tensor, first: int, peaks: Tensor, token_ids: Tensor) -> None:
    """`reference.keep_largest`."""
    assert logits.stride(1) == 1, f"logits must be dense along a row, got strides {logits.stride()}"
    if len(logits):
        _largest_kernel[(len(logits),)](
            logits, peaks, token_ids, first, logits.shape[1], logits.stride(0), BLOCK=BLOCK, num_warps=8
        )
