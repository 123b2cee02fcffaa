"""Queries and rows of latent attention, and its results, as functions over a dict role -> tensor.

Queries are projected into the space of the latent and results out of it again ("absorbed"), for prompts as for single
tokens: so the cache is read as it lies, and nothing of a head is ever stored. T: tokens, N: heads, R: rank.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from flexbatch.kernels import ops
from flexbatch.models.arch import Arch

Linear = Callable[[str, Tensor], Tensor]
"""A role and x -> the product of x with the role's matrix, its bias and the updates of adapters."""


def project(
    arch: Arch,
    weights: Mapping[str, Tensor],
    x: Tensor,
    tables: tuple[Tensor, Tensor],
    positions: Tensor,
    linear: Linear,
) -> tuple[Tensor, Tensor]:
    """Queries [T, N, R + rope] and rows of the cache [T, 1, R + rope] of the normed hidden states x [T, H]."""
    latent = arch.latent
    assert latent is not None
    if latent.query_rank:
        compressed = ops.rms_norm(linear("q_a", x), weights["q_a_norm.weight"], latent.norm_eps)
        query = linear("q_b", compressed)
    else:
        query = linear("q", x)
    query = query.unflatten(-1, (arch.num_heads, -1))
    row = linear("kv_a", x)
    # Of one token the parts count as contiguous with the strides of the whole: copies have their own.
    key = row[:, None, latent.rank :].clone(memory_format=torch.contiguous_format)
    turned = query[..., latent.nope :].clone(memory_format=torch.contiguous_format)
    ops.rotary(turned, key, *tables, positions, rotary_dim=latent.rope, interleaved=arch.rope_interleaved)
    compressed = ops.rms_norm(row[:, : latent.rank].contiguous(), weights["kv_a_norm.weight"], latent.norm_eps)
    up = weights["k_up.weight"].unflatten(0, (arch.num_heads, -1))
    absorbed = torch.einsum("tnd,ndr->tnr", query[..., : latent.nope], up)
    return torch.cat([absorbed, turned], dim=-1), torch.cat([compressed[:, None], key], dim=-1)


def expand(arch: Arch, weights: Mapping[str, Tensor], attention: Tensor) -> Tensor:
    """[T, N x value] of the results [T, N, R] in the space of the latent."""
    up = weights["v_up.weight"].unflatten(0, (arch.num_heads, -1))
    return torch.einsum("tnr,nvr->tnv", attention, up).flatten(1)
