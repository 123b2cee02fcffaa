"""What the families' config.json files have in common: key spellings, special tokens, sizes, rotary entries of both generations."""

from __future__ import annotations

from typing import Any

from flexbatch.models.arch import RopeScaling
from flexbatch.models.errors import CheckpointError

Config = dict[str, Any]

ACTIVATION_NAMES = {
    "relu": "relu",
    "gelu": "gelu",
    "gelu_python": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "silu": "silu",
    "swish": "silu",
}


def required(config: Config, *names: str) -> Any:
    """The first of several spellings that the file has."""
    for name in names:
        if config.get(name) is not None:
            return config[name]
    raise CheckpointError(f"config.json of model_type {config.get('model_type')!r} lacks {' or '.join(names)}")


def optional(config: Config, name: str, default: Any) -> Any:
    value = config.get(name)
    return default if value is None else value


def read_activation(config: Config, *names: str, default: str = "silu") -> str:
    name = next((config[n] for n in names if config.get(n)), default)
    if name not in ACTIVATION_NAMES:
        raise CheckpointError(f"config.json: activation {name!r} is unknown; known: {', '.join(sorted(ACTIVATION_NAMES))}")
    return ACTIVATION_NAMES[name]


def refuse(config: Config, name: str, reason: str) -> None:
    if config.get(name):
        raise CheckpointError(f"config.json: {name}={config[name]!r} is not supported: {reason}")


def read_tokens(config: Config) -> dict[str, Any]:
    """Special tokens (null in the file: none), storage dtype and tying."""
    stop = config.get("eos_token_id")
    dtype = config.get("dtype") or config.get("torch_dtype") or "float32"
    return {
        "family": config["model_type"],
        "eos_token_ids": tuple(stop) if isinstance(stop, list | tuple) else () if stop is None else (stop,),
        "bos_token_id": config.get("bos_token_id"),
        "dtype": str(dtype).removeprefix("torch."),
        "tie_word_embeddings": optional(config, "tie_word_embeddings", False),
    }


def read_sizes(config: Config) -> dict[str, Any]:
    """The key names that most families share."""
    heads = required(config, "num_attention_heads", "n_head")
    hidden = required(config, "hidden_size", "n_embd", "n_embed")
    return {
        "num_layers": required(config, "num_hidden_layers", "n_layer"),
        "hidden_size": hidden,
        "num_heads": heads,
        "num_kv_heads": optional(config, "num_key_value_heads", heads),
        "head_dim": optional(config, "head_dim", hidden // heads),
        "vocab_size": required(config, "vocab_size"),
    }


def _scaling(rope: Config, config: Config, positions: int) -> RopeScaling | None:
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind == "default":
        return None
    if kind not in ("linear", "dynamic", "llama3", "yarn", "longrope", "su"):
        raise CheckpointError(f"config.json: rope scaling {kind!r} is unknown; known: linear, dynamic, llama3, yarn, longrope")
    original = config.get("original_max_position_embeddings") or rope.get("original_max_position_embeddings") or positions
    if kind == "dynamic":
        original = positions  # transformers refers to the context of the file here, whatever else the entry says
    names = ("low_freq_factor", "high_freq_factor", "attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate")
    given: Config = {name: rope[name] for name in names if rope.get(name) is not None}
    short = tuple(rope.get("short_factor") or ())
    return RopeScaling("longrope" if kind == "su" else kind, rope.get("factor") or positions / original, original, short_factor=short, **given)


def read_rope(config: Config, head_dim: int, *, theta: float = 10000.0, fraction: float = 1.0, entry: Config | None = None) -> dict[str, Any]:
    """Rotary fields and the context length. Reads both ``rope_parameters`` (transformers 5) and ``rope_scaling`` with ``rope_theta`` (before).

    "linear" and "dynamic" leave max_position_embeddings at the trained context, so the usable one is the factor times longer; "yarn" may.
    """
    entry = entry if entry is not None else config.get("rope_parameters") or config.get("rope_scaling") or {}
    positions = required(config, "max_position_embeddings", "n_positions")
    scaling = _scaling(entry, config, positions)
    share = optional(entry, "partial_rotary_factor", optional(config, "partial_rotary_factor", fraction))
    context = positions
    if scaling is not None and scaling.kind in ("linear", "dynamic"):
        context = int(positions * scaling.factor)
    elif scaling is not None and scaling.kind == "yarn":
        context = max(positions, int(scaling.original_positions * scaling.factor))
    elif scaling is not None and scaling.kind == "longrope":
        # Past the trained context every cached key would have to be rotated again with the long factors.
        context = min(positions, scaling.original_positions)
    rope_theta = float(optional(entry, "rope_theta", optional(config, "rope_theta", theta)))
    return {"rope_theta": rope_theta, "rotary_dim": int(head_dim * share), "rope_scaling": scaling, "max_positions": context}
