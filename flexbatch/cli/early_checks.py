"""What can be wrong with a command and needs no model to be told: checked before anything heavy is imported. Importing
torch takes ten seconds or more where a disk is cold or processors are shared."""

from __future__ import annotations

import errno
import importlib.util
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path

from flexbatch.cli.run_settings import STANDARD_INPUT, SamplingConfig
from flexbatch.config import NGRAM, EngineConfig
from flexbatch.models.lora.request import CONFIG_FILE, check_default, parse_loras
from flexbatch.policy.suggest import neighbor
from flexbatch.validation.devices import check_device, check_dtype, named_machine
from flexbatch.validation.errors import ConfigurationError, reason

PICTURES = ("png", "svg", "pdf", "jpg", "jpeg", "webp", "tif", "tiff", "eps", "ps")
"""Endings that matplotlib draws everywhere; asking it takes a second."""


def check_machine(config: EngineConfig) -> None:
    """Device, dtype, machine, token tree, and the folder of the disk tier. Raises ConfigurationError."""
    check_device(config.device)
    check_dtype(config.dtype)
    named_machine(config.hardware)
    if config.tree is not None:
        from flexbatch.speculative.tree_spec import parse_tree

        parse_tree(config.tree)
    if config.draft is None:
        for flag, given in (("--tree", config.tree), ("--compare-plain", config.compare_plain or None)):
            if given is not None:
                raise ConfigurationError(f"{flag} is for speculation: give --draft MODEL, or --draft {NGRAM}, too")
    if config.offload_path is not None:
        check_folder_to_write("--offload-dir", str(config.offload_dir))


def check_models(config: EngineConfig) -> None:
    """The model, its adapters and its drafts; what has a Hub id is fetched. Raises CheckpointError,
    ConfigurationError."""
    adapters = parse_loras(config.lora)
    check_default(config.lora_default, [adapter.name for adapter in adapters])
    for adapter in adapters:
        what, folder = f"--lora {adapter.name}={adapter.path}", Path(adapter.path).expanduser()
        if not folder.is_dir():
            raise ConfigurationError(f"{what}: no such folder{neighbor(Path(adapter.path))}")
        if not (folder / CONFIG_FILE).is_file():
            raise ConfigurationError(
                f"{what}: has no {CONFIG_FILE}; give the folder that save_pretrained of PEFT wrote"
            )
    if config.dummy_weights:
        from flexbatch.models.shapes import shape

        shape(config.model)
        return
    from flexbatch.models.resolve import resolve, tokenizer_folder

    resolve(config.model)
    if config.tokenizer is not None:
        tokenizer_folder(config.tokenizer)
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

    form = sampling.params(GenerationDefaults()).structured_outputs
    if form is not None:
        from flexbatch.text.grammars import problem_of

        if problem := problem_of(form):
            given = {"--json-schema": sampling.json_schema, "--choice": sampling.choice, "--regex": sampling.regex}
            flag, value = next((flag, value) for flag, value in given.items() if value)
            text = value if isinstance(value, str) else " ".join(value)
            raise ConfigurationError(f"{flag} {text}: does not compile: {problem}")


def check_files(files: Mapping[str, str | None]) -> None:
    """That files to read are there and are files, by their flags. Raises ConfigurationError."""
    for flag, path in files.items():
        if path is None or path == STANDARD_INPUT:
            continue
        if not path:
            raise ConfigurationError(f"{flag} is empty; name a file")
        if not os.path.exists(path):
            raise ConfigurationError(f"{flag} {path} does not exist{neighbor(Path(path))}")
        if os.path.isdir(path):
            raise ConfigurationError(f"{flag} {path} is a folder; give a file")


def check_files_to_write(files: Mapping[str, str | None]) -> None:
    """That files which are written at the end of a run, or along with it, can be, by their flags. Raises
    ConfigurationError."""
    for flag, path in files.items():
        if path is None:
            continue
        if not path:
            raise ConfigurationError(f"{flag} is empty; name a file")
        if os.path.isdir(path):
            raise ConfigurationError(f"{flag} {path} is a folder; name a file")
        folder = Path(path).absolute().parent
        if not folder.is_dir():
            raise ConfigurationError(f"{flag} {path}: its folder does not exist")
        if not os.path.exists(path):
            _try_folder(folder, f"{flag} {path}")
        elif not os.access(path, os.W_OK):
            raise ConfigurationError(f"{flag} {path}: cannot be written")


def check_rows_file(path: str | None) -> None:
    """Raises ConfigurationError where JSON lines would be written under the name of something else."""
    if path is None:
        return
    if not path:
        raise ConfigurationError("--output is empty; name a file")
    if Path(path).suffix.lower() in (".csv", ".tsv", ".parquet"):
        raise ConfigurationError(
            f"--output {path}: rows are written as JSON lines; name it {Path(path).with_suffix('.jsonl')}, or take "
            "flexbatch batch, which writes Parquet"
        )


def check_folder_to_write(flag: str, path: str) -> None:
    """That files can be made in a folder, which is made where there is none. Raises ConfigurationError."""
    folder = Path(path).expanduser().absolute()
    while not os.path.lexists(folder) and folder != folder.parent:
        folder = folder.parent
    if not folder.is_dir():
        raise ConfigurationError(f"{flag} {path}: {folder} is a file; give a folder")
    _try_folder(folder, f"{flag} {path}")


def _try_folder(folder: Path, what: str) -> None:
    """A name is made and removed: rights alone do not tell of a disk that is mounted read-only, or of /proc. A full
    disk is told by who writes there, with what lies on it."""
    try:
        with tempfile.TemporaryDirectory(dir=folder, prefix=".flexbatch-"):
            pass
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            why = reason(error)
            raise ConfigurationError(
                f"{what}: nothing can be made in {folder}: {why}; name a folder that can be written"
            ) from None


def check_plot(flag: str, path: str | None) -> None:
    """That a picture can be drawn and written. Raises ConfigurationError."""
    if path is None:
        return
    suffix = Path(path).suffix.lower().removeprefix(".")
    if suffix and suffix not in PICTURES:
        raise ConfigurationError(f"{flag} {path}: no picture is written as .{suffix}; choose {', '.join(PICTURES)}")
    if importlib.util.find_spec("matplotlib") is None:
        raise ConfigurationError(f"{flag} {path} needs matplotlib: pip install 'flexbatch[plot]'")
    check_files_to_write({flag: path})


def check_gpus(gpus: int | None, parallel: bool, named: bool) -> None:
    """The number of GPUs of a plan. ``named``: of a machine that --gpu names. Raises ConfigurationError."""
    if parallel and named and gpus is None:
        raise ConfigurationError("--parallel auto for a machine that --gpu names: say how many it has, by --gpus N")
    if gpus is not None and not parallel:
        raise ConfigurationError(
            f"--gpus {gpus} is for --parallel auto: add it, or leave --gpus out; sizes that are given need as many "
            "GPUs as their product"
        )


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
