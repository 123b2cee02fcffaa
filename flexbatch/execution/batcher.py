"""Composes passes: admits sequences, cuts prompts into chunks, brings query tokens, retires what is done."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from flexbatch.execution.proposals import Proposer, Tree
from flexbatch.execution.request_state import RequestState
from flexbatch.execution.sampler import SampledTokens
from flexbatch.execution.work import PassWork, QueryTokens, Sequence, num_uncomputed
from flexbatch.memory.balancer import TierBalancer
from flexbatch.memory.kvcache import KVCache
from flexbatch.policy.policy import TIERS, Policy, Split
from flexbatch.text.detokenize import OutputText


@dataclass(frozen=True)
class Candidate:
    """A request that waits for a place in the block."""

    state: RequestState
    output: OutputText
    alone: bool = False
    """Shares no pages with others."""

    @property
    def num_prompt_tokens(self) -> int:
        return len(self.state.request.prompt_token_ids)

    @property
    def num_cache_tokens(self) -> int:
        """Token rows it may need: the last token that it generates needs none."""
        return self.num_prompt_tokens + max(0, self.output.max_tokens - 1)


@dataclass(frozen=True)
class Retired:
    """A request that is done; ``error`` says why it could not be run, or why it could not go on."""

    state: RequestState
    output: OutputText
    sequence: Sequence | None
    error: str = ""

    @property
    def refused(self) -> bool:
        """Whether it never ran."""
        return self.sequence is None


class Batcher:
    """The block: ``num_gpu_batches`` micro-batches of up to ``gpu_batch_size`` sequences, refilled at every pass.

    A sequence is admitted when its home tier has pages for all the tokens that it may reach, so nothing is ever
    evicted. Homes are chosen by error diffusion over the cache split, and a sequence joins the micro-batch with the
    fewest sequences of its tier, so that micro-batches are alike.

    A request that is longer than the block was made for is refused where ``refusal`` says why no block can hold it
    (without it, always). Else nothing is admitted any more; once the rest has run, it stands first in `remaining`,
    for a larger block.
    """

    def __init__(
        self,
        policy: Policy,
        cache: KVCache,
        candidates: Iterator[Candidate],
        micro_batch_tokens: int,
        proposer: Proposer | None = None,
        refusal: Callable[[Candidate], str] | None = None,
        reach: Callable[[int], bool] | None = None,
    ) -> None:
        self.policy, self.cache, self.candidates, self.proposer = policy, cache, candidates, proposer
        self.refusal = refusal or self.too_long
        self.reach = reach
        """Whether the block takes a sequence of so many tokens, for which it may grow; not asked for where None."""
        self.spare_tokens = 0 if proposer is None else proposer.max_nodes
        """Room for drafted tokens in every sequence's cache."""
        self.micro_batch_tokens = micro_batch_tokens
        self.prefill_chunk, self.prefill_budget = policy.prefill_chunk, policy.prompt_tokens_per_micro_batch
        self.admission_limit = policy.block_size
        """Sequences in flight, at most."""
        self.micro_batches: list[list[Sequence]] = [[] for _ in range(policy.num_gpu_batches)]
        self.waiting: deque[Candidate] = deque()
        self.retired: list[Retired] = []
        self.homes = TierBalancer(policy.cache)
        self.cpu_attention = policy.cpu_attention
        self.attended = TierBalancer(Split(gpu=1 - policy.cpu_attention, cpu=policy.cpu_attention))
        self.exhausted = self.outgrown = False

    # Admission

    @property
    def num_sequences(self) -> int:
        return sum(map(len, self.micro_batches))

    def has_work(self) -> bool:
        """Whether there is or may come anything to run; admits what fits."""
        self.admit()
        return self.num_sequences > 0

    def peek(self) -> Candidate | None:
        """The next request in line."""
        if not self.waiting and not self.exhausted:
            candidate = next(self.candidates, None)
            if candidate is None:
                self.exhausted = True
            else:
                self.waiting.append(candidate)
        return self.waiting[0] if self.waiting else None

    def remaining(self) -> Iterator[Candidate]:
        """Requests that were not admitted: none, unless one of them has outgrown the block."""
        return itertools.chain(self.waiting, self.candidates)

    def admit(self) -> None:
        """Fill the free places of the block, in the order of the requests."""
        while (
            not self.outgrown and self.num_sequences < self.admission_limit and (candidate := self.peek()) is not None
        ):
            if not self.holds(candidate):
                problem = self.refusal(candidate)
                if not problem:
                    self.outgrown = True
                    return
                self.waiting.popleft()
                self.retired.append(Retired(candidate.state, candidate.output, None, problem))
                continue
            tier = self.choose_home(candidate)
            if tier is None:
                assert self.num_sequences, "nothing runs and the next request finds no pages: pages are lost"
                return
            self.waiting.popleft()
            self.join(candidate, tier)

    @property
    def most_pages(self) -> int:
        """Pages that a sequence can have when nothing else runs."""
        sizes = self.cache.sizes
        return max(
            sizes.pages(tier) if tier == "gpu" else min(sizes.pages(tier), sizes.staging_pages)
            for tier in self.allowed_tiers
        )

    def holds(self, candidate: Candidate) -> bool:
        """Whether the block has pages for a request when nothing else runs, and takes one as long."""
        pages = self.cache.layout.num_pages(self.room(candidate))
        return pages <= self.most_pages and (self.reach is None or self.reach(candidate.num_cache_tokens))

    def too_long(self, candidate: Candidate) -> str:
        need, page_tokens = self.cache.layout.num_pages(self.room(candidate)), self.cache.layout.page_tokens
        return (
            f"{candidate.num_prompt_tokens} prompt and up to {candidate.output.max_tokens} generated tokens need "
            f"{need} cache pages of {page_tokens} tokens; "
            f"the largest tier has {self.most_pages}. Lower max_tokens, raise the budgets, or move the cache to a "
            "larger tier with --percent"
        )

    def room(self, candidate: Candidate) -> int:
        """Token rows to reserve."""
        return candidate.num_cache_tokens + self.spare_tokens

    @property
    def allowed_tiers(self) -> list[str]:
        return [tier for tier, fraction in zip(TIERS, self.policy.cache.fractions, strict=True) if fraction > 0]

    def choose_home(self, candidate: Candidate) -> str | None:
        roomy = [
            tier
            for tier in self.allowed_tiers
            if self.cache.can_open(tier, self.room(candidate), self.shareable(candidate, tier))
            and self.places(candidate, tier)
        ]
        return self.homes.choose(1, roomy) if roomy else None

    def places(self, candidate: Candidate, tier: str) -> list[int]:
        """Micro-batches with a free place, and room in staging for all their sequences that are not on the gpu tier."""
        free = [k for k, batch in enumerate(self.micro_batches) if len(batch) < self.policy.gpu_batch_size]
        if tier == "gpu":
            return free
        room = self.cache.sizes.staging_pages - self.cache.layout.num_pages(self.room(candidate))
        return [
            k for k in free if sum(len(s.table.pages) for s in self.micro_batches[k] if s.table.tier != "gpu") <= room
        ]

    def shareable(self, candidate: Candidate, tier: str) -> list[int]:
        """Pages that already hold the beginning of the prompt, as far as its logits are not wanted."""
        if candidate.alone:
            return []
        prompt, params = candidate.state.request.prompt_token_ids, candidate.state.params
        return self.cache.shareable(
            tier, prompt if params.prompt_logprobs is None else prompt[: params.prompt_logprobs_start]
        )

    def join(self, candidate: Candidate, tier: str) -> None:
        self.homes.place(tier, 1)
        on_cpu = tier == "cpu" and self.cpu_attention > 0 and self.attended.choose(1) == "cpu"
        if tier == "cpu":
            self.attended.place("cpu" if on_cpu else "gpu", 1)
        prompt = candidate.state.request.prompt_token_ids
        # A page whose last token nobody reads is never ready: those that shared it would wait for ever.
        read = () if candidate.alone else prompt[: len(prompt) - num_uncomputed(candidate.output, len(prompt))]
        table = self.cache.open(tier, self.room(candidate), read, self.shareable(candidate, tier), on_cpu)
        k = min(
            self.places(candidate, tier),
            key=lambda k: (sum(s.table.tier == tier for s in self.micro_batches[k]), len(self.micro_batches[k])),
        )
        self.micro_batches[k].append(Sequence(candidate.state, candidate.output, table, k, list(prompt)))

    def adjust(self, admission_limit: int, prefill_budget: int, cpu_attention: float) -> None:
        """New settings from the next pass on. Nothing moves: sequences in flight stay, and the share of CPU
        attention holds for those that come."""
        self.admission_limit = max(1, min(admission_limit, self.policy.block_size))
        self.prefill_budget = max(1, min(prefill_budget, self.policy.prompt_tokens_per_micro_batch))
        self.cpu_attention = cpu_attention
        self.attended.split = Split(gpu=1 - cpu_attention, cpu=cpu_attention)

    # Passes

    def next_pass(self) -> PassWork:
        """The query tokens of every sequence: one token or a token tree each to decode, and chunks of prompts as far
        as the micro-batch's budget goes."""
        counts = [self.counts(batch) for batch in self.micro_batches]
        trees = self.propose(
            [sequence for batch in counts for sequence in batch],
            sum(count for batch in counts for count in batch.values() if count > 1),
        )
        composed = []
        for batch in counts:
            queries = []
            for sequence, count in batch.items():
                tree = trees.get(sequence)
                queries.append(
                    self.tree_query(sequence, tree)
                    if tree is not None and tree.token_ids
                    else self.query(sequence, count)
                )
            composed.append(tuple(queries))
        return PassWork(tuple(queries for queries in composed if queries))

    def counts(self, batch: list[Sequence]) -> dict[Sequence, int]:
        """Tokens of its text that each sequence of a micro-batch brings; those that wait for a prefix or for room in
        the budget are left out."""
        uncached = {sequence: sequence.num_uncached for sequence in batch}
        budget = self.micro_batch_tokens - (1 + self.spare_tokens) * sum(count == 1 for count in uncached.values())
        budget = min(budget, self.prefill_budget)
        counts = {}
        for sequence, unread in uncached.items():
            if not self.cache.prefix_ready(sequence.table):
                continue
            count = 1
            if unread > 1:
                count = min(unread, self.prefill_chunk, budget)
                budget -= count
            if count > 0:
                counts[sequence] = count
        return counts

    def propose(self, sequences: list[Sequence], num_prompt_tokens: int) -> dict[Sequence, Tree]:
        """The trees of those that decode in this pass."""
        if self.proposer is None:
            return {}
        decoding = [
            sequence
            for sequence in sequences
            if sequence.num_uncached == 1
            and sequence.output.finish is None
            and not sequence.plain
            and sequence.fault is None
        ]
        depths = [sequence.output.max_tokens - len(sequence.output.token_ids) - 1 for sequence in decoding]
        return dict(zip(decoding, self.proposer.propose(decoding, depths, num_prompt_tokens), strict=True))

    @staticmethod
    def tree_query(sequence: Sequence, tree: Tree) -> QueryTokens:
        """The newest token, whose keys and values are still missing, and the nodes below it."""
        parents = (-1, *(parent + 1 for parent in tree.parents))
        return QueryTokens(sequence, (sequence.token_ids[-1], *tree.token_ids), sequence.num_cached, 0, parents)

    def query(self, sequence: Sequence, count: int) -> QueryTokens:
        start = sequence.num_cached
        last = start + count == len(sequence.token_ids)
        first_logit = count - 1 if last and sequence.output.finish is None else count
        if sequence.state.params.prompt_logprobs is not None and start < sequence.num_prompt_tokens - 1:
            first_logit = min(first_logit, max(0, sequence.state.params.prompt_logprobs_start - 1 - start))
        return QueryTokens(sequence, tuple(sequence.token_ids[start : start + count]), start, first_logit)

    def commit(self, work: PassWork, drawn: Mapping[QueryTokens, SampledTokens]) -> None:
        """Append what was drawn, keep the accepted paths of trees in the cache, and retire sequences that are done."""
        queries = [query for queries in work.micro_batches for query in queries]
        trees = [query for query in queries if query.parents is not None]
        self.cache.keep(
            [
                (query.sequence.table, query.start + 1, [query.start + place for place in drawn[query].path])
                for query in trees
            ]
        )
        if self.proposer is not None:
            self.proposer.observe(
                [(query, drawn[query]) for query in queries if query in drawn and drawn[query].token_ids]
            )
        for query in queries:
            sequence, result = query.sequence, drawn.get(query) or SampledTokens()
            if query.parents is not None and result.fault is not None and result.fault.in_model:
                # Attention multiplies masked values by 0, which leaves NaN: a drafted token that plain decoding never
                # reads may have done this.
                sequence.plain = True
                continue
            sequence.fault = sequence.fault or result.fault
            kept = 0 if sequence.fault is not None else self.extend(sequence, result)
            # Of a tree, the rows of its root and of the kept part of its path; the token after the path has none yet.
            cached = query.num_tokens if query.parents is None else min(1 + len(result.path), kept)
            self.cache.commit(sequence.table, query.start + cached)
            if (
                sequence.output.finish is not None or sequence.fault is not None
            ) and sequence.num_cached >= sequence.num_prompt_tokens - sequence.num_uncomputed:
                if self.may_be_others(sequence):
                    self.restart(sequence)
                else:
                    self.retire(sequence)

    def may_be_others(self, sequence: Sequence) -> bool:
        """Whether a fault may come from the sequence that filled the shared pages: a token of its own after them makes
        NaN of them too, as above."""
        return (
            sequence.fault is not None
            and sequence.fault.in_model
            and sequence.table.num_shared > 0
            and not sequence.output.token_ids
        )

    def restart(self, sequence: Sequence) -> None:
        """Read a prompt once more, next, in pages of its own."""
        self.leave(sequence)
        self.waiting.appendleft(Candidate(sequence.state, sequence.output, alone=True))

    def extend(self, sequence: Sequence, result: SampledTokens) -> int:
        """Append new tokens up to the end of the output; returns how many were kept."""
        kept = sequence.output.extend(result.token_ids)
        for token_id in result.token_ids[:kept]:
            sequence.state.append(token_id)
            sequence.token_ids.append(token_id)
        sequence.logprobs += [entry for entry in result.logprobs[:kept] if entry is not None]
        sequence.prompt_logprobs += result.prompt_logprobs
        return kept

    def retire(self, sequence: Sequence) -> None:
        self.leave(sequence)
        self.retired.append(
            Retired(sequence.state, sequence.output, sequence, "" if sequence.fault is None else sequence.fault.problem)
        )

    def leave(self, sequence: Sequence) -> None:
        """Give back the place and the pages of a sequence."""
        self.micro_batches[sequence.micro_batch].remove(sequence)
        self.homes.remove(sequence.table.tier, 1)
        if sequence.table.tier == "cpu":
            self.attended.remove("cpu" if sequence.table.attend_on_cpu else "gpu", 1)
        self.cache.free(sequence.table)
        if self.proposer is not None:
            self.proposer.retire(sequence)

    def take_retired(self) -> list[Retired]:
        retired, self.retired = self.retired, []
        return retired

    def abort(self) -> None:
        """Give back the pages of everything in flight."""
        for batch in self.micro_batches:
            for sequence in list(batch):
                self.leave(sequence)

    def check(self) -> None:
        """Invariants: places, homes and pages are counted right, every sequence is consistent. Only one batcher may
        use a cache at a time."""
        sequences = [sequence for batch in self.micro_batches for sequence in batch]
        assert len(sequences) <= self.policy.block_size
        for k, batch in enumerate(self.micro_batches):
            assert len(batch) <= self.policy.gpu_batch_size
            assert (
                sum(len(sequence.table.pages) for sequence in batch if sequence.table.tier != "gpu")
                <= self.cache.sizes.staging_pages
            )
            for sequence in batch:
                assert sequence.micro_batch == k
                sequence.check()
        for tier in TIERS:
            assert self.homes.placed[tier] == sum(sequence.table.tier == tier for sequence in sequences)
        on_cpu = [sequence.table.attend_on_cpu for sequence in sequences if sequence.table.tier == "cpu"]
        assert self.attended.placed == {"gpu": on_cpu.count(False), "cpu": on_cpu.count(True), "disk": 0}, (
            self.attended.placed
        )
        self.homes.check()
        self.cache.check([sequence.table for sequence in sequences])
