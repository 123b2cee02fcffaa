"""Low-rank updates of many adapters in Triton: two launches, whatever adapters the tokens have.

Tiles hold tokens of one adapter. Their shape is the same in every call and every sum runs over the adapter's own rank,
so that a token's result does not depend on which other adapters there are, nor on who else has its own.
"""

# mypy: allow-incomplete-defs, allow-untyped-defs
# Triton functions annotate their constants only: the other arguments have no Python type.

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from flexbatch.kernels.launched import launched
from flexbatch.kernels.low_rank_reference import TILE_TOKENS
from flexbatch.kernels.whole_numbers import ceil_div

BLOCK_RANK, BLOCK_INPUT, BLOCK_OUTPUT = 16, 128, 128


@launched
@triton.jit
def _down_kernel(
    x, down, inner, segments, order, tiles, size, x_token, inner_row, PARTS: tl.constexpr, GATHER: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Grid (tiles, blocks of ranks): the rows of one adapter, of all its parts, times its tokens."""
    tile = tiles + tl.program_id(0) * 3
    adapter = tl.load(tile).to(tl.int64)
    first = tl.load(tile + 1)
    end = tl.load(tile + 2)
    segment = segments + adapter * PARTS * 3
    start = tl.load(segment)
    count = tl.load(segment + (PARTS - 1) * 3) + tl.load(segment + (PARTS - 1) * 3 + 1) - start
    if (first < end) & (tl.program_id(1) * BLOCK_R < count):
        position = first + tl.arange(0, BLOCK_T)
        rank = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
        token = tl.load(order + position, mask=position < end, other=0)
        row = down + (start + rank) * size
        if GATHER:
            column = tl.load(x + token, mask=position < end, other=0)
            both = (position < end)[:, None] & (rank < count)[None, :]
            result = tl.load(row[None, :] + column[:, None], mask=both, other=0.0).to(tl.float32)
        else:
            result = tl.zeros((BLOCK_T, BLOCK_R), dtype=tl.float32)
            for begin in range(0, size, BLOCK_K):
                element = begin + tl.arange(0, BLOCK_K)
                has_x = (position < end)[:, None] & (element < size)[None, :]
                has_row = (rank < count)[:, None] & (element < size)[None, :]
                left = tl.load(x + token[:, None] * x_token + element[None, :], mask=has_x, other=0.0)
                right = tl.load(row[:, None] + element[None, :], mask=has_row, other=0.0)
                result = tl.dot(left, tl.trans(right), result, input_precision="ieee")
        target = inner + position.to(tl.int64)[:, None] * inner_row + rank[None, :]
        both = (position < end)[:, None] & (rank < count)[None, :]
        tl.store(target, result.to(inner.dtype.element_ty), mask=both)


@launched
@triton.jit
def _up_kernel(
    out, inner, up, segments, scales, sections, order, tiles, out_token, inner_row, PARTS: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Grid (tiles, blocks of columns, parts)."""
    part = tl.program_id(2)
    tile = tiles + tl.program_id(0) * 3
    adapter = tl.load(tile).to(tl.int64)
    first = tl.load(tile + 1)
    end = tl.load(tile + 2)
    segment = segments + (adapter * PARTS + part) * 3
    rank = tl.load(segment + 1)
    width = tl.load(sections + part * 2 + 1)
    if (first < end) & (rank > 0) & (tl.program_id(1) * BLOCK_N < width):
        offset = tl.load(segment) - tl.load(segments + adapter * PARTS * 3)
        factor = up + tl.load(segment + 2)
        position = first + tl.arange(0, BLOCK_T)
        column = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
        row = inner + position.to(tl.int64)[:, None] * inner_row + offset
        result = tl.zeros((BLOCK_T, BLOCK_N), dtype=tl.float32)
        for begin in range(0, rank, BLOCK_R):
            index = begin + tl.arange(0, BLOCK_R)
            has_inner = (position < end)[:, None] & (index < rank)[None, :]
            has_factor = (index < rank)[:, None] & (column < width)[None, :]
            left = tl.load(row + index[None, :], mask=has_inner, other=0.0)
            right = tl.load(factor + index[:, None] * width + column[None, :], mask=has_factor, other=0.0)
            result = tl.dot(left, right, result, input_precision="ieee")
        token = tl.load(order + position, mask=position < end, other=0)
        target = out + token[:, None] * out_token + tl.load(sections + part * 2) + column[None, :]
        both = (position < end)[:, None] & (column < width)[None, :]
        before = tl.load(target, mask=both, other=0.0).to(tl.float32)
        scale = tl.load(scales + adapter * PARTS + part)
        tl.store(target, (before + scale * result).to(out.dtype.element_ty), mask=both)


@launched
@triton.jit
def _columns_kernel(
    out, x, rows, bias, segments, columns, order, tiles, size, out_token, x_token, HAS_BIAS: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Grid (tiles, blocks of rows): the rows of one adapter times its tokens, each to its own column."""
    tile = tiles + tl.program_id(0) * 3
    segment = segments + tl.load(tile).to(tl.int64) * 2
    first = tl.load(tile + 1)
    end = tl.load(tile + 2)
    start = tl.load(segment)
    count = tl.load(segment + 1)
    if (first < end) & (tl.program_id(1) * BLOCK_R < count):
        position = first + tl.arange(0, BLOCK_T)
        index = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
        token = tl.load(order + position, mask=position < end, other=0)
        row = rows + (start + index) * size
        result = tl.zeros((BLOCK_T, BLOCK_R), dtype=tl.float32)
        for begin in range(0, size, BLOCK_K):
            element = begin + tl.arange(0, BLOCK_K)
            has_x = (position < end)[:, None] & (element < size)[None, :]
            has_row = (index < count)[:, None] & (element < size)[None, :]
            left = tl.load(x + token[:, None] * x_token + element[None, :], mask=has_x, other=0.0)
            right = tl.load(row[:, None] + element[None, :], mask=has_row, other=0.0)
            result = tl.dot(left, tl.trans(right), result, input_precision="ieee")
        if HAS_BIAS:
            result += tl.load(bias + start + index, mask=index < count, other=0.0).to(tl.float32)[None, :]
        column = tl.load(columns + start + index, mask=index < count, other=0)
        both = (position < end)[:, None] & (index < count)[None, :]
        tl.store(out + token[:, None] * out_token + column[None, :], result.to(out.dtype.element_ty), mask=both)


def low_rank_update(
    out: Tensor,
    x: Tensor,
    down: Tensor,
    up: Tensor,
    segments: Tensor,
    scales: Tensor,
    sections: Tensor,
    order: Tensor,
    tiles: Tensor,
    max_rank: int,
) -> None:
    """`low_rank_reference.low_rank_update`."""
    parts, gather = segments.shape[1], not x.is_floating_point()
    if not len(order) or not len(tiles):
        return
    inner = torch.empty(len(order), max_rank, dtype=down.dtype, device=x.device)
    _down_kernel[len(tiles), ceil_div(max_rank, BLOCK_RANK)](
        x, down, inner, segments, order, tiles, down.shape[1], x.stride(0), max_rank,
        PARTS=parts, GATHER=gather, BLOCK_T=TILE_TOKENS, BLOCK_R=BLOCK_RANK, BLOCK_K=BLOCK_INPUT,
    )  # fmt: skip
    _up_kernel[len(tiles), ceil_div(out.shape[1], BLOCK_OUTPUT), parts](
        out, inner, up, segments, scales, sections, order, tiles, out.stride(0), max_rank,
        PARTS=parts, BLOCK_T=TILE_TOKENS, BLOCK_R=BLOCK_RANK, BLOCK_N=BLOCK_OUTPUT,
    )  # fmt: skip


def replace_columns(
    out: Tensor,
    x: Tensor,
    rows: Tensor,
    bias: Tensor | None,
    segments: Tensor,
    columns: Tensor,
    order: Tensor,
    tiles: Tensor,
    max_rows: int,
) -> None:
    """`low_rank_reference.replace_columns`."""
    if not len(order) or not len(tiles):
        return
    _columns_kernel[len(tiles), ceil_div(max_rows, BLOCK_OUTPUT)](
        out, x, rows, rows if bias is None else bias, segments, columns, order, tiles, rows.shape[1], out.stride(0),
        x.stride(0), HAS_BIAS=bias is not None, BLOCK_T=TILE_TOKENS, BLOCK_R=BLOCK_OUTPUT, BLOCK_K=BLOCK_INPUT,
    )  # fmt: skip
