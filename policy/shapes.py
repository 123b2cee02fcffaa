"""Public models: the one table of their sizes, for planning without a checkpoint and for random weights."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

from flexbatch.policy.expert_shape import ExpertShape
from flexbatch.policy.expert_shapes import EXPERT_SHAPES, GPT_OSS, OLMOE, attention_of
from flexbatch.policy.model_shape import ModelShape


def _opt(hidden: int, layers: int, heads: int, **changes: Any) -> dict[str, Any]:
    """Zhang et al. 2022, "OPT", table 1."""
    sizes = {
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "ffn_dim": 4 * hidden,
        "word_embed_proj_dim": hidden,
    }
    return {
        "model_type": "opt",
        "dtype": "float16",
        "vocab_size": 50272,
        "max_position_embeddings": 2048,
        "eos_token_id": 2,
        "bos_token_id": 2,
        **sizes,
        **changes,
    }


def _llama(hidden: int, inner: int, layers: int, heads: int, kv_heads: int, **changes: Any) -> dict[str, Any]:
    """Touvron et al. 2023, "Llama 2"; Grattafiori et al. 2024, "The Llama 3 herd of models", table 3."""
    sizes = {
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
    }
    llama2 = {
        "model_type": "llama",
        "dtype": "float16",
        "vocab_size": 32000,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "eos_token_id": 2,
        "bos_token_id": 1,
    }
    return {**llama2, **sizes, **changes}


def _falcon(hidden: int, layers: int, heads: int, **changes: Any) -> dict[str, Any]:
    """Almazrouei et al. 2023, "The Falcon series of open language models", table 16."""
    sizes = {"hidden_size": hidden, "num_hidden_layers": layers, "num_attention_heads": heads}
    return {
        "model_type": "falcon",
        "dtype": "bfloat16",
        "vocab_size": 65024,
        "max_position_embeddings": 2048,
        "eos_token_id": 11,
        "bos_token_id": 11,
        **sizes,
        **changes,
    }


LLAMA3 = {
    "dtype": "bfloat16",
    "vocab_size": 128256,
    "max_position_embeddings": 8192,
    "rope_theta": 500000.0,
    "eos_token_id": 128001,
    "bos_token_id": 128000,
}
LLAMA31_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
LLAMA32 = {
    **LLAMA3,
    "max_position_embeddings": 131072,
    "rope_scaling": {**LLAMA31_ROPE, "factor": 32.0},
    "tie_word_embeddings": True,
}
NEW_FALCON = {"new_decoder_architecture": True, "num_kv_heads": 8}
LLAMA31 = {**LLAMA3, "max_position_embeddings": 131072, "rope_scaling": LLAMA31_ROPE}
QWEN25 = {
    "model_type": "qwen2",
    "dtype": "bfloat16",
    "vocab_size": 152064,
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
    "eos_token_id": 151643,
    "bos_token_id": 151643,
}
"""Qwen Team 2024, "Qwen2.5 technical report", and the authors' config.json."""
QWEN3 = {**QWEN25, "model_type": "qwen3", "vocab_size": 151936, "max_position_embeddings": 40960, "head_dim": 128}
"""Qwen Team 2025, "Qwen3 technical report", table 1, and the authors' config.json."""
MISTRAL = {
    "model_type": "mistral",
    "dtype": "bfloat16",
    "max_position_embeddings": 32768,
    "sliding_window": 4096,
}
"""Jiang et al. 2023, "Mistral 7B", table 1, and the authors' config.json."""
MIXTRAL = {
    "model_type": "mixtral",
    "dtype": "bfloat16",
    "max_position_embeddings": 32768,
    "rope_theta": 1000000.0,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
}
"""Jiang et al. 2024, "Mixtral of experts", table 1, and the authors' config.json."""


def _qwen3_moe(hidden: int, inner: int, width: int, layers: int, heads: int, kv_heads: int) -> dict[str, Any]:
    """Qwen Team 2025, "Qwen3 technical report", table 2, and the authors' config.json."""
    experts = {
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "moe_intermediate_size": width,
        "norm_topk_prob": True,
    }
    changes = {**QWEN3, "model_type": "qwen3_moe", **experts}
    return _llama(hidden, inner, layers, heads, kv_heads, **changes)


SHAPES: dict[str, dict[str, Any]] = {
    "opt-125m": _opt(768, 12, 12),
    "opt-350m": _opt(1024, 24, 16, word_embed_proj_dim=512, do_layer_norm_before=False),
    "opt-1.3b": _opt(2048, 24, 32),
    "opt-2.7b": _opt(2560, 32, 32),
    "opt-6.7b": _opt(4096, 32, 32),
    "opt-13b": _opt(5120, 40, 40),
    "opt-30b": _opt(7168, 48, 56),
    "opt-66b": _opt(9216, 64, 72),
    "opt-175b": _opt(12288, 96, 96),
    "llama-2-7b": _llama(4096, 11008, 32, 32, 32),
    "llama-2-13b": _llama(5120, 13824, 40, 40, 40),
    "llama-2-70b": _llama(8192, 28672, 80, 64, 8),
    "llama-3-8b": _llama(4096, 14336, 32, 32, 8, **LLAMA3),
    "llama-3-70b": _llama(8192, 28672, 80, 64, 8, **LLAMA3),
    "llama-3.1-8b": _llama(4096, 14336, 32, 32, 8, **LLAMA31),
    "llama-3.1-70b": _llama(8192, 28672, 80, 64, 8, **LLAMA31),
    "llama-3.1-405b": _llama(16384, 53248, 126, 128, 8, **LLAMA31),
    "llama-3.2-1b": _llama(2048, 8192, 16, 32, 8, **LLAMA32, head_dim=64),
    "llama-3.2-3b": _llama(3072, 8192, 28, 24, 8, **LLAMA32, head_dim=128),
    "llama-3.3-70b": _llama(8192, 28672, 80, 64, 8, **LLAMA31),
    "qwen2.5-7b": _llama(3584, 18944, 28, 28, 4, **QWEN25),
    "qwen2.5-14b": _llama(5120, 13824, 48, 40, 8, **QWEN25),
    "qwen2.5-32b": _llama(5120, 27648, 64, 40, 8, **QWEN25),
    "qwen2.5-72b": _llama(8192, 29568, 80, 64, 8, **QWEN25),
    "qwen3-0.6b": _llama(1024, 3072, 28, 16, 8, **QWEN3, tie_word_embeddings=True),
    "qwen3-8b": _llama(4096, 12288, 36, 32, 8, **QWEN3),
    "qwen3-14b": _llama(5120, 17408, 40, 40, 8, **QWEN3),
    "qwen3-32b": _llama(5120, 25600, 64, 64, 8, **QWEN3),
    "mistral-7b": _llama(4096, 14336, 32, 32, 8, **MISTRAL),
    "falcon-7b": _falcon(4544, 32, 71),
    "falcon-40b": _falcon(8192, 60, 128, **NEW_FALCON),
    "falcon-180b": _falcon(14848, 80, 232, **NEW_FALCON),
    "starcoder": {
        "model_type": "gpt_bigcode",
        "dtype": "float16",
        "vocab_size": 49152,
        "n_embd": 6144,
        "n_inner": 24576,
        "n_layer": 40,
        "n_head": 48,
        "n_positions": 8192,
        "activation_function": "gelu",
        "eos_token_id": 0,
        "bos_token_id": 0,
    },
    "qwen3-30b-a3b": _qwen3_moe(2048, 6144, 768, 48, 32, 4),
    "qwen3-235b-a22b": _qwen3_moe(4096, 12288, 1536, 94, 64, 4),
    "mixtral-8x7b": _llama(4096, 14336, 32, 32, 8, **MIXTRAL),
    "mixtral-8x22b": _llama(
        6144, 16384, 56, 48, 8, **MIXTRAL | {"vocab_size": 32768, "max_position_embeddings": 65536}
    ),
    "olmoe-1b-7b": _llama(2048, 1024, 16, 16, 16, **OLMOE),
    "gpt-oss-20b": _llama(2880, 2880, 24, 64, 8, **GPT_OSS, num_local_experts=32),
    "gpt-oss-120b": _llama(2880, 2880, 36, 64, 8, **GPT_OSS, num_local_experts=128),
    **EXPERT_SHAPES,
}
"""By name: entries of config.json as the authors published them, the type of their weights among them: a GPU computes
in it."""


VARIANTS = re.compile(r"-(instruct|chat|base|hf|it)(?=-|$)|^meta-(?=llama)|-v0\.[12](?=-|$)")
"""What names of the same sizes have besides: meta-llama/Llama-3.1-70B-Instruct is a llama-3.1-70b."""


def find_shape(name: str) -> str | None:
    """The public shape that a name stands for; upper case, an organization before it and what an answer-tuned variant
    adds are ignored."""
    key = VARIANTS.sub("", name.lower().rsplit("/", 1)[-1])
    return key if key in SHAPES else None


def public_shape(name: str) -> ModelShape:
    """Sizes of a public model without a family's reader. Raises ValueError that lists the known names."""
    key = find_shape(name)
    if key is None:
        raise ValueError(f"no public shape {name!r}; known: {', '.join(SHAPES)}")
    config = SHAPES[key]
    kind = config["model_type"]
    layers, hidden, heads = (
        config[long if long in config else short]
        for long, short in (
            ("num_hidden_layers", "n_layer"),
            ("hidden_size", "n_embd"),
            ("num_attention_heads", "n_head"),
        )
    )
    common = {
        "name": key,
        "num_layers": layers,
        "hidden_size": hidden,
        "num_heads": heads,
        "vocab_size": config["vocab_size"],
    }
    if kind == "opt":
        # Its tables are tied, positions learned, with two more than the context.
        positions, inner = config["max_position_embeddings"] + 2, config["ffn_dim"]
        shape = ModelShape.from_sizes(**common, intermediate_size=inner, tied=True, positions=positions)
        width = config["word_embed_proj_dim"]
        if width == hidden:
            return shape
        # A narrower table, with a projection on either side.
        table, projection = config["vocab_size"] * width, width * hidden
        embedding = (*shape.embedding_tensors, projection)
        return dataclasses.replace(shape, head_tensors=(table, projection), embedding_tensors=embedding)
    if kind == "gpt_bigcode":
        sizes = {"intermediate_size": config["n_inner"], "positions": config["n_positions"]}
        return ModelShape.from_sizes(**common, **sizes, num_kv_heads=1, tied=True)
    if kind == "falcon":
        kv_heads = config.get("num_kv_heads", 1)
        return ModelShape.from_sizes(**common, intermediate_size=4 * hidden, num_kv_heads=kv_heads, tied=True)
    return _gated(config, common)


def _gated(config: dict[str, Any], common: dict[str, Any]) -> ModelShape:
    """Of a model with gated MLPs or experts."""
    count = config.get("num_experts") or config.get("num_local_experts") or config.get("n_routed_experts")
    width, inner = config.get("moe_intermediate_size", config["intermediate_size"]), config["intermediate_size"]
    hidden, shared = config["hidden_size"], width * config.get("n_shared_experts", 0)
    shape = ModelShape.from_sizes(
        **common,
        intermediate_size=inner,
        num_kv_heads=config["num_key_value_heads"],
        head_dim=config.get("head_dim"),
        mlp_matrices=3,
        experts=ExpertShape(count, config["num_experts_per_tok"], width, shared) if count else None,
        tied=config.get("tie_word_embeddings", False),
    )
    fields: dict[str, Any] = {}
    attention = shape.block_tensors[:2]
    if config.get("kv_lora_rank"):
        fields, attention = attention_of(config)
    dense = config.get("first_k_dense_replace", 0)
    return dataclasses.replace(
        shape,
        **fields,
        block_tensors=(*attention, *shape.block_tensors[2:]),
        dense_layers=dense,
        dense_tensors=(*attention, 2 * hidden * inner, inner * hidden) if dense else (),
    )
