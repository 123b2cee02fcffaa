"""A draft model: resident weights, a cache of its own on the gpu tier, and trees grown for all sequences of the
block together."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from collections.abc import Sequence as Many
from itertools import islice
from typing import NamedTuple

import torch
from torch import Tensor

from flexbatch.execution.block_sizes import BlockSizes
from flexbatch.execution.pass_batch import LogitsChunk, PassBatch, QueryTokens
from flexbatch.execution.runner import Runner, open_runner
from flexbatch.execution.sequence import Sequence
from flexbatch.memory.pages import CacheLayout
from flexbatch.memory.tiers import Tiers
from flexbatch.memory.transfer import TransferQueues
from flexbatch.memory.weights import WeightStore
from flexbatch.models.arch import Arch
from flexbatch.policy.admission import CacheSizes
from flexbatch.policy.policy import Policy, Split
from flexbatch.speculative.followed import Followed
from flexbatch.speculative.growth import Candidates, GrowingTree, TreePlan
from flexbatch.speculative.scoring import likeliest
from flexbatch.speculative.stochastic import drawn_children
from flexbatch.speculative.tree import ROOT, Drawing, TokenTree

RESIDENT = Policy(Split(1, 0), Split(1, 0), Split(1, 0), gpu_batch_size=1, num_gpu_batches=1)
"""Where a draft lies: weights and cache on the compute device."""
PASS_TOKENS = 4096
"""Query tokens of a draft pass, about."""
SCORED_ELEMENTS = 1 << 21
"""Logits scored at one time."""
SCORING_BYTES_PER_LOGIT = 48
"""Workspace of each of them, at most: a copy of the row, and what sampling makes of it."""
DRAFT_LOGITS_CHUNK_BYTES = 32 << 20
"""float32 logits of a draft that exist at one time."""


class Wanted(NamedTuple):
    """A row of logits from which children of a tree's node are chosen."""

    row: int
    tree: int
    frontier_index: int
    """The index of the node in the tree's frontier."""
    sequence: Sequence
    path: tuple[int, ...]


class DraftModel:
    """Proposes trees from a small model that stays on the compute device, through the same executor as the target.

    Its cache holds committed tokens, and the trunk of the present tree. A tree beyond its trunk is read anew at
    every level: its few nodes cost less than the weights that every level reads anyway, and nothing has to be moved
    when a path is accepted.
    """

    def __init__(
        self,
        name: str,
        arch: Arch,
        weights: WeightStore,
        tiers: Tiers,
        queues: TransferQueues,
        layout: CacheLayout,
        vocab_size: int,
        grown_nodes: int,
        drawing: Drawing = Drawing.DETERMINISTIC,
    ) -> None:
        """vocab_size: of the target; of padding that only one of the two has, nothing is proposed. grown_nodes: of
        the largest tree, candidates included. drawing: how children of sampled requests are chosen; deterministic
        ones are those that the target would draw if it agreed.
        """
        self.name, self.arch, self.weights, self.tiers, self.queues, self.layout = (
            name,
            arch,
            weights,
            tiers,
            queues,
            layout,
        )
        self.vocab_size, self.grown_nodes = vocab_size, grown_nodes
        self.drawing = drawing
        self.distributions: dict[Sequence, dict[int, Tensor]] = {}
        """What the children of each node were drawn from, [vocab], in the present stochastic trees."""
        self.followed: dict[Sequence, Followed] = {}
        self.levels: list[tuple[int, float]] = []
        """Tokens read and seconds of every level of the latest trees; the first one reads new prompts too."""
        self.runner: Runner | None = None

    def open_runner(self, num_pages: int, positions: int) -> None:
        """Make room for sequences that together need ``num_pages`` pages, and reach so many positions with their
        trees."""
        if self.runner is not None and num_pages <= self.runner.sizes.cache.gpu_pages:
            self.runner.executor.reach(positions)
            return
        self.close_runner()
        sizes = BlockSizes(CacheSizes(num_pages, 0, 0, 0), 0, 0, longest=positions)
        self.runner = open_runner(
            self.arch, self.weights, self.layout, RESIDENT, sizes, self.tiers, self.queues, DRAFT_LOGITS_CHUNK_BYTES
        )

    # Drafting

    def draft(self, sequences: Many[Sequence], plans: Many[TreePlan]) -> list[TokenTree]:
        """One tree per sequence, grown as its plan says. Children are the likeliest tokens, for sampled requests
        under the noise that the target will draw with: then a draft that agrees with the target's probabilities
        proposes the very token that the target draws."""
        for sequence in sequences:
            self.distributions.pop(sequence, None)
        self.levels = []
        trees, followed = [], {}
        for i, (sequence, plan) in enumerate(zip(sequences, plans, strict=True)):
            trees.append(
                GrowingTree(plan if self.reaches(sequence, plan) else TreePlan(0, 0), self.drawing_of(sequence))
            )
            if trees[i].frontier:
                followed[i] = self.follow(sequence)
        self.catch_up(list(followed.values()))
        while growing := [i for i, tree in enumerate(trees) if tree.frontier]:
            started = time.perf_counter()
            queries = {self.level_query(followed[i], trees[i]): i for i in growing}
            offers = self.children(queries, trees, sequences)
            for i in growing:
                trees[i].extend(offers[i])
            self.levels.append((sum(query.num_tokens for query in queries), time.perf_counter() - started))
        return [tree.tree() for tree in trees]

    def uncomputed_tokens(self, sequences: Many[Sequence]) -> int:
        """Committed tokens that are not in the draft's cache yet."""
        return sum(
            len(sequence.token_ids) - len(self.followed[sequence].cached if sequence in self.followed else ())
            for sequence in sequences
        )

    def drawing_of(self, sequence: Sequence) -> Drawing:
        return Drawing.DETERMINISTIC if sequence.params.greedy else self.drawing

    def follow(self, sequence: Sequence) -> Followed:
        """The draft's own record of a sequence, with a cache table of its own, rewound to what is committed."""
        followed = self.followed.get(sequence)
        if followed is None:
            assert self.runner is not None
            table = self.runner.cache.open("gpu", self.max_rows(sequence))
            followed = self.followed[sequence] = Followed(sequence, table, [])
        followed.rewind()
        return followed

    def reaches(self, sequence: Sequence, plan: TreePlan) -> bool:
        """Whether the draft's context, which may be shorter than the target's, holds the sequence and a tree, and
        its cache has room for it: a stream may bring requests that are longer than those that the cache was sized
        for."""
        if self.runner is None or len(sequence.token_ids) + plan.max_depth > self.runner.rotary.num_positions:
            return False
        return sequence in self.followed or self.runner.cache.can_open("gpu", self.max_rows(sequence))

    def max_rows(self, sequence: Sequence) -> int:
        """Token rows that the sequence may need in the draft's cache."""
        return sequence.num_prompt_tokens + sequence.output.max_tokens + self.grown_nodes

    def known(self, tokens: tuple[int, ...]) -> tuple[int, ...]:
        """Tokens that the draft can read: ids in padding that only the target has become token 0."""
        return (
            tokens
            if max(tokens) < self.arch.vocab_size
            else tuple(token if token < self.arch.vocab_size else 0 for token in tokens)
        )

    def catch_up(self, followed: Many[Followed]) -> None:
        """Read long stretches of committed text (prompts), a chunk per pass, until each sequence has at most one
        chunk left."""
        while long := [item for item in followed if len(item.sequence.token_ids) - len(item.cached) > PASS_TOKENS]:
            list(self.run([self.text_query(item, PASS_TOKENS, logits=False) for item in long]))

    def text_query(self, followed: Followed, count: int, logits: bool = True) -> QueryTokens:
        start = len(followed.cached)
        tokens = tuple(islice(followed.sequence.token_ids, start, start + count))
        followed.cached += tokens
        return followed.query(self.known(tokens), start, len(tokens) - 1 if logits else len(tokens))

    def level_query(self, followed: Followed, tree: GrowingTree) -> QueryTokens:
        """What the draft must read to know the children of the tree's frontier; its rows of logits end with those of
        the newest level."""
        sequence = followed.sequence
        if not tree.token_ids:
            return self.text_query(followed, PASS_TOKENS)
        trunk = len(followed.cached) - len(sequence.token_ids)
        start = len(followed.cached)
        tokens = tuple(tree.token_ids[trunk:])
        first = tree.frontier[0] - trunk
        if tree.is_chain:
            followed.cached += tokens
            return followed.query(tokens, start, first)
        return followed.query(tokens, start, first, tuple(max(parent - trunk, ROOT) for parent in tree.parents[trunk:]))

    def children(
        self, owner: dict[QueryTokens, int], trees: Many[GrowingTree], sequences: Many[Sequence]
    ) -> dict[int, list[Candidates]]:
        """Run one level; candidates for every node of every frontier. owner: which tree every query reads."""
        width = max(trees[i].width for i in owner.values())
        offers: dict[int, list[Candidates]] = {i: [()] * len(trees[i].frontier) for i in owner.values()}
        for chunk in self.run(list(owner)):
            wanted: list[Wanted] = []
            for r, (query, token) in enumerate(chunk.rows):
                i, tree = owner[query], trees[owner[query]]
                node = ROOT if not tree.token_ids else len(tree.token_ids) - query.num_tokens + token
                if node in tree.frontier:
                    wanted.append(Wanted(r, i, tree.frontier.index(node), sequences[i], tree.paths[node]))
            step = max(1, SCORED_ELEMENTS // self.vocab_size)
            for part in (wanted[start : start + step] for start in range(0, len(wanted), step)):
                logits = self.fitted(chunk.logits[[row.row for row in part]])
                stochastic = [trees[row.tree].drawing is not Drawing.DETERMINISTIC for row in part]
                scored = (
                    likeliest(logits, [row.sequence for row in part], [row.path for row in part], width)
                    if not all(stochastic)
                    else []
                )
                for i, row in enumerate(part):
                    offers[row.tree][row.frontier_index] = (
                        self.draw(logits[i], row.sequence, trees[row.tree], row.frontier_index)
                        if stochastic[i]
                        else scored[i]
                    )
        return offers

    def draw(self, logits: Tensor, sequence: Sequence, tree: GrowingTree, frontier_index: int) -> Candidates:
        """Children by chance of one node of a tree's frontier; what they were drawn from is kept for verification."""
        node = tree.frontier[frontier_index]
        count = tree.num_children(node)
        children, distribution = drawn_children(logits, sequence, tree.paths[node], node, count, tree.drawing)
        self.distributions.setdefault(sequence, {})[node] = distribution
        return children

    def fitted(self, logits: Tensor) -> Tensor:
        """Logits over the target's vocabulary: ``pad`` by a negative number cuts."""
        return torch.nn.functional.pad(logits, (0, self.vocab_size - logits.shape[1]), value=-torch.inf)

    def run(self, queries: list[QueryTokens]) -> Iterator[LogitsChunk]:
        """The rows of logits that were asked for. Weights and cache are on the GPU, so that a pass of each
        ``PASS_TOKENS`` costs no more than one of all."""
        assert self.runner is not None
        batch: list[QueryTokens] = []
        left = PASS_TOKENS
        for query in queries:
            if batch and query.num_tokens > left:
                yield from self.runner.executor.run(PassBatch((tuple(batch),)))
                batch, left = [], PASS_TOKENS
            batch.append(query)
            left -= query.num_tokens
        yield from self.runner.executor.run(PassBatch((tuple(batch),)))

    # Lifetime

    @property
    def peak_bytes(self) -> int:
        """Most memory of the gpu tier that weights and cache took."""
        return self.tiers.gpu.peak_bytes

    def release(self, sequence: Sequence) -> None:
        self.distributions.pop(sequence, None)
        followed = self.followed.pop(sequence, None)
        if followed is not None and self.runner is not None:
            self.runner.cache.free(followed.table)

    def forget(self) -> None:
        """Its cache goes too: the failure may have come between a sequence and its pages."""
        self.followed.clear()
        self.distributions = {}
        self.close_runner()
        self.weights.drain()

    def check(self) -> None:
        """Invariants: what is known to be committed is; no table holds more than it has pages for."""
        if self.runner is not None:
            self.runner.check()
        for sequence, followed in self.followed.items():
            assert followed.cached[: followed.num_known] == sequence.token_ids[: followed.num_known], (
                "the draft's cache does not follow the text"
            )
            assert len(followed.cached) <= len(followed.table.pages) * self.layout.page_tokens

    def close_runner(self) -> None:
        assert not self.followed, f"{len(self.followed)} sequences are still followed"
        runner, self.runner = self.runner, None
        if runner is not None:
            runner.close()

    def close(self) -> None:
        self.followed.clear()
        with contextlib.ExitStack() as stack:
            for close in (self.tiers.close, self.weights.close, self.close_runner):
                stack.callback(close)
