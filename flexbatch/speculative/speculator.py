"""The proposer: asks drafts for trees, chooses how large they are, keeps the books."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Mapping
from collections.abc import Sequence as Many
from dataclasses import dataclass
from itertools import zip_longest

from torch import Tensor

from flexbatch.execution.logprobs import token_logprobs
from flexbatch.execution.pass_batch import QueryTokens
from flexbatch.execution.random_stream import ACCEPT_DRAW, uniforms
from flexbatch.execution.sampler import SampledTokens
from flexbatch.execution.sampling import ALL_BARRED, NOT_FINITE, finite_rows
from flexbatch.execution.sequence import Sequence
from flexbatch.request import TokenLogprob
from flexbatch.speculative.controller import Controller, Situation
from flexbatch.speculative.growth import TreePlan
from flexbatch.speculative.shapes import fixed_widths
from flexbatch.speculative.sources import Source
from flexbatch.speculative.stochastic import RequestDraws, target_probabilities
from flexbatch.speculative.tree import Drawing, TokenTree, merge
from flexbatch.speculative.tree_spec import TreeSpec
from flexbatch.speculative.verify import UNDRAWN, AcceptedPath, verify

AUTO_NODES = 32
BEST_FIRST_DEPTH = 8


@dataclass
class Totals:
    """What speculation did in this run."""

    draft_seconds: float = 0.0
    pass_seconds: float = 0.0
    passes: int = 0
    sequence_passes: int = 0
    """Sequences that decoded, summed over passes."""
    drafted_tokens: int = 0
    emitted_tokens: int = 0


@dataclass(frozen=True)
class DraftedPass:
    """A pass in flight with trees, perhaps empty ones. started: when these were drafted."""

    sequence_ids: tuple[int, ...]
    query_tokens: int
    started: float
    drafting_seconds: float


class Speculator:
    """A `proposals.Proposer`. Sequences are grouped by whether they are sampled: the two accept differently.

    simulate: accept the likeliest child at every node with this probability, whatever the target says. For timing
    with random weights; tokens are meaningless then, and the report says so.
    """

    def __init__(self, sources: Many[Source], spec: TreeSpec, *, max_nodes: int, simulate: float | None = None) -> None:
        self.sources, self.spec, self.max_nodes, self.simulate = list(sources), spec, max_nodes, simulate
        self.controller = Controller(max_nodes)
        self.totals = Totals()
        self.passes: deque[DraftedPass] = deque()
        """In flight, the oldest first: one, but for those of a pipeline."""
        self.proposed: dict[int, tuple[Sequence, TokenTree]] = {}
        """The trees of all of them, by sequence id: a sequence is in one."""
        self.observed = 0.0
        """When the last pass ended."""

    # Before a pass

    def propose(self, sequences: Many[Sequence], max_depths: Many[int], other_query_tokens: int) -> list[TokenTree]:
        """See `proposals.Proposer`."""
        started = time.perf_counter()
        plans = self.plans(sequences, max_depths, other_query_tokens)
        if any(plan.num_levels for plan in plans):
            begun = time.perf_counter()
            drafts = [source.draft(sequences, plans) for source in self.sources]
            trees = (
                drafts[0]
                if len(drafts) == 1
                else [merge(several, plan.max_nodes) for *several, plan in zip(*drafts, plans, strict=True)]
            )
            self.observe_levels(time.perf_counter() - begun)
        else:
            trees = [TokenTree()] * len(sequences)
        ended = time.perf_counter()
        self.totals.draft_seconds += ended - started
        ids = tuple(sequence.sequence_id for sequence in sequences)
        self.proposed.update(zip(ids, zip(sequences, trees, strict=True), strict=True))
        query_tokens = other_query_tokens + len(trees) + sum(map(len, trees))
        self.passes.append(DraftedPass(ids, query_tokens, ended, ended - started))
        return trees

    def plans(self, sequences: Many[Sequence], max_depths: Many[int], other_query_tokens: int) -> list[TreePlan]:
        """The user's tree, or what the controller finds best, cut to what every sequence can commit."""
        if not sequences:
            return []
        groups = tuple(map(group_of, sequences))
        if self.spec.kind == "auto":
            uncomputed = sum(source.uncomputed_tokens(sequences) for source in self.sources)
            plans = self.controller.plan(
                Situation(groups, other_query_tokens, uncomputed, sum(max_depths) + len(groups))
            )
        else:
            plans = [fixed_plan(self.spec)] * len(groups)
        return [limited(plan, depth) for plan, depth in zip(plans, max_depths, strict=True)]

    def observe_levels(self, seconds: float) -> None:
        """What each level of the latest trees cost, with its share of what was spent between the levels. seconds: of
        all drafting."""
        levels = list(zip_longest(*(source.levels for source in self.sources), fillvalue=(0, 0.0)))
        share = seconds / (sum(seconds for level in levels for _, seconds in level) or 1.0)
        for level in levels:
            self.controller.drafting.observe(
                max(tokens for tokens, _ in level), share * sum(seconds for _, seconds in level)
            )

    # After a pass

    def needs_verification(self, query: QueryTokens) -> bool:
        """See `proposals.Proposer`."""
        return self.simulate is None and self.proposed[query.sequence_id][1].drawn is not Drawing.DETERMINISTIC

    def verify(self, query: QueryTokens, logits: Tensor) -> SampledTokens:
        """See `proposals.Proposer`: trees drawn by chance."""
        sequence, tree = self.proposed[query.sequence_id]
        (source,) = self.sources
        kept = source.distributions.pop(sequence)
        accepted = verify(
            tree,
            target_probabilities(logits, sequence, query.paths),
            RequestDraws(sequence, logits.device),
            [kept[parent] for parent in tree.parents],
        )
        path = tuple(node + 1 for node in accepted.path)
        tokens = list(accepted.tokens(tree))
        if accepted.token == UNDRAWN:
            tokens[-1] = ALL_BARRED if bool(finite_rows(logits[[path[-1] if path else 0]])) else NOT_FINITE
            return SampledTokens(tokens, [], path=path)
        return SampledTokens(tokens, entries(logits[[0, *path]], tokens, sequence), path=path)

    def follow(self, query: QueryTokens, sampled: SampledTokens) -> SampledTokens:
        """See `proposals.Proposer`: the matching path, or a simulated one."""
        return sampled.follow(query) if self.simulate is None else self.follow_simulated(query, sampled, self.simulate)

    def follow_simulated(self, query: QueryTokens, sampled: SampledTokens, acceptance: float) -> SampledTokens:
        """A uniform draw from the request's own stream decides at every depth about the likeliest child.
        Log-probabilities are those of the tokens drawn there."""
        sequence, tree = self.proposed[query.sequence_id]
        depth = tree.shape.max_depth
        uniform_draws = uniforms(
            [sequence.stream_key] * depth, [sequence.num_output_tokens + d for d in range(depth)], 1, "cpu", ACCEPT_DRAW
        )[:, 0].tolist()
        path: list[int] = []
        while (children := tree.shape.children[path[-1] if path else 0]) and uniform_draws[len(path)] < acceptance:
            path.append(children[0] + 1)
        nodes = (0, *path)
        tokens = [*query.paths[nodes[-1]], sampled.token_ids[nodes[-1]]]
        return SampledTokens(tokens, [sampled.logprobs[node] for node in nodes], sampled.prompt_logprobs, tuple(path))

    def observe(self, results: Mapping[int, SampledTokens]) -> None:
        """See `proposals.Proposer`."""
        if not self.passes:
            return
        drafted, now, totals = self.passes.popleft(), time.perf_counter(), self.totals
        proposed = {id: found for id in drafted.sequence_ids if (found := self.proposed.pop(id, None)) is not None}
        seconds, self.observed = now - max(drafted.started, self.observed), now
        if not drafted.query_tokens:
            return
        new_tokens = sum(len(sampled.token_ids) for id, sampled in results.items() if id in proposed)
        times = seconds, bool(proposed), drafted.drafting_seconds
        self.controller.observe_pass(drafted.query_tokens, *times, new_tokens)
        totals.passes += bool(proposed)
        totals.pass_seconds += seconds if proposed else 0.0
        for sequence_id, sampled in results.items():
            if sequence_id not in proposed:
                continue
            sequence, tree = proposed[sequence_id]
            totals.sequence_passes += 1
            totals.drafted_tokens += len(tree)
            totals.emitted_tokens += len(sampled.token_ids)
            if len(tree):
                accepted = AcceptedPath(tuple(node - 1 for node in sampled.path), sampled.token_ids[-1])
                self.controller.statistics_of(group_of(sequence)).observe(tree, accepted)

    def release(self, sequence: Sequence) -> None:
        """See `proposals.Proposer`."""
        for source in self.sources:
            source.release(sequence)

    def forget(self) -> None:
        """Let go of all sequences, after a run that failed half-way; the next one opens its block anew."""
        self.passes.clear()
        self.proposed.clear()
        for source in self.sources:
            source.forget()

    # Report and end

    @property
    def peak_bytes(self) -> int:
        """Most memory of the gpu tier that the drafts held."""
        return sum(source.peak_bytes for source in self.sources)

    def report(self) -> dict[str, object]:
        """What was measured in this run."""
        totals = self.totals
        seconds = totals.draft_seconds + totals.pass_seconds
        return {
            "drafts": [source.name for source in self.sources],
            "tree": self.spec.text,
            "simulated_acceptance": self.simulate,
            "passes": totals.passes,
            "tokens_per_sequence_pass": totals.emitted_tokens / totals.sequence_passes
            if totals.sequence_passes
            else 0.0,
            "drafted_tokens": totals.drafted_tokens,
            "accepted_tokens": totals.emitted_tokens - totals.sequence_passes,
            "emitted_tokens": totals.emitted_tokens,
            "sequence_passes": totals.sequence_passes,
            "draft_seconds": totals.draft_seconds,
            "pass_seconds": totals.pass_seconds,
            "draft_share_of_time": totals.draft_seconds / seconds if seconds else 0.0,
            "acceptance": {group: statistics.report() for group, statistics in self.controller.statistics.items()},
            "costs": self.controller.report(),
        }

    def check(self) -> None:
        """Raises AssertionError when a source, or the statistics, are not consistent."""
        for source in self.sources:
            source.check()
        for statistics in self.controller.statistics.values():
            statistics.check()

    def close(self) -> None:
        for source in self.sources:
            source.close()


def entries(logits: Tensor, tokens: list[int], sequence: Sequence) -> list[dict[int, TokenLogprob] | None]:
    """Log-probabilities of tokens drawn from rows of logits, where the request wants them."""
    count = sequence.params.logprobs
    return [*token_logprobs(logits, tokens, [count] * len(tokens))] if count is not None else [None] * len(tokens)


def group_of(sequence: Sequence) -> str:
    return "greedy" if sequence.params.greedy else "sampled"


def fixed_plan(spec: TreeSpec) -> TreePlan:
    """The plan of a tree that the user has fixed."""
    if spec.kind == "widths":
        shape = fixed_widths(spec.widths)
        return TreePlan(shape.max_depth, len(shape), shape)
    depth = min(BEST_FIRST_DEPTH, spec.nodes)
    # Twice as many candidates as are kept, so that there is something to choose from.
    return TreePlan(depth, spec.nodes, beam=-(-2 * spec.nodes // depth))


def limited(plan: TreePlan, max_depth: int) -> TreePlan:
    """The plan of a sequence that cannot commit a path longer than ``max_depth``."""
    return plan if max_depth >= plan.max_depth else TreePlan(max(0, max_depth), plan.max_nodes, plan.shape, plan.beam)
