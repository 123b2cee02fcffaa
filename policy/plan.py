"""A plan: a policy with the numbers that were predicted for it, for a report or for a decision."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field

import numpy as np

from flexbatch.policy.affine import point_of
from flexbatch.policy.cost import JOINT, RESOURCES, PassModel
from flexbatch.policy.footprint import capacity, has_graphs, peak_memory, shortfall
from flexbatch.policy.hardware import Hardware
from flexbatch.policy.model_shape import ModelShape
from flexbatch.policy.pass_load import PassLoad, first_finish, steady_load
from flexbatch.policy.policy import Policy
from flexbatch.policy.trajectory import JobPasses, passes_of
from flexbatch.policy.workload import Workload


class DoesNotFit(RuntimeError):
    """No policy fits the memory budgets; the message holds a table of what is missing and the remedies."""


@dataclass(frozen=True)
class Plan:
    """What a policy costs; rates in generated tokens a second over the whole job, its fill and tail included."""

    policy: Policy
    shape: ModelShape
    hardware: Hardware
    workload: Workload
    predicted_tokens_per_second: float
    bound_tokens_per_second: float
    """The throughput of this policy if every pass took its busiest resource and nothing else."""
    steady_tokens_per_second: float
    """With a full block, prompts riding along: what a job without end reaches."""
    seconds: float | None
    """The time of the whole job, of which every stage of a pipeline has a part; None for a job without end."""
    passes: float
    """In the job; 1 for a job without end, of which one average pass is described."""
    pass_seconds: float
    """The time of the average pass, in a pipeline on the stage that takes longest."""
    row_seconds: dict[str, float]
    """Per row of `cost.ROWS`, in the average pass, were it alone."""
    work: dict[str, float]
    """Bytes (FLOPs for gpu_compute) per resource in the average pass."""
    launch_seconds: float
    """Of the average pass, what no resource is busy for."""
    first_answer_seconds: float | None
    """From the first pass to the end of the first sequence; None for a job without end."""
    memory: dict[str, dict[str, int]]
    """Peak bytes per tier and kind."""
    most_in_flight: float = 1.0
    """Sequences in the fullest pass."""
    tail_passes: float = 0.0
    """After the last admission, with fewer sequences than in the fullest pass."""
    tail_sequences: float = 0.0
    """In flight in the average pass of the tail."""
    tail_seconds: float = 0.0
    machine_bound_tokens_per_second: float | None = None
    """What no policy for this workload can exceed on this machine."""
    tokens_per_second_per_gib: dict[str, float] = field(default_factory=dict)
    """What one GiB more on each tier buys, from the duals of the linear program."""
    linear_programs: int = 0
    search_seconds: float = 0.0

    @property
    def num_sequences(self) -> int | None:
        """Of the job; None for one without end."""
        return self.workload.whole_sequences or self.workload.num_sequences

    @property
    def waves(self) -> int | None:
        """Times that the job's sequences fill the block, the last time perhaps in part; None for a job without end."""
        total = self.workload.num_sequences
        return None if total is None else math.ceil(total / self.most_in_flight - 1e-9)

    def passes_like(self, load: PassLoad, hardware: Hardware | None = None, policy: Policy | None = None) -> PassModel:
        """The cost of other passes of this plan: of its policy, or of one whose settings differ and not its bytes, on
        its machine or another."""
        return PassModel(self.shape, hardware or self.hardware, policy or self.policy, load, has_graphs(self.memory))

    @property
    def fraction_of_bound(self) -> float:
        return self.predicted_tokens_per_second / self.bound_tokens_per_second

    @property
    def resource_seconds(self) -> dict[str, float]:
        return {name: self.row_seconds[name] for name in RESOURCES}

    @property
    def limiting_row(self) -> str:
        """The row of `cost.ROWS` that takes longest, or "launch" when launching ticks takes longer than any."""
        row = max(self.row_seconds, key=lambda name: self.row_seconds[name])
        return "launch" if self.launch_seconds > self.row_seconds[row] else row

    @property
    def told_rows(self) -> tuple[str, ...]:
        """The rows that a reader is shown: every resource, and what limits where that is two of them that slow each
        other."""
        told = tuple(name for name in RESOURCES if name != "cpu_experts" or self.row_seconds[name])
        return told + ((self.limiting_row,) if self.limiting_row in JOINT else ())

    @property
    def limiting_resource(self) -> str:
        """The busiest resource, or "launch"; of a row where resources slow each other or take turns, the busiest of
        them, and "launch" where the row is mostly waiting in between."""
        return self._limit[0]

    @property
    def limiting_seconds(self) -> float:
        """How long the limiting resource is busy in the average pass; of "launch", what is launched or waited for."""
        return self._limit[1]

    @property
    def _limit(self) -> tuple[str, float]:
        row = self.limiting_row
        if not JOINT.get(row):
            return row, self.launch_seconds if row == "launch" else self.row_seconds[row]
        own = {name: self.row_seconds[name] for name in JOINT[row]}
        busiest = max(own, key=lambda name: own[name])
        waiting = self.row_seconds[row] - sum(own.values())
        return ("launch", waiting + self.launch_seconds) if waiting > own[busiest] else (busiest, own[busiest])

    @property
    def disk_write_bytes(self) -> dict[str, int]:
        """What the job writes to the disk: weights once, when they are loaded, and cache and activations as passes
        bring them; of a job without end, those of one pass."""
        weights = self.memory["disk"].get("weights", 0)
        return {"weights": weights, "cache and activations": int(self.work["disk_write"] * self.passes)}

    @property
    def budgets(self) -> dict[str, int]:
        return capacity(self.hardware)

    @property
    def missing(self) -> dict[str, int]:
        """Bytes by which tiers are too small; empty when the plan fits."""
        return shortfall(self.memory, self.hardware)


def as_met(policy: Policy) -> Policy:
    """Without a cache on the CPU nothing is there to attend to, whatever share of it the CPU is given; and of experts
    alike."""
    met = policy if policy.cache.cpu else dataclasses.replace(policy, cpu_attention=0.0)
    return met if policy.weights.cpu else dataclasses.replace(met, cpu_experts=0.0)


def price(
    shape: ModelShape, hardware: Hardware, workload: Workload, policy: Policy, passes: JobPasses | None = None
) -> Plan:
    """Predict everything for a given policy, whether it fits or not (see `Plan.missing`). passes: where they are
    known."""
    passes = passes_of(workload, policy, window=shape.layer_window) if passes is None else passes
    load, counts, tokens = passes.load, passes.counts, passes.tokens
    met = as_met(policy)
    memory = peak_memory(shape, hardware, workload, met)
    model, point = PassModel(shape, hardware, met, load, has_graphs(memory)), point_of(met)
    seconds = counts * model.pass_seconds(point)
    total = float(np.sum(seconds))
    bound = float(np.sum(counts * model.bound_seconds(point)))
    num_passes = float(counts.sum())
    # Every stage of a pipeline runs passes of all parts of the block, and the last one waits for those before it.
    stages = shape.stages
    fill = 0.0 if workload.num_sequences is None else (stages - 1) * total / num_passes
    steady, finished = steady_load(workload, policy)
    steady_seconds = float(PassModel(shape, hardware, met, steady, has_graphs(memory)).pass_seconds(point))
    return Plan(
        policy=policy,
        shape=shape,
        hardware=hardware,
        workload=workload,
        predicted_tokens_per_second=stages * tokens / (stages * total + fill),
        bound_tokens_per_second=tokens / bound,
        steady_tokens_per_second=finished * workload.mean_output / steady_seconds,
        seconds=None if workload.num_sequences is None else stages * total + fill,
        passes=num_passes if workload.num_sequences is None else stages * num_passes,
        pass_seconds=total / num_passes,
        row_seconds={
            name: float(np.sum(counts * value)) / num_passes for name, value in model.resource_seconds(point).items()
        },
        work={name: float(np.sum(counts * value)) / num_passes for name, value in model.resource_work(point).items()},
        launch_seconds=float(np.sum(counts * model.launching_seconds(point))) / num_passes,
        first_answer_seconds=None
        if workload.num_sequences is None
        else fill + stages * float(np.interp(first_finish(workload, policy), np.cumsum(counts), np.cumsum(seconds))),
        most_in_flight=float(passes.in_flight.max()),
        tail_passes=stages * passes.tail_passes,
        tail_sequences=passes.tail_sequences,
        tail_seconds=stages * float(np.sum(np.broadcast_to(seconds, counts.shape)[passes.tail])),
        memory=memory,
    )
