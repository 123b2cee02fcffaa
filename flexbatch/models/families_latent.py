"""The rows of `families` with latent attention."""

from __future__ import annotations

from flexbatch.models import readers_latent as readers
from flexbatch.models.family import Family, expert_keys, llama_family, special
from flexbatch.models.module_names import EXPERTS, GATED_MLP, OUTPUT, TWO_NORMS, mappings, shared_mlp

LATENT_ROWS = (
    mappings(
        ("self_attn.q_proj", "q"),
        ("self_attn.q_a_proj", "q_a"),
        ("self_attn.q_a_layernorm", "q_a_norm"),
        ("self_attn.q_b_proj", "q_b"),
        ("self_attn.kv_a_proj_with_mqa", "kv_a"),
        ("self_attn.kv_a_layernorm", "kv_a_norm"),
        ("self_attn.kv_b_proj", "kv_b", "heads"),
        ("mlp.gate.e_score_correction_bias", "router.correction", "bare"),
    )
    + OUTPUT
    + TWO_NORMS
    + GATED_MLP
    + EXPERTS
    + shared_mlp("mlp.shared_experts")
)
KEYS = expert_keys(
    *("n_routed_experts", "moe_intermediate_size", "n_shared_experts", "n_group", "topk_group", "topk_method"),
    *("first_k_dense_replace", "moe_layer_freq", "norm_topk_prob", "routed_scaling_factor", "scoring_func"),
    *("num_nextn_predict_layers", "mlp_layer_types"),
)
V2_DEFAULTS = special(
    2, 1, n_routed_experts=64, moe_intermediate_size=1407, qk_nope_head_dim=128, v_head_dim=128, q_lora_rank=1536
)
V3_DEFAULTS = special(
    1,
    0,
    n_routed_experts=256,
    num_experts_per_tok=8,
    moe_intermediate_size=2048,
    qk_nope_head_dim=128,
    v_head_dim=128,
    q_lora_rank=1536,
)
LITE_DEFAULTS = special(
    1,
    0,
    n_routed_experts=64,
    num_experts_per_tok=4,
    moe_intermediate_size=1536,
    qk_nope_head_dim=192,
    v_head_dim=256,
    q_lora_rank=768,
    rms_norm_eps=1e-5,
)

LATENT_FAMILIES: dict[str, Family] = {
    "deepseek_v2": llama_family(readers.deepseek_v2, V2_DEFAULTS, LATENT_ROWS, expert_keys=KEYS),
    **dict.fromkeys(
        ("deepseek_v3", "kimi_k2"), llama_family(readers.deepseek_v3, V3_DEFAULTS, LATENT_ROWS, expert_keys=KEYS)
    ),
    "glm4_moe_lite": llama_family(readers.glm4_moe_lite, LITE_DEFAULTS, LATENT_ROWS, expert_keys=KEYS),
}
