"""Spans of work per resource: how busy each link and processor was, and a timeline for Chrome or Perfetto. Nothing
happens when off."""

from __future__ import annotations

import json
import time
from collections import deque
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from flexbatch.files.atomic import replacing

if TYPE_CHECKING:
    import torch

RESOURCES = {
    "h2d": "h2d link",
    "d2h": "d2h link",
    "disk_read": "disk read",
    "disk_write": "disk write",
    "compute": "gpu compute",
    "collectives": "sums between gpus",
    "cpu_attention": "cpu attention",
    "cpu_experts": "cpu experts",
    "host": "host",
    "tick": "ticks",
}
"""What can be traced -> the name of its row. Ticks frame the rest and are no resource of their own: they are
drawn, not counted."""


class Event(Protocol):
    """The methods of torch.cuda.Event(enable_timing=True) that tracing needs."""

    def record(self, stream: Any = None) -> None: ...
    def synchronize(self) -> None: ...
    def query(self) -> bool: ...
    def elapsed_time(self, end_event: Any) -> float: ...


@dataclass(frozen=True)
class Span:
    """Work of one resource from `start` to `end` (seconds of the tracer's clock) that moved `num_bytes`."""

    resource: str
    name: str
    start: float
    end: float
    num_bytes: int = 0


@dataclass(frozen=True)
class ResourceUse:
    """What one resource did in `wall` seconds. `busy`: seconds in which at least one span ran, so that parallel
    spans count once."""

    spans: int
    busy: float
    num_bytes: int
    wall: float

    @property
    def rate(self) -> float:
        """Bytes per busy second."""
        return self.num_bytes / self.busy if self.busy > 0 else 0.0

    @property
    def share(self) -> float:
        """Busy share of the wall time."""
        return self.busy / self.wall if self.wall > 0 else 0.0


class Tracer:
    """A tracer that is off: every method returns at once. `RecordingTracer` is the one that is on."""

    on = False
    _nothing: AbstractContextManager[None] = nullcontext()

    def begin_pass(self) -> None:
        """Marks that what follows belongs to another pass."""

    def span(self, resource: str, name: str, num_bytes: int = 0) -> AbstractContextManager[Any]:
        """Times the body of a with statement on the host."""
        return self._nothing

    def device_span(self, resource: str, name: str, num_bytes: int = 0) -> DeviceSpan | None:
        """Starts timing what is enqueued on the current stream until its ``end()``; None when off."""
        return None

    def compute_span(self, name: str, resource: str = "compute") -> AbstractContextManager[Any]:
        """Times computing in the body, or what else takes turns with it: on the device where there is one, else on the
        host."""
        return self._nothing

    def add(self, resource: str, name: str, start: float, end: float, num_bytes: int = 0) -> None:
        """Adds a span that the caller has timed with the tracer's clock, in seconds."""

    def summary(self) -> dict[str, ResourceUse]:
        """Use of each resource that did anything."""
        return {}

    def write(self, path: str | Path) -> None:
        """Writes the timeline as Chrome trace JSON, which Perfetto reads too. Raises ValueError when off."""
        raise ValueError(f"no spans to write to {path}: the trace is off")


class DeviceSpan:
    """Two events around work on one stream; also a context manager."""

    __slots__ = ("_tracer", "begin", "finish", "name", "num_bytes", "resource")

    def __init__(self, tracer: RecordingTracer, resource: str, name: str, num_bytes: int) -> None:
        self._tracer, self.resource, self.name, self.num_bytes = tracer, resource, name, num_bytes
        self.begin, self.finish = tracer.event(), tracer.event()
        self.begin.record(tracer.stream())

    def end(self) -> None:
        self.finish.record(self._tracer.stream())
        self._tracer.pending.append(self)

    def __enter__(self) -> None:
        return None

    def __exit__(self, *error: object) -> None:
        self.end()


class _HostSpan:
    __slots__ = ("_name", "_num_bytes", "_resource", "_start", "_tracer")

    def __init__(self, tracer: RecordingTracer, resource: str, name: str, num_bytes: int) -> None:
        self._tracer, self._resource, self._name, self._num_bytes = tracer, resource, name, num_bytes

    def __enter__(self) -> None:
        self._start = self._tracer.clock()

    def __exit__(self, *error: object) -> None:
        self._tracer.add(self._resource, self._name, self._start, self._tracer.clock(), self._num_bytes)


class RecordingTracer(Tracer):
    """Collects spans. Any thread may add: appending to a deque is atomic.

    Device work is timed by pairs of events, read once they have happened. One event at a known host time, made at
    construction, puts the device's clock on the host's. `device`: the compute device; on CUDA with timing events,
    elsewhere computing is timed on the host. `clock` (seconds) and `event` stand in for the real ones in tests.
    """

    on = True

    def __init__(
        self,
        device: torch.device | None = None,
        *,
        clock: Callable[[], float] = time.perf_counter,
        event: Callable[[], Event] | None = None,
    ) -> None:
        self.clock = clock
        self.pending: deque[DeviceSpan] = deque()
        self._spans: deque[Span] = deque()
        self._event = event
        self.stream: Callable[[], Any] = lambda: None
        if device is not None and device.type == "cuda":
            from flexbatch.kernels.streams import current_stream

            self._event, self.stream = event or _cuda_event, partial(current_stream, device)
        if self._event is not None:
            self._anchor = self._event()
            self._anchor.record()
            self._anchor.synchronize()
            self._anchored_at = clock()

    def event(self) -> Event:
        """A new timing event. Raises ValueError without a device that has them."""
        if self._event is None:
            raise ValueError("a device span needs a CUDA device; time work on the host with span()")
        return self._event()

    def span(self, resource: str, name: str, num_bytes: int = 0) -> AbstractContextManager[Any]:
        return _HostSpan(self, resource, name, num_bytes)

    def device_span(self, resource: str, name: str, num_bytes: int = 0) -> DeviceSpan | None:
        return DeviceSpan(self, resource, name, num_bytes)

    def compute_span(self, name: str, resource: str = "compute") -> AbstractContextManager[Any]:
        return _HostSpan(self, resource, name, 0) if self._event is None else DeviceSpan(self, resource, name, 0)

    def add(self, resource: str, name: str, start: float, end: float, num_bytes: int = 0) -> None:
        if resource not in RESOURCES:
            raise ValueError(f"unknown resource {resource!r}; known are {', '.join(RESOURCES)}")
        if end < start:
            raise ValueError(f"span {name!r} ends {start - end:g} s before it starts")
        self._spans.append(Span(resource, name, start, end, num_bytes))

    def resolve(self, wait: bool = False) -> None:
        """Turns finished pairs of events into spans; with `wait`, all of them."""
        for _ in range(len(self.pending)):
            span = self.pending.popleft()
            if wait:
                span.finish.synchronize()
            elif not span.finish.query():
                self.pending.append(span)
                continue
            start = self._anchored_at + self._anchor.elapsed_time(span.begin) / 1e3
            self.add(
                span.resource, span.name, start, start + span.begin.elapsed_time(span.finish) / 1e3, span.num_bytes
            )

    def spans(self) -> list[Span]:
        """All spans by start, device work included: waits for it."""
        self.resolve(wait=True)
        return sorted(self._spans, key=lambda span: (span.start, -span.end))

    def summary(self) -> dict[str, ResourceUse]:
        """Use by resource; wall time is from the first start to the last end. Ticks are left out."""
        spans = self.spans()
        if not spans:
            return {}
        wall = max(span.end for span in spans) - spans[0].start
        uses = {}
        for resource in RESOURCES:
            own = [span for span in spans if span.resource == resource != "tick"]
            if own:
                uses[resource] = ResourceUse(len(own), covered(own), sum(span.num_bytes for span in own), wall)
        return uses

    def write(self, path: str | Path) -> None:
        """Writes the timeline as Chrome trace JSON, which Perfetto reads too; the file appears whole or not at all."""
        with replacing(Path(path)) as file:
            file.write(json.dumps({"traceEvents": chrome_events(self.spans()), "displayTimeUnit": "ms"}).encode())


def _cuda_event() -> Event:
    import torch

    return torch.cuda.Event(enable_timing=True)


def covered(spans: Iterable[Span]) -> float:
    """Seconds in which at least one span runs; spans sorted by start."""
    total, until = 0.0, float("-inf")
    for span in spans:
        total += max(0.0, span.end - max(span.start, until))
        until = max(until, span.end)
    return total


def chrome_events(spans: list[Span]) -> list[dict[str, Any]]:
    """Complete events, one row per resource; where spans of one resource run in parallel (disk threads), rows under it
    hold the rest.

    A row must not hold spans that overlap without nesting: viewers drop or misplace them. spans: sorted by start.
    """
    origin = spans[0].start if spans else 0.0
    events: list[dict[str, Any]] = []
    rows: dict[tuple[str, int], float] = {}
    for span in spans:
        queue = 0
        while rows.get((span.resource, queue), float("-inf")) > span.start:
            queue += 1
        rows[span.resource, queue] = span.end
        event: dict[str, Any] = {"name": span.name, "cat": span.resource, "ph": "X", "pid": 0}
        event.update(
            tid=_row(span.resource, queue),
            ts=round((span.start - origin) * 1e6, 3),
            dur=round((span.end - span.start) * 1e6, 3),
            args={"bytes": span.num_bytes},
        )
        events.append(event)
    names: list[dict[str, Any]] = [{"name": "process_name", "ph": "M", "pid": 0, "args": {"name": "flexbatch"}}]
    for resource, queue in sorted(rows, key=lambda row: _row(*row)):
        row, label = _row(resource, queue), RESOURCES[resource]
        label = f"{label} {queue + 1}" if queue else label
        names.append({"name": "thread_name", "ph": "M", "pid": 0, "tid": row, "args": {"name": label}})
        names.append({"name": "thread_sort_index", "ph": "M", "pid": 0, "tid": row, "args": {"sort_index": row}})
    return names + events


def _row(resource: str, queue: int) -> int:
    return 1000 * list(RESOURCES).index(resource) + queue
