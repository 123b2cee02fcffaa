"""Files of the offload folder, written by a thread beside the loading, or beside the job."""

from __future__ import annotations

import errno
import logging
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from flexbatch.memory.files import DiskFile, align
from flexbatch.memory.layer_files import write_layer_file
from flexbatch.memory.load_buffers import ByteBudget, LoadBuffers
from flexbatch.memory.load_stages import COPY_OUT, FILE, WAIT_FILES, WAIT_NAME, LoadStages
from flexbatch.memory.load_threads import LoadThreads
from flexbatch.memory.weight_plan import PlacedTensor
from flexbatch.policy.units import duration_text, size_text

logger = logging.getLogger("flexbatch")

FILE_WRITERS = 3
"""Files at a time: one is synced and renamed, which moves no data, while others are digested and written."""
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""Errors of a disk on which no more can be written."""


class FileWriter:
    """Writes tensors to their files, `FILE_WRITERS` at a time in the order in which they are submitted, each as
    `write_layer_file` does: whole or not at all.

    Bytes that wait or are being written are taken from ``budget`` (`reserve`), so that a disk that is slower than the
    rest holds up the loading instead of filling the host. What stays in memory anyway can be written from there
    (`submit_placed`): then nothing waits for the disk, and the host holds a buffer for each file at hand. After the
    first error nothing more is begun, and whoever comes next gets it. A full disk is one for the tensors of the disk
    tier alone: files that only the next start reads are left out, and the log says so.
    """

    def __init__(
        self,
        folder: Path | Future[Path],
        device: torch.device,
        budget: ByteBudget,
        buffers: LoadBuffers,
        pool: ThreadPoolExecutor,
        written: Callable[[PlacedTensor, DiskFile], None],
        stages: LoadStages,
    ) -> None:
        """folder: waited for when there is something to write. ``written`` takes over each file, open. ``pool``: its
        threads digest and write chunks."""
        self.folder, self.buffers, self.pool, self.written = folder, buffers, pool, written
        self.stages = stages
        self.threads = LoadThreads(device, FILE_WRITERS, budget, "flexbatch-files")
        self.left_bytes = self.placed_bytes = 0
        """Of what is written from memory: not there yet, and of all of it."""
        self.full = False
        self.ending_since: float | None = None
        self._lock = threading.Lock()

    @property
    def error(self) -> BaseException | None:
        return self.threads.error

    def reserve(self, placed: PlacedTensor) -> None:
        """Wait until the bytes of a tensor may be held. Raises the first error of the files so far, OffloadError for
        instance."""
        with self.stages.timing(WAIT_FILES):
            self.threads.reserve(align(placed.num_bytes))

    def submit(self, placed: PlacedTensor, buffer: Tensor) -> None:
        """Have the content of a tensor written for which bytes are reserved; its buffer is given back."""
        self.threads.submit(partial(self._write, placed, buffer), align(placed.num_bytes))

    def submit_placed(self, placed: PlacedTensor, content: Callable[[], Tensor]) -> None:
        """Have a tensor written from its tier, where nobody changes it. content: copies it to one of ``buffers``."""
        with self._lock:
            self.left_bytes += placed.num_bytes
            self.placed_bytes += placed.num_bytes
        self.threads.submit(partial(self._write_placed, placed, content), 0)

    def _write(self, placed: PlacedTensor, buffer: Tensor) -> None:
        try:
            with self.stages.timing(WAIT_NAME):
                folder = self.folder.result() if isinstance(self.folder, Future) else self.folder
            if placed.tier == "disk" or not self.full:
                with self.stages.timing(FILE):
                    file = write_layer_file(folder, placed, buffer, self.pool)
                self.written(placed, file)
        except OSError as error:
            if placed.tier == "disk" or error.errno not in FULL:
                raise
            with self._lock:
                first, self.full = not self.full, True
            if first:
                logger.warning("not all weights are kept for the next start: %s", error)
        finally:
            self.buffers.give(buffer)

    def _write_placed(self, placed: PlacedTensor, content: Callable[[], Tensor]) -> None:
        with self.stages.timing(COPY_OUT):
            buffer = content()
        self._write(placed, buffer)
        with self._lock:
            self.left_bytes -= placed.num_bytes
            last = not self.left_bytes and self.ending_since is not None
        if last:
            self._tell()

    def tell_of_end(self) -> None:
        """Have the log say when all that was submitted from memory is written."""
        with self._lock:
            written, self.ending_since = not self.left_bytes, time.perf_counter()
        if written:
            self._tell()

    def _tell(self) -> None:
        if not self.full and self.ending_since is not None:
            size, seconds = size_text(self.placed_bytes), duration_text(time.perf_counter() - self.ending_since)
            logger.info("wrote %s for the next start to the offload folder in %s", size, seconds)

    def finish(self) -> None:
        """Wait until all files are written. Raises the first error."""
        self.threads.finish()

    def close(self, dropped: bool = False) -> None:
        """Wait for the files that were submitted; ``dropped``: for the one at hand, and leave out the others."""
        self.threads.close(dropped)
