"""How often drafted tokens were accepted, by their position in the tree, and which tree that makes worth its cost."""

from __future__ import annotations

import heapq
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import numpy as np

from flexbatch.speculative.shapes import StaticTrees
from flexbatch.speculative.tree import TokenTree, TreeShape
from flexbatch.speculative.verify import AcceptedPath

AcceptanceTable = tuple[tuple[float, ...], ...]
"""[depth][rank], as `StaticTrees` takes it."""


class AcceptanceStatistics:
    """Running acceptance by (depth of the parent, child rank) of one group of sequences.

    At every node of an accepted path that had children, each child is one offer, and at most one of them is taken.
    Old observations fade by ``decay`` per observed tree. A position with few offers leans on its rank's average over
    all depths, and that on ``prior``, each worth ``weight`` offers.
    """

    def __init__(
        self,
        depths: int = 8,
        ranks: int = 8,
        *,
        prior: Sequence[float] = (0.6, 0.12, 0.05),
        weight: float = 8.0,
        decay: float = 0.998,
    ) -> None:
        if sum(prior) > 1 or min(prior) < 0 or not 0 < decay <= 1 or weight <= 0:
            raise ValueError(
                f"prior {tuple(prior)} must be probabilities that sum to at most 1, weight {weight} above 0 and "
                f"decay {decay} in (0, 1]"
            )
        self.offered = np.zeros((depths, ranks), dtype=np.int64)
        """Children offered at accepted nodes in the whole run, [depth of the parent, rank]."""
        self.taken = np.zeros((depths, ranks), dtype=np.int64)
        self.recent_offered = np.zeros((depths, ranks))
        self.recent_taken = np.zeros((depths, ranks))
        self.prior = np.array([*prior, *[0.0] * ranks])[:ranks]
        self.weight = weight
        self.decay = decay
        self.trees = 0
        """Trees observed with at least one node."""
        self.tokens = 0
        """Tokens emitted by them, the one after the path included."""

    def observe(self, tree: TokenTree, accepted: AcceptedPath) -> None:
        """Take in one verified tree, before EOS or a limit cut its path. Depths and ranks beyond the table are not
        counted."""
        if not len(tree):
            return
        self.recent_offered *= self.decay
        self.recent_taken *= self.decay
        self.trees += 1
        self.tokens += len(accepted.path) + 1
        depths, ranks = self.offered.shape
        rows = (0, *(node + 1 for node in accepted.path))
        for depth, row in enumerate(rows[:depths]):
            children = len(tree.shape.children[row])
            self.offered[depth, :children] += 1
            self.recent_offered[depth, :children] += 1
        for depth, node in enumerate(accepted.path[:depths]):
            if (rank := tree.shape.ranks[node]) < ranks:
                self.taken[depth, rank] += 1
                self.recent_taken[depth, rank] += 1

    def table(self) -> AcceptanceTable:
        """Estimates [depth][rank]: falling in rank (a later child is never better than an earlier one), each depth's
        sum at most 1."""
        by_rank = (self.recent_taken.sum(0) + self.weight * self.prior) / (self.recent_offered.sum(0) + self.weight)
        estimate = (self.recent_taken + self.weight * by_rank) / (self.recent_offered + self.weight)
        estimate = np.minimum.accumulate(estimate, axis=1)
        estimate /= np.maximum(estimate.sum(1, keepdims=True), 1.0)
        return tuple(tuple(row) for row in estimate.tolist())

    def report(self) -> dict[str, object]:
        """Acceptance by position over the whole run: ``by_position[d][r]`` of the child of rank r below an accepted
        node at depth d, None where none was."""
        rates = [
            [round(t / o, 4) if o else None for t, o in zip(*rows, strict=True)]
            for rows in zip(self.taken.tolist(), self.offered.tolist(), strict=True)
        ]
        return {
            "trees": self.trees,
            "tokens_per_tree": self.tokens / self.trees if self.trees else 0.0,
            "by_position": rates,
        }

    def check(self) -> None:
        """Raises AssertionError when more was taken than offered, or one node had two accepted children."""
        for taken, offered in ((self.taken, self.offered), (self.recent_taken, self.recent_offered)):
            assert (taken <= offered + 1e-9).all(), f"taken {taken.tolist()} exceeds offered {offered.tolist()}"
            assert (taken.sum(1) <= offered[:, 0] + 1e-9).all(), (
                f"more than one child of a node was accepted: {taken.tolist()} of {offered.tolist()}"
            )


@dataclass(frozen=True)
class PiecewiseLinear:
    """Seconds as a function of a count, linear between ``points`` (count, seconds) and beyond the last two; flat
    before the first."""

    points: tuple[tuple[float, float], ...]

    def __post_init__(self) -> None:
        if not self.counts or any(a >= b for a, b in pairwise(self.counts)):
            raise ValueError(f"points need rising counts, got {self.counts}")

    @cached_property
    def counts(self) -> list[float]:
        return [count for count, _ in self.points]

    def __call__(self, count: float) -> float:
        counts = self.counts
        if count <= counts[0] or len(counts) == 1:
            return self.points[0][1]
        right = min(bisect_right(counts, count), len(counts) - 1)
        (x0, y0), (x1, y1) = self.points[right - 1], self.points[right]
        return y0 + (y1 - y0) * (count - x0) / (x1 - x0)


@dataclass(frozen=True)
class Group:
    """Sequences that are drafted alike: how many decode in this pass, and their acceptance table. Raises ValueError
    when a depth rises with rank."""

    sequences: int
    acceptance: AcceptanceTable

    def __post_init__(self) -> None:
        for depth, row in enumerate(self.acceptance):
            if any(later > earlier for earlier, later in pairwise(row)):
                raise ValueError(f"acceptance at depth {depth} must not rise with rank, got {row}")


@dataclass(frozen=True)
class ShapeChoice:
    """shapes: one per group, empty for plain decoding. tokens and seconds: expected of the pass, drafting included."""

    shapes: tuple[TreeShape, ...]
    tokens: float
    seconds: float

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds


def path_gains(acceptance: AcceptanceTable, max_nodes: int) -> list[float]:
    """What each further node of the best tree adds to the expected tokens: the chance that the path to it is accepted,
    the largest first.

    A node is never likelier than its parent or an elder sibling, so that the likeliest n nodes are a tree, and the
    best of n nodes: what `StaticTrees.expected_tokens` adds up to, several times faster than the dynamic program
    for the sizes alone.
    """
    if not acceptance or not acceptance[0]:
        return []
    heap = [(-acceptance[0][0], 0, 0, 1.0)]
    gains: list[float] = []
    while heap and len(gains) < max_nodes:
        negative, depth, rank, above = heapq.heappop(heap)
        if negative > -1e-12:
            break
        gains.append(-negative)
        if depth + 1 < len(acceptance):
            heapq.heappush(heap, (negative * acceptance[depth + 1][0], depth + 1, 0, -negative))
        if rank + 1 < len(acceptance[depth]):
            heapq.heappush(heap, (-above * acceptance[depth][rank + 1], depth, rank + 1, above))
    return gains


def choose_shapes(
    groups: Sequence[Group],
    pass_seconds: Callable[[float], float],
    draft_seconds: Callable[[int, float], float],
    *,
    other_query_tokens: int = 0,
    max_nodes: int = 64,
    margin: float = 0.02,
    least_gain: float = 0.0,
    starting: tuple[float, float] = (0.0, 1.0),
) -> ShapeChoice:
    """The smallest trees of one pass whose expected tokens per second are within ``margin`` of the most; none where
    that gains no more than ``least_gain``.

    pass_seconds: of the target, given all query tokens of the pass, of which ``other_query_tokens`` are prompt
    chunks. draft_seconds: of drafting, given the depth and the nodes of all trees together (not asked for none).
    max_nodes: per sequence. starting: seconds that beginning to draft costs once, and the tokens over which that is
    spread. Each depth limit is tried; below it, nodes are added where a query token gains most, over all groups
    together: the gains of a group fall with its size, so that every total is spent in the best way, to within one
    node of the largest group (a step adds a node to every sequence of a group).
    """
    live = sum(group.sequences for group in groups)
    baseline = ShapeChoice(tuple(TreeShape() for _ in groups), float(live), pass_seconds(other_query_tokens + live))
    choices: list[tuple[float, float, float, int, list[int]]] = []
    """(tokens per second, query tokens, expected tokens, depth, nodes per group)."""
    for depth in range(1, max((len(group.acceptance) for group in groups), default=0) + 1):
        gains = [path_gains(group.acceptance[:depth], max_nodes) if group.sequences else [] for group in groups]
        steps = sorted(((gain, g) for g in range(len(groups)) for gain in gains[g]), reverse=True)
        nodes = [0] * len(groups)
        tokens, queries = float(live), other_query_tokens + live
        for gain, g in steps:
            nodes[g] += 1
            tokens += gain * groups[g].sequences
            queries += groups[g].sequences
            seconds = (
                pass_seconds(queries)
                + draft_seconds(depth, queries - other_query_tokens - live)
                + starting[0] * tokens / starting[1]
            )
            choices.append((tokens / seconds, queries, tokens, depth, nodes.copy()))
    most = max((rate for rate, *_ in choices), default=0.0)
    if most <= baseline.tokens_per_second * (1 + least_gain):
        return baseline
    # A measured cost is not exact: what a larger tree gains within the margin may be noise, what it costs is sure.
    least = max(most * (1 - margin), baseline.tokens_per_second)
    rate, _, tokens, depth, nodes = min(
        (choice for choice in choices if choice[0] >= least), key=lambda choice: (choice[1], -choice[0])
    )
    shapes = (
        StaticTrees(group.acceptance[:depth], count).shape(count) if count else TreeShape()
        for group, count in zip(groups, nodes, strict=True)
    )
    return ShapeChoice(tuple(shapes), tokens, tokens / rate)
