"""What the threads of a load spend their time with: which stage holds up the others, in seconds."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator

READ, COPY_IN, CONVERT, COMPILE, COPY_OUT, FILE = "read", "copy_in", "convert", "compile", "copy_out", "file"
"""Pieces from the checkpoint; to the compute device; quantized there, and written to their tier; kernels compiled for
that before; content of files to host memory; these digested and written."""
REUSE_READ, REUSE_COPY = "reuse_read", "reuse_copy"
"""Files of an earlier start: read and digested; to their tier."""
WAIT_THREADS, WAIT_FILES, WAIT_NAME, WAIT_END = "wait_for_threads", "wait_for_files", "wait_for_name", "wait_for_end"
"""The reader, for threads that convert; these, for room to hold what is to be written; files, for their folder's name,
a digest of the checkpoint; and the load, at its end, for files."""


class LoadStages:
    """Seconds by stage, of all threads together: threads that work side by side have more of them than passed."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self.clock = clock
        self.seconds: dict[str, float] = {}
        self._lock = threading.Lock()

    @contextlib.contextmanager
    def timing(self, stage: str) -> Iterator[None]:
        """The body is a part of ``stage``."""
        started = self.clock()
        try:
            yield
        finally:
            seconds = self.clock() - started
            with self._lock:
                self.seconds[stage] = self.seconds.get(stage, 0.0) + seconds
