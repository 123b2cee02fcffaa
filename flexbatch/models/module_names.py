"""Names of modules in checkpoints and the canonical roles that they fill: mappings that several families share."""

from __future__ import annotations

import re
from dataclasses import dataclass

BUFFERS = re.compile(
    r"(^|\.)(rotary_emb\.inv_freq|(self_)?attn\.(bias|masked_bias|causal_mask)|"
    r"attention\.(bias|masked_bias|rotary_emb\.inv_freq))$"
)
"""Buffers that older versions of transformers stored with the weights: frequencies, causal masks. They are computed
here."""


@dataclass(frozen=True)
class ModuleMapping:
    """What a module of a checkpoint is here. module: its name without ``.weight``/``.bias``. role: canonical name
    likewise. part: which rows of a fused tensor it fills ("q", "k", "v", "gate", "up"), or how the source differs:
    "grouped" (per KV head its queries, key, value), "codegen" (per quarter of the heads queries, values, keys),
    "transposed"."""

    module: str
    role: str
    part: str = ""


def mappings(*rows: tuple[str, ...]) -> tuple[ModuleMapping, ...]:
    """One `ModuleMapping` for each (module, role) or (module, role, part)."""
    return tuple(ModuleMapping(*row) for row in rows)


SEPARATE_QKV = mappings(
    ("self_attn.q_proj", "qkv", "q"), ("self_attn.k_proj", "qkv", "k"), ("self_attn.v_proj", "qkv", "v")
)
GATED_MLP = mappings(("mlp.gate_proj", "gate_up", "gate"), ("mlp.up_proj", "gate_up", "up"), ("mlp.down_proj", "down"))
FUSED_GATED_MLP = mappings(("mlp.gate_up_proj", "gate_up"), ("mlp.down_proj", "down"))
OUTPUT = mappings(("self_attn.o_proj", "o"))
TWO_NORMS = mappings(("input_layernorm", "attn_norm"), ("post_attention_layernorm", "mlp_norm"))
QK_NORM = mappings(("self_attn.q_norm", "q_norm"), ("self_attn.k_norm", "k_norm"))
GEMMA_NORMS = mappings(
    ("input_layernorm", "attn_norm"),
    ("post_attention_layernorm", "post_attn_norm"),
    ("pre_feedforward_layernorm", "mlp_norm"),
    ("post_feedforward_layernorm", "post_mlp_norm"),
)
GLM4_NORMS = mappings(
    ("input_layernorm", "attn_norm"),
    ("post_self_attn_layernorm", "post_attn_norm"),
    ("post_attention_layernorm", "mlp_norm"),
    ("post_mlp_layernorm", "post_mlp_norm"),
)
FOUR_H_MLP = mappings(("mlp.dense_h_to_4h", "up"), ("mlp.dense_4h_to_h", "down"))
LLAMA_OUTER = mappings(("embed_tokens", "embed"), ("norm", "final_norm"), ("lm_head", "head"))
LLAMA_ROWS = SEPARATE_QKV + OUTPUT + GATED_MLP + TWO_NORMS
