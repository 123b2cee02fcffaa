"""Files of the offload folder, written by a thread beside the loading."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from torch import Tensor

from flexbatch.memory.files import DiskFile, align
from flexbatch.memory.layer_files import write_layer_file
from flexbatch.memory.load_buffers import ByteBudget, LoadBuffers
from flexbatch.memory.weight_plan import PlacedTensor


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
        buffers: LoadBuffers,
        pool: ThreadPoolExecutor,
        written: Callable[[PlacedTensor, DiskFile], None],
    ) -> None:
        """folder: asked for when there is something to write. ``written`` takes over each file, open. ``pool``: its
        threads digest and write chunks."""
        self.folder, self.budget, self.buffers, self.pool, self.written = folder, budget, buffers, pool, written
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
        """Have the content of a tensor written for which bytes are reserved; its buffer is given back."""
        self._thread.submit(self._write, placed, buffer)

    def _write(self, placed: PlacedTensor, buffer: Tensor) -> None:
        try:
            if self.error is None:
                self.written(placed, write_layer_file(self.folder(), placed, buffer, self.pool))
        except BaseException as error:
            self.error = error
        finally:
            self.buffers.give(buffer)
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
