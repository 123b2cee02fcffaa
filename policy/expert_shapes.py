"""Public models with experts: entries of config.json as the authors published them."""

from __future__ import annotations

from typing import Any

OLMOE = {
    "model_type": "olmoe",
    "dtype": "bfloat16",
    "vocab_size": 50304,
    "num_experts": 64,
    "num_experts_per_tok": 8,
    "norm_topk_prob": False,
    "clip_qkv": None,
    "eos_token_id": 50279,
    "bos_token_id": None,
}
"""Muennighoff et al. 2024, "OLMoE", and the authors' config.json."""
GPT_OSS = {
    "model_type": "gpt_oss",
    "dtype": "bfloat16",
    "vocab_size": 201088,
    "max_position_embeddings": 131072,
    "rope_theta": 150000.0,
    "rope_scaling": {
        "rope_type": "yarn",
        "factor": 32.0,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "truncate": False,
        "original_max_position_embeddings": 4096,
    },
    "head_dim": 64,
    "sliding_window": 128,
    "num_experts_per_tok": 4,
    "attention_bias": True,
    "eos_token_id": 200002,
    "bos_token_id": None,
    "quantization_config": {
        "quant_method": "mxfp4",
        "modules_to_not_convert": [
            "model.layers.*.self_attn",
            "model.layers.*.mlp.router",
            "model.embed_tokens",
            "lm_head",
        ],
    },
}
"""OpenAI 2025, "gpt-oss-120b & gpt-oss-20b model card", table 1, and the authors' config.json."""
GLM_4_5_AIR = {
    "model_type": "glm4_moe",
    "dtype": "bfloat16",
    "attention_bias": True,
    "eos_token_id": [151329, 151336, 151338],
    "first_k_dense_replace": 1,
    "head_dim": 128,
    "hidden_size": 4096,
    "intermediate_size": 10944,
    "max_position_embeddings": 131072,
    "moe_intermediate_size": 1408,
    "n_group": 1,
    "n_routed_experts": 128,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "num_attention_heads": 96,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 46,
    "num_key_value_heads": 8,
    "num_nextn_predict_layers": 1,
    "partial_rotary_factor": 0.5,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1000000.0,
    "routed_scaling_factor": 1.0,
    "topk_group": 1,
    "use_qk_norm": False,
    "vocab_size": 151552,
}
"""GLM-4.5 Team 2025, "GLM-4.5", table 1, and the authors' config.json."""
DEEPSEEK_YARN = {
    "type": "yarn",
    "factor": 40.0,
    "original_max_position_embeddings": 4096,
    "beta_fast": 32,
    "beta_slow": 1,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
}
DEEPSEEK_V3 = {
    "model_type": "deepseek_v3",
    "dtype": "bfloat16",
    "bos_token_id": 0,
    "eos_token_id": 1,
    "first_k_dense_replace": 3,
    "hidden_size": 7168,
    "intermediate_size": 18432,
    "kv_lora_rank": 512,
    "max_position_embeddings": 163840,
    "moe_intermediate_size": 2048,
    "moe_layer_freq": 1,
    "n_group": 8,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "num_attention_heads": 128,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 61,
    "num_key_value_heads": 128,
    "num_nextn_predict_layers": 1,
    "q_lora_rank": 1536,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "rms_norm_eps": 1e-6,
    "rope_scaling": DEEPSEEK_YARN,
    "rope_theta": 10000.0,
    "routed_scaling_factor": 2.5,
    "scoring_func": "sigmoid",
    "topk_group": 4,
    "topk_method": "noaux_tc",
    "v_head_dim": 128,
    "vocab_size": 129280,
}
"""DeepSeek-AI 2024, "DeepSeek-V3 technical report", section 4.2, and the authors' config.json."""
DEEPSEEK_V2_LITE = {
    "model_type": "deepseek_v2",
    "dtype": "bfloat16",
    "bos_token_id": 100000,
    "eos_token_id": 100001,
    "first_k_dense_replace": 1,
    "hidden_size": 2048,
    "intermediate_size": 10944,
    "kv_lora_rank": 512,
    "max_position_embeddings": 163840,
    "moe_intermediate_size": 1408,
    "moe_layer_freq": 1,
    "n_group": 1,
    "n_routed_experts": 64,
    "n_shared_experts": 2,
    "norm_topk_prob": False,
    "num_attention_heads": 16,
    "num_experts_per_tok": 6,
    "num_hidden_layers": 27,
    "num_key_value_heads": 16,
    "q_lora_rank": None,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "rms_norm_eps": 1e-6,
    "rope_scaling": {**DEEPSEEK_YARN, "mscale": 0.707, "mscale_all_dim": 0.707},
    "rope_theta": 10000.0,
    "routed_scaling_factor": 1.0,
    "scoring_func": "softmax",
    "topk_group": 1,
    "topk_method": "greedy",
    "v_head_dim": 128,
    "vocab_size": 102400,
}
"""DeepSeek-AI 2024, "DeepSeek-V2", appendix B, and the authors' config.json."""

EXPERT_SHAPES: dict[str, dict[str, Any]] = {
    "glm-4.5-air": GLM_4_5_AIR,
    "deepseek-v2-lite": DEEPSEEK_V2_LITE,
    "deepseek-v3": DEEPSEEK_V3,
}


def attention_of(config: dict[str, Any]) -> tuple[dict[str, int], tuple[int, ...]]:
    """Fields of a `ModelShape`, and elements of each tensor of a layer's attention, of latent attention."""
    heads, hidden, rank = config["num_attention_heads"], config["hidden_size"], config["kv_lora_rank"]
    nope, rope, value = (config[name] for name in ("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"))
    compressed, queries = config["q_lora_rank"], heads * (nope + rope)
    query = (compressed * hidden, queries * compressed) if compressed else (queries * hidden,)
    rest = ((rank + rope) * hidden, heads * nope * rank, heads * value * rank, heads * value * hidden)
    fields = {"num_kv_heads": 1, "head_dim": rank + rope, "cache_sides": 1, "head_width": nope + rope + value}
    return fields, (*query, *rest)
