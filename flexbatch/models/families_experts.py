"""The rows of `families` whose layers have experts, and what their config.json may say of them."""

from __future__ import annotations

import re
from typing import Any

from flexbatch.models import readers_experts
from flexbatch.models.families_more_experts import MORE_EXPERT_FAMILIES
from flexbatch.models.family import Family, expert_keys, llama_family, special
from flexbatch.models.module_names import (
    ATTENTION,
    EXPERTS,
    GATED_MLP,
    NUMBERED_EXPERTS,
    QK_NORM,
    mappings,
    shared_mlp,
)
from flexbatch.validation.errors import CheckpointError

STACKED_EXPERTS = mappings(
    ("block_sparse_moe.router.layer", "router"),
    ("block_sparse_moe.input_linear", "experts.gate_up", "stacked"),
    ("block_sparse_moe.output_linear", "experts.down", "stacked"),
    ("shared_mlp.input_linear", "shared.gate_up"),
    ("shared_mlp.output_linear", "shared.down"),
)
BARE_EXPERTS = mappings(
    ("mlp.router", "router"),
    ("mlp.experts.gate_up_proj", "experts.gate_up.weight", "bare stacked turned pairs"),
    ("mlp.experts.gate_up_proj_bias", "expert_biases.gate_up", "bare pairs"),
    ("mlp.experts.down_proj", "experts.down.weight", "bare stacked turned"),
    ("mlp.experts.down_proj_bias", "expert_biases.down", "bare"),
)


QWEN_KEYS = ("moe_intermediate_size", "norm_topk_prob", "decoder_sparse_step", "mlp_only_layers")
MIXTRAL_DEFAULTS = special(
    2, 1, num_local_experts=8, num_experts_per_tok=2, num_key_value_heads=8, rms_norm_eps=1e-5, rope_theta=1e6
)
QWEN3_DEFAULTS = {
    "num_local_experts": 128,
    "num_experts_per_tok": 8,
    "moe_intermediate_size": 768,
    "num_key_value_heads": 4,
}
QWEN2_DEFAULTS = {
    "num_local_experts": 60,
    "num_experts_per_tok": 4,
    "moe_intermediate_size": 1408,
    "shared_expert_intermediate_size": 5632,
    "num_key_value_heads": 16,
}
GRANITE_DEFAULTS = special(2, 1, num_local_experts=8, num_experts_per_tok=2)
GLM4_DEFAULTS = {
    "n_routed_experts": 128,
    "num_experts_per_tok": 8,
    "moe_intermediate_size": 1408,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-5,
}

EXPERT_FAMILIES: dict[str, Family] = {
    "qwen3_moe": llama_family(
        readers_experts.qwen3_moe,
        QWEN3_DEFAULTS,
        ATTENTION + QK_NORM + GATED_MLP + EXPERTS,
        expert_keys=expert_keys(*QWEN_KEYS),
    ),
    "mixtral": llama_family(
        readers_experts.mixtral,
        MIXTRAL_DEFAULTS,
        ATTENTION + NUMBERED_EXPERTS,
        expert_keys=expert_keys("router_jitter_noise"),
    ),
    "olmoe": llama_family(
        readers_experts.olmoe,
        special(50279, None, num_local_experts=64, num_experts_per_tok=8, rms_norm_eps=1e-5),
        ATTENTION + QK_NORM + EXPERTS,
        expert_keys=expert_keys("norm_topk_prob"),
    ),
    "qwen2_moe": llama_family(
        readers_experts.qwen2_moe,
        QWEN2_DEFAULTS,
        ATTENTION
        + GATED_MLP
        + EXPERTS
        + shared_mlp("mlp.shared_expert")
        + mappings(("mlp.shared_expert_gate", "shared_gate")),
        expert_keys=expert_keys(*QWEN_KEYS, "shared_expert_intermediate_size"),
    ),
    **dict.fromkeys(
        ("granitemoe", "granitemoeshared"),
        llama_family(
            readers_experts.granitemoe,
            GRANITE_DEFAULTS,
            ATTENTION + STACKED_EXPERTS,
            expert_keys=expert_keys("shared_intermediate_size"),
        ),
    ),
    "phimoe": llama_family(
        readers_experts.phimoe,
        {**MIXTRAL_DEFAULTS, "num_local_experts": 16},
        ATTENTION + NUMBERED_EXPERTS,
        expert_keys=expert_keys("router_jitter_noise", "input_jitter_noise"),
    ),
    "glm4_moe": llama_family(
        readers_experts.glm4_moe,
        GLM4_DEFAULTS,
        ATTENTION
        + QK_NORM
        + GATED_MLP
        + EXPERTS
        + mappings(("mlp.gate.e_score_correction_bias", "router.correction", "bare"))
        + shared_mlp("mlp.shared_experts"),
        expert_keys=frozenset(
            (
                *("n_routed_experts", "num_local_experts", "num_experts_per_tok", "moe_intermediate_size"),
                *("n_shared_experts", "n_group", "topk_group", "first_k_dense_replace", "norm_topk_prob"),
                *("routed_scaling_factor", "num_nextn_predict_layers"),
            )
        ),
    ),
    "gpt_oss": llama_family(
        readers_experts.gpt_oss,
        special(None, None, num_local_experts=128, num_experts_per_tok=4, num_key_value_heads=8)
        | {"head_dim": 64, "rms_norm_eps": 1e-5},
        ATTENTION + BARE_EXPERTS + mappings(("self_attn.sinks", "sinks.{layer}", "bare")),
        expert_keys=expert_keys("experts_per_token"),
    ),
    **MORE_EXPERT_FAMILIES,
}

ABOUT_EXPERTS = re.compile(r"expert|moe|router|routed|topk|shared|n_group|group_|sparse|dense|mtp|nextn|mlp_only")
TRAINING_KEYS = frozenset(
    {
        "output_router_logits",
        "router_aux_loss_coef",
        "router_z_loss_coef",
        "aux_loss_alpha",
        "seq_aux",
        "num_mtp_layers",
    }
)
"""Keys that say nothing about what a model computes."""


def check_expert_keys(config: dict[str, Any], family: Family) -> None:
    """Raises CheckpointError for a key about experts that the family's reader does not know: what it asks for would not
    be computed."""
    for key, value in config.items() if family.expert_keys else ():
        if not ABOUT_EXPERTS.search(key) or key in family.expert_keys | TRAINING_KEYS or not value:
            continue
        raise CheckpointError(
            f"config.json: {key}={value!r} is not known of model_type {config.get('model_type')!r} and may change what "
            f"its experts compute; known: {', '.join(sorted(family.expert_keys))}"
        )
