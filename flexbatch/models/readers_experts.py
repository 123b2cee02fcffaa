"""config.json -> Arch for families with experts; keys that a file leaves out have the defaults of the row in
`families_experts`."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from flexbatch.models.arch import Arch
from flexbatch.models.config_experts import in_layers, read_corrected, read_experts
from flexbatch.models.config_keys import Config, optional, read_windows, required
from flexbatch.models.config_rope import entry_of, read_rope
from flexbatch.models.readers import llama_like, partial
from flexbatch.validation.errors import CheckpointError

GPT_OSS_ROPE = {
    "rope_type": "yarn",
    "factor": 32.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "truncate": False,
    "original_max_position_embeddings": 4096,
}


def mixtral(config: Config) -> Arch:
    layers = required(config, "num_hidden_layers")
    experts = read_experts(config, required(config, "intermediate_size"), normalize=True)
    return llama_like(
        config,
        **read_windows(config, [config.get("sliding_window") is not None] * layers, None),
        **in_layers(experts, [True] * layers),
    )


def qwen2_moe(config: Config) -> Arch:
    layers, most = required(config, "num_hidden_layers"), optional(config, "max_window_layers", 28)
    window = config.get("sliding_window", 4096) if config.get("use_sliding_window") else None
    windows = [window is not None and not i % 2 and i < most for i in range(layers)]
    experts = read_experts(
        config,
        required(config, "moe_intermediate_size"),
        normalize=optional(config, "norm_topk_prob", False),
        shared_width=required(config, "shared_expert_intermediate_size"),
        shared_gate=True,
    )
    return llama_like(
        config,
        qkv_bias=optional(config, "qkv_bias", True),
        **read_windows({**config, "sliding_window": window}, windows, None),
        **in_layers(experts, _qwen_layers(config)),
    )


def qwen3_moe(config: Config) -> Arch:
    layers, bias = required(config, "num_hidden_layers"), bool(config.get("attention_bias"))
    window = config.get("sliding_window", 4096) if config.get("use_sliding_window") else None
    experts = read_experts(
        config,
        required(config, "moe_intermediate_size"),
        normalize=optional(config, "norm_topk_prob", False),
    )
    return llama_like(
        config,
        qk_norm=True,
        qkv_bias=bias,
        output_bias=bias,
        **read_windows({**config, "sliding_window": window, "layer_types": None}, [window is not None] * layers, None),
        **in_layers(experts, _qwen_layers(config)),
    )


def olmoe(config: Config) -> Arch:
    bias = bool(config.get("attention_bias"))
    experts = read_experts(
        config, required(config, "intermediate_size"), normalize=optional(config, "norm_topk_prob", False)
    )
    return llama_like(
        config,
        wide_qk_norm=True,
        clip_qkv=optional(config, "clip_qkv", 0.0),
        qkv_bias=bias,
        output_bias=bias,
        **in_layers(experts, [True] * required(config, "num_hidden_layers")),
    )


def granitemoe(config: Config) -> Arch:
    """Also with a shared MLP ("granitemoeshared"), which is there when it has a width."""
    bias = bool(config.get("attention_bias"))
    shared = config.get("shared_intermediate_size") or 0 if config["model_type"] == "granitemoeshared" else 0
    width = required(config, "intermediate_size")
    experts = read_experts(config, width, scoring="softmax_of_chosen", shared_width=shared)
    return llama_like(
        config,
        embed_scale=optional(config, "embedding_multiplier", 1.0),
        query_scale=optional(config, "attention_multiplier", 1.0),
        residual_scale=optional(config, "residual_multiplier", 1.0),
        logits_divisor=optional(config, "logits_scaling", 1.0),
        qkv_bias=bias,
        output_bias=bias,
        **in_layers(experts, [True] * required(config, "num_hidden_layers")),
    )


def phimoe(config: Config) -> Arch:
    layers, bias = required(config, "num_hidden_layers"), bool(config.get("attention_bias"))
    if config.get("num_experts_per_tok", 2) != 2:
        raise CheckpointError(
            f"config.json: num_experts_per_tok={config['num_experts_per_tok']}: this family's router takes 2"
        )
    margin = 2 * optional(config, "router_jitter_noise", 0.01)
    experts = read_experts(config, required(config, "intermediate_size"), scoring="sparsemixer", margin=margin)
    return llama_like(
        config,
        norm="layer",
        qkv_bias=bias,
        output_bias=bias,
        head_bias=bool(config.get("lm_head_bias")),
        **_phimoe_rope(config),
        **read_windows(config, [config.get("sliding_window") is not None] * layers, None),
        **in_layers(experts, [True] * layers),
    )


def _phimoe_rope(config: Config) -> dict[str, Any]:
    """Its tables are multiplied by a number that the file gives, not by one that follows from the factor."""
    entry = entry_of(config, whole=True)
    kind = entry.values.get("rope_type") or entry.values.get("type") or "default"
    if kind not in ("default", "longrope", "su"):
        raise CheckpointError(
            f"config.json: {entry.name}.{'rope_type' if entry.values.get('rope_type') else 'type'}: rope scaling "
            f"{kind!r} is not one of PhiMoE's; known: longrope, and su, which means it"
        )
    if kind != "default":
        if entry.values.get("short_mscale") is None:
            raise CheckpointError(f"config.json: {entry.name} of type {kind!r} lacks short_mscale")
        entry.values["attention_factor"] = entry.values["short_mscale"]
    heads, hidden = required(config, "num_attention_heads"), required(config, "hidden_size")
    head_dim = config["head_dim"] if config.get("head_dim") is not None else hidden // heads
    return read_rope(config, head_dim, theta=optional(config, "rope_theta", 1e6), entry=entry)


def glm4_moe(config: Config) -> Arch:
    layers, first = required(config, "num_hidden_layers"), optional(config, "first_k_dense_replace", 1)
    heads, hidden = required(config, "num_attention_heads"), required(config, "hidden_size")
    head_dim = config["head_dim"] if config.get("head_dim") is not None else hidden // heads
    rope = read_rope(config, head_dim, theta=optional(config, "rope_theta", 10000.0), fraction=partial(config, 0.5))
    return llama_like(
        config,
        qk_norm=bool(config.get("use_qk_norm")),
        qkv_bias=bool(config.get("attention_bias")),
        skipped_layers=optional(config, "num_nextn_predict_layers", 1),
        **rope,
        **in_layers(read_corrected(config), [i >= first for i in range(layers)]),
    )


def gpt_oss(config: Config) -> Arch:
    """Windows by turns from the first layer on, where the file does not name them; its rotation is extended unless the
    file says otherwise."""
    bias, layers = bool(config.get("attention_bias", True)), required(config, "num_hidden_layers")
    experts = read_experts(
        config,
        required(config, "intermediate_size"),
        scoring="softmax_of_chosen",
        router_bias=True,
        bias=True,
        clamp=float(optional(config, "swiglu_limit", 7.0)),
        gain=float(optional(config, "swiglu_alpha", 1.702)),
    )
    entry = entry_of(config, whole=True)
    entry = entry if entry.values else replace(entry, values=dict(GPT_OSS_ROPE))
    return llama_like(
        config,
        norm_wide=True,
        sinks=True,
        qkv_bias=bias,
        output_bias=bias,
        **read_rope(config, required(config, "head_dim"), theta=optional(config, "rope_theta", 150000.0), entry=entry),
        **read_windows(config, [not layer % 2 for layer in range(layers)], 128),
        **in_layers(experts, [True] * layers),
    )


def _qwen_layers(config: Config) -> list[bool]:
    """Every ``decoder_sparse_step``-th layer has experts, those of ``mlp_only_layers`` never."""
    dense, step = set(optional(config, "mlp_only_layers", ())), optional(config, "decoder_sparse_step", 1)
    return [layer not in dense and (layer + 1) % step == 0 for layer in range(required(config, "num_hidden_layers"))]
