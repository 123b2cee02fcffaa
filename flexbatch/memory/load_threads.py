"""Threads that convert the pieces of a checkpoint while the next ones are read."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import torch

from flexbatch.memory.load_buffers import ByteBudget

THREADS = 4
"""With a GPU: one of them copies while another one's kernels run and a third takes codes back to the host. Without one
every operation has all cores anyway."""
PIECE_BYTES = 256 << 20
"""Of pieces that wait or are being converted."""


class LoadThreads:
    """Runs jobs, each in a thread and on a CUDA stream of its own where there is a GPU; with no threads at once, in the
    caller's. After the first error nothing more is run, and whoever comes next gets it."""

    def __init__(self, device: torch.device, count: int, most_bytes: int = PIECE_BYTES) -> None:
        self.device, self.budget = device, ByteBudget(most_bytes)
        self.error: BaseException | None = None
        self._inference = torch.is_inference_mode_enabled()
        self._pool = ThreadPoolExecutor(count, thread_name_prefix="flexbatch-load") if count else None
        self._own = threading.local()
        self.wait_for_device()

    def wait_for_device(self) -> None:
        """For what this thread has launched."""
        if self.device.type == "cuda":
            torch.cuda.current_stream(self.device).synchronize()

    def run(self, job: Callable[[], None], num_bytes: int) -> None:
        """Have ``job`` run once no more than `PIECE_BYTES` are held by others, of which it takes ``num_bytes``. Raises
        the first error of the jobs so far."""
        if self._pool is None:
            job()
            return
        self.budget.take(num_bytes)
        if self.error is not None:
            self.budget.give(num_bytes)
            raise self.error
        self._pool.submit(self._work, job, num_bytes)

    def _work(self, job: Callable[[], None], num_bytes: int) -> None:
        try:
            if self.error is None:
                with torch.inference_mode(self._inference), self._stream():
                    job()
        except BaseException as error:
            self.error = self.error or error
        finally:
            self.budget.give(num_bytes)

    @contextlib.contextmanager
    def _stream(self) -> Iterator[None]:
        if self.device.type != "cuda":
            yield
            return
        if not hasattr(self._own, "stream"):
            self._own.stream = torch.cuda.Stream(self.device)
        with torch.cuda.device(self.device), torch.cuda.stream(self._own.stream):
            yield

    def close(self, dropped: bool = False) -> None:
        """Wait for all jobs, or with ``dropped`` for those that have begun. Raises the first error."""
        if dropped and self.error is None:
            self.error = InterruptedError("loading was broken off")
        if self._pool is not None:
            self._pool.shutdown(wait=True)
        if self.error is not None and not dropped:
            raise self.error
