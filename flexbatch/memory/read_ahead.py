"""Disk weights through pinned staging, read as far ahead as there are buffers.

A working slab is free for a layer only when the layer two before it is done. That is too late for what comes from
the disk: a share of 1 % of OPT-6.7B is one matrix of 134 MB in two of its layers, which takes 70 ms to read, and two
layers hide 10 to 20 of them (on an H200 a pass took 0.33 s instead of 0.21). The staging buffers belong to no slab,
so that reading goes on through all the layers in between, and on into the next pass.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial

from torch import Tensor

from flexbatch.memory.files import ALIGNMENT, DiskFile, align, chunks, map_all
from flexbatch.memory.handles import READY, FutureHandle, Handle
from flexbatch.memory.transfer import TransferQueues
from flexbatch.memory.weight_plan import PlacedTensor


def read_tensors(tensors: Iterable[tuple[DiskFile, PlacedTensor]], host: Tensor, threads: ThreadPoolExecutor) -> None:
    """Read tensors from their files, in chunks by several threads, each to its offset. host: [bytes on disk] uint8."""
    jobs = [
        (file, host[placed.offset + start : placed.offset + end], start)
        for file, placed in tensors
        for start, end in chunks(align(placed.num_bytes))
    ]
    map_all(threads, lambda job: job[0].read(job[1], job[2]), jobs)


class ReadAhead:
    """Reads layers in the order in which passes use them, again and again; a buffer has one owner from the start of
    its read to the end of its copy."""

    def __init__(
        self,
        num_bytes: dict[int, int],
        buffers: Sequence[Tensor],
        read: Callable[[int, Tensor], None],
        queues: TransferQueues,
    ) -> None:
        """``num_bytes``: on disk of each layer that has any, in order. ``buffers``: uint8, as long as the largest.
        ``read(layer, buffer)`` blocks."""
        self.num_bytes, self.buffers, self.read, self.queues = num_bytes, list(buffers), read, queues
        self.layers = list(num_bytes)
        self.next_index = 0
        self.reads: dict[int, tuple[int, FutureHandle]] = {}
        """Layers that are read or being read: their buffer, and when they are there."""
        self.free_after: list[Handle] = [READY] * len(self.buffers)

    def expect(self, layer: int) -> None:
        """Start reading at ``layer``, unless it is being read: a job may have ended before the layer that is next."""
        if layer not in self.reads:
            self.forget()
            self.next_index = self.layers.index(layer)
            self.fill()

    def fill(self) -> None:
        """Read the next layers into the buffers that nobody owns."""
        owned = {buffer for buffer, _ in self.reads.values()}
        for buffer in range(len(self.buffers)):
            layer = self.layers[self.next_index]
            if buffer in owned or layer in self.reads:
                continue
            job = partial(self.read, layer, self.buffers[buffer][: self.num_bytes[layer]])
            self.reads[layer] = (
                buffer,
                self.queues.disk_read.submit(job, self.free_after[buffer], f"weights {layer}", self.num_bytes[layer]),
            )
            self.next_index = (self.next_index + 1) % len(self.layers)

    def arrived(self, layer: int) -> bool:
        """Whether the layer is there, so that `copy_to_device` need not wait."""
        return layer in self.reads and self.reads[layer][1].done

    def copy_to_device(self, layer: int, target: Tensor, after: Handle) -> Handle:
        """Copy what was read of ``layer`` to ``target`` on the compute device once ``after`` is done; waits for the
        read, and raises its error."""
        self.expect(layer)
        buffer, read = self.reads.pop(layer)
        read.synchronize()
        rows, target_rows = (x.view(-1, ALIGNMENT) for x in (self.buffers[buffer][: self.num_bytes[layer]], target))
        handle = self.queues.staged.submit(
            lambda: self.queues.copy_to_device(rows, target_rows),
            after,
            f"weights {layer} from disk",
            self.num_bytes[layer],
        )
        self.free_after[buffer] = handle
        self.fill()
        return handle

    def forget(self) -> None:
        """Wait for the reads under way, and use none of them: nobody waits for their errors."""
        self.queues.disk_read.synchronize()
        self.reads.clear()

    def forget_failed(self) -> None:
        """Use none of the reads that have ended with an error: whoever needs the layer has it read again."""
        self.reads = {layer: (buffer, read) for layer, (buffer, read) in self.reads.items() if not read.failed}

    def check(self) -> None:
        """Invariant: a buffer has one owner."""
        owners = [buffer for buffer, _ in self.reads.values()]
        assert len(owners) == len(set(owners)) <= len(self.buffers), self.reads
        assert set(self.reads) <= set(self.layers), (self.reads.keys(), self.layers)

    def close(self) -> None:
        self.forget()
        for handle in self.free_after:
            handle.synchronize()
        self.buffers.clear()
