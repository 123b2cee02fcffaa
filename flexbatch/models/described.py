"""What a model is by its config.json, or the header of its GGUF file, alone: enough to plan for it, without weights or
tokenizer. Imports no torch for a config.json."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flexbatch.models import families
from flexbatch.models.arch import Arch
from flexbatch.models.gguf.parts import is_gguf
from flexbatch.models.resolve import BUNDLED, HUB_ID, WHEELS, resolve
from flexbatch.policy.shapes import SHAPES, find_shape
from flexbatch.policy.suggest import did_you_mean
from flexbatch.validation.errors import CheckpointError, reason


@dataclass(frozen=True)
class Description:
    """``folder`` is that of the weights, or their GGUF file, where they may be on this machine; ``config`` is what
    config.json holds."""

    name: str
    folder: Path | None
    config: Mapping[str, Any]
    arch: Arch


def describe(name: str) -> Description:
    """By a config.json or a folder that holds one, the name of a public shape, a bundled model, a GGUF file, or a Hub
    id, of which nothing but config.json is fetched. Raises CheckpointError that says what is wrong."""
    path, shape = BUNDLED.get(name) or Path(name).expanduser(), find_shape(name)
    if name in WHEELS or path.is_dir() or (path.is_file() and is_gguf(path)):
        path = resolve(name)
        if is_gguf(path):
            from flexbatch.models.checkpoint import read_arch  # with torch; a GGUF file has its sizes in its header

            return Description(name, path, {}, read_arch(path))
        file = path / "config.json"
    elif path.is_file():
        file = path
    elif shape is not None:
        return Description(shape, None, SHAPES[shape], families.read_arch(SHAPES[shape]))
    else:
        file = _fetched(name)
    config = _read(file)
    # A configuration under another name says nothing about the files beside it.
    folder = file.parent if file.name == "config.json" else None
    try:
        return Description(name, folder, config, families.read_arch(config))
    except CheckpointError as error:
        raise CheckpointError(f"{file}: {error}") from error


def _read(file: Path) -> dict[str, Any]:
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{file} cannot be read as JSON: {reason(error)}") from error
    if not isinstance(config, dict):
        raise CheckpointError(f"{file} holds a {type(config).__name__}, wanted an object")
    return config


def _fetched(name: str) -> Path:
    """The config.json of a Hub id. A name that is nearly a public shape's is refused before anybody is asked."""
    meant = did_you_mean(name.rsplit("/", 1)[-1], SHAPES)
    known = f"Public shapes: {', '.join(SHAPES)}; or give a config.json, a folder that holds one, or a Hub id"
    if not HUB_ID.fullmatch(name) or (meant and "/" not in name):
        raise CheckpointError(f"{name} is no public shape, file or folder{meant or '.'} {known}")
    from huggingface_hub import snapshot_download  # 0.3 s that only a Hub id needs

    try:
        # hf_hub_download asks for half a minute, with a warning each time, where there is no network.
        return Path(snapshot_download(name, allow_patterns=["config.json"])) / "config.json"
    except Exception as error:  # every HTTP library of the Hub client has exceptions of its own
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointError(
            f"{name} is no public shape, file or folder, and its config.json cannot be fetched from the Hugging Face "
            f"Hub: {reason.rstrip('.')}{meant or '.'} {known}"
        ) from error
