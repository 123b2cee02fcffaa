"""Growing a tree level by level from what a draft finds likely: a fixed shape, or a beam. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from flexbatch.speculative.tree import ROOT, Drawing, TokenTree, TreeShape, best_first

Candidates = Sequence[tuple[int, float]]
"""(token, log-probability given the parent), the likeliest first."""


@dataclass(frozen=True)
class TreePlan:
    """How one tree is to be grown: ``shape`` with the likeliest children at its nodes, or, without one, ``beam``
    nodes per level, from which the ``max_nodes`` likeliest are kept in the end. No deeper than ``max_depth`` either
    way."""

    max_depth: int
    max_nodes: int
    shape: TreeShape | None = None
    beam: int = 0

    @property
    def num_levels(self) -> int:
        """Times the draft is asked for children."""
        return (
            min(self.max_depth, self.shape.max_depth)
            if self.shape is not None
            else self.max_depth
            if self.max_nodes
            else 0
        )

    @property
    def grown_nodes(self) -> int:
        """Nodes before the likeliest are kept."""
        return len(self.shape) if self.shape is not None else self.max_depth * self.beam


class GrowingTree:
    """A tree under construction. ``frontier``: nodes (or ROOT) whose children are wanted next; empty when the tree
    is complete."""

    def __init__(self, plan: TreePlan, drawing: Drawing = Drawing.DETERMINISTIC) -> None:
        """drawing: how the candidates that it will be given were chosen. Children drawn by chance need a shape:
        their number is fixed before the draw."""
        assert drawing is Drawing.DETERMINISTIC or plan.shape is not None or not plan.num_levels, (
            "a beam chooses by what was drawn"
        )
        self.plan, self.drawing = plan, drawing
        self.token_ids: list[int] = []
        self.parents: list[int] = []
        self.logprobs: list[float] = []
        self.path_logprobs: list[float] = []
        self.paths: dict[int, tuple[int, ...]] = {ROOT: ()}
        """Tokens down to every node of the frontier."""
        self.shape_indices: dict[int, int] = {ROOT: ROOT}
        """Index in the shape of every node of the frontier."""
        self.depth = 0
        self.frontier: list[int] = [ROOT] if plan.num_levels > 0 else []

    @property
    def width(self) -> int:
        """Most children that any node of the frontier can take."""
        if self.plan.shape is None:
            return self.plan.beam
        return max(map(self.num_children, self.frontier), default=0)

    def num_children(self, node: int) -> int:
        """Children that a node of the frontier can take."""
        shape = self.plan.shape
        return self.plan.beam if shape is None else len(shape.children[self.shape_indices[node] + 1])

    @property
    def is_chain(self) -> bool:
        return all(parent == node - 1 for node, parent in enumerate(self.parents))

    def extend(self, candidates: Sequence[Candidates]) -> None:
        """Take in the candidates of every node of the frontier, in its order; the frontier moves one level down."""
        self.depth += 1
        added = self._shaped(candidates) if self.plan.shape is not None else self._beam(candidates)
        paths, shape_indices = {}, {}
        for parent, shape_index, token, logprob in added:
            node = len(self.token_ids)
            self.token_ids.append(token)
            self.parents.append(parent)
            self.logprobs.append(logprob)
            self.path_logprobs.append(logprob + (self.path_logprobs[parent] if parent != ROOT else 0.0))
            paths[node], shape_indices[node] = (*self.paths[parent], token), shape_index
        self.paths, self.shape_indices = paths, shape_indices
        growing = self.depth < self.plan.num_levels
        shape = self.plan.shape
        self.frontier = [
            node for node, index in shape_indices.items() if growing and (shape is None or shape.children[index + 1])
        ]

    def _shaped(self, candidates: Sequence[Candidates]) -> list[tuple[int, int, int, float]]:
        assert self.plan.shape is not None
        added = []
        for node, offered in zip(self.frontier, candidates, strict=True):
            children = self.plan.shape.children[self.shape_indices[node] + 1]
            for shape_index, (token, logprob) in zip(children, offered, strict=False):
                added.append((node, shape_index, token, logprob))
        return added

    def _beam(self, candidates: Sequence[Candidates]) -> list[tuple[int, int, int, float]]:
        offers = []
        for node, offered in zip(self.frontier, candidates, strict=True):
            above = self.path_logprobs[node] if node != ROOT else 0.0
            offers += [(-above - logprob, node, token, logprob) for token, logprob in offered]
        # Stable: of equal offers the earlier node and the likelier child stay first.
        best = sorted(range(len(offers)), key=lambda i: offers[i][0])[: self.plan.beam]
        return [(offers[i][1], ROOT, offers[i][2], offers[i][3]) for i in sorted(best, key=lambda i: (offers[i][1], i))]

    def tree(self) -> TokenTree:
        """What has grown so far."""
        tree = TokenTree(tuple(self.token_ids), TreeShape(tuple(self.parents)), tuple(self.logprobs), self.drawing)
        return tree if self.plan.shape is not None else best_first(tree, self.plan.max_nodes)
