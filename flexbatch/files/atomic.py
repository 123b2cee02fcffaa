"""Names that no other writer uses, files that replace another one when they are whole, and folders whose entries reach
the disk.

Everything that is written under a name somebody may read meanwhile is written here: results, traces, metrics, profiles,
converted weights, and the parts and logs of a batch job.
"""

from __future__ import annotations

import contextlib
import fcntl
import glob
import os
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO


@contextlib.contextmanager
def replacing(path: Path, mode: int = 0o666, *, durable: bool = True) -> Iterator[BinaryIO]:
    """A new file that takes the name ``path`` when the body ends, and never has it when the body fails.

    It is opened at once, so that a folder that cannot be written to is found before the work is done. What a killed
    process has left of the same file is removed. mode: permissions, before the umask. durable: whether the content is
    on the disk before it has the name. Raises OSError.
    """
    temporary = temporary_name(path)
    remove_leftovers(path)
    try:
        with open_locked(temporary, mode) as file:
            yield file
            file.flush()
            if durable:
                os.fsync(file.fileno())
            # While it is locked: until it has its name, another process may not take it for a leftover.
            os.replace(temporary, path)
    finally:
        # Ctrl-C too: only a process that is killed leaves the hidden file.
        with contextlib.suppress(OSError):
            temporary.unlink()


def temporary_name(path: Path) -> Path:
    """A name of its own for ``path`` until it is whole. Process ids do not do: threads share one, and so do containers
    that share a volume, where everybody is process 1.
    """
    return path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")


def open_locked(path: Path, mode: int = 0o666) -> BinaryIO:
    """Make a file for writing, with a lock that ends with the process: it tells work in progress from what a killed run
    has left. The name must be new, and is no symbolic link; a file that is there is never opened, let alone emptied.
    """
    while True:
        file = open(path, "xb", opener=lambda name, flags: os.open(name, flags | os.O_NOFOLLOW, mode))  # noqa: SIM115
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.flock(file, fcntl.LOCK_EX)
        if os.fstat(file.fileno()).st_nlink:
            return file  # the caller closes it
        file.close()  # Removed between opening and locking: mistaken for a leftover.


def remove_leftovers(path: Path) -> None:
    """Unlink temporary files of ``path`` that nobody is writing."""
    for temporary in path.parent.glob(f".{glob.escape(path.name)}.*.tmp"):
        with contextlib.suppress(OSError):
            descriptor = os.open(temporary, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
            with open(descriptor, "rb") as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                # The name may have passed to another file since it was opened; only who holds the lock takes it away.
                if os.path.samestat(os.fstat(file.fileno()), os.lstat(temporary)):
                    temporary.unlink()


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
