"""CUDA streams by the number of their device."""

from __future__ import annotations

import torch


def current_stream(device: torch.device) -> torch.cuda.Stream:
    """Torch's current stream, without its search for the current device where ``device`` has a number: that takes 5 to
    10 us of Python, and a tick asks 28 times."""
    return torch.cuda.current_stream(device.index)
