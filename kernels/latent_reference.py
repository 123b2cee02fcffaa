"""Plain-torch oracle of latent attention (DeepSeek-AI 2024, "DeepSeek-V2", section 2.1); also the path on the CPU.

A token row is one key for all heads: the compressed latent and, behind it, the rotated part of the key. Its first
``value_dim`` elements, the latent, are the value as well, so nothing is stored twice. Queries come projected into the
space of the latent, and so do results leave. Unquantized rows are ``[num_slots, 1, 1, width]`` in the compute dtype,
quantized ones ``[num_slots, token_bytes]`` uint8: codes, parameters, padding, as in `reference`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from flexbatch.kernels.reference import ROW_ALIGNMENT, code_bytes, dequantize, num_groups, quantize

MAX_SCORES = 1 << 22
"""Scores that exist at one time on the CPU: 16 MiB."""


class LatentOptions(NamedTuple):
    """The keyword arguments that every implementation of `latent_attention` takes, as those of `AttentionOptions`;
    value_dim: elements at the beginning of a row that are the value."""

    value_dim: int
    page_tokens: int
    scale: float
    bits: int = 16
    group: int = 64
    tree_masks: Tensor | None = None
    positions: Tensor | None = None
    max_query_len: int = 0
    max_context_len: int = 0


def latent_workspace_bytes(num_heads: int, width: int, keys: int) -> int:
    """What `latent_attention` takes beside its tensors for contexts of so many ``keys``: scores and shares, the rows as
    they are stored and in float32."""
    return 12 * max(MAX_SCORES, num_heads * keys) + 16 * keys * width


def append_latent_rows(rows: Tensor, slots: Tensor, key: Tensor, bits: int = 16, group: int = 64) -> None:
    """Write keys [num_tokens, 1, width] at ``slots`` [num_tokens] int64 of ``rows`` (in place)."""
    if bits == 16:
        rows[:, 0].index_copy_(0, slots, key)
    else:
        rows.index_copy_(0, slots, packed_rows(*quantize(key[:, 0], bits, group)))


def packed_rows(codes: Tensor, parameters: Tensor) -> Tensor:
    """Token rows of codes [n, code bytes] and parameters [n, groups, 2]."""
    packed = torch.cat([codes, parameters.flatten(1).view(torch.uint8)], dim=1)
    return F.pad(packed, (0, -packed.shape[1] % ROW_ALIGNMENT))


def unpack_latent_rows(rows: Tensor, width: int, bits: int, group: int, dtype: torch.dtype) -> Tensor:
    """Keys [num_tokens, width] of token rows (any selection of them)."""
    if bits == 16:
        return rows[:, 0, 0]
    end = code_bytes(width, bits)
    stored = rows[:, end : end + num_groups(width, group) * 2 * dtype.itemsize]
    # A copy starts where the parameters' type may; a slice of one row may not.
    parameters = stored.clone(memory_format=torch.contiguous_format).view(dtype).view(len(rows), -1, 2)
    return dequantize(rows[:, :end], parameters, width, bits, group)


def latent_attention(
    query: Tensor,
    rows: Tensor,
    page_table: Tensor,
    query_starts: Tensor,
    context_lens: Tensor,
    *,
    out: Tensor | None = None,
    **options: Any,
) -> Tensor:
    """Attention of ragged query tokens over a paged cache that already holds their own rows.

    query: [num_tokens, num_heads, width]; the other arguments as those of `attention_reference.paged_attention`.
    Returns [num_tokens, num_heads, value_dim]: ``out``, dense, where it is given.
    """
    chosen = LatentOptions(**options)
    out = query.new_empty(*query.shape[:2], chosen.value_dim) if out is None else out
    starts = query_starts.tolist()
    for s, context in enumerate(context_lens.tolist()):
        begin, end = starts[s], starts[s + 1]
        if end == begin:
            continue
        offsets = torch.arange(chosen.page_tokens, device=query.device)
        slots = (page_table[s].long().unsqueeze(1) * chosen.page_tokens + offsets).flatten()[:context]
        keys = unpack_latent_rows(rows[slots], query.shape[2], chosen.bits, chosen.group, query.dtype).float()
        step = max(1, MAX_SCORES // (context * query.shape[1]))
        for first in range(begin, end, step):
            part = slice(first, min(first + step, end))
            visible = _visible(part, begin, end - begin, context, chosen, query.device)
            scores = torch.matmul(query[part].float(), keys.t()) * chosen.scale
            shares = scores.masked_fill_(~visible[:, None], -torch.inf).softmax(-1)
            out[part] = torch.matmul(shares, keys[:, : chosen.value_dim]).to(query.dtype)
    return out


def _visible(
    part: slice, begin: int, queries: int, context: int, options: LatentOptions, device: torch.device
) -> Tensor:
    """Which keys [queries of the part, context] each query token sees, of a sequence that begins at ``begin``."""
    prefix, keys = context - queries, torch.arange(context, device=device)
    own = torch.arange(part.start - begin, part.stop - begin, device=device)[:, None]
    if options.tree_masks is None:
        return keys[None, :] <= prefix + own
    bit = keys[: context - prefix]
    ancestors = (options.tree_masks[part].long()[:, bit // 32] >> (bit % 32)) & 1
    before = torch.ones(part.stop - part.start, prefix, dtype=torch.bool, device=device)
    return torch.cat([before, ancestors.bool()], dim=1)
