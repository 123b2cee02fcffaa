"""The forms that a prompt may have, alone, in lists and in streams; what is none of them is refused by name."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from flexbatch.execution.requests import Defaults, requests_of
from flexbatch.execution.waiting import WaitingLine
from flexbatch.intake import Intake
from flexbatch.models.generation_config import GenerationDefaults
from flexbatch.request import SamplingParams
from flexbatch.text.prompts import PromptEncoder, PromptError
from flexbatch.validation.errors import ConfigurationError

USER = {"role": "user", "content": "hi"}
PARAMS = SamplingParams(max_tokens=2)
GENERATION = GenerationDefaults()
DEFAULTS = Defaults(GENERATION)
FORMS = {
    "text": ("stop here", "stop here"),
    "ids": ([5, 6], [5, 6]),
    "tuple": ((5, 6), [5, 6]),
    "array": (np.array([5, 6]), [5, 6]),
    "tensor": (torch.tensor([5, 6]), [5, 6]),
    "list of scalars": ([np.int64(5), torch.tensor(6)], [5, 6]),
    "text object": ({"prompt": "stop here"}, "stop here"),
    "ids object": ({"prompt_token_ids": [5, 6]}, [5, 6]),
    "ids object with an array": ({"prompt_token_ids": np.array([5, 6])}, [5, 6]),
    "ids object with its text": ({"prompt_token_ids": [5, 6], "prompt": "whatever"}, [5, 6]),
    "object with null extras": ({"prompt": "stop here", "multi_modal_data": None}, "stop here"),
    "object with empty extras": ({"prompt": "stop here", "mm_processor_kwargs": {}}, "stop here"),
    "ids in a text object": ({"prompt": [5, 6]}, [5, 6]),
    "chat in a text object": ({"prompt": [USER]}, [USER]),
    "chat": ([USER], [USER]),
    "one message": (USER, [USER]),
}


@pytest.fixture
def encoder(tokenizer) -> PromptEncoder:
    return PromptEncoder(tokenizer, max_context=100, vocab_size=400)


def streamed(items, encoder):
    intake = Intake(encoder, GENERATION, None, 0, SimpleNamespace(number=lambda lora: 0), WaitingLine())
    refused = [intake.add_item(index, item, None) for index, item in enumerate(items)]
    intake.check()
    return intake.ahead(None), [each for each in refused if each is not None]


@pytest.mark.parametrize("name", FORMS)
def test_every_form_alone_in_a_list_and_in_a_stream(encoder, name: str) -> None:
    prompt, plain = FORMS[name]
    wanted = encoder.encode(0, plain)
    assert type(wanted) is list and all(type(token) is int for token in wanted)
    single = name == "one message"  # a list of messages is one chat
    for prompts in (prompt, [prompt, "x"] if single else [prompt, prompt], iter([prompt]), (prompt, "x")):
        requests = requests_of(prompts, PARAMS, encoder, DEFAULTS)
        assert requests[0].prompt_token_ids == wanted and type(requests[0].prompt_token_ids) is list
    assert (
        len(requests_of([prompt, prompt], PARAMS, encoder, DEFAULTS)) == 2 - single
        and len(requests_of(prompt, PARAMS, encoder, DEFAULTS)) == 1
    )
    (request,), failed = streamed([("key", prompt, PARAMS)], encoder)
    assert request.prompt_token_ids == wanted and not failed
    chat = isinstance(plain, list) and isinstance(plain[0], dict)
    known = plain if isinstance(plain, str) else encoder.read(0, plain).text if chat else None
    assert request.prompt == ("whatever" if "its text" in name else known) and (not chat or "user" in request.prompt)


def test_forms_mix_in_a_list_and_a_two_dimensional_array_is_several_prompts(encoder) -> None:
    prompts = [form for form, _ in FORMS.values()]
    assert [request.prompt_token_ids for request in requests_of(prompts, PARAMS, encoder, DEFAULTS)] == [
        encoder.encode(0, plain) for _, plain in FORMS.values()
    ]
    rows = requests_of(np.array([[5, 6], [7, 8]]), PARAMS, encoder, DEFAULTS)
    assert [request.prompt_token_ids for request in rows] == [
        [5, 6],
        [7, 8],
    ]
    assert requests_of([], PARAMS, encoder, DEFAULTS) == []
    assert (
        len(requests_of([USER, USER], PARAMS, encoder, DEFAULTS)) == 1
        and len(requests_of([USER, {"prompt": "x"}], PARAMS, encoder, DEFAULTS)) == 2
    )


BAD = [
    ({"prompt_tokens": [5]}, "is an object with 'prompt_tokens'"),
    ({}, "is an object with nothing"),
    ({"text": "x", "id": 4}, "is an object with 'text', 'id'"),
    ({"content": "x"}, "is an object with 'content'"),
    ({"prompt": None}, "is an object with 'prompt'"),
    ({"prompt": "x", "multi_modal_data": {"image": 1}}, "has 'multi_modal_data' beside its 'prompt'"),
    ({"prompt_token_ids": [5], "cache_salt": "s"}, "has 'cache_salt' beside its 'prompt_token_ids'"),
    ({"prompt_token_ids": "56"}, "prompt_token_ids is a str"),
    ({"prompt_token_ids": 5}, "prompt_token_ids is a int"),
    ({"prompt_token_ids": []}, "is empty"),
    ({"prompt_token_ids": ["a"]}, "element 0 is 'a'"),
    ({"prompt": 5}, "is a int"),
    ({"prompt": {"prompt": "x"}}, "prompt is an object with 'prompt'"),
    ({"prompt": "x", **USER}, "has 'role', 'content' beside its 'prompt'"),
    ({"prompt_embeds": [[0.5]]}, "is an object with 'prompt_embeds'"),
    ({"role": "user"}, 'message 0 needs "role"'),
    ([USER, {"content": "x"}], 'message 1 needs "role"'),
    ({5, 6}, "is a set"),
    (5, "is a int"),
    (None, "is a NoneType"),
    (2.5, "is a float"),
    (b"ab", "is a bytes"),
    (object, "is a type"),
    ("a\ud800b", "half of a surrogate pair"),
    ({"prompt": "\udfff"}, "half of a surrogate pair"),
    ([{"role": "user", "content": "a\udc00"}], "half of a surrogate pair"),
    ([{"role": "user", "content": [{"type": "text", "text": "a\ud800"}]}], "half of a surrogate pair"),
]


@pytest.mark.parametrize(("prompt", "problem"), BAD, ids=range(len(BAD)))
def test_what_is_no_prompt_is_refused_by_name(encoder, prompt, problem: str) -> None:
    with pytest.raises(ConfigurationError, match=problem):
        requests_of(prompt, PARAMS, encoder, DEFAULTS)
    with pytest.raises(PromptError, match=f"^prompt 1: .*{problem}"):
        requests_of(["fine", prompt], PARAMS, encoder, DEFAULTS)
    requests, ((key, completion),) = streamed([("a", "fine", PARAMS), ("b", prompt, PARAMS)], encoder)
    assert len(requests) == 1 and key == "b" and problem in completion.error and completion.prompt_token_ids == []


def test_an_item_of_a_stream_that_is_none_is_refused_by_name(encoder) -> None:
    for item in ("text", ("a", "b"), {"prompt": "x"}):
        with pytest.raises(ConfigurationError, match="item 0 of the stream is"):
            streamed([item], encoder)


any_text = st.text(st.characters(codec=None), max_size=3)
names = st.sampled_from(["prompt", "prompt_token_ids", "role", "content", "x"])
values = st.recursive(
    st.none() | st.booleans() | st.integers(-2, 500) | st.floats() | any_text | st.binary(max_size=2),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(names, inner, max_size=3),
    max_leaves=6,
)


@settings(suppress_health_check=list(HealthCheck), deadline=None, max_examples=200)
@given(values)
def test_any_value_is_run_as_a_prompt_or_refused(encoder, value) -> None:
    try:
        requests = requests_of(value, PARAMS, encoder, DEFAULTS)
    except ConfigurationError:
        requests = []
    assert all(type(request.prompt_token_ids) is list and request.prompt_token_ids for request in requests)
    requests, failed = streamed([(0, value, PARAMS)], encoder)
    assert len(requests) + len(failed) == 1
