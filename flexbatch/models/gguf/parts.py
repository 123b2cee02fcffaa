"""Which files make up a GGUF model. Imports neither torch nor the package gguf."""

from __future__ import annotations

import re
from pathlib import Path

from flexbatch.validation.errors import CheckpointError

SUFFIX = ".gguf"
MAGIC = b"GGUF"
WEIGHT_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
"""Of a folder, in the order in which transformers looks for them."""
PART = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.gguf", re.IGNORECASE)
"""What llama-gguf-split calls the parts of one model."""
PROJECTOR = "mmproj"
"""The beginning of names of files that hold an image encoder beside a model."""


LFS_POINTER = b"version https://git-lfs"
"""The beginning of what a clone without Git LFS has in a file's stead."""


def pointer_remedy(path: Path) -> str:
    """The end of a message about a file that cannot be read; empty unless it stands for one in Git LFS."""
    found = _begins(path, LFS_POINTER)
    return "; it only points to a file in Git LFS: git lfs pull, or download the file itself" if found else ""


def begins_as_gguf(path: Path) -> bool:
    """Whatever its name."""
    return path.is_file() and _begins(path, MAGIC)


def _begins(path: Path, beginning: bytes) -> bool:
    try:
        with open(path, "rb") as file:
            return file.read(len(beginning)) == beginning
    except OSError:
        return False


def is_gguf(path: Path) -> bool:
    """By its name; a folder may be called so, too."""
    return path.suffix.lower() == SUFFIX and not path.is_dir()


def parts_of(path: Path) -> list[Path]:
    """The files of the model that ``path`` belongs to, the first one first. Raises CheckpointError when one is
    missing."""
    match = PART.fullmatch(path.name)
    if match is None:
        return [path]
    stem, count = match[1], int(match[3])
    if not 1 <= int(match[2]) <= count:
        raise CheckpointError(f"{path} calls itself part {int(match[2])} of {count}")
    parts = [path.with_name(f"{stem}-{number:05d}-of-{match[3]}{path.suffix}") for number in range(1, count + 1)]
    missing = [part for part in parts if not part.is_file()]
    if missing:
        raise CheckpointError(
            f"{path.parent} lacks {missing[0].name}"
            + (f" and {len(missing) - 1} more" if missing[1:] else "")
            + f"; the model {stem} has {count} parts"
        )
    return parts


def find_gguf(folder: Path) -> Path | None:
    """The GGUF model of a folder, by its first part; None when there is none. Raises CheckpointError when there are
    several."""
    files = sorted(path for path in folder.iterdir() if is_gguf(path) and path.is_file())
    firsts = {parts_of(path)[0] for path in files if not path.name.lower().startswith(PROJECTOR)}
    if len(firsts) > 1:
        names = ", ".join(sorted(path.name for path in firsts)[:5])
        raise CheckpointError(f"{folder} holds {len(firsts)} GGUF models ({names}); give the file of one of them")
    return next(iter(firsts), None)
