"""Files of the offload folder, written by a thread beside the loading; and what its threads may hold of the host."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from torch import Tensor

from flexbatch.memory.files import DiskFile, align
from flexbatch.memory.layer_files import write_layer_file
from flexbatch.memory.weight_plan import PlacedTensor


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


class FileWriter:
    """Writes tensors to their files one after another, in the order in which they are submitted, each as
    `write_layer_file` does: whole or not at all.

    Bytes that wait or are being written are taken from ``budget`` (`reserve`), so that a disk that is slower than the
    rest holds up the loading instead of filling the host. After the first error nothing more is written, and whoever
    comes next gets it.
    """

    def __init__(
        self,
        folder: Callable[[], Path],
        budget: ByteBudget,
        pool: ThreadPoolExecutor,
        written: Callable[[PlacedTensor, DiskFile], None],
    ) -> None:
        """folder: asked for when there is something to write. ``written`` takes over each file, open. ``pool``: its
        threads digest and write chunks."""
        self.folder, self.budget, self.pool, self.written = folder, budget, pool, written
        self.error: BaseException | None = None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="flexbatch-files")

    def reserve(self, placed: PlacedTensor) -> None:
        """Wait until the bytes of a tensor may be held. Raises the first error of the files so far, OffloadError for
        instance."""
        self.budget.take(align(placed.num_bytes))
        if self.error is not None:
            self.budget.give(align(placed.num_bytes))
            raise self.error

    def submit(self, placed: PlacedTensor, buffer: Tensor) -> None:
        """Have the content (`empty_buffer`) of a tensor written for which bytes are reserved."""
        self._thread.submit(self._write, placed, buffer)

    def _write(self, placed: PlacedTensor, buffer: Tensor) -> None:
        try:
            if self.error is None:
                self.written(placed, write_layer_file(self.folder(), placed, buffer, self.pool))
        except BaseException as error:
            self.error = error
        finally:
            self.budget.give(align(placed.num_bytes))

    def finish(self) -> None:
        """Wait until all files are written. Raises the first error."""
        self._thread.submit(lambda: None).result()
        if self.error is not None:
            raise self.error

    def close(self, dropped: bool = False) -> None:
        """Wait for the files that were submitted; ``dropped``: for the one at hand, and leave out the others."""
        if dropped and self.error is None:
            self.error = InterruptedError("loading was broken off")
        self._thread.shutdown(wait=True)
