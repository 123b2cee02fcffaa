"""What the search for a policy has tried: sizes of a block, the linear program's placement for them, and the plan
that whole tensors make of it."""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from dataclasses import dataclass, field

import numpy as np

from flexbatch.policy.affine import COLUMNS, KINDS, VARIABLES
from flexbatch.policy.candidates import ALL_ATTENDED, ALL_DISK, ON_GPU, Candidate, Deferred, Known, Sizes
from flexbatch.policy.cost import PassModel
from flexbatch.policy.footprint import capacity, memory_rows, peak_memory, shortfall
from flexbatch.policy.hardware import Hardware
from flexbatch.policy.lower_bound import Duals
from flexbatch.policy.lp import Solution, StageTimes, fixed_fractions, solve
from flexbatch.policy.model_shape import ModelShape
from flexbatch.policy.pass_load import FLUID_BLOCKS, PassLoad, job_phases, steady_load
from flexbatch.policy.plan import Plan, price
from flexbatch.policy.policy import TIERS, Constraints, Policy, Split
from flexbatch.policy.rounding import placed
from flexbatch.policy.workload import Workload

LONG_JOB = 4096
"""Sequences from which a job of many blocks is long."""
PolicyFamily = tuple[int, int, float, float, Split]
TOLERANCE = 1e-6
"""Relative, of the solver: a program's value may be this much better than what it cannot exceed."""


@dataclass
class Search:
    """One run of `choose`: what was tried and what it gave."""

    shape: ModelShape
    hardware: Hardware
    workload: Workload
    constraints: Constraints
    linear_programs: int = 0
    known: Known = field(default_factory=Known)
    weighed: int = 0
    """Sizes that were compared by their programs, solved or deferred."""
    tried: dict[PolicyFamily, dict[Policy, Candidate | Deferred | None]] = field(
        default_factory=lambda: defaultdict(dict), init=False
    )
    tops: dict[PolicyFamily, float] = field(default_factory=dict, init=False)
    duals: dict[PolicyFamily, Duals] = field(default_factory=dict, init=False)

    def best(self, template: Policy, count: int) -> list[Candidate]:
        """The ``count`` best candidates of ``template``'s family, the best first. What was deferred is placed as far
        as it may be among them."""
        tried = self.tried[family_of(template)]
        deferred = [(each.tokens_per_second, policy) for policy, each in tried.items() if isinstance(each, Deferred)]
        for most, policy in sorted(deferred, key=lambda pair: -pair[0]):
            rates = [each.tokens_per_second for each in tried.values() if isinstance(each, Candidate)]
            if len(rates) >= count and most < sorted(rates)[-count]:
                break
            tried[policy] = self.place(policy)
        found = [each for each in tried.values() if isinstance(each, Candidate)]
        return sorted(found, key=lambda candidate: -candidate.tokens_per_second)[:count]

    def top(self, template: Policy) -> float:
        """The rate of the best candidate: what is deferred is not it."""
        return self.tops.get(family_of(template), 0.0)

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

    def has_program(self, policy: Policy) -> bool:
        """Whether anything about the placement of a policy's sizes is open."""
        constraints = self.constraints_for(policy)
        return not self.placement_given or None in (constraints.cpu_attention, constraints.cpu_experts)

    def sizes(self, policy: Policy) -> Sizes:
        """What placing ``policy``'s sizes needs."""
        sizes = self.known.sizes.get(policy)
        if sizes is None:
            rows = memory_rows(self.shape, self.hardware, self.workload, policy)
            memory = {tier: np.sum(list(kinds.values()), axis=0) for tier, kinds in rows.items()}
            sizes = self.known.sizes[policy] = Sizes(*self.passes(policy), memory)
        return sizes

    def attempt(self, policy: Policy, least_rate: float | None = None) -> Candidate | None:
        """Place ``policy``'s sizes, unless it cannot fit or cannot beat the best (or ``least_rate``), which needs no
        linear program to see. Without ``least_rate`` what the duals show not to be the best is deferred."""
        tried = self.tried[family_of(policy)]
        before = tried.get(policy)
        if isinstance(before, Candidate):
            return before
        if policy in tried and least_rate is None:
            return None
        if before is not None:
            tried[policy] = candidate = self.place(policy)
            return candidate
        tried[policy] = None
        sizes = self.sizes(policy)
        smallest = min(float(sizes.memory["gpu"] @ point) for point in (ALL_ATTENDED, ALL_DISK, ON_GPU))
        if not self.placement_given and smallest > capacity(self.hardware)["gpu"]:
            return None
        if sizes.tokens / sizes.least_seconds < (self.top(policy) if least_rate is None else least_rate):
            return None
        self.weighed += self.has_program(policy)
        most = self.most(policy, sizes)
        if least_rate is None and most < self.top(policy):
            tried[policy] = Deferred(most)
            return None
        tried[policy] = candidate = self.place(policy)
        return candidate

    def most(self, policy: Policy, sizes: Sizes) -> float:
        """Tokens a second that no placement of these sizes exceeds, by the duals of others."""
        family = family_of(policy)
        if family not in self.duals or fixed_fractions(self.constraints):
            return np.inf
        seconds = self.duals[family].least_seconds(sizes.times, sizes.memory, capacity(self.hardware))
        return (1 + TOLERANCE) * sizes.tokens / max(sizes.least_seconds, sizes.least_beside(seconds))

    def place(self, policy: Policy) -> Candidate | None:
        """The best placement of ``policy``'s sizes; None where none fits."""
        sizes = self.sizes(policy)
        solution = self.solve(policy, sizes, capacity(self.hardware))
        if solution is None:
            return None
        # The program cannot know that a block on the GPU launches less and staged cache more.
        seconds = float(np.sum(sizes.counts * sizes.model.pass_seconds(solution.point)))
        candidate = Candidate(policy, solution, sizes.tokens / seconds)
        # No program sees the capacity of a given placement. Blocks that are too large for it are the fastest, and
        # would keep those that fit from being tried.
        if self.placement_given and self.shortage(self.placed(candidate)):
            return None
        family = family_of(policy)
        if family not in self.duals:
            shares = self.constraints_for(policy)
            self.duals[family] = Duals(shares.cpu_attention, shares.cpu_experts, policy.cache.disk > 0)
        self.duals[family].add(solution)
        self.tops[family] = max(candidate.tokens_per_second, self.tops.get(family, 0.0))
        return candidate

    def constraints_for(self, policy: Policy, constraints: Constraints | None = None) -> Constraints:
        """Without CPU attention or CPU experts where ``policy`` has none."""
        constraints = constraints or self.constraints
        return dataclasses.replace(
            constraints,
            cpu_attention=constraints.cpu_attention if policy.cpu_attention else 0.0,
            cpu_experts=constraints.cpu_experts if policy.cpu_experts else 0.0,
        )

    def placed(self, candidate: Candidate, constraints: Constraints | None = None) -> Policy:
        """The candidate's policy with whole tensors and sequences."""
        return placed(self.shape, candidate.policy, candidate.solution.point, constraints or self.constraints)

    def shortage(self, policy: Policy) -> dict[str, int]:
        """Bytes by which tiers are too small for a policy's exact sizes, decode graphs included."""
        return shortfall(peak_memory(self.shape, self.hardware, self.workload, policy, True), self.hardware)

    def finish(self, candidate: Candidate) -> Plan | None:
        """The plan of a candidate with whole tensors and sequences.

        What is launched for a cache, or for weights, of which anything is off the GPU does not depend on how much it
        is, so that no program sees it: where all of one on the GPU is faster by that, the rest is placed around it. A
        single sequence of Llama-3.1-8B in 8 GiB had its one page in host memory, beside weights that left no room for
        it, and took 30 % longer.
        """
        plans = [self.rounded(candidate, self.constraints)]
        for kind in ("cache", "weights") if self.hardware.device == "cuda" else ():
            pinned = with_all_on_gpu(self.constraints, kind)
            column, sizes = COLUMNS[f"{kind}_gpu"], self.sizes(candidate.policy)
            too_large = float(sizes.memory["gpu"][column]) > capacity(self.hardware)["gpu"]
            if pinned is None or too_large or candidate.solution.point[column] >= 1:
                continue
            solution = self.solve(candidate.policy, sizes, capacity(self.hardware), pinned)
            if solution is None:
                continue
            rate = sizes.tokens / float(np.sum(sizes.counts * sizes.model.pass_seconds(solution.point)))
            if rate > candidate.tokens_per_second:
                plans.append(self.rounded(dataclasses.replace(candidate, solution=solution), pinned))
        return max(filter(None, plans), key=lambda plan: plan.predicted_tokens_per_second, default=None)

    def rounded(self, candidate: Candidate, constraints: Constraints) -> Plan | None:
        """The plan of a candidate's placement; the program runs again with less memory while rounding does not fit."""
        sizes, budgets = self.sizes(candidate.policy), dict(capacity(self.hardware))
        solution: Solution | None = candidate.solution
        for _ in range(8):
            if solution is None:
                return None
            policy = self.placed(dataclasses.replace(candidate, solution=solution), constraints)
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
            solution = self.solve(candidate.policy, sizes, budgets, constraints)
        return None

    def price(self, policy: Policy, whole: bool = False) -> Plan:
        """See `plan.price`. A long job counts by its steady state where it is not ``whole``."""
        steady = self.is_long(policy) and not whole
        workload = dataclasses.replace(self.workload, num_sequences=None) if steady else self.workload
        passes = self.known.passes(workload, policy, exact=False)
        return price(self.shape, self.hardware, self.workload, policy, passes)

    def solve(
        self, policy: Policy, sizes: Sizes, budgets: dict[str, int], constraints: Constraints | None = None
    ) -> Solution | None:
        """The best placement; one without CPU attention or CPU experts where ``policy`` has none."""
        constraints = self.constraints_for(policy, constraints)
        if not self.has_program(policy):
            return given_solution(sizes.times, constraints)
        if self.placement_given:
            # No memory binds: only the shares of the CPU are open, and take none.
            budgets = {tier: int(np.abs(row).sum()) + 1 for tier, row in sizes.memory.items()}
        self.linear_programs += 1
        return solve(sizes.times, sizes.memory, budgets, constraints, cache_on_disk=policy.cache.disk > 0)


def given_solution(times: StageTimes, constraints: Constraints) -> Solution:
    """The placement that the user's percentages and shares of the CPU are, with its time; nothing is left to
    solve."""
    fixed = fixed_fractions(constraints)
    for kind in KINDS:
        fixed.setdefault(f"{kind}_disk", max(0.0, 1 - fixed[f"{kind}_gpu"] - fixed[f"{kind}_cpu"]))
    fixed["cpu_attention"] = (constraints.cpu_attention or 0.0) * fixed["cache_cpu"]
    fixed["cpu_experts"] = (constraints.cpu_experts or 0.0) * fixed["weights_cpu"]
    point = np.array([1.0, *(fixed[name] for name in VARIABLES)])
    return Solution(point, times.at(point), dict.fromkeys(TIERS, 0.0), np.zeros(times.kept.shape))


def with_all_on_gpu(constraints: Constraints, kind: str) -> Constraints | None:
    """All of a kind of tensor on the GPU; None where the user has said anything of it."""
    percent, index = list(constraints.percent or (None,) * 2 * len(KINDS)), 2 * KINDS.index(kind)
    if percent[index : index + 2] != [None, None]:
        return None
    percent[index : index + 2] = 100.0, 0.0
    return dataclasses.replace(constraints, percent=tuple(percent))


def family_of(policy: Policy) -> PolicyFamily:
    """Bits, CPU attention or none, CPU experts or none, and cache on the disk or none.

    Of another family nothing follows: the linear program's average passes flatter some more than others.
    """
    return policy.weight_bits, policy.cache_bits, policy.cpu_attention, policy.cpu_experts, policy.cache
