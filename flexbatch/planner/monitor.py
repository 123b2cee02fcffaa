"""A run beside its plan: what passes should have taken and did, by resource, and when that calls for other settings."""

from __future__ import annotations

import dataclasses
import logging
import random
from collections import deque
from collections.abc import Iterable
from contextlib import AbstractContextManager
from itertools import islice
from typing import Any

import numpy as np
import torch

from flexbatch.execution.observer import RunObserver
from flexbatch.execution.pass_batch import PassBatch
from flexbatch.execution.scheduler import Scheduler
from flexbatch.planner.planner import Planner
from flexbatch.planner.report import Statistics
from flexbatch.policy.affine import point_of
from flexbatch.policy.cost import RESOURCES
from flexbatch.policy.hardware import Hardware
from flexbatch.policy.pass_load import PassLoad
from flexbatch.policy.plan import Plan
from flexbatch.policy.replan import TOLERANCE, Replan, recalibrate, replan
from flexbatch.trace import DeviceSpan, RecordingTracer, ResourceUse, Span, Tracer, covered

logger = logging.getLogger("flexbatch")

BY_NAME = ("h2d", "d2h", "disk_read", "disk_write", "cpu_attention", "cpu_experts")
RESOURCE_OF_SPAN = {name: name for name in BY_NAME} | {"compute": "gpu_compute"}
MEASURED = tuple(RESOURCE_OF_SPAN.values())
"""Resources that spans exist for; the memories are used by these."""
WINDOW = 8
"""Passes of one kind that a judgment averages over."""
WARM_UP = 2
"""Passes of each kind that are not judged: first touches, compilation, filling of the pipeline."""
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

    def compute_span(self, name: str) -> AbstractContextManager[Any]:
        return super().compute_span(name) if self.on else self._nothing

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


class PassMeter:
    """Measures passes against a plan. ``busy()`` gives the busy seconds of a pass by resource, None for one that was
    not timed. cpu_attention: whether there are buffers for it; without them its share stays."""

    def __init__(self, plan: Plan, busy: Any, cpu_attention: bool = True) -> None:
        self.plan, self.busy, self.cpu_attention = plan, busy, cpu_attention
        self.point = point_of(plan.policy)
        self.passes, self.measured_pass_seconds, self.predicted_pass_seconds = 0, 0.0, 0.0
        self.measured, self.predicted = dict.fromkeys(MEASURED, 0.0), dict.fromkeys(RESOURCES, 0.0)
        self.work = dict.fromkeys(MEASURED, 0.0)
        """Bytes (FLOPs of gpu_compute) of the passes that ``measured`` counts."""
        self.seen = {"decode": 0, "mixed": 0}
        self.windows: dict[str, deque[tuple[PassLoad, float, dict[str, float] | None]]] = {
            kind: deque() for kind in self.seen
        }
        self.accepted = dict.fromkeys(self.seen, 1.0)
        """Measured over predicted seconds of each kind of pass, as of the last judgment that changed something."""

    @staticmethod
    def load(batch: PassBatch) -> PassLoad:
        """What a pass carries, as the cost model counts it."""
        prompts, decoding = PassLoad(), batch.num_decoding
        context = decoding + sum(int(tokens.starts.sum()) for tokens in batch.decoding)
        for query in batch.others:
            before, count, prompt = query.start, query.num_tokens, query.num_prompt_tokens
            if before >= prompt and count == 1:
                decoding, context = decoding + 1, context + before + 1
            else:
                prompts += PassLoad.prefill(1, count, before, before + count >= prompt)
        return prompts + PassLoad(decoding, context)

    def record(self, load: PassLoad, seconds: float) -> Replan | None:
        """Count a pass; other settings when the last passes of its kind are further from the plan than the
        tolerance."""
        busy = self.busy()
        kind = "mixed" if load.prompt_tokens else "decode"
        self.seen[kind] += 1
        if self.seen[kind] <= WARM_UP:
            return None
        window = self.windows[kind]
        window.append((load, seconds, busy))
        if len(window) < WINDOW:
            return None
        return self.judge(kind)

    def judge(self, kind: str) -> Replan | None:
        """Fold the window into the sums and compare it with the plan."""
        measured_seconds, predicted_seconds, measured, predicted = self.fold(kind)
        ratio = measured_seconds / predicted_seconds
        if abs(ratio / self.accepted[kind] - 1) <= TOLERANCE or not any(measured.values()):
            return None
        self.accepted[kind] = ratio
        factors = {name: measured[name] / predicted[name] if predicted[name] > 0 else 0.0 for name in MEASURED}
        # The plan's average pass on the machine as these passes show it.
        busy = {name: seconds * factors.get(name, 1.0) for name, seconds in self.plan.resource_seconds.items()}
        seconds = ratio * self.plan.pass_seconds
        change = replan(self.plan, seconds, busy, cpu_attention=self.cpu_attention)
        if not change.changed:
            return None
        self.point = point_of(dataclasses.replace(self.plan.policy, cpu_attention=change.cpu_attention))
        return change

    def fold(self, kind: str) -> tuple[float, float, dict[str, float], dict[str, float]]:
        pass_loads, seconds, busy = zip(*self.windows[kind], strict=True)
        self.windows[kind].clear()
        names = [field.name for field in dataclasses.fields(PassLoad)]
        load = PassLoad(*(np.array([getattr(each, name) for each in pass_loads]) for name in names))
        model = self.plan.passes_like(load)
        predicted_seconds = float(np.sum(model.pass_seconds(self.point)))
        timed = np.array([each is not None for each in busy])
        resources = {name: value for name, value in model.resource_seconds(self.point).items() if name in RESOURCES}
        predicted = {
            name: float(np.sum(np.broadcast_to(value, len(pass_loads)), where=timed))
            for name, value in resources.items()
        }
        measured = {name: sum(each.get(name, 0.0) for each in busy if each is not None) for name in MEASURED}
        work = model.resource_work(self.point)
        self.passes += len(pass_loads)
        self.measured_pass_seconds += sum(seconds)
        self.predicted_pass_seconds += predicted_seconds
        for name in RESOURCES:
            self.predicted[name] += predicted[name]
        for name in MEASURED:
            self.measured[name] += measured[name]
            self.work[name] += float(np.sum(np.broadcast_to(work[name], len(pass_loads)), where=timed))
        return sum(seconds), predicted_seconds, measured, predicted

    def finish(self) -> None:
        """Fold what is left of unfinished windows."""
        for kind, window in self.windows.items():
            if window:
                self.fold(kind)

    def report(self, tokens_per_second: float) -> dict[str, Any]:
        """Predicted against measured, of the passes after warm-up; resources by those of them that were timed."""
        self.finish()
        plan = self.plan
        ceilings = plan.passes_like(PassLoad()).ceilings
        resources = {
            name: {
                "predicted_seconds": self.predicted[name],
                "measured_seconds": self.measured[name],
                "work": self.work[name],
                "ceiling": ceilings[name],
            }
            for name in MEASURED
        }
        return {
            "predicted_tokens_per_second": plan.predicted_tokens_per_second,
            "measured_tokens_per_second": tokens_per_second,
            "bound_tokens_per_second": plan.bound_tokens_per_second,
            "limiting_resource": plan.limiting_resource,
            "passes": self.passes,
            "predicted_pass_seconds": self.predicted_pass_seconds,
            "measured_pass_seconds": self.measured_pass_seconds,
            "resources": resources,
        }

    def recalibrated(self, hardware: Hardware) -> Hardware:
        """The machine as this run shows it."""
        self.finish()
        return recalibrate(hardware, {name: self.predicted[name] for name in MEASURED}, self.measured)


class PlanMonitor(RunObserver):
    """Holds a run beside its plan: re-plans what may change between passes, and reports predicted against measured."""

    def __init__(self, planner: Planner, meter: PassMeter, statistics: Statistics, replans: list[str]) -> None:
        self.planner, self.meter, self.statistics, self.replans = planner, meter, statistics, replans
        self.generated_tokens, self.seconds = statistics.generated_tokens, statistics.seconds
        self.prediction: dict[str, Any] = {}
        self.settings: tuple[int, int, float] | None = None
        """Of the last re-plan."""

    def after_pass(self, scheduler: Scheduler, batch: PassBatch, seconds: float) -> None:
        change = self.meter.record(self.meter.load(batch), seconds)
        if change is None:
            return
        limit = self.meter.plan.shape.stages * change.admission_limit
        settings = limit, change.prefill_budget, change.cpu_attention
        if settings == self.settings:
            return
        self.settings = settings
        scheduler.adjust(*settings)
        if not self.replans:
            logger.info("re-planned: %s; the report counts what follows", change.reason)
        self.replans.append(change.reason)

    def after_run(self) -> None:
        seconds = self.statistics.seconds - self.seconds
        rate = (self.statistics.generated_tokens - self.generated_tokens) / seconds if seconds else 0.0
        self.prediction = self.meter.report(rate)
        path = self.planner.profile_path
        if path is not None and self.meter.passes:
            self.planner.recalibrate(self.meter.recalibrated(self.planner.hardware))
            logger.info("recalibrated the machine's profile by %d passes -> %s", self.meter.passes, path)
