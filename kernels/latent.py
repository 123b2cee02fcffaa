"""Latent attention on the GPU: prompt chunks, single tokens and token trees in one launch of `latent_kernels`.

Nothing here waits for the device. The tiles are those that fit any GPU from compute capability 8.0 on: their speed has
not been measured.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from flexbatch.kernels import latent_reference, quant, reference
from flexbatch.kernels.attention import choose_splits, combine_splits, multiprocessors_of, results_of_splits
from flexbatch.kernels.latent_kernels import latent_kernel
from flexbatch.kernels.latent_reference import LatentOptions
from flexbatch.kernels.whole_numbers import next_power_of_2

TILE_ROWS = 16
"""Query rows of a tile: with 512 elements of a result each they take half of a multiprocessor's registers."""
TILE_KEYS, WIDE_TILE_KEYS = 32, 16
"""Keys of a tile in 16 bits and in float32: 36 KiB of shared memory for each stage of the pipeline."""


def append_latent_rows(rows: Tensor, slots: Tensor, key: Tensor, bits: int = 16, group: int = 64) -> None:
    """`latent_reference.append_latent_rows`."""
    if bits == 16 or not len(key):
        latent_reference.append_latent_rows(rows, slots, key)
    else:
        rows.index_copy_(0, slots, latent_reference.packed_rows(*quant.quantize(key[:, 0], bits, group)))


def latent_attention(
    query: Tensor,
    rows: Tensor,
    page_table: Tensor,
    query_starts: Tensor,
    context_lens: Tensor,
    *,
    out: Tensor | None = None,
    splits: int = 0,
    **options: Any,
) -> Tensor:
    """`latent_reference.latent_attention`. ``splits``: of every context, chosen from the upper bounds among the options
    unless given."""
    chosen = LatentOptions(**options)
    num_tokens, num_heads, width = query.shape
    values, masks, sequences = chosen.value_dim, chosen.tree_masks, len(page_table)
    out = query.new_empty(num_tokens, num_heads, values) if out is None else out
    assert out.is_contiguous(), f"the result must be dense, got strides {out.stride()}"
    if num_tokens == 0:
        return out
    query = query.contiguous()
    tiles = num_tokens * num_heads // TILE_ROWS + sequences
    longest = chosen.max_context_len or page_table.shape[1] * chosen.page_tokens
    splits = splits or choose_splits(tiles, longest, multiprocessors_of(query.device))
    target, statistics = results_of_splits(out, splits)
    parameters, offset = rows, 0
    if chosen.bits != 16:
        offset = reference.code_bytes(width, chosen.bits)
        if offset % query.itemsize or rows.stride(0) % query.itemsize:
            raise ValueError(
                f"a quantized latent of {width} elements at {chosen.bits} bits takes {offset} bytes of codes in rows "
                f"of {rows.shape[1]}: parameters of {query.itemsize} bytes are misaligned; choose 16 bits"
            )
        parameters, offset = rows.view(query.dtype), offset // query.itemsize
    wide = query.dtype == torch.float32
    latent_kernel[(tiles, splits)](
        query, rows, parameters, page_table, query_starts, context_lens, target, statistics,
        query_starts if masks is None else masks,  # a pointer that is not followed
        sequences, num_tokens, rows.stride(0), parameters.stride(0), offset, page_table.stride(0),
        0 if masks is None else masks.stride(0), chosen.scale * 1.4426950408889634,
        HEADS=num_heads, WIDTH=width, VALUES=values, PAGE_TOKENS=chosen.page_tokens, BITS=chosen.bits,
        GROUP=chosen.group, SPLIT=splits > 1, TREE=masks is not None, BLOCK_M=TILE_ROWS,
        BLOCK_N=WIDE_TILE_KEYS if wide else TILE_KEYS, BLOCK_V=max(16, next_power_of_2(values)),
        BLOCK_R=max(16, next_power_of_2(width - values)), num_warps=4, num_stages=1 if wide else 2,
    )  # fmt: skip
    combine_splits(target, statistics, out)
    return out
