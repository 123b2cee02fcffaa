"""The architectures of GGUF files that are read, as data: which family each is, and what its metadata says else."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from flexbatch.models.gguf.header import Header
from flexbatch.validation.errors import CheckpointError

Config = dict[str, Any]
Values = Mapping[str, Any]
"""Of the keys of `config.RULES`, None for those that the file leaves out."""


@dataclass(frozen=True)
class GGUFFamily:
    """How one architecture of GGUF files becomes a family of `families`. names: keys that the family calls otherwise
    than most. epsilon, context: its names of these. turned: the rows of queries and keys are in the order of neighbors
    that form a pair, and our halves do. partial: a part of every head may be rotated. more: what else the metadata
    says."""

    model_type: str
    names: Mapping[str, str] = field(default_factory=dict)
    epsilon: str = "rms_norm_eps"
    context: str = "max_position_embeddings"
    turned: bool = False
    partial: bool = False
    more: Callable[[Header, Values, Config], Config] = lambda header, values, config: {}
    compute: str = "float16"
    """The 16-bit type to compute with where the file has none."""
    gating: tuple[int, ...] = ()
    """Of a mixture of experts, how llama.cpp numbers the router's scoring that the family has."""


def _gemma2(header: Header, values: Values, config: Config) -> Config:
    return {
        "sliding_window": values["attention.sliding_window"],
        "attn_logit_softcapping": values["attn_logit_softcapping"] or 0.0,
        "final_logit_softcapping": values["final_logit_softcapping"] or 0.0,
        "query_pre_attn_scalar": _query_scalar(values, config, largest=46),
    }


def _gemma3(header: Header, values: Values, config: Config) -> Config:
    # One layer in so many sees everything, or a list says which do.
    pattern = header.of_model("attention.sliding_window_pattern")
    kinds = (
        [("full_attention", "sliding_attention")[bool(window)] for window in pattern or ()]
        if isinstance(pattern, tuple)
        else None
    )
    return {
        "sliding_window": values["attention.sliding_window"],
        "sliding_window_pattern": pattern if kinds is None else None,
        "layer_types": kinds,
        "final_logit_softcapping": values["final_logit_softcapping"],
        "query_pre_attn_scalar": _query_scalar(values, config, largest=62),
        "rope_local_base_freq": values["rope.freq_base_swa"] or 10000.0,
    }


def _query_scalar(values: Values, config: Config, largest: int) -> float:
    """The files leave it out; llama.cpp tells the largest model, which scales by the hidden size, by its layers."""
    if values["attention.scale"]:
        return float(values["attention.scale"]) ** -2
    widest = config["hidden_size"] / config["num_attention_heads"]
    return float(widest if config["num_hidden_layers"] == largest else config["head_dim"])


def _falcon(header: Header, values: Values, config: Config) -> Config:
    """Falcon 7B has one head of keys and values; later models groups of heads, and one norm or two."""
    kv_heads = config["num_key_value_heads"]
    norms = 2 if "blk.0.attn_norm_2.weight" in header.tensors else 1
    return {
        "num_kv_heads": kv_heads,
        "num_key_value_heads": None,
        "new_decoder_architecture": kv_heads > 1 or norms == 2,
        "num_ln_in_parallel_attn": norms,
    }


def _window(header: Header, values: Values, config: Config) -> Config:
    return {"sliding_window": values["attention.sliding_window"] or None}


def _stablelm(header: Header, values: Values, config: Config) -> Config:
    return {"use_parallel_residual": "blk.0.ffn_norm.weight" not in header.tensors}


def _gpt_neox(header: Header, values: Values, config: Config) -> Config:
    return {"use_parallel_residual": bool(header.of_model("use_parallel_residual"))}


def _starcoder(header: Header, values: Values, config: Config) -> Config:
    return {"multi_query": config["num_key_value_heads"] == 1}


def _qwen2_moe(header: Header, values: Values, config: Config) -> Config:
    return {"norm_topk_prob": False, "shared_expert_intermediate_size": values["expert_shared_feed_forward_length"]}


def _qwen3_moe(header: Header, values: Values, config: Config) -> Config:
    """The files leave out that the weights of the chosen add up to 1, and so do all published models."""
    return {"norm_topk_prob": True}


def _mixtral(header: Header, values: Values, config: Config) -> Config:
    return {"moe_intermediate_size": None, "sliding_window": None}


def _olmoe(header: Header, values: Values, config: Config) -> Config:
    return {"moe_intermediate_size": None, "norm_topk_prob": False, "clip_qkv": values["attention.clamp_kqv"]}


def _gpt_oss(header: Header, values: Values, config: Config) -> Config:
    """Its rotation is not rounded to whole pairs."""
    rope = config.get("rope_parameters") or {}
    if rope.get("rope_type") == "yarn":
        rope = {**rope, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False}
    width = values["expert_feed_forward_length"] or values["feed_forward_length"]
    return {
        "rope_parameters": rope,
        "sliding_window": values["attention.sliding_window"],
        "intermediate_size": width,
        "moe_intermediate_size": None,
    }


GPT = {"feed_forward_length": "n_inner"}
LLAMA = GGUFFamily("llama", turned=True)
FAMILIES: dict[str, GGUFFamily] = {
    "llama": LLAMA,
    "mistral": LLAMA,
    "qwen2": GGUFFamily("qwen2"),
    "qwen3": GGUFFamily("qwen3"),
    "gemma": GGUFFamily("gemma", compute="bfloat16"),
    "gemma2": GGUFFamily("gemma2", more=_gemma2, compute="bfloat16"),
    "gemma3": GGUFFamily("gemma3_text", more=_gemma3, compute="bfloat16"),
    "phi2": GGUFFamily("phi", epsilon="layer_norm_eps", partial=True),
    "phi3": GGUFFamily("phi3", more=_window, partial=True),
    "glm4": GGUFFamily("glm4", partial=True),
    "stablelm": GGUFFamily("stablelm", epsilon="layer_norm_eps", partial=True, more=_stablelm),
    "starcoder2": GGUFFamily("starcoder2", epsilon="norm_epsilon", more=_window),
    "starcoder": GGUFFamily("gpt_bigcode", GPT, "layer_norm_epsilon", "n_positions", more=_starcoder),
    "gpt2": GGUFFamily("gpt2", GPT, "layer_norm_epsilon", "n_positions"),
    "gptneox": GGUFFamily("gpt_neox", epsilon="layer_norm_eps", partial=True, more=_gpt_neox),
    "bloom": GGUFFamily("bloom", epsilon="layer_norm_epsilon", context="seq_length"),
    "falcon": GGUFFamily("falcon", {"feed_forward_length": "ffn_hidden_size"}, "layer_norm_epsilon", more=_falcon),
}
"""By ``general.architecture``. Mistral's files call themselves llama."""
SOFTMAX, SOFTMAX_OF_CHOSEN = 1, 3
EXPERT_FAMILIES: dict[str, GGUFFamily] = {
    "llama": GGUFFamily("mixtral", turned=True, more=_mixtral, gating=(SOFTMAX,)),
    "qwen2moe": GGUFFamily("qwen2_moe", more=_qwen2_moe, gating=(SOFTMAX,)),
    "qwen3moe": GGUFFamily("qwen3_moe", more=_qwen3_moe, gating=(SOFTMAX,)),
    "olmoe": GGUFFamily("olmoe", more=_olmoe, gating=(SOFTMAX,)),
    "gpt-oss": GGUFFamily("gpt_oss", more=_gpt_oss, compute="bfloat16", gating=(SOFTMAX_OF_CHOSEN,)),
}
"""Mixtures of experts likewise. Mixtral's files call themselves llama."""


def family_of(header: Header) -> GGUFFamily:
    """Raises CheckpointError for an architecture that is not in the tables, or whose router scores in another way."""
    name, sparse = header.architecture, any(".ffn_gate_inp." in tensor for tensor in header.tensors)
    table = EXPERT_FAMILIES if header.of_model("expert_count") or sparse else FAMILIES
    known = table.get(name)
    if known is None and name in {*FAMILIES, *EXPERT_FAMILIES}:
        raise CheckpointError(
            f"{header.path}: {name} {'with' if table is EXPERT_FAMILIES else 'without'} experts is not read from GGUF "
            f"files; with experts are {', '.join(sorted(EXPERT_FAMILIES))}; use the model's safetensors"
        )
    if known is None:
        raise CheckpointError(
            f"{header.path}: general.architecture {name!r} is unknown; known: "
            f"{', '.join(sorted({*FAMILIES, *EXPERT_FAMILIES}))}"
        )
    gating = header.of_model("expert_gating_func")
    if gating is not None and gating not in known.gating and table is EXPERT_FAMILIES:
        raise CheckpointError(
            f"{header.path}: {name}.expert_gating_func={gating!r} is not the scoring of this family's router, "
            f"{known.gating[0]} in llama.cpp's numbers"
        )
    return known
