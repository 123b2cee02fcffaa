"""config.json -> Arch for families with latent attention."""

from __future__ import annotations

import math
from typing import Any

from flexbatch.models.arch import Arch
from flexbatch.models.config_experts import expect, in_layers, read_corrected, read_experts, read_groups
from flexbatch.models.config_keys import Config, optional, required
from flexbatch.models.config_rope import entry_of, read_rope
from flexbatch.models.latent_arch import Latent
from flexbatch.models.readers import llama_like
from flexbatch.validation.errors import CheckpointError


def deepseek_v2(config: Config) -> Arch:
    width, bias, method = required(config, "moe_intermediate_size"), bool(config.get("mlp_bias")), _method(config)
    expect(config, scoring_func="softmax", norm_topk_prob=False, moe_layer_freq=1)
    experts = read_experts(
        config,
        width,
        scale=float(optional(config, "routed_scaling_factor", 1.0)),
        float_router=True,
        shared_width=width * optional(config, "n_shared_experts", 2),
        shared_bias=bias,
        **(read_groups(config, 1) if method == "group_limited_greedy" else {}),
    )
    return _latent(
        {**config, "rope_interleave": True},
        mlp_bias=bias,
        skipped_layers=optional(config, "num_nextn_predict_layers", 0),
        **in_layers(experts, _after(config, optional(config, "first_k_dense_replace", 0))),
    )


def deepseek_v3(config: Config) -> Arch:
    """Also Kimi K2."""
    expect(config, scoring_func="sigmoid", topk_method="noaux_tc", moe_layer_freq=1)
    sparse = _after(config, optional(config, "first_k_dense_replace", 3))
    return _corrected(config, sparse, scale=2.5, groups={"n_group": 8, "topk_group": 4})


def glm4_moe_lite(config: Config) -> Arch:
    layers, kinds = required(config, "num_hidden_layers"), config.get("mlp_layer_types")
    expect(config, scoring_func="sigmoid", topk_method="noaux_tc")
    sparse = _after(config, optional(config, "first_k_dense_replace", 1))
    if kinds is not None:
        if len(kinds) != layers or not set(kinds) <= {"dense", "sparse"}:
            raise CheckpointError(
                f"config.json: mlp_layer_types={kinds!r} must name each of num_hidden_layers={layers} layers dense or "
                "sparse"
            )
        sparse = [kind == "sparse" for kind in kinds]
    return _corrected(config, sparse, scale=1.8, groups={})


def _method(config: Config) -> str:
    """How experts are chosen: the best of all, or of the best groups."""
    method: str = optional(config, "topk_method", "greedy")
    if method not in ("greedy", "group_limited_greedy"):
        raise CheckpointError(
            f"config.json: topk_method={method!r} is not supported; known: 'greedy', 'group_limited_greedy'"
        )
    return method


def _after(config: Config, first: int) -> list[bool]:
    return [layer >= first for layer in range(required(config, "num_hidden_layers"))]


def _corrected(config: Config, sparse: list[bool], scale: float, groups: dict[str, int]) -> Arch:
    """scale, groups: where the file is silent."""
    experts = read_corrected(config, scale, groups)
    return _latent(config, skipped_layers=optional(config, "num_nextn_predict_layers", 1), **in_layers(experts, sparse))


def _latent(config: Config, **changes: Any) -> Arch:
    latent = Latent(
        optional(config, "kv_lora_rank", 512),
        optional(config, "qk_rope_head_dim", 64),
        required(config, "qk_nope_head_dim"),
        required(config, "v_head_dim"),
        config.get("q_lora_rank") or 0,
        bias=bool(config.get("attention_bias")),
    )
    entry = entry_of(config)
    rope = read_rope(
        config,
        latent.rope,
        theta=optional(config, "rope_theta", 10000.0),
        fraction=optional(config, "partial_rotary_factor", 1.0),
        entry=entry,
    )
    if rope["rotary_dim"] != latent.rope:
        raise CheckpointError(
            f"config.json: partial_rotary_factor turns {rope['rotary_dim']} of qk_rope_head_dim={latent.rope} "
            "elements: latent attention rotates all of them"
        )
    return llama_like(
        config,
        latent=latent,
        num_kv_heads=1,
        head_dim=latent.width,
        query_scale=(latent.nope + latent.rope) ** -0.5 * _stretch(entry.values) ** 2,
        rope_interleaved=optional(config, "rope_interleave", True),
        output_bias=latent.bias,
        **rope,
        **changes,
    )


def _stretch(entry: Config) -> float:
    """By what an extended rotation multiplies queries and keys beside its tables."""
    share, factor = entry.get("mscale_all_dim") or 0.0, entry.get("factor") or 1.0
    kind = entry.get("rope_type") or entry.get("type") or "default"
    return 0.1 * share * math.log(factor) + 1.0 if kind != "default" and share and factor > 1 else 1.0
