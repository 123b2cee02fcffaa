"""Whether weights that are in memory should lie on other tiers for the job at hand."""

from __future__ import annotations

import math
from dataclasses import dataclass

from flexbatch.execution.job import Job
from flexbatch.memory.moving import most_while_moving
from flexbatch.memory.weight_plan import WeightPlan
from flexbatch.planner.choose import priced, without_reserves
from flexbatch.planner.engine_plan import EnginePlan
from flexbatch.planner.problem import Problem, constraints_of
from flexbatch.policy.bound import machine_bound
from flexbatch.policy.hardware import Hardware
from flexbatch.policy.plan import Plan
from flexbatch.policy.units import size_text

MOVE_GAIN = 0.1
"""Of the job's throughput, that other tiers for the weights must bring: plans are off by some per cent."""
MOVED_BYTES_PER_SECOND = 0.8e9
"""At most: 4.2 GiB that changed between host and GPU took 5.3 s on an H200, not the 0.08 of its link, since host memory
is taken and pinned anew. A job of 1.5 s had its weights moved to save 0.3, and the next one moved them back."""
ALIKE = 1.25
"""Factor within which jobs are of one kind, in their number of requests and in their mean length."""

Kind = tuple[int, int]


def kind_of(job: Job) -> Kind:
    return tuple(round(math.log(size, ALIKE)) for size in (job.num_requests, job.mean_tokens))  # type: ignore


@dataclass(frozen=True)
class Relocation:
    """A job with the weights where they are (``kept``) and with other weights on other tiers (``moved``)."""

    problem: Problem
    hardware: Hardware
    kept: EnginePlan
    moved: EnginePlan

    def plan_of(self, engine_plan: EnginePlan) -> Plan:
        return priced(self.problem, without_reserves(self.hardware), engine_plan.policy)

    @property
    def move_seconds(self) -> float:
        """Each tensor that changes its tier, at the slowest link or device on its way, and memory for it."""
        hardware = self.hardware
        rates = {
            ("cpu", "gpu"): hardware.h2d,
            ("gpu", "cpu"): hardware.d2h,
            ("disk", "gpu"): min(hardware.disk_read, hardware.h2d),
            ("disk", "cpu"): hardware.disk_read,
            ("gpu", "disk"): min(hardware.d2h, hardware.disk_write),
            ("cpu", "disk"): hardware.disk_write,
        }
        rate_of = {pair: min(rate, MOVED_BYTES_PER_SECOND) for pair, rate in rates.items()}
        return sum(was.num_bytes / rate_of[was.tier, now.tier] for was, now in self.changed)

    @property
    def changed(self) -> list:
        pairs = zip(self.kept.weight_plan.all_tensors, self.moved.weight_plan.all_tensors, strict=True)
        return [(was, now) for was, now in pairs if was.tier != now.tier]

    def gain(self) -> str:
        """Why the weights should move; empty where they should not."""
        before, after = self.plan_of(self.kept), self.plan_of(self.moved)
        assert before.seconds is not None and after.seconds is not None, "a job has an end"
        faster = after.predicted_tokens_per_second / before.predicted_tokens_per_second - 1
        seconds = self.move_seconds
        if faster <= MOVE_GAIN or before.seconds - after.seconds <= seconds:
            return ""
        num_bytes = sum(was.num_bytes for was, _ in self.changed)
        return (
            f"the job should take {after.seconds:.3g} s instead of {before.seconds:.3g} s with {size_text(num_bytes)} "
            f"of the weights on other tiers; moving them takes about {seconds:.2g} s"
        )


def could_gain(problem: Problem, hardware: Hardware, kept: EnginePlan, search_seconds: float) -> bool:
    """Whether any placement of the weights could be faster than ``kept`` by MOVE_GAIN, and save more than a search
    takes: one linear program, before anything is searched for."""
    budgets, bits = problem.budgets, (kept.policy.weight_bits, kept.policy.cache_bits)
    machine = without_reserves(hardware).with_memory(budgets["gpu"], budgets["cpu"], budgets["disk"])
    bound = machine_bound(problem.shape, machine, problem.workload, constraints_of(problem, budgets), *bits)
    plan = priced(problem, without_reserves(hardware), kept.policy)
    if bound is None or bound.tokens_per_second <= (1 + MOVE_GAIN) * plan.predicted_tokens_per_second:
        return False
    saved_share = 1 - plan.predicted_tokens_per_second / bound.tokens_per_second
    return plan.seconds is None or saved_share * plan.seconds > search_seconds


def fits_while_moving(before: WeightPlan, after: WeightPlan, budgets: dict[str, int]) -> bool:
    return all(size <= budgets[tier] for tier, size in most_while_moving(before, after).items())
