"""Public model shapes for --dummy-weights, read by the same family readers as a real folder."""

from __future__ import annotations

from typing import Any

from flexbatch.models.arch import Arch
from flexbatch.models.families import read_arch
from flexbatch.policy.shapes import SHAPES, find_shape
from flexbatch.policy.suggest import did_you_mean
from flexbatch.validation.errors import CheckpointError


def shape(name: str) -> Arch:
    """Arch of a public shape (`config_of`)."""
    return read_arch({"dtype": "float16"} | config_of(name))


def config_of(name: str) -> dict[str, Any]:
    """Entries of its config.json; upper case, an organization before the name ("facebook/opt-30b") and what
    answer-tuned variants add are ignored. Raises CheckpointError with the names."""
    key = find_shape(name)
    if key is None:
        told = did_you_mean(name.lower().rsplit("/", 1)[-1], SHAPES) or f"; known: {', '.join(SHAPES)}"
        raise CheckpointError(f"no public shape {name!r} for --dummy-weights{told}")
    return SHAPES[key]
