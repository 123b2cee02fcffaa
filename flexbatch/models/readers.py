"""config.json -> Arch, one function per family. Defaults are those of the transformers configuration class, for keys that a file leaves out."""

from __future__ import annotations

from typing import Any

from flexbatch.models.arch import Arch, RopeScaling
from flexbatch.models.errors import CheckpointError

Config = dict[str, Any]

ACTIVATION_NAMES = {
    "relu": "relu",
    "gelu": "gelu",
    "gelu_python": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "silu": "silu",
    "swish": "silu",
}


def _get(config: Config, *names: str) -> Any:
    """The first of several spellings that the file has."""
    for name in names:
        if config.get(name) is not None:
            return config[name]
    raise CheckpointError(f"config.json of model_type {config.get('model_type')!r} lacks {' or '.join(names)}")


def _or(config: Config, name: str, default: Any) -> Any:
    value = config.get(name)
    return default if value is None else value


def _activation(config: Config, *names: str, default: str = "silu") -> str:
    name = next((config[n] for n in names if config.get(n)), default)
    if name not in ACTIVATION_NAMES:
        raise CheckpointError(f"config.json: activation {name!r} is unknown; known: {', '.join(sorted(ACTIVATION_NAMES))}")
    return ACTIVATION_NAMES[name]


def _refuse(config: Config, name: str, reason: str) -> None:
    if config.get(name):
        raise CheckpointError(f"config.json: {name}={config[name]!r} is not supported: {reason}")


def _tokens(config: Config, tied: bool) -> dict[str, Any]:
    """What every family has: special tokens, storage dtype, tying."""
    eos = config.get("eos_token_id")
    eos_token_ids = tuple(eos) if isinstance(eos, list | tuple) else () if eos is None else (eos,)
    dtype = config.get("dtype") or config.get("torch_dtype") or "float32"
    return {
        "family": config["model_type"],
        "eos_token_ids": eos_token_ids,
        "bos_token_id": config.get("bos_token_id"),
        "pad_token_id": config.get("pad_token_id"),
        "dtype": str(dtype).removeprefix("torch."),
        "tie_word_embeddings": _or(config, "tie_word_embeddings", tied),
    }


def _sizes(config: Config) -> dict[str, Any]:
    """The key names that most families share."""
    heads = _get(config, "num_attention_heads", "n_head")
    hidden = _get(config, "hidden_size", "n_embd", "n_embed")
    return {
        "num_layers": _get(config, "num_hidden_layers", "n_layer"),
        "hidden_size": hidden,
        "num_heads": heads,
        "num_kv_heads": _or(config, "num_key_value_heads", heads),
        "head_dim": _or(config, "head_dim", hidden // heads),
        "vocab_size": _get(config, "vocab_size"),
    }


def _scaling(rope: Config, config: Config, positions: int) -> RopeScaling | None:
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind == "default":
        return None
    if kind not in ("linear", "dynamic", "llama3", "yarn", "longrope", "su"):
        raise CheckpointError(f"config.json: rope scaling {kind!r} is unknown; known: linear, dynamic, llama3, yarn, longrope")
    original = config.get("original_max_position_embeddings") or rope.get("original_max_position_embeddings") or positions
    if kind == "dynamic":
        original = positions  # transformers refers to the context of the file here, whatever else the entry says
    names = ("low_freq_factor", "high_freq_factor", "attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate")
    given: Config = {name: rope[name] for name in names if rope.get(name) is not None}
    factors: Config = {name: tuple(rope.get(name) or ()) for name in ("short_factor", "long_factor")}
    return RopeScaling("longrope" if kind == "su" else kind, rope.get("factor") or positions / original, original, **given, **factors)


def _rope(config: Config, head_dim: int, *, theta: float = 10000.0, fraction: float = 1.0, entry: Config | None = None) -> dict[str, Any]:
    """Rotary fields and the context length. Reads both ``rope_parameters`` (transformers 5) and ``rope_scaling`` with ``rope_theta`` (before).

    "linear" and "dynamic" leave max_position_embeddings at the trained context, so the usable one is the factor times longer; "yarn" may.
    """
    rope = entry if entry is not None else config.get("rope_parameters") or config.get("rope_scaling") or {}
    positions = _get(config, "max_position_embeddings", "n_positions")
    scaling = _scaling(rope, config, positions)
    share = _or(rope, "partial_rotary_factor", _or(config, "partial_rotary_factor", fraction))
    context = positions
    if scaling is not None and scaling.kind in ("linear", "dynamic"):
        context = int(positions * scaling.factor)
    elif scaling is not None and scaling.kind == "yarn":
        context = max(positions, int(scaling.original_positions * scaling.factor))
    elif scaling is not None and scaling.kind == "longrope":
        # Past the trained context every cached key would have to be rotated again with the long factors.
        context = min(positions, scaling.original_positions)
    rope_theta = float(_or(rope, "rope_theta", _or(config, "rope_theta", theta)))
    return {"rope_theta": rope_theta, "rotary_dim": int(head_dim * share), "rope_scaling": scaling, "max_positions": context}


def _llama_like(config: Config, *, tied: bool = False, **changes: Any) -> Arch:
    """RMS norm, rotary, gated MLP: the common ground of Llama, Mistral, Qwen, GLM, Gemma and Phi-3."""
    sizes = _sizes(config)
    fields: dict[str, Any] = {
        **sizes,
        **_tokens(config, tied),
        **_rope(config, sizes["head_dim"]),
        "intermediate_size": _get(config, "intermediate_size"),
        "norm_eps": _or(config, "rms_norm_eps", 1e-6),
        "activation": _activation(config, "hidden_act"),
    }
    return Arch(**{**fields, **changes})


def llama(config: Config) -> Arch:
    bias = bool(config.get("attention_bias"))
    return _llama_like(config, qkv_bias=bias, output_bias=bias, mlp_bias=bool(config.get("mlp_bias")))


def mistral(config: Config) -> Arch:
    return _llama_like(config, sliding_window=config["sliding_window"] or 0 if "sliding_window" in config else 4096)


def _qwen_windows(config: Config) -> dict[str, Any]:
    """A window only where ``use_sliding_window`` says so, and then in the layers from ``max_window_layers`` on, or as ``layer_types`` names them."""
    if not config.get("use_sliding_window"):
        return {}
    kinds = config.get("layer_types")
    layers = _get(config, "num_hidden_layers")
    sliding = [i >= _or(config, "max_window_layers", 28) for i in range(layers)] if kinds is None else [kind == "sliding_attention" for kind in kinds]
    return {"sliding_window": _or(config, "sliding_window", 4096), "sliding_layers": tuple(sliding)}


def qwen2(config: Config) -> Arch:
    return _llama_like(config, qkv_bias=True, **_qwen_windows(config))


def qwen3(config: Config) -> Arch:
    bias = bool(config.get("attention_bias"))
    config = {"head_dim": 128, **config}
    return _llama_like(config, qk_norm=True, qkv_bias=bias, output_bias=bias, **_qwen_windows(config))


def glm(config: Config) -> Arch:
    config = {"head_dim": 128, "rms_norm_eps": 1.5625e-7, **config}
    rope = _rope(config, config["head_dim"], fraction=0.5)
    return _llama_like(config, rope_interleaved=True, qkv_bias=_or(config, "attention_bias", True), sublayer_norm=config["model_type"] == "glm4", **rope)


def phi3(config: Config) -> Arch:
    config = {"original_max_position_embeddings": 4096, "rms_norm_eps": 1e-5, **config}
    entry = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    if (entry.get("rope_type") or entry.get("type")) == "yarn":
        entry["rope_type"] = "longrope"  # early Phi-3 files call it so
    head_dim = _sizes(config)["head_dim"]
    return _llama_like(config, sliding_window=config.get("sliding_window") or 0, **_rope(config, head_dim, entry=entry))


def _gemma(config: Config, period: int, **changes: Any) -> Arch:
    _refuse(config, "use_bidirectional_attention", "decoding needs causal attention")
    config = {"head_dim": 256, **config}
    layers, hidden = _get(config, "num_hidden_layers"), _get(config, "hidden_size")
    kinds = config.get("layer_types")
    sliding = [bool((i + 1) % period) for i in range(layers)] if kinds is None else [kind == "sliding_attention" for kind in kinds]
    bias = bool(config.get("attention_bias"))
    return _llama_like(
        config,
        tied=True,
        norm_offset=1.0,
        sublayer_norm=True,
        embed_scale=hidden**0.5,
        query_scale=_or(config, "query_pre_attn_scalar", 256) ** -0.5,
        sliding_window=_or(config, "sliding_window", 4096),
        sliding_layers=tuple(sliding),
        qkv_bias=bias,
        output_bias=bias,
        activation=_activation(config, "hidden_activation", default="gelu_pytorch_tanh"),
        **changes,
    )


def gemma2(config: Config) -> Arch:
    return _gemma(config, 2, soft_cap=config.get("attn_logit_softcapping", 50.0) or 0.0, final_soft_cap=config.get("final_logit_softcapping", 30.0) or 0.0)


def gemma3(config: Config) -> Arch:
    """Text model. Layers with a window rotate with a base of their own."""
    defaults = {"vocab_size": 262208, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256, "max_position_embeddings": 131072}
    config = {**defaults, **config}
    nested = config.get("rope_parameters") or {}
    entry = dict(nested.get("full_attention") or config.get("rope_scaling") or {})
    local = _or(nested.get("sliding_attention") or {}, "rope_theta", _or(config, "rope_local_base_freq", 10000.0))
    return _gemma(
        config,
        _or(config, "sliding_window_pattern", _or(config, "_sliding_window_pattern", 6)),
        qk_norm=True,
        local_rope_theta=float(local),
        final_soft_cap=config.get("final_logit_softcapping") or 0.0,
        **_rope(config, config["head_dim"], theta=1e6, entry=entry),
    )


def gemma3_multimodal(config: Config) -> Arch:
    """Text part of the model that also sees images; its entries stand under ``text_config``, its special tokens beside it."""
    outer = {name: config[name] for name in ("eos_token_id", "bos_token_id", "pad_token_id", "dtype", "torch_dtype") if config.get(name) is not None}
    return gemma3({**_get(config, "text_config"), **outer, "model_type": config["model_type"]})


def opt(config: Config) -> Arch:
    before = _or(config, "do_layer_norm_before", True)
    bias = _or(config, "enable_bias", True)
    return Arch(
        **_sizes(config),
        **_tokens(config, True),
        intermediate_size=_get(config, "ffn_dim"),
        max_positions=_get(config, "max_position_embeddings"),
        norm="layer",
        norm_eps=1e-5,
        norm_affine=_or(config, "layer_norm_elementwise_affine", True),
        post_norm=not before,
        final_norm=before and not config.get("_remove_final_layer_norm"),
        position="learned",
        position_offset=2,
        qkv_bias=bias,
        output_bias=bias,
        mlp="plain",
        mlp_bias=bias,
        activation=_activation(config, "activation_function", default="relu"),
        embed_size=_or(config, "word_embed_proj_dim", 0),
    )


def bloom(config: Config) -> Arch:
    _refuse(config, "apply_residual_connection_post_layernorm", "no published checkpoint uses it")
    sizes = _sizes(config)
    return Arch(
        **sizes,
        **_tokens(config, True),
        intermediate_size=4 * sizes["hidden_size"],
        max_positions=_or(config, "seq_length", 2048),
        norm="layer",
        norm_eps=_or(config, "layer_norm_epsilon", 1e-5),
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
    sizes = _sizes(config)
    heads, grouped, parallel = sizes["num_heads"], bool(config.get("new_decoder_architecture")), _or(config, "parallel_attn", True)
    sizes["num_kv_heads"] = _or(config, "num_kv_heads", heads) if grouped else 1 if _or(config, "multi_query", True) else heads
    sizes["head_dim"] = sizes["hidden_size"] // heads
    bias = bool(config.get("bias"))
    rope = _rope({"max_position_embeddings": 2048, **config}, sizes["head_dim"])
    return Arch(
        **sizes,
        **_tokens(config, True),
        **rope,
        intermediate_size=_or(config, "ffn_hidden_size", 4 * sizes["hidden_size"]),
        norm="layer",
        norm_eps=_or(config, "layer_norm_epsilon", 1e-5),
        position="alibi" if config.get("alibi") else "rope",
        scaled_alibi=True,
        qkv_bias=bias,
        output_bias=bias,
        mlp="plain",
        mlp_bias=bias,
        activation=_activation(config, "activation", default="gelu"),
        parallel_residual=parallel,
        shared_norm=parallel and not (grouped and _or(config, "num_ln_in_parallel_attn", 2) == 2),
    )


def gpt_bigcode(config: Config) -> Arch:
    _refuse(config, "add_cross_attention", "decoder-only models are read here")
    sizes = _sizes(config)
    sizes["num_kv_heads"] = 1 if _or(config, "multi_query", True) else sizes["num_heads"]
    return Arch(
        **sizes,
        **_tokens(config, True),
        intermediate_size=_or(config, "n_inner", 4 * sizes["hidden_size"]),
        max_positions=_get(config, "n_positions", "max_position_embeddings"),
        norm="layer",
        norm_eps=_or(config, "layer_norm_epsilon", 1e-5),
        position="learned",
        query_scale=None if _or(config, "scale_attn_weights", True) else 1.0,
        qkv_bias=True,
        output_bias=True,
        mlp="plain",
        mlp_bias=True,
        activation=_activation(config, "activation_function", default="gelu_pytorch_tanh"),
    )


def gpt_neox(config: Config) -> Arch:
    sizes = _sizes(config)
    rope = _rope(config, sizes["head_dim"], theta=_or(config, "rotary_emb_base", 10000.0), fraction=_or(config, "rotary_pct", 0.25))
    bias = _or(config, "attention_bias", True)
    return Arch(
        **sizes,
        **_tokens(config, False),
        **rope,
        intermediate_size=_get(config, "intermediate_size"),
        norm="layer",
        norm_eps=_or(config, "layer_norm_eps", 1e-5),
        qkv_bias=bias,
        output_bias=bias,
        mlp="plain",
        mlp_bias=True,
        activation=_activation(config, "hidden_act", default="gelu"),
        parallel_residual=_or(config, "use_parallel_residual", True),
    )


def codegen(config: Config) -> Arch:
    sizes = _sizes(config)
    return Arch(
        **sizes,
        **_tokens(config, False),
        intermediate_size=_or(config, "n_inner", 4 * sizes["hidden_size"]),
        max_positions=_get(config, "n_positions", "max_position_embeddings"),
        norm="layer",
        norm_eps=_or(config, "layer_norm_epsilon", 1e-5),
        rotary_dim=_or(config, "rotary_dim", 64),
        rope_interleaved=True,
        mlp="plain",
        mlp_bias=True,
        activation=_activation(config, "activation_function", default="gelu_new"),
        parallel_residual=True,
        shared_norm=True,
        head_bias=True,
    )
