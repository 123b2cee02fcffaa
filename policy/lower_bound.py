"""What a linear program cannot be faster than, by the duals of programs that were solved before it."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field

import numpy as np

from flexbatch.policy.affine import COLUMNS, KINDS
from flexbatch.policy.lp import Solution, StageTimes
from flexbatch.policy.policy import TIERS
from flexbatch.policy.units import GIB

KEPT = 16
"""Solved programs that are remembered: those of the sizes that were tried last are the most alike."""


@dataclass
class Duals:
    """Of the programs of one family of policies with the same budgets.

    A stage takes no less than any mixture of its rows, and a tier that is too small costs no less than its price. With
    the mixture and the prices of another program's solution that is one affine function of the placement, whose least
    value is on one tier for each kind of tensor (the Lagrangian relaxation). Between sizes that are alike it is within
    a few per cent of the program's own value, and takes a fiftieth of the time.
    """

    cpu_attention: float | None
    """The share of the CPU's sequences that is attended there; None leaves it open."""
    cpu_experts: float | None
    """The same of the weights there."""
    cache_on_disk: bool
    found: dict[tuple[int, ...], list[tuple[np.ndarray, np.ndarray]]] = field(default_factory=lambda: defaultdict(list))
    """(shares of the rows in their stages, price of a GiB of each tier) of solved programs, by the shape of their
    rows."""

    def add(self, solution: Solution) -> None:
        weights = solution.row_weights
        sums = weights.sum(axis=-1, keepdims=True)
        even = np.full(weights.shape, 1 / weights.shape[-1])
        shares = np.divide(weights, sums, out=even, where=sums > 0)
        prices = np.array([max(0.0, solution.seconds_per_gib[tier]) for tier in TIERS])
        known = self.found[weights.shape]
        known.append((shares, prices))
        del known[:-KEPT]

    def least_seconds(self, times: StageTimes, memory: dict[str, np.ndarray], budgets: dict[str, int]) -> float:
        """Of the stages of all passes, without launching; 0 where nothing is known."""
        known = self.found.get(times.rows.shape[:-1])
        if not known:
            return 0.0
        shares, prices = (np.array(column) for column in zip(*known, strict=True))
        weighted = (shares * times.weights[..., None]).reshape(len(known), -1)
        missing = np.array([memory[tier] for tier in TIERS])
        missing[:, 0] -= [budgets[tier] for tier in TIERS]
        mixed = weighted @ times.rows.reshape(weighted.shape[1], -1) + prices @ (missing / GIB)
        for name, there, share in (
            ("cpu_attention", "cache_cpu", self.cpu_attention),
            ("cpu_experts", "weights_cpu", self.cpu_experts),
        ):
            # At most all that is there, or just the given share of it.
            done = mixed[:, COLUMNS[name]]
            mixed[:, COLUMNS[there]] += np.minimum(0.0, done) if share is None else share * done
        if not self.cache_on_disk:
            mixed[:, COLUMNS["cache_disk"]] = np.inf
        by_kind = mixed[:, 1 : 1 + len(KINDS) * len(TIERS)].reshape(len(known), len(KINDS), len(TIERS))
        return float(np.max(mixed[:, 0] + by_kind.min(axis=-1).sum(axis=-1)))
