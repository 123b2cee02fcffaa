"""Sampling: order of processing, distributions, and random streams that belong to the request."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from flexbatch.execution import sampling
from flexbatch.execution.logprobs import token_logprobs
from flexbatch.execution.random_stream import ACCEPT_DRAW, mix, uniforms
from flexbatch.execution.sampling import process_logits, sample
from flexbatch.execution.sequence import Sequence
from flexbatch.policy import limits
from flexbatch.request import Request, SamplingParams

VOCAB = 211


def state(
    index: int = 0,
    output: tuple[int, ...] = (),
    *,
    prompt: tuple[int, ...] = (3, 5, 5, 7),
    engine_seed=0,
    sample_index=0,
    **params,
) -> Sequence:
    made = Sequence(
        Request(index, list(prompt), SamplingParams(**{"max_tokens": 100, **params}), sample=sample_index),
        engine_seed=engine_seed,
    )
    for token in output:
        made.extend([token])
    made.check()
    return made


def random_logits(rows: int, seed: int = 0, vocab: int = VOCAB) -> torch.Tensor:
    return 3 * torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed))


def test_split_mix_matches_the_published_sequence() -> None:
    # First outputs of SplitMix64 for seed 0, as java.util.SplittableRandom and the xoshiro authors' reference give
    # them.
    gamma = torch.tensor([0x9E3779B97F4A7C15 - 2**64])
    words = [int(mix(gamma * i)) % 2**64 for i in (1, 2, 3)]
    assert words == [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]


def test_uniforms_are_uniform_and_open() -> None:
    numbers = uniforms([1, 2**64 - 1], [0, 5], 200_000, "cpu")
    assert numbers.dtype == torch.float64 and numbers.min() > 0 and numbers.max() < 1
    for row in numbers:
        expected = torch.arange(1, 101) / 100
        assert (torch.quantile(row, expected[:-1].double()) - expected[:-1]).abs().max() < 0.005
    assert torch.corrcoef(numbers)[0, 1].abs() < 0.01
    assert not torch.equal(numbers[:1], uniforms([1], [0], 200_000, "cpu", ACCEPT_DRAW))
    assert not torch.equal(numbers[:1], uniforms([1], [1], 200_000, "cpu"))


def test_all_greedy_is_argmax() -> None:
    logits = random_logits(5)
    drawn = sample(logits, [state(i, temperature=0.0) for i in range(5)])
    assert drawn.token_ids.dtype == torch.int64
    assert torch.equal(drawn.token_ids, logits.argmax(-1))
    assert drawn.logprobs == [None] * 5


@pytest.mark.parametrize(
    ("params", "warpers"),
    [
        ({"temperature": 0.7}, [TemperatureLogitsWarper(0.7)]),
        ({"top_k": 5}, [TopKLogitsWarper(5)]),
        ({"top_k": 10_000}, []),
        ({"top_k": -1}, []),
        ({"top_p": 0.8}, [TopPLogitsWarper(0.8)]),
        ({"min_p": 0.05}, [MinPLogitsWarper(0.05)]),
        (
            {"temperature": 1.7, "min_p": 0.02, "top_k": 20, "top_p": 0.7},
            [TemperatureLogitsWarper(1.7), MinPLogitsWarper(0.02), TopKLogitsWarper(20), TopPLogitsWarper(0.7)],
        ),
        ({"repetition_penalty": 1.3}, [RepetitionPenaltyLogitsProcessor(1.3)]),
        ({"repetition_penalty": 0.8, "top_p": 0.5}, [RepetitionPenaltyLogitsProcessor(0.8), TopPLogitsWarper(0.5)]),
    ],
)
def test_processing_agrees_with_transformers(params: dict, warpers: list) -> None:
    output = (11, 3, 11, 40)
    logits = random_logits(4, seed=1)
    before = logits.clone()
    states = [state(i, output, prompt=(i, 5, 60 + i), **params) for i in range(4)]
    for row, request in enumerate(states):
        history = torch.tensor([[*request.request.prompt_token_ids, *output]])
        expected = logits[row : row + 1].clone()
        for warper in warpers:
            expected = warper(history, expected)
        torch.testing.assert_close(process_logits(logits, states)[row : row + 1], expected.softmax(-1))
    assert torch.equal(logits, before)


def test_bias_and_penalties_by_hand() -> None:
    logits = torch.zeros(1, VOCAB)
    logits[0, [5, 11, 12]] = torch.tensor([2.0, 2.0, -2.0])
    request = state(
        0,
        (11, 11, 12),
        repetition_penalty=2.0,
        presence_penalty=0.5,
        frequency_penalty=0.25,
        logit_bias={11: 1.0, 99: 4.0},
    )
    adjusted = sampling.adjust(logits, [request], [()])
    # 5: only in the prompt, so repetition alone. 11: (2 + 1) / 2 - 2 * 0.25 - 0.5. 12: -2 * 2 - 0.25 - 0.5. 99: bias
    # alone.
    torch.testing.assert_close(adjusted[0, [5, 11, 12, 99, 0]], torch.tensor([1.0, 0.5, -4.75, 4.0, 0.0]))
    assert sample(logits, [request]).token_ids.shape == (1,)


def test_greedy_with_penalties_uses_the_adjusted_logits() -> None:
    logits = torch.zeros(2, VOCAB)
    logits[:, 8], logits[:, 9] = 2.0, 1.0
    states = [state(0, temperature=0.0), state(1, (8, 8, 8), temperature=0.0, frequency_penalty=0.5)]
    assert sample(logits, states).token_ids.tolist() == [8, 9]
    assert process_logits(logits, states).argmax(-1).tolist() == [8, 9]
    assert process_logits(logits, states).max(-1).values.tolist() == [1.0, 1.0]


def test_a_path_counts_as_if_it_had_been_committed() -> None:
    logits = random_logits(2, seed=3)
    params = {"presence_penalty": 1.0, "frequency_penalty": 0.5, "repetition_penalty": 1.2}
    root, committed = state(4, (11,), **params), state(4, (11, 30, 11), **params)
    torch.testing.assert_close(
        process_logits(logits[:1], [root], [(30, 11)]), process_logits(logits[:1], [committed]), rtol=0, atol=0
    )
    assert (
        sample(logits[:1], [root], [(30, 11)]).token_ids.tolist() == sample(logits[:1], [committed]).token_ids.tolist()
    )
    assert root.output.token_ids == [11]
    process_logits(logits[:1], [root], [tuple(range(50, 110))])
    root.extend([40])
    root.check()
    torch.testing.assert_close(
        process_logits(logits[:1], [root]), process_logits(logits[:1], [state(4, (11, 40), **params)]), rtol=0, atol=0
    )


def test_a_bias_outside_the_vocabulary_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"vocabulary of 211: 999 to 999"):
        sample(random_logits(1), [state(logit_bias={999: 1.0})])


@pytest.mark.parametrize("params", [{}, {"temperature": 0.5}, {"top_k": 4}, {"top_p": 0.6}, {"min_p": 0.2}])
def test_frequencies_match_the_distribution(params: dict) -> None:
    draws, vocab = 5_000, 12
    logits = random_logits(1, seed=5, vocab=vocab) / 2
    states = [state(i, **params) for i in range(draws)]
    expected = process_logits(logits, states[:1])[0]
    counts = torch.bincount(sample(logits.expand(draws, vocab), states).token_ids, minlength=vocab)
    assert counts[expected == 0].sum() == 0
    kept = expected > 0
    chi_square = ((counts - draws * expected) ** 2 / (draws * expected))[kept].sum()
    # 99.99 % quantile of chi square with 11 degrees of freedom is 37.4; the streams are fixed, so this never flickers.
    assert chi_square < 37.4


def test_successive_positions_of_one_stream_are_independent_draws() -> None:
    logits = torch.zeros(1, 8)
    request, tokens = state(0, max_tokens=2000), []
    for _ in range(2000):
        tokens.append(int(sample(logits, [request]).token_ids))
        request.extend(tokens[-1:])
    pairs = torch.bincount(torch.tensor(tokens[:-1]) * 8 + torch.tensor(tokens[1:]), minlength=64)
    expected = 1999 / 64
    assert ((pairs - expected) ** 2 / expected).sum() < 112  # 99.99 % quantile of chi square with 63 degrees of freedom


MIX = [
    {"temperature": 0.0},
    {},
    {"top_k": 3},
    {"top_p": 0.5, "temperature": 1.5},
    {"min_p": 0.1},
    {"repetition_penalty": 1.5},
    {"temperature": 0.0, "presence_penalty": 1.0},
    {"logprobs": 2},
]


@settings(max_examples=40, deadline=None)
@given(
    order=st.permutations(range(len(MIX))),
    size=st.integers(1, len(MIX)),
    chunk=st.sampled_from([1, 2 * VOCAB, 1 << 22]),
)
def test_a_row_does_not_depend_on_the_others(order: list[int], size: int, chunk: int) -> None:
    logits = random_logits(len(MIX), seed=9)
    alone = [int(sample(logits[i : i + 1], [state(i, (2, i), **MIX[i])]).token_ids) for i in range(len(MIX))]
    rows = order[:size]
    previous, limits.SAMPLING_CHUNK_LOGITS = limits.SAMPLING_CHUNK_LOGITS, chunk
    try:
        together = sample(logits[rows], [state(i, (2, i), **MIX[i]) for i in rows])
    finally:
        limits.SAMPLING_CHUNK_LOGITS = previous
    assert together.token_ids.tolist() == [alone[i] for i in rows]
    assert [entry is not None for entry in together.logprobs] == ["logprobs" in MIX[i] for i in rows]


def test_rounding_in_the_logits_does_not_flip_draws() -> None:
    rows, vocab = 400, 20_000
    logits = random_logits(rows, seed=2, vocab=vocab) / 100
    states = [state(i) for i in range(rows)]
    noise = torch.randn(rows, vocab, generator=torch.Generator().manual_seed(1)) * 1e-7
    assert torch.equal(sample(logits, states).token_ids, sample(logits + noise, states).token_ids)


def test_seeds_and_streams() -> None:
    logits = torch.zeros(1, 100_000)

    def token(**kwargs) -> int:
        return int(sample(logits, [state(**kwargs)]).token_ids)

    assert token(index=3) == token(index=3)
    assert (
        len(
            {
                token(index=0),
                token(index=1),
                token(index=0, engine_seed=1),
                token(index=0, sample_index=1),
                token(index=0, output=(1,)),
            }
        )
        == 5
    )
    assert token(index=0, seed=7) == token(index=9, seed=7, engine_seed=4)
    assert len({token(seed=7), token(seed=-7), token(seed=7, sample_index=1), token()}) == 4


def test_tiny_temperature_and_extreme_logits_stay_finite() -> None:
    logits = random_logits(2, seed=8) * 1e4
    states = [state(0, temperature=1e-6), state(1, temperature=1e-6, top_p=1e-9, top_k=1, min_p=1.0)]
    assert torch.equal(sample(logits, states).token_ids, logits.argmax(-1))
    assert process_logits(logits, states).isfinite().all()


@pytest.mark.parametrize("k", [0, 1, 5, 10_000])
def test_logprobs_are_the_models(k: int) -> None:
    logits = random_logits(3, seed=6)
    states = [state(0, logprobs=k, temperature=0.3, repetition_penalty=1.4), state(1), state(2, logprobs=1)]
    drawn = sample(logits, states)
    entry, token = drawn.logprobs[0], int(drawn.token_ids[0])
    assert entry is not None and drawn.logprobs[1] is None and drawn.logprobs[2] is not None
    expected = logits[0].log_softmax(-1)
    order = expected.argsort(descending=True).tolist()
    assert set(entry) == {token, *order[:k]}
    for token_id, logprob in entry.items():
        assert logprob.token_id == token_id and order[logprob.rank - 1] == token_id
        assert logprob.logprob == pytest.approx(float(expected[token_id]), abs=1e-6)


def test_prompt_logprobs_by_blocks_of_rows() -> None:
    logits = random_logits(9, seed=12)
    targets = torch.randint(VOCAB, (9,), generator=torch.Generator().manual_seed(0)).tolist()
    whole = token_logprobs(logits, targets, [3] * 9)
    blocks = [slice(start, min(start + 4, 9)) for start in range(0, 9, 4)]
    parts = [
        entry
        for block in blocks
        for entry in token_logprobs(logits[block], targets[block], [3] * (block.stop - block.start))
    ]
    assert parts == whole
    assert [next(iter(entry)) for entry in whole] == targets


def test_shapes_are_checked() -> None:
    with pytest.raises(ValueError, match=r"logits \(3, 211\) for 2 sequences"):
        sample(random_logits(3), [state(0), state(1)])
    with pytest.raises(ValueError, match="need one of each per row"):
        token_logprobs(random_logits(3), [1], [1])


def test_check_finds_a_state_out_of_step() -> None:
    request = state(0, (4,), presence_penalty=1.0)
    request.token_ids.append(9)
    with pytest.raises(AssertionError, match="counts"):
        request.check()


SPOILED = {"NaN": float("nan"), "infinity": float("inf")}


@pytest.mark.parametrize("spoil", SPOILED)
@pytest.mark.parametrize(
    "params",
    [
        *MIX,
        {"suppress_tokens": [9]},
        {"logit_bias": {9: -float("inf")}},
        {"forced_bos_token_id": 3, "temperature": 0.0},
    ],
    ids=str,
)
def test_a_row_that_is_not_finite_is_marked_and_no_other(params: dict, spoil: str) -> None:
    """One number among many is enough, also where nobody could draw that token; a token that the model itself rules out
    by -inf is none."""
    logits = random_logits(4, seed=4)
    logits[0, 17] = -torch.inf
    alone = sample(logits, [state(i, **params) for i in range(4)]).token_ids.tolist()
    assert min(alone) >= 0
    logits[1, 9], logits[3] = SPOILED[spoil], -torch.inf
    drawn = sample(logits, [state(i, **params) for i in range(4)])
    assert drawn.token_ids.tolist() == [alone[0], sampling.NOT_FINITE, alone[2], sampling.NOT_FINITE]
    assert [entry is not None for entry in drawn.logprobs] == ["logprobs" in params] * 1 + [False] + [
        "logprobs" in params
    ] + [False]
    spoiled = process_logits(logits, [state(i, **params) for i in range(4)]).isnan()
    assert spoiled.all(1).tolist() == spoiled.any(1).tolist() == [False, True, False, True]


@pytest.mark.parametrize("temperature", [0.0, 1e-300, 1e-38, 1.0, 1e38, 1e39, 1e300])
def test_barred_tokens_stay_barred_at_any_temperature(temperature: float) -> None:
    barred = {token: -float("inf") for token in range(VOCAB) if token not in (3, 8)}
    states = [
        state(i, temperature=temperature, logit_bias=barred, top_p=0.99, min_p=1e-300, top_k=50) for i in range(200)
    ]
    drawn = sample(random_logits(200, seed=3), states).token_ids
    assert set(drawn.tolist()) == {3, 8}
    probabilities = process_logits(random_logits(200, seed=3), states)
    torch.testing.assert_close(probabilities[:, [3, 8]].sum(1), torch.ones(200))
    none = state(0, temperature=temperature, suppress_tokens=range(VOCAB))
    assert (
        sample(random_logits(1), [none]).token_ids.tolist() == [sampling.ALL_BARRED]
        and process_logits(random_logits(1), [none]).isnan().all()
    )


@pytest.mark.parametrize("penalty", [1e-300, 1e-30, 1e30, 1e300])
def test_extreme_penalties_draw_some_token(penalty: float) -> None:
    states = [state(i, (3, 8), repetition_penalty=penalty, temperature=i * 0.7) for i in range(3)]
    assert min(sample(random_logits(3), states).token_ids.tolist()) >= 0


@pytest.mark.parametrize("penalty", [1e-300, 1e-30, 1e30, 1e300])
@pytest.mark.parametrize("bias", [1e30, -1e30, -torch.inf])
@pytest.mark.parametrize("temperature", [0.0, 1e-30, 1.0])
def test_bias_and_penalty_at_their_ends_leave_finite_scores(penalty: float, bias: float, temperature: float) -> None:
    """A token that they raise is drawn, one that they lower is not, and is barred by a bias of -inf alone."""
    params = {"repetition_penalty": penalty, "temperature": temperature, "seed": 1}
    tokens = [state(i, (7,), logit_bias={7: bias}, **params) for i in range(3)]
    drawn = sample(random_logits(3), tokens).token_ids.tolist()
    assert min(drawn) >= 0
    if bias < 0 or penalty < 1:  # else they cancel out
        assert all((token == 7) == (bias > 0) for token in drawn)
    only = dict.fromkeys((token for token in range(VOCAB) if token != 7), -torch.inf)
    alone = [state(0, (7,), logit_bias={**only, 7: bias}, **params)]
    assert sample(random_logits(1), alone).token_ids.tolist() == [7 if bias > -torch.inf else sampling.ALL_BARRED]
