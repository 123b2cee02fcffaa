"""Writes models of transformers as GGUF files, as the converters of llama.cpp do: their names, their order of rows."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType, GGUFWriter
from torch import Tensor
from transformers import PreTrainedModel

ARCHITECTURES = {
    "mistral": "llama",
    "gemma3_text": "gemma3",
    "phi": "phi2",
    "gpt_neox": "gptneox",
    "gpt_bigcode": "starcoder",
    "mixtral": "llama",
    "qwen2_moe": "qwen2moe",
    "qwen3_moe": "qwen3moe",
    "gpt_oss": "gpt-oss",
}
"""``model_type`` -> ``general.architecture``, where they differ."""


def permuted(weights: Tensor, heads: int) -> Tensor:
    """LlamaModel.permute of convert_hf_to_gguf.py."""
    return (
        weights.reshape(heads, 2, weights.shape[0] // heads // 2, *weights.shape[1:])
        .swapaxes(1, 2)
        .reshape(weights.shape)
    )


def separated(weights: Tensor, kv_heads: int, group: int) -> Tensor:
    """Queries, keys and values in turn, of rows that hold them by key-value head."""
    heads = weights.reshape(kv_heads, group + 2, -1, *weights.shape[1:])
    parts = heads[:, :group], heads[:, group : group + 1], heads[:, group + 1 :]
    return torch.cat([part.reshape(-1, *weights.shape[1:]) for part in parts])


def converted(name: str, weights: Tensor, config: Any, architecture: str) -> Tensor:
    kv_heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    if architecture == "llama" and ("q_proj" in name or "k_proj" in name):
        return permuted(weights, config.num_attention_heads if "q_proj" in name else kv_heads)
    if architecture.startswith("gemma") and name.endswith("norm.weight"):
        return weights + 1
    if architecture in ("bloom", "gptneox") and "query_key_value" in name:
        return separated(weights, config.num_attention_heads, 1)
    if architecture == "falcon" and "query_key_value" in name:
        kv_heads = config.num_kv_heads if config.new_decoder_architecture else 1  # all published ones
        return separated(weights, kv_heads, config.num_attention_heads // kv_heads)
    if architecture == "gpt2" and name.endswith(".weight") and (".c_" in name):
        return weights.t()
    return weights


EXPERTS = re.compile(r"model\.layers\.(\d+)\.mlp\.experts\.(gate_up|down)_proj(_bias)?$")


def of_experts(name: str, weights: Tensor, architecture: str) -> list[tuple[str, Tensor]]:
    """The tensors of all experts, by their names in the file: gates apart from ups, every matrix [outputs, inputs]."""
    found = EXPERTS.fullmatch(name)
    if found is None:
        return []
    layer, what, bias = found.groups()
    if architecture == "gpt-oss" and not bias:
        weights = weights.transpose(1, 2)
    end = "bias" if bias else "weight"
    if what == "down":
        return [(f"blk.{layer}.ffn_down_exps.{end}", weights)]
    pairs = architecture == "gpt-oss"
    parts = (weights[:, 0::2], weights[:, 1::2]) if pairs else weights.chunk(2, dim=1)
    return [(f"blk.{layer}.ffn_{part}_exps.{end}", each) for part, each in zip(("gate", "up"), parts, strict=True)]


def metadata(writer: GGUFWriter, config: Any, architecture: str) -> None:
    heads = config.num_attention_heads

    def get(*names: str) -> Any:
        return next((value for name in names if (value := getattr(config, name, None)) is not None), None)

    writer.add_context_length(get("max_position_embeddings", "seq_length", "n_positions") or 2048)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(get("intermediate_size", "ffn_hidden_size", "n_inner") or 4 * config.hidden_size)
    writer.add_head_count(heads)
    kv_heads = get("num_key_value_heads", "num_kv_heads")
    if architecture == "falcon" and not config.new_decoder_architecture:
        kv_heads = 1
    if architecture == "starcoder":
        kv_heads = 1 if config.multi_query else heads
    if kv_heads is not None:
        writer.add_head_count_kv(kv_heads)
    epsilon = get("rms_norm_eps")
    if epsilon is not None:
        writer.add_layer_norm_rms_eps(epsilon)
    else:
        writer.add_layer_norm_eps(get("layer_norm_eps", "layer_norm_epsilon", "norm_epsilon"))
    if get("num_local_experts", "num_experts"):
        writer.add_expert_count(get("num_local_experts", "num_experts"))
        writer.add_expert_used_count(get("num_experts_per_tok"))
        for width, add in (
            (get("moe_intermediate_size"), writer.add_expert_feed_forward_length),
            (get("shared_expert_intermediate_size"), writer.add_expert_shared_feed_forward_length),
        ):
            if width:
                add(width)
        if architecture == "gpt-oss":
            writer.add_expert_feed_forward_length(config.intermediate_size)
            writer.add_sliding_window(config.sliding_window)
        if get("clip_qkv"):
            writer.add_clamp_kqv(config.clip_qkv)
    head_dim = get("head_dim")
    if head_dim:
        writer.add_key_length(head_dim)
        writer.add_value_length(head_dim)
    rotation = get("rope_parameters") or {}
    full = rotation.get("full_attention", rotation)
    if full:
        size = head_dim or config.hidden_size // heads
        writer.add_rope_dimension_count(int(size * full.get("partial_rotary_factor", 1.0)))
        writer.add_rope_freq_base(full["rope_theta"])
        if full["rope_type"] in ("linear", "yarn"):
            writer.add_rope_scaling_type(gguf.RopeScalingType(full["rope_type"]))
            writer.add_rope_scaling_factor(full["factor"])
        original = get("original_max_position_embeddings") or full.get("original_max_position_embeddings")
        if full["rope_type"] in ("yarn", "longrope"):
            writer.add_rope_scaling_orig_ctx_len(original)
    if architecture.startswith("gemma"):
        if get("sliding_window"):
            writer.add_sliding_window(config.sliding_window)
        if get("attn_logit_softcapping"):
            writer.add_attn_logit_softcapping(config.attn_logit_softcapping)
        if get("final_logit_softcapping"):
            writer.add_final_logit_softcapping(config.final_logit_softcapping)
        if get("query_pre_attn_scalar"):
            writer.add_attention_scale(config.query_pre_attn_scalar**-0.5)
    if architecture in ("phi3", "starcoder2") and get("sliding_window"):
        writer.add_sliding_window(config.sliding_window)
    if architecture == "gptneox":
        writer.add_parallel_residual(config.use_parallel_residual)


def factors_of(config: Any) -> dict[str, np.ndarray]:
    """The tensors that stand for Llama 3's formula and for Phi's factors."""
    rotation = getattr(config, "rope_parameters", None) or {}
    if rotation.get("rope_type") == "longrope":
        return {
            f"rope_factors_{kind}.weight": np.array(rotation[f"{kind}_factor"], np.float32)
            for kind in ("long", "short")
        }
    if rotation.get("rope_type") != "llama3":
        return {}
    dim = config.head_dim
    frequencies = 1.0 / rotation["rope_theta"] ** (np.arange(0, dim, 2) / dim)
    wavelengths = 2 * np.pi / frequencies
    original, factor = rotation["original_max_position_embeddings"], rotation["factor"]
    low, high = rotation["low_freq_factor"], rotation["high_freq_factor"]
    smooth = (original / wavelengths - low) / (high - low)
    factors = np.where(
        wavelengths < original / high,
        1,
        np.where(wavelengths > original / low, factor, 1 / ((1 - smooth) / factor + smooth)),
    )
    return {"rope_freqs.weight": factors.astype(np.float32)}


def add_tokenizer(writer: GGUFWriter, tokenizer: Any, size: int, chat_template: str | None = None) -> None:
    """Byte-level BPE, as the tests' tokenizers are."""
    vocabulary = {index: token for token, index in tokenizer.get_vocab().items()}
    special = set(tokenizer.all_special_ids)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list([vocabulary.get(index, f"[PAD{index}]") for index in range(size)])
    writer.add_token_types([3 if index in special else 1 for index in range(size)])
    merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    writer.add_token_merges([merge if isinstance(merge, str) else " ".join(merge) for merge in merges])
    for name in ("bos", "eos", "pad"):
        token = getattr(tokenizer, f"{name}_token_id")
        if token is not None:
            getattr(writer, f"add_{name}_token_id")(token)
    writer.add_add_bos_token(False)
    if chat_template:
        writer.add_chat_template(chat_template)


def write_gguf(
    model: PreTrainedModel,
    path: Path,
    *,
    kind_of: Callable[[str], str] = lambda name: "F32",
    tokenizer: Any = None,
    chat_template: str | None = None,
    split: int = 0,
    more: Callable[[GGUFWriter], None] = lambda writer: None,
) -> dict[str, Tensor]:
    """``kind_of``: GGUF name of a matrix -> type. ``split``: tensors of a part, 0 for one file. Returns the matrices
    that the file holds, in float32, by their names there and in the order of rows that transformers has.
    """
    config = model.config.get_text_config()
    architecture = ARCHITECTURES.get(config.model_type, config.model_type)
    number = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    table = gguf.get_tensor_name_map(number, config.num_hidden_layers)
    writer = GGUFWriter(path, architecture, split_max_tensors=split)
    metadata(writer, config, architecture)
    if tokenizer is not None:
        add_tokenizer(writer, tokenizer, config.vocab_size, chat_template)
    more(writer)
    state = model.state_dict()
    tied = bool(config.tie_word_embeddings)
    for name, weights in state.items():
        experts = of_experts(name, weights, architecture)
        for found, matrices in experts:
            kind = kind_of(found) if found.endswith(".weight") else "F32"
            add_matrix(writer, found, matrices, kind)
        if experts or (tied and name in ("lm_head.weight", "embed_out.weight")):
            continue
        name = f"{name}.weight" if name.endswith(".sinks") else name
        stem, _, suffix = name.rpartition(".")
        found = table.get_name(stem) or table.get_name(stem.removeprefix("transformer."))
        assert found is not None, name
        weights = weights[0] if found.endswith("ffn_gate_inp_shexp") else weights
        kind = kind_of(f"{found}.{suffix}") if weights.dim() > 1 and "ffn_gate_inp" not in found else "F32"
        add_matrix(writer, f"{found}.{suffix}", converted(name, weights, config, architecture), kind)
    for name, factors in factors_of(config).items():
        writer.add_tensor(name, factors)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return state


def add_matrix(writer: GGUFWriter, name: str, weights: Tensor, kind: str) -> None:
    values = weights.float().contiguous().numpy()
    qtype = GGMLQuantizationType[kind]
    data = gguf.quants.quantize(values, qtype)
    writer.add_tensor(name, data, raw_dtype=qtype)
