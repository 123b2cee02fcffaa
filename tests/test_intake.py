"""Prompts and parameters become requests, samples one completion for each prompt; an item that fails fails alone."""

from __future__ import annotations

import pytest

from flexbatch import LLM, SamplingParams
from flexbatch.execution.requests import Defaults, requests_of
from flexbatch.models.generation_config import GenerationDefaults
from flexbatch.text.prompts import PromptEncoder, PromptError
from flexbatch.validation.errors import ConfigurationError
from tests.tiny_models import VOCAB, make_model, make_tokenizer

PROMPTS = [[5, 6, 7], [8, 9], [10, 11, 12, 13]]
DEFAULTS = Defaults(GenerationDefaults())


@pytest.fixture(scope="module")
def encoder() -> PromptEncoder:
    return PromptEncoder(make_tokenizer(), max_context=20, vocab_size=VOCAB)


@pytest.fixture(scope="module")
def llm(tmp_path_factory):
    folder = tmp_path_factory.mktemp("intake")
    make_model("llama-single", folder)
    settings = {"gpu_batch_size": 3, "num_gpu_batches": 1, "gpu_memory": "256MiB", "cpu_memory": "256MiB"}
    with LLM(str(folder), device="cpu", percent=(100, 0, 100, 0, 100, 0), **settings) as llm:
        yield llm


def test_one_parameter_set_is_for_all_prompts(encoder: PromptEncoder) -> None:
    requests = requests_of(PROMPTS, SamplingParams(max_tokens=4), encoder, DEFAULTS, first_index=7)
    assert [(request.index, request.sample, request.prompt_token_ids) for request in requests] == [
        (7, 0, PROMPTS[0]),
        (8, 0, PROMPTS[1]),
        (9, 0, PROMPTS[2]),
    ]
    assert {request.params.max_tokens for request in requests} == {4}


def test_each_prompt_has_its_parameters_and_its_samples(encoder: PromptEncoder) -> None:
    """None means the model's own defaults; without ``max_tokens`` a request may fill the context."""
    params = [SamplingParams(n=3, max_tokens=2), None, SamplingParams(max_tokens=None)]
    requests = requests_of(PROMPTS, params, encoder, DEFAULTS)
    assert [(request.index, request.sample) for request in requests] == [(0, 0), (0, 1), (0, 2), (1, 0), (2, 0)]
    assert requests[3].params == DEFAULTS.instead_of(None).within(encoder.context_left(PROMPTS[1]))
    assert requests[4].params.max_tokens == encoder.context_left(PROMPTS[2]) > 2


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ([SamplingParams()] * 2, "2 sampling parameters for 3 prompts; give one, or one each"),
        ([SamplingParams(), 3, None], r"sampling_params\[1\] is 3, a int"),
        ({"max_tokens": 3}, r"a dict; give SamplingParams\(\*\*settings\)"),
    ],
)
def test_parameters_that_do_not_belong_to_the_prompts_are_refused(encoder: PromptEncoder, params, message) -> None:
    with pytest.raises(ConfigurationError, match=message):
        requests_of(PROMPTS, params, encoder, DEFAULTS)


def test_a_job_with_a_prompt_that_cannot_run_is_refused_before_it_starts(encoder: PromptEncoder) -> None:
    with pytest.raises(PromptError, match="prompt 1"):
        requests_of([PROMPTS[0], list(range(3, 60)), [0.5]], SamplingParams(), encoder, DEFAULTS)


def test_samples_of_a_prompt_are_put_together(llm: LLM) -> None:
    """They run beside those of other prompts and end in any order."""
    params = [SamplingParams(n=n, max_tokens=6, temperature=1.0, seed=n, ignore_eos=True) for n in (4, 1, 2)]
    completions = llm.generate(PROMPTS, params)
    assert [len(completion.samples) for completion in completions] == [4, 0, 2]
    assert [completion.prompt_token_ids for completion in completions] == PROMPTS
    assert completions[0].token_ids == completions[0].samples[0].token_ids
    assert len({tuple(sample.token_ids) for sample in completions[0].samples}) == 4, "each draws for itself"
    (alone,) = llm.generate([PROMPTS[0]], params[0])
    assert [sample.token_ids for sample in alone.samples] == [sample.token_ids for sample in completions[0].samples], (
        "what a sample draws does not depend on who runs beside it"
    )


def test_an_item_of_a_stream_that_cannot_run_fails_alone(llm: LLM) -> None:
    params = SamplingParams(max_tokens=3, temperature=0, ignore_eos=True)
    items = [
        ("good", PROMPTS[0], params),
        ("empty", [], params),
        ("outside", [VOCAB + 5], params),
        ("also good", PROMPTS[1], params),
        ("not parameters", PROMPTS[2], 7),
    ]
    found = dict(llm.stream(iter(items)))
    assert found.keys() == {key for key, _, _ in items}
    assert {key for key, completion in found.items() if completion.error} == {"empty", "outside", "not parameters"}
    assert all(found[key].finish_reason == "error" and not found[key].token_ids for key in ("empty", "outside"))
    expected = llm.generate(PROMPTS[:2], params)
    assert [found[key].token_ids for key in ("good", "also good")] == [each.token_ids for each in expected]


def test_an_item_of_another_form_is_a_mistake_of_the_caller(llm: LLM) -> None:
    with pytest.raises(ConfigurationError, match=r"an item is \(key, prompt, SamplingParams\)"):
        list(llm.stream(["no tuple"]))
