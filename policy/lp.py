"""The linear program over the splits and the CPU-attention share, for fixed micro-batch sizes, bits and tree.

HiGHS solves it, as SciPy brings it. A modeling layer with solvers of its own (PuLP) was dropped: its releases
removed the solver that came with it, and the package of HiGHS beside it prints to stdout at the first solve. SciPy's
interface has been the same since 1.7.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from flexbatch.policy.affine import COLUMNS, KINDS, VARIABLES
from flexbatch.policy.cost import PassModel
from flexbatch.policy.policy import TIERS, Constraints
from flexbatch.policy.stage import Stage
from flexbatch.policy.units import GIB

Row = Mapping[int, float] | np.ndarray


@dataclass(frozen=True)
class Solution:
    """``point`` as in `cost.point_of`; ``seconds`` of the whole objective; ``seconds_per_gib`` saved by one GiB more
    on each tier; ``row_weights`` [passes, stages, rows]: the duals of `StageTimes.rows`, how often each of them is what
    a stage takes."""

    point: np.ndarray
    seconds: float
    seconds_per_gib: dict[str, float]
    row_weights: np.ndarray


def fixed_fractions(constraints: Constraints) -> dict[str, float]:
    """Variables that the user's percentages fix, the disk's rest included where both others are given."""
    fixed: dict[str, float] = {}
    if constraints.percent is None:
        return fixed
    for kind, gpu, cpu in zip(KINDS, constraints.percent[0::2], constraints.percent[1::2], strict=True):
        fixed |= {f"{kind}_{tier}": value / 100 for tier, value in (("gpu", gpu), ("cpu", cpu)) if value is not None}
    return fixed


@dataclass
class LinearProgram:
    """The least ``cost @ x`` for x within bounds, with rows ``coefficients @ x`` that are at most, or equal to, a
    limit.

    A column is the number of a variable; rows are mappings from columns to coefficients, or arrays over the first
    columns.
    """

    lower: list[float] = field(default_factory=list)
    upper: list[float] = field(default_factory=list)
    cost: dict[int, float] = field(default_factory=dict)
    at_most: list[tuple[Row, float]] = field(default_factory=list)
    equal: list[tuple[Row, float]] = field(default_factory=list)

    def add(self, lower: float = 0.0, upper: float = np.inf) -> int:
        """A variable; returns its column."""
        self.lower.append(lower)
        self.upper.append(upper)
        return len(self.lower) - 1

    def solved(self) -> LinearSolution | None:
        """None where no x meets every row, or where none is the best."""
        cost = self._dense([(self.cost, 0.0)])[0][0]
        upper_rows, upper_limits = self._dense(self.at_most)
        equal_rows, equal_limits = self._dense(self.equal)
        bounds = np.column_stack((self.lower, self.upper))
        from scipy.optimize import linprog  # 0.4 s of imports that a model which fits the GPU does not need

        result: Any = linprog(cost, upper_rows, upper_limits, equal_rows, equal_limits, bounds, method="highs")
        return LinearSolution(result.x, float(result.fun), result.ineqlin.marginals) if result.status == 0 else None

    def _dense(self, rows: list[tuple[Row, float]]) -> tuple[np.ndarray, np.ndarray]:
        matrix = np.zeros((len(rows), len(self.lower)))
        for index, (row, _) in enumerate(rows):
            if isinstance(row, np.ndarray):
                matrix[index, : len(row)] = row
            else:
                matrix[index, list(row)] = list(row.values())
        return matrix, np.array([limit for _, limit in rows])


@dataclass(frozen=True)
class LinearSolution:
    """``duals``: what one more of the limit of each row of ``at_most`` adds to the cost."""

    x: np.ndarray
    cost: float
    duals: np.ndarray


@dataclass(frozen=True)
class StageTimes:
    """What a program minimizes: passes of a model, each a sum of stages that take as long as their slowest row."""

    rows: np.ndarray
    """[passes, stages, rows, 1 + variables] seconds, affine in the placement."""
    weights: np.ndarray
    """[passes, stages]: how often a stage of a pass counts."""
    constant: float
    """Seconds of launching, wherever everything is."""
    passes: float

    @classmethod
    def of(cls, model: PassModel, count: float | np.ndarray) -> StageTimes:
        """count: how often the model's passes count, a number for all of them or one for each."""
        counts = np.atleast_1d(count)
        rows = np.stack([rows_by_pass(stage, len(counts)) for stage in model.stages], axis=1)
        weights = counts[:, None] * np.array([stage.count for stage in model.stages])
        return cls(rows, weights, sum((counts * model.launch_seconds).tolist()), sum(counts.tolist()))

    @cached_property
    def kept(self) -> np.ndarray:
        """[passes, stages, rows]: which rows can be the slowest."""
        return undominated(self.rows)

    def at(self, point: np.ndarray) -> float:
        """Seconds at a placement."""
        return self.constant + float(np.sum(self.weights * np.max(self.rows @ point, axis=-1)))


def rows_by_pass(stage: Stage, passes: int) -> np.ndarray:
    """[passes, rows, 1 + variables]: what does not differ from pass to pass is the same in all of them."""
    rows = np.empty((passes, len(stage.seconds), 1 + len(VARIABLES)))
    for index, row in enumerate(stage.seconds.values()):
        rows[:, index] = row
    return rows


def undominated(rows: np.ndarray) -> np.ndarray:
    """[..., rows] of rows [..., rows, columns]: whether no other exceeds it coefficient by coefficient, which is to say
    at every placement. Of equal rows the first stays."""
    no_less = np.all(rows[..., :, None, :] >= rows[..., None, :, :], axis=-1)
    earlier = np.triu(np.ones(no_less.shape[-2:], dtype=bool), 1)
    return ~np.any(no_less & (~np.swapaxes(no_less, -1, -2) | earlier), axis=-2)


def column(name: str) -> int:
    """The column of a placement variable: they are a program's first columns, in the order of ``VARIABLES``."""
    return COLUMNS[name] - 1


def placement_program(constraints: Constraints, cache_on_disk: bool = True) -> LinearProgram:
    """Every split sums to 1, only what is on the CPU can be attended there, and what the user's percentages say is
    pinned."""
    program = LinearProgram()
    fixed = ({} if cache_on_disk else {"cache_disk": 0.0}) | fixed_fractions(constraints)
    for name in VARIABLES:
        program.add(fixed.get(name, 0.0), fixed.get(name, 1.0))
    for kind in KINDS:
        program.equal.append(({column(f"{kind}_{tier}"): 1.0 for tier in TIERS}, 1.0))
    add_shares(program, constraints)
    return program


def add_shares(program: LinearProgram, constraints: Constraints) -> None:
    """The CPU attends and computes at most what is there, or just the shares of it that the user gave."""
    for name, where, share in (
        ("cpu_attention", "cache_cpu", constraints.cpu_attention),
        ("cpu_experts", "weights_cpu", constraints.cpu_experts),
    ):
        done, there = column(name), column(where)
        if share is None:
            program.at_most.append(({done: 1.0, there: -1.0}, 0.0))
        else:
            program.equal.append(({done: 1.0, there: -share}, 0.0))


def point_from(solution: LinearSolution) -> np.ndarray:
    return np.array([1.0, *np.clip(solution.x[: len(VARIABLES)], 0.0, 1.0)])


def least_shortage(memory: dict[str, np.ndarray], budgets: Mapping[str, float], constraints: Constraints) -> np.ndarray:
    """The placement that lacks the fewest bytes over all tiers, for the message that says what is missing."""
    program = placement_program(constraints)
    for tier in TIERS:
        constant, *coefficients = memory[tier] / GIB
        lacking = program.add()
        program.cost[lacking] = 1.0
        program.at_most.append(({**dict(enumerate(coefficients)), lacking: -1.0}, budgets[tier] / GIB - constant))
    solution = program.solved()
    assert solution is not None, "any placement lacks something finite"
    return point_from(solution)


def solve(
    times: StageTimes,
    memory: dict[str, np.ndarray],
    budgets: Mapping[str, float],
    constraints: Constraints,
    cache_on_disk: bool = True,
) -> Solution | None:
    """The placement that minimizes the time of all passes; None when nothing fits.

    memory: peak bytes per tier, affine. budgets: bytes per tier. cache_on_disk: whether sequences may be there.
    """
    program = placement_program(constraints, cache_on_disk)
    # Among equal placements the faster tier: a microsecond a pass decides ties and nothing else.
    slower = times.passes * 1e-6
    for kind in KINDS:
        program.cost |= {column(f"{kind}_cpu"): slower, column(f"{kind}_disk"): 2 * slower}
    program.cost |= {column("cpu_attention"): slower, column("cpu_experts"): slower}
    # In GiB, so that the program is well scaled and the duals are seconds per GiB.
    budget_rows = [len(program.at_most) + index for index in range(len(TIERS))]
    program.at_most += [(memory[tier][1:] / GIB, (budgets[tier] - memory[tier][0]) / GIB) for tier in TIERS]
    first = len(program.at_most)
    for index, weight in np.ndenumerate(times.weights):
        seconds = program.add()
        program.cost[seconds] = float(weight)
        for row in times.rows[index][times.kept[index]]:
            # row <= seconds
            program.at_most.append((np.concatenate((row[1:], np.zeros(seconds - len(VARIABLES)), [-1.0])), -row[0]))
    solution = program.solved()
    if solution is None:
        return None
    saved = {tier: -float(solution.duals[index]) for tier, index in zip(TIERS, budget_rows, strict=True)}
    row_weights = np.zeros(times.kept.shape)
    row_weights[times.kept] = np.maximum(0.0, -solution.duals[first:])
    return Solution(point_from(solution), times.constant + solution.cost, saved, row_weights)
