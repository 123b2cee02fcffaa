"""Files of the disk tier: aligned, read and written in place without the page cache, and trusted only when they are
complete."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import stat
import tempfile
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from flexbatch.files.atomic import replacing
from flexbatch.policy.limits import DISK_ALIGNMENT
from flexbatch.policy.units import size_text
from flexbatch.validation.errors import reason

if TYPE_CHECKING:
    from torch import Tensor  # the command line writes its output by way of this module, and must not wait for torch

T = TypeVar("T")
R = TypeVar("R")

ALIGNMENT = DISK_ALIGNMENT
"""Bytes. Offsets and lengths of O_DIRECT transfers, and of every tensor in a slab that the disk fills."""
READ_CHUNK_BYTES = 8 << 20
"""Bytes of one disk request: 8 MiB reads reach the device's rate with 4 to 8 threads."""


def align(num_bytes: int, alignment: int = ALIGNMENT) -> int:
    """``num_bytes``, rounded up to a multiple of ``alignment``."""
    return -(-num_bytes // alignment) * alignment


class OffloadError(OSError):
    """The disk tier cannot be used: the message names the folder, the cause and the remedy."""


class DiskFile:
    """A file of the disk tier, read and written in place with O_DIRECT where the file system allows it.

    Offsets, lengths and buffers are multiples of ALIGNMENT for direct transfers; others go through the page cache.
    """

    def __init__(self, path: Path, num_bytes: int | None = None, descriptor: int | None = None) -> None:
        """Open ``path`` for reading; or with ``num_bytes`` make a file of that size in its folder, to read and write;
        or write to the file of a ``descriptor``, which stays its owner's, whatever name that has so far.

        A file that is made never has a name, so that no other process or thread can meet it and a killed run leaves
        nothing; ``path`` stands in messages then. Raises OffloadError, also where ``path`` is a symbolic link or no
        file.
        """
        self.path, self.buffered, self.direct = path, -1, -1
        try:
            if descriptor is not None:
                self.buffered, flags = os.dup(descriptor), os.O_WRONLY
            elif num_bytes is not None:
                self.buffered, flags = open_scratch(path, num_bytes), os.O_RDWR
            else:
                self.buffered, flags = open_readable(path), os.O_RDONLY
            self.direct = open_direct(self.buffered, flags)
        except BaseException:  # Ctrl-C, too, may come before the second one
            self.close()
            raise

    @property
    def num_bytes(self) -> int:
        return os.fstat(self.buffered).st_size

    def read(self, buffer: Tensor, offset: int) -> None:
        """Fill ``buffer`` (uint8, host) from ``offset``. Raises OffloadError on a short or failed read."""
        self.transfer(buffer, offset, os.preadv, "read")

    def write(self, buffer: Tensor, offset: int) -> None:
        """Write ``buffer`` (uint8, host) at ``offset``. Raises OffloadError."""
        self.transfer(buffer, offset, os.pwritev, "write")

    def transfer(self, buffer: Tensor, offset: int, operation: Callable[..., int], verb: str) -> None:
        done, size = 0, buffer.numel()
        view = (
            memoryview((ctypes.c_uint8 * size).from_address(buffer.data_ptr())).cast("B") if size else memoryview(b"")
        )
        aligned = offset % ALIGNMENT == 0 and size % ALIGNMENT == 0 and buffer.data_ptr() % ALIGNMENT == 0
        descriptor = self.direct if aligned else self.buffered
        while done < size:
            try:
                count = operation(descriptor, [view[done:]], offset + done)
            except OSError as error:
                if descriptor == self.direct and descriptor != self.buffered:
                    descriptor = self.buffered
                    continue
                raise offload_error(self.path.parent, error, size) from error
            if count == 0:
                raise OffloadError(
                    f"{self.path}: {verb} of {size} bytes at {offset} ended after {done}; delete the file, it will "
                    "be written again"
                )
            done += count
            if done % ALIGNMENT:
                descriptor = self.buffered

    def close(self) -> None:
        descriptors = {self.buffered, self.direct} - {-1}
        self.buffered = self.direct = -1
        for descriptor in descriptors:
            os.close(descriptor)


def open_direct(descriptor: int, flags: int) -> int:
    """The same file once more for unbuffered transfers, or ``descriptor`` where the file system has none."""
    try:
        # By the descriptor: a second look-up of the name might find another file.
        return os.open(f"/proc/self/fd/{descriptor}", flags | os.O_CLOEXEC | getattr(os, "O_DIRECT", 0))
    except OSError:
        return descriptor


def open_readable(path: Path) -> int:
    """A descriptor of a regular file that the name itself stands for. Raises OffloadError."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        raise offload_error(path.parent, error, 0) from error
    if stat.S_ISREG(os.fstat(descriptor).st_mode):
        return descriptor
    os.close(descriptor)
    raise OffloadError(errno.EISDIR, f"{path} is no regular file; remove it, or name another folder in --offload-dir")


def open_scratch(path: Path, num_bytes: int) -> int:
    """A descriptor of a new file without a name in the folder of ``path``, with ``num_bytes`` allocated. Raises
    OffloadError."""
    try:
        with tempfile.TemporaryFile(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent) as file:
            os.posix_fallocate(file.fileno(), 0, max(num_bytes, 1))
            return os.dup(file.fileno())
    except OSError as error:
        raise offload_error(path.parent, error, num_bytes) from error


def chunks(num_bytes: int, chunk_bytes: int = READ_CHUNK_BYTES) -> list[tuple[int, int]]:
    """(start, end) byte ranges of at most ``chunk_bytes``."""
    return [(start, min(start + chunk_bytes, num_bytes)) for start in range(0, num_bytes, chunk_bytes)]


def map_all(pool: ThreadPoolExecutor | None, work: Callable[[T], R], items: Iterable[T]) -> list[R]:
    """The results of ``work``, by the threads of ``pool`` where there is one. When it raises, no thread is at it any
    more: a descriptor that is closed then may be another file's while a late thread still writes to its number, and a
    buffer that is filled again what a late thread still reads into."""
    if pool is None:
        return [work(item) for item in items]
    futures = [pool.submit(work, item) for item in items]
    try:
        return [future.result() for future in futures]
    finally:
        for future in futures:
            future.cancel()
        wait(futures)


def offload_error(folder: Path, error: OSError, num_bytes: int) -> OffloadError:
    """Returns one clear error for a disk tier that is read-only, full, or not a folder."""
    free = ""
    with contextlib.suppress(OSError):
        space = os.statvfs(folder)
        free = (
            f" (needed {size_text(num_bytes)}; {size_text(space.f_bavail * space.f_frsize)} free there)"
            if num_bytes
            else ""
        )
    return OffloadError(
        error.errno,
        f"offload folder {folder}: {reason(error)}{free}; name a writable folder with free space in --offload-dir",
    )


def prepare_offload_dir(folder: Path) -> None:
    """Create the folder, for its owner alone, and show that it can be written. Raises OffloadError."""
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as probe:
            probe.write(b"x")
    except OSError as error:
        raise offload_error(folder, error, 0) from error


def make_folder(folder: Path) -> None:
    """Create a folder in the offload folder. Raises OffloadError where the name stands for something else, a symbolic
    link for instance: nothing outside the folder that the user named is read or written.
    """
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        is_folder = stat.S_ISDIR(os.lstat(folder).st_mode)
    except OSError as error:
        raise offload_error(folder, error, 0) from error
    if not is_folder:
        problem = f"{folder} is no folder of its own; remove it, or name another in --offload-dir"
        raise OffloadError(errno.ENOTDIR, problem)


def write_atomically(
    path: Path, pieces: Iterable[Tensor], num_bytes: int, pool: ThreadPoolExecutor | None = None
) -> None:
    """Write ``pieces`` (uint8, host) one after another, padded to ALIGNMENT, under a temporary name; fsync; rename.
    With ``pool`` its threads write chunks of them, past the page cache where they are aligned.

    A crash leaves at most a dot-file, which nothing trusts and the next writer of ``path`` removes. Raises
    OffloadError.
    """
    size = align(num_bytes)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path, 0o600) as file:
            # A disk that is full says so before anything is written.
            os.posix_fallocate(file.fileno(), 0, max(size, 1))
            target, offset = DiskFile(path, descriptor=file.fileno()), 0
            requests: list[tuple[Tensor, int]] = []
            with contextlib.closing(target):
                for piece in pieces:
                    flat = piece.contiguous().view(-1)
                    requests += [(flat[start:end], offset + start) for start, end in chunks(len(flat))]
                    offset += len(flat)
                map_all(pool, lambda request: target.write(*request), requests)
    except OffloadError:
        raise
    except OSError as error:
        raise offload_error(path.parent, error, num_bytes) from error
