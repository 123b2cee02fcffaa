"""Pools of the three tiers: budgets, exact-size (pinned) host arenas, and aligned files on disk."""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import glob
import math
import mmap
import os
import weakref
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from flexbatch.config import DoesNotFitError

ALIGNMENT = 4096
"""Bytes. Offsets and lengths of O_DIRECT transfers, and of every tensor in a slab that the disk fills."""
GIB = 1 << 30
READ_CHUNK_BYTES = 8 << 20
"""Bytes of one disk request: 8 MiB reads reach the device's rate with 4 to 8 threads."""


def align(num_bytes: int, alignment: int = ALIGNMENT) -> int:
    return -(-num_bytes // alignment) * alignment


class OffloadError(OSError):
    """The disk tier cannot be used: the message names the folder, the cause and the remedy."""


@dataclass(frozen=True)
class Need:
    """One line of the table that says what needs how much."""

    what: str
    tier: str
    num_bytes: int


def check_budgets(needs: Iterable[Need], budgets: dict[str, int]) -> None:
    """Raise DoesNotFitError with a table when the needs of a tier exceed its budget (bytes)."""
    needs = list(needs)
    totals = {tier: sum(need.num_bytes for need in needs if need.tier == tier) for tier in budgets}
    short = [tier for tier, budget in budgets.items() if totals[tier] > budget]
    if not short:
        return
    rows = [f"  {need.what:<28} {need.tier:<5} {need.num_bytes / GIB:>10.3f} GiB" for need in needs if need.num_bytes]
    sums = [
        f"  {'total':<28} {tier:<5} {totals[tier] / GIB:>10.3f} GiB of {budgets[tier] / GIB:.3f} GiB" + ("   <- does not fit" if tier in short else "")
        for tier in budgets
    ]
    remedy = {
        "gpu": "lower the first number of a pair in --percent, --gpu-batch-size or --prefill-chunk, or raise --gpu-memory",
        "cpu": "move more to disk with --percent, use fewer bits (--weight-bits, --cache-bits) or a smaller block, or raise --cpu-memory",
        "disk": "free space in --offload-dir or name another folder",
    }
    advice = "; ".join(f"{tier}: {remedy[tier]}" for tier in short)
    raise DoesNotFitError("\n".join(["the plan does not fit the memory budgets", *rows, *sums, f"  remedy: {advice}"]))


class HostArena:
    """One exact-size block of host memory, pinned when a CUDA device will read it.

    torch's own pinned allocator rounds up to powers of two, which wastes 20 to 30 % of the host for the sizes that matter here.
    """

    def __init__(self, num_bytes: int, pinned: bool) -> None:
        self.num_bytes, self.pinned = num_bytes, pinned
        self.mapping = mmap.mmap(-1, max(align(num_bytes), ALIGNMENT))
        if hasattr(mmap, "MADV_HUGEPAGE") and num_bytes >= 1 << 21:
            with contextlib.suppress(OSError):
                self.mapping.madvise(mmap.MADV_HUGEPAGE)
        self.tensor = torch.frombuffer(self.mapping, dtype=torch.uint8)[:num_bytes]
        self.registered = False
        if pinned:
            touch_pages(self.tensor)
            status = torch.cuda.cudart().cudaHostRegister(self.tensor.data_ptr(), len(self.mapping), 0)
            if int(status) != 0:
                raise DoesNotFitError(
                    f"pinning {num_bytes / GIB:.2f} GiB of host memory failed (CUDA error {int(status)}); lower --cpu-memory or the CPU shares of --percent"
                )
            self.registered = True
            self.finalizer = weakref.finalize(self, torch.cuda.cudart().cudaHostUnregister, self.tensor.data_ptr())

    def close(self) -> None:
        """Unpin. The memory itself goes when the last view of it does."""
        if self.registered:
            self.finalizer()
            self.registered = False


def touch_pages(tensor: Tensor) -> None:
    """Fault the pages in with many threads before pinning does it with one (a virtual machine grows its memory on first touch)."""
    chunk = 256 << 20

    def touch(start: int) -> None:
        part = tensor[start : start + chunk]
        ctypes.memset(part.data_ptr(), 0, part.numel())

    with ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool:
        list(pool.map(touch, range(0, tensor.numel(), chunk)))


class Pool:
    """Accounts for the bytes of one tier against its budget; owns the host arenas of the cpu tier."""

    def __init__(self, tier: str, budget_bytes: int, pinned: bool = False, device: torch.device | None = None) -> None:
        self.tier, self.budget_bytes, self.pinned = tier, budget_bytes, pinned
        self.device = device or torch.device("cpu")
        self.used_bytes: dict[str, int] = {}
        self.peak_bytes = 0
        self.arenas: dict[str, HostArena] = {}

    @property
    def total_used_bytes(self) -> int:
        return sum(self.used_bytes.values())

    def reserve(self, what: str, num_bytes: int) -> None:
        """Account for bytes; raises DoesNotFitError when the budget is short."""
        needs = [*(Need(name, self.tier, used) for name, used in self.used_bytes.items()), Need(what, self.tier, num_bytes)]
        check_budgets(needs, {self.tier: self.budget_bytes})
        self.used_bytes[what] = self.used_bytes.get(what, 0) + num_bytes
        self.peak_bytes = max(self.peak_bytes, self.total_used_bytes)

    def allocate(self, what: str, num_bytes: int) -> Tensor:
        """A uint8 tensor [num_bytes] of this tier, under the name ``what`` (one allocation per name)."""
        assert what not in self.used_bytes, f"{what} is allocated on {self.tier} already"
        self.reserve(what, num_bytes)
        if self.tier == "cpu" or self.device.type == "cpu":
            arena = HostArena(num_bytes, self.pinned and num_bytes > 0)
            self.arenas[what] = arena
            return arena.tensor
        return torch.empty(num_bytes, dtype=torch.uint8, device=self.device)

    def free(self, what: str) -> None:
        self.used_bytes.pop(what, None)
        arena = self.arenas.pop(what, None)
        if arena is not None:
            arena.close()

    def close(self) -> None:
        for what in list(self.used_bytes):
            self.free(what)

    def check(self) -> None:
        """Invariants: within budget, every arena accounted for at its exact size."""
        assert 0 <= self.total_used_bytes <= self.budget_bytes, (self.tier, self.total_used_bytes, self.budget_bytes)
        assert self.peak_bytes >= self.total_used_bytes
        for what, arena in self.arenas.items():
            assert self.used_bytes[what] == arena.num_bytes, (what, self.used_bytes[what], arena.num_bytes)


@dataclass
class Tiers:
    """The three pools. Without a GPU the ``gpu`` pool is plain memory with a budget."""

    gpu: Pool
    cpu: Pool
    disk: Pool
    offload_dir: Path

    def check(self) -> None:
        for pool in (self.gpu, self.cpu, self.disk):
            pool.check()

    def close(self) -> None:
        for pool in (self.gpu, self.cpu, self.disk):
            pool.close()


class DiskFile:
    """A file of the disk tier, read and written in place with O_DIRECT where the file system allows it.

    Offsets, lengths and buffers are multiples of ALIGNMENT for direct transfers; others go through the page cache.
    """

    def __init__(self, path: Path, num_bytes: int | None = None) -> None:
        """Open ``path`` for reading, or with ``num_bytes`` create it for reading and writing at that size."""
        self.path = path
        flags = os.O_RDONLY if num_bytes is None else os.O_RDWR | os.O_CREAT | os.O_TRUNC
        try:
            self.buffered = os.open(path, flags, 0o600)
        except OSError as error:
            raise offload_error(path.parent, error, num_bytes or 0) from error
        if num_bytes is not None:
            try:
                os.posix_fallocate(self.buffered, 0, max(num_bytes, 1))
            except OSError as error:
                # What a full disk could still give would stay taken.
                os.close(self.buffered)
                path.unlink()
                raise offload_error(path.parent, error, num_bytes) from error
        try:
            self.direct = os.open(path, (flags & ~(os.O_CREAT | os.O_TRUNC)) | getattr(os, "O_DIRECT", 0))
        except OSError:
            self.direct = self.buffered

    def read(self, buffer: Tensor, offset: int) -> None:
        """Fill ``buffer`` (uint8, host) from ``offset``. Raises OffloadError on a short or failed read."""
        self.transfer(buffer, offset, os.preadv, "read")

    def write(self, buffer: Tensor, offset: int) -> None:
        self.transfer(buffer, offset, os.pwritev, "write")

    def transfer(self, buffer: Tensor, offset: int, operation: Callable[..., int], verb: str) -> None:
        done, size = 0, buffer.numel()
        view = memoryview((ctypes.c_uint8 * size).from_address(buffer.data_ptr())).cast("B") if size else memoryview(b"")
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
                raise OffloadError(f"{self.path}: {verb} of {size} bytes at {offset} ended after {done}; delete the file, it will be written again")
            done += count
            if done % ALIGNMENT:
                descriptor = self.buffered

    def close(self) -> None:
        for descriptor in {self.buffered, self.direct}:
            os.close(descriptor)


def aligned_empty(num_bytes: int) -> Tensor:
    """uint8 [num_bytes] on the host at a multiple of ALIGNMENT, as direct transfers need it; torch aligns to 64 bytes."""
    buffer = torch.empty(num_bytes + ALIGNMENT, dtype=torch.uint8)
    start = -buffer.data_ptr() % ALIGNMENT
    return buffer[start : start + num_bytes]


def chunks(num_bytes: int, chunk_bytes: int = READ_CHUNK_BYTES) -> list[tuple[int, int]]:
    """(start, end) byte ranges of at most ``chunk_bytes``."""
    return [(start, min(start + chunk_bytes, num_bytes)) for start in range(0, num_bytes, chunk_bytes)]


def offload_error(folder: Path, error: OSError, num_bytes: int) -> OffloadError:
    """One clear error for a disk tier that is read-only, full, or not a folder."""
    free = ""
    with contextlib.suppress(OSError):
        space = os.statvfs(folder)
        free = f"; {space.f_bavail * space.f_frsize / GIB:.2f} GiB free there"
    return OffloadError(
        error.errno,
        f"offload folder {folder}: {error.strerror or error} (needed {num_bytes / GIB:.3f} GiB{free}); name a writable folder with room in --offload-dir",
    )


def prepare_offload_dir(folder: Path) -> None:
    """Create the folder and show that it can be written. Raises OffloadError."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".probe-{os.getpid()}"
        probe.write_bytes(b"x")
        probe.unlink()
    except OSError as error:
        raise offload_error(folder, error, 0) from error


def write_atomically(path: Path, pieces: Iterable[Tensor], num_bytes: int) -> None:
    """Write ``pieces`` (uint8, host) one after another, padded to ALIGNMENT, under a temporary name; fsync; rename.

    A crash leaves at most a dot-file, which nothing trusts and the next writer of ``path`` removes. Raises OffloadError.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        remove_leftovers(path)
        with open_locked(temporary) as file:
            for piece in pieces:
                file.write(piece.contiguous().view(-1).numpy().data)
            file.write(b"\0" * (align(num_bytes) - file.tell()))
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        # Ctrl-C too: only a process that is killed leaves the dot-file.
        with contextlib.suppress(OSError):
            temporary.unlink()
        if isinstance(error, OSError):
            raise offload_error(path.parent, error, num_bytes) from error
        raise


def open_locked(path: Path) -> BinaryIO:
    """Open for writing, with a lock that ends with the process: it tells work in progress from what a killed run has left."""
    while True:
        file = open(path, "wb")  # noqa: SIM115 (the caller closes it)
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.flock(file, fcntl.LOCK_EX)
        if os.fstat(file.fileno()).st_nlink:
            return file
        file.close()  # Removed between opening and locking: taken for a leftover.


def remove_leftovers(path: Path) -> None:
    """Unlink temporary files of ``path`` that nobody is writing."""
    for temporary in path.parent.glob(f".{glob.escape(path.name)}.*.tmp"):
        with contextlib.suppress(OSError), open(temporary, "rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            temporary.unlink()


def slices(num_bytes: int, index: int, count: int, alignment: int = 256) -> tuple[int, int]:
    """The ``index``-th of ``count`` contiguous byte ranges, cut at multiples of ``alignment``."""
    step = align(math.ceil(num_bytes / count), alignment)
    return min(index * step, num_bytes), min((index + 1) * step, num_bytes)
