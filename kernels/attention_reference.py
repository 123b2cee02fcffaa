"""Plain-torch oracle of paged attention; also the path that runs where no faster one does."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from flexbatch.kernels.reference import unpack_rows


class AttentionOptions(NamedTuple):
    """The keyword arguments that every implementation of `paged_attention` takes.

    bits: of an element of the cache, 4, 8, or 16 for the compute dtype, whatever its width. group: elements of a head
    that share a scale and a minimum in a quantized cache. alibi_slopes: [num_heads] float32; with ``alibi_scale``
    slopes and key positions and their products are rounded to bfloat16 and then scaled by it, as Falcon does. window:
    keys at a distance of ``window`` or more are masked (0: none); ``chunked``: those before the multiple of ``window``
    that the query's position has reached. soft_cap: cap * tanh(score / cap) (0: none).
    sinks: [num_heads] float32, one more score of every query of a head, as of a key whose value is zero.
    tree_masks: [num_tokens, words] int32, bit b of word w set when the token sees query token 32 * w + b of its own
    sequence (itself included); without it the query tokens are causal. positions: [num_tokens] int32, needed only with
    ``tree_masks`` (depths, for ALiBi and window). max_query_len, max_context_len: upper bounds over the sequences (0:
    what the shapes allow); they choose the launch on a GPU, and must hold.
    """

    num_kv_heads: int
    page_tokens: int
    scale: float
    bits: int = 16
    group: int = 64
    alibi_slopes: Tensor | None = None
    alibi_scale: float = 0.0
    window: int = 0
    soft_cap: float = 0.0
    sinks: Tensor | None = None
    tree_masks: Tensor | None = None
    positions: Tensor | None = None
    max_query_len: int = 0
    max_context_len: int = 0
    chunked: bool = False


def paged_attention(
    query: Tensor,
    rows: Tensor,
    page_table: Tensor,
    query_starts: Tensor,
    context_lens: Tensor,
    *,
    out: Tensor | None = None,
    **options: Any,
) -> Tensor:
    """Attention of ragged query tokens over a paged cache that already holds their own keys and values.

    query: [num_tokens, num_heads, head_dim], the query tokens of all sequences one after another. rows: token rows
    of one layer (`reference`). page_table: [num_sequences, max_pages] int32. query_starts: [num_sequences + 1] int32.
    context_lens: [num_sequences] int32, keys of each sequence including its own query tokens, which fill the last
    slots. options: `AttentionOptions`. Returns [num_tokens, num_heads, head_dim]: ``out``, dense, where it is given.
    """
    chosen = AttentionOptions(**options)
    out = torch.empty_like(query) if out is None else out
    starts = query_starts.tolist()
    for s, context in enumerate(context_lens.tolist()):
        span = slice(starts[s], starts[s + 1])
        if span.stop > span.start:
            out[span] = _attend(query, rows, page_table[s], span, context, chosen)
    return out


def _attend(query: Tensor, rows: Tensor, pages: Tensor, span: slice, context: int, options: AttentionOptions) -> Tensor:
    """Result [queries, num_heads, head_dim] of the query tokens ``span`` of one sequence of ``context`` keys."""
    queries, (num_heads, head_dim), kv_heads = span.stop - span.start, query.shape[1:], options.num_kv_heads
    offsets = torch.arange(options.page_tokens, device=query.device)
    slots = (pages.long().unsqueeze(1) * options.page_tokens + offsets).flatten()[:context]
    key, value = unpack_rows(rows[slots], kv_heads, head_dim, options.bits, options.group, query.dtype)
    q = query[span].float().view(queries, kv_heads, num_heads // kv_heads, head_dim)
    scores = torch.einsum("qhgd,khd->hgqk", q, key.float()) * options.scale
    if options.soft_cap:
        scores = options.soft_cap * torch.tanh(scores / options.soft_cap)
    query_position, key_position, visible = _visibility(span, context, options, query.device)
    distance = query_position[:, None] - key_position[None, :]
    if options.chunked and options.window:
        visible = visible & (key_position[None, :] >= (query_position // options.window * options.window)[:, None])
    elif options.window:
        visible = visible & (distance < options.window)
    if options.alibi_slopes is not None:
        slopes = options.alibi_slopes.view(kv_heads, -1, 1, 1)
        if options.alibi_scale:
            # The query's own term is the same for all its keys: it only keeps the scores small.
            rounded = (slopes.bfloat16() * key_position).float()
            scores = scores + options.alibi_scale * (rounded - slopes * query_position[:, None])
        else:
            scores = scores - slopes * distance
    scores = scores.masked_fill(~visible, float("-inf"))
    if options.sinks is not None:
        sinks = options.sinks.view(kv_heads, -1, 1, 1).expand(-1, -1, queries, 1)
        scores = torch.cat([scores, sinks], dim=-1)
    probabilities = torch.softmax(scores, dim=-1)[..., :context]
    result = torch.einsum("hgqk,khd->qhgd", probabilities, value.float())
    return result.reshape(queries, num_heads, head_dim).to(query.dtype)


def _visibility(
    span: slice, context: int, options: AttentionOptions, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """Positions of the query tokens and of the keys, and which keys [queries, context] causality or the tree lets each
    query token see."""
    queries = span.stop - span.start
    prefix = context - queries
    key_position = torch.arange(context, device=device)
    if options.tree_masks is None:
        query_position = key_position[prefix:]
        return query_position, key_position, key_position[None, :] <= query_position[:, None]
    assert options.positions is not None, "a tree needs the depth of every query token"
    query_position = options.positions[span].long()
    bit = torch.arange(queries, device=device)
    ancestors = (options.tree_masks[span].long()[:, bit // 32] >> (bit % 32)) & 1
    visible = torch.cat([torch.ones(queries, prefix, dtype=torch.bool, device=device), ancestors.bool()], dim=1)
    return query_position, torch.cat([key_position[:prefix], query_position]), visible
