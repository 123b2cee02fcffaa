"""When the link stands still in a few passes of a run, and what it waits for: from the spans that the engine's tracer
times there.

A gap between two transfers is charged to the one that ends it: "weights" waited for a working slab or for the host to
ask for them, "cache" pages for a staging buffer or likewise, "pass" is the time from the last tick of a pass to the
first transfer of the next one. Beside each the milliseconds of it in which the processor attended, and in which the GPU
computed.
"""

from __future__ import annotations

import itertools
import json
import re
from bisect import bisect_left
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flexbatch.planner.usage import UsageTracer
from flexbatch.trace import Span, chrome_events, covered

AHEAD = 2
"""Layers of the next pass that are on the link before it begins."""
BEGINS = re.compile(r"attention (\d+)\.0")
COMPUTES = re.compile(r"(attention|staged|mlp|experts) (\d+)\.(\d+)")


class Timeline:
    """Keeps the spans of some passes of a tracer that else only sums them."""

    def __init__(self, tracer: UsageTracer) -> None:
        self.tracer, self.left, self.since = tracer, 0, float("inf")
        self.spans: list[Span] = []
        self.begin, self.add = tracer.begin_pass, tracer.add
        tracer.begin_pass = self.begin_pass  # type: ignore[method-assign]
        tracer.add = self.added  # type: ignore[method-assign]

    def start(self, count: int) -> None:
        """Keep those of the next ``count`` passes, unless some were kept before."""
        if self.since == float("inf"):
            self.left, self.since = count, self.tracer.clock()

    def begin_pass(self) -> None:
        self.begin()
        if self.left > 0 and not self.tracer.on:
            self.tracer.fold()
            self.tracer.on, self.tracer.weight = True, 1
        self.left = max(-1, self.left - 1)

    def added(self, resource: str, name: str, start: float, end: float, num_bytes: int = 0) -> None:
        if start >= self.since and self.left >= 0:
            self.spans.append(Span(resource, name, start, end, num_bytes))
        self.add(resource, name, start, end, num_bytes)

    def write(self, path: Path) -> None:
        """For Chrome's tracing page or Perfetto."""
        spans = sorted(self.spans, key=lambda span: (span.start, -span.end))
        path.write_text(json.dumps({"traceEvents": chrome_events(spans), "displayTimeUnit": "ms"}), encoding="utf-8")


class Busy:
    """When one of some spans ran. Thousands of gaps are asked for: of 9,500 spans, each looked through for every gap,
    that took 20 s, longer than who had ended the run would wait for its row."""

    def __init__(self, spans: Iterable[Span]) -> None:
        self.spans = sorted(spans, key=lambda span: span.start)
        self.starts = [span.start for span in self.spans]
        self.longest = max((span.end - span.start for span in self.spans), default=0.0)

    def within(self, start: float, end: float) -> float:
        """Seconds between start and end in which one of the spans ran."""
        first, last = bisect_left(self.starts, start - self.longest), bisect_left(self.starts, end)
        near = self.spans[first:last]
        return covered(Span("", "", max(span.start, start), min(span.end, end)) for span in near if span.end > start)


def passes_of(spans: Iterable[Span]) -> list[tuple[float, float]]:
    """From the first computing of a pass to that of the next one; the last pass is left out."""
    starts = sorted(span.start for span in spans if span.resource == "compute" and span.name == "attention 0.0")
    return list(itertools.pairwise(starts))


@dataclass(frozen=True)
class LayerTimes:
    """Of the mean pass of a few: its seconds, those of one of its layers, and the share of each in which the link was
    busy. What the first layers of a pass found on the link already is no layer's own."""

    pass_seconds: float
    pass_busy: float
    layer_seconds: float
    layer_busy: float
    layers: int

    @property
    def own_seconds(self) -> float:
        """Of a pass, beside its layers: the head, results, and the inputs of the next one, less what they hide."""
        return self.pass_seconds - self.layers * self.layer_seconds

    def with_layers(self, layers: int) -> tuple[float, float]:
        """Seconds of a pass with so many layers, and the share of it in which the link was busy."""
        more = (layers - self.layers) * self.layer_seconds
        seconds = self.pass_seconds + more
        return seconds, (self.pass_seconds * self.pass_busy + more * self.layer_busy) / seconds


def layer_times(spans: Iterable[Span], layers: int) -> LayerTimes | None:
    """Of the passes that `idle_of` takes; a layer is from where it begins to where the next one does, on average of an
    even number, as in some models every other one has a window. None where they are too few."""
    spans = sorted(spans, key=lambda span: span.start)
    passes, first = passes_of(spans)[1:], AHEAD
    last = first + (layers - 1 - first) // 2 * 2
    busy = Busy(span for span in spans if span.resource == "h2d").within
    begun = [(int(found[1]), each.start) for each in spans if (found := BEGINS.fullmatch(each.name))]
    stretches = []
    for start, end in passes:
        at = {layer: begin for layer, begin in begun if start <= begin < end}
        if last > first and first in at and last in at:
            stretches.append((at[first], at[last]))
    if not stretches:
        return None
    whole, inside = (sum(b - a for a, b in each) for each in (passes, stretches))
    shares = [sum(busy(a, b) for a, b in each) for each in (passes, stretches)]
    each_layer = inside / len(stretches) / (last - first)
    return LayerTimes(whole / len(passes), shares[0] / whole, each_layer, shares[1] / inside, layers)


def idle_of(spans: list[Span]) -> dict[str, Any]:
    """Milliseconds of the mean of these passes but the first, whose transfers the pass before has begun, and what the
    link stood still for; nothing where there are too few passes."""
    spans = sorted(spans, key=lambda span: span.start)
    link, attended, computed = (
        [span for span in spans if span.resource == resource] for resource in ("h2d", "cpu_attention", "compute")
    )
    attending, computing = Busy(attended).within, Busy(computed).within
    passes = passes_of(spans)[1:]
    if not passes or not link:
        return {}
    gaps: dict[str, list[float]] = {}
    for start, end in passes:
        last = max(span.end for span in computed if start <= span.start < end and COMPUTES.fullmatch(span.name))
        until = start
        for span in [*(each for each in link if each.end > start and each.start < end), Span("", "pass", end, end)]:
            if span.start > until:
                name = "pass" if until >= last else span.name.split()[0]
                row = [f(until, span.start) for f in (lambda a, b: b - a, attending, computing)]
                gaps[name] = [sum(pair) for pair in zip(gaps.get(name, [0.0] * 3), row, strict=True)]
            until = max(until, span.end)
    count, total = len(passes), sum(end - start for start, end in passes)
    columns = ("idle", "cpu_attention_beside", "compute_beside")
    return {
        "passes": count,
        "pass_ms": round(1e3 * total / count, 1),
        "link_busy_percent": round(100 * (1 - sum(each[0] for each in gaps.values()) / total), 1),
        "idle_ms": {
            name: {column: round(1e3 * value / count, 1) for column, value in zip(columns, values, strict=True)}
            for name, values in sorted(gaps.items())
        },
    }
