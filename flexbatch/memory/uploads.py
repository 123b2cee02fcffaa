"""Small tensors from the host to the compute device, past the copy engine (`TransferQueues.copy_to_device`)."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from flexbatch.memory.files import align
from flexbatch.memory.handles import READY, Handle
from flexbatch.memory.tiers import Pool
from flexbatch.memory.transfer import ROW_BYTES, TransferQueues
from flexbatch.policy.limits import INPUT_BUFFER_BYTES

PACKET_BYTES = 1 << 20
"""Of the device's memory for what comes in one copy, at least."""


class Uploads:
    """A pinned buffer in two halves: one is filled for the coming pass while the device may still read the other. What
    is sent comes in one copy, with the next `flush`: a dozen small copies took the host half a millisecond a pass. On
    the CPU nothing is copied."""

    def __init__(self, host: Pool, queues: TransferQueues) -> None:
        self.queues, self.device, self.host = queues, queues.device, host
        self.copies = self.device.type == "cuda"
        self.halves = (
            list(host.allocate("inputs", 2 * INPUT_BUFFER_BYTES).view(2, INPUT_BUFFER_BYTES)) if self.copies else []
        )
        self.read: list[Handle] = [READY, READY]
        self.half, self.cursor = 0, 0
        self.flushed = 0
        """What is before it in the half has been copied."""
        self.target: Tensor | None = None
        """On the device, for what is behind it."""

    def begin_pass(self) -> None:
        """Switch to the other half, once the device has read what was there two passes ago."""
        if self.copies:
            self.read[self.half] = self.queues.mark()
            self.half, self.cursor, self.flushed = 1 - self.half, 0, 0
            self.read[self.half].synchronize()

    def send(self, array: np.ndarray) -> Tensor:
        """Returns the array as a tensor on the compute device, which has its values after the next `flush`."""
        source = torch.from_numpy(array)
        if not self.copies or array.size == 0:
            return source.to(self.device)
        num_bytes = align(array.nbytes, ROW_BYTES)
        if self.cursor + num_bytes > INPUT_BUFFER_BYTES:
            return source.to(self.device, non_blocking=True)
        if self.target is None or self.cursor - self.flushed + num_bytes > len(self.target):
            self.flush()
            self.target = torch.empty(max(num_bytes, PACKET_BYTES), dtype=torch.uint8, device=self.device)
        self.halves[self.half][self.cursor : self.cursor + array.nbytes].copy_(source.view(-1).view(torch.uint8))
        start, self.cursor = self.cursor - self.flushed, self.cursor + num_bytes
        return self.target[start : start + array.nbytes].view(source.dtype).view(source.shape)

    def flush(self) -> None:
        """Copy all that was sent since the last call."""
        count, target, self.target = self.cursor - self.flushed, self.target, None
        if target is not None and count:
            staged = self.halves[self.half][self.flushed : self.cursor]
            self.queues.copy_to_device(staged.view(-1, ROW_BYTES), target[:count].view(-1, ROW_BYTES))
        self.flushed = self.cursor

    def check(self) -> None:
        """Invariants: the cursor lies inside the half, at a whole row, and between passes all is on its way."""
        assert self.flushed == self.cursor, (self.flushed, self.cursor)
        assert 0 <= self.cursor <= INPUT_BUFFER_BYTES and self.cursor % ROW_BYTES == 0, self.cursor

    def close(self) -> None:
        for handle in self.read:
            handle.synchronize()
        self.halves.clear()
        self.host.free("inputs")
