"""Disk rates with the page cache out of the way: O_DIRECT where the file system has it, several threads, several
block sizes."""

from __future__ import annotations

import mmap
import os
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from flexbatch.policy.limits import DISK_THREADS

BLOCKS = (2**20, 2**22, 2**23)
"""Up to what the executor asks for in one request."""
LATENCY_READ_BYTES = 2**14


def _open(path: Path, flags: int) -> int:
    """With O_DIRECT, or without where the file system refuses it (tmpfs)."""
    try:
        return os.open(path, flags | getattr(os, "O_DIRECT", 0), 0o600)
    except OSError:
        return os.open(path, flags, 0o600)


def _requests(descriptor: int, block: int, num_bytes: int, write: bool) -> float:
    """Seconds of one request of ``block`` bytes, when the file's ``num_bytes`` are spread over the threads."""
    count = num_bytes // block

    def one_thread(index: int) -> None:
        # mmap gives memory aligned to pages, as O_DIRECT asks.
        with mmap.mmap(-1, block) as buffer:
            if write:
                buffer.write(os.urandom(4096) * (block // 4096))
            view = memoryview(buffer)
            for request in range(index, count, DISK_THREADS):
                if write:
                    os.pwritev(descriptor, [view], request * block)
                else:
                    os.preadv(descriptor, [view], request * block)
            view.release()

    start = time.perf_counter()
    with ThreadPoolExecutor(DISK_THREADS) as pool:
        list(pool.map(one_thread, range(DISK_THREADS)))
    if write:
        os.fsync(descriptor)
    return (time.perf_counter() - start) / count


def _latency(descriptor: int, requests: int = 64) -> float:
    """Seconds of one small read after another: what a request costs whatever its size."""
    with mmap.mmap(-1, LATENCY_READ_BYTES) as buffer, memoryview(buffer) as view:
        start = time.perf_counter()
        for request in range(requests):
            os.preadv(descriptor, [view], request * BLOCKS[0])
        return (time.perf_counter() - start) / requests


def measure_disk(
    folder: Path, size: int, seconds: float
) -> tuple[list[tuple[int, float]], list[tuple[int, float]], float]:
    """(reads, writes, latency): lists of (block bytes, seconds of one request) in a temporary file of ``size`` bytes in
    ``folder``, within about ``seconds``; and the seconds of a small read.

    Raises OSError when the folder cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    deadline = time.perf_counter() + seconds
    with tempfile.TemporaryDirectory(prefix="profile-", dir=folder) as temporary:
        path = Path(temporary) / "blocks"
        descriptor = _open(path, os.O_RDWR | os.O_CREAT)
        try:
            # As the engine's cache file: allocated, then written for the first time. Writing again what is there
            # already is another matter (3.3 GB/s instead of 0.9 on a virtual disk). One rate for the whole file: what
            # disks buffer makes the first part of any file look fast.
            whole = size // BLOCKS[-1] * BLOCKS[-1]
            os.posix_fallocate(descriptor, 0, whole)
            writes = [(BLOCKS[1], _requests(descriptor, BLOCKS[1], whole, write=True))]
            if hasattr(os, "posix_fadvise"):
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            latency = _latency(descriptor, min(64, whole // BLOCKS[0]))
            # All of the file each time: thirds of it, 0.15 seconds each, differed by 40 % on a virtual disk whose rate
            # changes as it is used.
            reads: list[tuple[int, float]] = []
            for block in reversed(BLOCKS):
                if not reads or time.perf_counter() < deadline:
                    reads.append((block, _requests(descriptor, block, whole, write=False)))
        finally:
            os.close(descriptor)
    return reads, writes, latency
