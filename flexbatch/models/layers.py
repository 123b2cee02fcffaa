"""The decoder as pure functions over a dict role -> tensor, on flat ragged tokens (no batch dimension).

T: tokens, H: hidden size, E: width of the embedding table, D: head size. Attention itself lies between
`pre_attention` and `post_attention`. ``adapters``: those of the tokens at hand, None where no token has one. ``ranks``:
of tensor parallelism, where the weights are a part of the layer's; None where they are all of it.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping
from functools import partial
from typing import Any, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from flexbatch.kernels import ops
from flexbatch.models import experts, latent
from flexbatch.models.arch import Arch
from flexbatch.models.experts import Elsewhere, FetchHit, Halves
from flexbatch.models.lora.applied import PassAdapters
from flexbatch.models.rope import RopeTables
from flexbatch.models.routing import RoutingCounts
from flexbatch.parallel.tensor_ranks import TensorRanks

Weights = Mapping[str, Any]
"""Tensors; what `_linear` multiplies with may be a `CodedMatrix`."""
COLUMNS = 256
"""Parts of a vocabulary are multiples of so many tokens: whole tiles of a product."""


class Apart(NamedTuple):
    """Hidden states after a layer [T, H] as two parts, ours both, that the norm of the next layer adds up: one trip
    through memory less, and one launch."""

    hidden: Tensor
    update: Tensor


T = TypeVar("T")
LayerHalves = Generator[None, None, Tensor | Apart]
"""As `Halves`, of a layer."""


def embed(
    arch: Arch, weights: Weights, embed_rows: Tensor, pos_rows: Tensor | None, adapters: PassAdapters | None = None
) -> Tensor:
    """Hidden state [T, H] of embedding rows [T, E] and, for learned positions, position rows [T, H] (row ``position
    + arch.position_offset``)."""
    hidden = embed_rows
    if arch.embed_scale != 1.0:
        # The factor is rounded to the compute dtype first, as the published models were trained.
        hidden = hidden * torch.tensor(arch.embed_scale, dtype=hidden.dtype).item()
    if arch.projects_embedding:
        hidden = _linear(weights, "project_in", hidden, -1, adapters)
    if arch.position == "learned":
        assert pos_rows is not None, "learned positions need their rows"
        hidden = hidden + pos_rows
    return _norm(arch, weights, "embed_norm", hidden) if arch.embed_norm else hidden


def pre_attention(
    arch: Arch,
    layer: int,
    weights: Weights,
    hidden: Tensor | Apart,
    positions: Tensor,
    rope: RopeTables | None,
    adapters: PassAdapters | None = None,
    ranks: TensorRanks | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Query [T, Hq, D], key and value [T, Hkv, D] of ``hidden`` [T, H] at ``positions`` [T]; of latent attention the
    key is the value. What is `Apart` is added up into its first part."""
    if isinstance(hidden, Apart):
        normed = _norm(arch, weights, "attn_norm", hidden.update, hidden.hidden)
    else:
        normed = hidden if arch.post_norm else _norm(arch, weights, "attn_norm", hidden)
    if arch.latent is not None:
        assert rope is not None, "latent attention rotates"
        linear = partial(_linear_of, weights, layer, adapters)
        query, key = latent.project(arch, weights, normed, rope.of(arch, layer), positions, linear)
        return query, key, key
    fused = _linear(weights, "qkv", normed, layer, adapters)
    heads = fused.view(fused.shape[0], -1, arch.head_dim)
    query, key, value = heads.split_with_sizes((arch.num_heads, arch.num_kv_heads, arch.num_kv_heads), 1)
    if arch.wide_qk_norm and ranks is not None:
        query, key = _wide_norms(arch, weights, query, key, ranks)
    elif arch.wide_qk_norm:
        query, key = (
            ops.rms_norm(x.flatten(1), weights[role], arch.norm_eps, offset=arch.norm_offset, wide=arch.norm_wide).view(
                x.shape
            )
            for x, role in ((query, "q_norm.weight"), (key, "k_norm.weight"))
        )
    if arch.clip_qkv:
        query, key, value = (x.clamp(-arch.clip_qkv, arch.clip_qkv) for x in (query, key, value))
    if arch.qk_norm:
        query, key = _normed_heads(arch, weights, query, key)
    if rope is not None and arch.rotates(layer):
        cos, sin = rope.of(arch, layer)
        ops.rotary(query, key, cos, sin, positions, rotary_dim=arch.rotary_dim, interleaved=arch.rope_interleaved)
    if arch.late_qk_norm:
        query, key = _normed_heads(arch, weights, query, key)
    if arch.plain_qk_norm and arch.rotates(layer):
        ones = query.new_ones(arch.head_dim)
        query, key = (ops.rms_norm(x, ones, arch.norm_eps) for x in (query, key))
    if arch.query_growth and not arch.rotates(layer):
        growth = ((positions.float() + 1.0) / arch.query_growth_tokens).floor().log1p() * arch.query_growth + 1.0
        query = (query * growth[:, None, None]).to(query.dtype)
    return query, key, value


def _normed_heads(arch: Arch, weights: Weights, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
    """Every head of queries and of keys by itself."""
    query, key = (
        ops.rms_norm(x, weights[role], arch.norm_eps, offset=arch.norm_offset, wide=arch.norm_wide)
        for x, role in ((query, "q_norm.weight"), (key, "k_norm.weight"))
    )
    return query, key


def end_of(halves: Generator[None, None, T]) -> T:
    """The result of what has been begun or not."""
    try:
        while True:
            next(halves)
    except StopIteration as end:
        return end.value


def post_attention(
    arch: Arch,
    layer: int,
    weights: Weights,
    hidden: Tensor,
    attention: Tensor,
    adapters: PassAdapters | None = None,
    routing: RoutingCounts | None = None,
    ranks: TensorRanks | None = None,
    stacks: experts.Stacks | None = None,
    elsewhere: Elsewhere | None = None,
    fetch_hit: FetchHit | None = None,
    apart: bool = False,
) -> LayerHalves:
    """Hidden state [T, H] after the layer: output projection of ``attention`` [T, Hq, D], residuals and MLP. apart: it
    may be `Apart`, which it is where the next layer begins with a norm of it.
    ``hidden`` [T, H] is the layer's input. routing: counts the tokens of its experts; stacks: these, where they are not
    among the weights. elsewhere: where some experts are computed, whose results the second half needs. fetch_hit: is
    told which are about to be multiplied with."""
    where = routing, stacks, elsewhere, fetch_hit
    mlp = partial(_mlp, arch, layer, weights, adapters, where)
    flat = attention.flatten(1) if arch.latent is None else latent.expand(arch, weights, attention)
    update = _linear(weights, "o", flat, layer, adapters)
    if arch.parallel_residual:
        normed = _norm(arch, weights, "attn_norm" if arch.shared_norm else "mlp_norm", hidden)
        return _total((yield from mlp(normed)) + update, ranks) + hidden
    update = _total(update, ranks)
    if arch.sublayer_norm:
        update = _norm(arch, weights, "post_attn_norm", update)
    if arch.post_norm:
        hidden = _norm(arch, weights, "attn_norm", hidden, update)
        update = _total((yield from mlp(hidden)), ranks)
        return _norm(arch, weights, "mlp_norm", hidden, update)
    if arch.residual_scale != 1.0:
        update = update * arch.residual_scale
    # The layer's input stays as it is: it is added to ``update``, which is ours.
    normed = _norm(arch, weights, "mlp_norm", hidden, update)
    hidden, update = update, _total((yield from mlp(normed)), ranks)
    if arch.sublayer_norm:
        update = _norm(arch, weights, "post_mlp_norm", update)
    if arch.residual_scale != 1.0:
        update = update * arch.residual_scale
    return Apart(hidden, update) if apart else hidden + update


def head(arch: Arch, weights: Weights, hidden: Tensor, adapters: PassAdapters | None = None) -> Tensor:
    """Logits [N, vocab] float32 of the hidden states [N, H] of the last layer. With tied embeddings the caller gives
    the table as ``head.weight``."""
    hidden = _head_input(arch, weights, hidden, adapters)
    logits = _linear(weights, "head", hidden, arch.num_layers, adapters).float()
    if arch.logits_divisor != 1.0:
        logits.div_(arch.logits_divisor)
    if arch.final_soft_cap:
        logits.div_(arch.final_soft_cap).tanh_().mul_(arch.final_soft_cap)
    return logits


def largest_logits(arch: Arch, weights: Weights, hidden: Tensor, elements: int) -> tuple[Tensor, Tensor] | None:
    """The largest logit [N] float32 of each row of `head`, and its token [N] int64, the first of equal ones. Logits are
    made for all rows and a part of the vocabulary at a time, about ``elements`` of them: its weights are read once, and
    what they give is read from the cache of a GPU. None where it matters that all logits of a row are there: in codes
    the weights cannot be cut, and what is done to logits afterwards may make equal ones of them."""
    matrix, bias = weights["head.weight"], weights.get("head.bias")
    if not isinstance(matrix, Tensor) or arch.logits_divisor != 1.0 or arch.final_soft_cap:
        return None
    hidden = _head_input(arch, weights, hidden, None)
    peaks = torch.full((len(hidden),), -torch.inf, device=hidden.device)
    token_ids = torch.zeros(len(hidden), dtype=torch.int64, device=hidden.device)
    parts = -(-len(hidden) * len(matrix) // max(1, elements))
    columns = -(-len(matrix) // (max(1, parts) * COLUMNS)) * COLUMNS
    for first in range(0, len(matrix), columns):
        part = slice(first, first + columns)
        logits = ops.linear(hidden, matrix[part], None if bias is None else bias[part])
        ops.keep_largest(logits, first, peaks, token_ids)
    return peaks, token_ids


def _head_input(arch: Arch, weights: Weights, hidden: Tensor, adapters: PassAdapters | None) -> Tensor:
    """What the head's matrix is multiplied with."""
    if arch.final_norm:
        hidden = _norm(arch, weights, "final_norm", hidden)
    if arch.projects_embedding:
        hidden = _linear(weights, "project_out", hidden, arch.num_layers, adapters)
    return hidden


def _total(partial: Tensor, ranks: TensorRanks | None) -> Tensor:
    """The sum over the ranks of a product whose inputs they share out."""
    return partial if ranks is None else ranks.sum(partial)


def _wide_norms(arch: Arch, weights: Weights, query: Tensor, key: Tensor, ranks: TensorRanks) -> tuple[Tensor, Tensor]:
    """Queries and keys normed over all heads, of which this rank has some. Of keys that several ranks have, one counts
    them."""
    assert arch.shard is not None
    parts, whole = (query.float(), key.float()), (arch.shard.all_heads, arch.shard.all_kv_heads)
    squares = torch.stack([part.square().sum((1, 2)) for part in parts])
    if not arch.shard.kv_owner:
        squares[1] = 0
    squares = ranks.sum(squares)
    query, key = (
        (part * (square / (count * arch.head_dim) + arch.norm_eps).rsqrt()[:, None, None]).to(query.dtype)
        * (weights[role] + arch.norm_offset).view(-1, arch.head_dim)
        for part, square, count, role in zip(parts, squares, whole, ("q_norm.weight", "k_norm.weight"), strict=True)
    )
    return query, key


def _norm(arch: Arch, weights: Weights, name: str, x: Tensor, residual: Tensor | None = None) -> Tensor:
    """Norm of x; with ``residual``, x is added to it in place and the sum is normed."""
    weight = weights.get(f"{name}.weight")
    if arch.norm == "layer":
        return ops.layer_norm(x, weight, weights.get(f"{name}.bias"), arch.norm_eps, residual=residual)
    assert weight is not None, f"{name}.weight is missing"
    return ops.rms_norm(x, weight, arch.norm_eps, residual=residual, offset=arch.norm_offset, wide=arch.norm_wide)


def _linear(weights: Weights, role: str, x: Tensor, layer: int, adapters: PassAdapters | None) -> Tensor:
    """The product of x with a matrix, its bias and the updates of the tokens' adapters."""
    out = ops.linear(x, weights[f"{role}.weight"], weights.get(f"{role}.bias"))
    if adapters is not None:
        adapters.add(layer, role, weights, x, out)
    return out


def _linear_of(weights: Weights, layer: int, adapters: PassAdapters | None, role: str, x: Tensor) -> Tensor:
    return _linear(weights, role, x, layer, adapters)


def _mlp(
    arch: Arch,
    layer: int,
    weights: Weights,
    adapters: PassAdapters | None,
    where: tuple[RoutingCounts | None, experts.Stacks | None, Elsewhere | None, FetchHit | None],
    x: Tensor,
) -> Halves:
    routed = arch.experts_of(layer)
    if routed is not None:
        linear = partial(_linear_of, weights, layer, adapters)
        return (yield from experts.feed_forward(routed, weights, x, arch.activation, linear, layer, *where))
    if arch.mlp == "gated":
        inner = ops.gated_activation(_linear(weights, "gate_up", x, layer, adapters), arch.activation)
    else:
        inner = _activate(arch.activation, _linear(weights, "up", x, layer, adapters))
    return _linear(weights, "down", inner, layer, adapters)


def _activate(name: str, x: Tensor) -> Tensor:
    if name == "silu":
        return F.silu(x)
    if name == "relu":
        return F.relu(x)
    return F.gelu(x, approximate="tanh" if name == "gelu_tanh" else "none")
