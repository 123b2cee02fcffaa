"""Facts about a model that HELM wants before any weight is loaded, and the engine settings of the environment."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import Any

from flexbatch.config import EngineConfig

LENGTH_FIELDS = ("n_positions", "max_position_embeddings", "n_ctx", "seq_length")


def model_folder(name: str) -> str:
    """Returns the folder of the bundled model or of a local one, absolute; anything else is a Hub id and comes back
    unchanged."""
    if name == "demo":
        from flexbatch.models.resolve import resolve

        return str(resolve(name))
    return str(Path(name).resolve()) if Path(name).is_dir() else name


def positions(folder: str) -> int | None:
    """Returns the longest sequence of the model in tokens by its configuration, None where it sets no limit (ALiBi)."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(folder)
    inner = getattr(config, "text_config", None) or config
    return next((int(value) for field in LENGTH_FIELDS if (value := getattr(inner, field, None))), None)


def changed_settings(config: EngineConfig) -> dict[str, Any]:
    """Returns the keywords of `LLM` that differ from their defaults, without the model, as JSON can hold them."""
    pairs = (
        (field.name, getattr(config, field.name), field.default)
        for field in dataclasses.fields(config)
        if field.name != "model"
    )
    return {
        name: list(value) if isinstance(value, tuple) else value for name, value, default in pairs if value != default
    }


def engine_settings() -> dict[str, Any]:
    """Returns the engine settings for ``helm-run`` itself, whose command line has no flag for them: ``FLEXBATCH_*``
    over the defaults."""
    from flexbatch.cli.loras import for_all_rows
    from flexbatch.cli.settings import add_engine_arguments, engine_config

    parser = argparse.ArgumentParser(add_help=False)
    add_engine_arguments(parser)
    return changed_settings(for_all_rows(engine_config(parser.parse_args([]))))
