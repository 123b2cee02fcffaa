"""Small tensors from the host to the compute device, past the copy engine (`TransferQueues.copy_to_device`)."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from flexbatch.memory.files import align
from flexbatch.memory.tiers import Pool
from flexbatch.memory.transfer import READY, ROW_BYTES, Handle, TransferQueues
from flexbatch.policy.limits import INPUT_BUFFER_BYTES


class Uploads:
    """A pinned buffer in two halves: one is filled for the coming pass while the device may still read the other. On
    the CPU nothing is copied."""

    def __init__(self, host: Pool, queues: TransferQueues) -> None:
        self.queues, self.device, self.host = queues, queues.device, host
        self.copies = self.device.type == "cuda"
        self.halves = (
            list(host.allocate("inputs", 2 * INPUT_BUFFER_BYTES).view(2, INPUT_BUFFER_BYTES)) if self.copies else []
        )
        self.read: list[Handle] = [READY, READY]
        self.half, self.cursor = 0, 0

    def begin_pass(self) -> None:
        """Switch to the other half, once the device has read what was there two passes ago."""
        if self.copies:
            self.read[self.half] = self.queues.mark()
            self.half, self.cursor = 1 - self.half, 0
            self.read[self.half].synchronize()

    def send(self, array: np.ndarray) -> Tensor:
        """Returns the array as a tensor on the compute device."""
        source = torch.from_numpy(array)
        if not self.copies or array.size == 0:
            return source.to(self.device)
        num_bytes = align(array.nbytes, ROW_BYTES)
        if self.cursor + num_bytes > INPUT_BUFFER_BYTES:
            return source.to(self.device, non_blocking=True)
        staged = self.halves[self.half][self.cursor : self.cursor + num_bytes]
        self.cursor += num_bytes
        staged[: array.nbytes].copy_(source.view(-1).view(torch.uint8))
        target = torch.empty(num_bytes, dtype=torch.uint8, device=self.device)
        self.queues.copy_to_device(staged.view(-1, ROW_BYTES), target.view(-1, ROW_BYTES))
        return target[: array.nbytes].view(source.dtype).view(source.shape)

    def check(self) -> None:
        """Invariant: the cursor lies inside the half, at a whole row."""
        assert 0 <= self.cursor <= INPUT_BUFFER_BYTES and self.cursor % ROW_BYTES == 0, self.cursor

    def close(self) -> None:
        for handle in self.read:
            handle.synchronize()
        self.halves.clear()
        self.host.free("inputs")
