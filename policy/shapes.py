"""Sizes of public models, for planning without a checkpoint."""

from __future__ import annotations

import json
from pathlib import Path

from flexbatch.policy.model_shape import ModelShape

# hidden, layers, heads, intermediate; OPT's vocabulary is 50272, tables are tied, positions learned (2048 + 2).
OPT = {
    "opt-125m": (768, 12, 12, 3072),
    "opt-1.3b": (2048, 24, 32, 8192),
    "opt-2.7b": (2560, 32, 32, 10240),
    "opt-6.7b": (4096, 32, 32, 16384),
    "opt-13b": (5120, 40, 40, 20480),
    "opt-30b": (7168, 48, 56, 28672),
    "opt-66b": (9216, 64, 72, 36864),
    "opt-175b": (12288, 96, 96, 49152),
}
# hidden, layers, heads, key-value heads, intermediate, vocabulary, tied
LLAMA = {
    "llama-2-7b": (4096, 32, 32, 32, 11008, 32000, False),
    "llama-2-13b": (5120, 40, 40, 40, 13824, 32000, False),
    "llama-2-70b": (8192, 80, 64, 8, 28672, 32000, False),
    "llama-3.2-1b": (2048, 16, 32, 8, 8192, 128256, True),
    "llama-3.2-3b": (3072, 28, 24, 8, 8192, 128256, True),
    "llama-3-8b": (4096, 32, 32, 8, 14336, 128256, False),
    "llama-3-70b": (8192, 80, 64, 8, 28672, 128256, False),
    "llama-3.1-405b": (16384, 126, 128, 8, 53248, 128256, False),
}


def names() -> list[str]:
    return [*OPT, *LLAMA]


def public_shape(name: str) -> ModelShape:
    """Raises ValueError that lists the known names."""
    key = name.lower().rsplit("/", 1)[-1]
    if key in OPT:
        hidden, layers, heads, intermediate = OPT[key]
        return ModelShape.from_sizes(key, layers, hidden, heads, intermediate, 50272, tied=True, positions=2050)
    if key in LLAMA:
        hidden, layers, heads, kv_heads, intermediate, vocab, tied = LLAMA[key]
        return ModelShape.from_sizes(
            key, layers, hidden, heads, intermediate, vocab, num_kv_heads=kv_heads, mlp_matrices=3, tied=tied
        )
    raise ValueError(
        f"no public shape {name!r}; known: {', '.join(names())}; or a JSON file with the fields of ModelShape"
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
