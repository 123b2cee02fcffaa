"""Names of modules in checkpoints and the canonical roles that they fill: mappings that several families share."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

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
    "transposed". Words that may stand together: "bare" (the module's name is the tensor's own, without a suffix),
    "stacked" (all experts in one tensor, expert first; with "gate" or "up" these alone), "flat" (all experts, in two
    dimensions), "turned" (inputs by outputs, of every expert), "pairs" (gates and ups by turns), "row" (stored [1, n]),
    "vector" (stored [n], of [1, n]), "left" and "right" (halves of the columns), "heads"
    (of latent attention, for each head the rows of ``k_up`` and those of ``v_up``, as many as ``heads`` says). expert:
    which of the experts of a fused tensor it fills. A module's name with ``{expert}`` and a role with ``experts.``
    stand for those of every expert, a role with ``{layer}`` for a tensor of a layer that is kept in the embedding
    stage."""

    module: str
    role: str
    part: str = ""
    expert: int = field(default=0, kw_only=True)
    heads: tuple[int, int] = field(default=(0, 0), kw_only=True)

    @property
    def suffixes(self) -> tuple[str, ...]:
        """Of the names of its tensors."""
        return ("",) if self.says("bare") else (".weight", ".bias")

    def says(self, *words: str) -> bool:
        """Whether the part names any of the words."""
        return not set(words).isdisjoint(self.part.split())

    @property
    def is_shared(self) -> bool:
        """Whether its tensor fills several roles, or several places of one."""
        return self.says("stacked", "flat", "heads")

    def of_layer(self, layer: int) -> tuple[int, ModuleMapping]:
        """The stage and the row of this one's tensor in a layer."""
        if "{layer}" in self.role:
            return -1, replace(self, role=self.role.format(layer=layer))
        return layer, self

    @property
    def target(self) -> tuple[str, int]:
        """Which rows of the role's tensor it fills."""
        return self.part, self.expert

    def of_experts(self, units: Sequence[tuple[int, int]]) -> tuple[ModuleMapping, ...]:
        """This row for each expert, or for a stacked tensor that of each of the ``units`` (first expert, number) in
        which experts are placed; itself where it has nothing to do with experts."""
        if not self.role.startswith("experts."):
            return (self,)
        if self.says("stacked"):
            return tuple(replace(self, role=self.role.replace(".", f".{first}.", 1)) for first, _ in units)
        return tuple(
            replace(
                self,
                module=self.module.replace("{expert}", str(first + index)),
                role=self.role.replace(".", f".{first}.", 1),
                expert=index,
            )
            for first, count in units
            for index in range(count)
        )


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
ATTENTION = SEPARATE_QKV + OUTPUT + TWO_NORMS
EXPERTS = mappings(
    ("mlp.gate", "router"),
    ("mlp.experts.{expert}.gate_proj", "experts.gate_up", "gate"),
    ("mlp.experts.{expert}.up_proj", "experts.gate_up", "up"),
    ("mlp.experts.{expert}.down_proj", "experts.down", "expert"),
)
NUMBERED_EXPERTS = mappings(
    ("block_sparse_moe.gate", "router"),
    ("block_sparse_moe.experts.{expert}.w1", "experts.gate_up", "gate"),
    ("block_sparse_moe.experts.{expert}.w3", "experts.gate_up", "up"),
    ("block_sparse_moe.experts.{expert}.w2", "experts.down", "expert"),
)


def shared_mlp(module: str) -> tuple[ModuleMapping, ...]:
    """The MLP that every token goes through."""
    return mappings(
        (f"{module}.gate_proj", "shared.gate_up", "gate"),
        (f"{module}.up_proj", "shared.gate_up", "up"),
        (f"{module}.down_proj", "shared.down"),
    )
