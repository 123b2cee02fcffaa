"""Token trees: pure data. Positions are depths, slots are indices, the mask is "is an ancestor of".

A tree hangs below the *root*, the last committed token of its sequence, which has no keys and values yet. In a pass
the query tokens of the sequence are [root, node 0, node 1, ...]; *row* r of the query is the root for r = 0 and node
r - 1 otherwise.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import Enum
from functools import cached_property

ROOT = -1
"""Parent of the nodes that follow the last committed token."""


class Drawing(Enum):
    """How the children of each node were chosen; it decides the rule of verification."""

    DETERMINISTIC = "deterministic"
    """Top-k, best-first, beam or n-gram: children do not depend on chance, or only on the noise that the target
    draws with too."""
    INDEPENDENT = "independent"
    """Each child is an independent draw from the draft; siblings may repeat a token."""
    WITHOUT_REPLACEMENT = "without replacement"
    """Siblings are drawn one after another from the draft, renormalized over the tokens not yet drawn."""


@dataclass(frozen=True)
class TreeShape:
    """The skeleton of a tree: ``parents[i]`` is the index of node i's parent, ROOT (-1) below the last committed token.

    Parents come before their children, and siblings in rank order (draw order, or most likely first). Raises
    ValueError otherwise.
    """

    parents: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        for node, parent in enumerate(self.parents):
            if not ROOT <= parent < node:
                raise ValueError(
                    f"node {node} of {len(self.parents)} has parent {parent}; it must be -1 (root) or an earlier node"
                )

    def __len__(self) -> int:
        return len(self.parents)

    @cached_property
    def depths(self) -> tuple[int, ...]:
        """Distance from the root, 1 for its children: position of node i = position of the root + depths[i]."""
        depths: list[int] = []
        for parent in self.parents:
            depths.append(1 if parent == ROOT else depths[parent] + 1)
        return tuple(depths)

    @cached_property
    def children(self) -> tuple[tuple[int, ...], ...]:
        """Nodes below every *row* of the query, in rank order: ``children[0]`` hang below the root, ``children[i +
        1]`` below node i."""
        below: list[list[int]] = [[] for _ in range(len(self.parents) + 1)]
        for node, parent in enumerate(self.parents):
            below[parent + 1].append(node)
        return tuple(map(tuple, below))

    @cached_property
    def ranks(self) -> tuple[int, ...]:
        """Rank of every node among its siblings, 0 for the first."""
        ranks = [0] * len(self.parents)
        for siblings in self.children:
            for rank, node in enumerate(siblings):
                ranks[node] = rank
        return tuple(ranks)

    @property
    def max_depth(self) -> int:
        """0 for an empty tree."""
        return max(self.depths, default=0)

    def path(self, node: int) -> tuple[int, ...]:
        """Nodes from below the root down to ``node``, itself included; () for ROOT."""
        path: list[int] = []
        while node != ROOT:
            path.append(node)
            node = self.parents[node]
        return tuple(reversed(path))


@dataclass(frozen=True)
class TokenTree:
    """Drafted continuations of one sequence. ``TokenTree()`` is the empty tree: plain decoding.

    token_ids: one per node. logprobs: natural log of the draft's probability of each node given its parent, where
    the draft has one. Raises ValueError when lengths differ, a probability exceeds 1, or siblings repeat a token
    though they were not drawn independently.
    """

    token_ids: tuple[int, ...] = ()
    shape: TreeShape = TreeShape()
    logprobs: tuple[float, ...] | None = None
    drawn: Drawing = Drawing.DETERMINISTIC

    def __post_init__(self) -> None:
        nodes = len(self.shape)
        if len(self.token_ids) != nodes or (self.logprobs is not None and len(self.logprobs) != nodes):
            known = "no" if self.logprobs is None else len(self.logprobs)
            raise ValueError(f"{nodes} nodes, {len(self.token_ids)} tokens, {known} logprobs: need one each per node")
        if min(self.token_ids, default=0) < 0:
            raise ValueError(f"token id {min(self.token_ids)} is negative")
        # Draft probabilities come from float32 softmax: a certain token may exceed 1 by rounding.
        if self.logprobs is not None and not all(logprob <= 1e-5 for logprob in self.logprobs):
            raise ValueError(f"log-probabilities must be at most 0, got {max(self.logprobs)}")
        if self.drawn is not Drawing.INDEPENDENT and len(set(zip(self.parents, self.token_ids, strict=True))) < nodes:
            raise ValueError(
                f"siblings repeat a token in a tree drawn {self.drawn.value}: tokens {self.token_ids}, parents "
                f"{self.parents}"
            )

    def __len__(self) -> int:
        return len(self.token_ids)

    @property
    def parents(self) -> tuple[int, ...]:
        return self.shape.parents

    @property
    def depths(self) -> tuple[int, ...]:
        return self.shape.depths

    @cached_property
    def path_logprobs(self) -> tuple[float, ...]:
        """Log-probability that the draft gives to the whole path to each node, at most that of its prefix. Raises
        ValueError without probabilities."""
        if self.logprobs is None:
            raise ValueError("this tree carries no draft probabilities")
        totals: list[float] = []
        for parent, logprob in zip(self.parents, self.logprobs, strict=True):
            totals.append(min(logprob, 0.0) + (0.0 if parent == ROOT else totals[parent]))
        return tuple(totals)

    def query_tokens(self, last_token: int) -> tuple[int, ...]:
        """Query tokens of the sequence in a pass: the last committed token, then the nodes."""
        return (last_token, *self.token_ids)

    def child(self, row: int, token: int) -> int | None:
        """The first node below query row ``row`` with this token, None where none has it."""
        return next((node for node in self.shape.children[row] if self.token_ids[node] == token), None)

    def subtree(self, keep: Iterable[int]) -> TokenTree:
        """The tree of the nodes ``keep``, in their present order. Raises ValueError when one of them loses its
        parent."""
        kept = sorted(set(keep))
        index = {ROOT: ROOT} | {node: i for i, node in enumerate(kept)}
        for node in kept:
            if self.parents[node] not in index:
                raise ValueError(f"node {node} is kept without its parent {self.parents[node]}")
        logprobs = None if self.logprobs is None else tuple(self.logprobs[node] for node in kept)
        return TokenTree(
            tuple(self.token_ids[node] for node in kept),
            TreeShape(tuple(index[self.parents[node]] for node in kept)),
            logprobs,
            self.drawn,
        )

    def cut(self, max_depth: int) -> TokenTree:
        """Without the nodes deeper than ``max_depth``, which a sequence near its token limit cannot commit."""
        if self.shape.max_depth <= max_depth:
            return self
        return self.subtree(node for node, depth in enumerate(self.depths) if depth <= max_depth)


def chain(token_ids: Sequence[int], logprobs: Sequence[float] | None = None) -> TokenTree:
    """One continuation without branches."""
    return TokenTree(
        tuple(token_ids), TreeShape(tuple(range(-1, len(token_ids) - 1))), None if logprobs is None else tuple(logprobs)
    )


def merge(trees: Sequence[TokenTree], max_nodes: int | None = None) -> TokenTree:
    """One tree that holds every path of ``trees`` once: shared prefixes are shared (SpecInfer, section 3, merge-based
    speculation).

    Nodes keep the order of the trees, so that siblings rank by first appearance; a node in several trees takes the
    highest of its probabilities. ``max_nodes`` stops the growth: the first trees win. Raises ValueError for trees
    drawn by chance, which no rule could verify once merged.
    """
    trees = [tree for tree in trees if len(tree)]
    if not trees or max_nodes == 0:
        return TokenTree()
    if any(tree.drawn is not Drawing.DETERMINISTIC for tree in trees):
        raise ValueError(f"only deterministic trees can be merged, got {sorted({tree.drawn.value for tree in trees})}")
    index: dict[tuple[int, int], int] = {}
    logprobs: list[float] = []
    for tree in trees:
        moved = {ROOT: ROOT}
        for node, key in enumerate(zip(tree.parents, tree.token_ids, strict=True)):
            if key[0] not in moved:
                continue
            merged = (moved[key[0]], key[1])
            logprob = tree.logprobs[node] if tree.logprobs is not None else 0.0
            if merged not in index:
                if max_nodes is not None and len(index) >= max_nodes:
                    continue
                index[merged] = len(index)
                logprobs.append(logprob)
            moved[node] = index[merged]
            logprobs[moved[node]] = max(logprobs[moved[node]], logprob)
    known = all(tree.logprobs is not None for tree in trees)
    return TokenTree(
        tuple(token for _, token in index),
        TreeShape(tuple(parent for parent, _ in index)),
        tuple(logprobs) if known else None,
    )


def best_first(tree: TokenTree, max_nodes: int) -> TokenTree:
    """The ``max_nodes`` nodes that the draft finds most likely to be reached (EAGLE-2, section 4.2, reranking).

    Over a tree that holds all children of every node this is best-first search: a path is never more likely than its
    prefix, so that the kept nodes keep their ancestors (ties go to the earlier node, and parents come first).
    Siblings keep their order. Raises ValueError for a tree without probabilities.
    """
    if len(tree) <= max_nodes:
        return tree
    order = sorted(range(len(tree)), key=lambda node: (-tree.path_logprobs[node], node))
    return tree.subtree(order[:max_nodes])
