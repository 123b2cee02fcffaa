"""config.json -> Arch for families with RMS norm and a gated MLP; keys that a file leaves out have the defaults of the row in `families`."""

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


def gemma(config: Config) -> Arch:
    """The first generation: Llama with scaled embeddings and norm weights around zero."""
    bias = bool(config.get("attention_bias"))
    hidden = required(config, "hidden_size")
    # The official files say "gelu" and mean the tanh form; transformers reads them so.
    act = read_activation(
        {**config, "hidden_act": "gelu_pytorch_tanh"} if config.get("hidden_act") == "gelu" else config, "hidden_act", default="gelu_pytorch_tanh"
    )
    return _llama_like(config, norm_offset=1.0, embed_scale=hidden**0.5, qkv_bias=bias, output_bias=bias, activation=act)


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
