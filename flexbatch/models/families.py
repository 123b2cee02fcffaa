"""The table of model families: Hugging Face ``model_type`` -> how its config is read and what its tensors are called.

A family is data: a reader that turns config.json into an `Arch`, and rows that map a module's name to a canonical
role. A new family is one entry here (docs/adding_a_family.md shows a real one); what it computes differently becomes
one flag of `Arch`.
"""

from __future__ import annotations

import re
from typing import Any

from flexbatch.models import readers, readers_layer_norm
from flexbatch.models.arch import Arch
from flexbatch.models.config_types import check_keys
from flexbatch.models.families_experts import EXPERT_FAMILIES, check_expert_keys
from flexbatch.models.families_latent import LATENT_FAMILIES
from flexbatch.models.family import Family, llama_family, special
from flexbatch.models.module_names import (
    FOUR_H_MLP,
    FUSED_GATED_MLP,
    GATED_MLP,
    GEMMA_NORMS,
    GLM4_NORMS,
    LLAMA_ROWS,
    OUTPUT,
    QK_NORM,
    SEPARATE_QKV,
    TWO_NORMS,
    ModuleMapping,
    mappings,
)
from flexbatch.validation.errors import CheckpointError

PHI3_DEFAULTS = special(32000, 1, original_max_position_embeddings=4096, rms_norm_eps=1e-5)
GLM_DEFAULTS = special([151329, 151336, 151338], None, head_dim=128, num_key_value_heads=2, rms_norm_eps=1.5625e-7)
GEMMA_DEFAULTS = special(1, 2, head_dim=256, tie_word_embeddings=True)
GEMMA3_DEFAULTS = {
    **GEMMA_DEFAULTS,
    "vocab_size": 262208,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 131072,
}

FAMILIES: dict[str, Family] = {
    "opt": Family(
        readers_layer_norm.opt,
        ("model.decoder.", "decoder.", ""),
        "layers",
        SEPARATE_QKV
        + mappings(
            ("self_attn.out_proj", "o"),
            ("fc1", "up"),
            ("fc2", "down"),
            ("self_attn_layer_norm", "attn_norm"),
            ("final_layer_norm", "mlp_norm"),
        ),
        mappings(
            ("embed_tokens", "embed"),
            ("embed_positions", "pos_embed"),
            ("project_in", "project_in"),
            ("project_out", "project_out"),
            ("final_layer_norm", "final_norm"),
            ("lm_head", "head"),
        ),
        special(2, 2, tie_word_embeddings=True),
    ),
    "llama": llama_family(readers.llama, special(2, 1)),
    "mistral": llama_family(readers.mistral, special(2, 1, num_key_value_heads=8)),
    "ministral": llama_family(readers.mistral, special(2, 1, num_key_value_heads=8)),
    "qwen2": llama_family(readers.qwen2, {"num_key_value_heads": 32}),
    "qwen3": llama_family(readers.qwen3, {"head_dim": 128, "num_key_value_heads": 32}, LLAMA_ROWS + QK_NORM),
    "phi3": llama_family(
        readers.phi3, PHI3_DEFAULTS, mappings(("self_attn.qkv_proj", "qkv")) + OUTPUT + FUSED_GATED_MLP + TWO_NORMS
    ),
    "glm": llama_family(readers.glm, GLM_DEFAULTS, SEPARATE_QKV + OUTPUT + FUSED_GATED_MLP + TWO_NORMS),
    "glm4": llama_family(readers.glm, GLM_DEFAULTS, SEPARATE_QKV + OUTPUT + FUSED_GATED_MLP + GLM4_NORMS),
    "gemma": llama_family(readers.gemma, {**GEMMA_DEFAULTS, "num_key_value_heads": 16}),
    "gemma2": llama_family(
        readers.gemma2, {**GEMMA_DEFAULTS, "num_key_value_heads": 4}, SEPARATE_QKV + OUTPUT + GATED_MLP + GEMMA_NORMS
    ),
    "gemma3_text": llama_family(
        readers.gemma3, GEMMA3_DEFAULTS, SEPARATE_QKV + OUTPUT + GATED_MLP + GEMMA_NORMS + QK_NORM
    ),
    "gemma3": llama_family(
        readers.gemma3,
        GEMMA3_DEFAULTS,
        SEPARATE_QKV + OUTPUT + GATED_MLP + GEMMA_NORMS + QK_NORM,
        prefixes=("model.language_model.", "language_model.model.", "language_model.", "model.", ""),
        skip=re.compile(r"^(model\.)?(vision_tower|multi_modal_projector)\."),
    ),
    "bloom": Family(
        readers_layer_norm.bloom,
        ("transformer.", ""),
        "h",
        mappings(("self_attention.query_key_value", "qkv", "grouped"), ("self_attention.dense", "o"))
        + FOUR_H_MLP
        + TWO_NORMS,
        mappings(
            ("word_embeddings", "embed"),
            ("word_embeddings_layernorm", "embed_norm"),
            ("ln_f", "final_norm"),
            ("lm_head", "head"),
        ),
        special(2, 1, tie_word_embeddings=True),
    ),
    "falcon": Family(
        readers_layer_norm.falcon,
        ("transformer.", ""),
        "h",
        mappings(
            ("self_attention.query_key_value", "qkv", "grouped"),
            ("self_attention.dense", "o"),
            ("ln_attn", "attn_norm"),
            ("ln_mlp", "mlp_norm"),
        )
        + FOUR_H_MLP
        + TWO_NORMS,
        mappings(("word_embeddings", "embed"), ("ln_f", "final_norm"), ("lm_head", "head")),
        special(11, 11, tie_word_embeddings=True, max_position_embeddings=2048),
    ),
    "gpt_bigcode": Family(
        readers_layer_norm.gpt_bigcode,
        ("transformer.", ""),
        "h",
        mappings(
            ("attn.c_attn", "qkv", "grouped"),
            ("attn.c_proj", "o"),
            ("mlp.c_fc", "up"),
            ("mlp.c_proj", "down"),
            ("ln_1", "attn_norm"),
            ("ln_2", "mlp_norm"),
        ),
        mappings(("wte", "embed"), ("wpe", "pos_embed"), ("ln_f", "final_norm"), ("lm_head", "head")),
        special(50256, 50256, tie_word_embeddings=True),
    ),
    "gpt_neox": Family(
        readers_layer_norm.gpt_neox,
        ("gpt_neox.", ""),
        "layers",
        mappings(("attention.query_key_value", "qkv", "grouped"), ("attention.dense", "o")) + FOUR_H_MLP + TWO_NORMS,
        mappings(("embed_in", "embed"), ("final_layer_norm", "final_norm"), ("embed_out", "head"), ("lm_head", "head")),
        special(2, 0),
    ),
    "codegen": Family(
        readers_layer_norm.gptj,
        ("transformer.", ""),
        "h",
        mappings(
            ("attn.qkv_proj", "qkv", "codegen"),
            ("attn.out_proj", "o"),
            ("mlp.fc_in", "up"),
            ("mlp.fc_out", "down"),
            ("ln_1", "attn_norm"),
        ),
        mappings(("wte", "embed"), ("ln_f", "final_norm"), ("lm_head", "head")),
        special(50256, 50256),
    ),
    "gptj": Family(
        readers_layer_norm.gptj,
        ("transformer.", ""),
        "h",
        mappings(("attn.q_proj", "qkv", "q"), ("attn.k_proj", "qkv", "k"), ("attn.v_proj", "qkv", "v"))
        + mappings(("attn.out_proj", "o"), ("mlp.fc_in", "up"), ("mlp.fc_out", "down"), ("ln_1", "attn_norm")),
        mappings(("wte", "embed"), ("ln_f", "final_norm"), ("lm_head", "head")),
        special(50256, 50256),
    ),
    "gpt2": Family(
        readers_layer_norm.gpt2,
        ("transformer.", ""),
        "h",
        mappings(
            ("attn.c_attn", "qkv", "transposed"),
            ("attn.c_proj", "o", "transposed"),
            ("mlp.c_fc", "up", "transposed"),
            ("mlp.c_proj", "down", "transposed"),
        )
        + mappings(("ln_1", "attn_norm"), ("ln_2", "mlp_norm")),
        mappings(("wte", "embed"), ("wpe", "pos_embed"), ("ln_f", "final_norm"), ("lm_head", "head")),
        special(50256, 50256, tie_word_embeddings=True),
    ),
    "phi": llama_family(
        readers_layer_norm.phi,
        special(2, 1),
        SEPARATE_QKV
        + mappings(("self_attn.dense", "o"), ("mlp.fc1", "up"), ("mlp.fc2", "down"), ("input_layernorm", "attn_norm")),
        outer_rows=mappings(("embed_tokens", "embed"), ("final_layernorm", "final_norm"), ("lm_head", "head")),
    ),
    "starcoder2": llama_family(
        readers_layer_norm.starcoder2,
        special(50256, 50256, tie_word_embeddings=True, num_key_value_heads=2),
        SEPARATE_QKV + OUTPUT + mappings(("mlp.c_fc", "up"), ("mlp.c_proj", "down")) + TWO_NORMS,
    ),
    "stablelm": llama_family(readers_layer_norm.stablelm, special(0, 0, num_key_value_heads=32)),
    **EXPERT_FAMILIES,
    **LATENT_FAMILIES,
}
REFUSED = {
    **dict.fromkeys(("qwen3_next", "qwen3_5_moe"), "its linear attention is not supported yet"),
}
"""What stands in the way of families that are asked for most."""


def family_of(config: dict[str, Any]) -> Family:
    """The row of a config. Code that a folder brings along (``auto_map``) is never run: its model must be in the
    table. Raises CheckpointError."""
    kind = config.get("model_type")
    if kind in REFUSED:
        raise CheckpointError(f"config.json: model_type {kind!r}: {REFUSED[kind]}")
    if not isinstance(kind, str) or kind not in FAMILIES:
        remote = " The folder brings its own code, which is never executed." if config.get("auto_map") else ""
        raise CheckpointError(
            f"config.json: model_type {kind!r} is unknown; known: {', '.join(sorted(FAMILIES))}.{remote}"
        )
    return FAMILIES[kind]


def read_arch(config: dict[str, Any]) -> Arch:
    """Arch of a Hugging Face config. Raises CheckpointError that names the key for what is missing or not supported.

    A model that also sees images keeps its text model's entries under ``text_config``; what stands beside it
    (special tokens) counts more.
    """
    family = family_of(config)
    check_keys(config, family.rules)
    text = config.get("text_config") or {}
    check_keys(text, family.rules, "text_config.")
    check_expert_keys({**text, **config}, family)
    beside = {key: value for key, value in config.items() if key not in text or value is not None}
    try:
        return family.read({**family.defaults, **text, **beside})
    except CheckpointError:
        raise
    except (ValueError, TypeError, KeyError, ArithmeticError) as error:
        raise CheckpointError(f"config.json of model_type {config.get('model_type')!r}: {error}") from error


def source_names(arch: Arch) -> dict[str, tuple[int, ModuleMapping, str]]:
    """Tensor name without prefix -> (layer, row, ``.weight``, ``.bias`` or nothing) for everything that the files of
    this model may hold."""
    family = FAMILIES[arch.family]
    stages = {row.role: _stage(row.role, arch.num_layers) for row in family.outer_rows}
    names = {
        f"{row.module}{suffix}": (stages[row.role], row, suffix) for row in family.outer_rows for suffix in row.suffixes
    }
    units = arch.experts.units if arch.experts else []
    rows = [each for row in family.block_rows for each in ((row,) if row.is_shared else row.of_experts(units))]
    for layer in range(arch.num_layers):
        for row in rows:
            for suffix in row.suffixes:
                names[f"{family.blocks}.{layer}.{row.module}{suffix}"] = (*row.of_layer(layer), suffix)
    return names


def _stage(role: str, num_layers: int) -> int:
    return -1 if role in ("embed", "pos_embed", "embed_norm", "project_in") else num_layers
