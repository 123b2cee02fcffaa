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

    How ranks share a tensor out (`models.shard.RankShard` has their ranges): split_rows names the unit of its rows, of
    every section where there are some; split_columns that of its columns, or of as many equal parts of them;
    added_once: a bias of products that the ranks add up, which one of them adds. A tensor without a rule is on every
    rank.
    """

    layer: int
    role: str
    shape: tuple[int, ...]
    sections: tuple[int, ...] = ()
    wide: bool = False
    split_rows: tuple[str, ...] = ()
    split_columns: tuple[str, ...] = ()
    added_once: bool = False

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

    @property
    def num_bytes(self) -> int:
        return self.tensor.nbytes


def weight_specs(arch: Arch) -> list[WeightSpec]:
    """Every tensor that is here in the order of a pass. With tied embeddings there is no ``head.weight``: the table
    is the head."""
    specs = _embedding(arch) if arch.has_ends else []
    if arch.sinks:
        layers, shape, unit = range(arch.num_layers), (arch.num_heads,), ("each_head",)
        specs += [WeightSpec(-1, sink_role(layer), shape, split_rows=unit) for layer in layers]
    for layer in range(arch.num_layers):
        specs += _decoder_layer(arch, layer)
    return specs + (_head(arch) if arch.has_ends else [])


def _rows(
    layer: int, name: str, columns: int, bias: bool, units: tuple[str, ...], sections: tuple[int, ...]
) -> list[WeightSpec]:
    """A linear map whose outputs ranks share out: the weight [rows, columns], and its bias [rows] where it has one. The
    sections of a single unit are the rows themselves."""
    rows, parts = sum(sections), sections if len(sections) > 1 else ()
    specs = [WeightSpec(layer, f"{name}.weight", (rows, columns), parts, split_rows=units)]
    return [*specs, WeightSpec(layer, f"{name}.bias", (rows,), parts, split_rows=units)] if bias else specs


def _columns(layer: int, name: str, rows: int, columns: int, bias: bool, unit: str) -> list[WeightSpec]:
    """A linear map whose inputs ranks share out."""
    specs = [WeightSpec(layer, f"{name}.weight", (rows, columns), split_columns=(unit,))]
    return [*specs, WeightSpec(layer, f"{name}.bias", (rows,), added_once=True)] if bias else specs


def _linear(layer: int, name: str, rows: int, columns: int, bias: bool) -> list[WeightSpec]:
    """A linear map that every rank has whole."""
    specs = [WeightSpec(layer, f"{name}.weight", (rows, columns))]
    return [*specs, WeightSpec(layer, f"{name}.bias", (rows,))] if bias else specs


def _norm(arch: Arch, layer: int, name: str) -> list[WeightSpec]:
    if not arch.norm_affine:
        return []
    specs = [WeightSpec(layer, f"{name}.weight", (arch.hidden_size,))]
    return [*specs, WeightSpec(layer, f"{name}.bias", (arch.hidden_size,))] if arch.norm_bias else specs


def _embedding(arch: Arch) -> list[WeightSpec]:
    specs = [WeightSpec(-1, "embed.weight", (_words(arch), arch.embedding_dim), split_rows=("vocabulary",))]
    if arch.position == "learned":
        specs.append(WeightSpec(-1, "pos_embed.weight", (arch.max_positions + arch.position_offset, arch.hidden_size)))
    if arch.projects_embedding:
        specs.append(WeightSpec(-1, "project_in.weight", (arch.hidden_size, arch.embedding_dim)))
    return specs + (_norm(arch, -1, "embed_norm") if arch.embed_norm else [])


def _decoder_layer(arch: Arch, layer: int) -> list[WeightSpec]:
    hidden, sections = arch.hidden_size, arch.qkv_sections
    if arch.latent is not None:
        return _latent(arch, arch.latent, layer) + _after_attention(arch, layer)
    specs = _norm(arch, layer, "attn_norm")
    units = "heads", "kv_heads", "kv_heads"
    specs += _rows(layer, "qkv", hidden, arch.qkv_bias, units, sections)
    if arch.qk_norm or arch.late_qk_norm or arch.wide_qk_norm:
        widths = sections[:2] if arch.wide_qk_norm else (arch.head_dim, arch.head_dim)
        specs += [
            WeightSpec(layer, f"{name}.weight", (width,), split_rows=(unit,) if arch.wide_qk_norm else ())
            for name, width, unit in zip(("q_norm", "k_norm"), widths, units[:2], strict=True)
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
    specs = _columns(layer, "o", hidden, arch.output_columns, arch.output_bias, "heads")
    if arch.sublayer_norm:
        specs += _norm(arch, layer, "post_attn_norm")
    if not arch.shared_norm:
        specs += _norm(arch, layer, "mlp_norm")
    specs += _dense_mlp(arch, layer) if experts is None else _experts(experts, layer, hidden)
    return specs + (_norm(arch, layer, "post_mlp_norm") if arch.sublayer_norm else [])


def _dense_mlp(arch: Arch, layer: int) -> list[WeightSpec]:
    hidden, inner = arch.hidden_size, arch.intermediate_size
    if arch.mlp == "gated":
        specs = _rows(layer, "gate_up", hidden, arch.mlp_bias, ("inner", "inner"), (inner, inner))
    else:
        specs = _rows(layer, "up", hidden, arch.mlp_bias, ("inner",), (inner,))
    return specs + _columns(layer, "down", hidden, inner, arch.mlp_bias, "inner")


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
        specs += _rows(layer, "shared.gate_up", hidden, experts.shared_bias, ("shared", "shared"), (width, width))
        specs += _columns(layer, "shared.down", hidden, width, experts.shared_bias, "shared")
    if experts.shared_gate:
        specs.append(WeightSpec(layer, "shared_gate.weight", (1, hidden)))
    width = experts.width
    if experts.bias:
        both, rows = ("experts", "experts"), experts.count
        specs.append(WeightSpec(layer, "expert_biases.gate_up", (rows, 2 * width), split_columns=both))
        specs.append(WeightSpec(layer, "expert_biases.down", (rows, hidden), added_once=True))
    for first, count in experts.units:
        units = ("experts",) * 2 * count
        specs += _rows(layer, expert_role(first, "gate_up"), hidden, False, units, (width,) * 2 * count)
    for first, count in experts.units:
        role, shape = f"{expert_role(first, 'down')}.weight", (count * hidden, width)
        specs.append(WeightSpec(layer, role, shape, (hidden,) * count, split_columns=("experts",)))
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
        shape = _words(arch), arch.embedding_dim
        specs.append(WeightSpec(layer, "head.weight", shape, split_rows=("vocabulary",)))
    bias = WeightSpec(layer, "head.bias", (_words(arch),), split_rows=("vocabulary",))
    return [*specs, bias] if arch.head_bias else specs


def _words(arch: Arch) -> int:
    """Rows of the embedding table and of the head."""
    first, end = arch.vocabulary
    return end - first
