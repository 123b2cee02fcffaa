"""Blocks that a search weighs: what their placement is chosen by, and the best one that was found."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from flexbatch.policy.affine import affine, evaluate, total
from flexbatch.policy.beside import together
from flexbatch.policy.cost import PassModel
from flexbatch.policy.layer_window import LayerWindow
from flexbatch.policy.lp import Solution, StageTimes
from flexbatch.policy.plan import Plan
from flexbatch.policy.policy import Policy
from flexbatch.policy.trajectory import JobPasses, passes_of
from flexbatch.policy.workload import Workload

ALL_ATTENDED = affine(1.0, weights_disk=1, cache_cpu=1, activations_disk=1, cpu_attention=1)
ON_GPU = affine(1.0, weights_gpu=1, cache_gpu=1, activations_gpu=1)
ALL_DISK = affine(1.0, weights_disk=1, cache_disk=1, activations_disk=1)


@dataclass(frozen=True)
class Candidate:
    """The sizes of a block with their best placement."""

    policy: Policy
    solution: Solution
    tokens_per_second: float


@dataclass(frozen=True)
class Deferred:
    """The sizes of a block that cannot be the best: they are placed when somebody asks for the next best ones."""

    tokens_per_second: float
    """At most."""


@dataclass(frozen=True)
class Sizes:
    """What the placement of a block of given sizes is chosen by; the budgets are not part of it."""

    model: PassModel
    """The average passes of the job's phases."""
    counts: np.ndarray
    """How often each of them counts."""
    tokens: float
    """Generated in all of them."""
    memory: dict[str, np.ndarray]
    """Peak bytes per tier, affine."""

    @cached_property
    def times(self) -> StageTimes:
        return StageTimes.of(self.model, self.counts)

    @cached_property
    def least_launched(self) -> np.ndarray:
        """Seconds of launching the ticks of each pass, at any placement."""
        return np.minimum(self.model.launched(ON_GPU), self.model.launch_seconds) - self.model.host_seconds

    @cached_property
    def least_seconds(self) -> float:
        """The GPU's work depends on the placement only through CPU attention: with all of it, no placement takes
        less."""
        hidden = self.model.host_seconds if self.model.may_go_ahead else 0.0
        seconds = together(hidden + self.least_launched, least_compute(self.model), self.model.least_in_view)
        return float(np.sum(self.counts * (self.model.host_seconds - hidden + seconds)))

    @cached_property
    def least_of_host(self) -> tuple[float, float]:
        """Seconds of all passes that the host composes them and commits, and launches, at any placement."""
        host = float(np.sum(self.counts * self.model.host_seconds))
        return host, float(np.sum(self.counts * self.least_launched))

    def least_beside(self, busy: float) -> float:
        """Seconds of all passes where resources are busy for no less than ``busy`` in all of them."""
        host, launched = self.least_of_host
        hidden = host if self.model.may_go_ahead else 0.0
        beside = together(np.asarray(hidden + launched), np.asarray(busy), self.model.least_in_view)
        return host - hidden + float(beside)


@dataclass
class Known:
    """What depends on a model, the rates of a machine and a job, and not on budgets: searches with other budgets share
    it."""

    walks: dict[tuple[Any, ...], JobPasses] = field(default_factory=dict)
    """The job's passes by what they depend on: of bits they know nothing."""
    sizes: dict[Policy, Sizes] = field(default_factory=dict)
    dry: dict[tuple[Any, ...], tuple[Plan | None, float]] = field(default_factory=dict)
    """By budgets of memory and by what is fixed: what was found without the disk."""

    def passes(
        self, workload: Workload, policy: Policy, exact: bool = True, window: LayerWindow | None = None
    ) -> JobPasses:
        """See `trajectory.passes_of`: the pages of tiers, and so the cache's split, count where it is exact."""
        sizes = (policy.gpu_batch_size, policy.num_gpu_batches, policy.prompt_tokens_per_micro_batch, policy.chunk)
        rest = policy.admission_passes, bool(policy.prefill_budget), policy.cache if exact else None
        key = (workload.num_sequences, *sizes, *rest)
        if key not in self.walks:
            self.walks[key] = passes_of(workload, policy, exact, window=window)
        return self.walks[key]


def least_compute(model: PassModel) -> np.ndarray:
    """GPU seconds of each pass at the placement that takes the least: with all attention on the CPU."""
    return total(
        stage.count * np.maximum(0.0, evaluate(stage.seconds["gpu_compute"], ALL_ATTENDED)) for stage in model.stages
    )
