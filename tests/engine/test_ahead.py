"""Passes that are composed ahead, while the tokens of the one before are not read: every completion is that of passes
one by one, whatever is sampled, wherever it lies, however it ends."""

from __future__ import annotations

import gc
import random
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from flexbatch import LLM, SamplingParams
from flexbatch.config import EngineConfig
from flexbatch.execution import garbage
from flexbatch.execution.passes import Passes
from flexbatch.execution.pipelined import passes_of
from flexbatch.trace import Tracer
from tests.engine.test_stepping_aside import told
from tests.tiny_models import VOCAB, random_prompts

PLACEMENTS: dict[str, dict[str, Any]] = {
    "gpu": {"percent": (100, 0, 100, 0, 100, 0)},
    "mixed": {"percent": (50, 30, 30, 40, 50, 20), "cpu_attention": 0.5},
    "disk": {"percent": (0, 0, 0, 0, 0, 0)},
    "4 bits": {"percent": (100, 0, 40, 60, 100, 0), "cache_bits": 4, "weight_bits": 4},
    "drafts": {"percent": (100, 0, 100, 0, 100, 0), "draft": ("ngram",), "tree": "chain:3"},
}
SLOW, MORE = pytest.mark.slow, ("disk", "drafts", "4 bits")
SETTINGS: dict[str, Any] = {
    "gpu_batch_size": 3, "num_gpu_batches": 2, "prefill_chunk": 16, "prefill_budget": 40,
    "device": "cpu", "dtype": "float32", "hardware": "cpu", "gpu_memory": "1GiB", "cpu_memory": "1GiB",
}  # fmt: skip
KINDS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0, "ignore_eos": True},
    "one token": {"temperature": 0, "max_tokens": 1},
    "scored only": {"temperature": 0, "max_tokens": 0, "prompt_logprobs": 1},
    "stop tokens": {"temperature": 1.0, "seed": 5, "stop_token_ids": list(range(3, 43)), "logprobs": 2},
    "stop strings": {"temperature": 1.0, "seed": 9, "stop": ["a", "zz", "e"], "include_stop_str_in_output": True},
    "min tokens": {"temperature": 1.0, "seed": 2, "min_tokens": 6, "stop_token_ids": list(range(3, VOCAB // 2))},
    "penalties": {"temperature": 0, "repetition_penalty": 1.5, "frequency_penalty": 0.7, "presence_penalty": 0.4},
    "restricted": {"temperature": 0.9, "seed": 3, "top_k": 9, "top_p": 0.8, "min_p": 0.02},
    "bias": {"temperature": 0, "logit_bias": {7: 4.0, 9: 3.9}, "repetition_penalty": 1.3},
    "allowed": {"temperature": 1.0, "seed": 4, "allowed_token_ids": list(range(10, 19)), "n": 2},
    "ngrams": {"temperature": 0, "no_repeat_ngram_size": 2, "allowed_token_ids": list(range(10, 16))},
    "suppressed": {"temperature": 0, "suppress_tokens": list(range(3, 60)), "begin_suppress_tokens": [61]},
    "scored": {"temperature": 0, "prompt_logprobs": 2, "logprobs": 1, "max_tokens": 5},
    "samples": {"temperature": 0.8, "seed": 7, "n": 3},
    "no seed": {"temperature": 1.2},
    "all barred": {"temperature": 0, "allowed_token_ids": [5], "no_repeat_ngram_size": 1, "max_tokens": 6},
}


def requests(kinds: list[str], seed: int = 21) -> tuple[list[list[int]], list[SamplingParams]]:
    """A prompt of each kind, of any length; every third begins like the others of its kind."""
    chance = random.Random(seed)
    shared = [chance.randrange(3, VOCAB) for _ in range(40)]
    prompts = random_prompts([chance.choice([1, 5, 16, 17, 33, 50]) for _ in kinds], seed=seed)
    prompts = [(shared if i % 3 == 0 else []) + prompt for i, prompt in enumerate(prompts)]
    return prompts, [SamplingParams(**{"max_tokens": chance.choice([6, 17, 24]), **KINDS[kind]}) for kind in kinds]


@pytest.fixture(autouse=True)
def turns(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[bool]]:
    """Whether every turn went ahead; everything is checked around each. How fast a busy machine is changes no block."""
    monkeypatch.setattr("flexbatch.loop.EngineLoop.plan_monitor", lambda loop, runner: None)
    turn, seen = Passes.turn, list[bool]()

    def checked(passes: Passes) -> Any:
        passes.check()
        batch = turn(passes)
        passes.check()
        passes.scheduler.check()
        seen.append(passes.flight is not None)
        return batch

    monkeypatch.setattr(Passes, "turn", checked)
    yield seen


def completed(llm: LLM, job: tuple[list[list[int]], list[SamplingParams]], streamed: bool = False) -> list[Any]:
    prompts, params = job
    if not streamed:
        return told(llm.generate(prompts, params))
    texts: dict[Any, list[str]] = {}
    items = ((i, prompt, each) for i, (prompt, each) in enumerate(zip(prompts, params, strict=True)))
    done = dict(llm.stream(items, lambda key, text: texts.setdefault(key, []).append(text)))
    for key, pieces in texts.items():
        assert done[key].error or "".join(pieces) == done[key].text
    return told([done[i] for i in range(len(prompts))])


@pytest.mark.parametrize("placement", [pytest.param(each, marks=SLOW if each in MORE else ()) for each in PLACEMENTS])
def test_completions_are_those_of_passes_one_by_one(placement, reference, tmp_path, turns):
    job = requests([*KINDS, "greedy", "stop tokens", "penalties"])
    found = []
    for ahead in (False, True):
        common = {
            **SETTINGS,
            **PLACEMENTS[placement],
            "async_scheduling": ahead,
            "offload_dir": str(tmp_path / str(ahead)),
        }
        turns.clear()
        with LLM(str(reference("llama").folder), **common) as llm:
            found.append([completed(llm, job, streamed) for streamed in (False, True)])
            llm.runner.check()
            llm.runner.cache.check([])
        assert any(turns) == (ahead and placement != "drafts")
    assert found[0] == found[1]
    assert any(completion[3] for completions in found[0][0] for completion in completions), "nothing was barred"


@pytest.fixture(scope="module")
def pair(reference, tmp_path_factory) -> Iterator[tuple[LLM, LLM]]:
    """Engines that run passes one by one, and ahead, with few pages: sequences step aside."""
    folder = tmp_path_factory.mktemp("pair")
    both = [
        LLM(
            str(reference("opt-tiny").folder),
            **{**SETTINGS, "gpu_memory": "2500KiB", "percent": (60, 40, 50, 50, 100, 0)},
            async_scheduling=ahead,
            offload_dir=str(folder / str(ahead)),
        )
        for ahead in (False, True)
    ]
    with both[0] as serial, both[1] as ahead:
        yield serial, ahead


@settings(max_examples=8, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.lists(st.sampled_from([*KINDS]), min_size=1, max_size=12), st.integers(0, 99), st.booleans())
def test_any_requests_complete_as_in_passes_one_by_one(pair, kinds, seed, streamed):
    job = requests([kind for kind in kinds if kind != "no seed"] or ["greedy"], seed)
    serial, ahead = (completed(llm, job, streamed) for llm in pair)
    assert serial == ahead


def test_as_many_passes_where_only_max_tokens_ends(pair):
    """Who reaches it is known before the token is: slots and pages are free as early as in passes one by one."""
    job = requests(["greedy", "scored only", "one token", "greedy", "penalties"] * 5)
    for params in job[1]:
        params.ignore_eos = True
    counts = []
    for llm in pair:
        before = llm.statistics.passes
        completed(llm, job)
        counts.append(llm.statistics.passes - before)
    assert counts[0] == counts[1]


def test_whoever_ends_by_itself_brings_one_token_more_at_most(pair):
    job = requests(["stop tokens", "stop strings", "greedy"] * 6)
    tokens = []
    for llm in pair:
        count = 0

        def counted(queries: Any, newest: Any = None, build=llm.runner.executor.builder.build) -> Any:
            nonlocal count
            count += sum(query.num_tokens for query in queries)
            return build(queries, newest)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(llm.runner.executor.builder, "build", counted)
            completed(llm, job)
        tokens.append(count)
    assert tokens[0] < tokens[1] <= tokens[0] + len(job[0])


def test_requests_come_and_go_while_a_pass_is_in_flight(pair):
    """Aborted out of a callback, between steps, and added late; nothing of those that went is left."""
    chance = random.Random(4)
    prompts, params = requests(["greedy", "stop tokens", "penalties", "samples", "scored"] * 4)
    alone = [told([pair[0].generate(prompt, each)[0]]) for prompt, each in zip(prompts, params, strict=True)]
    llm, found, gone, left = pair[1], {}, set(), list(range(len(prompts)))

    def on_text(text: str) -> None:
        if chance.random() < 0.1 and (live := [i for i in range(len(prompts)) if i not in (*found, *gone, *left)]):
            victim = chance.choice(live)
            if llm.abort(victim):
                gone.add(victim)

    while left or llm.has_unfinished():
        for _ in range(min(len(left), chance.randint(0, 3))):
            llm.add_request(prompts[left[0]], params[left[0]], left[0], on_text)
            left.pop(0)
        found.update(llm.step())
        llm._intake.check()
    assert gone and found.keys() | gone == set(range(len(prompts)))
    for key, completion in found.items():
        assert told([completion]) == alone[key], key
    llm.runner.cache.check([])


def test_a_failed_or_interrupted_pass_leaves_nothing_behind(pair, monkeypatch):
    job = requests(["greedy", "stop tokens", "penalties"] * 4)
    wanted = completed(pair[0], job)
    for error in (MemoryError("no"), KeyboardInterrupt()):
        calls = 0
        original = Passes.sample

        def failing(passes: Passes, launched: Any, error=error, original=original) -> Any:
            nonlocal calls
            calls += 1
            if calls == 4:
                raise error
            return original(passes, launched)

        with monkeypatch.context() as patch:
            patch.setattr(Passes, "sample", failing)
            with pytest.raises(type(error)):
                pair[1].generate(*job)
        assert completed(pair[1], job) == wanted


def test_tokens_that_only_the_device_knows_need_its_embedding(pair):
    """Where the host looks rows up, as in a table on the disk, it has to know the tokens."""
    tensors = pair[1].weights.tensors
    device, view = torch.device("cuda", 0), tensors.views[-1, "embed.weight"].dense
    assert pair[1].runner.executor.ends.takes_newest
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tensors, "device", device)
        assert tensors.gathers_on_device("embed.weight") == (view.shape[1] * view.element_size() % 16 == 0)
        patch.setattr(tensors, "views", {})
        assert not tensors.gathers_on_device("embed.weight")


@pytest.mark.parametrize("on_one_gpu", [False, True])
@pytest.mark.parametrize("asked", [None, False, True])
@pytest.mark.parametrize("overlap", [False, True])
def test_passes_go_ahead_by_themselves_where_nothing_but_the_host_is_waited_for(overlap, asked, on_one_gpu):
    config = EngineConfig(async_scheduling=asked, overlap=overlap)
    executor: Any = SimpleNamespace(stages=None, on_one_gpu=on_one_gpu)
    scheduler: Any = None
    passes = passes_of(scheduler, executor, Tracer(), config.goes_ahead, None)
    assert isinstance(passes, Passes)
    assert passes.ahead == (overlap and (on_one_gpu if asked is None else asked))


def test_a_job_is_not_held_up_by_collections_of_what_was_there_before_it(pair):
    """Also after a callback that fails; a heap that was frozen before, as that of the tests, stays so."""
    counts: list[int] = []
    job = requests(["greedy"])

    def failing(completion: Any) -> None:
        counts.append(gc.get_freeze_count())
        raise ZeroDivisionError

    gc.unfreeze()
    try:
        pair[0].generate(*job, on_finished=lambda completion: counts.append(gc.get_freeze_count()))
        assert not gc.get_freeze_count()
        with pytest.raises(ZeroDivisionError):
            pair[0].generate(*job, on_finished=failing)
        assert len(counts) == 2 and min(counts) > 1000 and not gc.get_freeze_count()
    finally:
        gc.freeze()
    pair[0].generate(*job)
    assert gc.get_freeze_count()


@pytest.mark.parametrize(
    ("frozen", "called"), [(0, ["freeze", "unfreeze"]), (375, ["freeze", "unfreeze"]), (90_000, [])]
)
def test_what_an_interpreter_freezes_itself_is_no_frozen_heap(frozen, called, monkeypatch):
    """Python 3.12 begins with 375 objects that are."""
    calls: list[str] = []
    stand_in = SimpleNamespace(
        get_freeze_count=lambda: frozen,
        freeze=lambda: calls.append("freeze"),
        unfreeze=lambda: calls.append("unfreeze"),
    )
    monkeypatch.setattr(garbage, "gc", stand_in)
    with garbage.frozen_heap():
        assert calls == called[:1]
    assert calls == called
