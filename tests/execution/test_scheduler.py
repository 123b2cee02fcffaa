"""The scheduler under any arrivals, lengths, ends, budgets and drafts: nobody is lost, nobody twice, no budget is
broken, every token is read once."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from flexbatch.execution.pass_batch import PassBatch, QueryTokens
from flexbatch.execution.resize import adjust
from flexbatch.execution.sampler import SampledTokens
from flexbatch.execution.scheduler import Scheduler
from flexbatch.execution.sequence import Sequence
from flexbatch.memory.handles import READY
from flexbatch.policy.admission import CacheSizes
from flexbatch.policy.policy import TIERS, Policy, Split
from flexbatch.speculative.tree import TokenTree, TreeShape
from tests.execution.rigs import EOS, PAGE_TOKENS, open_cache, waiting
from tests.memory.rigs import splits

MAX_NODES = 3


class Drafter:
    """Random trees, and a record of what the scheduler tells its proposer."""

    max_nodes = MAX_NODES

    def __init__(self, chance: Any) -> None:
        self.chance, self.proposed, self.released, self.observed = chance, [], [], 0

    def propose(self, sequences: list[Sequence], max_depths: list[int], other_query_tokens: int) -> list[TokenTree]:
        trees = []
        for sequence, depth in zip(sequences, max_depths, strict=True):
            assert depth == sequence.output.max_tokens - sequence.num_output_tokens - 1 >= 0
            count = self.chance.randint(0, MAX_NODES) if depth else 0
            parents = tuple(self.chance.randint(-1, i - 1) for i in range(count))
            end = self.chance.randint(0, 4 * MAX_NODES)
            trees.append(TokenTree(tuple(EOS if i == end else 10 + i for i in range(count)), TreeShape(parents)))
        self.proposed += sequences
        return trees

    def observe(self, results: dict[int, SampledTokens]) -> None:
        self.observed += len(results)

    def release(self, sequence: Sequence) -> None:
        self.released.append(sequence)

    def needs_verification(self, query: QueryTokens) -> bool:
        return True

    def verify(self, query: QueryTokens, logits: Any) -> SampledTokens:
        raise AssertionError("the scheduler does not verify")


@dataclass(frozen=True)
class Job:
    """Requests (prompt, max_tokens), the policy and the pages of each tier."""

    requests: tuple[tuple[tuple[int, ...], int], ...]
    policy: Policy
    pages: int
    staging: int
    drafts: bool


@st.composite
def jobs(draw: st.DrawFn) -> Job:
    prompts = st.lists(st.integers(2, 3), min_size=1, max_size=14).map(tuple)
    requests = tuple(draw(st.lists(st.tuples(prompts, st.integers(0, 6)), max_size=14)))
    policy = Policy(
        weights=Split(1, 0),
        cache=draw(splits()),
        activations=Split(1, 0),
        gpu_batch_size=draw(st.integers(1, 4)),
        num_gpu_batches=draw(st.integers(1, 3)),
        prefill_chunk=draw(st.integers(1, 9)),
        prefill_budget=draw(st.integers(0, 9)),
        cpu_attention=draw(st.sampled_from([0.0, 0.5, 1.0])),
        admission_passes=draw(st.sampled_from([1, 2, 5])),
    )
    return Job(requests, policy, draw(st.integers(2, 14)), draw(st.integers(1, 30)), draw(st.booleans()))


class Desk:
    """Hands out candidates and remembers who was asked for."""

    def __init__(self, job: Job) -> None:
        self.given: list[Sequence] = []
        self.all = [waiting(i, prompt, max_tokens=tokens) for i, (prompt, tokens) in enumerate(job.requests)]

    def __iter__(self) -> Iterator[Sequence]:
        for each in self.all:
            self.given.append(each)
            yield each


def draw_tokens(work: PassBatch, chance: Any) -> dict[int, SampledTokens]:
    """What a sampler would give: a token for every sequence whose newest token was read, a path of its tree too; EOS
    now and then."""
    results = {}
    for query in work:
        if query.parents is not None:
            path, position = [], 0
            while (
                below := [i for i, parent in enumerate(query.parents) if parent == position]
            ) and chance.random() < 0.7:
                position = chance.choice(below)
                path.append(position)
            tokens = [*(query.token_ids[position] for position in path), EOS if chance.random() < 0.1 else 20]
            results[query.sequence_id] = SampledTokens(tokens, [None] * len(tokens), path=tuple(path))
        elif query.first_logit < query.num_tokens:
            results[query.sequence_id] = SampledTokens([EOS if chance.random() < 0.1 else 20 + query.start % 5], [None])
    return results


def check_pass(work: PassBatch, scheduler: Scheduler, policy: Policy, read: dict[int, list[int]]) -> None:
    """Budgets are kept, and every sequence goes on where it stood."""
    spare = scheduler.block.spare_tokens
    queries = list(work)
    assert queries, "a pass without query tokens"
    assert len({query.sequence_id for query in queries}) == len(queries), "a sequence twice in a pass"
    for batch in work.micro_batches:
        assert (
            batch
            and len(batch) <= policy.gpu_batch_size
            and len({scheduler.running[query.sequence_id].micro_batch for query in batch}) == 1
        )
        assert sum(query.num_tokens for query in batch) <= scheduler.micro_batch_tokens
        # One token of a prompt rides as a decode token does.
        assert (
            sum(q.num_tokens for q in batch if q.parents is None and q.num_tokens > 1)
            <= policy.prompt_tokens_per_micro_batch
        )
    for query in queries:
        sequence = scheduler.running[query.sequence_id]
        index = sequence.request.index
        assert (
            query.start
            == sequence.num_cached
            == len(read.setdefault(index, [0] * sequence.pages.num_shared * PAGE_TOKENS))
        )
        assert scheduler.cache.prefix_ready(sequence.pages)
        if query.parents is None:
            assert query.num_tokens <= policy.prefill_chunk
            assert list(query.token_ids) == sequence.token_ids[query.start : query.start + query.num_tokens]
            assert (query.first_logit < query.num_tokens) == (
                query.start + query.num_tokens == len(sequence.token_ids) and sequence.output.max_tokens > 0
            )
        else:
            assert query.token_ids[0] == sequence.token_ids[-1] and query.num_tokens <= 1 + spare
        assert query.start + query.num_tokens <= len(sequence.pages.pages) * PAGE_TOKENS, "tokens without a page"


def run(job: Job, chance: Any, drafter: Drafter | None) -> tuple[Scheduler, Desk, list[Any]]:
    """Passes until there is no work; everything is checked after each."""
    policy, desk, finished = job.policy, Desk(job), []
    sizes = CacheSizes(
        job.pages, job.pages, job.pages, job.staging, disk_sequences=3, tail_tokens=job.pages * PAGE_TOKENS
    )
    spare = MAX_NODES if drafter else 0
    tokens = policy.gpu_batch_size * (1 + spare) + max(policy.chunk, policy.prompt_tokens_per_micro_batch)
    with tempfile.TemporaryDirectory() as folder, open_cache(Path(folder), sizes) as cache:
        scheduler = Scheduler(policy, cache, iter(desk), tokens, drafter)
        read: dict[int, list[int]] = {}
        while True:
            in_flight = scheduler.num_sequences
            if not scheduler.has_work():
                break
            scheduler.check()
            assert scheduler.num_sequences <= max(in_flight, scheduler.admission_limit)
            assert len(desk.given) <= len(finished) + len(scheduler.finished) + scheduler.num_sequences + 1, (
                "requests are pulled before there is room"
            )
            cache.begin_pass(READY)
            work = scheduler.next_pass()
            scheduler.check()
            check_pass(work, scheduler, policy, read)
            in_flight_sequences = dict(scheduler.running)
            scheduler.commit(work, draw_tokens(work, chance))
            scheduler.check()
            for query in work:
                sequence = in_flight_sequences[query.sequence_id]
                mine = read[sequence.request.index]
                mine += [1] * (sequence.num_cached - len(mine))
            finished += scheduler.take_finished()
            if chance.random() < 0.1:
                adjust(scheduler, chance.randint(0, 12), chance.randint(0, 12), chance.random())
        finished += scheduler.take_finished()
        assert scheduler.num_sequences == 0 and not scheduler.take_finished()
        cache.check([])
        return scheduler, desk, finished


def test_every_request_is_answered_once_whatever_comes() -> None:
    trying(30)


@pytest.mark.slow
def test_every_request_is_answered_once_whatever_comes_of_many() -> None:
    trying(500)


def trying(examples: int) -> None:
    @settings(max_examples=examples, deadline=None, suppress_health_check=list(HealthCheck))
    @given(job=jobs(), chance=st.randoms(use_true_random=False))
    def check(job: Job, chance: Any) -> None:
        answered_once(job, chance)

    check()


def answered_once(job: Job, chance: Any) -> None:
    drafter = Drafter(chance) if job.drafts else None
    _, desk, finished = run(job, chance, drafter)
    assert sorted(done.request.index for done in finished) == list(range(len(job.requests)))
    assert len(desk.given) == len(job.requests)
    for done in finished:
        if done.error:
            assert (
                done.table is None
                and not done.output.token_ids
                and "cache pages of 4 tokens" in done.error
                and "--percent" in done.error
            )
            continue
        output, params = done.output, done.params
        assert done.table is not None and done.status == "finished"
        done.check()
        assert output.finish is not None
        assert output.finish.reason == ("stop" if EOS in output.token_ids else "length")
        assert output.token_ids.count(EOS) == (output.finish.reason == "stop") and (
            EOS not in output.token_ids or output.token_ids[-1] == EOS
        )
        assert len(output.token_ids) <= params.max_tokens
    if drafter is not None:
        assert sorted(map(id, drafter.released)) == sorted(id(done) for done in finished if not done.error), (
            "retire is called once each"
        )


@settings(max_examples=40, deadline=None)
@given(split=splits(), count=st.integers(1, 12), cpu_attention=st.sampled_from([0.0, 0.3, 1.0]))
def test_homes_are_within_one_sequence_of_the_split_and_micro_batches_alike(
    split: Split, count: int, cpu_attention: float
) -> None:
    policy = Policy(Split(1, 0), split, Split(1, 0), 4, 3, cpu_attention=cpu_attention)
    sizes = CacheSizes(60, 60, 60, 60, disk_sequences=12, tail_tokens=8)
    with tempfile.TemporaryDirectory() as folder, open_cache(Path(folder), sizes) as cache:
        scheduler = Scheduler(policy, cache, (waiting(i, (2, 3, i + 4)) for i in range(count)), 100)
        assert scheduler.has_work()
        scheduler.check()
        homes = [sequence.pages for batch in scheduler.block.micro_batches for sequence in batch]
        assert len(homes) == count
        for tier, part in zip(TIERS, split.fractions, strict=True):
            assert abs(sum(table.tier == tier for table in homes) - part * count) <= 1
            in_batches = [
                sum(sequence.pages.tier == tier for sequence in batch) for batch in scheduler.block.micro_batches
            ]
            assert max(in_batches) - min(in_batches) <= 2
        on_cpu = [table.cpu_attention for table in homes if table.tier == "cpu"]
        assert abs(sum(on_cpu) - cpu_attention * len(on_cpu)) <= 1
        scheduler.abort()
        scheduler.check()
        assert all(pool.num_available == pool.num_pages for pool in cache.pools.values())


def test_what_can_never_run_is_answered_with_the_numbers_and_the_rest_goes_on(tmp_path: Path) -> None:
    policy = Policy(Split(1, 0), Split(0.5, 0.5), Split(1, 0), 2, 1)
    with open_cache(tmp_path, CacheSizes(3, 2, 9, 0)) as cache:
        scheduler = Scheduler(
            policy, cache, iter([waiting(0, (2,) * 10, max_tokens=4), waiting(1, (2,) * 9, max_tokens=4)]), 100
        )
        assert scheduler.has_work() and scheduler.num_sequences == 1
        (done,) = scheduler.take_finished()
        assert done.error.startswith(
            "10 prompt and up to 4 generated tokens need 4 cache pages of 4 tokens; the largest tier has 3. Lower "
            "max_tokens"
        )
        scheduler.abort()


def test_a_request_that_outgrows_the_block_waits_until_it_is_empty(tmp_path: Path) -> None:
    policy = Policy(Split(1, 0), Split(1, 0), Split(1, 0), 2, 1)
    candidates = [waiting(i, (2,) * length, max_tokens=1) for i, length in enumerate((3, 40, 4, 13, 5))]
    with open_cache(tmp_path, CacheSizes(3, 0, 0, 0)) as cache:
        scheduler = Scheduler(
            policy, cache, iter(candidates), 100, refusal=lambda each: "never" if each.num_prompt_tokens == 40 else ""
        )
        finished = []
        while scheduler.has_work():
            work = scheduler.next_pass()
            scheduler.commit(work, {query.sequence_id: SampledTokens([20], [None]) for query in work})
            finished += [done.request.index for done in scheduler.take_finished()]
        assert scheduler.outgrown and sorted(finished) == [0, 1, 2]
        assert [each.request.index for each in (*scheduler.waiting, *scheduler.arrivals)] == [3, 4]


def test_a_request_for_which_the_runner_cannot_grow_yet_waits(tmp_path: Path) -> None:
    policy = Policy(Split(1, 0), Split(1, 0), Split(1, 0), 2, 1)
    candidates = [waiting(i, (2,) * length, max_tokens=1) for i, length in enumerate((3, 9, 4))]
    reached: list[bool | None] = [True, None, None, True, True]
    with open_cache(tmp_path, CacheSizes(9, 0, 0, 0)) as cache:
        scheduler = Scheduler(policy, cache, iter(candidates), 100, reach=lambda tokens: reached.pop(0))
        assert scheduler.has_work() and scheduler.reaching and scheduler.num_sequences == 1
        assert scheduler.has_work() and scheduler.reaching and not scheduler.outgrown
        assert scheduler.has_work() and not scheduler.reaching and scheduler.num_sequences == 2
        scheduler.check()


@pytest.mark.parametrize("tier", ["cpu", "disk"])
def test_a_micro_batch_has_no_more_pages_off_the_gpu_than_staging(tmp_path: Path, tier: str) -> None:
    policy = Policy(Split(1, 0), Split(0, 1) if tier == "cpu" else Split(0, 0, 1), Split(1, 0), 3, 2)
    with open_cache(tmp_path, CacheSizes(0, 20, 20, 5, disk_sequences=6, tail_tokens=8)) as cache:
        scheduler = Scheduler(
            policy, cache, iter([waiting(i, tuple(range(2 + i, 11 + i)), max_tokens=1) for i in range(6)]), 100
        )
        assert scheduler.has_work() and [len(batch) for batch in scheduler.block.micro_batches] == [1, 1]
        scheduler.check()
        scheduler.abort()


def test_sequences_that_share_a_prefix_wait_until_it_is_read(tmp_path: Path) -> None:
    policy = Policy(Split(1, 0), Split(1, 0), Split(1, 0), 2, 1, prefill_chunk=4)
    with open_cache(tmp_path, CacheSizes(20, 0, 0, 0)) as cache:
        prompt = tuple(range(2, 12))
        scheduler = Scheduler(policy, cache, iter([waiting(0, prompt), waiting(1, (*prompt[:8], 50))]), 100)
        counts = []
        while scheduler.has_work() and len(counts) < 4:
            work = scheduler.next_pass()
            counts.append({query.sequence_id: (query.start, query.num_tokens) for query in work.micro_batches[0]})
            scheduler.commit(
                work,
                {
                    query.sequence_id: SampledTokens([20], [None])
                    for query in work.micro_batches[0]
                    if query.first_logit < query.num_tokens
                },
            )
            scheduler.check()
        assert counts == [{0: (0, 4)}, {0: (4, 4)}, {0: (8, 2), 1: (8, 1)}, {0: (10, 1), 1: (9, 1)}]
        scheduler.abort()


def test_a_wrong_count_is_noticed(tmp_path: Path) -> None:
    policy = Policy(Split(1, 0), Split(1, 0), Split(1, 0), 2, 1)
    with open_cache(tmp_path, CacheSizes(20, 0, 0, 0)) as cache:
        scheduler = Scheduler(policy, cache, iter([waiting(0, (2, 3))]), 100)
        scheduler.admit()
        lost = scheduler.block.micro_batches[0].pop()
        with pytest.raises(AssertionError):
            scheduler.check()
        scheduler.block.micro_batches[0].append(lost)
        scheduler.check()
        scheduler.block.staged_pages.taken[0] += 1
        with pytest.raises(AssertionError):
            scheduler.check()
        scheduler.block.staged_pages.taken[0] -= 1
        scheduler.abort()


def test_a_scored_prompt_of_whole_pages_does_not_hold_up_those_that_begin_like_it(tmp_path: Path) -> None:
    """Its last token is never read, so its last page is never full, and nobody may wait for it."""
    policy = Policy(Split(1, 0), Split(1, 0), Split(1, 0), 2, 1, prefill_chunk=3)
    prompt = tuple(range(2, 2 + 2 * PAGE_TOKENS))
    with open_cache(tmp_path, CacheSizes(20, 0, 0, 0)) as cache:
        scheduler = Scheduler(
            policy,
            cache,
            iter([waiting(0, prompt, max_tokens=0), waiting(1, (*prompt, 50, 51), max_tokens=1)]),
            100,
        )
        passes = 0
        while scheduler.has_work():
            work = scheduler.next_pass()
            scheduler.commit(
                work,
                {
                    query.sequence_id: SampledTokens([20], [None])
                    for query in work.micro_batches[0]
                    if query.first_logit < query.num_tokens
                },
            )
            scheduler.check()
            passes += 1
        assert [done.request.index for done in scheduler.take_finished()] == [0, 1] and passes == 4


@pytest.mark.parametrize("length", [PAGE_TOKENS, PAGE_TOKENS + 1, 2 * PAGE_TOKENS + 1])
def test_scored_prompts_that_are_equal_have_a_page_for_every_token_that_is_read(tmp_path: Path, length: int) -> None:
    """Of the second all that is read lies in shared pages, but for one token."""
    policy = Policy(Split(1, 0), Split(1, 0), Split(1, 0), 2, 1, prefill_chunk=3)
    prompt = tuple(range(2, 2 + length))
    with open_cache(tmp_path, CacheSizes(8, 0, 0, 0)) as cache:
        scheduler = Scheduler(policy, cache, iter([waiting(i, prompt, max_tokens=0) for i in range(2)]), 100)
        while scheduler.has_work():
            work = scheduler.next_pass()
            for query in work:
                assert query.num_tokens > 0 and query.start + query.num_tokens <= length - 1
                assert query.start + query.num_tokens <= len(query.pages.pages) * PAGE_TOKENS
            scheduler.commit(work, {})
            scheduler.check()
        assert len(scheduler.take_finished()) == 2
