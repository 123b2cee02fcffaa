"""config.json -> Arch for families with experts; keys that a file leaves out have the defaults of the row in
`families_experts`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from flexbatch.models.arch import Arch
from flexbatch.models.config_keys import Config, given, optional, read_windows, required
from flexbatch.models.config_rope import entry_of, read_rope
from flexbatch.models.expert_arch import Experts
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
COUNTS = ("num_experts", "num_local_experts", "n_routed_experts")
"""What the number of experts is called, by family and by version of transformers."""


def mixtral(config: Config) -> Arch:
    layers = required(config, "num_hidden_layers")
    experts = _experts(config, required(config, "intermediate_size"), normalize=True)
    return llama_like(
        config,
        **read_windows(config, [config.get("sliding_window") is not None] * layers, None),
        **_in_layers(experts, [True] * layers),
    )


def qwen2_moe(config: Config) -> Arch:
    layers, most = required(config, "num_hidden_layers"), optional(config, "max_window_layers", 28)
    window = config.get("sliding_window", 4096) if config.get("use_sliding_window") else None
    windows = [window is not None and not i % 2 and i < most for i in range(layers)]
    experts = _experts(
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
        **_in_layers(experts, _qwen_layers(config)),
    )


def qwen3_moe(config: Config) -> Arch:
    layers, bias = required(config, "num_hidden_layers"), bool(config.get("attention_bias"))
    window = config.get("sliding_window", 4096) if config.get("use_sliding_window") else None
    experts = _experts(
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
        **_in_layers(experts, _qwen_layers(config)),
    )


def olmoe(config: Config) -> Arch:
    bias = bool(config.get("attention_bias"))
    experts = _experts(
        config, required(config, "intermediate_size"), normalize=optional(config, "norm_topk_prob", False)
    )
    return llama_like(
        config,
        wide_qk_norm=True,
        clip_qkv=optional(config, "clip_qkv", 0.0),
        qkv_bias=bias,
        output_bias=bias,
        **_in_layers(experts, [True] * required(config, "num_hidden_layers")),
    )


def granitemoe(config: Config) -> Arch:
    """Also with a shared MLP ("granitemoeshared"), which is there when it has a width."""
    bias = bool(config.get("attention_bias"))
    shared = config.get("shared_intermediate_size") or 0 if config["model_type"] == "granitemoeshared" else 0
    experts = _experts(config, required(config, "intermediate_size"), scoring="softmax_of_chosen", shared_width=shared)
    return llama_like(
        config,
        embed_scale=optional(config, "embedding_multiplier", 1.0),
        query_scale=optional(config, "attention_multiplier", 1.0),
        residual_scale=optional(config, "residual_multiplier", 1.0),
        logits_divisor=optional(config, "logits_scaling", 1.0),
        qkv_bias=bias,
        output_bias=bias,
        **_in_layers(experts, [True] * required(config, "num_hidden_layers")),
    )


def phimoe(config: Config) -> Arch:
    layers, bias = required(config, "num_hidden_layers"), bool(config.get("attention_bias"))
    if config.get("num_experts_per_tok", 2) != 2:
        raise CheckpointError(
            f"config.json: num_experts_per_tok={config['num_experts_per_tok']}: this family's router takes 2"
        )
    margin = 2 * optional(config, "router_jitter_noise", 0.01)
    experts = _experts(config, required(config, "intermediate_size"), scoring="sparsemixer", margin=margin)
    return llama_like(
        config,
        norm="layer",
        qkv_bias=bias,
        output_bias=bias,
        head_bias=bool(config.get("lm_head_bias")),
        **_phimoe_rope(config),
        **read_windows(config, [config.get("sliding_window") is not None] * layers, None),
        **_in_layers(experts, [True] * layers),
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
    width = required(config, "moe_intermediate_size")
    experts = _experts(
        config,
        width,
        scoring="sigmoid",
        normalize=optional(config, "norm_topk_prob", True),
        normalize_eps=1e-20,
        scale=float(optional(config, "routed_scaling_factor", 1.0)),
        correction=True,
        float_router=True,
        shared_width=width * optional(config, "n_shared_experts", 1),
        **_groups(config),
    )
    head_dim = config["head_dim"] if config.get("head_dim") is not None else hidden // heads
    rope = read_rope(config, head_dim, theta=optional(config, "rope_theta", 10000.0), fraction=partial(config, 0.5))
    return llama_like(
        config,
        qk_norm=bool(config.get("use_qk_norm")),
        qkv_bias=bool(config.get("attention_bias")),
        skipped_layers=optional(config, "num_nextn_predict_layers", 1),
        **rope,
        **_in_layers(experts, [i >= first for i in range(layers)]),
    )


def gpt_oss(config: Config) -> Arch:
    """Windows by turns from the first layer on, where the file does not name them; its rotation is extended unless the
    file says otherwise."""
    bias, layers = bool(config.get("attention_bias", True)), required(config, "num_hidden_layers")
    experts = _experts(
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
        **_in_layers(experts, [True] * layers),
    )


def _experts(config: Config, width: int, **fields: Any) -> Experts | None:
    """None where the file says that there are none."""
    name = given(config, *COUNTS)
    count, chosen = required(config, *COUNTS), required(config, "num_experts_per_tok")
    if not count:
        return None
    if chosen > count:
        raise CheckpointError(f"config.json: num_experts_per_tok={chosen} must be at most {name}={count}")
    return Experts(count, chosen, width, **fields)


def _groups(config: Config) -> dict[str, int]:
    """The groups that experts are chosen from, checked by the names of the file."""
    name = given(config, *COUNTS)
    count, chosen = required(config, *COUNTS), required(config, "num_experts_per_tok")
    groups, best = optional(config, "n_group", 1), optional(config, "topk_group", 1)
    if groups == 1 and best == 1:
        return {}
    size = count // groups
    if count % groups or best > groups or size < 2 or chosen > best * size:
        raise CheckpointError(
            f"config.json: {name}={count} experts in n_group={groups} groups, of which topk_group={best} are chosen "
            f"from: groups must be alike, hold at least 2 experts each and together num_experts_per_tok={chosen}"
        )
    return {"groups": groups, "top_groups": best}


def _qwen_layers(config: Config) -> list[bool]:
    """Every ``decoder_sparse_step``-th layer has experts, those of ``mlp_only_layers`` never."""
    dense, step = set(optional(config, "mlp_only_layers", ())), optional(config, "decoder_sparse_step", 1)
    return [layer not in dense and (layer + 1) % step == 0 for layer in range(required(config, "num_hidden_layers"))]


def _in_layers(experts: Experts | None, sparse: Sequence[bool]) -> dict[str, Any]:
    """The experts, and the layers that have them."""
    if experts is None or not any(sparse):
        return {}
    return {"experts": experts, "sparse_layers": () if all(sparse) else tuple(sparse)}
