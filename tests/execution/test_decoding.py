"""Sequences that decode, kept as arrays by differences: after every step they are what the sequences themselves would
bring to a pass, and answers are those of passes whose tokens are given to each sequence by itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from flexbatch.execution.input_builder import InputBuilder
from flexbatch.execution.pass_batch import UNREAD, DecodedTokens, MicroBatchTokens, PassBatch, parts_of
from flexbatch.execution.queries import text_query
from flexbatch.execution.sampler import SampledTokens
from flexbatch.execution.scheduler import Scheduler
from flexbatch.memory.tiers import Pool
from flexbatch.memory.transfer import TransferQueues
from flexbatch.memory.uploads import Uploads
from flexbatch.policy.admission import CacheSizes
from flexbatch.policy.policy import Policy, Split
from flexbatch.trace import Tracer
from tests.execution.rigs import EOS, PAGE_TOKENS, open_cache, waiting

KINDS: tuple[dict[str, Any], ...] = (
    {},
    {"ignore_eos": True},
    {"stop_token_ids": [21, 23]},
    {"repetition_penalty": 1.5},
    {"logprobs": 1},
    {"allowed_token_ids": [EOS, *range(20, 30)]},
)
Asked = tuple[tuple[int, ...], dict[str, Any]]

asked = st.lists(
    st.tuples(
        st.lists(st.integers(3, 5), min_size=1, max_size=10).map(tuple),
        st.builds(lambda kind, most: {**kind, "max_tokens": most}, st.sampled_from(KINDS), st.integers(1, 9)),
    ),
    min_size=1,
    max_size=9,
)


def drawn(query: Any, salt: int) -> int:
    """A token that depends on whose it is and where it stands; EOS, a stop token and none at all now and then."""
    number = hash((query.sequence_id, query.start + query.num_tokens, salt)) % 17
    return EOS if number == 16 else 20 + number % 9


def tokens_of(
    batch: PassBatch, scheduler: Scheduler, salt: int, arrays: str = "those in arrays"
) -> tuple[dict[int, SampledTokens], Any]:
    """What a pass gives those that still run: the tokens of "those in arrays", of "all" or of "none" as arrays, and of
    the others each by itself."""
    here = [(query, i < batch.num_decoding) for i, query in enumerate(ordered(batch))]
    found = [
        (query, drawn(query, salt), arrays == "all" or (arrays == "those in arrays" and decodes))
        for query, decodes in here
        if query.sequence_id in (scheduler.advanced or scheduler.running) and query.first_logit < query.num_tokens
    ]
    single = {query.sequence_id: SampledTokens([token], [None]) for query, token, whole in found if not whole}
    whole = [(query.sequence_id, token) for query, token, whole in found if whole]
    return single, DecodedTokens([id for id, _ in whole], [token for _, token in whole])


def ordered(batch: PassBatch) -> list[Any]:
    return [query for tokens in batch.decoding for query in tokens] + list(batch.others)


def compared(batch: PassBatch, scheduler: Scheduler) -> None:
    """What is in arrays is what each sequence by itself would bring."""
    for tokens in batch.decoding:
        for query in tokens:
            expected = text_query(scheduler.running[query.sequence_id], 1)
            for name in ("sequence_id", "token_ids", "start", "first_logit", "num_prompt_tokens", "parents", "adapter"):
                assert getattr(query, name) == getattr(expected, name), name
            assert (query.pages.tier, query.pages.pages) == (expected.pages.tier, expected.pages.pages)


def run(requests: list[Asked], policy: Policy, pages: int, salt: int, arrays: str, ahead: bool, folder: Path) -> Any:
    """Every answer with its end, and the passes; all is checked after every step."""
    sequences = [waiting(i, prompt, **params) for i, (prompt, params) in enumerate(requests)]
    passes = 0
    with open_cache(folder, CacheSizes(pages, pages, 0, pages)) as cache:
        scheduler = Scheduler(policy, cache, iter(sequences), 1000)
        batch: PassBatch | None = None
        while batch is not None or scheduler.has_work():
            if batch is None:
                batch = scheduler.next_pass()
                compared(batch, scheduler)
                scheduler.check()
            passes += 1
            following = None
            if ahead and not scheduler.aside.sequences and scheduler.advance(batch):
                scheduler.check()
                following = scheduler.next_pass()
                compared(following, scheduler)
            scheduler.commit(batch, *tokens_of(batch, scheduler, salt, arrays))
            scheduler.check()
            batch = following
        cache.check([])
    finish = [each.output.finish for each in sequences]
    return [each.token_ids for each in sequences], finish, [each.error for each in sequences], passes


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    requests=asked,
    micro_batches=st.integers(1, 3),
    pages=st.integers(6, 24),
    on_gpu=st.sampled_from([1.0, 0.5, 0.0]),
    salt=st.integers(0, 99),
)
def test_arrays_kept_by_differences_are_those_made_anew(requests, micro_batches, pages, on_gpu, salt, tmp_path_factory):
    policy = Policy(
        weights=Split(1, 0),
        cache=Split(on_gpu, 1 - on_gpu),
        activations=Split(1, 0),
        gpu_batch_size=3,
        num_gpu_batches=micro_batches,
        prefill_chunk=4,
        prefill_budget=8,
    )
    folder = tmp_path_factory.mktemp("cache")
    each, together, whole, ahead, whole_ahead = (
        run(requests, policy, pages, salt, arrays, ahead, folder)
        for arrays, ahead in (
            *(("none", False), ("those in arrays", False), ("all", False)),
            *(("those in arrays", True), ("all", True)),
        )
    )
    assert each == together == whole
    assert each[:3] == ahead[:3] == whole_ahead[:3]


def test_steady_passes_are_nothing_but_arrays(tmp_path):
    """And a sequence that leaves gives its entry to the last one."""
    policy = Policy(Split(1, 0), Split(1, 0), Split(1, 0), 8, 1, prefill_chunk=64, prefill_budget=512)
    sequences = [waiting(i, (3, 4, 5 + i), max_tokens=30 if i else 4, ignore_eos=True) for i in range(5)]
    with open_cache(tmp_path, CacheSizes(60, 0, 0, 0)) as cache:
        scheduler = Scheduler(policy, cache, iter(sequences), 1000)
        for number in range(9):
            assert scheduler.has_work()
            batch = scheduler.next_pass()
            (queries,) = batch.micro_batches
            tokens, others = parts_of(queries)
            assert bool(others) == (number == 0) and len(queries) == (5 if number < 4 else 4)
            if tokens is not None:
                assert sorted(tokens.sequence_ids.tolist()) == list(range(0 if number < 4 else 1, 5))
            scheduler.commit(batch, *tokens_of(batch, scheduler, 7))
            scheduler.check()
        scheduler.abort()
        assert not len(scheduler.block.decoding)
        cache.check([])


def test_a_sequence_may_end_or_be_aborted_between_two_passes(tmp_path):
    """Who has left since a pass was composed is left out, whoever has its entry now."""
    policy = Policy(Split(1, 0), Split(1, 0), Split(1, 0), 8, 1, prefill_chunk=64, prefill_budget=512)
    sequences = [waiting(i, (3, 4, 5 + i), max_tokens=30, ignore_eos=True) for i in range(4)]
    with open_cache(tmp_path, CacheSizes(60, 0, 0, 0)) as cache:
        scheduler = Scheduler(policy, cache, iter(sequences), 1000)
        for _ in range(3):
            assert scheduler.has_work()
            batch = scheduler.next_pass()
            scheduler.commit(batch, *tokens_of(batch, scheduler, 7))
        batch = scheduler.next_pass()
        given = {query.sequence_id: drawn(query, 7) for query in batch}
        lengths = [len(each.token_ids) for each in sequences]
        scheduler.abort(lambda sequence: sequence.sequence_id == 1)
        scheduler.commit(batch, {}, DecodedTokens(list(given), list(given.values())))
        scheduler.check()
        for i, each in enumerate(sequences):
            assert len(each.token_ids) == lengths[i] + (i != 1)
            assert i == 1 or each.token_ids[-1] == given[i]


def test_inputs_of_arrays_are_those_of_query_tokens(tmp_path):
    """Beside a prompt that is read in the same pass, also on another tier."""
    policy = Policy(Split(1, 0), Split(0.5, 0.5), Split(1, 0), 8, 1, prefill_chunk=5, prefill_budget=7)
    prompts = [(3, 4, 5), (4, 4, 4, 4, 5), (5,), (6, 7), tuple(range(3, 30)), (9, 9, 9), (8, 3)]
    sequences = [waiting(i, prompt, max_tokens=9, ignore_eos=True) for i, prompt in enumerate(prompts)]
    queues = TransferQueues(torch.device("cpu"), Tracer())
    builder = InputBuilder(PAGE_TOKENS, Uploads(Pool("cpu", 0), queues))
    seen = 0
    with open_cache(tmp_path, CacheSizes(60, 60, 0, 60)) as cache:
        scheduler = Scheduler(policy, cache, iter(sequences), 1000)
        for _ in range(6):
            assert scheduler.has_work()
            batch = scheduler.next_pass()
            for queries in batch.micro_batches:
                if isinstance(queries, MicroBatchTokens):
                    seen += bool(queries.others)
                    same_inputs(builder, queries)
            scheduler.commit(batch, *tokens_of(batch, scheduler, 3))
    queues.close()
    assert seen


def same_inputs(builder: InputBuilder, queries: MicroBatchTokens) -> None:
    own, other = builder.build(queries), builder.build(tuple(queries))
    assert UNREAD not in own.host_token_ids
    for name in ("token_ids", "host_token_ids", "positions", "host_positions", "logit_index"):
        assert torch.equal(getattr(own, name), getattr(other, name)), name
    assert np.array_equal(own.adapter_ids, other.adapter_ids)
    staged = [each.staged and each.staged.attention for each in (own, other)]
    for mine, expected in ((own.gpu, other.gpu), staged):
        assert (mine is None) == (expected is None)
        if mine is not None:
            for name in ("start", "end", "max_query_len", "max_context_len"):
                assert getattr(mine, name) == getattr(expected, name), name
            for name in ("query_starts", "context_lens", "slots"):
                assert torch.equal(getattr(mine, name), getattr(expected, name)), name
            used = -(-mine.context_lens // PAGE_TOKENS)
            for row, count in enumerate(used.tolist()):
                assert torch.equal(mine.page_table[row, :count], expected.page_table[row, :count])
    assert own.gpu is not None and (own.gpu.num_decoding, own.gpu.start) == (len(queries.decoding), 0)
    rows = [(query.sequence_id, token) for query, token in other.logit_rows]
    found = list[tuple[int, int]]()
    for start in range(0, len(rows), 2):
        chunk = own.logits_chunk(start, torch.zeros(min(2, len(rows) - start), 1))
        found += [(id, 0) for id in chunk.decoding.sequence_ids.tolist()]
        found += [(query.sequence_id, token) for query, token in chunk.rows]
    assert found == rows
