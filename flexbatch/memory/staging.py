"""Tensors of mapped files on their way to a GPU: their pages are touched, copied to pinned memory and sent from there.

The driver copies from pageable memory at 6 of an H200's 54 GB/s, since it touches page after page and copies what it
has read to a small pinned buffer of its own, all in the calling thread. Here the next part is touched and copied while
the one before crosses the link, in as many threads as call.
"""

from __future__ import annotations

import ctypes
import mmap
import threading

import torch
from torch import Tensor

from flexbatch.memory.tiers import HostArena

STAGED_BYTES = 8 << 20
"""Of one part, of which every thread holds two."""
SMALL_BYTES = 1 << 20
"""Of tensors that are not worth it: norms and biases."""
POPULATE_READ = 22
"""MADV_POPULATE_READ of Linux 5.14: maps a range at once. Page after page it takes up to twice as long."""


class _Slots:
    """The pinned memory of one thread, in two halves."""

    def __init__(self) -> None:
        self.arena = HostArena(2 * STAGED_BYTES, pinned=True)
        self.free_after = [torch.cuda.Event(), torch.cuda.Event()]
        self.next = 0


class Staging:
    """Copies to ``device``, a GPU, and to the pinned memory of its host. Every thread has buffers of its own."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._own = threading.local()
        self._slots: list[_Slots] = []
        self._lock = threading.Lock()
        self._libc = ctypes.CDLL(None)
        self._libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]

    def to_device(self, source: Tensor) -> Tensor:
        """A copy there, enqueued on the current stream; ``source`` may be dropped at once."""
        return self.copy(torch.empty(source.shape, dtype=source.dtype, device=self.device), source)

    def copy(self, target: Tensor, source: Tensor) -> Tensor:
        """``target.copy_(source)``, enqueued on the current stream; ``source`` may be dropped at once."""
        alike = source.shape == target.shape and source.is_contiguous() and target.is_contiguous()
        if source.is_cuda or not alike or source.nbytes < SMALL_BYTES:
            return target.copy_(source)
        if target.is_cuda:
            return self._send(target, source)
        if source.dtype != target.dtype:
            return target.copy_(source)
        for first in range(0, source.nbytes, STAGED_BYTES):
            self._move(target.data_ptr() + first, source.data_ptr() + first, min(STAGED_BYTES, source.nbytes - first))
        return target

    def _send(self, target: Tensor, source: Tensor) -> Tensor:
        flat, values, step = target.view(-1), source.view(-1), STAGED_BYTES // source.element_size()
        if not hasattr(self._own, "slots"):
            self._own.slots = _Slots()
            with self._lock:
                self._slots.append(self._own.slots)
        slots: _Slots = self._own.slots
        for first in range(0, len(values), step):
            part, turn = values[first : first + step], slots.next
            slots.next = 1 - turn
            slots.free_after[turn].synchronize()
            staged = slots.arena.tensor[turn * STAGED_BYTES :][: part.nbytes]
            self._move(staged.data_ptr(), part.data_ptr(), part.nbytes)
            staged = staged.view(part.dtype)
            if part.dtype != flat.dtype:  # what is smaller crosses the link more often than not
                staged = staged.to(self.device, non_blocking=True)
            flat[first : first + step].copy_(staged, non_blocking=True)
            slots.free_after[turn].record()
        return target

    def _move(self, target: int, source: int, num_bytes: int) -> None:
        """Without the interpreter's lock. A system that cannot map the pages at once does it one by one."""
        begin = source // mmap.PAGESIZE * mmap.PAGESIZE
        self._libc.madvise(begin, source + num_bytes - begin, POPULATE_READ)
        ctypes.memmove(target, source, num_bytes)

    def close(self) -> None:
        """Unpin what the threads have; none may be at work."""
        for slots in self._slots:
            for event in slots.free_after:
                event.synchronize()
            slots.arena.close()
        self._slots.clear()
        self._own = threading.local()
