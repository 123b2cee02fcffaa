"""Log-probabilities in OpenAI's formats, for every kind of tokenizer: bytes join to the text, no candidate is lost,
offsets lie in the text."""

from __future__ import annotations

import json
from functools import cache

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from flexbatch.apps.jobs.openai_logprobs import TokenTexts, offsets_in
from flexbatch.apps.jobs.openai_requests import CHAT, COMPLETIONS, Call
from flexbatch.apps.jobs.openai_responses import OpenAIOutput
from flexbatch.apps.jobs.rows import RowRequest
from flexbatch.request import Completion, SamplingParams, TokenLogprob
from flexbatch.text.decoder import TextDecoder
from flexbatch.text.detokenize import OutputText
from tests.text.kinds import KINDS

LETTERS_ONLY = {"word-piece-tidy", "tidy-words"}
"""Their clean-up takes away spaces of earlier tokens, so that tokens have no bytes of their own."""


@cache
def tools(kind: str):
    tokenizer = KINDS[kind]()
    return tokenizer, TokenTexts(tokenizer), TextDecoder(tokenizer)


def completion(
    kind: str, prompt: list[int], answer: list[int], count: int, also: list[int], stop: str = ""
) -> Completion:
    """As the engine would give it: the drawn token first, then the ``count`` most likely, among which the drawn one
    may be."""
    output = OutputText(
        tools(kind)[2], SamplingParams(max_tokens=len(answer), stop=stop or ()), prompt_token_ids=prompt
    )
    output.extend(answer)
    steps = []
    for position, token in enumerate(output.token_ids):
        best = list(dict.fromkeys([*also[position % 3 :], *range(count + 1)]))[:count]
        if position % 2 and count:
            best[position % count] = token
        best = list(dict.fromkeys(best))
        best += [other for other in range(count + 3) if other not in best][: count - len(best)]
        entry = {token: TokenLogprob(token, -50.0, 99)}
        entry.update({other: TokenLogprob(other, -1.0 - rank, rank) for rank, other in enumerate(best, 1)})
        entry = {token: entry.pop(token), **entry}
        steps.append(entry)
    return Completion(list(prompt), list(output.token_ids), output.text, "stop", logprobs=steps)


def choice(kind: str, done: Completion, url: str, count: int) -> dict:
    output = OpenAIOutput("job")
    output.start(1, tools(kind)[0])
    record = output.record(RowRequest(0, 0, 0, extra=Call("a", url, "m", count)), [done])
    return json.loads(json.dumps(record, allow_nan=False))["response"]["body"]["choices"][0]


def answers(kind: str) -> st.SearchStrategy[list[int]]:
    tokenizer, _, decoder = tools(kind)
    positions = {byte: token for token, byte in decoder.byte_pieces.items()}
    texts = st.text(st.sampled_from("theca ts.漢字é🙂\n"), max_size=12)

    def encode(text: str) -> list[int]:
        return (
            [positions[byte] for byte in text.encode()]
            if positions
            else tokenizer.encode(text, add_special_tokens=False)
        )

    return texts.map(encode) | st.lists(st.integers(0, len(tokenizer) - 1), max_size=12)


@pytest.mark.parametrize("kind", KINDS)
def test_bytes_join_to_the_text_and_no_candidate_is_lost(kind: str) -> None:
    @settings(suppress_health_check=list(HealthCheck), deadline=None, max_examples=25)
    @given(
        prompt=answers(kind),
        answer=answers(kind),
        count=st.integers(0, 5),
        also=st.lists(st.integers(0, len(tools(kind)[0]) - 1), max_size=5),
    )
    def check(prompt: list[int], answer: list[int], count: int, also: list[int]) -> None:
        done = completion(kind, prompt, answer, count, also)
        chat, legacy = choice(kind, done, CHAT, count), choice(kind, done, COMPLETIONS, count)["logprobs"]
        content = chat["logprobs"]["content"]
        joined = b"".join(bytes(entry["bytes"]) for entry in content)
        before, whole = (tools(kind)[0].decode(ids, skip_special_tokens=True) for ids in (prompt, prompt + answer))
        # a character that begins in the prompt has bytes that are no token's of the answer
        if kind not in LETTERS_ONLY and "\ufffd" not in before + whole:
            assert joined.decode("utf-8") == done.text
        assert all(len(entry["top_logprobs"]) == count for entry in content)
        for entry, step in zip(content, done.logprobs, strict=True):
            wanted = sorted((item.logprob for item in step.values()), reverse=True)[:count]
            assert [each["logprob"] for each in entry["top_logprobs"]] == wanted
        assert len(legacy["tokens"]) == len(done.token_ids) == len(legacy["text_offset"])
        assert [len(each) for each in legacy["top_logprobs"]] == [len(step) for step in done.logprobs], (
            "one replaced another"
        )
        assert all(name in best for name, best in zip(legacy["tokens"], legacy["top_logprobs"], strict=True))
        offsets = legacy["text_offset"]
        assert (
            offsets == sorted(offsets)
            and all(0 <= offset <= len(done.text) for offset in offsets)
            and offsets[:1] in ([], [0])
        )

    check()


@pytest.mark.parametrize("kind", ["byte-level", "byte-fallback-llama", "byte-fallback-gemma"])
@pytest.mark.parametrize("text", ["漢", "a漢字b", "🙂🙂", "é"])
def test_parts_of_characters_are_bytes_with_names_of_their_own(kind: str, text: str) -> None:
    tokenizer, texts, decoder = tools(kind)
    positions = {byte: token for token, byte in decoder.byte_pieces.items()}
    if not positions:
        positions = {texts._letters[letter]: tokenizer.convert_tokens_to_ids(letter) for letter in texts._letters}
    answer = [positions[byte] for byte in text.encode()]
    done = completion(kind, [positions[ord("x")]], answer, 3, [positions[0xE6], positions[0xE7], positions[0xE8]])
    assert done.text == text
    content = choice(kind, done, CHAT, 3)["logprobs"]["content"]
    assert [entry["bytes"] for entry in content] == [[byte] for byte in text.encode()]
    legacy = choice(kind, done, COMPLETIONS, 3)["logprobs"]
    assert legacy["text_offset"] == [position for position, letter in enumerate(text) for _ in letter.encode()]
    assert "bytes:\\xe6" in legacy["top_logprobs"][0] and "bytes:\\xe8" in legacy["top_logprobs"][0]


@pytest.mark.parametrize("stop", ["END", "b", "漢", "字E", "D"])
def test_what_a_stop_string_cuts_is_not_in_the_bytes(stop: str) -> None:
    tokenizer = tools("byte-level")[0]
    answer = tokenizer.encode("a漢字ENDb", add_special_tokens=False)
    done = completion("byte-level", [], answer, 2, [], stop)
    entries = choice("byte-level", done, CHAT, 2)["logprobs"]["content"]
    assert b"".join(bytes(entry["bytes"]) for entry in entries).decode() == done.text == "a漢字ENDb".split(stop)[0]
    assert max(choice("byte-level", done, COMPLETIONS, 2)["logprobs"]["text_offset"]) <= len(done.text)
    assert len(entries) == len(done.token_ids)


def test_special_tokens_are_named_and_have_no_bytes() -> None:
    tokenizer = tools("byte-level")[0]
    a, end = tokenizer.convert_tokens_to_ids(["a", "<|im_end|>"])
    done = completion("byte-level", [a], [a, end, a], 1, [end])
    entries = choice("byte-level", done, CHAT, 1)["logprobs"]["content"]
    assert [(entry["token"], entry["bytes"]) for entry in entries] == [("a", [97]), ("<|im_end|>", []), ("a", [97])]


def test_places_of_bytes_that_are_no_text() -> None:
    assert offsets_in("", [b"a", b"\xff"]) == [(0, b""), (0, b"")]
    assert offsets_in("\ufffdb", [b"\xff", b"b", b"c"]) == [(0, b"\xff"), (1, b"b"), (2, b"")]
    assert offsets_in("a\ufffd", [b"a", b"\xe6"]) == [(0, b"a"), (1, b"\xe6")]
    assert offsets_in("ab", [b"a", b"bcd"]) == [(0, b"a"), (1, b"b")]


def test_a_token_that_cannot_come_has_a_number_for_its_log_probability() -> None:
    done = Completion(
        [5], [5], "x", "length", logprobs=[{5: TokenLogprob(5, -0.1, 1), 6: TokenLogprob(6, float("-inf"), 2)}]
    )
    assert choice("byte-level", done, CHAT, 2)["logprobs"]["content"][0]["top_logprobs"][1]["logprob"] == -9999.0
