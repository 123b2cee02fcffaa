"""Public model shapes for --dummy-weights, read by the same family readers as a real folder."""

from __future__ import annotations

import re
from typing import Any

from flexbatch.models.arch import Arch
from flexbatch.models.families import read_arch
from flexbatch.policy.shapes import SHAPES, find_shape
from flexbatch.policy.suggest import did_you_mean
from flexbatch.validation.errors import CheckpointError

PART = re.compile(r"(.+)-(\d+)-layers")
"""The name of a shape with some of its layers: as wide, and loaded in a part of the time."""


def shape(name: str) -> Arch:
    """Arch of a public shape (`config_of`)."""
    return read_arch(config_of(name))


def config_of(name: str) -> dict[str, Any]:
    """Entries of its config.json; upper case, an organization before the name ("facebook/opt-30b") and what
    answer-tuned variants add are ignored. "opt-30b-24-layers" has 24 of its 48. Raises CheckpointError with the
    names."""
    part = PART.fullmatch(name.lower())
    key = find_shape(part[1] if part else name)
    if key is None:
        told = did_you_mean(name.lower().rsplit("/", 1)[-1], SHAPES) or f"; known: {', '.join(SHAPES)}"
        raise CheckpointError(f"no public shape {name!r} for --dummy-weights{told}")
    whole = SHAPES[key]
    layers = "num_hidden_layers" if "num_hidden_layers" in whole else "n_layer"
    if part and not 0 < int(part[2]) <= whole[layers]:
        raise CheckpointError(f"{name!r} for --dummy-weights: {key} has {whole[layers]} layers")
    return {**whole, layers: int(part[2])} if part else whole
