"""config.json -> Arch for families with layer norm; keys that a file leaves out have the defaults of the row in
`families`."""

from __future__ import annotations

from typing import Any

from flexbatch.models.arch import Arch
from flexbatch.models.config_keys import (
    Config,
    divided,
    grouped,
    optional,
    read_activation,
    read_sizes,
    read_tokens,
    refuse,
    required,
)
from flexbatch.models.config_rope import read_rope
from flexbatch.models.readers import partial, whole_heads
from flexbatch.validation.errors import CheckpointError


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
    """Its three shapes: multi-query with one norm, grouped heads with two norms, and ALiBi with or without parallel
    residual."""
    sizes = read_sizes(config)
    heads, new, parallel = (
        sizes["num_heads"],
        bool(config.get("new_decoder_architecture")),
        optional(config, "parallel_attn", True),
    )
    sizes["num_kv_heads"] = (
        grouped(config, heads, "num_kv_heads") if new else 1 if optional(config, "multi_query", True) else heads
    )
    sizes["head_dim"] = divided(config, sizes["hidden_size"], heads)
    bias = bool(config.get("bias"))
    rope = (
        {"max_positions": required(config, "max_position_embeddings")}
        if config.get("alibi")
        else whole_heads(config, sizes["head_dim"])
    )
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
        shared_norm=parallel and not (new and optional(config, "num_ln_in_parallel_attn", 2) == 2),
    )


def _learned_positions(config: Config, **changes: Any) -> Arch:
    """GPT-2 and its multi-query relative."""
    refuse(config, "add_cross_attention", "decoder-only models are read here")
    sizes = read_sizes(config)
    fields: dict[str, Any] = {
        **sizes,
        **read_tokens(config),
        "intermediate_size": optional(config, "n_inner", 4 * sizes["hidden_size"]),
        "max_positions": required(config, "n_positions", "max_position_embeddings"),
        "norm": "layer",
        "norm_eps": optional(config, "layer_norm_epsilon", 1e-5),
        "position": "learned",
        "query_scale": None if optional(config, "scale_attn_weights", True) else 1.0,
        "qkv_bias": True,
        "output_bias": True,
        "mlp": "plain",
        "mlp_bias": True,
        "activation": read_activation(config, "activation_function", default="gelu_new"),
    }
    return Arch(**{**fields, **changes})


def gpt2(config: Config) -> Arch:
    refuse(config, "scale_attn_by_inverse_layer_idx", "every layer has the same attention scale here")
    return _learned_positions(config)


def gpt_bigcode(config: Config) -> Arch:
    heads = 1 if optional(config, "multi_query", True) else read_sizes(config)["num_heads"]
    return _learned_positions(
        config,
        num_kv_heads=heads,
        activation=read_activation(config, "activation_function", default="gelu_pytorch_tanh"),
    )


def gpt_neox(config: Config) -> Arch:
    sizes = read_sizes(config)
    # These two names alone count beside the entry, whatever the others say.
    rope = read_rope(
        config,
        sizes["head_dim"],
        theta=optional(config, "rotary_emb_base", 10000.0),
        fraction=optional(config, "rotary_pct", 0.25),
    )
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


def gptj(config: Config) -> Arch:
    """GPT-J and CodeGen, which differ in how the file holds queries, keys and values."""
    sizes = read_sizes(config)
    rotary = config.get("rotary_dim", 64)
    if rotary is None or rotary % 2 or rotary > sizes["head_dim"]:
        raise CheckpointError(
            f"config.json: rotary_dim={rotary} must be an even number up to head_dim (n_embd / n_head) = "
            f"{sizes['head_dim']}"
        )
    return Arch(
        **sizes,
        **read_tokens(config),
        intermediate_size=optional(config, "n_inner", 4 * sizes["hidden_size"]),
        max_positions=required(config, "n_positions", "max_position_embeddings"),
        norm="layer",
        norm_eps=optional(config, "layer_norm_epsilon", 1e-5),
        rotary_dim=rotary,
        rope_interleaved=True,
        mlp="plain",
        mlp_bias=True,
        activation=read_activation(config, "activation_function", default="gelu_new"),
        parallel_residual=True,
        shared_norm=True,
        head_bias=True,
    )


def phi(config: Config) -> Arch:
    refuse(config, "qk_layernorm", "no published checkpoint uses it")
    sizes = read_sizes(config)
    return Arch(
        **sizes,
        **read_tokens(config),
        **read_rope(
            config, sizes["head_dim"], theta=optional(config, "rope_theta", 10000.0), fraction=partial(config, 0.5)
        ),
        intermediate_size=required(config, "intermediate_size"),
        norm="layer",
        norm_eps=optional(config, "layer_norm_eps", 1e-5),
        qkv_bias=True,
        output_bias=True,
        mlp="plain",
        mlp_bias=True,
        activation=read_activation(config, "hidden_act", default="gelu_new"),
        parallel_residual=True,
        shared_norm=True,
        head_bias=True,
    )


def starcoder2(config: Config) -> Arch:
    sizes, bias = read_sizes(config), optional(config, "use_bias", True)
    return Arch(
        **sizes,
        **read_tokens(config),
        **whole_heads(config, sizes["head_dim"]),
        intermediate_size=required(config, "intermediate_size"),
        norm="layer",
        norm_eps=optional(config, "norm_epsilon", 1e-5),
        sliding_window=config.get("sliding_window") or 0,
        qkv_bias=bias,
        output_bias=bias,
        mlp="plain",
        mlp_bias=bias,
        activation=read_activation(config, "hidden_act", default="gelu_pytorch_tanh"),
    )


def stablelm(config: Config) -> Arch:
    refuse(config, "qk_layernorm", "its norm has weights of its own for every head")
    sizes, parallel = read_sizes(config), bool(config.get("use_parallel_residual"))
    return Arch(
        **sizes,
        **read_tokens(config),
        **read_rope(
            config, sizes["head_dim"], theta=optional(config, "rope_theta", 10000.0), fraction=partial(config, 0.25)
        ),
        intermediate_size=required(config, "intermediate_size"),
        norm="layer",
        norm_eps=optional(config, "layer_norm_eps", 1e-5),
        qkv_bias=bool(config.get("use_qkv_bias")),
        activation=read_activation(config, "hidden_act"),
        parallel_residual=parallel,
        shared_norm=parallel,
    )
