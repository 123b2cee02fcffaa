"""The linear program over the splits and the CPU-attention share, for fixed micro-batch sizes, bits and tree (PuLP; HiGHS, else CBC)."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import pulp

from flexbatch.policy.cost import KINDS, VARIABLES, PassModel
from flexbatch.policy.types import TIERS, Constraints
from flexbatch.policy.units import GIB


@dataclass(frozen=True)
class Solution:
    """``point`` as in `cost.point_of`; ``seconds`` of the whole objective; ``seconds_per_gib`` saved by one GiB more on each tier."""

    point: np.ndarray
    seconds: float
    seconds_per_gib: dict[str, float]


def fixed_fractions(constraints: Constraints) -> dict[str, float]:
    """Variables that the user's percentages fix, the disk's rest included where both others are given."""
    fixed: dict[str, float] = {}
    if constraints.percent is None:
        return fixed
    for kind, gpu, cpu in zip(KINDS, constraints.percent[0::2], constraints.percent[1::2], strict=True):
        fixed |= {f"{kind}_{tier}": value / 100 for tier, value in (("gpu", gpu), ("cpu", cpu)) if value is not None}
    return fixed


def solver():
    """HiGHS in this process where highspy is installed, else the CBC that PuLP brings."""
    return pulp.HiGHS(msg=False) if importlib.util.find_spec("highspy") else pulp.PULP_CBC_CMD(msg=False)


def time_rows(phases: Iterable[tuple[PassModel, float]]) -> tuple[list[tuple[float, np.ndarray]], float]:
    """([(weight of the stage, its rows [rows, 1 + variables])], constant seconds): the objective is the weighted sum of the stages' maxima."""
    stages, constant = [], 0.0
    for model, count in phases:
        constant += count * float(model.launch_seconds)
        stages += [(count * stage.count, dominating(np.stack(list(stage.seconds.values())))) for stage in model.stages]
    return stages, constant


def dominating(rows: np.ndarray) -> np.ndarray:
    """Without the rows that another row exceeds at every placement (coefficient by coefficient)."""
    no_less = np.all(rows[:, None] >= rows[None, :], axis=-1)
    # Of equal rows the first stays.
    beats = no_less & (~no_less.T | np.triu(np.ones(no_less.shape, dtype=bool), 1))
    return rows[~beats.any(axis=0)]


def add_splits(problem: pulp.LpProblem, named: dict, constraints: Constraints) -> None:
    """Every split sums to 1; only what is on the CPU can be attended there."""
    for kind in KINDS:
        problem += pulp.lpSum(named[f"{kind}_{tier}"] for tier in TIERS) == 1
    if constraints.cpu_attention is None:
        problem += named["attended"] <= named["cache_cpu"]
    else:
        problem += named["attended"] == constraints.cpu_attention * named["cache_cpu"]


def placement_variables(problem: pulp.LpProblem, constraints: Constraints, cache_on_disk: bool = True) -> list[pulp.LpVariable]:
    """One variable for each of ``VARIABLES``, pinned where the user's percentages say."""
    fixed = ({} if cache_on_disk else {"cache_disk": 0.0}) | fixed_fractions(constraints)
    return [problem.add_variable(name, fixed.get(name, 0.0), fixed.get(name, 1.0)) for name in VARIABLES]


def expression_of(variables: list[pulp.LpVariable], row: np.ndarray) -> pulp.LpAffineExpression:
    constant, *coefficients = row.tolist()
    return pulp.LpAffineExpression([(v, c) for v, c in zip(variables, coefficients, strict=True) if c], constant)


def point_from(variables: list[pulp.LpVariable]) -> np.ndarray:
    return np.array([1.0, *(min(1.0, max(0.0, v.varValue or 0.0)) for v in variables)])


def least_shortage(memory: dict[str, np.ndarray], room: Mapping[str, float], constraints: Constraints) -> np.ndarray:
    """The placement that lacks the fewest bytes over all tiers, for the message that says what is missing."""
    problem = pulp.LpProblem("shortage", pulp.LpMinimize)
    variables = placement_variables(problem, constraints)
    lacking = [problem.add_variable(f"lacking_{tier}", 0) for tier in TIERS]
    problem += pulp.lpSum(lacking)
    add_splits(problem, dict(zip(VARIABLES, variables, strict=True)), constraints)
    for tier, short in zip(TIERS, lacking, strict=True):
        problem += expression_of(variables, memory[tier] / GIB) <= room[tier] / GIB + short
    problem.solve(solver())
    return point_from(variables)


def solve(
    phases: Iterable[tuple[PassModel, float]],
    memory: dict[str, np.ndarray],
    room: Mapping[str, float],
    constraints: Constraints,
    cache_on_disk: bool = True,
) -> Solution | None:
    """The placement that minimises the sum over (pass, how often) of its time; None when nothing fits.

    memory: peak bytes per tier, affine. room: bytes per tier. cache_on_disk: whether sequences may be there.
    """
    problem = pulp.LpProblem("placement", pulp.LpMinimize)
    variables = placement_variables(problem, constraints, cache_on_disk)
    named = dict(zip(VARIABLES, variables, strict=True))
    phases = list(phases)
    stages, constant = time_rows(phases)
    times = [problem.add_variable(f"stage_{i}", 0) for i in range(len(stages))]
    # Among equal placements the faster tier: a microsecond a pass decides ties and nothing else.
    slower = sum(count for _, count in phases) * 1e-6
    distance = pulp.lpSum(slower * (1 if tier == "cpu" else 2) * named[f"{kind}_{tier}"] for kind in KINDS for tier in ("cpu", "disk"))
    problem += pulp.lpSum(weight * t for (weight, _), t in zip(stages, times, strict=True)) + distance + slower * named["attended"]
    for t, (_, rows) in zip(times, stages, strict=True):
        for row in -rows:
            # t >= row; subtracting one expression from the other would copy both.
            slack = expression_of(variables, row)
            slack[t] = 1.0
            problem += slack >= 0
    add_splits(problem, named, constraints)
    for tier in TIERS:
        # In GiB, so that the program is well scaled and the duals are seconds per GiB.
        problem.addConstraint(expression_of(variables, memory[tier] / GIB) <= room[tier] / GIB, f"room_{tier}")
    if problem.solve(solver()) != pulp.LpStatusOptimal:
        return None
    point = point_from(variables)
    saved = {tier: -float(problem.get_constraint_by_name(f"room_{tier}").pi or 0.0) for tier in TIERS}
    return Solution(point, constant + float(pulp.value(problem.objective) or 0.0), saved)
