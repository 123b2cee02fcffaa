"""Small values between the host and the compute device, without a wait for what the device still has to do.

``torch.tensor(values, device="cuda")`` and an index that is a Python list wait for the stream: in the middle of a pass
each of them holds the host up until all layers have run.
"""

from __future__ import annotations

from collections.abc import Sequence as Many

import numpy as np
import torch
from torch import Tensor

from flexbatch.kernels.streams import current_stream


def sent(values: Many[float] | Many[int] | np.ndarray, dtype: torch.dtype, device: torch.device | str) -> Tensor:
    """Values of the host as a tensor on the device, ordered like what is launched there."""
    host, device = torch.as_tensor(values, dtype=dtype), torch.device(device)
    return host.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else host.to(device)


class Readback:
    """Tensors on their way to the host. Whoever asks for them waits until they are there."""

    def __init__(self, *tensors: Tensor) -> None:
        self._arrived: torch.cuda.Event | None = None
        self._host = list(tensors)
        if tensors and tensors[0].is_cuda:
            self._host = [torch.empty(each.shape, dtype=each.dtype, pin_memory=True) for each in tensors]
            for host, tensor in zip(self._host, tensors, strict=True):
                host.copy_(tensor, non_blocking=True)
            self._arrived = torch.cuda.Event()
            self._arrived.record(current_stream(tensors[0].device))

    def take(self) -> list[Tensor]:
        """The tensors on the host."""
        if self._arrived is not None:
            self._arrived.synchronize()
        return self._host
