"""Paged attention on the GPU: any mix of prompt chunks, single tokens and token trees in one launch of the kernels of
`attention_kernels`.

Nothing here waits for the device: launches depend on shapes and on the caller's bounds only, so a call can be
captured in a CUDA graph.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from flexbatch.kernels import reference
from flexbatch.kernels.attention_kernels import attention_kernel, combine_kernel
from flexbatch.kernels.attention_reference import AttentionOptions
from flexbatch.kernels.code_tiles import LIFT
from flexbatch.kernels.decode_kernels import decode_kernel
from flexbatch.kernels.grouped_decode_kernels import grouped_decode_kernel
from flexbatch.kernels.whole_numbers import next_power_of_2

SMALL_ROWS = 16  # the least height of a tensor core tile; what one decoded token needs when the group is no larger
MAX_SPLITS = 64
LONG_CONTEXT = 2048
"""Keys of a sequence from which on wider tiles read them faster."""


@dataclass(frozen=True)
class AttentionLaunch:
    """Shape of a launch: query rows and keys of a tile, warps of a program, depth of the load pipeline, registers of a
    thread (0: the compiler's choice)."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    max_registers: int = 0


DECODE = AttentionLaunch(1, 32, 2, 3)
"""For one query token over quantized heads of their own: 2,600 GB/s at 8 and 1,490 at 4 bits on the H200, with four
warps 2,300 and 1,270."""


GROUPED = AttentionLaunch(1, 32, 1, 3)
"""For one query token over quantized heads that up to `MAX_SHARED` query heads share: 80 and 59 % of the copy rate at 8
and 4 bits on an H100 (64 x 4,096 of Llama-3-8B), where tiles reach 44 and 25."""
GROUPED_DEPTH = 8
"""Programs of it for each multiprocessor."""
MAX_SHARED = 8
"""Query heads that share one of the cache, at most. With 16 a program has twice the sums, and not the registers."""


def choose_launch(
    dtype: torch.dtype, head_dim: int, bits: int, max_rows: int, max_context_len: int = 0
) -> AttentionLaunch:
    """Tiles that fit the registers and shared memory of a Hopper multiprocessor, by the largest number of query rows
    and of keys of a sequence."""
    wide = head_dim > 128
    if dtype == torch.float32:  # no tensor cores at full precision
        return AttentionLaunch(16 if max_rows <= SMALL_ROWS else 32, 16 if wide else 32, 8, 1)
    if max_rows <= SMALL_ROWS:
        # Single tokens of Llama-3-8B on an H100: 8 x 16,384 keys take 191 us and not 220, 64 x 4,096 take 368 and not
        # 374; 1,000 x 40 to 250 take 224 and not 218.
        long = bits == 16 and not wide and max_context_len >= LONG_CONTEXT
        return AttentionLaunch(SMALL_ROWS, 128 if long else 32 if wide else 64, 4, 3)
    if max_rows <= 64 or wide or bits != 16:
        return AttentionLaunch(64, 32 if wide else 64, 4, 2 if wide else 3)
    # At most 128 registers let two programs share a multiprocessor: one multiplies while the other takes exponentials.
    # On the H200 462 instead of 311 TFLOP/s for 8,192 tokens with grouped heads, 185 instead of 144 for 16 prompts of
    # 512 with heads of their own.
    return AttentionLaunch(128, 64, 8, 3, max_registers=128)


@functools.cache
def multiprocessors_of(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def choose_splits(programs: int, max_context_len: int, multiprocessors: int, depth: int = 4) -> int:
    """Splits of the context that fill the chip about ``depth`` programs deep, none shorter than 256 keys; a power of
    two: `combine_kernel` is compiled for each."""
    wanted = max(1, min(-(-depth * multiprocessors // programs), -(-max_context_len // 256), MAX_SPLITS))
    return 1 << (wanted.bit_length() - 1)


def paged_attention(
    query: Tensor,
    rows: Tensor,
    page_table: Tensor,
    query_starts: Tensor,
    context_lens: Tensor,
    *,
    out: Tensor | None = None,
    splits: int = 0,
    launch: AttentionLaunch | None = None,
    **options: Any,
) -> Tensor:
    """`attention_reference.paged_attention`. ``splits``, ``launch``: chosen from the upper bounds among the options
    unless given. A quantized cache needs a group that is a power of two. Raises ValueError."""
    chosen = AttentionOptions(**options)
    num_tokens, num_heads, head_dim = query.shape
    heads_per_group = num_heads // chosen.num_kv_heads
    out = torch.empty(*query.shape, dtype=query.dtype, device=query.device) if out is None else out
    assert out.is_contiguous(), f"the result must be dense, got strides {out.stride()}"
    if num_tokens == 0:
        return out
    if query.stride()[1:] != (head_dim, 1):
        query = query.contiguous()
    max_rows = (chosen.max_query_len or num_tokens) * heads_per_group
    longest = chosen.max_context_len or page_table.shape[1] * chosen.page_tokens
    unmasked = chosen.tree_masks is None and not chosen.window and not chosen.soft_cap and not chosen.alibi_scale
    single = chosen.bits != 16 and max_rows == heads_per_group and unmasked
    direct = single and words_of(rows, query.dtype, head_dim, chosen)
    grouped = direct and heads_per_group > 1 and grouped_fits(heads_per_group, head_dim, chosen)
    direct = direct and heads_per_group == 1
    if launch is None and (direct or grouped):
        launch = DECODE if direct else GROUPED
    elif launch is None:
        launch = choose_launch(query.dtype, head_dim, chosen.bits, max_rows, longest)
    direct, grouped = direct and launch.block_m == 1, grouped and launch.block_m == 1
    one_tile, sequences = max_rows <= launch.block_m or grouped, page_table.shape[0]
    tiles = sequences if one_tile else num_tokens * heads_per_group // launch.block_m + sequences
    programs = chosen.num_kv_heads * tiles
    depth = GROUPED_DEPTH if grouped else 4
    splits = splits or choose_splits(programs, longest, multiprocessors_of(query.device), depth)
    target, statistics = results_of_splits(out, splits)
    arguments = (query, rows, page_table, query_starts, context_lens, target, statistics, (programs, splits), launch)
    if direct:
        _launch_decode(*arguments, chosen)
    elif grouped:
        _launch_grouped(*arguments, chosen)
    else:
        _launch_tiles(*arguments, chosen, max_rows, one_tile)
    combine_splits(target, statistics, out)
    return out


def results_of_splits(out: Tensor, splits: int) -> tuple[Tensor, Tensor]:
    """What the splits of a context are written to, for a result [T, H, D]: sums [splits, T, H, D] and the statistics of
    their softmax [splits, T, H, 2]; both are ``out`` itself where there is one split."""
    if splits == 1:
        return out, out
    results = torch.empty(splits, *out.shape, dtype=torch.float32, device=out.device)
    return results, torch.empty(splits, *out.shape[:-1], 2, dtype=torch.float32, device=out.device)


def combine_splits(results: Tensor, statistics: Tensor, out: Tensor) -> None:
    """The result of all splits, from `results_of_splits`."""
    if results is out:
        return
    splits, (num_tokens, num_heads, size) = results.shape[0], out.shape
    combine_kernel[(num_tokens * num_heads,)](
        results, statistics, out, num_tokens * num_heads, SPLITS=splits, BLOCK_S=next_power_of_2(splits),
        HEAD_DIM=size, BLOCK_D=next_power_of_2(size), num_warps=2,
    )  # fmt: skip


def _launch_decode(
    query: Tensor, rows: Tensor, page_table: Tensor, query_starts: Tensor, context_lens: Tensor, target: Tensor,
    statistics: Tensor, grid: tuple[int, int], launch: AttentionLaunch, options: AttentionOptions,
) -> None:  # fmt: skip
    """`decode_kernels`: one query token per sequence over a quantized cache whose heads are not shared."""
    head_dim, group = query.shape[2], options.group
    decode_kernel[grid](
        query, rows.view(torch.int32), page_table, query_starts, context_lens, target, statistics,
        *(query_starts if x is None else x for x in (options.alibi_slopes, options.sinks)),  # not followed then
        query.shape[0], query.stride(0), rows.stride(0) // 16, page_table.stride(0), options.scale,
        SPLIT=grid[1] > 1, ALIBI=options.alibi_slopes is not None, SINKS=options.sinks is not None,
        HEADS=options.num_kv_heads, HEAD_DIM=head_dim, PAGE_TOKENS=options.page_tokens, BITS=options.bits,
        BLOCK_G=max(1, head_dim // group), BLOCK_W=min(group, head_dim) * options.bits // 32, BLOCK_N=launch.block_n,
        STAGES=launch.num_stages, num_warps=launch.num_warps, maxnreg=launch.max_registers or None,
    )  # fmt: skip


def _launch_grouped(
    query: Tensor, rows: Tensor, page_table: Tensor, query_starts: Tensor, context_lens: Tensor, target: Tensor,
    statistics: Tensor, grid: tuple[int, int], launch: AttentionLaunch, options: AttentionOptions,
) -> None:  # fmt: skip
    """`grouped_decode_kernels`: one query token per sequence over a quantized cache whose heads are shared."""
    head_dim, shared = query.shape[2], query.shape[1] // options.num_kv_heads
    grouped_decode_kernel[grid](
        query, rows.view(torch.int32), page_table, query_starts, context_lens, target, statistics,
        query_starts if options.sinks is None else options.sinks,  # not followed then
        query.shape[0], query.stride(0), rows.stride(0) // 16, page_table.stride(0), options.scale, LIFT,
        SPLIT=grid[1] > 1, SINKS=options.sinks is not None,
        product=tl.bfloat16 if query.is_cuda else tl.float32,  # the interpreter has no products of bfloat16
        HEADS=options.num_kv_heads, SHARED=shared, BLOCK_H=8 if shared <= 8 else 16, HEAD_DIM=head_dim,
        PAGE_TOKENS=options.page_tokens, BITS=options.bits, GROUPS=reference.num_groups(head_dim, options.group),
        BLOCK_N=launch.block_n, STAGES=launch.num_stages, num_warps=launch.num_warps,
        maxnreg=launch.max_registers or None,
    )  # fmt: skip


def _launch_tiles(
    query: Tensor, rows: Tensor, page_table: Tensor, query_starts: Tensor, context_lens: Tensor, target: Tensor,
    statistics: Tensor, grid: tuple[int, int], launch: AttentionLaunch, options: AttentionOptions, max_rows: int,
    one_tile: bool,
) -> None:  # fmt: skip
    """`attention_kernels`: any query tokens, in tiles of ``launch.block_m`` rows."""
    (num_tokens, num_heads, head_dim), sequences = query.shape, page_table.shape[0]
    kv_heads, page_tokens, masks = options.num_kv_heads, options.page_tokens, options.tree_masks
    parameters, block_g, block_b = rows, 1, next_power_of_2(max(head_dim, 16))
    if options.bits != 16:
        parameters, block_g, block_b = quantized_view(rows, query.dtype, head_dim, options)
    small = min(SMALL_ROWS, launch.block_m)
    if not one_tile and num_tokens * (num_heads // kv_heads) == max_rows * sequences:
        small = 0  # all sequences have as many query tokens: none needs the small tile
    pointers = (
        query_starts if x is None else x for x in (options.alibi_slopes, options.sinks, options.positions, masks)
    )  # one that is not followed stands for what is not there
    attention_kernel[grid](
        query, rows, parameters, page_table, query_starts, context_lens, target, statistics, *pointers,
        sequences, num_tokens, query.stride(0), rows.stride(0), parameters.stride(0), page_table.stride(0),
        0 if masks is None else masks.stride(0), options.window, options.scale, options.soft_cap or 1.0,
        options.alibi_scale, BLOCK_M=launch.block_m, SMALL_M=small, SPLIT=grid[1] > 1, GROUP=num_heads // kv_heads,
        ALIBI=0 if options.alibi_slopes is None else 2 if options.alibi_scale else 1,
        SINKS=options.sinks is not None, WINDOW=(1 + options.chunked) * (options.window > 0),
        SOFT_CAP=options.soft_cap > 0, TREE=masks is not None, KV_HEADS=kv_heads, HEAD_DIM=head_dim,
        PAGE_TOKENS=page_tokens, BITS=options.bits, GROUPS=reference.num_groups(head_dim, options.group),
        BLOCK_G=block_g, BLOCK_B=block_b, BLOCK_N=launch.block_n,
        ONE_TILE=one_tile, num_warps=launch.num_warps, num_stages=launch.num_stages,
        maxnreg=launch.max_registers or None,
    )  # fmt: skip


def words_of(rows: Tensor, dtype: torch.dtype, head_dim: int, options: AttentionOptions) -> bool:
    """Whether heads are whole groups of whole 32-bit words, in powers of two, with pairs of 16-bit parameters: what
    `decode_kernels` reads."""
    group = min(options.group, head_dim)
    powers = group & (group - 1) == 0 and head_dim & (head_dim - 1) == 0
    return powers and dtype.itemsize == 2 and group * options.bits >= 32 and rows.stride(0) % 16 == 0


def grouped_fits(shared: int, head_dim: int, options: AttentionOptions) -> bool:
    """Whether `grouped_decode_kernels` reads heads that so many query heads share: of one or two groups, each of whole
    tiles of a tensor core."""
    group = min(options.group, head_dim)
    return shared <= MAX_SHARED and head_dim <= 2 * group and group >= 16 and options.alibi_slopes is None


def quantized_view(
    rows: Tensor, dtype: torch.dtype, head_dim: int, options: AttentionOptions
) -> tuple[Tensor, int, int]:
    """Rows as their parameters' dtype, and the padded numbers of groups of a head and of code bytes of a group.
    Raises ValueError."""
    bits, group = options.bits, min(options.group, next_power_of_2(head_dim))
    code_bytes = 2 * options.num_kv_heads * reference.code_bytes(head_dim, bits)
    if group & (group - 1) or rows.shape[1] % dtype.itemsize or code_bytes % dtype.itemsize:
        raise ValueError(
            "a quantized cache on the GPU needs groups of a power of two and parameters aligned to "
            f"{dtype.itemsize} bytes; got groups of {group}, "
            f"rows of {rows.shape[1]} bytes, heads of {head_dim} elements at {bits} bits: choose another group or "
            "16 bits"
        )
    block_g, block_b = next_power_of_2(reference.num_groups(head_dim, group)), group * bits // 8
    while block_g * block_b < 16:  # the least depth of a tensor core tile
        block_g *= 2
    return rows.view(dtype), block_g, block_b
