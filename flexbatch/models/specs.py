"""The canonical tensors of an architecture: one stage per layer, roles fused for GEMM speed. Follows from Arch
alone."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from flexbatch.models.arch import Arch


@dataclass(frozen=True)
class WeightSpec:
    """One canonical tensor.

    layer: -1 for the embedding stage, 0 .. num_layers - 1 for the decoder layers, num_layers for the head. sections:
    rows of the parts of a fused tensor (queries, keys, values; gate, up).
    """

    layer: int
    role: str
    shape: tuple[int, ...]
    sections: tuple[int, ...] = ()

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
    if arch.projects_embedding:
        specs.append(WeightSpec(-1, "project_in.weight", (arch.hidden_size, arch.embedding_dim)))
    return specs + (_norm(arch, -1, "embed_norm") if arch.embed_norm else [])


def _decoder_layer(arch: Arch, layer: int) -> list[WeightSpec]:
    hidden, inner, sections = arch.hidden_size, arch.intermediate_size, arch.qkv_sections
    specs = _norm(arch, layer, "attn_norm")
    specs += _linear(layer, "qkv", sum(sections), hidden, arch.qkv_bias, sections)
    if arch.qk_norm:
        specs += [WeightSpec(layer, f"{name}.weight", (arch.head_dim,)) for name in ("q_norm", "k_norm")]
    specs += _linear(layer, "o", hidden, arch.num_heads * arch.head_dim, arch.output_bias)
    if arch.sublayer_norm:
        specs += _norm(arch, layer, "post_attn_norm")
    if not arch.shared_norm:
        specs += _norm(arch, layer, "mlp_norm")
    if arch.mlp == "gated":
        specs += _linear(layer, "gate_up", 2 * inner, hidden, arch.mlp_bias, (inner, inner))
    else:
        specs += _linear(layer, "up", inner, hidden, arch.mlp_bias)
    specs += _linear(layer, "down", hidden, inner, arch.mlp_bias)
    return specs + (_norm(arch, layer, "post_mlp_norm") if arch.sublayer_norm else [])


def _head(arch: Arch) -> list[WeightSpec]:
    layer = arch.num_layers
    specs = _norm(arch, layer, "final_norm") if arch.final_norm else []
    if arch.projects_embedding:
        specs.append(WeightSpec(layer, "project_out.weight", (arch.embedding_dim, arch.hidden_size)))
    if not arch.tie_word_embeddings:
        specs.append(WeightSpec(layer, "head.weight", (arch.vocab_size, arch.embedding_dim)))
    return [*specs, WeightSpec(layer, "head.bias", (arch.vocab_size,))] if arch.head_bias else specs
