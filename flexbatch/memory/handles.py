"""What promises the result of asynchronous work: an event of a CUDA stream, a job of a worker thread, or one that
whoever waits first runs."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import Future
from typing import Any, Protocol

import torch

from flexbatch.kernels.streams import current_stream


class Handle(Protocol):
    """The promise of a finished job."""

    def wait(self) -> None:
        """Order the caller's following work (its CUDA stream, or the calling thread) after the job. Re-raises the
        job's error."""

    def synchronize(self) -> None:
        """Block the calling thread until the job is done. Re-raises the job's error."""


class Ready:
    """A handle of something that is already there."""

    def wait(self) -> None:
        return

    def synchronize(self) -> None:
        return


READY = Ready()


class EventHandle:
    """A CUDA event on the stream that ran the job. When nobody has the handle any more, the event is recorded anew:
    what waits for it on the GPU waits for what was recorded when it began to."""

    def __init__(self, event: torch.cuda.Event, events: Events) -> None:
        self.event, self.events = event, events

    def __del__(self) -> None:
        self.events.free.append(self.event)

    def wait(self) -> None:
        self.event.wait(current_stream(self.events.device))

    def synchronize(self) -> None:
        self.event.synchronize()


class Events:
    """The CUDA events of handles. Making one takes an H200's host 6.5 us, recording it 5, and a tick has up to eight;
    there are as many as handles were held at a time."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.free: list[torch.cuda.Event] = []

    def record(self, stream: torch.cuda.Stream) -> EventHandle:
        """A handle of what is on the stream so far."""
        event = self.free.pop() if self.free else torch.cuda.Event()
        event.record(stream)
        return EventHandle(event, self)


class FutureHandle:
    """A job on a worker thread. Its result may itself be a handle (a disk read that ends in a copy on a CUDA
    stream)."""

    def __init__(self, future: Future[Any]) -> None:
        self.future = future

    @property
    def done(self) -> bool:
        """Whether the job has ended; what its result promises may still be on its way."""
        return self.future.done()

    @property
    def failed(self) -> bool:
        """Whether the job has ended with an error."""
        return self.future.done() and self.future.exception() is not None

    def wait(self) -> None:
        result = self.future.result()
        if hasattr(result, "wait"):
            result.wait()

    def synchronize(self) -> None:
        result = self.future.result()
        if hasattr(result, "synchronize"):
            result.synchronize()


class PostponedHandle:
    """A job that the thread runs which waits for it first."""

    def __init__(self, job: Callable[[], None]) -> None:
        self.job: Callable[[], None] | None = job
        self.future: Future[None] = Future()

    def wait(self) -> None:
        job, self.job = self.job, None
        if job is not None:
            try:
                self.future.set_result(job())
            except BaseException as error:
                self.future.set_exception(error)
        self.future.result()

    def synchronize(self) -> None:
        self.wait()


class AllHandles:
    """Several handles as one."""

    def __init__(self, handles: Iterable[Handle]) -> None:
        self.handles = [handle for handle in handles if handle is not READY]

    def wait(self) -> None:
        for handle in self.handles:
            handle.wait()

    def synchronize(self) -> None:
        for handle in self.handles:
            handle.synchronize()


def together(*handles: Handle) -> Handle:
    pending = [handle for handle in handles if handle is not READY]
    return pending[0] if len(pending) == 1 else AllHandles(pending) if pending else READY
