"""What the search for a policy has tried: sizes of a block, the linear program's placement for them, and the plan
that whole tensors make of it."""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from dataclasses import dataclass, field

import numpy as np

from flexbatch.policy.affine import KINDS, VARIABLES, affine, evaluate, total
from flexbatch.policy.cost import PassModel
from flexbatch.policy.footprint import capacity, memory_rows, peak_memory, shortfall
from flexbatch.policy.hardware import Hardware
from flexbatch.policy.lp import Solution, fixed_fractions, solve, time_rows
from flexbatch.policy.model_shape import ModelShape
from flexbatch.policy.pass_load import FLUID_BLOCKS, PassLoad, job_phases, steady_load
from flexbatch.policy.plan import Plan, price
from flexbatch.policy.policy import TIERS, Constraints, Policy, Split
from flexbatch.policy.rounding import placed
from flexbatch.policy.trajectory import JobPasses, passes_of
from flexbatch.policy.workload import Workload

LONG_JOB = 4096
"""Sequences from which a job of many blocks is long."""
PolicyFamily = tuple[int, int, float, float, Split]
ALL_ATTENDED = affine(1.0, weights_disk=1, cache_cpu=1, activations_disk=1, cpu_attention=1)
ON_GPU = affine(1.0, weights_gpu=1, cache_gpu=1, activations_gpu=1)
ALL_DISK = affine(1.0, weights_disk=1, cache_disk=1, activations_disk=1)


@dataclass(frozen=True)
class Candidate:
    """The sizes of a block with their best placement."""

    policy: Policy
    solution: Solution
    tokens_per_second: float


@dataclass
class Search:
    """One run of `choose`: what was tried and what it gave."""

    shape: ModelShape
    hardware: Hardware
    workload: Workload
    constraints: Constraints
    linear_programs: int = 0
    walks: dict[tuple[float, ...], JobPasses] = field(default_factory=dict)
    """The job's passes by the sizes that they depend on: of bits and placements they know nothing."""
    tried: dict[PolicyFamily, dict[Policy, Candidate | None]] = field(
        default_factory=lambda: defaultdict(dict), init=False
    )

    def family(self, template: Policy) -> list[Candidate]:
        """The candidates of ``template``'s family, the best first."""
        found = (candidate for candidate in self.tried[family_of(template)].values() if candidate)
        return sorted(found, key=lambda candidate: -candidate.tokens_per_second)

    def top(self, template: Policy) -> float:
        return max(
            (candidate.tokens_per_second for candidate in self.tried[family_of(template)].values() if candidate),
            default=0.0,
        )

    def passes(self, policy: Policy) -> tuple[PassModel, np.ndarray, float]:
        """(the average passes of the job's phases, how often each counts, generated tokens in all of them)."""
        if self.workload.num_sequences is None or self.is_long(policy):
            load, finished = steady_load(self.workload, policy)
            return (
                PassModel(self.shape, self.hardware, policy, PassLoad.together([load])),
                np.ones(1),
                finished * self.workload.mean_output,
            )
        # All phases in one model: what is computed is a few numbers, and numpy's calls cost more than they do.
        loads, counts = zip(*job_phases(self.workload, policy), strict=True)
        model = PassModel(self.shape, self.hardware, policy, PassLoad.together(loads))
        return model, np.array(counts), self.workload.num_sequences * self.workload.mean_output

    def is_long(self, policy: Policy) -> bool:
        """Whether a block fills so often that policies are compared by their steady state. What is chosen is priced
        with the beginning and the end of the job all the same."""
        total = self.workload.num_sequences
        return total is not None and total > max(LONG_JOB, FLUID_BLOCKS * policy.block_size)

    @property
    def placement_given(self) -> bool:
        """Whether the user's percentages leave nothing open: then nothing is placed, and the exact sizes alone say
        whether it fits."""
        return len(fixed_fractions(self.constraints)) == 2 * len(KINDS)

    def memory(self, policy: Policy) -> dict[str, np.ndarray]:
        """Peak bytes per tier, affine."""
        rows = memory_rows(self.shape, self.hardware, self.workload, policy)
        return {tier: np.sum(list(kinds.values()), axis=0) for tier, kinds in rows.items()}

    def attempt(self, policy: Policy, least_rate: float | None = None) -> Candidate | None:
        """Solve for ``policy``'s sizes, unless it cannot fit or cannot beat the best (or ``least_rate``), which
        needs no linear program to see."""
        tried = self.tried[family_of(policy)]
        if policy in tried and (least_rate is None or tried[policy]):
            return tried[policy]
        tried[policy] = None
        memory, budgets = self.memory(policy), capacity(self.hardware)
        if (
            not self.placement_given
            and min(float(memory["gpu"] @ point) for point in (ALL_ATTENDED, ALL_DISK, ON_GPU)) > budgets["gpu"]
        ):
            return None
        model, counts, tokens = self.passes(policy)
        # The GPU's work depends on the placement only through CPU attention: with all of it, no placement takes less.
        least = float(np.sum(counts * (model.launched(ON_GPU) + least_compute(model))))
        if tokens / least < (self.top(policy) if least_rate is None else least_rate):
            return None
        solution = self.solve(policy, model, counts, memory, budgets)
        if solution is not None:
            # The program cannot know that a block on the GPU launches less and staged cache more.
            seconds = float(np.sum(counts * model.pass_seconds(solution.point)))
            candidate = Candidate(policy, solution, tokens / seconds)
            # No program sees the capacity of a given placement. Blocks that are too large for it are the fastest, and
            # would keep those that fit from being tried.
            if not self.placement_given or not self.shortage(self.placed(candidate)):
                tried[policy] = candidate
        return tried[policy]

    def placed(self, candidate: Candidate) -> Policy:
        """The candidate's policy with whole tensors and sequences."""
        return placed(self.shape, candidate.policy, candidate.solution.point, self.constraints)

    def shortage(self, policy: Policy) -> dict[str, int]:
        """Bytes by which tiers are too small for a policy's exact sizes, decode graphs included."""
        return shortfall(peak_memory(self.shape, self.hardware, self.workload, policy, True), self.hardware)

    def finish(self, candidate: Candidate) -> Plan | None:
        """The plan of a candidate with whole tensors and sequences; the program runs again with less memory while
        rounding does not fit."""
        model, counts, _ = self.passes(candidate.policy)
        memory, budgets = self.memory(candidate.policy), dict(capacity(self.hardware))
        solution: Solution | None = candidate.solution
        for _ in range(8):
            if solution is None:
                return None
            policy = self.placed(dataclasses.replace(candidate, solution=solution))
            missing = self.shortage(policy)
            if not missing:
                plan = self.price(policy)
                saved = {
                    tier: seconds / solution.seconds * plan.predicted_tokens_per_second
                    for tier, seconds in solution.seconds_per_gib.items()
                }
                return dataclasses.replace(plan, tokens_per_second_per_gib=saved)
            if self.placement_given:
                return None
            for tier, size in missing.items():
                budgets[tier] -= size + min(2**20, capacity(self.hardware)[tier] // 100)
            solution = self.solve(candidate.policy, model, counts, memory, budgets)
        return None

    def price(self, policy: Policy) -> Plan:
        """See `plan.price`."""
        sizes = (policy.gpu_batch_size, policy.num_gpu_batches, policy.prompt_tokens_per_micro_batch, policy.chunk)
        if sizes not in self.walks:
            workload = dataclasses.replace(self.workload, num_sequences=None) if self.is_long(policy) else self.workload
            self.walks[sizes] = passes_of(workload, policy, exact=False)
        return price(self.shape, self.hardware, self.workload, policy, self.walks[sizes])

    def solve(
        self,
        policy: Policy,
        model: PassModel,
        counts: np.ndarray,
        memory: dict[str, np.ndarray],
        budgets: dict[str, int],
    ) -> Solution | None:
        """The best placement; one without CPU attention or CPU experts where ``policy`` has none."""
        constraints = dataclasses.replace(
            self.constraints,
            cpu_attention=self.constraints.cpu_attention if policy.cpu_attention else 0.0,
            cpu_experts=self.constraints.cpu_experts if policy.cpu_experts else 0.0,
        )
        if self.placement_given:
            if constraints.cpu_attention is not None and constraints.cpu_experts is not None:
                return given_solution(model, counts, constraints)
            # No memory binds: only the shares of the CPU are open, and take none.
            budgets = {tier: int(np.abs(row).sum()) + 1 for tier, row in memory.items()}
        self.linear_programs += 1
        return solve([(model, counts)], memory, budgets, constraints, cache_on_disk=policy.cache.disk > 0)


def given_solution(model: PassModel, counts: np.ndarray, constraints: Constraints) -> Solution:
    """The placement that the user's percentages and shares of the CPU are, with its time; nothing is left to
    solve."""
    fixed = fixed_fractions(constraints)
    for kind in KINDS:
        fixed.setdefault(f"{kind}_disk", max(0.0, 1 - fixed[f"{kind}_gpu"] - fixed[f"{kind}_cpu"]))
    fixed["cpu_attention"] = (constraints.cpu_attention or 0.0) * fixed["cache_cpu"]
    fixed["cpu_experts"] = (constraints.cpu_experts or 0.0) * fixed["weights_cpu"]
    point = np.array([1.0, *(fixed[name] for name in VARIABLES)])
    stages, constant = time_rows([(model, counts)])
    return Solution(
        point,
        constant + sum(weight * float(np.max(rows @ point)) for weight, rows in stages),
        dict.fromkeys(TIERS, 0.0),
    )


def least_compute(model: PassModel) -> np.ndarray:
    """GPU seconds of each pass at the placement that takes the least: with all attention on the CPU."""
    return total(
        stage.count * np.maximum(0.0, evaluate(stage.seconds["gpu_compute"], ALL_ATTENDED)) for stage in model.stages
    )


def family_of(policy: Policy) -> PolicyFamily:
    """Bits, CPU attention or none, CPU experts or none, and cache on the disk or none.

    Of another family nothing follows: the linear program's average passes flatter some more than others.
    """
    return policy.weight_bits, policy.cache_bits, policy.cpu_attention, policy.cpu_experts, policy.cache
