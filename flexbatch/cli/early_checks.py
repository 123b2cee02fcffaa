"""What can be wrong with a command and needs no model to be told: checked before anything heavy is imported. Importing
torch takes ten seconds or more where a disk is cold or processors are shared."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Mapping
from pathlib import Path

from flexbatch.cli.run_settings import STANDARD_INPUT, SamplingConfig
from flexbatch.config import NGRAM, EngineConfig
from flexbatch.models.lora.request import parse_loras
from flexbatch.policy.suggest import neighbor
from flexbatch.validation.devices import check_device, check_dtype, named_machine
from flexbatch.validation.errors import ConfigurationError


def check_machine(config: EngineConfig) -> None:
    """Device, dtype, machine, token tree, and the folder of the disk tier. Raises ConfigurationError."""
    check_device(config.device)
    check_dtype(config.dtype)
    named_machine(config.hardware)
    if config.tree is not None:
        from flexbatch.speculative.tree_spec import parse_tree

        parse_tree(config.tree)
    folder = config.offload_path
    if folder is not None and folder.exists() and not folder.is_dir():
        raise ConfigurationError(f"--offload-dir {config.offload_dir} is a file; give a folder")


def check_models(config: EngineConfig) -> None:
    """The model, its adapters and its drafts; what has a Hub id is fetched. Raises CheckpointError,
    ConfigurationError."""
    for adapter in parse_loras(config.lora):
        if not Path(adapter.path).expanduser().is_dir():
            raise ConfigurationError(
                f"--lora {adapter.name}={adapter.path}: no such folder{neighbor(Path(adapter.path))}"
            )
    if config.dummy_weights:
        from flexbatch.models.shapes import shape

        shape(config.model)
        return
    from flexbatch.models.resolve import resolve

    resolve(config.model)
    for draft in config.draft or ():
        if draft != NGRAM:
            resolve(draft)


def check_engine(config: EngineConfig) -> None:
    """Everything about the engine's settings that needs no torch. Raises ConfigurationError, CheckpointError."""
    check_machine(config)
    check_models(config)


def check_sampling(sampling: SamplingConfig) -> None:
    """Sampling settings by themselves, before what the model adds to them. Raises ConfigurationError."""
    from flexbatch.models.generation_config import GenerationDefaults

    sampling.params(GenerationDefaults())


def check_files(files: Mapping[str, str | None]) -> None:
    """That files to read are there and are files, by their flags. Raises ConfigurationError."""
    for flag, path in files.items():
        if path is None or path == STANDARD_INPUT:
            continue
        if not os.path.exists(path):
            raise ConfigurationError(f"{flag} {path} does not exist{neighbor(Path(path))}")
        if os.path.isdir(path):
            raise ConfigurationError(f"{flag} {path} is a folder; give a file")


def check_plot(flag: str, path: str | None) -> None:
    """That a picture can be drawn and written. Raises ConfigurationError."""
    if path is None:
        return
    if importlib.util.find_spec("matplotlib") is None:
        raise ConfigurationError(f"{flag} {path} needs matplotlib: pip install 'flexbatch[plot]'")
    if not Path(path).absolute().parent.is_dir():
        raise ConfigurationError(f"{flag} {path}: its folder does not exist")


def check_inputs(engine: EngineConfig, prompts: str | None) -> None:
    """What can be wrong with the engine's settings, prompts and model by names alone. Raises ConfigurationError,
    CheckpointError."""
    if prompts is not None and "://" not in prompts:
        check_files({"--prompts": prompts})
    check_engine(engine)


def refuse_inputs(output: str, inputs: Mapping[str, str | None]) -> None:
    """Raises ConfigurationError where rows would be written over a file that is read, by whatever name or link."""
    for flag, path in inputs.items():
        if path is not None and os.path.exists(path) and os.path.exists(output) and os.path.samefile(path, output):
            raise ConfigurationError(
                f"--output {output} is the file of {flag}, which it would replace: name another one"
            )
