"""Launching and what is launched, one beside the other."""

from __future__ import annotations

import numpy as np

IN_VIEW, WAITING_IN_VIEW, STREAMED_IN_VIEW = 0.25, 0.15, 0.1
"""The share of the shorter of launching and of what is launched that shows beside the longer one: where everything is
on the GPU; where the host waits on its way, for the CPU's attention and experts or the disk; and where it waits for
nothing before a pass is launched, nor for the pass before. The first is fitted to 3,900 passes of 30 jobs on two H200
machines, composed one by one: with all of it in view (launching on top) jobs were 8 and 12 % off, with this 4. Of
pieces nothing is, however they are composed: passes of Mistral-7B in pieces, one by one, are as long as the GPU has
work, 10.6 ms, where launching takes 8.8, and those of OPT-2.7B that were composed ahead took what the host does, 10.7
of 10.5. The second was the first while what CPU attention has the host launch was not counted; with it 14 jobs are
4.1 % off in the median, and 5.5 with the first."""


def together(launching: np.ndarray, busy: np.ndarray, in_view: float | np.ndarray) -> np.ndarray:
    """Seconds of launching and of what is launched, one beside the other."""
    return np.maximum(launching, busy) + in_view * np.minimum(launching, busy)
