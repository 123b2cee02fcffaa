"""The metadata of a GGUF file -> a config as Hugging Face writes it, which the reader of the family then reads.

What the converters of llama.cpp leave out follows from the tensors: biases, tied embeddings, the size of the
vocabulary, the factors of rotary frequencies.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from flexbatch.models import families
from flexbatch.models.arch import Arch
from flexbatch.models.config_types import (
    BASE,
    CONTEXT,
    EPSILON,
    FACTORS,
    HEADS,
    INNER,
    LAYERS,
    NOT_NEGATIVE,
    POSITIVE,
    TEXT,
    WIDTH,
    WINDOW,
    Rule,
    check_keys,
)
from flexbatch.models.gguf.architectures import Config, GGUFFamily, Values, family_of
from flexbatch.models.gguf.blocks import FLOATS
from flexbatch.models.gguf.header import Header, Length
from flexbatch.models.source import read_tensors
from flexbatch.validation.errors import CheckpointError

RULES: dict[str, Rule] = {
    "block_count": LAYERS,
    "context_length": CONTEXT,
    "embedding_length": WIDTH,
    "feed_forward_length": INNER,
    "attention.head_count": HEADS,
    "attention.head_count_kv": HEADS,
    **dict.fromkeys(("attention.key_length", "attention.value_length", "rope.dimension_count"), WIDTH),
    **dict.fromkeys(("attention.layer_norm_rms_epsilon", "attention.layer_norm_epsilon"), EPSILON),
    **dict.fromkeys(("rope.freq_base", "rope.freq_base_swa"), BASE),
    "attention.sliding_window": WINDOW,
    **dict.fromkeys(("expert_count", "expert_used_count"), HEADS),
    **dict.fromkeys(("expert_feed_forward_length", "expert_shared_feed_forward_length"), INNER),
    "attention.clamp_kqv": NOT_NEGATIVE,
    "attention.scale": POSITIVE,
    **dict.fromkeys(("attn_logit_softcapping", "final_logit_softcapping"), NOT_NEGATIVE),
    "rope.scaling.type": TEXT,
    "rope.scaling.factor": POSITIVE,
    "rope.scaling.original_context_length": CONTEXT,
    "rope.scaling.attn_factor": NOT_NEGATIVE,
}
"""What is read below the architecture's name."""
SIZES = {
    "block_count": "num_hidden_layers",
    "embedding_length": "hidden_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
    "feed_forward_length": "intermediate_size",
    "expert_count": "num_local_experts",
    "expert_used_count": "num_experts_per_tok",
    "expert_feed_forward_length": "moe_intermediate_size",
}
NOT_AT_TURNS = ("gpt-oss",)
"""Architectures whose answers have several turns: what they think, and what they say."""
NEEDED = ("block_count", "embedding_length", "attention.head_count", "context_length")


def read_arch(header: Header) -> Arch:
    """Raises CheckpointError that names the file and the key."""
    family = family_of(header)
    try:
        arch = families.read_arch(read_config(header))
    except CheckpointError as error:
        said = (
            str(error)
            .removeprefix(f"{header.path}: ")
            .replace("config.json", "its metadata, in the words of config.json")
        )
        raise CheckpointError(f"{header.path}: {said}") from error
    tensors = header.tensors

    def biased(*names: str) -> bool:
        return any(f"blk.0.{name}.bias" in tensors for name in names)

    return replace(
        arch,
        qkv_bias=biased("attn_q", "attn_qkv"),
        output_bias=biased("attn_output"),
        mlp_bias=biased("ffn_down"),
        head_bias="output.bias" in tensors,
        dtype=_dtype(header, family),
    )


def _dtype(header: Header, family: GGUFFamily) -> str:
    """The 16-bit type of the weights; that of the scales, where all are in blocks."""
    kinds = {tensor.dtype for tensor in header.tensors.values() if len(tensor.shape) > 1}
    named = {"BF16": "bfloat16", "F16": "float16"}
    if not kinds - {"F32"}:
        return "float32"
    return next((name for kind, name in named.items() if kind in kinds and kinds <= FLOATS.keys()), family.compute)


def read_config(header: Header) -> Config:
    """The config of the family that the file's architecture belongs to."""
    family, prefix = family_of(header), f"{header.architecture}."
    values = {key: _same_everywhere(header, key) for key in RULES}
    check_keys(values, RULES, prefix, str(header.path))
    for key in NEEDED:
        if values[key] is None:
            raise CheckpointError(f"{header.path} lacks {prefix}{key}")
    names = {**SIZES, **family.names}
    config: Config = {name: values[key] for key, name in names.items() if values[key] is not None}
    epsilon = values["attention.layer_norm_rms_epsilon"] or values["attention.layer_norm_epsilon"]
    if epsilon is None:
        raise CheckpointError(f"{header.path} lacks {prefix}attention.layer_norm_rms_epsilon")
    config |= {"model_type": family.model_type, family.context: values["context_length"], family.epsilon: epsilon}
    last = f"blk.{values['block_count'] - 1}."
    if not any(name.startswith(last) for name in header.tensors):
        raise CheckpointError(f"{header.path}: {prefix}block_count={values['block_count']}, but no tensor is {last}*")
    heads = config["num_attention_heads"]
    config = {"head_dim": config["hidden_size"] // heads or 1, "num_key_value_heads": heads, **config}
    config |= _tokens(header) | _rotation(header, family, values, config)
    if values["attention.value_length"] not in (None, values["attention.key_length"]):
        raise CheckpointError(
            f"{header.path}: {prefix}attention.value_length={values['attention.value_length']} and key_length="
            f"{values['attention.key_length']} differ; heads of keys and values have one size here"
        )
    return config | family.more(header, values, config)


def _same_everywhere(header: Header, key: str) -> Any:
    """A value, or that of all layers where the file lists them and they are alike."""
    value = header.of_model(key)
    if not isinstance(value, tuple):
        return value
    if len(set(value)) != 1:
        raise CheckpointError(
            f"{header.path}: {header.architecture}.{key} differs between layers, which is not supported"
        )
    return value[0]


def _tokens(header: Header) -> Config:
    table = header.tensors.get("token_embd.weight")
    if table is None or len(table.shape) != 2:
        raise CheckpointError(f"{header.path} lacks the tensor token_embd.weight [tokens, hidden size]")

    def token(name: str) -> int | None:
        """An id beyond the vocabulary is none."""
        value = header.metadata.get(f"tokenizer.ggml.{name}_token_id")
        return value if type(value) is int and 0 <= value < table.shape[0] else None

    # The end of a turn stands beside the end of a text in files of chat models, since the middle of 2024.
    stops = [token(name) for name in ("eos", "eot", "eom")]
    if stops[1] is None and header.architecture not in NOT_AT_TURNS:
        stops += _turn_ends(header)
    return {
        "vocab_size": table.shape[0],
        "eos_token_id": list(dict.fromkeys(stop for stop in stops if stop is not None)),
        "bos_token_id": token("bos"),
        "tie_word_embeddings": "output.weight" not in header.tensors,
    }


def _turn_ends(header: Header) -> list[int]:
    """What the chat template of the file writes behind an answer, of the texts that are known to end a turn."""
    template, tokens = header.metadata.get("tokenizer.chat_template"), header.metadata.get("tokenizer.ggml.tokens")
    if not isinstance(template, str) or not isinstance(tokens, Length):
        return []
    rows = header.tensors["token_embd.weight"].shape[0]
    return [token for text, token in tokens.turn_ends.items() if text in template and token < rows]


def _rotation(header: Header, family: GGUFFamily, values: Values, config: Config) -> Config:
    """One entry of the rotation, in the form that every reader takes."""
    if values["rope.dimension_count"] is None and values["rope.freq_base"] is None:
        return {}
    head_dim = config["head_dim"]
    rotated = values["rope.dimension_count"] or head_dim
    if rotated > head_dim or (rotated != head_dim and not family.partial):
        raise CheckpointError(
            f"{header.path}: {header.architecture}.rope.dimension_count={rotated} with heads of {head_dim}: this "
            "family rotates whole heads"
        )
    entry: Config = {"rope_theta": values["rope.freq_base"] or 10000.0, **_scaling(header, values)}
    if family.partial:
        # Half a number more, so that rounding down gives the number again.
        entry["partial_rotary_factor"] = min(1.0, (rotated + 0.5) / head_dim)
    if family.model_type == "gemma3_text":
        return {"rope_theta": entry.pop("rope_theta"), **({"rope_scaling": entry} if "rope_type" in entry else {})}
    original = entry.get("original_max_position_embeddings")
    return {"rope_parameters": entry, **({} if original is None else {"original_max_position_embeddings": original})}


def _scaling(header: Header, values: Values) -> Config:
    context = values["context_length"]
    original = values["rope.scaling.original_context_length"] or context
    # The factors of each pair, which stand for Llama 3's formula, or for Phi's two sets of factors.
    short = header.tensors.get("rope_freqs.weight") or header.tensors.get("rope_factors_short.weight")
    if short is not None:
        factors = [value for _, tensor in read_tensors([short]) for value in tensor.float().flatten().tolist()]
        check_keys({short.name: factors}, {short.name: FACTORS}, "", str(header.path))
        own = 1.0 if short.name == "rope_freqs.weight" else values["rope.scaling.attn_factor"]
        entry = {"rope_type": "longrope", "short_factor": factors, "original_max_position_embeddings": original}
        return {**entry, **({} if own is None else {"attention_factor": own})}
    kind, factor = values["rope.scaling.type"] or "none", values["rope.scaling.factor"]
    if kind == "none" or (kind == "longrope" and original == context):
        return {}
    if kind not in ("linear", "yarn") or factor is None:
        raise CheckpointError(
            f"{header.path}: {header.architecture}.rope.scaling.type={kind!r} with factor {factor} is not supported; "
            "supported: linear and yarn with a factor, and factors in the tensor rope_freqs.weight"
        )
    entry = {"rope_type": kind, "factor": factor}
    return {**entry, "original_max_position_embeddings": original} if kind == "yarn" else entry
