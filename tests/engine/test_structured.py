"""Answers that follow a form, through the engine: whatever drafts, places and interruptions do, whole ones fit."""

from __future__ import annotations

import json
from functools import cache

import pytest

from flexbatch import LLM, SamplingParams, StructuredOutputsParams
from flexbatch.request import Completion
from flexbatch.text.prompts import PromptError
from tests.public_schemas import PUBLIC

pytest.importorskip("llguidance")
jsonschema = pytest.importorskip("jsonschema")
FEW = ("enum", "pattern", "names", "recursive", "one of", "additional", "sentiment", "grüße", "expression", "tool call",
       "bounded or const, map", "even, named by others")  # fmt: skip
BLOCK = {"device": "cpu", "gpu_batch_size": 8, "num_gpu_batches": 2, "gpu_memory": "1GiB", "cpu_memory": "1GiB"}
PLACEMENTS = {"gpu": (100, 0, 100, 0, 100, 0), "cpu": (0, 100, 0, 100, 0, 100), "disk": (0, 0, 0, 0, 100, 0)}
WAYS = {
    "n-gram": {"draft": "ngram"},
    "tree": {"draft": "demo-draft", "tree": "<2,2,1>"},
    "chain": {"draft": "demo-draft", "tree": "chain:4"},
    "disk": {"percent": PLACEMENTS["disk"]},
    "cpu": {"percent": PLACEMENTS["cpu"], "cpu_attention": 1.0},
    "few pages": {"reserve": "expected", "gpu_batch_size": 4},
}


def form(name: str) -> StructuredOutputsParams:
    return StructuredOutputsParams(json=PUBLIC[name], disable_any_whitespace=True)


def requests(names, tokens: int, **params) -> tuple[list[str], list[SamplingParams]]:
    """Every schema greedily and by chance."""
    prompts = [f"def {name.replace(' ', '_')}(x):  # {i}" for i, name in enumerate(names) for _ in (0, 1)]
    common = {"max_tokens": tokens, **params}
    return prompts, [
        SamplingParams(temperature=temperature, seed=3, structured_outputs=form(name), **common)
        for name in names
        for temperature in (0.0, 1.0)
    ]


def answers(names, tokens: int, settings, **params) -> list[Completion]:
    prompts, wanted = requests(names, tokens, **params)
    with LLM("demo", **{**BLOCK, **settings}) as llm:
        completions = llm.generate(prompts, wanted)
        llm.runner.check()
        llm.planner.encoder.grammars.check()
    for name, completion in zip([name for name in names for _ in (0, 1)], completions, strict=True):
        fits(name, completion)
    return completions


def fits(name: str, completion: Completion) -> None:
    assert completion.finish_reason in ("stop", "length"), completion.error
    if completion.finish_reason == "stop":
        jsonschema.validate(json.loads(completion.text), PUBLIC[name])


plain = cache(lambda names, tokens: answers(names, tokens, {}))


def compare(names, tokens: int, way: str) -> None:
    """What is greedy is equal; what is drawn is, too, where the draft draws with the target's noise."""
    wanted, found = plain(names, tokens), answers(names, tokens, WAYS[way])
    assert [each.token_ids for each in found] == [each.token_ids for each in wanted]
    assert [(each.text, each.finish_reason) for each in found] == [(e.text, e.finish_reason) for e in wanted]


@pytest.mark.parametrize("way", ["n-gram", "tree"])
def test_drafts_change_no_answer(way: str) -> None:
    compare(FEW, 30, way)
    assert sum(each.finish_reason == "stop" for each in plain(FEW, 30)) > len(FEW)


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_every_schema_any_way(way: str) -> None:
    compare(tuple(PUBLIC), 80, way)
    assert sum(each.finish_reason == "stop" for each in plain(tuple(PUBLIC), 80)) > 1.6 * len(PUBLIC)


@pytest.mark.slow
@pytest.mark.parametrize("drawing", ["independent", "without-replacement"])
def test_stochastic_trees_keep_to_the_form(drawing: str) -> None:
    answers(tuple(PUBLIC), 60, {"draft": "demo-draft", "tree": "<2,2>", "draft_sampling": drawing})


def test_a_form_in_one_call() -> None:
    """Errors before anything runs, log-probabilities, samples, whitespace, penalties and stop strings."""
    with LLM("demo", **BLOCK) as llm:
        with pytest.raises(PromptError, match=r"prompt 1: structured_outputs: the regex does not compile: .*unclosed"):
            llm.generate(["a", "b"], [None, SamplingParams(structured_outputs={"regex": "("})])
        assert llm.statistics.passes == 0
        bad = SamplingParams(structured_outputs={"json": {"type": "object", "minProperties": -1, "not": {}}})
        good = SamplingParams(max_tokens=20, temperature=0, structured_outputs={"choice": ["yes", "no"]})
        found = dict(llm.stream([("bad", "a", bad), ("good", "a", good)]))
        assert "the json does not compile" in found["bad"].error and found["good"].text in ("yes", "no")
        choice = StructuredOutputsParams(choice=["true", "false", "größer als"])
        drawn = llm.generate(
            "x = ",
            SamplingParams(
                max_tokens=30, n=12, seed=2, logprobs=1, frequency_penalty=1.0, structured_outputs=choice, top_p=0.9
            ),
        )[0]
        assert {each.text for each in drawn.outputs} <= {*choice.choice} and len(
            {each.text for each in drawn.outputs}
        ) > 1
        for each in drawn.outputs:
            assert each.finish_reason == "stop" and len(each.logprobs) == len(each.token_ids)
            assert any(min(step) != min(each.token_ids) for step in each.logprobs), (
                "those of the model, before the mask"
            )
        stopped = llm.generate("x", SamplingParams(max_tokens=9, stop="a", structured_outputs={"regex": "(za){9}"}))[0]
        assert (stopped.text, stopped.stop_reason) == ("z", "a")
        told = []
        llm.add_request("y", good, on_text=told.append)
        while llm.has_unfinished():
            llm.step()
        assert "".join(told) in ("yes", "no")
        dead = llm.generate("x", SamplingParams(max_tokens=9, structured_outputs={"regex": "z"}, bad_words=["z"]))[0]
        assert "structured_outputs: the form of the answer, and other constraints, leave no token" in dead.error


@pytest.mark.slow
@pytest.mark.parametrize("part", range(5))
def test_smollm2_extracts(part: int) -> None:
    """A real instruct model over all schemas, as chats, in parts that a slow machine gets through. All of a part are in
    one pass, most of which expands weights of 4 bits on the processor. `benchmark.structured_answers` goes on where it
    was stopped."""
    with LLM("smollm2", **{**BLOCK, "gpu_batch_size": 80, "num_gpu_batches": 1, "gpu_memory": "3GiB"}) as llm:
        names = list(PUBLIC)[part::5]
        chats = [[{"role": "user", "content": f"Make up an example of JSON: {name}"}] for name in names for _ in (0, 1)]
        _, params = requests(names, 96)
        completions = llm.generate(chats, params)
        for name, completion in zip([name for name in names for _ in (0, 1)], completions, strict=True):
            fits(name, completion)
        assert sum(each.finish_reason == "stop" for each in completions) > len(names)
