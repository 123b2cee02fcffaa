"""Asynchronous work beside compute: transfer queues run jobs, `handles` say when a job's result may be used.

On CUDA a queue of the link is a stream and a handle is an event; on the CPU, and for the disk and CPU attention, a
queue is a worker thread and a handle is a future. Both kinds are waited on in the same way, so the executor is written
once.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from flexbatch.kernels import ops
from flexbatch.kernels.streams import current_stream
from flexbatch.memory.handles import READY, Events, FutureHandle, Handle, PostponedHandle
from flexbatch.policy.limits import DISK_THREADS
from flexbatch.trace import Tracer

ROW_BYTES = 16
"""The kernel that reads host memory moves rows of multiples of this."""
MAX_ROWS = 1 << 19
"""Rows that it moves at once, at most: 8 MiB of the smallest."""


class ThreadQueue:
    """A worker thread for one resource: jobs run in the order in which they were submitted. ``num_bytes`` counts
    what they moved."""

    def __init__(
        self,
        resource: str,
        tracer: Tracer,
        stream: torch.cuda.Stream | None = None,
        pool: ThreadPoolExecutor | None = None,
    ) -> None:
        """pool: the worker of another queue, whose jobs and these take turns."""
        self.resource, self.tracer, self.stream = resource, tracer, stream
        self.num_bytes = 0
        self.num_submitted = self.num_ended = 0
        self.pool = pool or ThreadPoolExecutor(1, thread_name_prefix=f"flexbatch {resource}")

    def submit(self, job: Callable[[], Any], after: Handle = READY, name: str = "", num_bytes: int = 0) -> FutureHandle:
        """Run ``job`` on the worker once ``after`` is done."""
        return FutureHandle(self.pool.submit(self.counted(job, after, name, num_bytes)))

    def postpone(self, job: Callable[[], Any], after: Handle, name: str, num_bytes: int) -> PostponedHandle:
        """Run ``job`` once ``after`` is done, when somebody waits for it and in that thread: where nobody has anything
        else to do meanwhile, waking the worker and being woken by it is lost time."""
        return PostponedHandle(self.counted(job, after, name, num_bytes))

    def counted(self, job: Callable[[], Any], after: Handle, name: str, num_bytes: int) -> Callable[[], Any]:
        self.num_bytes += num_bytes
        self.num_submitted += 1

        def work() -> Any:
            try:
                with contextlib.nullcontext() if self.stream is None else torch.cuda.stream(self.stream):
                    return self.traced(job, after, name, num_bytes)
            finally:
                self.num_ended += 1

        return work

    def traced(self, job: Callable[[], Any], after: Handle, name: str, num_bytes: int) -> Any:
        after.synchronize()
        with self.tracer.span(self.resource, name, num_bytes=num_bytes), torch.inference_mode():
            return job()

    def guard(self, tensor: Tensor) -> None:
        """The job holds the tensor itself: nothing to do on a thread."""

    def synchronize(self) -> None:
        """Block until the worker and its stream are idle, whatever became of the jobs: their errors are the waiters'
        on their handles."""
        # A pool that is closed accepts no job; at the interpreter's end Python waits for the workers, then runs
        # finalizers that close an engine.
        try:
            self.pool.submit(lambda: None).result()
        except RuntimeError:
            return
        if self.stream is not None:
            self.stream.synchronize()

    def check(self) -> None:
        """Invariant: no job ends that was not submitted, and none ends twice."""
        assert 0 <= self.num_ended <= self.num_submitted, (self.resource, self.num_ended, self.num_submitted)

    def close(self) -> None:
        self.pool.shutdown(wait=True, cancel_futures=True)
        if self.stream is not None:
            self.stream.synchronize()


class StreamQueue:
    """A CUDA stream for one direction of the link. ``num_bytes`` counts what its jobs moved."""

    def __init__(self, resource: str, tracer: Tracer, device: torch.device) -> None:
        self.resource, self.tracer, self.device = resource, tracer, device
        self.num_bytes = 0
        # Kernels that read or write host memory need few multiprocessors but must not queue behind a GEMM's thread
        # blocks.
        self.stream = torch.cuda.Stream(device, priority=-1)
        self.events = Events(device)

    def submit(self, job: Callable[[], Any], after: Handle = READY, name: str = "", num_bytes: int = 0) -> Handle:
        """Enqueue ``job`` on the stream, ordered after ``after``."""
        self.num_bytes += num_bytes
        outer = current_stream(self.device)
        torch.cuda.set_stream(self.stream)
        try:
            after.wait()
            span = self.tracer.device_span(self.resource, name, num_bytes)
            job()
            if span is not None:
                span.end()
            return self.events.record(self.stream)
        finally:
            torch.cuda.set_stream(outer)

    def guard(self, tensor: Tensor) -> None:
        """Keep the allocator from handing out the memory of ``tensor`` before the jobs submitted so far are done
        with it."""
        tensor.record_stream(self.stream)

    def synchronize(self) -> None:
        """Block until the stream is idle."""
        self.stream.synchronize()

    def check(self) -> None:
        """Invariant: bytes are only added to."""
        assert self.num_bytes >= 0, (self.resource, self.num_bytes)

    def close(self) -> None:
        self.stream.synchronize()


TransferQueue = ThreadQueue | StreamQueue


class TransferQueues:
    """The transfer queues of one compute device: both directions of the link, the disk, and CPU attention."""

    def __init__(self, device: torch.device, tracer: Tracer, disk_threads: int = DISK_THREADS) -> None:
        self.device, self.tracer = device, tracer
        self.events = Events(device)
        cuda = device.type == "cuda"
        self.h2d: TransferQueue = StreamQueue("h2d", tracer, device) if cuda else ThreadQueue("h2d", tracer)
        # Pages ride on a stream of their own: the gather kernel and the copy engine share the link and neither waits
        # for the other.
        self.pages: TransferQueue = StreamQueue("h2d", tracer, device) if cuda else ThreadQueue("h2d", tracer)
        # So does what was read ahead from the disk: a copy may wait for a slab, and no page should wait for the copy.
        self.staged: TransferQueue = StreamQueue("h2d", tracer, device) if cuda else ThreadQueue("h2d", tracer)
        self.d2h: TransferQueue = StreamQueue("d2h", tracer, device) if cuda else ThreadQueue("d2h", tracer)
        disk_stream = torch.cuda.Stream(device, priority=-1) if cuda else None
        self.disk_read = ThreadQueue("disk_read", tracer, disk_stream)
        self.disk_write = ThreadQueue("disk_write", tracer)
        self.disk_chunks = ThreadPoolExecutor(disk_threads, thread_name_prefix="flexbatch-disk-chunk")
        self.cpu_attention = ThreadQueue("cpu_attention", tracer)
        # Both want all cores.
        self.cpu_experts = ThreadQueue("cpu_experts", tracer, pool=self.cpu_attention.pool)
        self.row_ids = torch.arange(MAX_ROWS, dtype=torch.int32, device=device) if cuda else torch.empty(0)

    def mark(self) -> Handle:
        """Returns a handle of all compute issued so far on the current stream; on the CPU compute is done when it
        returns."""
        if self.device.type != "cuda":
            return READY
        return self.events.record(current_stream(self.device))

    def copy_to_device(self, source: Tensor, target: Tensor) -> None:
        """Copy rows of pinned host memory into ``target`` of the same shape on the compute device, on the current
        stream and past the copy engine.

        The engine serves its queue in order, and the next layer's weights stand in it for up to 20 ms. What a tick
        waits for must not wait behind them: a page table, an attention output, or what has come from the disk. So a
        kernel reads it.
        """
        count = source.shape[0]
        row_bytes = source.nbytes // count if count else 0
        by_kernel = self.device.type == "cuda" and row_bytes and row_bytes % ROW_BYTES == 0
        if by_kernel and count <= self.row_ids.shape[0]:
            ops.gather_pages(source, self.row_ids[:count], target)
        else:
            target.copy_(source, non_blocking=True)

    @property
    def all_queues(self) -> tuple[TransferQueue, ...]:
        links = self.h2d, self.pages, self.staged, self.d2h
        return (*links, self.disk_read, self.disk_write, self.cpu_attention, self.cpu_experts)

    def moved_bytes(self) -> dict[str, int]:
        """Bytes per resource since the start."""
        moved: dict[str, int] = {}
        for queue in self.all_queues:
            moved[queue.resource] = moved.get(queue.resource, 0) + queue.num_bytes
        return moved

    def synchronize(self) -> None:
        """Block until nothing is on its way any more, whatever became of it."""
        for queue in self.all_queues:
            queue.synchronize()

    def check(self) -> None:
        for queue in self.all_queues:
            queue.check()

    def close(self) -> None:
        for queue in self.all_queues:
            queue.close()
        self.disk_chunks.shutdown(wait=True, cancel_futures=True)
        self.row_ids = torch.empty(0)
