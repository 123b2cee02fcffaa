"""config.json -> Arch, one function per family; keys that a file leaves out have the defaults of the family's row in `families`."""

from __future__ import annotations

from typing import Any

from flexbatch.models.arch import Arch
from flexbatch.models.config_keys import Config, optional, read_activation, read_rope, read_sizes, read_tokens, refuse, required


def _llama_like(config: Config, **changes: Any) -> Arch:
    """RMS norm, rotary, gated MLP: the common ground of Llama, Mistral, Qwen, GLM, Gemma and Phi-3."""
    sizes = read_sizes(config)
    fields: dict[str, Any] = {
        **sizes,
        **read_tokens(config),
        **read_rope(config, sizes["head_dim"]),
        "intermediate_size": required(config, "intermediate_size"),
        "norm_eps": optional(config, "rms_norm_eps", 1e-6),
        "activation": read_activation(config, "hidden_act"),
    }
    return Arch(**{**fields, **changes})


def llama(config: Config) -> Arch:
    bias = bool(config.get("attention_bias"))
    return _llama_like(config, qkv_bias=bias, output_bias=bias, mlp_bias=bool(config.get("mlp_bias")))


def mistral(config: Config) -> Arch:
    return _llama_like(config, sliding_window=config["sliding_window"] or 0)


def _qwen_windows(config: Config) -> dict[str, Any]:
    """A window only where ``use_sliding_window`` says so, and then in the layers from ``max_window_layers`` on, or as ``layer_types`` names them."""
    if not config.get("use_sliding_window"):
        return {}
    kinds = config.get("layer_types")
    layers = required(config, "num_hidden_layers")
    sliding = [i >= optional(config, "max_window_layers", 28) for i in range(layers)] if kinds is None else [kind == "sliding_attention" for kind in kinds]
    return {"sliding_window": optional(config, "sliding_window", 4096), "sliding_layers": tuple(sliding)}


def qwen2(config: Config) -> Arch:
    return _llama_like(config, qkv_bias=True, **_qwen_windows(config))


def qwen3(config: Config) -> Arch:
    bias = bool(config.get("attention_bias"))
    return _llama_like(config, qk_norm=True, qkv_bias=bias, output_bias=bias, **_qwen_windows(config))


def glm(config: Config) -> Arch:
    rope = read_rope(config, config["head_dim"], fraction=0.5)
    return _llama_like(config, rope_interleaved=True, qkv_bias=optional(config, "attention_bias", True), sublayer_norm=config["model_type"] == "glm4", **rope)


def phi3(config: Config) -> Arch:
    entry = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    if (entry.get("rope_type") or entry.get("type")) == "yarn":
        entry["rope_type"] = "longrope"  # early Phi-3 files call it so
    head_dim = read_sizes(config)["head_dim"]
    return _llama_like(config, sliding_window=config.get("sliding_window") or 0, **read_rope(config, head_dim, entry=entry))


def _gemma(config: Config, period: int, **changes: Any) -> Arch:
    refuse(config, "use_bidirectional_attention", "decoding needs causal attention")
    layers, hidden = required(config, "num_hidden_layers"), required(config, "hidden_size")
    kinds = config.get("layer_types")
    sliding = [bool((i + 1) % period) for i in range(layers)] if kinds is None else [kind == "sliding_attention" for kind in kinds]
    bias = bool(config.get("attention_bias"))
    return _llama_like(
        config,
        norm_offset=1.0,
        sublayer_norm=True,
        embed_scale=hidden**0.5,
        query_scale=optional(config, "query_pre_attn_scalar", 256) ** -0.5,
        sliding_window=optional(config, "sliding_window", 4096),
        sliding_layers=tuple(sliding),
        qkv_bias=bias,
        output_bias=bias,
        activation=read_activation(config, "hidden_activation", default="gelu_pytorch_tanh"),
        **changes,
    )


def gemma2(config: Config) -> Arch:
    return _gemma(config, 2, soft_cap=config.get("attn_logit_softcapping", 50.0) or 0.0, final_soft_cap=config.get("final_logit_softcapping", 30.0) or 0.0)


def gemma3(config: Config) -> Arch:
    """Text model. Layers with a window rotate with a base of their own."""
    nested = config.get("rope_parameters") or {}
    entry = dict(nested.get("full_attention") or config.get("rope_scaling") or {})
    local = optional(nested.get("sliding_attention") or {}, "rope_theta", optional(config, "rope_local_base_freq", 10000.0))
    return _gemma(
        config,
        optional(config, "sliding_window_pattern", optional(config, "_sliding_window_pattern", 6)),
        qk_norm=True,
        local_rope_theta=float(local),
        final_soft_cap=config.get("final_logit_softcapping") or 0.0,
        **read_rope(config, config["head_dim"], theta=1e6, entry=entry),
    )


def opt(config: Config) -> Arch:
    before = optional(config, "do_layer_norm_before", True)
    bias = optional(config, "enable_bias", True)
    return Arch(
        **read_sizes(config),
        **read_tokens(config),
        intermediate_size=required(config, "ffn_dim"),
        max_positions=required(config, "max_position_embeddings"),
        norm="layer",
        norm_eps=1e-5,
        norm_affine=optional(config, "layer_norm_elementwise_affine", True),
        post_norm=not before,
        final_norm=before and not config.get("_remove_final_layer_norm"),
        position="learned",
        position_offset=2,
        qkv_bias=bias,
        output_bias=bias,
        mlp="plain",
        mlp_bias=bias,
        activation=read_activation(config, "activation_function", default="relu"),
        embed_size=optional(config, "word_embed_proj_dim", 0),
    )


def bloom(config: Config) -> Arch:
    refuse(config, "apply_residual_connection_post_layernorm", "no published checkpoint uses it")
    sizes = read_sizes(config)
    return Arch(
        **sizes,
        **read_tokens(config),
        intermediate_size=4 * sizes["hidden_size"],
        max_positions=optional(config, "seq_length", 2048),
        norm="layer",
        norm_eps=optional(config, "layer_norm_epsilon", 1e-5),
        position="alibi",
        qkv_bias=True,
        output_bias=True,
        mlp="plain",
        mlp_bias=True,
        activation="gelu_tanh",
        embed_norm=True,
    )


def falcon(config: Config) -> Arch:
    """Its three shapes: multi-query with one norm, grouped heads with two norms, and ALiBi with or without parallel residual."""
    sizes = read_sizes(config)
    heads, grouped, parallel = sizes["num_heads"], bool(config.get("new_decoder_architecture")), optional(config, "parallel_attn", True)
    sizes["num_kv_heads"] = optional(config, "num_kv_heads", heads) if grouped else 1 if optional(config, "multi_query", True) else heads
    sizes["head_dim"] = sizes["hidden_size"] // heads
    bias = bool(config.get("bias"))
    rope = read_rope(config, sizes["head_dim"])
    return Arch(
        **sizes,
        **read_tokens(config),
        **rope,
        intermediate_size=optional(config, "ffn_hidden_size", 4 * sizes["hidden_size"]),
        norm="layer",
        norm_eps=optional(config, "layer_norm_epsilon", 1e-5),
        position="alibi" if config.get("alibi") else "rope",
        scaled_alibi=True,
        qkv_bias=bias,
        output_bias=bias,
        mlp="plain",
        mlp_bias=bias,
        activation=read_activation(config, "activation", default="gelu"),
        parallel_residual=parallel,
        shared_norm=parallel and not (grouped and optional(config, "num_ln_in_parallel_attn", 2) == 2),
    )


def gpt_bigcode(config: Config) -> Arch:
    refuse(config, "add_cross_attention", "decoder-only models are read here")
    sizes = read_sizes(config)
    sizes["num_kv_heads"] = 1 if optional(config, "multi_query", True) else sizes["num_heads"]
    return Arch(
        **sizes,
        **read_tokens(config),
        intermediate_size=optional(config, "n_inner", 4 * sizes["hidden_size"]),
        max_positions=required(config, "n_positions", "max_position_embeddings"),
        norm="layer",
        norm_eps=optional(config, "layer_norm_epsilon", 1e-5),
        position="learned",
        query_scale=None if optional(config, "scale_attn_weights", True) else 1.0,
        qkv_bias=True,
        output_bias=True,
        mlp="plain",
        mlp_bias=True,
        activation=read_activation(config, "activation_function", default="gelu_pytorch_tanh"),
    )


def gpt_neox(config: Config) -> Arch:
    sizes = read_sizes(config)
    rope = read_rope(config, sizes["head_dim"], theta=optional(config, "rotary_emb_base", 10000.0), fraction=optional(config, "rotary_pct", 0.25))
    bias = optional(config, "attention_bias", True)
    return Arch(
        **sizes,
        **read_tokens(config),
        **rope,
        intermediate_size=required(config, "intermediate_size"),
        norm="layer",
        norm_eps=optional(config, "layer_norm_eps", 1e-5),
        qkv_bias=bias,
        output_bias=bias,
        mlp="plain",
        mlp_bias=True,
        activation=read_activation(config, "hidden_act", default="gelu"),
        parallel_residual=optional(config, "use_parallel_residual", True),
    )


def codegen(config: Config) -> Arch:
    sizes = read_sizes(config)
    return Arch(
        **sizes,
        **read_tokens(config),
        intermediate_size=optional(config, "n_inner", 4 * sizes["hidden_size"]),
        max_positions=required(config, "n_positions", "max_position_embeddings"),
        norm="layer",
        norm_eps=optional(config, "layer_norm_epsilon", 1e-5),
        rotary_dim=optional(config, "rotary_dim", 64),
        rope_interleaved=True,
        mlp="plain",
        mlp_bias=True,
        activation=read_activation(config, "activation_function", default="gelu_new"),
        parallel_residual=True,
        shared_norm=True,
        head_bias=True,
    )
