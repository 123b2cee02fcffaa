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


def dequantize(codes: Tensor, parameters: Tensor, size: int, bits: int, group: int) -> Tensor:
    """`reference.dequantize`."""
    if codes.is_cuda:
        from flexbatch.kernels import quant

        return quant.dequantize(codes, parameters, size, bits, group)
    return reference.dequantize(codes, parameters, size, bits, group)
