"""Paged attention on the GPU: any mix of prompt chunks, single tokens and token trees in one launch of the kernels of
`attention_kernels`.

Nothing here waits for the device: launches depend on shapes and on the caller's bounds only, so a call can be
captured in a CUDA graph.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from flexbatch.kernels import reference
from flexbatch.kernels.attention_kernels import attention_kernel, combine_kernel
from flexbatch.kernels.decode_kernels import decode_kernel

SMALL_ROWS = 16  # the least height of a tensor core tile; what one decoded token needs when the group is no larger
MAX_SPLITS = 64


@dataclass(frozen=True)
class Launch:
    """Shape of a launch: query rows and keys of a tile, warps of a program, depth of the load pipeline, registers of a
    thread (0: the compiler's choice).

    ``page_slices``: page numbers are loaded once a page, not once a key, where pages divide tiles."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    max_registers: int = 0
    page_slices: bool = False


DECODE = Launch(1, 32, 2, 3)
"""One query token over quantised heads of their own: 2,600 GB/s at 8 and 1,490 at 4 bits on the H200, with four
warps 2,300 and 1,270."""


def choose_launch(dtype: torch.dtype, head_dim: int, bits: int, max_rows: int) -> Launch:
    """Tiles that fit the registers and shared memory of a Hopper multiprocessor, by the largest number of query rows
    of a sequence."""
    wide = head_dim > 128
    if dtype == torch.float32:  # no tensor cores at full precision
        return Launch(16 if max_rows <= SMALL_ROWS else 32, 16 if wide else 32, 8, 1)
    if max_rows <= SMALL_ROWS:
        return Launch(SMALL_ROWS, 32 if wide else 64, 4, 3)
    if max_rows <= 64 or wide or bits != 16:
        return Launch(64, 32 if wide else 64, 4, 2 if wide else 3)
    # At most 128 registers let two programs share a multiprocessor: one multiplies while the other takes exponentials.
    # On the H200 462 instead of 311 TFLOP/s for 8,192 tokens with grouped heads, 185 instead of 144 for 16 prompts of
    # 512 with heads of their own.
    return Launch(128, 64, 8, 3, max_registers=128)


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def choose_splits(programs: int, max_context_len: int, multiprocessors: int) -> int:
    """Splits of the context that fill the chip about four programs deep, none shorter than 256 keys; a power of two:
    `combine_kernel` is compiled for each."""
    wanted = max(1, min(-(-4 * multiprocessors // programs), -(-max_context_len // 256), MAX_SPLITS))
    return 1 << (wanted.bit_length() - 1)


def paged_attention(
    query: Tensor,
    rows: Tensor,
    page_table: Tensor,
    query_starts: Tensor,
    context_lens: Tensor,
    *,
    num_kv_heads: int,
    page_tokens: int,
    scale: float,
    bits: int = 16,
    group: int = 64,
    alibi_slopes: Tensor | None = None,
    alibi_scale: float = 0.0,
    window: int = 0,
    soft_cap: float = 0.0,
    tree_masks: Tensor | None = None,
    positions: Tensor | None = None,
    max_query_len: int = 0,
    max_context_len: int = 0,
    out: Tensor | None = None,
    splits: int = 0,
    launch: Launch | None = None,
) -> Tensor:
    """`reference.paged_attention`. ``max_query_len``, ``max_context_len``: upper bounds over the sequences (0: what
    the shapes allow); they choose the launch and must hold. ``splits``, ``launch``: chosen from these unless given.
    A quantised cache needs a group that is a power of two. Raises ValueError."""
    num_tokens, num_heads, head_dim = query.shape
    num_sequences, max_pages = page_table.shape
    heads_per_group = num_heads // num_kv_heads
    out = torch.empty(query.shape, dtype=query.dtype, device=query.device) if out is None else out
    assert out.is_contiguous(), f"the result must be dense, got strides {out.stride()}"
    if num_tokens == 0:
        return out
    if query.stride()[1:] != (head_dim, 1):
        query = query.contiguous()
    max_rows = (max_query_len or num_tokens) * heads_per_group
    plain = tree_masks is None and not window and not soft_cap and not alibi_scale
    direct = bits != 16 and max_rows == 1 and plain and words_of(rows, query.dtype, head_dim, bits, group)
    alibi = 0 if alibi_slopes is None else 2 if alibi_scale else 1
    launch = launch or (DECODE if direct else choose_launch(query.dtype, head_dim, bits, max_rows))
    one_tile = max_rows <= launch.block_m
    programs = num_kv_heads * (
        num_sequences if one_tile else num_tokens * heads_per_group // launch.block_m + num_sequences
    )
    splits = splits or choose_splits(
        programs, max_context_len or max_pages * page_tokens, _multiprocessors(query.device)
    )
    target, statistics = out, out
    if splits > 1:
        target = torch.empty(splits, num_tokens, num_heads, head_dim, dtype=torch.float32, device=query.device)
        statistics = torch.empty(splits, num_tokens, num_heads, 2, dtype=torch.float32, device=query.device)
    slopes, positions_or_none, masks = (
        query_starts if x is None else x for x in (alibi_slopes, positions, tree_masks)
    )  # a pointer that is not followed
    if direct and launch.block_m == 1:
        decode_kernel[(programs, splits)](
            query, rows.view(torch.int32), page_table, query_starts, context_lens, target, statistics, slopes, num_tokens, query.stride(0),
            rows.stride(0) // 16, page_table.stride(0), scale, SPLIT=splits > 1, ALIBI=alibi_slopes is not None, HEADS=num_kv_heads, HEAD_DIM=head_dim,
            PAGE_TOKENS=page_tokens, BITS=bits, BLOCK_G=max(1, head_dim // group), BLOCK_W=min(group, head_dim) * bits // 32, BLOCK_N=launch.block_n,
            STAGES=launch.num_stages, num_warps=launch.num_warps, maxnreg=launch.max_registers or None,
        )  # fmt: skip
    else:
        parameters, block_g, block_b = rows, 1, triton.next_power_of_2(max(head_dim, 16))
        if bits != 16:
            parameters, block_g, block_b = quantised_view(rows, query.dtype, num_kv_heads, head_dim, bits, group)
        small = min(SMALL_ROWS, launch.block_m)
        if not one_tile and num_tokens * heads_per_group == max_rows * num_sequences:
            small = 0  # all sequences have as many query tokens: none needs the small tile
        attention_kernel[(programs, splits)](
            query, rows, parameters, page_table, query_starts, context_lens, target, statistics, slopes, positions_or_none, masks,
            num_sequences, num_tokens, query.stride(0), rows.stride(0), parameters.stride(0), page_table.stride(0),
            0 if tree_masks is None else tree_masks.stride(0), window, scale, soft_cap or 1.0, alibi_scale,
            BLOCK_M=launch.block_m, SMALL_M=small, SPLIT=splits > 1, GROUP=heads_per_group, ALIBI=alibi,
            WINDOW=window > 0, SOFT_CAP=soft_cap > 0, TREE=tree_masks is not None, KV_HEADS=num_kv_heads, HEAD_DIM=head_dim, PAGE_TOKENS=page_tokens,
            BITS=bits, GROUPS=reference.num_groups(head_dim, group), BLOCK_G=block_g, BLOCK_B=block_b, BLOCK_N=launch.block_n,
            PAGE_SLICES=launch.page_slices and launch.block_n % page_tokens == 0 and page_tokens & (page_tokens - 1) == 0, ONE_TILE=one_tile,
            num_warps=launch.num_warps, num_stages=launch.num_stages, maxnreg=launch.max_registers or None,
        )  # fmt: skip
    if splits > 1:
        combine_kernel[(num_tokens * num_heads,)](
            target, statistics, out, num_tokens * num_heads, SPLITS=splits, BLOCK_S=triton.next_power_of_2(splits), HEAD_DIM=head_dim,
            BLOCK_D=triton.next_power_of_2(head_dim), num_warps=2,
        )  # fmt: skip
    return out


def words_of(rows: Tensor, dtype: torch.dtype, head_dim: int, bits: int, group: int) -> bool:
    """Whether heads are whole groups of whole 32-bit words, in powers of two, with pairs of 16-bit parameters: what
    `decode_kernels` reads."""
    group = min(group, head_dim)
    powers = group & (group - 1) == 0 and head_dim & (head_dim - 1) == 0
    return powers and dtype.itemsize == 2 and group * bits >= 32 and rows.stride(0) % 16 == 0


def quantised_view(
    rows: Tensor, dtype: torch.dtype, num_kv_heads: int, head_dim: int, bits: int, group: int
) -> tuple[Tensor, int, int]:
    """Rows as their parameters' dtype, and the padded numbers of groups of a head and of code bytes of a group.
    Raises ValueError."""
    group = min(group, triton.next_power_of_2(head_dim))
    misaligned = (
        rows.shape[1] % dtype.itemsize or 2 * num_kv_heads * reference.code_bytes(head_dim, bits) % dtype.itemsize
    )
    if group & (group - 1) or misaligned:
        raise ValueError(
            "a quantised cache on the GPU needs groups of a power of two and parameters aligned to "
            f"{dtype.itemsize} bytes; got groups of {group}, "
            f"rows of {rows.shape[1]} bytes, heads of {head_dim} elements at {bits} bits: choose another group or "
            "16 bits"
        )
    block_g, block_b = triton.next_power_of_2(reference.num_groups(head_dim, group)), group * bits // 8
    while block_g * block_b < 16:  # the least depth of a tensor core tile
        block_g *= 2
    return rows.view(dtype), block_g, block_b
