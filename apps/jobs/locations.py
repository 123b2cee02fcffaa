"""Where a job reads and writes, checked by names alone: pyarrow, whose import takes half a second, is not needed."""

from __future__ import annotations

import logging
import re
from pathlib import Path

from flexbatch.apps.jobs.globs import first_wild, glob_regex, is_hidden
from flexbatch.apps.jobs.manifest import STATE, refuse_other_files
from flexbatch.apps.jobs.settings import JobConfig
from flexbatch.policy.suggest import neighbor
from flexbatch.validation.errors import ConfigurationError
from flexbatch.validation.secrets import redacted_word

logger = logging.getLogger("flexbatch")

DATASET_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")
PARTS, PARTITIONS = ("part-00000.parquet", "part-00000.jsonl"), ("", "k=v/", "k=v/k=v/", "k=v/k=v/k=v/")
"""What an output may hold, as far as wildcards may ask for it."""
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
    if _reads_from(location, target):
        raise ConfigurationError(
            f"output {folder} lies in the input {location}: its parts would be read as input, and no second start "
            "would find the input of the first; choose a folder outside"
        )


def _reads_from(location: str, target: Path) -> bool:
    """Returns whether the input would have the parts of this output among its files."""
    location = location.removeprefix("file://")
    if "://" in location:
        return False
    names = str(Path(location).expanduser().absolute()).split("/")
    wild = first_wild(names)
    base = Path("/".join(names[:wild]) or "/").resolve()
    if not base.is_dir() or not (target == base or base in target.parents):
        return False
    if wild is None:
        return target == base or not is_hidden(f"{target.relative_to(base)}/part")
    pattern = glob_regex("/".join(names[wild:]))
    folder = "" if target == base else f"{target.relative_to(base)}/"
    return any(
        pattern.fullmatch(name) and not is_hidden(name)
        for name in (f"{folder}{inner}{part}" for inner in PARTITIONS for part in PARTS)
    )


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
