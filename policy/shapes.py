"""Public models: the one table of their sizes, for planning without a checkpoint and for random weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

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
        "vocab_size": 50272,
        "max_position_embeddings": 2048,
        "eos_token_id": 2,
        "bos_token_id": 2,
        **sizes,
        **changes,
    }


def _llama(hidden: int, inner: int, layers: int, heads: int, kv_heads: int, **changes: Any) -> dict[str, Any]:
    """Touvron et al. 2023, "Llama 2"; Grattafiori et al. 2024, "The Llama 3 herd of models", table 3; Jiang et al.
    2023, "Mistral 7B", table 1."""
    sizes = {
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
    }
    llama2 = {
        "model_type": "llama",
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
        "vocab_size": 65024,
        "max_position_embeddings": 2048,
        "eos_token_id": 11,
        "bos_token_id": 11,
        **sizes,
        **changes,
    }


LLAMA3 = {
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
    "llama-3.1-405b": _llama(
        16384, 53248, 126, 128, 8, **{**LLAMA3, "max_position_embeddings": 131072, "rope_scaling": LLAMA31_ROPE}
    ),
    "llama-3.2-1b": _llama(2048, 8192, 16, 32, 8, **LLAMA32, head_dim=64),
    "llama-3.2-3b": _llama(3072, 8192, 28, 24, 8, **LLAMA32, head_dim=128),
    "mistral-7b": _llama(
        4096, 14336, 32, 32, 8, model_type="mistral", max_position_embeddings=32768, sliding_window=4096
    ),
    "falcon-7b": _falcon(4544, 32, 71),
    "falcon-40b": _falcon(8192, 60, 128, **NEW_FALCON),
    "falcon-180b": _falcon(14848, 80, 232, **NEW_FALCON),
    "starcoder": {
        "model_type": "gpt_bigcode",
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
}
"""By name: entries of config.json as the authors published them."""


def names() -> list[str]:
    """Those whose sizes `public_shape` can tell without a family's reader: OPT with plain embeddings, and Llama."""
    return [
        name
        for name, config in SHAPES.items()
        if config["model_type"] == "llama" or config.get("word_embed_proj_dim") == config.get("hidden_size", 0)
    ]


def public_shape(name: str) -> ModelShape:
    """Raises ValueError that lists the known names."""
    key = name.lower().rsplit("/", 1)[-1]
    if key not in names():
        raise ValueError(
            f"no public shape {name!r}; known: {', '.join(names())}; or a JSON file with the fields of ModelShape"
        )
    config = SHAPES[key]
    layers, hidden, heads = (config[f] for f in ("num_hidden_layers", "hidden_size", "num_attention_heads"))
    if config["model_type"] == "opt":
        # Its tables are tied, positions learned, with two more than the context.
        positions = config["max_position_embeddings"] + 2
        sizes = key, layers, hidden, heads, config["ffn_dim"], config["vocab_size"]
        return ModelShape.from_sizes(*sizes, tied=True, positions=positions)
    return ModelShape.from_sizes(
        key,
        layers,
        hidden,
        heads,
        config["intermediate_size"],
        config["vocab_size"],
        num_kv_heads=config["num_key_value_heads"],
        mlp_matrices=3,
        tied=config.get("tie_word_embeddings", False),
    )


def load_shape(name_or_path: str) -> ModelShape:
    """A public shape by name or a JSON file. Raises ValueError."""
    path = Path(name_or_path).expanduser()
    if path.suffix != ".json":
        return public_shape(name_or_path)
    try:
        return ModelShape.from_dict(json.loads(path.read_text()))
    except (OSError, TypeError, json.JSONDecodeError) as error:
        raise ValueError(f"model shape {name_or_path}: {error}") from error
