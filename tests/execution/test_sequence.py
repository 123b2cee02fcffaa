"""Sequences, their query tokens and the mutable side of a request."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flexbatch.execution.adjustments import Adjustments
from flexbatch.execution.pass_batch import QueryTokens
from flexbatch.execution.sequence import Sequence, stream_key
from flexbatch.memory.pages import PageTable, SequencePages
from flexbatch.request import Request, SamplingParams
from tests.execution.rigs import sequence

PAGES = SequencePages("gpu", (0, 1, 2))
TREES = st.integers(0, 30).flatmap(
    lambda count: st.tuples(
        st.tuples(*(st.integers(0, i) for i in range(count))), st.lists(st.integers(0, 3), min_size=count)
    )
)


def tree(below: tuple[int, ...], tokens: list[int]) -> QueryTokens:
    return QueryTokens(0, (99, *tokens[: len(below)]), 7, 0, PAGES, 5, (-1, *below))


@given(TREES)
def test_positions_and_paths_of_a_tree(made: tuple[tuple[int, ...], list[int]]) -> None:
    query = tree(*made)
    assert query.parents is not None and query.num_tentative == query.num_tokens - 1
    for i, (position, path) in enumerate(zip(query.positions, query.paths, strict=True)):
        place, tokens = i, []
        while place:
            tokens.append(query.token_ids[place])
            place = query.parents[place]
        assert position - query.start == len(path) == len(tokens) and list(path) == tokens[::-1]


@given(TREES, st.lists(st.integers(0, 3), min_size=31, max_size=31))
def test_following_a_tree_goes_where_the_drawn_tokens_lead_and_no_further(
    made: tuple[tuple[int, ...], list[int]], drawn: list[int]
) -> None:
    query = tree(*made)
    assert query.parents is not None
    path = query.follow(drawn)
    for before, place in zip((0, *path), path, strict=False):
        assert query.parents[place] == before and query.token_ids[place] == drawn[before]
    last = path[-1] if path else 0
    assert not [i for i, parent in enumerate(query.parents) if parent == last and query.token_ids[i] == drawn[last]], (
        "it could go on"
    )


def test_a_chunk_has_no_tree() -> None:
    query = QueryTokens(0, (4, 5, 6), 2, 1, PAGES, 5)
    assert (query.num_tokens, list(query.positions), query.num_tentative) == (3, [2, 3, 4], 0)


def test_a_sequence_that_disagrees_with_its_output_is_noticed() -> None:
    made = sequence((3, 4), PageTable("gpu", [0, 1]), output=(5,))
    made.token_ids = [*made.token_ids, 6]
    with pytest.raises(AssertionError):
        made.check()
    made.token_ids = made.output.text_token_ids
    made.pages.num_tokens = 4
    with pytest.raises(AssertionError):
        made.check()


@pytest.mark.parametrize(("prompt", "max_tokens", "unread"), [((3, 4, 5), 0, 1), ((3,), 0, 0), ((3, 4, 5), 2, 0)])
def test_the_last_token_of_a_scored_prompt_is_not_read(prompt: tuple[int, ...], max_tokens: int, unread: int) -> None:
    made = sequence(prompt, PageTable("gpu", [0]), max_tokens=max_tokens)
    assert (made.num_uncomputed, made.num_uncached) == (unread, len(prompt) - unread)


def state(**changes: object) -> Sequence:
    fields = {"index": 0, "prompt": (3, 5, 5), "sample": 0, "engine_seed": 0, **changes}
    params = SamplingParams(
        **{
            "max_tokens": 50,
            **{key: value for key, value in fields.items() if key not in ("index", "prompt", "sample", "engine_seed")},
        }
    )  # type: ignore[arg-type]
    request = Request(fields["index"], list(fields["prompt"]), params, fields["sample"])  # type: ignore[arg-type]
    return Sequence(request, engine_seed=fields["engine_seed"])  # type: ignore[arg-type]


def test_streams_belong_to_the_request() -> None:
    """Without a seed to (engine seed, index, sample); with one to (seed, sample) alone; and all of these differ."""
    assert state(index=3, seed=7).stream_key == state(index=9, engine_seed=5, seed=7, prompt=(1,)).stream_key
    assert state(index=3).stream_key == state(index=3, prompt=(1, 2)).stream_key
    variants = [dict(index=i, sample=s, engine_seed=e) for i in range(4) for s in range(3) for e in (-1, 0, 1)]
    variants += [dict(seed=seed, sample=s) for seed in (-1, 0, 1, 2**63) for s in range(3)]
    keys = [state(**variant).stream_key for variant in variants]
    assert len(set(keys)) == len(keys) and all(0 <= key < 2**64 for key in keys)
    assert stream_key(Request(0, [1], SamplingParams(seed=0)), 3) != stream_key(Request(0, [1], SamplingParams()), 0)


@given(
    output=st.lists(st.integers(0, 9), max_size=50),
    bias=st.dictionaries(st.integers(0, 9), st.floats(-5, 5), max_size=3),
)
def test_counts_follow_the_output(output: list[int], bias: dict[int, float]) -> None:
    made = state(repetition_penalty=1.5, presence_penalty=0.5, frequency_penalty=0.25, logit_bias=bias)
    for token in output:
        made.extend([token])
        made.check()
    assert len(made.token_ids) == 3 + len(output) and made.adjustments is not None
    counts = Counter(output)
    assert made.adjustments.counts() == counts
    terms = dict(zip(made.adjustments.token_ids.tolist(), made.adjustments.terms.tolist(), strict=True))
    assert set(terms) == {3, 5} | set(bias) | set(output)
    for token, (added, penalty, subtracted) in terms.items():
        assert added == pytest.approx(bias.get(token, 0.0), rel=1e-6)
        assert penalty == (1.5 if token in counts or token in (3, 5) else 1.0)
        assert subtracted == pytest.approx(0.25 * counts[token] + 0.5 * (counts[token] > 0))


@given(output=st.lists(st.integers(0, 9), max_size=30), drafted=st.lists(st.integers(0, 9), max_size=20))
def test_drafted_tokens_are_counted_on_a_copy(output: list[int], drafted: list[int]) -> None:
    made = Adjustments(Request(0, [3], SamplingParams(frequency_penalty=0.5)))
    for token in output:
        made.add(token)
    longer = made.extended(drafted)
    assert made.counts() == Counter(output) and longer.counts() == Counter(output + drafted)


def test_more_tokens_than_were_asked_for_are_noticed() -> None:
    made = state(max_tokens=1)
    made.extend([4])
    made.check()
    made.token_ids.append(4)
    with pytest.raises(AssertionError, match="2 tokens for max_tokens=1"):
        made.check()


@pytest.mark.parametrize(
    ("params", "plain"),
    [
        ({"temperature": 0.0}, True),
        ({"temperature": 0.0, "logprobs": 0}, False),
        ({"temperature": 0.0, "logit_bias": {1: 1.0}}, False),
        ({}, False),
    ],
)
def test_plain_greedy_is_argmax_without_further_ado(params: dict, plain: bool) -> None:
    assert state(**params).unadjusted_greedy is plain
