"""What the keys of a config.json may hold. Checked before any of them is used, so that a wrong file is refused by the
key that is wrong."""

from __future__ import annotations

import math
import reprlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from flexbatch.validation.errors import CheckpointError

MAX_LAYERS = 4096
MAX_WIDTH = 2**20
MAX_INNER = 2**24
MAX_VOCABULARY = 2**24
MAX_EXPERTS = 2**14
MAX_TOKENS = 2**31 - 1
"""Positions are 32-bit integers in the kernels."""


@dataclass(frozen=True)
class Rule:
    """wanted: completes "must be". holds: whether a value that is not null is right."""

    wanted: str
    holds: Callable[[Any], bool]


def is_number(value: Any) -> bool:
    """JSON knows integers of any length, which no float holds, and Python's reader NaN and infinities."""
    return type(value) is int or (isinstance(value, float) and math.isfinite(value))


def whole(least: int, most: int) -> Rule:
    return Rule(
        f"a whole number from {least:,} to {most:,}", lambda value: type(value) is int and least <= value <= most
    )


def above(least: float, most: float = 1e30, *, included: bool = False) -> Rule:
    def holds(value: Any) -> bool:
        return is_number(value) and (value > least or (included and value == least)) and value <= most

    return Rule(f"a number {'from' if included else 'above'} {least:g}{'' if most == 1e30 else f' to {most:g}'}", holds)


def or_list(rule: Rule) -> Rule:
    """One for all layers, or one for each: for the families whose readers compare the numbers of a list."""

    def holds(value: Any) -> bool:
        return all(map(rule.holds, value)) and bool(value) if isinstance(value, list | tuple) else rule.holds(value)

    return Rule(f"{rule.wanted}, or a list of them", holds)


FLAG = Rule("true or false", lambda value: isinstance(value, bool))
TEXT = Rule("a string", lambda value: isinstance(value, str))
OBJECT = Rule("an object", lambda value: isinstance(value, dict))
NAMES = Rule(
    "a list of strings", lambda value: isinstance(value, list | tuple) and all(isinstance(item, str) for item in value)
)
FACTORS = Rule(
    "a list of numbers above 0",
    lambda value: (
        isinstance(value, list | tuple) and bool(value) and all(is_number(item) and 0 < item <= 1e30 for item in value)
    ),
)
TOKEN = Rule("a token id", lambda value: type(value) is int and -MAX_TOKENS <= value <= MAX_TOKENS)
TOKENS = Rule(
    "a token id or a list of them",
    lambda value: TOKEN.holds(value) or (isinstance(value, list | tuple) and all(TOKEN.holds(item) for item in value)),
)
LAYER_LIST = Rule(
    "a list of layers",
    lambda value: isinstance(value, list | tuple) and all(type(item) is int and item >= 0 for item in value),
)
LAYERS, HEADS, WIDTH, INNER = whole(1, MAX_LAYERS), whole(1, 2**14), whole(1, MAX_WIDTH), whole(1, MAX_INNER)
CONTEXT, WINDOW = whole(1, MAX_TOKENS), whole(0, MAX_TOKENS)
EPSILON = above(0, 1, included=True)
SHARE = above(0, 1)
POSITIVE, NOT_NEGATIVE = above(0), above(0, included=True)
# Below 1 angles grow along the head, until their cosines overflow.
BASE = above(1, 1e15, included=True)

QUANTIZERS = {"quantize_config.json": "gptq", "quant_config.json": "awq"}
"""Files in which AutoGPTQ and AutoAWQ told how they had quantized, before config.json did."""
KEYS: dict[str, Rule] = {
    "model_type": TEXT,
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), whole(0, MAX_EXPERTS)),
    **dict.fromkeys(
        ("num_experts_per_tok", "n_group", "topk_group", "moe_k", "moe_topk", "moe_top_k"), whole(1, MAX_EXPERTS)
    ),
    "moe_intermediate_size": INNER,
    **dict.fromkeys(("shared_expert_intermediate_size", "intermediate_size_mlp", "ffn_hidden_size"), INNER),
    "shared_intermediate_size": whole(0, MAX_INNER),
    **dict.fromkeys(("n_shared_experts", "moe_num_shared_experts", "num_shared_expert"), whole(0, 256)),
    **dict.fromkeys(
        ("decoder_sparse_step", "moe_layer_interval", "interleave_moe_layer_step", "no_rope_layer_interval"),
        LAYERS,
    ),
    "moe_layer_start_index": whole(0, MAX_LAYERS),
    "moe_layer_end_index": whole(-1, MAX_LAYERS),
    "moe_norm_min": EPSILON,
    **dict.fromkeys(("mlp_only_layers", "moe_layers"), LAYER_LIST),
    "no_rope_layers": Rule(
        "a list of 0 and 1", lambda value: isinstance(value, list | tuple) and all(item in (0, 1) for item in value)
    ),
    **dict.fromkeys(("attention_chunk_size", "floor_scale", "max_seq_len"), CONTEXT),
    "attn_scale": NOT_NEGATIVE,
    **dict.fromkeys(("attn_config", "ffn_config"), OBJECT),
    **dict.fromkeys(("kv_lora_rank", "q_lora_rank", "qk_nope_head_dim", "v_head_dim"), WIDTH),
    "qk_rope_head_dim": Rule(
        f"an even whole number from 2 to {MAX_WIDTH:,}",
        lambda value: whole(2, MAX_WIDTH).holds(value) and not value % 2,
    ),
    "mlp_layer_types": NAMES,
    **dict.fromkeys(("first_k_dense_replace", "num_nextn_predict_layers"), whole(0, MAX_LAYERS)),
    **dict.fromkeys(("router_jitter_noise", "input_jitter_noise"), NOT_NEGATIVE),
    **dict.fromkeys(
        ("routed_scaling_factor", "clip_qkv", "embedding_multiplier", "attention_multiplier", "residual_multiplier"),
        POSITIVE,
    ),
    **dict.fromkeys(("logits_scaling", "swiglu_limit", "swiglu_alpha"), POSITIVE),
    **dict.fromkeys(("num_hidden_layers", "n_layer"), LAYERS),
    **dict.fromkeys(("num_attention_heads", "n_head", "num_key_value_heads", "num_kv_heads"), HEADS),
    **dict.fromkeys(("hidden_size", "n_embd", "n_embed", "word_embed_proj_dim", "head_dim", "rotary_dim"), WIDTH),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "n_inner"), INNER),
    "vocab_size": whole(1, MAX_VOCABULARY),
    **dict.fromkeys(
        ("max_position_embeddings", "n_positions", "seq_length", "original_max_position_embeddings"), CONTEXT
    ),
    "sliding_window": WINDOW,
    "max_window_layers": whole(0, MAX_TOKENS),
    "sliding_window_pattern": whole(1, MAX_TOKENS),
    "num_ln_in_parallel_attn": whole(1, 2),
    "layer_types": NAMES,
    **dict.fromkeys(("rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon", "norm_epsilon"), EPSILON),
    **dict.fromkeys(
        ("hidden_act", "hidden_activation", "activation_function", "activation", "dtype", "torch_dtype"), TEXT
    ),
    "eos_token_id": TOKENS,
    "bos_token_id": TOKEN,
    **dict.fromkeys(("attn_logit_softcapping", "final_logit_softcapping"), NOT_NEGATIVE),
    "query_pre_attn_scalar": POSITIVE,
    **dict.fromkeys(("rope_theta", "rope_local_base_freq", "rotary_emb_base"), BASE),
    **dict.fromkeys(("partial_rotary_factor", "rotary_pct"), SHARE),
    **dict.fromkeys(("rope_scaling", "rope_parameters", "text_config", "quantization_config"), OBJECT),
    **dict.fromkeys(
        (
            *(
                "tie_word_embeddings",
                "attention_bias",
                "mlp_bias",
                "use_sliding_window",
                "use_bidirectional_attention",
                "do_layer_norm_before",
            ),
            *(
                "enable_bias",
                "layer_norm_elementwise_affine",
                "_remove_final_layer_norm",
                "apply_residual_connection_post_layernorm",
            ),
            *(
                "new_decoder_architecture",
                "parallel_attn",
                "multi_query",
                "bias",
                "alibi",
                "add_cross_attention",
                "scale_attn_weights",
            ),
            *("norm_topk_prob", "use_qk_norm", "qkv_bias", "lm_head_bias", "attn_temperature_tuning"),
            "rope_interleave",
            *("scale_attn_by_inverse_layer_idx", "use_parallel_residual", "qk_layernorm", "use_bias", "use_qkv_bias"),
        ),
        FLAG,
    ),
}
"""Every key that a reader asks for, by the names of all families."""

ROPE_KEYS: dict[str, Rule] = {
    **dict.fromkeys(("rope_type", "type"), TEXT),
    "rope_theta": BASE,
    **dict.fromkeys(("factor", "low_freq_factor", "high_freq_factor", "beta_fast", "beta_slow"), POSITIVE),
    **dict.fromkeys(("attention_factor", "mscale", "mscale_all_dim"), NOT_NEGATIVE),
    "partial_rotary_factor": SHARE,
    # Written as 8192.0 by some tools; one token is no context, and its logarithm, by which "longrope" divides, is zero.
    "original_max_position_embeddings": Rule(
        f"a whole number from 2 to {MAX_TOKENS:,}",
        lambda value: is_number(value) and value == int(value) and 2 <= value <= MAX_TOKENS,
    ),
    **dict.fromkeys(("short_mscale", "long_mscale"), POSITIVE),
    "alpha": NOT_NEGATIVE,
    "truncate": FLAG,
    **dict.fromkeys(("short_factor", "long_factor"), FACTORS),
    **dict.fromkeys(("full_attention", "sliding_attention"), OBJECT),
}
"""Every key of a ``rope_scaling`` or ``rope_parameters`` entry."""


def check_keys(
    values: Mapping[str, Any], rules: Mapping[str, Rule], within: str = "", file: str = "config.json"
) -> None:
    """Raise CheckpointError for the first key whose value has the wrong type or an absurd size. Null stands for a key
    that is left out.

    within: the name of the entry that holds the keys, with a dot.
    """
    for name, rule in rules.items():
        value = values.get(name)
        if value is not None and not rule.holds(value):
            raise CheckpointError(f"{file}: {within}{name}={shown(value)} must be {rule.wanted}")


def shown(value: Any) -> str:
    """The value as a message can hold it."""
    return reprlib.repr(value)
