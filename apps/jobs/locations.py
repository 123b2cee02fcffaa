"""Where a job reads and writes, checked by names alone: pyarrow, whose import takes half a second, is not needed."""

from __future__ import annotations

import logging
import re
from pathlib import Path

from flexbatch.apps.jobs.manifest import STATE, refuse_other_files
from flexbatch.apps.jobs.settings import JobConfig
from flexbatch.policy.suggest import neighbor
from flexbatch.validation.errors import ConfigurationError
from flexbatch.validation.secrets import redacted_word

logger = logging.getLogger("flexbatch")

DATASET_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")
FILE_ENDINGS = (".parquet", ".csv", ".tsv", ".jsonl", ".json")


def is_dataset_name(location: str, config: JobConfig) -> bool:
    """Whether an input is fetched from the Hugging Face Hub: a name that stands for nothing here, with a setting of
    data sets. Without one it is a path that somebody mistyped, for which nobody should wait for the network."""
    asked = config.input_format == "dataset" or config.split is not None or config.dataset_config is not None
    return asked and not Path(location).expanduser().exists() and DATASET_NAME.fullmatch(location) is not None


def check_input(location: str, config: JobConfig) -> None:
    """Raises ConfigurationError for a path without wildcards that does not exist."""
    path = Path(location).expanduser()
    if "://" in location or re.search(r"[*?\[]", location) or path.exists() or is_dataset_name(location, config):
        return
    hint = neighbor(path)
    if not hint and DATASET_NAME.fullmatch(location) and not path.suffix:
        hint = "; a data set of the Hugging Face Hub needs --split or --input-format dataset"
    raise ConfigurationError(f"input {location} does not exist{hint}")


def check_folders(location: str, folder: str) -> None:
    """Raises ConfigurationError unless the output is a local folder that is not part of the input."""
    if "://" in folder:
        raise ConfigurationError(
            f"output {redacted_word(folder)}: parts are committed by renaming, which object stores lack; give a "
            "local or shared folder"
        )
    target = Path(folder).expanduser().resolve()
    if target.exists() and not target.is_dir():
        raise ConfigurationError(f"output {folder} is a file; give a folder")
    if "://" not in location:
        base = Path(re.split(r"[*?\[]", location, maxsplit=1)[0]).expanduser().resolve()
        if base.is_dir() and (target == base or base in target.parents) and "*" not in location:
            raise ConfigurationError(f"output {folder} lies in the input {location}: its parts would be read as input")


def check_output(folder: str) -> None:
    """Raises ConfigurationError for a folder of other files. What becomes of a name that looks like a file's is
    logged."""
    target = Path(folder).expanduser()
    if not (target / STATE).exists():
        refuse_other_files(target)
    if target.suffix.lower() in FILE_ENDINGS and not target.exists():
        logger.warning(
            "output %s becomes a folder of parts (%s), which readers of Parquet take as one data set",
            folder,
            target / "part-00000.parquet",
        )
