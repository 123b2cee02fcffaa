"""Query tokens as tensors: ragged positions, tables, slots and masks, against a plain description of every token."""

from __future__ import annotations

import weakref
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flexbatch.execution.input_builder import InputBuilder
from flexbatch.execution.inputs import DECODING_APART, AttentionGroup, ancestor_masks, attention_memory
from flexbatch.execution.pass_batch import PassBatch, QueryTokens
from flexbatch.kernels import attention_reference
from flexbatch.memory.pages import PageTable
from flexbatch.memory.tiers import Pool
from flexbatch.memory.transfer import TransferQueues
from flexbatch.memory.uploads import Uploads
from flexbatch.policy.limits import CPU_ATTENTION_MAX_TREE_TOKENS
from flexbatch.trace import Tracer
from tests.engine.device_memory import without_collector
from tests.execution.rigs import PAGE_TOKENS
from tests.kernels.cases import Case


@pytest.fixture(scope="module")
def builder():
    queues = TransferQueues(torch.device("cpu"), Tracer())
    yield InputBuilder(PAGE_TOKENS, Uploads(Pool("cpu", 0), queues))
    queues.close()


def query_of(
    sequence_id: int,
    token_ids: tuple[int, ...],
    start: int,
    first_logit: int,
    table: PageTable,
    parents: tuple[int, ...] | None = None,
    num_prompt_tokens: int = 0,
) -> QueryTokens:
    return QueryTokens(sequence_id, token_ids, start, first_logit, table.location, num_prompt_tokens, parents)


@st.composite
def queries(draw: st.DrawFn) -> list[QueryTokens]:
    """A micro-batch of prompt chunks, decode tokens and trees on all tiers; no page belongs to two."""
    made, taken = [], {"gpu": 0, "cpu": 0, "disk": 0}
    for number in range(draw(st.integers(1, 6))):
        tier = draw(st.sampled_from(["gpu", "cpu", "disk"]))
        start, kind = draw(st.integers(0, 13)), draw(st.sampled_from(["chunk", "decode", "tree"]))
        count = draw(st.sampled_from([1, 2, 5, 33])) if kind == "chunk" else 1
        parents = None
        if kind == "tree":
            parents = (-1, *(draw(st.integers(0, i)) for i in range(draw(st.integers(1, 40)))))
            count = len(parents)
        used = -(-(start + count) // PAGE_TOKENS) + draw(st.integers(0, 2))
        pages = draw(st.permutations(range(taken[tier], taken[tier] + used)))
        taken[tier] += used
        table = PageTable(
            tier,
            list(pages),
            start,
            tail_slot=number if tier == "disk" else -1,
            cpu_attention=tier == "cpu" and draw(st.booleans()),
        )
        prompt = tuple(100 * number + i for i in range(start + count))
        first_logit = 0 if parents else draw(st.integers(0, count))
        made.append(query_of(number, prompt[start:], start, first_logit, table, parents))
    return made


def paths_of(parents: tuple[int, ...]) -> list[set[int]]:
    """For every query token those that it sees: its ancestors and itself."""
    seen: list[set[int]] = []
    for i, parent in enumerate(parents):
        seen.append({i} | (seen[parent] if parent >= 0 else set()))
    return seen


def bits(row: torch.Tensor) -> set[int]:
    return {32 * word + bit for word, value in enumerate(row.tolist()) for bit in range(32) if value >> bit & 1}


def check_group(group: Any, mine: list[QueryTokens], home: bool) -> None:
    """Arguments of the attention kernel for ``mine``, in their order; ``home``: attended in their own pool, not in
    staging."""
    assert group.query_starts.tolist() == [sum(q.num_tokens for q in mine[:i]) for i in range(len(mine) + 1)]
    assert group.context_lens.tolist() == [query.start + query.num_tokens for query in mine]
    assert group.max_query_len == max(query.num_tokens for query in mine) and group.max_context_len == max(
        group.context_lens.tolist()
    )
    assert (
        group.page_table.dtype == group.query_starts.dtype == group.context_lens.dtype == torch.int32
        and group.slots.dtype == torch.int64
    )
    cursor, used = 0, []
    for row, query in zip(group.page_table.tolist(), mine, strict=True):
        count = -(-(query.start + query.num_tokens) // PAGE_TOKENS)
        used += row[:count]
        if home:
            assert row[:count] == list(query.pages.pages[:count])
        slots = [
            row[t // PAGE_TOKENS] * PAGE_TOKENS + t % PAGE_TOKENS
            for t in range(query.start, query.start + query.num_tokens)
        ]
        assert group.slots[cursor : cursor + query.num_tokens].tolist() == slots
        if group.tree_masks is not None:
            wanted = paths_of(query.parents) if query.parents else [set(range(i + 1)) for i in range(query.num_tokens)]
            assert [bits(mask) for mask in group.tree_masks[cursor : cursor + query.num_tokens]] == wanted
        cursor += query.num_tokens
    assert len(set(used)) == len(used), "a page is attended for two sequences"
    assert (group.tree_masks is None) == all(query.parents is None for query in mine)
    assert group.end - group.start == cursor == len(group.slots)


@settings(max_examples=80, deadline=None)
@given(made=queries())
def test_every_query_token_is_where_it_belongs(builder: InputBuilder, made: list[QueryTokens]) -> None:
    inputs = builder.build(made)
    ordered = inputs.queries
    assert sorted(map(id, ordered)) == sorted(map(id, made)) and inputs.num_tokens == sum(
        query.num_tokens for query in made
    )
    assert (
        inputs.token_ids.tolist()
        == inputs.host_token_ids.tolist()
        == [token for query in ordered for token in query.token_ids]
    )
    depths = [
        len(seen) - 1 for query in ordered for seen in paths_of(query.parents or tuple(range(-1, query.num_tokens - 1)))
    ]
    starts = [query.start for query in ordered for _ in query.token_ids]
    assert (
        inputs.positions.tolist()
        == inputs.host_positions.tolist()
        == [start + depth for start, depth in zip(starts, depths, strict=True)]
    )
    flat = [(query, i) for query in ordered for i in range(query.num_tokens)]
    assert [flat[row] for row in inputs.logit_index.tolist()] == list(inputs.logit_rows)
    assert list(inputs.logit_rows) == [(query, i) for query, i in flat if i >= query.first_logit]
    places = {
        place: [query for query in ordered if attention_memory(query) == place] for place in ("gpu", "staged", "cpu")
    }
    cursor = 0
    for place in ("gpu", "staged", "cpu"):
        group = inputs.staged.attention if place == "staged" and inputs.staged is not None else getattr(inputs, place)
        assert (group is not None) == bool(places[place])
        if group is not None:
            assert group.start == cursor
            check_group(group, places[place], place != "staged")
            cursor = group.end
    if inputs.staged is not None:
        check_staging(inputs.staged, places["staged"])


def check_staging(staged: Any, mine: list[QueryTokens]) -> None:
    """Existing pages come first, in the order in which they are gathered: of cpu sequences, then of disk sequences."""
    on_cpu = [query for query in mine if query.pages.tier == "cpu"]
    on_disk = [query for query in mine if query.pages.tier == "disk"]
    assert mine == on_cpu + on_disk
    existing = [-(-query.start // PAGE_TOKENS) for query in mine]
    assert staged.gather.cpu_pages.tolist() == [
        page for q, old in zip(on_cpu, existing, strict=False) for page in q.pages.pages[:old]
    ]
    assert staged.gather.disk_pages == tuple((query.pages, query.start) for query in on_disk)
    assert staged.gather.num_disk_pages == sum(existing[len(on_cpu) :]) and staged.gather.num_pages == sum(existing)
    cursor = 0
    for row, old in zip(staged.attention.page_table.tolist(), existing, strict=True):
        assert row[:old] == list(range(cursor, cursor + old))
        cursor += old
    assert staged.num_cpu_tokens == sum(query.num_tokens for query in on_cpu) == len(staged.cpu_slots)
    home = [slot for q in on_cpu for slot in q.pages.slots(q.start, q.start + q.num_tokens, PAGE_TOKENS)]
    assert staged.cpu_slots.tolist() == home
    assert staged.disk_pages == tuple(
        (q.pages, q.start, q.num_tokens, q.num_tokens - 1 if q.parents else 0) for q in on_disk
    )
    assert staged.num_pages == sum(-(-(query.start + query.num_tokens) // PAGE_TOKENS) for query in mine)


@given(st.integers(0, 100).flatmap(lambda count: st.tuples(*(st.integers(0, i) for i in range(count)))))
def test_masks_hold_the_ancestors_beyond_one_word(below: tuple[int, ...]) -> None:
    parents = (-1, *below)
    masks = ancestor_masks(parents)
    assert masks.shape == (len(parents), -(-len(parents) // 32))
    assert [bits(torch.from_numpy(row)) for row in masks] == paths_of(parents)


def test_prompts_and_large_trees_of_cpu_sequences_are_attended_on_the_device() -> None:
    most = CPU_ATTENTION_MAX_TREE_TOKENS
    for count, tree, place in (
        (1, False, "cpu"),
        (2, False, "staged"),
        (2, True, "cpu"),
        (most, True, "cpu"),
        (most + 1, True, "staged"),
    ):
        prompt = tuple(range(count))
        parents = tuple(range(-1, count - 1)) if tree else None
        query = query_of(0, prompt, 0, count, PageTable("cpu", list(range(20)), cpu_attention=True), parents)
        assert attention_memory(query) == place


def test_a_pass_counts_its_prompt_tokens() -> None:
    table = PageTable("gpu", list(range(9)))
    young, old = partial(query_of, 0, num_prompt_tokens=3), partial(query_of, 1, num_prompt_tokens=2)
    work = PassBatch(((young((5, 6), 0, 2, table), old((9,), 3, 0, table)), (old((6, 9, 9), 1, 2, table),)))
    assert (work.num_prompt_tokens, work.num_sequences) == (3, 3)


def test_adapters_of_a_graph_are_on_their_way_at_once(builder, monkeypatch):
    """Nothing else of that pass is sent after them."""
    sent: list[str] = []
    monkeypatch.setattr(builder, "group_adapters", lambda ids: sent.append("groups"))
    monkeypatch.setattr(builder.uploads, "flush", lambda: sent.append("flush"))
    builder.adapters_at_once(np.ones(3, dtype=np.int32))
    assert sent == ["groups", "flush"]


@pytest.mark.parametrize("decoding", [0, 1, DECODING_APART, DECODING_APART + 5])
@pytest.mark.parametrize("prompts", [(), (7, 1, 30)], ids=["alone", "beside prompts"])
@pytest.mark.parametrize("tree", [False, True], ids=["plain", "tree"])
def test_attention_of_the_parts_is_that_of_the_group(decoding: int, prompts: tuple[int, ...], tree: bool) -> None:
    """Sequences that decode apart from prompts, where there are enough of them, and no tree."""
    lengths = (1,) * decoding + prompts
    if not lengths:
        return
    case = Case(lengths, tuple(5 + 3 * i + length for i, length in enumerate(lengths)), tree=tree)
    (query, rows, table, starts, contexts), options = case.build()
    group = AttentionGroup(
        start=3,
        end=3 + len(query),
        page_table=table,
        query_starts=starts,
        context_lens=contexts,
        slots=torch.arange(len(query)),
        tree_masks=options.pop("tree_masks", None),
        max_query_len=max(lengths),
        max_context_len=int(contexts.max()),
        positions=options.pop("positions", None),
        num_decoding=decoding,
    )
    parts = group.halves or (group,)
    assert (len(parts) == 2) == (decoding >= DECODING_APART and bool(prompts) and not tree)
    given = {"tree_masks": group.tree_masks, "positions": group.positions, **options}
    wanted = attention_reference.paged_attention(query, rows, table, starts, contexts, **given)
    out, last = torch.zeros_like(wanted), group.start
    for part in parts:
        assert part.start == last and part.max_query_len >= int((part.query_starts.diff()).max())
        assert int(part.query_starts[-1]) == part.end - part.start == len(part.slots)
        mine, last = slice(part.start - group.start, part.end - group.start), part.end
        tables = part.page_table, part.query_starts, part.context_lens
        out[mine] = attention_reference.paged_attention(query[mine], rows, *tables, **given)
    assert last == group.end and torch.equal(out, wanted)
    held = weakref.ref(group)
    with without_collector():
        del group, part, parts, given
        assert held() is None  # with it go tensors of the device
