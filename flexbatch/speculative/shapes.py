"""Which tree to draft: the user's syntax, fixed shapes, and the best static shape for measured acceptance."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from flexbatch.speculative.tree import ROOT, TreeShape


def fixed_widths(widths: Sequence[int]) -> TreeShape:
    """Every node at depth d has ``widths[d]`` children (SpecInfer's expansion configuration): <1,1,3,1,1> has 1 + 1
    + 3 + 3 + 3 nodes."""
    parents: list[int] = []
    level = [ROOT]
    for width in widths:
        start = len(parents)
        parents += [parent for parent in level for _ in range(width)]
        level = list(range(start, len(parents)))
    return TreeShape(tuple(parents))


@dataclass(frozen=True)
class StaticTrees:
    """The best tree of every size for an acceptance table, by the dynamic program of Sequoia (section 3.1), with
    depth limited.

    acceptance: ``acceptance[d][r]`` is the probability that the child of rank r below an accepted node at depth d is
    the accepted one (d = 0: the root); the ranks of one node sum to at most 1. Its size limits depth and children per
    node. max_nodes: largest tree considered.

    With T(m, d) the most tokens expected at and below an accepted node of depth d, itself included, from a subtree
    of m nodes, and G(m, r, d) the most from m nodes spread over its children of rank r and higher: T(m, d) = 1 + G(m
    - 1, 0, d), and G(m, r, d) is the maximum over s of acceptance[d][r] * T(s, d + 1) + G(m - s, r + 1, d). Raises
    ValueError for a table that is not one of probabilities.
    """

    acceptance: tuple[tuple[float, ...], ...]
    max_nodes: int

    def __post_init__(self) -> None:
        for depth, row in enumerate(self.acceptance):
            if min(row, default=0.0) < 0 or sum(row) > 1 + 1e-9 or len(row) != len(self.acceptance[0]):
                raise ValueError(
                    f"acceptance at depth {depth} must be probabilities that sum to at most 1, as many as at depth "
                    f"0, got {row}"
                )

    @cached_property
    def _tables(self) -> tuple[np.ndarray, np.ndarray]:
        """G [depth + 1, rank + 1, nodes + 1] and the sizes s that reach it. T(m, d) is 1 + G[d, 0, m - 1]."""
        depths, ranks, nodes = len(self.acceptance), len(self.acceptance[0]) if self.acceptance else 0, self.max_nodes
        gain = np.zeros((depths + 1, ranks + 1, nodes + 1))
        size = np.zeros((depths + 1, ranks + 1, nodes + 1), dtype=np.int64)
        # Child of this rank with s = 1 .. m nodes of its own subtree (column s - 1), the other m - s nodes with its
        # younger siblings.
        left = np.arange(1, nodes + 1)[:, None] - np.arange(1, nodes + 1)[None, :]
        for depth in reversed(range(depths)):
            below = 1 + gain[depth + 1, 0, :nodes]
            for rank in reversed(range(ranks)):
                options = np.where(
                    left >= 0, self.acceptance[depth][rank] * below + gain[depth, rank + 1][left], -np.inf
                )
                best = options.argmax(1)
                gain[depth, rank, 1:], size[depth, rank, 1:] = options[np.arange(nodes), best], best + 1
        return gain, size

    @cached_property
    def expected_tokens(self) -> np.ndarray:
        """[max_nodes + 1]: tokens committed per pass by the best tree of 0, 1, ... nodes, the one after the path
        included."""
        return 1 + self._tables[0][0, 0]

    def shape(self, nodes: int) -> TreeShape:
        """The best tree of at most ``nodes`` nodes, level by level; nodes that cannot be accepted are left out."""
        _, size = self._tables
        parents: list[int] = []
        level = [(ROOT, nodes)]
        for depth in range(len(self.acceptance)):
            below: list[tuple[int, int]] = []
            for parent, budget in level:
                rank = 0
                while budget > 0 and rank < len(self.acceptance[depth]) and any(self.acceptance[depth][rank:]):
                    own = int(size[depth, rank, budget])
                    below.append((len(parents), own - 1))
                    parents.append(parent)
                    budget, rank = budget - own, rank + 1
            level = below
        return TreeShape(tuple(parents))
