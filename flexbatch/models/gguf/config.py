"""The metadata of a GGUF file -> a config as Hugging Face writes it, which the family's own reader then reads.

What the converters of llama.cpp leave out follows from the tensors: biases, tied embeddings, the size of the vocabulary,
the factors of rotary frequencies.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
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
from flexbatch.models.gguf.blocks import FLOATS
from flexbatch.models.gguf.header import Header
from flexbatch.models.source import read_tensors
from flexbatch.validation.errors import CheckpointError

Config = dict[str, Any]
Values = Mapping[str, Any]
"""Of the keys of `RULES`, None for those that the file leaves out."""

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
}
NEEDED = ("block_count", "embedding_length", "attention.head_count", "context_length")


@dataclass(frozen=True)
class Family:
    """How one architecture of GGUF files becomes a family of `families`. names: keys that the family calls otherwise than
    `SIZES`. epsilon, context: its names of these. turned: the rows of queries and keys are in the order of neighbors
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


GPT = {"feed_forward_length": "n_inner"}
LLAMA = Family("llama", turned=True)
FAMILIES: dict[str, Family] = {
    "llama": LLAMA,
    "mistral": LLAMA,
    "qwen2": Family("qwen2"),
    "qwen3": Family("qwen3"),
    "gemma": Family("gemma", compute="bfloat16"),
    "gemma2": Family("gemma2", more=_gemma2, compute="bfloat16"),
    "gemma3": Family("gemma3_text", more=_gemma3, compute="bfloat16"),
    "phi2": Family("phi", epsilon="layer_norm_eps", partial=True),
    "phi3": Family("phi3", more=_window, partial=True),
    "glm4": Family("glm4", partial=True),
    "stablelm": Family("stablelm", epsilon="layer_norm_eps", partial=True, more=_stablelm),
    "starcoder2": Family("starcoder2", epsilon="norm_epsilon", more=_window),
    "starcoder": Family("gpt_bigcode", GPT, "layer_norm_epsilon", "n_positions", more=_starcoder),
    "gpt2": Family("gpt2", GPT, "layer_norm_epsilon", "n_positions"),
    "gptneox": Family("gpt_neox", epsilon="layer_norm_eps", partial=True, more=_gpt_neox),
    "bloom": Family("bloom", epsilon="layer_norm_epsilon", context="seq_length"),
    "falcon": Family("falcon", {"feed_forward_length": "ffn_hidden_size"}, "layer_norm_epsilon", more=_falcon),
}
"""By ``general.architecture``. Mistral's files call themselves llama."""


def family_of(header: Header) -> Family:
    """Raises CheckpointError for an architecture that is not in the table, or a mixture of experts."""
    name, known = header.architecture, FAMILIES.get(header.architecture)
    if header.of_model("expert_count") or any(".ffn_gate_inp." in tensor for tensor in header.tensors):
        raise CheckpointError(f"{header.path}: {name} with experts: mixtures of experts are not supported")
    if known is None:
        raise CheckpointError(
            f"{header.path}: general.architecture {name!r} is unknown; known: {', '.join(sorted(FAMILIES))}"
        )
    return known


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


def _dtype(header: Header, family: Family) -> str:
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

    # The end of a turn stands beside the end of a text in files of chat models.
    stops = [token(name) for name in ("eos", "eot", "eom")]
    return {
        "vocab_size": table.shape[0],
        "eos_token_id": list(dict.fromkeys(stop for stop in stops if stop is not None)),
        "bos_token_id": token("bos"),
        "tie_word_embeddings": "output.weight" not in header.tensors,
    }


def _rotation(header: Header, family: Family, values: Values, config: Config) -> Config:
    """One entry of the rotation, in the form that every reader takes."""
    if values["rope.dimension_count"] is None and values["rope.freq_base"] is None:
        return {}
    head_dim = config["head_dim"]
    rotated = values["rope.dimension_count"] or head_dim
    if rotated > head_dim or (rotated != head_dim and not family.partial):
        raise CheckpointError(
            f"{header.path}: {header.architecture}.rope.dimension_count={rotated} with heads of {head_dim}: this family "
            "rotates whole heads"
        )
    entry: Config = {"rope_theta": values["rope.freq_base"] or 10000.0, **_scaling(header, values)}
    if family.partial:
        # Half a number more, so that rounding down gives the number again.
        entry["partial_rotary_factor"] = min(1.0, (rotated + 0.5) / head_dim)
    if family.model_type == "gemma3_text":
        return {"rope_theta": entry.pop("rope_theta"), **({"rope_scaling": entry} if "rope_type" in entry else {})}
    return {"rope_parameters": entry}


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
