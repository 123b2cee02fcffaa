"""Completions and chats of the official client: whole and in chunks they are the same, and what `LLM` gives."""

from __future__ import annotations

import json
from typing import Any

import openai
import pytest

from flexbatch import LLM, SamplingParams
from tests.apps_serve.helpers import Server

CHAT = [{"role": "user", "content": "def f(x):"}]
ROUNDS = [*CHAT, {"role": "assistant", "content": "return x"}, {"role": "user", "content": "class A:"}]
SCHEMA = {"enum": ["red", "dark green", 7, None]}


@pytest.fixture(scope="module")
def llm():
    with LLM("demo", device="cpu", gpu_memory="512MiB", cpu_memory="512MiB", hardware="cpu") as engine:
        yield engine


def joined(chunks: Any) -> dict[int, dict[str, Any]]:
    """Index of a choice -> text, reason and log-probabilities of its chunks; the usage under -1."""
    found: dict[int, dict[str, Any]] = {}
    for chunk in chunks:
        if not chunk.choices:
            found[-1] = {"usage": chunk.usage}
        for choice in chunk.choices:
            one = found.setdefault(choice.index, {"text": "", "finish": None, "logprobs": []})
            assert one["finish"] is None, "something came after the end"
            text = choice.delta.content if hasattr(choice, "delta") else choice.text
            one["text"] += text or ""
            one["finish"] = choice.finish_reason
            if choice.logprobs is not None:
                legacy = getattr(choice.logprobs, "content", None) is None
                one["logprobs"] += (
                    zip(*vars(choice.logprobs).values(), strict=True) if legacy else choice.logprobs.content
                )
    return found


@pytest.mark.parametrize(
    ("messages", "settings"),
    [
        (CHAT, {"temperature": 0, "max_tokens": 9}),
        (ROUNDS, {"temperature": 0.8, "seed": 5, "n": 3, "max_tokens": 8}),
        (ROUNDS, {"temperature": 0.9, "seed": 7, "max_tokens": 30, "logprobs": True, "top_logprobs": 3}),
        (CHAT, {"temperature": 1.5, "seed": 3, "max_tokens": 24, "stop": ["e", "("], "n": 2, "logprobs": True}),
    ],
    ids=["greedy", "n", "logprobs", "stop"],
)
def test_a_chat_is_the_engines_whole_and_in_chunks(messages, settings, server: Server, llm: LLM) -> None:
    client = server.client()
    whole = client.chat.completions.create(model="demo", messages=messages, **settings)
    parts = joined(
        client.chat.completions.create(
            model="demo", messages=messages, stream=True, stream_options={"include_usage": True}, **settings
        )
    )
    own = {name: value for name, value in settings.items() if name not in ("logprobs", "top_logprobs")}
    (wanted,) = llm.chat(messages, SamplingParams(**own))
    samples = wanted.samples or [wanted]
    assert [(choice.message.content, choice.finish_reason) for choice in whole.choices] == [
        (sample.text, sample.finish_reason) for sample in samples
    ]
    assert whole.usage.prompt_tokens == len(wanted.prompt_token_ids)
    assert whole.usage.completion_tokens == sum(len(sample.token_ids) for sample in samples)
    assert parts.pop(-1)["usage"] == whole.usage
    for choice in whole.choices:
        part = parts.pop(choice.index)
        assert (part["text"], part["finish"]) == (choice.message.content, choice.finish_reason)
        scored = choice.logprobs.content if choice.logprobs else []
        assert [(each.token, each.bytes) for each in part["logprobs"]] == [(each.token, each.bytes) for each in scored]
        for here, there in zip(part["logprobs"], scored, strict=True):
            # The second request shares pages with the first, so that its prompt was read in other chunks.
            assert here.logprob == pytest.approx(there.logprob, abs=1e-4)
            assert [each.token for each in here.top_logprobs] == [each.token for each in there.top_logprobs]
    assert not parts


def test_completions_of_several_prompts_with_echo_and_in_chunks(server: Server, llm: LLM) -> None:
    client, settings = server.client(), {"max_tokens": 6, "temperature": 0, "n": 2}
    prompts = ["import os", "class Übung:", "x ="]
    whole = client.completions.create(model="demo", prompt=prompts, echo=True, **settings)
    parts = joined(client.completions.create(model="demo", prompt=prompts, echo=True, stream=True, **settings))
    wanted = [sample.text for each in llm.generate(prompts, SamplingParams(**settings)) for sample in each.samples]
    texts = [prompts[i // 2] + text for i, text in enumerate(wanted)]
    assert [choice.text for choice in whole.choices] == texts
    assert [parts[i]["text"] for i in range(6)] == texts and -1 not in parts
    scored = client.completions.create(model="demo", prompt="import os", max_tokens=4, temperature=0, logprobs=2)
    part = joined(
        client.completions.create(
            model="demo", prompt="import os", max_tokens=4, temperature=0, logprobs=2, stream=True
        )
    )[0]
    assert part["text"] == scored.choices[0].text
    legacy = [tuple(each) for each in zip(*vars(scored.choices[0].logprobs).values(), strict=True)]
    assert [(each[0], each[2]) for each in part["logprobs"]] == [(each[0], each[2]) for each in legacy]


def test_answers_that_follow_a_schema(server: Server) -> None:
    pytest.importorskip("llguidance")
    form = {"type": "json_schema", "json_schema": {"name": "person", "schema": SCHEMA}}
    for seed in range(3):
        answer = server.client().chat.completions.create(
            model="demo", messages=CHAT, response_format=form, temperature=1, seed=seed, max_tokens=60
        )
        assert answer.choices[0].finish_reason == "stop"
        assert json.loads(answer.choices[0].message.content) in SCHEMA["enum"]


def test_requests_without_a_seed_draw_other_answers(server: Server) -> None:
    texts = {
        server.client().completions.create(model="demo", prompt="x", temperature=1.5, max_tokens=12).choices[0].text
        for _ in range(4)
    }
    assert len(texts) > 1


def test_models(server: Server) -> None:
    models = server.client().models
    assert [model.id for model in models.list()] == ["demo"] and models.retrieve("demo").id == "demo"
    for name in ("other", "../demo", "demo/../../etc/passwd"):
        with pytest.raises(openai.NotFoundError):
            models.retrieve(name)


@pytest.mark.parametrize(
    ("settings", "status", "told"),
    [
        ({"model": "gpt-4o"}, 404, "'gpt-4o' does not exist"),
        ({"messages": []}, 400, "no list of messages"),
        ({"temperature": -1}, 400, "temperature"),
        ({"temperature": 1e400}, 400, ""),
        ({"n": 10**30}, 400, "n is"),
        ({"n": 65}, 400, "65 answers, more than the 64"),
        ({"max_tokens": 2**70}, 400, "max_tokens"),
        ({"logit_bias": {"1": 1e309}}, 400, ""),
        ({"top_logprobs": 3}, 400, "logprobs is not true"),
        ({"stop": ["\ud800"]}, 400, "surrogate"),
        ({"stream": "yes"}, 400, "stream must be"),
        ({"stream_options": {"include_usage": True}}, 400, "stream: true"),
        ({"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "nothing"}}}}, 400, "compile"),
        ({"unknown_field": 1}, 400, "'unknown_field' is not supported"),
        ({"messages": [{"role": "user", "content": "x " * 5000}]}, 400, "2048"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_wrong_requests_get_errors_in_openais_form(settings, status, told, server: Server) -> None:
    import httpx

    body = {"model": "demo", "messages": CHAT, **settings}
    data = json.dumps(body).encode() if "\ud800" not in str(settings) else json.dumps(body).encode("ascii")
    found = httpx.post(f"{server.url}/v1/chat/completions", content=data, timeout=60)
    error = found.json()["error"]
    assert (found.status_code, error.keys()) == (status, {"message", "type", "param", "code"}), error
    assert told in error["message"] and "prompt 0" not in error["message"], error
