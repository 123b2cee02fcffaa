"""How busy every resource is in the passes of a run, timed in a few of them."""

from __future__ import annotations

import random
from collections.abc import Iterable
from contextlib import AbstractContextManager
from itertools import islice
from typing import Any

import torch

from flexbatch.trace import DeviceSpan, RecordingTracer, ResourceUse, Span, Tracer, covered

BY_NAME = ("h2d", "d2h", "disk_read", "disk_write", "cpu_attention", "cpu_experts")
MEASURED = (*BY_NAME, "gpu_compute")
"""Resources that spans exist for; the memories are used by these."""
RESOURCE_OF_SPAN = {name: name for name in BY_NAME} | {"compute": "gpu_compute", "collectives": "collectives"}
"""Sums between GPUs are a part of what the GPU computes; of a rank that comes early, they are its waiting, too."""
TIMED_FIRST, TIMED_EVERY = 16, 4
"""Passes whose resources are all timed, and of how many later ones one is."""


class UsageTracer(RecordingTracer):
    """A tracer that keeps sums and no timeline: memory stays the same however long the run is.

    It times the first passes and then one of a few, at random, which counts as that many: two events a span and
    reading them took 5 to 6 ms of a pass of 200 on an H200's host.
    """

    def __init__(self, device: torch.device | None = None, **stand_ins: Any) -> None:
        super().__init__(device, **stand_ins)
        self.folded: dict[str, ResourceUse] = {}
        self.recent: dict[str, float] = {}
        """Busy seconds by resource since the last `take`."""
        self.first, self.last = float("inf"), float("-inf")
        self.num_passes, self.weight, self.timed_index = 0, 1, 0
        self.wanted = True
        """Whether anything is compared with what is timed: small models have no plan, and their passes are short."""
        self.random = random.Random(0)

    def begin_pass(self) -> None:
        late, self.num_passes = self.num_passes - TIMED_FIRST, self.num_passes + 1
        if late >= 0 and late % TIMED_EVERY == 0:
            self.timed_index = self.random.randrange(TIMED_EVERY)
        self.on = self.wanted and (late < 0 or late % TIMED_EVERY == self.timed_index)
        if self.on:
            self.fold()
            self.weight = 1 if late < 0 else TIMED_EVERY

    def span(self, resource: str, name: str, num_bytes: int = 0) -> AbstractContextManager[Any]:
        return super().span(resource, name, num_bytes) if self.on and resource != "tick" else self._nothing

    def device_span(self, resource: str, name: str, num_bytes: int = 0) -> DeviceSpan | None:
        return super().device_span(resource, name, num_bytes) if self.on else None

    def compute_span(self, name: str, resource: str = "compute") -> AbstractContextManager[Any]:
        return super().compute_span(name, resource) if self.on else self._nothing

    def fold(self, wait: bool = False) -> None:
        """Spans since the last call go into the sums."""
        self.resolve(wait)
        spans = sorted((self._spans.popleft() for _ in range(len(self._spans))), key=lambda span: span.start)
        if spans:
            self.first, self.last = min(self.first, spans[0].start), max(self.last, *(span.end for span in spans))
        for resource, own in by_resource(spans).items():
            before, busy, weight = self.folded.get(resource, ResourceUse(0, 0.0, 0, 0.0)), covered(own), self.weight
            num_bytes = before.num_bytes + weight * sum(span.num_bytes for span in own)
            self.folded[resource] = ResourceUse(
                before.spans + weight * len(own), before.busy + weight * busy, num_bytes, 0.0
            )
            self.recent[resource] = self.recent.get(resource, 0.0) + busy

    def take(self) -> dict[str, float]:
        """Busy seconds by resource since the last call."""
        self.fold()
        recent, self.recent = self.recent, {}
        return recent

    def summary(self) -> dict[str, ResourceUse]:
        self.fold(wait=True)
        wall = max(0.0, self.last - self.first)
        return {
            resource: ResourceUse(use.spans, use.busy, use.num_bytes, wall) for resource, use in self.folded.items()
        }

    def write(self, path: Any) -> None:
        raise ValueError(f"no spans to write to {path}: the trace is off")


def by_resource(spans: Iterable[Span]) -> dict[str, list[Span]]:
    grouped: dict[str, list[Span]] = {}
    for span in spans:
        grouped.setdefault(span.resource, []).append(span)
    return grouped


class BusySeconds:
    """Busy seconds of every resource since the last call that gave any, from a tracer that is on; None after a pass
    that was not timed."""

    def __init__(self, tracer: Tracer) -> None:
        self.tracer, self.seen = tracer, 0
        self.take()

    def __call__(self) -> dict[str, float] | None:
        return (
            {RESOURCE_OF_SPAN[name]: seconds for name, seconds in self.take().items() if name in RESOURCE_OF_SPAN}
            if self.tracer.on
            else None
        )

    def take(self) -> dict[str, float]:
        """Seconds by the tracer's names of the resources."""
        if isinstance(self.tracer, UsageTracer):
            return self.tracer.take()
        if not isinstance(self.tracer, RecordingTracer):
            return {}
        self.tracer.resolve()
        spans = list(islice(self.tracer._spans, self.seen, None))
        self.seen += len(spans)
        return {name: covered(own) for name, own in by_resource(sorted(spans, key=lambda span: span.start)).items()}
