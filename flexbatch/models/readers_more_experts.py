"""config.json -> Arch for families with experts whose files spell things their own way, or whose layers rotate and
attend unlike each other."""

from __future__ import annotations

from typing import Any

from flexbatch.models.arch import Arch
from flexbatch.models.config_experts import alike, expect, in_layers, read_experts
from flexbatch.models.config_keys import Config, given, optional, required
from flexbatch.models.config_rope import Entry, entry_of, read_rope
from flexbatch.models.config_types import KEYS, check_keys
from flexbatch.models.readers import llama_like
from flexbatch.validation.errors import CheckpointError

HUNYUAN_LISTED = ("num_experts", "moe_topk", "moe_intermediate_size", "num_shared_expert")
"""Keys of which its files may list a number for every layer."""


def ernie4_5_moe(config: Config) -> Arch:
    layers, bias = required(config, "num_hidden_layers"), bool(config.get("use_bias"))
    width = required(config, "moe_intermediate_size")
    first, last = optional(config, "moe_layer_start_index", 1), optional(config, "moe_layer_end_index", -1)
    step = optional(config, "moe_layer_interval", 1)
    expect(config, moe_use_aux_free=True, moe_gate="topk")
    experts = read_experts(
        config,
        width,
        normalize=True,
        normalize_least=optional(config, "moe_norm_min", 1e-12),
        correction=True,
        float_router=True,
        shared_width=width * optional(config, "moe_num_shared_experts", 2),
        shared_bias=bias,
    )
    last = layers - 1 if last == -1 else last
    return llama_like(
        config,
        rope_interleaved=True,
        qkv_bias=bias,
        output_bias=bias,
        mlp_bias=bias,
        head_bias=bias,
        **read_rope(config, _head_dim(config), theta=optional(config, "rope_theta", 5e5), entry=_whole(config)),
        **in_layers(experts, [first <= layer <= last and (layer + 1) % step == 0 for layer in range(layers)]),
    )


def hunyuan_v1_moe(config: Config) -> Arch:
    """Shared MLP and experts have one width. A rotation of type "dynamic" with an alpha has a base that does not depend
    on the length."""
    config = alike(config, *HUNYUAN_LISTED)
    width = required(config, "intermediate_size")
    expect(config, moe_intermediate_size=width, num_shared_expert=1, use_mixed_mlp_moe=True, use_qk_norm=True)
    expect(config, moe_layer_num_skipped=0, routed_scaling_factor=1, norm_topk_prob=True, group_limited_greedy=False)
    expect(config, use_cla=False, use_mla=False)
    bias, head_dim, entry = bool(config.get("attention_bias")), _head_dim(config), entry_of(config, whole=True)
    theta = float(optional(entry.values, "rope_theta", optional(config, "rope_theta", 10000.0)))
    alpha = entry.values.get("alpha")
    if alpha and (entry.values.get("rope_type") or entry.values.get("type")) == "dynamic":
        entry.values.clear()
        theta *= alpha ** (head_dim / (head_dim - 2))
    entry.values["rope_theta"] = theta
    experts = read_experts(config, width, normalize=True, float_router=True, shared_width=width)
    return llama_like(
        config,
        late_qk_norm=True,
        qkv_bias=bias,
        output_bias=bias,
        **read_rope(config, head_dim, entry=entry),
        **in_layers(experts, [True] * required(config, "num_hidden_layers")),
    )


def minimax_m2(config: Config) -> Arch:
    expect(config, scoring_func="sigmoid", use_routing_bias=True, use_qk_norm=True, qk_norm_type="per_layer")
    expect(config, shared_intermediate_size=0, attn_type_list=[1] * required(config, "num_hidden_layers"))
    experts = read_experts(
        config, required(config, "intermediate_size"), scoring="sigmoid", normalize=True, correction=True
    )
    head_dim = _head_dim(config)
    rotated = optional(config, "rotary_dim", head_dim) / head_dim
    rope = read_rope(
        config,
        head_dim,
        theta=optional(config, "rope_theta", 5e6),
        fraction=optional(config, "partial_rotary_factor", rotated),
    )
    return llama_like(
        config, wide_qk_norm=True, **rope, **in_layers(experts, [True] * required(config, "num_hidden_layers"))
    )


def dbrx(config: Config) -> Arch:
    """Sizes are called otherwise, and those of attention and experts lie in entries of their own."""
    attention, mlp = config.get("attn_config") or {}, config.get("ffn_config") or {}
    names = {"n_layers": "num_hidden_layers", "d_model": "hidden_size", "n_heads": "num_attention_heads"}
    flat = {
        **config,
        **{name: config[key] for key, name in names.items() if config.get(key) is not None},
        "max_position_embeddings": required(config, "max_seq_len"),
        "num_key_value_heads": optional(attention, "kv_n_heads", 1),
        "clip_qkv": attention.get("clip_qkv"),
        "rope_theta": optional(attention, "rope_theta", optional(config, "rope_theta", 10000.0)),
        "num_experts": optional(mlp, "moe_num_experts", 4),
        "num_experts_per_tok": optional(mlp, "moe_top_k", 1),
        "intermediate_size": optional(mlp, "ffn_hidden_size", 3584),
        "hidden_act": (mlp.get("ffn_act_fn") or {}).get("name"),
    }
    check_keys(flat, KEYS)
    power = mlp.get("moe_normalize_expert_weights", 1.0)
    experts = read_experts(
        flat, flat["intermediate_size"], normalize=power is not None, normalize_power=float(power or 1.0)
    )
    return llama_like(
        flat,
        norm="layer",
        norm_biases=False,
        norm_eps=1e-5,
        clip_qkv=flat["clip_qkv"] or 0.0,
        **in_layers(experts, [True] * flat["num_hidden_layers"]),
    )


def llama4(config: Config) -> Arch:
    """Layers that rotate attend within chunks and norm queries and keys; the others see everything, and their queries
    grow with the position."""
    layers, step = required(config, "num_hidden_layers"), optional(config, "interleave_moe_layer_step", 1)
    every = optional(config, "no_rope_layer_interval", 4)
    rotating = [bool(each) for each in config.get("no_rope_layers") or ()] or [
        bool((layer + 1) % every) for layer in range(layers)
    ]
    if len(rotating) != layers:
        raise CheckpointError(f"config.json: no_rope_layers names {len(rotating)} layers, num_hidden_layers={layers}")
    listed = config.get("moe_layers")
    sparse = set(range(step - 1, layers, step) if listed is None else listed)
    width = required(config, "intermediate_size")
    experts = read_experts(config, width, scoring="sigmoid", scales_input=True, shared_width=width)
    tuned = optional(config, "attn_temperature_tuning", True)
    bias = bool(config.get("attention_bias"))
    return llama_like(
        config,
        intermediate_size=required(config, "intermediate_size_mlp"),
        rope_interleaved=True,
        rope_layers=() if all(rotating) else tuple(rotating),
        plain_qk_norm=optional(config, "use_qk_norm", True),
        query_growth=float(optional(config, "attn_scale", 0.1)) if tuned else 0.0,
        query_growth_tokens=optional(config, "floor_scale", 8192),
        qkv_bias=bias,
        output_bias=bias,
        **_chunks(config, rotating),
        **read_rope(config, _head_dim(config), theta=optional(config, "rope_theta", 5e5), entry=_whole(config)),
        **in_layers(experts, [layer in sparse for layer in range(layers)]),
    )


def _chunks(config: Config, rotating: list[bool]) -> dict[str, Any]:
    """By ``layer_types``, else in the layers that rotate. A size of null is no chunk."""
    kinds, size = config.get("layer_types"), config.get("attention_chunk_size", 8192)
    known = {"chunked_attention": True, "full_attention": False}
    if kinds is not None and (len(kinds) != len(rotating) or not set(kinds) <= known.keys()):
        raise CheckpointError(
            f"config.json: layer_types={kinds!r} must name each of num_hidden_layers={len(rotating)} layers "
            "chunked_attention or full_attention"
        )
    chunked = tuple(known[kind] for kind in kinds) if kinds is not None else tuple(rotating)
    if not size or not any(chunked):
        return {}
    return {"chunked_window": True, "sliding_window": size, "sliding_layers": () if all(chunked) else chunked}


def _head_dim(config: Config) -> int:
    heads, hidden = required(config, "num_attention_heads"), required(config, "hidden_size")
    size: int = config["head_dim"] if given(config, "head_dim") else hidden // heads
    return size


def _whole(config: Config) -> Entry:
    return entry_of(config, whole=True)
