"""A job beside what was expected of it: passes, waves, the tail, and the time of all of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from flexbatch.execution.block_sizes import BlockSizes
from flexbatch.execution.job import Job
from flexbatch.execution.observer import RunObserver
from flexbatch.execution.pass_batch import PassBatch
from flexbatch.execution.scheduler import Scheduler
from flexbatch.execution.sequence import Sequence
from flexbatch.planner.choose import without_reserves
from flexbatch.planner.engine_plan import EnginePlan
from flexbatch.planner.problem import model_shape, workload_of
from flexbatch.policy.hardware import Hardware
from flexbatch.policy.plan import price
from flexbatch.policy.trajectory import passes_of


@dataclass(frozen=True)
class Forecast:
    """A job, and the plan and the sizes of the block that run it."""

    engine_plan: EnginePlan
    job: Job
    sizes: BlockSizes

    def describe(self, hardware: Hardware | None) -> dict[str, Any]:
        """What the job should take, every answer as long as it may get; in seconds where the machine's rates are
        known."""
        found = self.engine_plan
        parts = found.deployment.passes_in_flight
        workload = workload_of(self.job.of_every(parts))
        passes = passes_of(workload, found.policy, sizes=self.sizes.cache.part(parts))
        facts = {
            "sequences": self.job.num_requests,
            "waves": -(-self.job.num_requests // max(1, parts * round(float(passes.in_flight.max())))),
            "predicted_passes": parts * round(float(passes.counts.sum())),
            "tail_passes": parts * round(passes.tail_passes),
            "tail_sequences": passes.tail_sequences,
            "assumed_answer_tokens": workload.mean_output,
        }
        if hardware is None:
            return facts
        config, model = found.config, found.model
        shape = model_shape(
            config.model,
            found.deployment.most_layers,
            found.dtype.itemsize,
            config.weight_bits,
            model.prequantized,
            found.deployment.adapters,
        )
        plan = price(shape, without_reserves(hardware), workload, found.policy, passes)
        return {**facts, "predicted_seconds": plan.seconds, "tail_seconds": plan.tail_seconds}


class JobRecord(RunObserver):
    """Counts the passes, seconds and answers of a job that was known whole when it began. Nothing is predicted before
    somebody asks."""

    def __init__(self, forecast: Forecast) -> None:
        self.forecast = forecast
        self.passes, self.seconds = 0, 0.0
        self.answers, self.answer_tokens = 0, 0
        self.rest: Forecast | None = None
        """Of what was left at the last re-plan for other lengths, which came after so many passes and seconds."""
        self.passes_before, self.seconds_before = 0, 0.0

    def going_on(self, rest: Forecast) -> JobRecord:
        """Itself, now that what is left runs in another block."""
        self.rest, self.passes_before, self.seconds_before = rest, self.passes, self.seconds
        return self

    def after_pass(self, scheduler: Scheduler, batch: PassBatch, seconds: float) -> None:
        self.passes += 1
        self.seconds += seconds

    def after_sequence(self, sequence: Sequence) -> None:
        self.answers += 1
        self.answer_tokens += sequence.num_output_tokens

    def describe(self, hardware: Hardware | None) -> dict[str, Any]:
        """Predicted and measured; where lengths were learned on the way, also what was predicted then."""
        found = self.forecast.describe(hardware)
        if self.rest is not None:
            rest = self.rest.describe(hardware)
            found["replanned_passes"] = self.passes_before + rest["predicted_passes"]
            found["replanned_answer_tokens"] = rest["assumed_answer_tokens"]
            if "predicted_seconds" in rest:
                found["replanned_seconds"] = self.seconds_before + rest["predicted_seconds"]
        return {
            **found,
            "measured_passes": self.passes,
            "measured_seconds": self.seconds,
            "measured_answer_tokens": self.answer_tokens / self.answers if self.answers else 0.0,
        }
