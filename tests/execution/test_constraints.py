"""TokenConstraints against transformers' own processors, and along drafted paths against the same tokens committed."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import NoBadWordsLogitsProcessor, NoRepeatNGramLogitsProcessor, SequenceBiasLogitsProcessor

from flexbatch.execution.sampling import adjust, process_logits
from flexbatch.execution.sequence import Sequence
from flexbatch.request import Request, SamplingParams

VOCAB, EOS = 6, 5
TOKENS = st.integers(0, VOCAB - 1)
WORDS = st.lists(st.lists(TOKENS, min_size=1, max_size=4), max_size=6)
PARAMS = st.fixed_dictionaries(
    {
        "no_repeat_ngram_size": st.integers(0, 4),
        "bad_words_ids": WORDS,
        "sequence_bias": WORDS.flatmap(
            lambda words: st.tuples(*(st.tuples(st.just(word), st.floats(-5, 5, width=16)) for word in words))
        ),
        "suppress_tokens": st.lists(TOKENS, max_size=2),
        "begin_suppress_tokens": st.lists(TOKENS, max_size=2),
        "min_tokens": st.integers(0, 6),
        "min_length": st.integers(0, 12),
        "forced_bos_token_id": st.none() | TOKENS,
        "forced_eos_token_id": st.lists(TOKENS, max_size=2),
        "repetition_penalty": st.sampled_from([1.0, 1.3]),
        "stop_token_ids": st.lists(TOKENS, max_size=1),
        "allowed_token_ids": st.none() | st.lists(TOKENS, min_size=1, max_size=4),
    }
)


def state(prompt, output, params) -> Sequence:
    made = Sequence(Request(0, list(prompt), SamplingParams(**{"max_tokens": 9, **params})), eos_token_ids=(EOS,))
    for token in output:
        made.token_ids.append(token)
    made.catch_up(len(output))
    made.check()
    return made


@settings(max_examples=120, deadline=None)
@given(
    prompt=st.lists(TOKENS, min_size=1, max_size=8),
    output=st.lists(TOKENS, max_size=4),
    path=st.lists(TOKENS, min_size=1, max_size=5),
    params=PARAMS,
)
def test_a_path_counts_as_if_it_had_been_committed(prompt, output, path, params):
    """Every node of a tree is what plain decoding would see there, and looking changes nothing."""
    logits = torch.randn(1, VOCAB, generator=torch.Generator().manual_seed(len(path)))
    drafted, committed = state(prompt, output, params), state(prompt, output + path, params)
    for _ in range(2):
        assert torch.equal(adjust(logits, [drafted], [tuple(path)]), adjust(logits, [committed], [()]))
    torch.testing.assert_close(
        process_logits(logits, [drafted], [tuple(path)]), process_logits(logits, [committed]), equal_nan=True
    )
    drafted.check()
    for token in path:
        drafted.token_ids.append(token)
    drafted.catch_up(len(path))
    assert torch.equal(adjust(logits, [drafted], [()]), adjust(logits, [committed], [()]))


@settings(max_examples=120, deadline=None)
@given(
    text=st.lists(TOKENS, min_size=1, max_size=12),
    size=st.integers(1, 5),
    words=WORDS.filter(bool),
    biases=WORDS.filter(bool),
    seed=st.integers(0, 99),
)
def test_each_rule_is_that_of_transformers(text, size, words, biases, seed):
    logits = torch.randn(1, VOCAB, generator=torch.Generator().manual_seed(seed))
    history = torch.tensor([text])
    # transformers before 5.18 takes token 0 for no token here.
    pairs = [[[token or 1 for token in word], float(position) - 2.0] for position, word in enumerate(biases)]

    def mine(**params):
        return adjust(logits, [state(text, (), params)], [()])

    assert torch.equal(mine(no_repeat_ngram_size=size), NoRepeatNGramLogitsProcessor(size)(history, logits.clone()))
    if any(word != [EOS] for word in words):
        assert torch.equal(mine(bad_words_ids=words), NoBadWordsLogitsProcessor(words, EOS)(history, logits.clone()))
    torch.testing.assert_close(mine(sequence_bias=pairs), SequenceBiasLogitsProcessor(pairs)(history, logits.clone()))


def test_min_tokens_puts_off_eos_and_stop_tokens_and_min_length_eos_alone():
    for output, params, barred in (
        ((), {"min_tokens": 1}, {4, EOS}), ((0,), {"min_tokens": 1}, set()), ((0,), {"min_length": 4}, {EOS}),
        ((0, 1), {"min_length": 4}, set()),
        ((0,), {"min_tokens": 2, "ignore_eos": True}, {4, EOS}),
    ):  # fmt: skip
        adjusted = adjust(torch.zeros(1, VOCAB), [state((1, 2), output, {"stop_token_ids": [4], **params})], [()])
        assert {token for token in range(VOCAB) if adjusted[0, token] == -torch.inf} == barred, (output, params)
