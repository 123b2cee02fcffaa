"""Pools of the three tiers: budgets, and exact-size (pinned) host arenas."""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import traceback
import weakref
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from flexbatch.kernels.threads import usable_processors
from flexbatch.memory.files import ALIGNMENT, DiskFile, align
from flexbatch.policy.shortage import shortage_text
from flexbatch.policy.units import GIB
from flexbatch.validation.errors import DoesNotFitError


@dataclass(frozen=True)
class MemoryRequirement:
    """One line of the table that says what needs how much."""

    what: str
    tier: str
    num_bytes: int


def check_budgets(needs: Iterable[MemoryRequirement], budgets: dict[str, int]) -> None:
    """Raise DoesNotFitError with a table when the needs of a tier exceed its budget (bytes)."""
    needs = list(needs)
    totals = {tier: sum(need.num_bytes for need in needs if need.tier == tier) for tier in budgets}
    short = [tier for tier, budget in budgets.items() if totals[tier] > budget]
    if not short:
        return
    by_name = {need.what: dict.fromkeys(budgets, 0) for need in needs if need.tier in budgets}
    for need in needs:
        if need.tier in budgets:
            by_name[need.what][need.tier] += need.num_bytes
    raise DoesNotFitError(shortage_text("the plan does not fit the memory budgets", by_name, budgets))


class HostArena:
    """One exact-size piece of host memory, pinned when a CUDA device will read it.

    torch's own pinned allocator rounds up to powers of two, which wastes 20 to 30 % of the host for the sizes that
    matter here. The mapping is private because Linux gives shared memory no huge pages unless told to. With them 4.5
    GiB are touched and pinned in 0.2 s instead of 1.3 (H200's host), and CPU attention reads 5 % faster.
    """

    def __init__(self, num_bytes: int, pinned: bool) -> None:
        self.num_bytes, self.pinned = num_bytes, pinned
        self.mapping = mmap.mmap(-1, max(align(num_bytes), ALIGNMENT), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        # Not for a child: writing after a fork would move a page away from where a device or an unbuffered read
        # (open(2), O_DIRECT) puts its data.
        for advice in ("MADV_HUGEPAGE", "MADV_DONTFORK"):
            if hasattr(mmap, advice):
                with contextlib.suppress(OSError):
                    self.mapping.madvise(getattr(mmap, advice))
        self.tensor = torch.frombuffer(self.mapping, dtype=torch.uint8)[:num_bytes]
        self.registered = False
        if pinned:
            touch_pages(self.tensor)
            status = torch.cuda.cudart().cudaHostRegister(self.tensor.data_ptr(), len(self.mapping), 0)
            if int(status) != 0:
                raise DoesNotFitError(
                    f"pinning {num_bytes / GIB:.2f} GiB of host memory failed (CUDA error {int(status)}); lower "
                    "--cpu-memory or the CPU shares of --percent"
                )
            self.registered = True
            self.finalizer = weakref.finalize(self, torch.cuda.cudart().cudaHostUnregister, self.tensor.data_ptr())

    def close(self) -> None:
        """Unpin. The memory itself goes when the last view of it does."""
        if self.registered:
            self.finalizer()
            self.registered = False


def touch_pages(tensor: Tensor) -> None:
    """Fault the pages in with many threads before pinning does it with one (a virtual machine grows its memory on
    first touch)."""
    chunk = 32 << 20

    def touch(start: int) -> None:
        part = tensor[start : start + chunk]
        ctypes.memset(part.data_ptr(), 0, part.numel())

    with ThreadPoolExecutor(min(16, usable_processors())) as pool:
        list(pool.map(touch, range(0, tensor.numel(), chunk)))


class Pool:
    """Accounts for the bytes of one tier against its budget; owns the host arenas of the cpu tier and the scratch files
    of the disk tier. What fails to be made is not accounted for.
    """

    def __init__(self, tier: str, budget_bytes: int, pinned: bool = False, device: torch.device | None = None) -> None:
        self.tier, self.budget_bytes, self.pinned = tier, budget_bytes, pinned
        self.device = device or torch.device("cpu")
        self.used_bytes: dict[str, int] = {}
        self.peak_bytes = 0
        self.arenas: dict[str, HostArena] = {}
        self.files: dict[str, DiskFile] = {}

    @property
    def total_used_bytes(self) -> int:
        return sum(self.used_bytes.values())

    def reserve(self, what: str, num_bytes: int) -> None:
        """Account for bytes; raises DoesNotFitError when the budget is short."""
        needs = [
            *(MemoryRequirement(name, self.tier, used) for name, used in self.used_bytes.items()),
            MemoryRequirement(what, self.tier, num_bytes),
        ]
        check_budgets(needs, {self.tier: self.budget_bytes})
        self.used_bytes[what] = self.used_bytes.get(what, 0) + num_bytes
        self.peak_bytes = max(self.peak_bytes, self.total_used_bytes)

    def allocate(self, what: str, num_bytes: int) -> Tensor:
        """A uint8 tensor [num_bytes] of this tier, under the name ``what`` (one allocation per name)."""
        assert what not in self.used_bytes, f"{what} is allocated on {self.tier} already"
        self.reserve(what, num_bytes)
        try:
            if self.tier == "cpu" or self.device.type == "cpu":
                arena = HostArena(num_bytes, self.pinned and num_bytes > 0)
                self.arenas[what] = arena
                return arena.tensor
            return torch.empty(num_bytes, dtype=torch.uint8, device=self.device)
        except BaseException:
            self.free(what)
            raise

    def open_file(self, what: str, folder: Path, num_bytes: int) -> DiskFile:
        """A file of the disk tier without a name, for reading and writing, under the name ``what`` in the accounts."""
        assert what not in self.used_bytes, f"{what} is open on {self.tier} already"
        self.reserve(what, num_bytes)
        try:
            file = self.files[what] = DiskFile(folder / what.replace(" ", "-"), num_bytes)
            return file
        except BaseException:
            self.free(what)
            raise

    def free(self, what: str) -> None:
        self.used_bytes.pop(what, None)
        arena, file = self.arenas.pop(what, None), self.files.pop(what, None)
        if file is not None:
            file.close()
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
        for what, file in self.files.items():
            assert self.used_bytes[what] <= file.num_bytes, (what, self.used_bytes[what], file.num_bytes)


@dataclass
class Tiers:
    """The three pools. Without a GPU the ``gpu`` pool is plain memory with a budget."""

    gpu: Pool
    cpu: Pool
    disk: Pool
    offload_dir: Path

    @property
    def pools(self) -> tuple[Pool, Pool, Pool]:
        return self.gpu, self.cpu, self.disk

    @contextlib.contextmanager
    def all_or_nothing(self) -> Iterator[Callable[[], None]]:
        """Keep what is allocated and opened in the body if all of it succeeds; else free all of it. Yields a function
        that frees it later.
        """
        before = [set(pool.used_bytes) for pool in self.pools]

        def undo() -> None:
            for pool, names in zip(self.pools, before, strict=True):
                for what in [name for name in pool.used_bytes if name not in names]:
                    pool.free(what)

        try:
            yield undo
        except BaseException as error:
            undo()
            # The frames of the error hold what they had allocated for as long as it is handled, and longer at a prompt.
            traceback.clear_frames(error.__traceback__)
            raise

    def check(self) -> None:
        for pool in self.pools:
            pool.check()

    def close(self) -> None:
        for pool in self.pools:
            pool.close()
