"""The rows of `families` with experts that `readers_more_experts` reads."""

from __future__ import annotations

import re

from flexbatch.models import readers_more_experts as readers
from flexbatch.models.family import Family, expert_keys, llama_family, special
from flexbatch.models.module_names import (
    ATTENTION,
    EXPERTS,
    GATED_MLP,
    NUMBERED_EXPERTS,
    QK_NORM,
    SEPARATE_QKV,
    TWO_NORMS,
    mappings,
    shared_mlp,
)

ERNIE_DEFAULTS = special(
    2,
    1,
    moe_num_experts=64,
    moe_k=6,
    moe_intermediate_size=1536,
    num_key_value_heads=4,
    rms_norm_eps=1e-5,
    tie_word_embeddings=True,
)
HUNYUAN_DEFAULTS = special(2, 1, num_experts=1, moe_topk=1, rms_norm_eps=1e-5)
MINIMAX_DEFAULTS = special(
    200020, 200034, num_local_experts=256, num_experts_per_tok=8, num_key_value_heads=8, head_dim=128
)
DBRX_DEFAULTS = {"d_model": 2048, "n_heads": 16, "n_layers": 24, "max_seq_len": 2048}
LLAMA4_DEFAULTS = special(
    2,
    1,
    num_local_experts=16,
    num_experts_per_tok=1,
    intermediate_size_mlp=16384,
    num_key_value_heads=8,
    head_dim=128,
    rms_norm_eps=1e-5,
)
LLAMA4_ROWS = (
    SEPARATE_QKV
    + TWO_NORMS
    + mappings(
        ("self_attn.o_proj", "o"),
        ("feed_forward.gate_proj", "gate_up", "gate"),
        ("feed_forward.up_proj", "gate_up", "up"),
        ("feed_forward.down_proj", "down"),
        ("feed_forward.router", "router"),
        ("feed_forward.experts.gate_up_proj", "experts.gate_up.weight", "bare stacked turned"),
        ("feed_forward.experts.down_proj", "experts.down.weight", "bare stacked turned"),
    )
    + shared_mlp("feed_forward.shared_expert")
)
LLAMA4_KEYS = expert_keys(
    "intermediate_size_mlp", "moe_layers", "interleave_moe_layer_step", "router_jitter_noise", "for_llm_compressor"
)

MORE_EXPERT_FAMILIES: dict[str, Family] = {
    "ernie4_5_moe": llama_family(
        readers.ernie4_5_moe,
        ERNIE_DEFAULTS,
        ATTENTION
        + GATED_MLP
        + EXPERTS
        + shared_mlp("mlp.shared_experts")
        + mappings(("mlp.moe_statics.e_score_correction_bias", "router.correction", "bare row")),
        skip=re.compile(r"(^|\.)mtp_"),
        expert_keys=expert_keys(
            *("moe_num_experts", "moe_k", "moe_intermediate_size", "moe_num_shared_experts", "moe_norm_min"),
            *("moe_layer_start_index", "moe_layer_end_index", "moe_layer_interval", "moe_capacity", "moe_gate"),
            *("moe_use_aux_free", "num_nextn_predict_layers"),
        ),
    ),
    "hunyuan_v1_moe": llama_family(
        readers.hunyuan_v1_moe,
        HUNYUAN_DEFAULTS,
        ATTENTION
        + mappings(
            ("self_attn.query_layernorm", "q_norm"), ("self_attn.key_layernorm", "k_norm"), ("mlp.gate.wg", "router")
        )
        + EXPERTS[1:]
        + shared_mlp("mlp.shared_mlp"),
        expert_keys=expert_keys(
            *("moe_topk", "moe_intermediate_size", "num_shared_expert", "use_mixed_mlp_moe", "norm_topk_prob"),
            *("moe_layer_num_skipped", "routed_scaling_factor", "group_limited_greedy", "moe_drop_tokens"),
            *("moe_random_routing_dropped_token", "dense_list"),
        ),
        listed_keys=readers.HUNYUAN_LISTED,
    ),
    "minimax_m2": llama_family(
        readers.minimax_m2,
        MINIMAX_DEFAULTS,
        ATTENTION
        + QK_NORM
        + NUMBERED_EXPERTS
        + mappings(("block_sparse_moe.e_score_correction_bias", "router.correction", "bare")),
        skip=re.compile(r"(^|\.)mtp"),
        expert_keys=expert_keys(
            *("scoring_func", "use_routing_bias", "shared_intermediate_size", "shared_moe_mode"),
            *("router_jitter_noise", "num_mtp_modules", "use_mtp", "mtp_transformer_layers"),
        ),
    ),
    "dbrx": Family(
        readers.dbrx,
        ("transformer.", ""),
        "blocks",
        mappings(
            ("norm_attn_norm.attn.Wqkv", "qkv"),
            ("norm_attn_norm.attn.out_proj", "o"),
            ("norm_attn_norm.norm_1", "attn_norm"),
            ("norm_attn_norm.norm_2", "mlp_norm"),
            ("ffn.router.layer", "router"),
            ("ffn.experts.mlp.w1", "experts.gate_up.weight", "gate bare flat"),
            ("ffn.experts.mlp.v1", "experts.gate_up.weight", "up bare flat"),
            ("ffn.experts.mlp.w2", "experts.down.weight", "expert bare flat turned"),
        ),
        mappings(("wte", "embed"), ("norm_f", "final_norm"), ("lm_head", "head")),
        DBRX_DEFAULTS,
        expert_keys=expert_keys("ffn_config"),
    ),
    "llama4_text": llama_family(readers.llama4, LLAMA4_DEFAULTS, LLAMA4_ROWS, expert_keys=LLAMA4_KEYS),
    "llama4": llama_family(
        readers.llama4,
        LLAMA4_DEFAULTS,
        LLAMA4_ROWS,
        prefixes=("model.language_model.", "language_model.model.", "language_model.", "model.", ""),
        skip=re.compile(r"^(model\.)?(vision_model|multi_modal_projector)\."),
        expert_keys=LLAMA4_KEYS,
    ),
}
