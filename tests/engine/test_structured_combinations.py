"""Answers that follow a form, with everything that may be asked of them in one block, whatever happens to it.

One block holds requests of all kinds at once; each way to run them, and to disturb them, gives the answers of the plain
one.
"""

from __future__ import annotations

import random
from functools import cache
from typing import Any

import pytest

from flexbatch import LLM, SamplingParams, StructuredOutputsParams
from flexbatch.execution.scheduler import Scheduler
from flexbatch.request import Completion
from tests.engine.test_structured import BLOCK, PLACEMENTS, fits, form

pytest.importorskip("llguidance")
pytest.importorskip("jsonschema")
KINDS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0},
    "seed": {"seed": 5},
    "samples": {"n": 3, "seed": 7},
    "penalties": {"repetition_penalty": 1.3, "presence_penalty": 0.4, "frequency_penalty": 0.6, "seed": 1},
    "log-probabilities": {"logprobs": 2, "temperature": 0.0},
    "samples with log-probabilities": {"logprobs": 0, "n": 2, "seed": 2, "prompt_logprobs": 1},
    "restricted": {"top_k": 20, "top_p": 0.9, "min_p": 0.01, "temperature": 1.3, "seed": 4},
    "bias": {"logit_bias": {20: 4.0, 300: -3.0}, "seed": 3},
    "constraints": {"bad_words": ["tru", "7"], "no_repeat_ngram_size": 9, "min_tokens": 3, "seed": 6},
    "stop": {"stop": ["e"], "seed": 8},
}
NAMES = ("sentiment", "recursive", "enum", "even, named by others")
OTHERS = (
    StructuredOutputsParams(choice=["true", "false", "größer als"]),
    StructuredOutputsParams(regex="[a-f]{3,9}(-[0-9]{2}){2}"),
    StructuredOutputsParams(grammar='start: "<" word ("," word)* ">"\nword: /[a-z]{1,3}/'),
    None,
)
"""Beside them in the block: other kinds of forms, and an answer without one."""
PREFIX = "def shared(prefix, of, some, pages):\n    return [prefix, of, some, pages]\n\n"
DISK = {"percent": PLACEMENTS["disk"]}
WAYS: dict[str, tuple[dict[str, Any], bool]] = {
    "aside": ({}, True),
    "tree, aside": ({"draft": "demo-draft", "tree": "<2,2,1>"}, True),
    "tree": ({"draft": "demo-draft", "tree": "<3,1>"}, False),
    "n-grams, aside": ({"draft": "ngram"}, True),
    "cpu, aside": ({"percent": PLACEMENTS["cpu"], "cpu_attention": 1.0}, True),
    "cpu, half of it computed there": ({"percent": PLACEMENTS["cpu"], "cpu_attention": 0.5}, False),
    "disk": (DISK, False),
    "disk, tree": ({**DISK, "draft": "demo-draft", "tree": "<2,1>"}, False),
    "chunks of prompts": ({"prefill_chunk": 16, "prefill_budget": 48}, True),
    "one by one": ({"overlap": False, "gpu_batch_size": 3, "num_gpu_batches": 1}, False),
    "passes ahead": ({"async_scheduling": True}, False),
    "few pages": ({"reserve": "expected", "gpu_batch_size": 24, "gpu_memory": "34MiB"}, False),
}
"""Settings, and whether any sequence steps aside at any pass."""


def disturb(monkeypatch: pytest.MonkeyPatch, stays: float = 0.3) -> list[int]:
    """Let any sequence step aside before every second pass, some of them with their pages where they are; returns
    whom."""
    next_pass, chance, noted = Scheduler.next_pass, random.Random(0), []

    def disturbed(scheduler: Scheduler) -> Any:
        if len(scheduler.running) > 1 and chance.random() < 0.5:
            sequence = chance.choice(list(scheduler.running.values()))
            scheduler.step_aside(sequence, in_place=chance.random() < stays)
            scheduler.check()
            noted.append(sequence.sequence_id)
        return next_pass(scheduler)

    monkeypatch.setattr(Scheduler, "next_pass", disturbed)
    return noted


def run(settings: dict[str, Any], tokens: int = 24) -> list[Completion]:
    forms = [*map(form, NAMES), *OTHERS]
    prompts = [f"{PREFIX}# {kind} {index}" for kind in KINDS for index in range(len(forms))]
    common = {"max_tokens": tokens, "temperature": 1.0}
    wanted = [
        SamplingParams(**{**common, **params, "structured_outputs": each})
        for params in KINDS.values()
        for each in forms
    ]
    with LLM("demo", **{**BLOCK, **settings}) as llm:
        found = llm.generate(prompts, wanted)
        llm.runner.check()
    return found


plain = cache(lambda: run({}))


def told(completion: Completion) -> list[Any]:
    """All of an answer, to compare; log-probabilities to five digits."""
    samples = completion.samples or [completion]
    return [
        (each.token_ids, each.text, each.finish_reason, each.stop_reason, each.error,
         [{token: round(entry.logprob, 4) for token, entry in step.items()} for step in each.logprobs or ()])
        for each in samples
    ]  # fmt: skip


def compare(found: list[Completion], wanted: list[Completion]) -> None:
    for index, (one, other) in enumerate(zip(found, wanted, strict=True)):
        for (*mine, logprobs), (*theirs, expected) in zip(told(one), told(other), strict=True):
            assert mine == theirs, index
            assert [step.keys() for step in logprobs] == [step.keys() for step in expected]
            for step, right in zip(logprobs, expected, strict=True):
                assert all(abs(step[token] - right[token]) < 2e-3 for token in right)


@pytest.mark.parametrize(
    "way", [pytest.param(way, marks=() if way == "tree, aside" else pytest.mark.slow) for way in WAYS]
)
def test_what_is_asked_for_and_what_happens_change_no_answer(way: str, monkeypatch) -> None:
    settings, disturbed = WAYS[way]
    wanted = plain()
    noted = disturb(monkeypatch) if disturbed else None
    compare(run(settings), wanted)
    assert noted is None or len(noted) > 10


def test_the_plain_answers_are_worth_comparing() -> None:
    """They fit their forms, differ from each other, end in all ways, and are as many as were asked for."""
    found, width = plain(), len(NAMES) + len(OTHERS)
    for row, (kind, params) in enumerate(KINDS.items()):
        for name, completion in zip(NAMES, found[row * width :], strict=False):
            for sample in completion.samples or [completion]:
                if kind == "stop":
                    continue
                assert sample.finish_reason != "error" or kind == "constraints", sample.error
                if sample.finish_reason != "error":
                    fits(name, sample)
        assert all(len(each.samples or [each]) == params.get("n", 1) for each in found[row * width : (row + 1) * width])
    reasons = [each.finish_reason for completion in found for each in completion.samples or [completion]]
    assert {"stop", "length"} <= set(reasons) and reasons.count("stop") > len(reasons) / 2
    choices = {each.text for row in range(len(KINDS)) for each in found[row * width + len(NAMES)].samples or ()}
    assert len(choices) > 1


@pytest.mark.slow
@pytest.mark.parametrize("bits", [8, 4])
def test_a_quantized_cache_is_moved_and_gives_the_same(bits: int, monkeypatch) -> None:
    wanted = run({"cache_bits": bits})
    noted = disturb(monkeypatch, stays=1.0)
    compare(run({"cache_bits": bits}), wanted)
    assert len(noted) > 10
