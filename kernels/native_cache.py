"""The cache of compiled kernels. What is loaded runs with the user's rights, so nothing is loaded that somebody else
could have put or changed there.

The folder belongs to this user alone (mode 0700), and a library's name ends with the digest of its content: a truncated
or altered file does not fit its
name and is built again. A file that was cut short on disk would otherwise pass for a library until a page beyond its
end is touched (SIGBUS).
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path

DIGEST_CHARACTERS = 32


class UnsafeFolder(OSError):
    """The cache folder is not this user's own; nothing in it is touched."""


def user_cache_folder(part: str) -> Path:
    """An absolute folder of this user for ``part``: in the home folder, or where there is none under the system's
    temporary one, by user id."""
    home = Path(os.path.expanduser("~"))
    if not home.is_absolute():
        return Path(tempfile.gettempdir()).absolute() / f"flexbatch-{os.geteuid()}" / part
    return home / ("Library/Caches" if os.uname().sysname == "Darwin" else ".cache") / "flexbatch" / part


def prepare(folder: Path) -> None:
    """Make the folder, for this user alone. Raises UnsafeFolder when it is a link or somebody else's, OSError when it
    cannot be made.

    Where others could write, what is there may be theirs, and goes.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    with contextlib.suppress(FileExistsError):
        folder.mkdir(mode=0o700)
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode):
        raise UnsafeFolder(f"{folder} is a {'symbolic link' if stat.S_ISLNK(found.st_mode) else 'file'}, not a folder")
    if found.st_uid != os.geteuid():
        raise UnsafeFolder(f"{folder} belongs to user {found.st_uid}, not to user {os.geteuid()}")
    if stat.S_IMODE(found.st_mode) != 0o700:
        folder.chmod(0o700)
    if found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        for file in folder.glob("*.so"):
            file.unlink()


def find(folder: Path, key: str) -> Path | None:
    """The library of ``key`` that is whole and this user's own; files of that name that are not are removed."""
    for file in sorted(folder.glob(f"{key}-*.so")):
        if _digest(file) == file.stem.removeprefix(f"{key}-"):
            return file
        file.unlink(missing_ok=True)
    return None


def _digest(file: Path) -> str | None:
    """Returns None for what is no plain file of this user's that nobody else may write."""
    try:
        descriptor = os.open(file, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:
        return None
    with open(descriptor, "rb") as stream:
        found = os.fstat(descriptor)
        if (
            not stat.S_ISREG(found.st_mode)
            or found.st_uid != os.geteuid()
            or found.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
        ):
            return None
        return _digest_of(stream.read())


def _digest_of(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:DIGEST_CHARACTERS]


def put(folder: Path, key: str, built: Path) -> Path:
    """Move a new library into the folder, whole or not at all, whoever else does the same at this moment."""
    built.chmod(0o700)
    with open(built, "rb") as stream:
        target = folder / f"{key}-{_digest_of(stream.read())}.so"
        os.fsync(stream.fileno())
    os.replace(built, target)
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    return target


@contextlib.contextmanager
def private_folder() -> Iterator[Path]:
    """A new folder of this process, which goes with it: for where no cache folder can be trusted. A library stays
    loaded when its file has gone."""
    with tempfile.TemporaryDirectory(prefix="flexbatch-") as folder:
        yield Path(folder)
