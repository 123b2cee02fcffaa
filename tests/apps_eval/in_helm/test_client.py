"""The client on the oracle: what a result holds, what is cached, what becomes of an error."""

from __future__ import annotations

import threading
from dataclasses import replace

import pytest
from helm.common.cache import BlackHoleCacheConfig, SqliteCacheConfig
from helm.common.request import Request
from helm.tokenizers.huggingface_tokenizer import HuggingFaceTokenizer
from oracle import OracleLLM

from flexbatch.apps.helm_client import FlexBatchClient
from flexbatch.request import Completion

PROMPT = "Question: which letter?\nAnswer:"
REQUEST = Request(
    model="tiny/llama", model_deployment="flexbatch/tiny/llama", prompt=PROMPT, temperature=0, max_tokens=12
)


class OracleClient(FlexBatchClient):
    def load(self):
        return OracleLLM(self.pretrained, **self.engine)


def make(folder, cache=None, **options) -> OracleClient:
    tokenizer = HuggingFaceTokenizer(BlackHoleCacheConfig(), f"test/{folder}", str(folder))
    return OracleClient(cache or BlackHoleCacheConfig(), tokenizer, str(folder), end_of_text_token="</s>", **options)


@pytest.fixture
def client(tiny):
    return make(tiny)


def answer(client, request):
    (result,) = client.make_requests([request])
    assert result.success, result.error
    return result


def test_a_completion_has_all_its_fields(client):
    result = answer(client, REQUEST)
    (completion,) = result.completions
    oracle = client.llm.generate([PROMPT], client._pending(REQUEST, 0).params)[0]
    assert completion.text == client.llm.tokenizer.decode(oracle.token_ids)
    assert [token.logprob for token in completion.tokens] == [
        row[token].logprob for row, token in zip(oracle.logprobs, oracle.token_ids, strict=True)
    ]
    assert completion.logprob == sum(token.logprob for token in completion.tokens) < 0
    assert completion.finish_reason == {"reason": "length"}
    assert (result.cached, result.batch_size) == (False, 1)
    assert result.batch_request_time >= result.request_time > 0 and result.request_datetime > 1.6e9


def test_huggingface_logprobs_are_zero_for_greedy_tokens_only(tiny):
    client = make(tiny, logprobs="huggingface")
    assert {token.logprob for token in answer(client, REQUEST).completions[0].tokens} == {0.0}
    assert answer(client, replace(REQUEST, temperature=1.0)).completions[0].logprob < 0
    assert answer(client, replace(REQUEST, echo_prompt=True, max_tokens=0)).completions[0].logprob < 0


def test_a_stop_sequence_cuts_text_and_tokens(client):
    whole = answer(client, REQUEST).completions[0]
    placement = 5
    stop = whole.tokens[placement].text
    cut = answer(client, replace(REQUEST, stop_sequences=["never", stop])).completions[0]
    assert cut.finish_reason == {"reason": "stop"}
    assert cut.text == whole.text[: whole.text.index(stop)]
    assert cut.tokens == whole.tokens[: len(cut.tokens)] and len(cut.tokens) <= placement
    # As far as tokens are characters: two that share one are two replacement characters, and one character of the text.
    certain = "".join(token.text for token in cut.tokens).partition("\ufffd")[0]
    assert cut.text.startswith(certain) or certain.startswith(cut.text)
    needed = "".join(token.text for token in cut.tokens[:-1]).partition("\ufffd")[0]
    assert len(needed) < len(cut.text), "no token more than the text needs"


def test_the_end_of_text_is_told_and_not_shown(client):
    for number in range(200):
        completion = answer(client, replace(REQUEST, prompt=f"Question {number}:", max_tokens=60)).completions[0]
        assert "</s>" not in completion.text and all(token.text != "</s>" for token in completion.tokens)
        if completion.finish_reason == {"reason": "endoftext"}:
            assert len(completion.tokens) < 60
            return
    pytest.fail("no prompt led to the end of text")


@pytest.mark.parametrize("which", ["tiny", "tiny_chat"])
def test_an_echoed_prompt_has_exactly_the_tokenizers_tokens(which, request):
    client = make(request.getfixturevalue(which), apply_chat_template=False)
    (completion,) = answer(client, replace(REQUEST, echo_prompt=True, max_tokens=0)).completions
    tokenizer = client.llm.tokenizer
    ids = tokenizer(PROMPT)["input_ids"]
    assert [token.text for token in completion.tokens] == [tokenizer.decode([i]) for i in ids]
    assert completion.text == tokenizer.decode(ids)
    oracle = client.llm.generate([ids], client._pending(replace(REQUEST, echo_prompt=True, max_tokens=0), 0).params)[0]
    expected = [0.0] + [row[i].logprob for i, row in zip(ids[1:], oracle.prompt_logprobs[1:], strict=True)]
    assert [token.logprob for token in completion.tokens] == expected


def test_the_chat_template_is_applied_once(tiny_chat):
    client = make(tiny_chat)
    work = client._pending(REQUEST, 0)
    assert client.llm.tokenizer.decode(work.prompt_token_ids) == f"<|user|>{PROMPT}\n<|assistant|>"
    chat = replace(REQUEST, prompt="", messages=[{"role": "system", "content": "s"}, {"role": "user", "content": "u"}])
    assert (
        client.llm.tokenizer.decode(client._pending(chat, 0).prompt_token_ids)
        == "<|system|>s\n<|user|>u\n<|assistant|>"
    )


def test_samples_differ_and_do_not_depend_on_the_batch(client):
    sampled = replace(REQUEST, temperature=1.0, num_completions=4, random="1")
    alone = answer(client, sampled).completions
    assert len({completion.text for completion in alone}) == 4
    others = [replace(REQUEST, prompt=f"{number}") for number in range(3)]
    assert client.make_requests([*others, sampled])[3].completions == alone
    assert answer(client, replace(sampled, random="2")).completions != alone


def test_the_cache_answers_and_keys_hold_random_and_settings(tiny, tmp_path):
    cache = SqliteCacheConfig(str(tmp_path / "cache.sqlite"))
    requests = [REQUEST, replace(REQUEST, prompt="other"), REQUEST, replace(REQUEST, random="7")]
    first = make(tiny, cache).make_requests(requests)
    assert [result.cached for result in first] == [False] * 4 and [result.batch_size for result in first] == [4] * 4
    client = make(tiny, cache)
    again = client.make_requests(requests)
    assert client._llm is None, "a full cache loads no model"
    assert [result.cached for result in again] == [True] * 4
    assert [replace(result, cached=False) for result in again] == first
    assert [result.cached for result in make(tiny, cache, weight_bits=8).make_requests(requests)] == [False] * 4
    placed = make(tiny, cache, percent=[100, 0, 0, 100, 100, 0], gpu_batch_size=3)
    assert [result.cached for result in placed.make_requests(requests)] == [True] * 4


def test_equal_requests_are_computed_once(client):
    results = client.make_requests([REQUEST] * 5 + [replace(REQUEST, prompt="x")])
    assert client.llm.batches == [2]
    assert all(result.completions == results[0].completions and result.batch_size == 6 for result in results[:5])


def test_what_was_done_before_a_crash_is_in_the_cache(tiny, tmp_path):
    cache = SqliteCacheConfig(str(tmp_path / "cache.sqlite"))

    class Dies(OracleLLM):
        def stream(self, items, on_tokens=None):
            yield from (
                (key, completion) for _, (key, completion) in zip(range(2), super().stream(items), strict=False)
            )
            raise OSError("the disk is gone")

    client = make(tiny, cache)
    client._llm = Dies(tiny)
    requests = [replace(REQUEST, prompt=f"{number}") for number in range(4)]
    with pytest.raises(OSError, match="disk is gone"):
        client.make_requests(requests)
    assert [result.cached for result in make(tiny, cache).make_requests(requests)] == [True, True, False, False]


def test_a_bad_request_fails_alone_with_both_flags(client):
    long = replace(REQUEST, prompt="x" * 1000)
    picture = replace(REQUEST, embedding=True)
    negative = replace(REQUEST, temperature=-1)
    results = client.make_requests([REQUEST, long, picture, negative, replace(REQUEST, prompt="fine")])
    assert [result.success for result in results] == [True, False, False, False, True]
    for result, reason in zip(results[1:4], ("positions", "embedding", "temperature"), strict=True):
        assert reason in result.error and result.completions == []
        assert (result.error_flags.is_retriable, result.error_flags.is_fatal) == (False, False)


def test_an_engine_that_returns_less_is_an_error(client):
    class Loses(OracleLLM):
        def stream(self, items, on_tokens=None):
            return iter(list(super().stream(items))[:-1])

    client._llm = Loses(client.pretrained)
    with pytest.raises(RuntimeError, match="no completion for requests"):
        client.make_requests([REQUEST, replace(REQUEST, prompt="x")])


def test_threads_share_blocks_and_get_their_own_answers(tiny):
    client = make(tiny, queue_seconds=0.3)
    requests = [replace(REQUEST, prompt=f"Question {number}:", max_tokens=3) for number in range(12)]
    expected = [result.completions for result in make(tiny).make_requests(requests)]
    found = {}
    threads = [
        threading.Thread(target=lambda n=number: found.update({n: client.make_request(requests[n])}))
        for number in range(12)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert [found[number].completions for number in range(12)] == expected
    assert client.llm.batches == [12], "all threads asked within the queue's time"


def test_an_engine_that_dies_fails_every_waiting_thread_at_once(tiny):
    class Dies(OracleLLM):
        def stream(self, items, on_tokens=None):
            raise MemoryError("no room")

    client = make(tiny)
    client._llm = Dies(tiny)
    result = client.make_request(REQUEST)
    assert not result.success and "no room" in result.error
    assert (result.error_flags.is_retriable, result.error_flags.is_fatal) == (False, True)


def test_failed_completions_carry_the_engines_reason(client):
    class Refuses(OracleLLM):
        def stream(self, items, on_tokens=None):
            for key, _, _ in items:
                yield key, Completion(prompt_token_ids=[], finish_reason="error", error="no pages")

    client._llm = Refuses(client.pretrained)
    assert client.make_requests([REQUEST])[0].error == "no pages"
