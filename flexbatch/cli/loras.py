"""Adapters of a command: which one holds for all rows, and what of them a run depends on. Imports no torch."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from flexbatch.config import EngineConfig
from flexbatch.models.lora.request import parse_loras
from flexbatch.validation.errors import ConfigurationError


def for_all_rows(engine: EngineConfig, remedy: str = "--lora-default NAME says which one is") -> EngineConfig:
    """The only adapter of --lora as the default, where rows cannot choose one. Raises ConfigurationError where there
    are several; remedy: what to do."""
    names = [request.name for request in parse_loras(engine.lora)]
    if engine.lora_default is not None or not names:
        return engine
    if len(names) > 1:
        raise ConfigurationError(f"--lora names {len(names)} adapters, and no row says which is its own: {remedy}")
    return dataclasses.replace(engine, lora_default=names[0])


def lora_identity(engine: EngineConfig, records: Path | None = None) -> dict[str, Any]:
    """Digests of the adapters by their names, and the default; empty without any. Raises CheckpointError."""
    if not engine.lora:
        return {}
    from flexbatch.models.lora.adapter import adapter_digest

    digests = {
        request.name: adapter_digest(Path(request.path).expanduser(), records) for request in parse_loras(engine.lora)
    }
    return {"lora": digests, "lora_default": engine.lora_default}
