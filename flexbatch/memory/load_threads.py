"""Threads of a load: they convert the pieces of a checkpoint while the next ones are read, and write files."""

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
STAGED_THREADS = 8
"""With `Staging`: each touches the pages of a file and copies them to pinned memory, at 4 to 6 GB/s."""
PIECE_BYTES = 256 << 20
"""Of pieces that wait or are being converted."""
PART_BYTES = PIECE_BYTES // STAGED_THREADS
"""Of a piece that one thread converts: matrices of 100 MB would leave most of the threads without work."""


class LoadThreads:
    """Runs jobs, each in a thread and on a CUDA stream of its own where there is a GPU; with no threads at once, in the
    caller's. Jobs hold bytes of a budget. After the first error nothing more is run, and whoever comes next gets it."""

    def __init__(
        self, device: torch.device, count: int, budget: ByteBudget | None = None, name: str = "flexbatch-load"
    ) -> None:
        """budget: `PIECE_BYTES` of its own where there is none."""
        self.device, self.budget = device, budget or ByteBudget(PIECE_BYTES)
        self.error: BaseException | None = None
        self._inference = torch.is_inference_mode_enabled()
        self._pool = ThreadPoolExecutor(count, thread_name_prefix=name) if count else None
        self._own = threading.local()
        self._left, self._ended = 0, threading.Condition()
        """Jobs that were submitted and have not ended."""
        self.wait_for_device()

    def wait_for_device(self) -> None:
        """For what this thread has launched."""
        if self.device.type == "cuda":
            torch.cuda.current_stream(self.device).synchronize()

    def run(self, job: Callable[[], None], num_bytes: int) -> None:
        """`reserve` and `submit`; without threads just the job."""
        if self._pool is None:
            job()
            return
        self.reserve(num_bytes)
        self.submit(job, num_bytes)

    def reserve(self, num_bytes: int) -> None:
        """Wait until the budget has so many bytes. Raises the first error of the jobs so far."""
        self.budget.take(num_bytes)
        if self.error is not None:
            self.budget.give(num_bytes)
            raise self.error

    def submit(self, job: Callable[[], None], num_bytes: int) -> None:
        """Have ``job`` run, and the bytes given back that were reserved for it."""
        assert self._pool is not None
        with self._ended:
            self._left += 1
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
            with self._ended:
                self._left -= 1
                self._ended.notify_all()

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
        """Wait for all jobs, or with ``dropped`` for those that have begun."""
        if dropped:
            self.error = self.error or InterruptedError("loading was broken off")
        if self._pool is not None:
            # Not left to `shutdown`: up to Python 3.12 one that Ctrl-C has broken off takes its threads for ended, and
            # the buffers that they still write to are unmapped next.
            with self._ended:
                self._ended.wait_for(lambda: not self._left)
            self._pool.shutdown(wait=True)

    def finish(self) -> None:
        """Wait for all jobs. Raises the first error."""
        self.close()
        if self.error is not None:
            raise self.error
