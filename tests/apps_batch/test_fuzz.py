"""Whatever a line of a batch file holds is an answer or an error of that line: made-up requests, and files that were
damaged byte by byte."""

from __future__ import annotations

import dataclasses
import json
import random
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from flexbatch.apps.jobs.openai_requests import RequestError, parse_request
from flexbatch.request import SamplingParams
from flexbatch.text.chat import ChatPrompt
from flexbatch.text.files import split_lines
from tests.apps_batch.fake import FakeLLM
from tests.apps_batch.helpers import run_here

LONE, PAIR = "\ud83d", "\U0001f600"
BODY: dict[str, Any] = {"model": "m", "prompt": "hello", "max_tokens": 3, "temperature": 0}
CHAT = {
    "model": "m",
    "messages": [{"role": "user", "content": "hi"}],
    "max_completion_tokens": 3,
    "temperature": 0.5,
    "seed": 1,
}
FIELDS = (
    "temperature", "top_p", "n", "seed", "presence_penalty", "frequency_penalty", "top_k", "min_p",
    "repetition_penalty", "ignore_eos", "stop", "max_tokens", "max_completion_tokens", "logprobs", "top_logprobs",
    "logit_bias", "prompt", "messages", "model", "user", "metadata", "stream", "echo", "best_of", "suffix", "tools",
    "response_format", "unknown", "min_tokens", "truncate_prompt_tokens", "include_stop_str_in_output",
    "skip_special_tokens", "bad_words", "stop_token_ids", "allowed_token_ids", "add_generation_prompt",
    "continue_final_message", "chat_template_kwargs", "structured_outputs",
)  # fmt: skip
ODD: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 5, 5.5, -0.0, 1e308, 1e-308, 2**31, 2**53 + 1, 2**63, -(2**63) - 1, 10**400,
    float("nan"), float("inf"), "", "x", "5", LONE, "a" + LONE + "b", "\x00", "\u2028", [], [5], [None], ["x"], [LONE],
    [""], [[5]], [["x"]], [{}], [True], {}, {"5": 1}, {"x": 1}, {"5": "x"}, {"5": None}, {"-1": 1}, {"5": 1e400},
    {"99999999999999999999": 1}, {LONE: 1}, {"a": {"b": [LONE]}}, [{"role": "user"}],
    [{"role": "user", "content": LONE}], [{"role": 5, "content": "x"}], [{"role": "user", "content": 5}],
    [{"role": "user", "content": "x", "name": LONE}], [{"role": LONE, "content": "x"}], [5, "x"], ["x", "y"], [10**30],
    "x" * 5000,
)  # fmt: skip


def request(body: Any = BODY, url: Any = "/v1/completions", **other: Any) -> dict[str, Any]:
    return {"custom_id": "a", "method": "POST", "url": url, "body": body, **other}


def line_of(value: Any) -> bytes:
    """JSON as careless writers make it: NaN, Infinity and halves of surrogate pairs included."""
    return json.dumps(value).encode()


def parsed(line: bytes | str) -> RequestError | None:
    """The error, or None for a request that can be run; anything else that is raised fails the test."""
    try:
        call, prompts, params = parse_request(line, SamplingParams())
    except RequestError as error:
        message = str(error)
        assert error.code and message and len(message) < 600 and "Traceback" not in message, message
        message.encode()
        return error
    assert call.custom_id is not None and params.n >= 1
    for prompt in prompts:
        text = [prompt.messages, dataclasses.asdict(prompt.options)] if isinstance(prompt, ChatPrompt) else prompt
        json.dumps([call.custom_id, call.model, text], ensure_ascii=False).encode()
    return None


DEEP = "[" * 100_000
BAD_LINES = {
    "nothing": b"{}",
    "a list": b"[1]",
    "a number": b"5",
    "null": b"null",
    "zero bytes": b"\x00\x00",
    "half of a line": line_of(request())[:-9],
    "two values": line_of(request()) + b" {}",
    "nested and open": DEEP.encode(),
    "nested and closed": b'{"custom_id": "a", "body": ' + DEEP.encode() + b"]" * 100_000 + b"}",
    "nested under "
    "metadata": line_of(request())[:-2] + b', "metadata": ' + b'{"a":' * 100_000 + b"1" + b"}" * 100_000 + b"}}",
    "nested 300 deep": line_of(request())[:-2] + b', "metadata": ' + b"[" * 300 + b"]" * 300 + b"}}",
    "a byte that is not UTF-8": line_of(request()).replace(b"hello", b"hel\xfflo"),
    "latin-1": line_of(request()).replace(b"hello", "größer".encode("latin-1")),
    "a raw tab": line_of(request()).replace(b"hello", b"hel\tlo"),
    "a raw zero byte": line_of(request()).replace(b"hello", b"hel\x00lo"),
    "half a pair in the prompt": line_of(request({**BODY, "prompt": f"x{LONE}"})),
    "half a pair in custom_id": line_of(request(custom_id=f"x{LONE}")),
    "half a pair in the model": line_of(request({**BODY, "model": f"x{LONE}"})),
    "half a pair in a stop string": line_of(request({**BODY, "stop": [f"x{LONE}"]})),
    "half a pair in a "
    "message": line_of(request({"messages": [{"role": "user", "content": LONE}]}, "/v1/chat/completions")),
    "half a pair as a field": line_of(request({**BODY, LONE: 1})),
    "a number of 5,000 digits": line_of(request()).replace(b'"max_tokens": 3', b'"max_tokens": ' + b"9" * 5000),
    "a number beyond doubles": line_of(request()).replace(b'"temperature": 0', b'"temperature": 1e400'),
    "a huge exponent": line_of(request()).replace(b'"temperature": 0', b'"temperature": 1e99999999999999999999'),
    "NaN": line_of(request({**BODY, "temperature": float("nan")})),
    "Infinity": line_of(request({**BODY, "top_p": float("inf")})),
    "a key twice": line_of(request()).replace(b'"max_tokens": 3', b'"max_tokens": 3, "max_tokens": 5'),
    "custom_id twice": line_of(request())[:-1] + b', "custom_id": "b"}',
    "no custom_id": line_of({"url": "/v1/completions", "body": BODY}),
    "custom_id is a number": line_of(request(custom_id=5)),
    "custom_id is null": line_of(request(custom_id=None)),
    "another url": line_of(request(url="/v1/embeddings")),
    "url is a list": line_of(request(url=["/v1/completions"])),
    "url of the other form": line_of(request(url="/v1/chat/completions")),
    "form of the other url": line_of(request(CHAT)),
    "method GET": line_of(request(method="GET")),
    "method is an object": line_of(request(method={"a": 1})),
    "a long method": line_of(request(method="x" * 100_000)),
    "no body": line_of({"custom_id": "a", "url": "/v1/completions"}),
    "body is text": line_of(request("x")),
    "an empty body": line_of(request({})),
    "stop holds a number": line_of(request({**BODY, "stop": [5]})),
    "logit_bias is a list": line_of(request({**BODY, "logit_bias": [1]})),
    "logit_bias of a word": line_of(request({**BODY, "logit_bias": {"x": 1}})),
    "logit_bias of one token twice": line_of(request({**BODY, "logit_bias": {"5": 1, "05": 2}})),
    "logit_bias of a text": line_of(request({**BODY, "logit_bias": {"5": "x"}})),
    "max_completion_tokens is 5.5": line_of(request({**BODY, "max_completion_tokens": 5.5})),
    "max_completion_tokens is true": line_of(request({**BODY, "max_completion_tokens": True})),
    "max_tokens is text": line_of(request({**BODY, "max_tokens": "5"})),
    "logprobs is text": line_of(request({**BODY, "logprobs": "5"})),
    "top_logprobs is text": line_of(request({**CHAT, "logprobs": True, "top_logprobs": "5"}, "/v1/chat/completions")),
    "top_logprobs without logprobs": line_of(request({**CHAT, "top_logprobs": 5}, "/v1/chat/completions")),
    "chat logprobs is a number": line_of(request({**CHAT, "logprobs": 5}, "/v1/chat/completions")),
    "ignore_eos is a number": line_of(request({**BODY, "ignore_eos": 1})),
    "n is true": line_of(request({**BODY, "n": True})),
    "seed beyond 64 bits": line_of(request({**BODY, "seed": 2**64})),
    "a prompt in a prompt": line_of(request({**BODY, "prompt": [["a"]]})),
    "an empty prompt among several": line_of(request({**BODY, "prompt": ["a", []]})),
    "a number among prompts": line_of(request({**BODY, "prompt": ["a", 5]})),
    "half a pair among prompts": line_of(request({**BODY, "prompt": ["a", LONE]})),
    "too many prompts": line_of(request({**BODY, "prompt": ["a"] * 2049})),
    "echo is a number": line_of(request({**BODY, "echo": 1})),
    "echo of a chat": line_of(request({**CHAT, "echo": True}, "/v1/chat/completions")),
    "tools of a completion": line_of(request({**BODY, "tools": [{"type": "function"}]})),
    "tools are text": line_of(request({**CHAT, "tools": "f"}, "/v1/chat/completions")),
    "half a pair in a tool": line_of(request({**CHAT, "tools": [{"name": LONE}]}, "/v1/chat/completions")),
    "a tool must be called": line_of(request({**CHAT, "tool_choice": "required"}, "/v1/chat/completions")),
    "a template of its own": line_of(request({**CHAT, "chat_template": "x"}, "/v1/chat/completions")),
    "tokenize in the template's values": line_of(
        request({**CHAT, "chat_template_kwargs": {"tokenize": True}}, "/v1/chat/completions")
    ),
    "add_generation_prompt is text": line_of(request({**CHAT, "add_generation_prompt": "x"}, "/v1/chat/completions")),
    "begun and continued": line_of(
        request({**CHAT, "add_generation_prompt": True, "continue_final_message": True}, "/v1/chat/completions")
    ),
    "stop_token_ids is a text": line_of(request({**BODY, "stop_token_ids": ["5"]})),
    "stop_token_ids is a number": line_of(request({**BODY, "stop_token_ids": 5})),
    "min_tokens beyond max_tokens": line_of(request({**BODY, "min_tokens": 5})),
    "min_tokens is negative": line_of(request({**BODY, "min_tokens": -1})),
    "bad_words is a number": line_of(request({**BODY, "bad_words": 5})),
    "allowed_token_ids is empty": line_of(request({**BODY, "allowed_token_ids": []})),
    "include_stop_str_in_output is text": line_of(request({**BODY, "include_stop_str_in_output": "x"})),
    "tokens and text": line_of(request({**BODY, "prompt": [5, "b"]})),
    "true as a token": line_of(request({**BODY, "prompt": [True]})),
    "model is a number": line_of(request({**BODY, "model": 5})),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_LINES)
def test_what_a_line_holds_is_its_own_error(name: str) -> None:
    assert parsed(BAD_LINES[name]) is not None


@pytest.mark.parametrize("field", [*FIELDS, "method"])
def test_null_is_as_good_as_absent(field: str) -> None:
    for body, url in ((BODY, "/v1/completions"), (CHAT, "/v1/chat/completions")):
        if field == "method":
            assert parsed(line_of(request(body, url, method=None))) is None
        elif field not in ("prompt", "messages"):
            assert parsed(line_of(request({**body, field: None}, url))) is None


def test_a_job_of_nothing_but_bad_lines_among_good_ones(tmp_path: Path) -> None:
    """Every bad line once, between good ones, and once more after the job was stopped half-way; then what failed is
    tried again.
    """
    good = [line_of(request(custom_id=f"good {i}")) for i in range(len(BAD_LINES))]
    lines = [line for pair in zip(good, BAD_LINES.values(), strict=True) for line in pair]
    (tmp_path / "in.jsonl").write_bytes(b"\n".join(lines))
    words = (tmp_path / "in.jsonl", tmp_path / "out", "--input-format", "openai", "--part-rows", 10)
    assert run_here(*words, fail_after=5) == 1
    assert run_here(*words) == 3
    first = answers(tmp_path / "out")
    assert [answer["error"] is None for answer in first] == [True, False] * len(good)
    assert [answer["custom_id"] for answer in first[::2]] == [f"good {i}" for i in range(len(good))]
    assert run_here(*words, "--retry-failed") == 3
    assert answers(tmp_path / "out") == first
    assert all("Traceback" not in answer["error"]["message"] for answer in first[1::2])


def answers(folder: Path) -> list[dict[str, Any]]:
    data = b"".join(path.read_bytes() for path in sorted(folder.glob("part-*.jsonl")))
    return [json.loads(line) for line in split_lines(data.decode())]


def test_a_custom_id_that_was_there_before_is_an_error_of_the_later_line(tmp_path: Path) -> None:
    names = ["a", "b", "a", None, None, "c", "b", "a"]
    (tmp_path / "in.jsonl").write_bytes(b"\n\n".join(line_of(request(custom_id=name)) for name in names))
    assert run_here(tmp_path / "in.jsonl", tmp_path / "out", "--input-format", "openai", "--part-rows", 3) == 3
    codes = [answer["error"] and answer["error"]["code"] for answer in answers(tmp_path / "out")]
    repeated, missing = "duplicate_custom_id", "missing_required_parameter"
    assert codes == [None, None, repeated, missing, missing, None, repeated, repeated]
    told = [answer["error"]["message"] for answer in answers(tmp_path / "out") if answer["error"]]
    assert told[0] == "custom_id 'a' is that of row 0 already" and told[-2] == "custom_id 'b' is that of row 1 already"


def test_chat_requests_without_a_limit_get_the_rest_of_the_context(tmp_path: Path) -> None:
    seen: dict[int, int | None] = {}

    class Watching(FakeLLM):
        def stream(self, items, on_tokens=None):  # type: ignore[no-untyped-def]
            return super().stream(seen.update({item[0]: item[2].max_tokens}) or item for item in items)

    chat = {"messages": [{"role": "user", "content": "hi"}]}
    bodies: list[tuple[dict[str, Any], str]] = [
        (chat, "/v1/chat/completions"),
        ({**chat, "max_tokens": None, "max_completion_tokens": None}, "/v1/chat/completions"),
        ({**chat, "max_tokens": 7}, "/v1/chat/completions"),
        ({"prompt": "hi"}, "/v1/completions"),
        ({"prompt": "hi", "max_tokens": None}, "/v1/completions"),
        ({"prompt": "hi", "max_tokens": 9}, "/v1/completions"),
    ]
    (tmp_path / "in.jsonl").write_bytes(
        b"\n".join(line_of(request(*each, custom_id=str(i))) for i, each in enumerate(bodies))
    )
    words = (tmp_path / "in.jsonl", tmp_path / "out", "--input-format", "openai")
    assert run_here(*words, fake=Watching(max_positions=100)) == 0
    prompt = len("<user>hi")
    assert [seen[i] for i in range(6)] == [100 - prompt, 100 - prompt, 7, 16, 16, 9]
    assert run_here(*words, "--overwrite", "--max-tokens", 5, fake=Watching(max_positions=100)) == 0
    assert [seen[i] for i in range(6)] == [5, 5, 7, 5, 5, 9]


# What nobody thought of

values = st.recursive(
    st.sampled_from(ODD) | st.text(max_size=5) | st.integers() | st.floats(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


@st.composite
def lines(draw: st.DrawFn) -> bytes:
    """A valid request with some of its fields replaced by anything, and now and then some of its bytes."""
    chat = draw(st.booleans())
    body: dict[str, Any] = {
        **(CHAT if chat else BODY),
        **draw(st.dictionaries(st.sampled_from(FIELDS), values, max_size=3)),
    }
    found = request(body, "/v1/chat/completions" if chat else "/v1/completions")
    found.update(draw(st.dictionaries(st.sampled_from(["custom_id", "method", "url", "body"]), values, max_size=1)))
    data = bytearray(line_of(found))
    for position, byte in draw(st.lists(st.tuples(st.integers(0, len(data) - 1), st.integers(0, 255)), max_size=2)):
        data[position] = byte
    return bytes(data)


@settings(max_examples=150, deadline=None)
@given(lines())
def test_any_line_is_a_request_or_a_request_error(line: bytes) -> None:
    parsed(line)


@pytest.mark.slow
@settings(max_examples=3_000, deadline=None)
@given(lines())
def test_any_of_very_many_lines_is_a_request_or_a_request_error(line: bytes) -> None:
    parsed(line)


@pytest.mark.parametrize("field", FIELDS)
def test_every_odd_value_in_every_field(field: str) -> None:
    for value in ODD:
        for body, url in ((BODY, "/v1/completions"), (CHAT, "/v1/chat/completions")):
            parsed(line_of(request({**body, field: value}, url)))


def check_job(folder: Path, data: bytes, form: str, number: int) -> None:
    """Exit 0 or 3, every row there, and resuming and trying again say the same; or a refusal before the job, which
    says why.
    """
    path, out = folder / f"{number}.{'csv' if form == 'csv' else 'jsonl'}", folder / f"out{number}"
    path.write_bytes(data)
    words = (path, out, "--input-format", form, "--part-rows", 3, "--max-tokens", 3, "--gpu-batch-size", 2)
    words = words if form == "openai" else (*words, "--prompt-template", "{prompt}")
    code = run_here(*words, fail_after=4)
    assert code in (0, 1, 2, 3)
    if code == 2:
        return
    code = run_here(*words)
    assert code in (0, 3)
    assert run_here(*words, "--retry-failed") == code


def damaged(data: bytes, chance: random.Random) -> bytes:
    found = bytearray(data)
    for _ in range(chance.choice([1, 1, 2, 5, 20])):
        position = chance.randrange(len(found))
        piece = chance.choice(
            [
                b"\x00",
                b"\xff",
                b"\n",
                b"\r",
                b'"',
                b"\\",
                b"{",
                b"]",
                b",",
                b"\xed\xa0\x80",
                b"\\ud800",
                b"\xe2\x80\xa8",
                b"\xef\xbb\xbf",
            ]
        )
        size = chance.choice([0, 1, len(piece), 7])
        found[position : position + size] = piece
    return bytes(found)


def original(form: str) -> bytes:
    if form == "openai":
        return b"\n".join(
            line_of(request(CHAT if i % 2 else BODY, f"/v1/{'chat/' * (i % 2)}completions", custom_id=f"{i}"))
            for i in range(12)
        )
    if form == "jsonl":
        return b"\n".join(line_of({"id": 2**60 + i, "prompt": f"p{i} ü", "meta": {"a": [i, 1.5]}}) for i in range(12))
    return b"id,prompt,note\r\n" + b"".join(b'%d,"p%d, x\nsecond",n%d\r\n' % (i, i, i) for i in range(12))


@pytest.mark.parametrize("form", ["openai", "jsonl", "csv"])
@settings(max_examples=6, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 2**32))
def test_damaged_files_are_jobs_that_end_and_resume(
    tmp_path_factory: pytest.TempPathFactory, form: str, seed: int
) -> None:
    check_job(tmp_path_factory.mktemp("job"), damaged(original(form), random.Random(seed)), form, seed)


@pytest.mark.slow
@pytest.mark.parametrize("form", ["openai", "jsonl", "csv"])
def test_very_many_damaged_files_are_jobs_that_end_and_resume(tmp_path: Path, form: str) -> None:
    for seed in range(40):
        check_job(tmp_path, damaged(original(form), random.Random(f"{form} {seed}")), form, seed)
