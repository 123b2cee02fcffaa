"""Every operation of this room, by the device of its tensors: CUDA -> Triton, CPU -> compiled C where there is a compiler, else `reference`.

Names, arguments and results are those of `reference`, which documents them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from flexbatch.kernels import native, reference


def _compiled(dtype: torch.dtype) -> bool:
    return dtype in native.DTYPES and native.library() is not None


def paged_attention(query: Tensor, rows: Tensor, page_table: Tensor, query_starts: Tensor, context_lens: Tensor, *, threads: int = 0, **options) -> Tensor:
    """`reference.paged_attention`. ``threads``: processor threads when the tensors are on the CPU (0: torch's number)."""
    if query.is_cuda:
        from flexbatch.kernels import attention

        return attention.paged_attention(query, rows, page_table, query_starts, context_lens, **options)
    if _compiled(query.dtype):
        return native.paged_attention(query, rows, page_table, query_starts, context_lens, threads=threads, **options)
    return reference.paged_attention(query, rows, page_table, query_starts, context_lens, **options)


def append_rows(rows: Tensor, slots: Tensor, key: Tensor, value: Tensor, bits: int = 16, group: int = 64) -> None:
    """`reference.append_rows`."""
    if key.is_cuda:
        from flexbatch.kernels import quant

        quant.append_rows(rows, slots, key, value, bits, group)
    elif _compiled(key.dtype):
        native.append_rows(rows, slots, key, value, bits, group)
    else:
        reference.append_rows(rows, slots, key, value, bits, group)


def quantize(x: Tensor, bits: int, group: int) -> tuple[Tensor, Tensor]:
    """`reference.quantize`."""
    if x.is_cuda:
        from flexbatch.kernels import quant

        return quant.quantize(x, bits, group)
    return reference.quantize(x, bits, group)


def dequantize(codes: Tensor, parameters: Tensor, size: int, bits: int, group: int, out: Tensor | None = None) -> Tensor:
    """`reference.dequantize`, into ``out`` [..., size] where it is given."""
    if codes.is_cuda:
        from flexbatch.kernels import quant

        return quant.dequantize(codes, parameters, size, bits, group, out=out)
    dense = reference.dequantize(codes, parameters, size, bits, group)
    return dense if out is None else out.copy_(dense)


def gather_pages(source: Tensor, page_ids: Tensor, destination: Tensor) -> None:
    """``destination[i] = source[page_ids[i]]``. source: [num_pages, page_bytes] uint8, pinned on the host when the rest is on a GPU; page_ids: [n] int32."""
    if destination.is_cuda:
        from flexbatch.kernels import pages

        pages.gather_pages(source, page_ids, destination)
    else:
        torch.index_select(source, 0, page_ids, out=destination)


def scatter_rows(source: Tensor, destination: Tensor, slots: Tensor) -> None:
    """``destination[slots[i]] = source[i]`` for token rows; destination is pinned on the host when the rest is on a GPU; slots: [n] int64."""
    if source.is_cuda:
        from flexbatch.kernels import pages

        pages.scatter_rows(source, destination, slots)
    else:
        destination.index_copy_(0, slots, source)
