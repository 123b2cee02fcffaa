"""What a model is by its config.json alone: enough to plan for it, without weights or tokenizer. Imports no torch."""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flexbatch.models import families
from flexbatch.models.arch import Arch
from flexbatch.models.resolve import BUNDLED, HUB_ID
from flexbatch.policy.shapes import SHAPES, find_shape
from flexbatch.validation.errors import CheckpointError


@dataclass(frozen=True)
class Description:
    """``folder`` is None where no folder is on this machine; ``config`` is what config.json holds."""

    name: str
    folder: Path | None
    config: Mapping[str, Any]
    arch: Arch


def describe(name: str) -> Description:
    """By a config.json or a folder that holds one, the name of a public shape, a bundled model, or a Hub id, of which
    nothing but config.json is fetched. Raises CheckpointError that says what is wrong."""
    path = BUNDLED.get(name) or Path(name).expanduser()
    if path.is_dir() and not (path / "config.json").is_file():
        raise CheckpointError(f"{path} is no model folder: it has no config.json")
    file = path / "config.json" if path.is_dir() else path
    shape = find_shape(name)
    if not file.is_file() and shape is not None:
        config = SHAPES[shape] | {"dtype": "float16"}
        return Description(shape, None, config, families.read_arch(config))
    folder = file.parent if file.is_file() else None
    file = file if file.is_file() else _fetched(name)
    config = _read(file)
    try:
        return Description(name, folder, config, families.read_arch(config))
    except CheckpointError as error:
        raise CheckpointError(f"{file}: {error}") from error


def _read(file: Path) -> dict[str, Any]:
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{file} cannot be read as JSON: {error}") from error
    if not isinstance(config, dict):
        raise CheckpointError(f"{file} holds a {type(config).__name__}, wanted an object")
    return config


def _fetched(name: str) -> Path:
    """The config.json of a Hub id. A name that is nearly a public shape's is refused before anybody is asked."""
    near = difflib.get_close_matches(name.lower().rsplit("/", 1)[-1], SHAPES, n=1, cutoff=0.6)
    meant = f"; did you mean {near[0]}?" if near else ""
    known = f"Public shapes: {', '.join(SHAPES)}; or give a config.json, a folder that holds one, or a Hub id"
    if not HUB_ID.fullmatch(name) or (near and "/" not in name):
        raise CheckpointError(f"{name} is no public shape, file or folder{meant or '.'} {known}")
    from huggingface_hub import hf_hub_download  # 0.3 s that only a Hub id needs

    try:
        return Path(hf_hub_download(name, "config.json"))
    except Exception as error:  # every HTTP library of the Hub client has exceptions of its own
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointError(
            f"{name} is no public shape, file or folder{meant}, and its config.json cannot be fetched from the Hugging "
            f"Face Hub: {reason}. {known}"
        ) from error
