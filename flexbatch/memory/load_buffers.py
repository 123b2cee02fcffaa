"""Host memory that a load holds on the way: how much, and in buffers that are used again."""

from __future__ import annotations

import threading

from torch import Tensor

from flexbatch.memory.files import align
from flexbatch.memory.tiers import HostArena


class ByteBudget:
    """Bytes that several threads hold together, at most ``most_bytes``: whoever wants more waits. One that wants more
    than that alone gets it when nobody else holds any."""

    def __init__(self, most_bytes: int) -> None:
        self.most_bytes = most_bytes
        self.used_bytes = self.peak_bytes = 0
        self._changed = threading.Condition()

    def take(self, num_bytes: int) -> None:
        with self._changed:
            self._changed.wait_for(lambda: not self.used_bytes or self.used_bytes + num_bytes <= self.most_bytes)
            self.used_bytes += num_bytes
            self.peak_bytes = max(self.peak_bytes, self.used_bytes)

    def give(self, num_bytes: int) -> None:
        with self._changed:
            self.used_bytes -= num_bytes
            self._changed.notify_all()

    def check(self) -> None:
        """Invariant: what was given was taken."""
        assert 0 <= self.used_bytes <= self.peak_bytes, (self.used_bytes, self.peak_bytes)


class LoadBuffers:
    """Buffers for the content of files, as long as a tensor padded to ALIGNMENT, and kept for the next tensor of that
    size: layers are alike.

    On an H200's host new pages took 1.2 GB/s, and pageable ones are copied at 6 of 54 GB/s; so these are made of huge
    pages, and pinned where there is a GPU. Of those that nobody has, as many bytes are kept as all had at once.
    """

    def __init__(self, pinned: bool) -> None:
        self.pinned, self.least_bytes = pinned, 0
        """Bytes that a new buffer has at least: where few are in use, all are as long as the largest, since pinning
        waits for what the GPU does."""
        self.used_bytes = self.peak_bytes = 0
        self._kept: list[HostArena] = []
        self._used: dict[int, HostArena] = {}
        self._lock = threading.Lock()

    def take(self, num_bytes: int) -> Tensor:
        """uint8 [align(num_bytes)], of which nothing but the padding is zero."""
        size = max(align(num_bytes), self.least_bytes)
        with self._lock:
            arena = next((each for each in self._kept if each.num_bytes == size), None)
            if arena is not None:
                self._kept.remove(arena)
            self.used_bytes += size
            self.peak_bytes = max(self.peak_bytes, self.used_bytes)
            dropped = self._excess()
        for each in dropped:
            each.close()
        arena = arena or HostArena(size, self.pinned and size > 0)
        buffer = arena.tensor[: align(num_bytes)]
        buffer[num_bytes:] = 0
        with self._lock:
            self._used[buffer.data_ptr()] = arena
        return buffer

    def give(self, buffer: Tensor) -> None:
        """Nobody may read or write it any more."""
        with self._lock:
            arena = self._used.pop(buffer.data_ptr())
            self.used_bytes -= arena.num_bytes
            self._kept.append(arena)

    def _excess(self) -> list[HostArena]:
        """The oldest of those that are kept, where all together are more than were ever in use."""
        dropped = []
        while self._kept and self.used_bytes + sum(each.num_bytes for each in self._kept) > self.peak_bytes:
            dropped.append(self._kept.pop(0))
        return dropped

    def check(self) -> None:
        """Invariants: what is in use adds up, and nothing is in use and kept."""
        assert self.used_bytes == sum(each.num_bytes for each in self._used.values()), self.used_bytes
        assert not {each.tensor.data_ptr() for each in self._kept} & self._used.keys()

    def close(self) -> None:
        """Unpin and free all, those in use as well: a load that broke off gives none back."""
        for arena in (*self._kept, *self._used.values()):
            arena.close()
        self._kept.clear()
        self._used.clear()
        self.used_bytes = 0
