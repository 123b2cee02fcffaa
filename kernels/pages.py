"""Pages between pinned host memory and GPU staging, in Triton: the GPU reads and writes the host's memory itself.

Scattered pages of any size move at the link's rate, which one copy call per page does not reach. Few programs keep
the link full: it takes rate x latency, about 55 GB/s x 2 us = 110 KB in flight. Eight programs with 16 KiB each do
that (51.1 GB/s on the H200, in pages of 64 and of 448 KiB) and leave the other multiprocessors to GEMMs, which run 7
% slower beside them; sixteen and more slow them by up to 23 %, eight with 8 KiB move 40 GB/s. A pinned CPU tensor is
given to Triton like any other: the driver maps registered memory at the same address.
"""

# mypy: allow-incomplete-defs, allow-untyped-defs
# Triton functions annotate their constants only: the other arguments have no Python type.

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from flexbatch.kernels.launched import launched
from flexbatch.kernels.whole_numbers import next_power_of_2

NUM_PROGRAMS = 8
TILE_BYTES = 16384
NUM_WARPS = 4


@launched
@triton.jit(do_not_specialize=["num_rows"])  # another number every pass: see attention_kernels
def _copy_kernel(
    source, destination, indices, num_rows, source_stride, destination_stride, GATHER: tl.constexpr,
    WORDS: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_WORDS: tl.constexpr,
):  # fmt: skip
    """Rows of WORDS words; row i is ``indices[i]`` on the source's (GATHER) or the destination's side. Grid-stride
    over tiles."""
    pieces: tl.constexpr = (WORDS + BLOCK_WORDS - 1) // BLOCK_WORDS
    for tile in range(tl.program_id(0), tl.cdiv(num_rows, BLOCK_ROWS) * pieces, tl.num_programs(0)):
        row = tile // pieces * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
        word = tile % pieces * BLOCK_WORDS + tl.arange(0, BLOCK_WORDS)
        index = tl.load(indices + row, mask=row < num_rows, other=0).to(tl.int64)
        row64 = row.to(tl.int64)
        read = source + ((index if GATHER else row64) * source_stride)[:, None] + word[None, :]
        written = destination + ((row64 if GATHER else index) * destination_stride)[:, None] + word[None, :]
        mask = (row < num_rows)[:, None] & (word < WORDS)[None, :]
        tl.store(written, tl.load(read, mask=mask, eviction_policy="evict_first"), mask=mask)


WORDS = {8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.uint8}
"""By bytes."""


def _rows(x: Tensor) -> Tensor:
    """``x`` as [rows, elements of a row]."""
    rows = x if x.dim() == 2 else x.view(x.shape[0], -1)
    assert rows.stride(1) == 1 or rows.shape[1] == 1, f"a row must be contiguous, got strides {x.stride()}"
    return rows


def _word_bytes(source: Tensor, destination: Tensor) -> int:
    """The widest integer that divides every row, its offset and the distance of rows. Loads of 16 bytes are two of
    8."""
    bits = 8
    for x in (source, destination):
        bits |= x.data_ptr() | (x.stride(0) | x.shape[1]) * x.element_size()
    return bits & -bits


def _copy(
    source: Tensor,
    destination: Tensor,
    indices: Tensor,
    gather: bool,
    num_programs: int,
    tile_bytes: int = TILE_BYTES,
    num_warps: int = NUM_WARPS,
) -> None:
    count = indices.shape[0]
    if count == 0:
        return
    source, destination = _rows(source), _rows(destination)
    width = _word_bytes(source, destination)
    source, destination = source.view(WORDS[width]), destination.view(WORDS[width])
    words = source.shape[1]
    assert words == destination.shape[1], f"rows of {words * width} and {destination.shape[1] * width} bytes"
    block_words = min(next_power_of_2(words), tile_bytes // width)
    block_rows = tile_bytes // width // block_words
    _copy_kernel[(num_programs,)](
        source, destination, indices, count, source.stride(0), destination.stride(0),
        GATHER=gather, WORDS=words, BLOCK_ROWS=block_rows, BLOCK_WORDS=block_words, num_warps=num_warps,
    )  # fmt: skip


def gather_pages(
    source: Tensor,
    page_ids: Tensor,
    destination: Tensor,
    *,
    num_programs: int = NUM_PROGRAMS,
    tile_bytes: int = TILE_BYTES,
    num_warps: int = NUM_WARPS,
) -> None:
    """`reference.gather_pages`; ``num_programs`` is the share of the GPU that is given up to it, each of them with
    ``tile_bytes`` in flight."""
    _copy(source, destination, page_ids, True, num_programs, tile_bytes, num_warps)


PART_PROGRAMS = 32
"""Nothing else runs meanwhile: the products wait for what they copy."""


@launched
@triton.jit
def _parts_kernel(source, target, parts, order, count, WORD: tl.constexpr, BLOCK: tl.constexpr):
    """Every program copies its share of each of the first ``count`` parts of ``order``. WORD: bytes."""
    word = tl.arange(0, BLOCK)
    for index in range(tl.load(count)):
        part = tl.load(order + index) * 3
        start, end = tl.load(parts + part + 1) // WORD, tl.load(parts + part + 2) // WORD
        for begin in range(start + tl.program_id(0) * BLOCK, end, tl.num_programs(0) * BLOCK):
            at = begin + word
            tl.store(target + at, tl.load(source + at, mask=at < end), mask=at < end)


def copy_parts(source: Tensor, target: Tensor, parts: Tensor, wanted: Tensor, word: int) -> None:
    """`reference.copy_parts`; the host waits for nothing. word: bytes that divide all starts and ends, 1, 2, 4 or 8."""
    if not len(parts):
        return
    mine = wanted[parts[:, 0]].to(torch.int8)
    order, count = mine.argsort(descending=True, stable=True), mine.sum(dtype=torch.int32)
    address = source.data_ptr() | target.data_ptr()
    word = min(word, address & -address)
    source, target = (x[: x.numel() // word * word].view(WORDS[word]) for x in (source, target))
    _parts_kernel[(PART_PROGRAMS,)](
        source, target, parts, order, count, WORD=word, BLOCK=TILE_BYTES // word, num_warps=NUM_WARPS
    )


def scatter_rows(source: Tensor, destination: Tensor, slots: Tensor, *, num_programs: int = NUM_PROGRAMS) -> None:
    """`reference.scatter_rows`; ``num_programs`` is the share of the GPU that is given up to it."""
    _copy(source, destination, slots, False, num_programs)
