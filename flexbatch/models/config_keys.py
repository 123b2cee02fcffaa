"""What the families' config.json files have in common: key spellings, special tokens, sizes, windows."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from flexbatch.validation.errors import CheckpointError

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
LAYER_TYPES = {"full_attention": False, "attention": False, "sliding_attention": True}
"""Whether a layer of this type has a window."""


def given(config: Config, *names: str) -> str | None:
    """The first of several spellings that the file has a value for."""
    return next((name for name in names if config.get(name) is not None), None)


def required(config: Config, *names: str) -> Any:
    """The value of the first of several spellings that the file has."""
    name = given(config, *names)
    if name is None:
        raise CheckpointError(f"config.json of model_type {config.get('model_type')!r} lacks {' or '.join(names)}")
    return config[name]


def optional(config: Config, name: str, default: Any) -> Any:
    value = config.get(name)
    return default if value is None else value


def read_activation(config: Config, key: str, *, default: str = "silu") -> str:
    name = config.get(key) or default
    if name not in ACTIVATION_NAMES:
        raise CheckpointError(
            f"config.json: {key}: activation {name!r} is unknown; known: {', '.join(sorted(ACTIVATION_NAMES))}"
        )
    return ACTIVATION_NAMES[name]


def refuse(config: Config, name: str, reason: str) -> None:
    if config.get(name):
        raise CheckpointError(f"config.json: {name}={config[name]!r} is not supported: {reason}")


def read_tokens(config: Config) -> dict[str, Any]:
    """Special tokens (null or negative in the file: none), storage dtype and tying."""
    stop, start = config.get("eos_token_id"), config.get("bos_token_id")
    stops = stop if isinstance(stop, list | tuple) else () if stop is None else (stop,)
    dtype = config.get("dtype") or config.get("torch_dtype") or "float32"
    return {
        "family": config["model_type"],
        "eos_token_ids": tuple(token for token in stops if token >= 0),
        "bos_token_id": None if start is None or start < 0 else start,
        "dtype": str(dtype).removeprefix("torch."),
        "tie_word_embeddings": optional(config, "tie_word_embeddings", False),
    }


def divided(config: Config, hidden: int, heads: int) -> int:
    """The size of a head where the file gives none."""
    if hidden % heads:
        names = given(config, "hidden_size", "n_embd", "n_embed"), given(config, "num_attention_heads", "n_head")
        raise CheckpointError(f"config.json: {names[0]}={hidden} must be a multiple of {names[1]}={heads}")
    return hidden // heads


def grouped(config: Config, heads: int, key: str) -> int:
    """Key-value heads, as many as query heads where the file gives none."""
    count: int = optional(config, key, heads)
    if heads % count:
        raise CheckpointError(
            f"config.json: {given(config, 'num_attention_heads', 'n_head')}={heads} must be a multiple of {key}={count}"
        )
    return count


def read_sizes(config: Config) -> dict[str, Any]:
    """The key names that most families share."""
    heads = required(config, "num_attention_heads", "n_head")
    hidden = required(config, "hidden_size", "n_embd", "n_embed")
    return {
        "num_layers": required(config, "num_hidden_layers", "n_layer"),
        "hidden_size": hidden,
        "num_heads": heads,
        "num_kv_heads": grouped(config, heads, "num_key_value_heads"),
        "head_dim": config["head_dim"] if config.get("head_dim") is not None else divided(config, hidden, heads),
        "vocab_size": required(config, "vocab_size"),
    }


def read_windows(config: Config, rule: Iterable[bool], default: int | None) -> dict[str, Any]:
    """The window, and which layers have it: by ``layer_types``, else by the family's ``rule``. A window of null is
    none.

    default: what a file without the key means.
    """
    layers, kinds = required(config, "num_hidden_layers"), config.get("layer_types")
    sliding = tuple(rule)
    if kinds is not None:
        unknown = [kind for kind in kinds if kind not in LAYER_TYPES]
        if unknown:
            raise CheckpointError(
                f"config.json: layer_types names {unknown[0]!r}; known: {', '.join(sorted(LAYER_TYPES))}"
            )
        if len(kinds) != layers:
            raise CheckpointError(f"config.json: layer_types names {len(kinds)} layers, num_hidden_layers={layers}")
        sliding = tuple(LAYER_TYPES[kind] for kind in kinds)
    window = config.get("sliding_window", default) or 0
    if any(sliding) and not window:
        source = (
            "layer_types names layers with a window" if kinds is not None else "this family has layers with a window"
        )
        raise CheckpointError(
            f"config.json: {source}, but sliding_window={config.get('sliding_window')} gives them none"
        )
    if not any(sliding):
        return {}
    return {"sliding_window": window, "sliding_layers": () if all(sliding) else sliding}
