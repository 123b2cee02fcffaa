"""Files that survive a loss of power: names that no other writer uses, and folders whose entries reach the disk."""

from __future__ import annotations

import contextlib
import os
import uuid
from pathlib import Path


def sync_folder(folder: Path) -> None:
    """Makes the entries of a folder durable: what was created, renamed or linked there. Where this process may not read
    the folder, that is left to the system."""
    with contextlib.suppress(PermissionError):
        descriptor = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def make_folder(folder: Path) -> None:
    """Creates a folder and the missing ones above it, each durable in its parent: a file that is fsynced in a folder
    that is not may be gone after a loss of power."""
    missing = []
    while not folder.is_dir():
        missing.append(folder)
        folder = folder.parent
    for path in reversed(missing):
        path.mkdir(exist_ok=True)
        sync_folder(path.parent)


def temporary_name(path: Path) -> Path:
    """Returns a hidden name beside ``path`` that no other process, thread or machine chooses, whatever their pids
    are."""
    return path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")


def rename_if_absent(temporary: Path, path: Path) -> bool:
    """Gives a file its name unless the name is taken; then it returns False and the file stays where it is."""
    try:
        os.link(temporary, path)
    except FileExistsError:
        return False
    except OSError:  # a file system without hard links; here only the writers' lock keeps others out in between
        if path.exists():
            return False
        os.rename(temporary, path)
        return True
    os.unlink(temporary)
    return True
