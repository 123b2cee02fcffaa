"""When Python collects garbage, and what it leaves alone."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator

FROZEN_AT_START = 1000
"""Objects that an interpreter may have frozen itself: Python 3.12 has 375 from its start."""


@contextlib.contextmanager
def frozen_heap() -> Iterator[None]:
    """Leave all objects that there are now out of Python's collections of garbage: one of them took 120 to 200 ms of a
    job of 1,000 sequences, in which the GPU had nothing to do, and found nothing. Whoever has frozen the heap
    already is not interfered with. An earlier version took what Python 3.12 freezes for that and did nothing there:
    six of 19 jobs of 10 s on an H200 had one pass of 160 ms more than the others."""
    if gc.get_freeze_count() > FROZEN_AT_START:
        yield
        return
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


@contextlib.contextmanager
def no_collection() -> Iterator[None]:
    """Without collections of garbage: one that frees what an engine before had of the driver's, while kernels are
    recorded, is an error in a destructor, which ends the process. Of imports they take a tenth of the time, and find
    nothing."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
