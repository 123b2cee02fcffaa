"""A run beside its plan: what passes should have taken and did, by resource, and when that calls for other settings."""

from __future__ import annotations

import dataclasses
import logging
from collections import deque
from typing import Any

import numpy as np

from flexbatch.execution.observer import RunObserver
from flexbatch.execution.pass_batch import PassBatch
from flexbatch.execution.resize import adjust
from flexbatch.execution.scheduler import Scheduler
from flexbatch.planner.planner import Planner
from flexbatch.planner.report import Statistics
from flexbatch.planner.usage import MEASURED, BusySeconds
from flexbatch.policy.affine import point_of
from flexbatch.policy.cost import RESOURCES
from flexbatch.policy.hardware import Hardware
from flexbatch.policy.pass_load import PassLoad
from flexbatch.policy.plan import Plan
from flexbatch.policy.replan import TOLERANCE, Replan, part_without_prompts, recalibrate, replan
from flexbatch.trace import Tracer

logger = logging.getLogger("flexbatch")

WINDOW = 8
"""Passes of one kind that a judgment averages over."""
WARM_UP = 2
"""Passes of each kind that are not judged: first touches, compilation, filling of the pipeline."""


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
        self.predicted_collective_seconds = self.measured_collective_seconds = self.predicted_launch_seconds = 0.0
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
            before, count, prompt = query.start, len(query.token_ids), query.num_prompt_tokens
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
        # The plan's average pass on the machine as these passes show it. Those without prompts show nothing of these:
        # on two H200 their small products took 2.2 times as long as planned, and a budget of 9,472 prompt tokens was
        # cut to 3,314 for a GPU that, so, prompts had to keep busy for as much longer.
        shown = part_without_prompts(self.plan) if kind == "decode" else {}
        busy = {
            name: seconds * (1 + shown.get(name, 1.0) * (factors.get(name, 1.0) - 1))
            for name, seconds in self.plan.resource_seconds.items()
        }
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
        self.predicted_launch_seconds += float(np.sum(model.launched(self.point)))
        self.predicted_collective_seconds += float(np.sum(model.collective_seconds, where=timed))
        self.measured_collective_seconds += sum(each.get("collectives", 0.0) for each in busy if each is not None)
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
        between_ranks = {
            "predicted_seconds": self.predicted_collective_seconds,
            "measured_seconds": self.measured_collective_seconds,
        }
        return {
            **({"collectives": between_ranks} if plan.hardware.tensor_ranks > 1 else {}),
            "predicted_launch_seconds": self.predicted_launch_seconds,
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
        adjust(scheduler, *settings)
        if not self.replans:
            logger.info("re-planned: %s; the report counts what follows", change.reason)
        self.replans.append(change.reason)

    def after_run(self) -> None:
        seconds = self.statistics.seconds - self.seconds
        rate = (self.statistics.generated_tokens - self.generated_tokens) / seconds if seconds else 0.0
        self.prediction = self.meter.report(rate)
        path = self.planner.machine.profile_path
        if path is not None and self.meter.passes:
            self.planner.machine.recalibrate(self.meter.recalibrated(self.planner.hardware))
            logger.info("recalibrated the machine's profile by %d passes -> %s", self.meter.passes, path)


def monitor_of(
    planner: Planner, tracer: Tracer, cpu_attention: bool, statistics: Statistics, replans: list[str]
) -> PlanMonitor | None:
    """Of the engine's plan; None where nothing was planned. cpu_attention: whether there are buffers for it."""
    plan = planner.engine_plan.plan
    if plan is None:
        return None
    return PlanMonitor(planner, PassMeter(plan, BusySeconds(tracer), cpu_attention), statistics, replans)
