"""config.json -> Arch for families with RMS norm and a gated MLP; keys that a file leaves out have the defaults of
the row in `families`."""

from __future__ import annotations

from typing import Any

from flexbatch.models.arch import Arch
from flexbatch.models.config_keys import (
    Config,
    optional,
    read_activation,
    read_sizes,
    read_tokens,
    read_windows,
    refuse,
    required,
)
from flexbatch.models.config_rope import entries_by_layer_type, entry_of, read_rope
from flexbatch.validation.errors import CheckpointError


def whole_heads(config: Config, head_dim: int) -> dict[str, Any]:
    """The rotation of families that turn whole heads."""
    return read_rope(
        config,
        head_dim,
        theta=optional(config, "rope_theta", 10000.0),
        fraction=partial(config, 1.0),
        entry=entry_of(config, whole=True),
    )


def partial(config: Config, default: float) -> float:
    share: float = optional(config, "partial_rotary_factor", default)
    return share


def llama_like(config: Config, **changes: Any) -> Arch:
    """RMS norm, rotary, gated MLP: the common ground of Llama, Mistral, Qwen, GLM, Gemma and Phi-3."""
    sizes = read_sizes(config)
    rope = {} if "rope_theta" in changes else whole_heads(config, sizes["head_dim"])
    fields: dict[str, Any] = {
        **sizes,
        **read_tokens(config),
        **rope,
        "intermediate_size": required(config, "intermediate_size"),
        "norm_eps": optional(config, "rms_norm_eps", 1e-6),
        "activation": read_activation(config, "hidden_act"),
    }
    return Arch(**{**fields, **changes})


def llama(config: Config) -> Arch:
    bias = bool(config.get("attention_bias"))
    return llama_like(config, qkv_bias=bias, output_bias=bias, mlp_bias=bool(config.get("mlp_bias")))


def mistral(config: Config) -> Arch:
    """One window for all layers, none, or of the layers that ``layer_types`` names (then transformers' Ministral)."""
    layers = required(config, "num_hidden_layers")
    return llama_like(config, **read_windows(config, [config.get("sliding_window", 4096) is not None] * layers, 4096))


def qwen_windows(config: Config) -> dict[str, Any]:
    """A window only where ``use_sliding_window`` says so, and then in the layers from ``max_window_layers`` on, or
    as ``layer_types`` names them."""
    layers, first = required(config, "num_hidden_layers"), optional(config, "max_window_layers", 28)
    window = config.get("sliding_window", 4096) if config.get("use_sliding_window") else None
    return read_windows(
        {**config, "sliding_window": window}, [window is not None and i >= first for i in range(layers)], None
    )


def qwen2(config: Config) -> Arch:
    return llama_like(config, qkv_bias=True, **qwen_windows(config))


def qwen3(config: Config) -> Arch:
    bias = bool(config.get("attention_bias"))
    return llama_like(config, qk_norm=True, qkv_bias=bias, output_bias=bias, **qwen_windows(config))


def glm(config: Config) -> Arch:
    rope = read_rope(
        config, config["head_dim"], theta=optional(config, "rope_theta", 10000.0), fraction=partial(config, 0.5)
    )
    return llama_like(
        config,
        rope_interleaved=True,
        qkv_bias=optional(config, "attention_bias", True),
        sublayer_norm=config["model_type"] == "glm4",
        **rope,
    )


def phi3(config: Config) -> Arch:
    entry = entry_of(config)
    key = "rope_type" if entry.values.get("rope_type") else "type"
    kind = entry.values.get(key) or "default"
    if kind not in ("default", "longrope", "su", "yarn"):
        raise CheckpointError(
            f"config.json: {entry.name}.{key}: rope scaling {kind!r} is not one of Phi-3's; known: longrope, "
            "and su and yarn, which mean it"
        )
    if kind == "yarn":
        entry.values["rope_type"] = "longrope"  # early Phi-3 files call it so
    head_dim = read_sizes(config)["head_dim"]
    rope = read_rope(
        config, head_dim, theta=optional(config, "rope_theta", 10000.0), fraction=partial(config, 1.0), entry=entry
    )
    return llama_like(config, sliding_window=config.get("sliding_window") or 0, **rope)


def gemma(config: Config) -> Arch:
    """The first generation: Llama with scaled embeddings and norm weights around zero."""
    bias = bool(config.get("attention_bias"))
    hidden = required(config, "hidden_size")
    # The official files say "gelu" and mean the tanh form; transformers reads them so.
    act = read_activation(
        {**config, "hidden_act": "gelu_pytorch_tanh"} if config.get("hidden_act") == "gelu" else config,
        "hidden_act",
        default="gelu_pytorch_tanh",
    )
    return llama_like(config, norm_offset=1.0, embed_scale=hidden**0.5, qkv_bias=bias, output_bias=bias, activation=act)


def _gemma(config: Config, period: int, **changes: Any) -> Arch:
    refuse(config, "use_bidirectional_attention", "decoding needs causal attention")
    layers, hidden = required(config, "num_hidden_layers"), required(config, "hidden_size")
    bias = bool(config.get("attention_bias"))
    return llama_like(
        config,
        norm_offset=1.0,
        sublayer_norm=True,
        embed_scale=hidden**0.5,
        query_scale=optional(config, "query_pre_attn_scalar", 256) ** -0.5,
        **read_windows(config, [bool((i + 1) % period) for i in range(layers)], 4096),
        qkv_bias=bias,
        output_bias=bias,
        activation=read_activation(config, "hidden_activation", default="gelu_pytorch_tanh"),
        **changes,
    )


def gemma2(config: Config) -> Arch:
    return _gemma(
        config,
        2,
        soft_cap=config.get("attn_logit_softcapping", 50.0) or 0.0,
        final_soft_cap=config.get("final_logit_softcapping", 30.0) or 0.0,
    )


def gemma3(config: Config) -> Arch:
    """Text model. Layers with a window rotate by an entry of their own."""
    full, sliding = entries_by_layer_type(config)
    head_dim, fraction = config["head_dim"], partial(config, 1.0)
    rope = read_rope(config, head_dim, theta=optional(config, "rope_theta", 1e6), fraction=fraction, entry=full)
    local = read_rope(
        config, head_dim, theta=optional(config, "rope_local_base_freq", 10000.0), fraction=fraction, entry=sliding
    )
    return _gemma(
        config,
        optional(config, "sliding_window_pattern", 6),
        qk_norm=True,
        local_rope_theta=local["rope_theta"],
        local_rope_scaling=local["rope_scaling"],
        final_soft_cap=config.get("final_logit_softcapping") or 0.0,
        **{**rope, "max_positions": min(rope["max_positions"], local["max_positions"])},
    )
