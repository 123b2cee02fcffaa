"""Public model shapes for --dummy-weights, read by the same family readers as a real folder."""

from __future__ import annotations

from flexbatch.models.arch import Arch
from flexbatch.models.families import read_arch
from flexbatch.policy.shapes import SHAPES
from flexbatch.policy.suggest import did_you_mean
from flexbatch.validation.errors import CheckpointError


def shape(name: str) -> Arch:
    """Arch of a public shape; upper case and an organisation before the name ("facebook/opt-30b") are ignored.
    Raises CheckpointError with the names."""
    key = name.lower().rsplit("/", 1)[-1]
    if key not in SHAPES:
        raise CheckpointError(
            f"no public shape {name!r} for --dummy-weights"
            f"{did_you_mean(key, SHAPES) or '; known: ' + ', '.join(SHAPES)}"
        )
    return read_arch(SHAPES[key] | {"dtype": "float16"})
