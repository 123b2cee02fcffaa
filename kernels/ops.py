"""Every operation of this package, by the device of its tensors: CUDA -> Triton, CPU -> compiled C where there is a
compiler, else `reference` and `attention_reference`.

Names, arguments and results are those of these two, which document them. Triton is imported when the first CUDA
tensor comes.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from flexbatch.kernels import (
    attention_reference,
    coded_matrix,
    experts_reference,
    latent_reference,
    low_rank_reference,
    mxfp4_reference,
    native,
    native_coded,
    native_experts,
    native_quant,
    reference,
)


def load_compiled() -> None:
    """Compile the CPU's kernels, or load them, before their first use: that takes seconds, once on a machine."""
    native.library()


def _compiled(dtype: torch.dtype) -> bool:
    return dtype in native.DTYPES and native.library() is not None


def paged_attention(
    query: Tensor,
    rows: Tensor,
    page_table: Tensor,
    query_starts: Tensor,
    context_lens: Tensor,
    *,
    threads: int = 0,
    **options: Any,
) -> Tensor:
    """`attention_reference.paged_attention`. ``threads``: processor threads when the tensors are on the CPU (0: torch's
    number)."""
    if query.is_cuda:
        from flexbatch.kernels import attention

        return attention.paged_attention(query, rows, page_table, query_starts, context_lens, **options)
    if _compiled(query.dtype):
        return native.paged_attention(query, rows, page_table, query_starts, context_lens, threads=threads, **options)
    return attention_reference.paged_attention(query, rows, page_table, query_starts, context_lens, **options)


def append_rows(
    rows: Tensor, slots: Tensor, key: Tensor, value: Tensor, bits: int = 16, group: int = 64, *, threads: int = 0
) -> None:
    """`reference.append_rows`. ``threads``: as for `paged_attention`."""
    if key.is_cuda:
        from flexbatch.kernels import quant

        quant.append_rows(rows, slots, key, value, bits, group)
    elif _compiled(key.dtype):
        native.append_rows(rows, slots, key, value, bits, group, threads=threads)
    else:
        reference.append_rows(rows, slots, key, value, bits, group)


def latent_attention(query: Tensor, rows: Tensor, *tensors: Tensor, **options: Any) -> Tensor:
    """`latent_reference.latent_attention`. On the CPU torch's products are as fast as there are: all heads share a
    row."""
    if query.is_cuda:
        from flexbatch.kernels import latent

        return latent.latent_attention(query, rows, *tensors, **options)
    return latent_reference.latent_attention(query, rows, *tensors, **options)


def append_latent_rows(rows: Tensor, slots: Tensor, key: Tensor, bits: int = 16, group: int = 64) -> None:
    """`latent_reference.append_latent_rows`."""
    if key.is_cuda:
        from flexbatch.kernels import latent

        latent.append_latent_rows(rows, slots, key, bits, group)
    else:
        latent_reference.append_latent_rows(rows, slots, key, bits, group)


def quantize(x: Tensor, bits: int, group: int) -> tuple[Tensor, Tensor]:
    """`reference.quantize`."""
    if x.is_cuda:
        from flexbatch.kernels import quant

        return quant.quantize(x, bits, group)
    return reference.quantize(x, bits, group)


def fit(x: Tensor, bits: int, group: int) -> tuple[Tensor, Tensor]:
    """`reference.fit`."""
    if x.is_cuda:
        from flexbatch.kernels import quant_fit

        return quant_fit.fit(x, bits, group)
    if native_quant.usable(x.dtype, bits, group):
        return native_quant.fit(x, bits, group)
    return reference.fit(x, bits, group)


def dequantize(
    codes: Tensor, parameters: Tensor, size: int, bits: int, group: int, out: Tensor | None = None
) -> Tensor:
    """`reference.dequantize`, into ``out`` [..., size] where it is given."""
    if codes.is_cuda:
        from flexbatch.kernels import quant

        return quant.dequantize(codes, parameters, size, bits, group, out=out)
    if native_quant.usable(parameters.dtype, bits, group):
        return native_quant.dequantize(codes, parameters, size, bits, group, out)
    dense = reference.dequantize(codes, parameters, size, bits, group)
    return dense if out is None else out.copy_(dense)


def linear(x: Tensor, matrix: Tensor | coded_matrix.CodedMatrix, bias: Tensor | None = None) -> Tensor:
    """x [tokens, columns] times a matrix [rows, columns], and a bias."""
    if isinstance(matrix, Tensor):
        return F.linear(x, matrix, bias)
    if x.is_cuda:
        from flexbatch.kernels import coded_gemm, coded_linear

        few = x.shape[0] <= coded_linear.MOST_TOKENS
        return (coded_linear.coded_linear if few else coded_gemm.coded_gemm)(x, matrix, bias)
    form = matrix.bits, matrix.group, matrix.columns, x.element_size(), "cpu"
    if _compiled(x.dtype) and coded_matrix.multiplied(*form):
        return native_coded.linear(x, matrix, bias)
    return matrix.linear(x, bias)


def expand_mxfp4(codes: Tensor, scales: Tensor, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
    """`mxfp4_reference.expand`, into ``out`` [..., size] where it is given."""
    if codes.is_cuda:
        from flexbatch.kernels import mxfp4

        return mxfp4.expand(codes, scales, dtype, out)
    dense = mxfp4_reference.expand(codes, scales, dtype)
    return dense if out is None else out.copy_(dense)


def gather_pages(source: Tensor, page_ids: Tensor, destination: Tensor) -> None:
    """`reference.gather_pages`; the source is pinned on the host when the rest is on a GPU."""
    if destination.is_cuda:
        from flexbatch.kernels import pages

        pages.gather_pages(source, page_ids, destination)
    else:
        reference.gather_pages(source, page_ids, destination)


def scatter_rows(source: Tensor, destination: Tensor, slots: Tensor) -> None:
    """`reference.scatter_rows`; the destination is pinned on the host when the rest is on a GPU."""
    if source.is_cuda:
        from flexbatch.kernels import pages

        pages.scatter_rows(source, destination, slots)
    else:
        reference.scatter_rows(source, destination, slots)


def copy_parts(source: Tensor, target: Tensor, parts: Tensor, wanted: Tensor, word: int = 1) -> None:
    """`reference.copy_parts`; the source is pinned on the host when the rest is on a GPU. word: bytes that divide all
    starts and ends, 1, 2, 4 or 8."""
    if target.is_cuda:
        from flexbatch.kernels import pages

        pages.copy_parts(source, target, parts, wanted, word)
    else:
        reference.copy_parts(source, target, parts, wanted)


def rms_norm(
    x: Tensor,
    weight: Tensor,
    eps: float,
    *,
    residual: Tensor | None = None,
    offset: float = 0.0,
    wide: bool = False,
) -> Tensor:
    """`reference.rms_norm`."""
    if x.is_cuda:
        from flexbatch.kernels import norm_rope

        return norm_rope.rms_norm(x, weight, eps, residual=residual, offset=offset, wide=wide)
    return reference.rms_norm(x, weight, eps, residual=residual, offset=offset, wide=wide)


def layer_norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, *, residual: Tensor | None = None
) -> Tensor:
    """`reference.layer_norm`."""
    if x.is_cuda:
        from flexbatch.kernels import norm_rope

        return norm_rope.layer_norm(x, weight, bias, eps, residual=residual)
    return reference.layer_norm(x, weight, bias, eps, residual=residual)


def rotary(
    query: Tensor,
    key: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor,
    *,
    rotary_dim: int,
    interleaved: bool = False,
) -> None:
    """`reference.rotary`."""
    if query.is_cuda:
        from flexbatch.kernels import norm_rope

        norm_rope.rotary(query, key, cos, sin, positions, rotary_dim=rotary_dim, interleaved=interleaved)
    else:
        reference.rotary(query, key, cos, sin, positions, rotary_dim=rotary_dim, interleaved=interleaved)


def gated_activation(gate_up: Tensor, activation: str) -> Tensor:
    """`reference.gated_activation`."""
    if gate_up.is_cuda:
        from flexbatch.kernels import norm_rope

        return norm_rope.gated_activation(gate_up, activation)
    return reference.gated_activation(gate_up, activation)


def clamped_gate(gate_up: Tensor, gain: float, limit: float) -> Tensor:
    """`reference.clamped_gate`."""
    if gate_up.is_cuda:
        from flexbatch.kernels import norm_rope

        return norm_rope.clamped_gate(gate_up, gain, limit)
    return reference.clamped_gate(gate_up, gain, limit)


def keep_largest(logits: Tensor, first: int, peaks: Tensor, token_ids: Tensor) -> None:
    """`reference.keep_largest`."""
    if logits.is_cuda:
        from flexbatch.kernels import largest

        largest.keep_largest(logits, first, peaks, token_ids)
    else:
        reference.keep_largest(logits, first, peaks, token_ids)


def low_rank_update(out: Tensor, x: Tensor, *arguments: Any, **options: Any) -> None:
    """`low_rank_reference.low_rank_update`."""
    if out.is_cuda:
        from flexbatch.kernels import low_rank

        low_rank.low_rank_update(out, x, *arguments, **options)
    else:
        low_rank_reference.low_rank_update(out, x, *arguments, **options)


def replace_columns(out: Tensor, x: Tensor, *arguments: Any) -> None:
    """`low_rank_reference.replace_columns`."""
    if out.is_cuda:
        from flexbatch.kernels import low_rank

        low_rank.replace_columns(out, x, *arguments)
    else:
        low_rank_reference.replace_columns(out, x, *arguments)


def expert_rows(
    x: Tensor,
    tokens: Tensor,
    experts: Tensor,
    table: native_experts.ExpertTable,
    scales: Tensor | None = None,
    *,
    out: Tensor | None = None,
    threads: int = 0,
) -> Tensor:
    """`experts_reference.expert_rows`, of experts in host memory, into ``out`` where it is given."""
    if _compiled(x.dtype):
        return native_experts.expert_rows(x, tokens, experts, table, scales, out=out, threads=threads)
    rows = experts_reference.expert_rows(x, tokens, experts, table.stored, scales)
    return rows if out is None else out.copy_(rows)
