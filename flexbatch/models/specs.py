"""The canonical tensors of an architecture: one stage per layer, roles fused for GEMM speed. Follows from Arch
alone."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from flexbatch.models.arch import Arch
from flexbatch.models.expert_arch import Experts
from flexbatch.models.latent_arch import Latent


@dataclass(frozen=True)
class WeightSpec:
    """One canonical tensor.

    layer: -1 for the embedding stage, 0 .. num_layers - 1 for the decoder layers, num_layers for the head. sections:
    rows of the parts of a fused tensor (queries, keys, values; gate, up; of several experts those of each in turn).
    wide: kept in float32, whatever the model's dtype.
    """

    layer: int
    role: str
    shape: tuple[int, ...]
    sections: tuple[int, ...] = ()
    wide: bool = False

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True)
class Piece:
    """Rows of one canonical tensor. rows: destination rows, None for all of them. tensor: in the dtype of the file, or
    float32 where it was expanded ``from_codes`` of the checkpoint."""

    layer: int
    role: str
    rows: slice | None
    tensor: Tensor
    from_codes: bool = False


def weight_specs(arch: Arch) -> list[WeightSpec]:
    """Every tensor of the model in the order of a pass. With tied embeddings there is no ``head.weight``: the table
    is the head."""
    specs = _embedding(arch)
    for layer in range(arch.num_layers):
        specs += _decoder_layer(arch, layer)
    return specs + _head(arch)


def _linear(
    layer: int, name: str, rows: int, columns: int, bias: bool, sections: tuple[int, ...] = ()
) -> list[WeightSpec]:
    """The weight [rows, columns] of a linear map, and its bias [rows] where it has one."""
    specs = [WeightSpec(layer, f"{name}.weight", (rows, columns), sections)]
    return [*specs, WeightSpec(layer, f"{name}.bias", (rows,), sections)] if bias else specs


def _norm(arch: Arch, layer: int, name: str) -> list[WeightSpec]:
    if not arch.norm_affine:
        return []
    specs = [WeightSpec(layer, f"{name}.weight", (arch.hidden_size,))]
    return [*specs, WeightSpec(layer, f"{name}.bias", (arch.hidden_size,))] if arch.norm_bias else specs


def _embedding(arch: Arch) -> list[WeightSpec]:
    specs = [WeightSpec(-1, "embed.weight", (arch.vocab_size, arch.embedding_dim))]
    if arch.position == "learned":
        specs.append(WeightSpec(-1, "pos_embed.weight", (arch.max_positions + arch.position_offset, arch.hidden_size)))
    if arch.sinks:
        specs += [WeightSpec(-1, sink_role(layer), (arch.num_heads,)) for layer in range(arch.num_layers)]
    if arch.projects_embedding:
        specs.append(WeightSpec(-1, "project_in.weight", (arch.hidden_size, arch.embedding_dim)))
    return specs + (_norm(arch, -1, "embed_norm") if arch.embed_norm else [])


def _decoder_layer(arch: Arch, layer: int) -> list[WeightSpec]:
    hidden, sections = arch.hidden_size, arch.qkv_sections
    if arch.latent is not None:
        return _latent(arch, arch.latent, layer) + _after_attention(arch, layer)
    specs = _norm(arch, layer, "attn_norm")
    specs += _linear(layer, "qkv", sum(sections), hidden, arch.qkv_bias, sections)
    if arch.qk_norm or arch.late_qk_norm or arch.wide_qk_norm:
        widths = sections[:2] if arch.wide_qk_norm else (arch.head_dim, arch.head_dim)
        specs += [
            WeightSpec(layer, f"{name}.weight", (width,))
            for name, width in zip(("q_norm", "k_norm"), widths, strict=True)
        ]
    return specs + _after_attention(arch, layer)


def _latent(arch: Arch, latent: Latent, layer: int) -> list[WeightSpec]:
    """What makes queries and the rows of the cache. The matrices that lead out of the latent's space are two, for keys
    before attention and for values after it."""
    hidden, heads = arch.hidden_size, arch.num_heads
    queries, specs = heads * (latent.nope + latent.rope), _norm(arch, layer, "attn_norm")
    if latent.query_rank:
        specs += _linear(layer, "q_a", latent.query_rank, hidden, latent.bias)
        specs.append(WeightSpec(layer, "q_a_norm.weight", (latent.query_rank,)))
        specs += _linear(layer, "q_b", queries, latent.query_rank, False)
    else:
        specs += _linear(layer, "q", queries, hidden, False)
    specs += _linear(layer, "kv_a", latent.width, hidden, latent.bias)
    specs.append(WeightSpec(layer, "kv_a_norm.weight", (latent.rank,)))
    specs += _linear(layer, "k_up", heads * latent.nope, latent.rank, False)
    return specs + _linear(layer, "v_up", heads * latent.value, latent.rank, False)


def _after_attention(arch: Arch, layer: int) -> list[WeightSpec]:
    hidden, experts = arch.hidden_size, arch.experts_of(layer)
    specs = _linear(layer, "o", hidden, arch.output_columns, arch.output_bias)
    if arch.sublayer_norm:
        specs += _norm(arch, layer, "post_attn_norm")
    if not arch.shared_norm:
        specs += _norm(arch, layer, "mlp_norm")
    specs += _dense_mlp(arch, layer) if experts is None else _experts(experts, layer, hidden)
    return specs + (_norm(arch, layer, "post_mlp_norm") if arch.sublayer_norm else [])


def _dense_mlp(arch: Arch, layer: int) -> list[WeightSpec]:
    hidden, inner = arch.hidden_size, arch.intermediate_size
    if arch.mlp == "gated":
        specs = _linear(layer, "gate_up", 2 * inner, hidden, arch.mlp_bias, (inner, inner))
    else:
        specs = _linear(layer, "up", inner, hidden, arch.mlp_bias)
    return specs + _linear(layer, "down", hidden, inner, arch.mlp_bias)


def _experts(experts: Experts, layer: int, hidden: int) -> list[WeightSpec]:
    """Router, shared MLP and experts. Experts that are placed together lie one below another in one matrix, so that it
    is read, quantized and moved as every other is: [experts x 2 width, hidden], and [experts x hidden, width]."""
    specs = [WeightSpec(layer, "router.weight", (experts.count, hidden), wide=experts.float_router)]
    if experts.router_bias:
        specs.append(WeightSpec(layer, "router.bias", (experts.count,), wide=experts.float_router))
    if experts.correction:
        specs.append(WeightSpec(layer, "router.correction", (experts.count,), wide=experts.float_router))
    if experts.shared_width:
        width = experts.shared_width
        specs += _linear(layer, "shared.gate_up", 2 * width, hidden, experts.shared_bias, (width, width))
        specs += _linear(layer, "shared.down", hidden, width, experts.shared_bias)
    if experts.shared_gate:
        specs += _linear(layer, "shared_gate", 1, hidden, False)
    width = experts.width
    if experts.bias:
        specs += [
            WeightSpec(layer, f"expert_biases.{name}", (experts.count, size))
            for name, size in (("gate_up", 2 * width), ("down", hidden))
        ]
    for first, count in experts.units:
        specs += _linear(layer, expert_role(first, "gate_up"), count * 2 * width, hidden, False, (width,) * 2 * count)
    for first, count in experts.units:
        specs += _linear(layer, expert_role(first, "down"), count * hidden, width, False, (hidden,) * count)
    return specs


def sink_role(layer: int) -> str:
    """The role of a layer's attention sinks. They are of the embedding stage, which stays on the compute device: CPU
    attention has a copy from there, and a few numbers need not cross the link with every pass."""
    return f"sinks.{layer}"


def expert_role(first: int, name: str) -> str:
    """The role, without ``.weight``, of ``name`` ("gate_up", "down") of the experts from ``first`` on that are placed
    together."""
    return f"experts.{first}.{name}"


def _head(arch: Arch) -> list[WeightSpec]:
    layer = arch.num_layers
    specs = _norm(arch, layer, "final_norm") if arch.final_norm else []
    if arch.projects_embedding:
        specs.append(WeightSpec(layer, "project_out.weight", (arch.embedding_dim, arch.hidden_size)))
    if not arch.tie_word_embeddings:
        specs.append(WeightSpec(layer, "head.weight", (arch.vocab_size, arch.embedding_dim)))
    return [*specs, WeightSpec(layer, "head.bias", (arch.vocab_size,))] if arch.head_bias else specs
