"""Sequences that step aside and come back, whatever their lengths, tiers and budgets: nobody is lost, the oldest goes
on, nobody is put aside again at once, and every token is read where the text says."""

from __future__ import annotations

import itertools
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from flexbatch.execution.answer_lengths import AnswerLengths
from flexbatch.execution.input_builder import InputBuilder
from flexbatch.execution.inputs import AttentionGroup
from flexbatch.execution.pass_batch import PassBatch, QueryTokens, parts_of
from flexbatch.execution.sampler import SampledTokens
from flexbatch.execution.scheduler import Scheduler
from flexbatch.execution.sequence import Sequence
from flexbatch.memory.handles import READY
from flexbatch.memory.kvcache import KVCache
from flexbatch.memory.pages import CacheLayout
from flexbatch.memory.uploads import Uploads
from flexbatch.policy.admission import CacheSizes
from flexbatch.policy.limits import LOOKAHEAD_TOKENS
from flexbatch.policy.policy import Policy, Split
from flexbatch.policy.step_aside import StepAsideCosts
from tests.execution.rigs import EOS, PAGE_TOKENS, open_cache, waiting
from tests.execution.test_scheduler import MAX_NODES, Drafter
from tests.memory.rigs import open_tiers, splits

LONGEST = 40
COSTS = {
    "move": StepAsideCosts(),
    "drop": StepAsideCosts(token_seconds=0.0, byte_seconds={(a, b): 1.0 for a in "gcd" for b in "gcd"}),
}


def token_at(index: int, placement: int, length: int) -> int:
    """What a model would draw: its own text for every request, and EOS at its length."""
    return EOS if placement == length - 1 else 20 + (7 * index + placement) % 50


def drawn(work: PassBatch, running: dict[int, Sequence], lengths: dict[int, int]) -> dict[int, SampledTokens]:
    """A token for every sequence whose newest one was read; of a tree the root alone is accepted."""
    results = {}
    for query in work:
        sequence = running[query.sequence_id]
        index = sequence.request.index
        if query.parents is not None or query.first_logit < query.num_tokens:
            placement = (
                query.start + (1 if query.parents is not None else query.num_tokens) - sequence.num_prompt_tokens
            )
            assert placement == sequence.num_output_tokens, "a token is drawn twice, or one is left out"
            results[query.sequence_id] = SampledTokens([token_at(index, placement, lengths[index])], [None])
    return results


class SteppingAside(RuleBasedStateMachine):
    """Requests of random lengths under a small cache; any sequence may be told to step aside at any pass."""

    bits = 16

    @initialize(
        split=splits(),
        shape=st.tuples(st.integers(1, 4), st.integers(1, 3)),
        pages=st.tuples(*[st.integers(12, 26)] * 3),
        staging=st.integers(12, 60),
        drafts=st.booleans(),
        costs=st.sampled_from(sorted(COSTS)),
        safety=st.sampled_from([-3.0, 0.0, 2.0]),
        known=st.booleans(),
        chance=st.randoms(use_true_random=False),
    )
    def begin(
        self, split: Split, shape: Any, pages: Any, staging: int, drafts: bool, costs: str, safety: float, known: bool,
        chance: Any,
    ) -> None:  # fmt: skip
        self.folder = tempfile.TemporaryDirectory()
        self.context = open_tiers(Path(self.folder.name))
        tiers, queues = self.context.__enter__()
        sizes = CacheSizes(*pages, staging, disk_sequences=3, tail_tokens=2 * PAGE_TOKENS + MAX_NODES)
        layout = CacheLayout(1, 1, 2, self.bits, 64, PAGE_TOKENS, torch.float32)
        self.cache = KVCache(layout, sizes, tiers, queues)
        self.builder = InputBuilder(PAGE_TOKENS, Uploads(tiers.cpu, queues))
        policy = Policy(
            Split(1, 0), split, Split(1, 0), *shape,
            prefill_chunk=chance.randint(1, 9), prefill_budget=chance.randint(0, 9), cpu_attention=0.5,
            admission_passes=chance.choice([1, 2, 5]),
        )  # fmt: skip
        self.drafter = Drafter(chance) if drafts else None
        spare = MAX_NODES if drafts else 0
        tokens = policy.gpu_batch_size * (1 + spare) + max(policy.chunk, policy.prompt_tokens_per_micro_batch)
        self.lengths, self.answers = AnswerLengths(safety=safety), {}
        self.line: list[Sequence] = []
        if known:
            # Short answers were seen: what comes may be far longer.
            for i in range(40):
                done = waiting(i, (2,), max_tokens=LONGEST)
                done.extend([20, 21, EOS])
                self.lengths.observe(done)
        self.scheduler = Scheduler(
            policy, self.cache, self.arrivals(), tokens, self.drafter, lengths=self.lengths, costs=COSTS[costs],
            overtakes=lambda first: any(each.request.priority < first.request.priority for each in self.line),
        )  # fmt: skip
        self.finished: list[Sequence] = []
        self.came_back: dict[int, int] = {}
        self.passes, self.count = 0, 0

    def arrivals(self) -> Any:
        """The most urgent first, with ids in the order in which they are drawn."""
        for number in itertools.count():
            while not self.line:
                yield None
            sequence = self.line.pop(self.line.index(min(self.line, key=lambda each: each.precedence)))
            sequence.sequence_id, sequence.precedence = number, (sequence.request.priority, number)
            yield sequence

    @rule(
        prompts=st.lists(st.lists(st.integers(2, 3), min_size=1, max_size=14).map(tuple), min_size=1, max_size=6),
        chance=st.randoms(use_true_random=False),
    )
    def add(self, prompts: list[tuple[int, ...]], chance: Any) -> None:
        for prompt in prompts:
            self.answers[self.count] = chance.choice([1, 2, 3, 9, 20, LONGEST, LONGEST + 5])
            params: dict[str, Any] = {"max_tokens": chance.choice([0, 1, 5, LONGEST])}
            if chance.random() < 0.1:
                params["ignore_eos"] = True
                self.answers[self.count] = LONGEST + 5
            self.line.append(waiting(self.count, prompt, priority=chance.choice([0, 0, 1]), **params))
            self.count += 1

    @rule(count=st.integers(1, 12))
    def run_passes(self, count: int) -> None:
        for _ in range(count):
            if not self.one_pass():
                return

    def one_pass(self) -> bool:
        scheduler = self.scheduler
        before = {each.sequence_id for each in scheduler.aside.sequences}
        if not scheduler.has_work():
            assert not scheduler.aside.sequences
            return False
        scheduler.check()
        self.check_precedence()
        for sequence_id in before & scheduler.running.keys():
            self.came_back[sequence_id] = self.passes
        for sequence in scheduler.aside.sequences:
            self.came_back.pop(sequence.sequence_id, None)  # it has made way for a more urgent one
        oldest = min(scheduler.running.values(), key=lambda each: each.precedence).sequence_id
        kept = scheduler.aside.counts.kept
        work = scheduler.next_pass()
        scheduler.check()
        assert oldest in scheduler.running, "the oldest stepped aside"
        assert len(list(work)) > 0
        for sequence in scheduler.aside.sequences:
            if scheduler.aside.counts.kept == kept and sequence.sequence_id in self.came_back:
                stayed = self.passes - self.came_back.pop(sequence.sequence_id)
                assert stayed >= LOOKAHEAD_TOKENS, f"put aside again after {stayed} passes"
        self.sweep(work)
        scheduler.commit(work, drawn(work, scheduler.running, self.answers))
        scheduler.check()
        self.finished += scheduler.take_finished()
        self.passes += 1
        return True

    def check_precedence(self) -> None:
        """Nobody runs in whose place a more urgent one waits, where tokens may be read anew."""
        scheduler, first = self.scheduler, self.scheduler.peek()
        if first is None or scheduler.outgrown or self.bits < 16 or not scheduler.aside.lets_pass(first):
            return
        assert all(each.request.priority <= first.request.priority for each in scheduler.running.values())

    # The cache, as the executor uses it in one layer

    def sweep(self, work: PassBatch) -> None:
        """Every sequence finds the rows of its whole text, wherever its pages have been, and adds those of its new
        tokens."""
        self.cache.begin_pass(READY)
        for k, queries in enumerate(work.micro_batches):
            inputs = self.builder.build(queries)
            ordered = (*(parts_of(queries)[0] or ()), *inputs.queries)
            for query in queries:
                assert query.start + query.num_tokens <= len(query.pages.pages) * PAGE_TOKENS, "tokens without a page"
                assert query.pages == self.scheduler.running[query.sequence_id].pages.location
            if inputs.gpu is not None:
                self.attend(inputs.gpu, self.bytes_of(self.cache.rows("gpu", 0)), ordered)
            if inputs.cpu is not None:
                self.cache.synchronize()
                self.attend(inputs.cpu, self.bytes_of(self.cache.rows("cpu", 0)), ordered)
            if inputs.staged is not None:
                staged = inputs.staged
                self.cache.gather(staged.gather, 0, k % 2).wait()
                new = self.attend(staged.attention, self.bytes_of(self.cache.staging_rows(k % 2)), ordered)
                leaving = self.cache.layout.row_view(new.clone().view(-1))
                if staged.num_cpu_tokens:
                    self.cache.drain_cpu(0, leaving[: staged.num_cpu_tokens], staged.cpu_slots)
                if staged.disk_pages:
                    self.cache.drain_disk(0, leaving[staged.num_cpu_tokens :], staged.disk_pages, READY)
                self.cache.release_staging(k % 2, READY)

    def bytes_of(self, rows: torch.Tensor) -> torch.Tensor:
        return rows.reshape(len(rows), -1).view(torch.uint8)

    def attend(self, group: AttentionGroup, rows: torch.Tensor, queries: tuple[QueryTokens, ...]) -> torch.Tensor:
        ends = torch.tensor([0, *(query.num_tokens for query in queries)]).cumsum(0).tolist()
        mine = [q for q, end in zip(queries, ends[1:], strict=True) if group.start < end <= group.end]
        for table, query in zip(group.page_table, mine, strict=True):
            slots = (table.long()[:, None] * PAGE_TOKENS + torch.arange(PAGE_TOKENS)).flatten()[: query.start]
            assert torch.equal(rows[slots], self.rows_of(query, 0, query.start)), query.pages.tier
        new = torch.cat([self.rows_of(query, query.start, query.start + query.num_tokens) for query in mine])
        rows[group.slots] = new
        return new

    def rows_of(self, query: QueryTokens, start: int, end: int) -> torch.Tensor:
        """[tokens, token_bytes]. Rows of a prompt follow from its beginning, which others may share."""
        sequence = self.scheduler.running[query.sequence_id]
        prompt = tuple(sequence.request.prompt_token_ids)
        keys = [
            hash(prompt[: position + 1])
            if position < len(prompt)
            else hash((sequence.request.index, position, "output"))
            for position in range(start, end)
        ]
        return torch.tensor([key % 251 for key in keys], dtype=torch.uint8)[:, None].expand(
            -1, self.cache.layout.token_bytes
        )

    @precondition(lambda self: self.scheduler.running)
    @rule(chance=st.randoms(use_true_random=False), in_place=st.booleans())
    def step_aside(self, chance: Any, in_place: bool) -> None:
        sequence = chance.choice(sorted(self.scheduler.running.values(), key=lambda each: each.sequence_id))
        self.scheduler.step_aside(sequence, in_place or self.bits < 16)
        self.came_back.pop(sequence.sequence_id, None)
        self.scheduler.check()

    @precondition(lambda self: self.scheduler.running)
    @rule(chance=st.randoms(use_true_random=False))
    def abort(self, chance: Any) -> None:
        started = [*self.scheduler.running.values(), *self.scheduler.aside.sequences]
        gone = chance.choice(sorted(started, key=lambda each: each.sequence_id))
        self.scheduler.abort(lambda sequence: sequence is gone)
        self.answers.pop(gone.request.index)
        self.scheduler.check()

    @invariant()
    def is_whole(self) -> None:
        self.scheduler.check()
        self.lengths.check()

    def teardown(self) -> None:
        if not hasattr(self, "scheduler"):
            return
        left = 4000
        while self.one_pass():
            left -= 1
            assert left, "no end: sequences put each other aside for ever"
        self.finished += self.scheduler.take_finished()
        assert sorted(each.request.index for each in self.finished) == sorted(self.answers)
        for each in self.finished:
            if not each.error:
                length = min(self.answers[each.request.index], each.output.max_tokens)
                wanted = [token_at(each.request.index, i, self.answers[each.request.index]) for i in range(length)]
                assert each.output.token_ids == wanted
        self.cache.check([])
        self.cache.close()
        self.context.__exit__(None, None, None)
        self.folder.cleanup()


class SteppingAsideQuantized(SteppingAside):
    bits = 4


@pytest.mark.parametrize("how", ["abort", "step aside", "step aside in placement"])
def test_nobody_waits_for_a_prompt_that_is_read_no_longer(tmp_path: Path, how: str) -> None:
    """The first fills pages that the second shares; it goes before it has."""
    policy = Policy(Split(1, 0), Split(1, 0), Split(1, 0), 2, 1, prefill_chunk=4)
    prompt = tuple(range(2, 20))
    with open_cache(tmp_path, CacheSizes(40, 0, 0, 0)) as cache:
        scheduler = Scheduler(
            policy, cache, iter([waiting(0, prompt), waiting(1, (*prompt[:12], 50))]), 100, lengths=AnswerLengths()
        )
        assert scheduler.has_work()
        scheduler.commit(scheduler.next_pass(), {})
        first, second = scheduler.running.values()
        assert second.pages.num_shared == 3 and not cache.prefix_ready(second.pages)
        if how == "abort":
            scheduler.abort(lambda sequence: sequence is first)
        else:
            scheduler.step_aside(first, in_place=how.endswith("place"))
        scheduler.check()
        finished = []
        for _ in range(40):
            if not scheduler.has_work():
                break
            work = scheduler.next_pass()
            assert list(work), "a pass without query tokens: somebody waits for ever"
            drawn = [query for query in work if query.first_logit < query.num_tokens]
            scheduler.commit(work, {query.sequence_id: SampledTokens([20], [None]) for query in drawn})
            scheduler.check()
            finished += scheduler.take_finished()
        assert {each.request.index for each in finished} == ({1} if how == "abort" else {0, 1})


for machine, examples in ((SteppingAside, 10), (SteppingAsideQuantized, 6)):
    machine.TestCase.settings = settings(max_examples=examples, stateful_step_count=20, deadline=None)
TestSteppingAside = SteppingAside.TestCase
TestSteppingAsideQuantized = SteppingAsideQuantized.TestCase


@pytest.mark.slow
@pytest.mark.parametrize("machine", [SteppingAside, SteppingAsideQuantized])
def test_many_more(machine: type[SteppingAside]) -> None:
    run_state_machine_as_test(machine, settings=settings(max_examples=400, stateful_step_count=40, deadline=None))
