"""Prompts of every kind to token ids, as transformers makes them, with errors that name the prompt."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from flexbatch.request import SamplingParams
from flexbatch.text.prompts import PromptEncoder, PromptError

VOCAB = 400
CHAT = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "2 + 2?"}]


@pytest.fixture
def encoder(tokenizer) -> PromptEncoder:
    return PromptEncoder(tokenizer, max_context=100, vocab_size=VOCAB)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(text=st.text(max_size=20))
def test_text_as_the_tokenizer_encodes_it(encoder, tokenizer, text: str) -> None:
    token_ids = encoder.encode(0, text)
    assert list(token_ids) == tokenizer(text)["input_ids"]
    assert token_ids[0] == tokenizer.bos_token_id and token_ids.count(tokenizer.bos_token_id) == 1


def test_token_ids_are_taken_as_they_are(encoder) -> None:
    assert encoder.encode(0, [5, 6, 7]) == [5, 6, 7]
    assert encoder.encode(0, (5,)) == [5]
    assert encoder.encode(0, np.array([5, 6])) == [5, 6]
    assert all(type(token) is int for token in encoder.encode(0, [np.int64(3)]))


def test_chat_goes_through_the_template_with_one_bos(encoder, tokenizer) -> None:
    token_ids = encoder.encode(0, CHAT)
    assert list(token_ids) == list(tokenizer.apply_chat_template(CHAT, add_generation_prompt=True, return_dict=False))
    assert tokenizer.decode(token_ids) == "<s>[system] Be brief.\n[user] 2 + 2?\n[assistant] "
    assert token_ids.count(tokenizer.bos_token_id) == 1


def test_a_last_message_of_the_assistant_is_continued(encoder, tokenizer) -> None:
    token_ids = encoder.encode(0, [*CHAT, {"role": "assistant", "content": "It is"}])
    assert tokenizer.decode(token_ids).endswith("[assistant] It is")


@pytest.mark.parametrize(
    ("prompt", "problem"),
    [
        (5, "is a int"),
        (b"bytes", "is a bytes"),
        (None, "is a NoneType"),
        ([], "is empty"),
        ([3, "x"], "element 1 is 'x'"),
        ([True], "element 0 is True"),
        ([3, -1], "token id -1 is outside"),
        ([3, VOCAB], f"token id {VOCAB} is outside the model's vocabulary of {VOCAB}"),
        ([{"role": "user"}], r"""message 0 needs "role" \(text\) and "content", it has \['role'\]"""),
        ([{"role": "user", "content": "x"}, 3], "element 0 is"),
        ([{"role": "tool", "content": "x"}], "the chat template failed: no tools here"),
        (list(range(100)), "has 100 tokens; the model's context of 100 allows 99"),
    ],
)
def test_errors_name_the_prompt(encoder, prompt, problem: str) -> None:
    with pytest.raises(PromptError, match=f"^prompt 17: {problem}") as caught:
        encoder.encode(17, prompt)
    assert caught.value.index == 17


def test_scoring_may_reach_past_the_context_by_the_token_that_is_never_read(encoder) -> None:
    assert len(encoder.encode(0, list(range(101)), max_tokens=0)) == 101
    assert len(encoder.encode(0, list(range(99)))) == 99
    with pytest.raises(PromptError, match="allows 101"):
        encoder.encode(0, list(range(102)), max_tokens=0)


def test_a_model_without_tokenizer_takes_token_ids_only() -> None:
    encoder = PromptEncoder(None, max_context=9, vocab_size=9)
    assert encoder.encode(0, [1, 2]) == [1, 2]
    with pytest.raises(PromptError, match="prompt 1: is text, but the model has no tokenizer"):
        encoder.encode(1, "hello")
    with pytest.raises(PromptError, match="no chat template"):
        encoder.encode(2, CHAT)


def test_parameters_that_this_model_cannot_follow_are_errors_of_their_prompt(encoder) -> None:
    encoder.check_params(0, SamplingParams(stop="x", logit_bias={0: 1.0, VOCAB - 1: -1.0}))
    for token in (-1, VOCAB):
        with pytest.raises(
            PromptError, match=f"prompt 3: logit_bias names token id {token}, outside the model's vocabulary of {VOCAB}"
        ):
            encoder.check_params(3, SamplingParams(logit_bias={5: 1.0, token: 1.0}))
    bare = PromptEncoder(None, max_context=100, vocab_size=VOCAB)
    bare.check_params(0, SamplingParams(stop_token_ids=[3]))
    with pytest.raises(
        PromptError, match="prompt 4: has stop strings, but the model has no tokenizer; use stop_token_ids"
    ):
        bare.check_params(4, SamplingParams(stop="x"))


def test_an_empty_text_without_special_tokens_is_an_error(tokenizer) -> None:
    class Bare:
        def __call__(self, text, **kwargs):
            return tokenizer(text, **{**kwargs, "add_special_tokens": False})

    with pytest.raises(PromptError, match="prompt 0: is empty"):
        PromptEncoder(Bare(), max_context=9, vocab_size=VOCAB).encode(0, "")
