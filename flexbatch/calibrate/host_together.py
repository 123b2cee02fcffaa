"""What is left of host memory to each GPU's process while all of them use it: CPU attention on a part of the cores, and
the link beside it.

Memory is what they share, and how far it goes a single process does not show: on a host of two H100 OPT-30B's passes
moved 84 GB/s of weights and cache on one GPU and half of the cores, and 135 on two with all of them, where the rates of
one, doubled, promised 173.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch.distributed import Store

from flexbatch.calibrate.kernels import CONTEXT, HEAD_DIM, MIB, attention_call, cache_rows
from flexbatch.calibrate.measure import beside_copies
from flexbatch.memory.host_memory import host_memory_bytes
from flexbatch.parallel.mesh import Mesh
from flexbatch.policy.curve import Curve

KV_HEADS = 8
CACHE_BYTES = 1024 * MIB
"""Attended at one time by each process: more than processors keep in their own caches."""
SECONDS = 0.2
"""Of each measurement."""
MEASURED_ALONE = "host measured alone"
"""What the others wait for at the store: on a group of GPUs they would wait with a core of the host each."""


class Together(Protocol):
    """Of `interconnect.Ranks`."""

    mesh: Mesh
    device: torch.device
    dtype: torch.dtype
    shorter: int

    def slowest(self, seconds: float) -> float: ...


class HostTogether:
    """The processes of a host, which all do the same."""

    def __init__(self, ranks: Together, store: Store | None, threads: int) -> None:
        """store: of all of them, None where there is one. threads: of a process that has all cores."""
        self.ranks, self.store, self.threads = ranks, store, threads
        size = min(CACHE_BYTES // ranks.shorter, host_memory_bytes() // 16)
        tokens = max(1, size // (CONTEXT * 2 * KV_HEADS * HEAD_DIM * ranks.dtype.itemsize)) * CONTEXT
        rows = cache_rows(tokens, KV_HEADS, ranks.dtype, torch.device("cpu"))
        self.num_bytes = rows.numel() * rows.element_size()
        self.attend: Callable[[], object] = attention_call(rows, 1, CONTEXT, (KV_HEADS, KV_HEADS), ranks.dtype)

    def alone(self) -> tuple[float, ...]:
        """Rank 0 with all cores: bytes a second attended, attended beside the link, and copied beside that; on the
        other ranks nothing of use."""
        if self.ranks.mesh.rank == 0:
            found = self.rates()
            if self.store is not None:
                self.store.set(MEASURED_ALONE, "")
            return found
        assert self.store is not None
        self.store.wait([MEASURED_ALONE])
        return (0.0,) * 3

    def together(self) -> tuple[float, ...]:
        """The same of each rank while all of them do it with their parts of the cores: of the slowest."""
        torch.set_num_threads(max(1, self.threads // self.ranks.mesh.local_size))
        try:
            found = self.rates(lambda: self.ranks.slowest(0.0))
        finally:
            torch.set_num_threads(self.threads)
        return tuple(1 / self.ranks.slowest(1 / rate) for rate in found)

    def rates(self, begin: Callable[[], object] = lambda: None) -> tuple[float, ...]:
        self.attend()
        begin()
        calls, began = 0, time.perf_counter()
        while calls < 3 or time.perf_counter() - began < SECONDS / self.ranks.shorter:
            self.attend()
            calls += 1
        rate = calls * self.num_bytes / (time.perf_counter() - began)
        begin()
        return rate, *beside_copies(self.ranks.device, self.attend, self.num_bytes, SECONDS / self.ranks.shorter)

    def fields(self, alone: tuple[float, ...], together: tuple[float, ...]) -> dict[str, Any]:
        """Of `Hardware`: what each of all ranks has of its part, or of its link, the same on every rank."""
        size = self.ranks.mesh.size
        names = "cpu_attention_together", "cpu_attention_together_during_h2d", "h2d_together_during_cpu_attention"
        found = {}
        for name, one, each in zip(names, alone, together, strict=True):
            rate = self.ranks.slowest(one)  # that of rank 0
            part = rate if name == names[2] else rate / size
            found[name] = Curve((1.0, float(size)), (1.0, each / part))
        return found
