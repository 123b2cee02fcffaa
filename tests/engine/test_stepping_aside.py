"""Sequences that step aside in the middle of a job: the tokens are those of a run in which all was reserved, on every
tier, with a quantized cache, drafts, seeds, log-probabilities, samples, shared prefixes and stop strings."""

from __future__ import annotations

import dataclasses
import itertools
import random
from collections.abc import Iterator
from typing import Any

import pytest

from flexbatch import LLM, SamplingParams
from flexbatch.execution.resize import resize
from flexbatch.execution.runner import open_runner
from flexbatch.execution.scheduler import Scheduler
from flexbatch.loop import EngineLoop
from flexbatch.planner import capacity
from flexbatch.planner.planner import Planner
from flexbatch.validation.errors import ConfigurationError
from tests.execution.test_answer_lengths import ended
from tests.tiny_models import VOCAB, random_prompts

PLACEMENTS: dict[str, dict[str, Any]] = {
    "gpu": {"percent": (100, 0, 100, 0, 100, 0)},
    "mixed": {"percent": (50, 30, 30, 40, 50, 20), "cpu_attention": 0.5},
    "disk": {"percent": (100, 0, 0, 0, 100, 0), "num_gpu_batches": 1},
    "drafts": {"percent": (50, 50, 50, 50, 100, 0), "draft": ("ngram",), "tree": "chain:3"},
    "4 bits": {"percent": (100, 0, 40, 30, 100, 0), "cache_bits": 4},
    "4 bits gpu": {"percent": (100, 0, 100, 0, 100, 0), "cache_bits": 4},
}
SLOW = ("disk", "4 bits", "mixed", "4 bits gpu", "drafts")
"""Where pages run out, 6 to 20 s of processor time: the test of forced steps covers these tiers by default."""
SETTINGS: dict[str, Any] = {
    "gpu_batch_size": 6, "num_gpu_batches": 2, "prefill_chunk": 16, "prefill_budget": 24,
    "device": "cpu", "dtype": "float32", "hardware": "cpu",
}  # fmt: skip


def requests() -> tuple[list[list[int]], list[SamplingParams]]:
    """Two prompts of a kind share their beginning; half of the answers go on to the end."""
    chance = random.Random(11)
    shared = [chance.randrange(3, VOCAB) for _ in range(40)]
    prompts = random_prompts([5, 19, 33, 8, 21, 50, 3, 17, 26, 11, 9, 30, 2, 44], seed=21)
    prompts = [(shared if i % 3 == 0 else []) + prompt for i, prompt in enumerate(prompts)]
    kinds: list[dict[str, Any]] = [
        {"temperature": 0, "ignore_eos": True},
        {"temperature": 1.0, "seed": 5, "logprobs": 2, "stop_token_ids": list(range(100, 103))},
        {"temperature": 0.8, "seed": 7, "n": 2, "ignore_eos": True, "repetition_penalty": 1.2},
        {"temperature": 0, "prompt_logprobs": 1, "max_tokens": 20},
        {"temperature": 1.0, "seed": 9, "stop": ["a", "zz"], "min_tokens": 4},
        {"temperature": 0, "max_tokens": 0, "prompt_logprobs": 1},
    ]
    return prompts, [SamplingParams(**{"max_tokens": 45, **kinds[i % len(kinds)]}) for i in range(len(prompts))]


def told(completions: Any) -> list[Any]:
    def one(completion: Any) -> Any:
        scores = [
            [
                None if placement is None else {token: entry.rank for token, entry in placement.items()}
                for placement in placements or []
            ]
            for placements in (completion.logprobs, completion.prompt_logprobs)
        ]
        return completion.token_ids, completion.text, completion.finish_reason, completion.error, scores

    return [[one(each) for each in completion.samples or [completion]] for completion in completions]


@pytest.fixture
def forced(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Any sequence may be told to step aside before any pass; everything is checked after each."""
    chance, times, next_pass = random.Random(3), [], Scheduler.next_pass

    def disturbed(scheduler: Scheduler) -> Any:
        if scheduler.lengths.learns and len(scheduler.running) > 1 and chance.random() < 0.3:
            sequence = chance.choice(list(scheduler.running.values()))
            scheduler.step_aside(sequence, in_place=not scheduler.aside.recomputes or chance.random() < 0.2)
            times.append(sequence.num_cached)
            scheduler.check()
            if not scheduler.running:
                scheduler.admit()
        batch = next_pass(scheduler)
        scheduler.check()
        return batch

    monkeypatch.setattr(Scheduler, "next_pass", disturbed)
    yield times


def teach(llm: LLM, length: int = 3) -> None:
    """Short answers were seen: far too little is reserved."""
    lengths = llm._loop.lengths
    for i in range(60):
        lengths.observe(ended(i, length))
    lengths.stale = 100
    lengths.update([])
    llm._loop.lengths.next_comparison = 10**9


@pytest.mark.parametrize(
    "placement",
    [
        pytest.param(placement, marks=[pytest.mark.slow] if placement in ("disk", "4 bits gpu") else [])
        for placement in PLACEMENTS
    ],
)
def test_tokens_are_those_of_a_run_that_reserves_all(placement, reference, tmp_path, forced):
    folder, job, settings = str(reference("llama").folder), requests(), {**SETTINGS, **PLACEMENTS[placement]}
    roomy = {"gpu_memory": "1GiB", "cpu_memory": "1GiB"}
    with LLM(folder, **settings, **roomy, reserve="all", offload_dir=str(tmp_path / "all")) as llm:
        wanted = told(llm.generate(*job))
        assert llm.report()["preemptions"]["total"] == 0
    assert not forced
    with LLM(folder, **settings, **roomy, offload_dir=str(tmp_path / "expected")) as llm:
        teach(llm)
        assert told(llm.generate(*job)) == wanted
        counts = llm.report()["preemptions"]
        assert len(forced) > 10 and counts["total"] > 10
        assert counts["dropped"] or settings.get("cache_bits") == 4
        if llm.speculator is not None:
            llm.speculator.check()
        found = dict(llm.stream((i, *item) for i, item in enumerate(zip(*job, strict=True))))
        assert told(found[i] for i in range(len(wanted))) == wanted
        llm.tiers.check()


@pytest.mark.parametrize(
    "placement",
    [pytest.param(placement, marks=[pytest.mark.slow] if placement in SLOW else []) for placement in PLACEMENTS],
)
def test_a_cache_that_is_too_small_for_all_gives_the_same_tokens(placement, reference, tmp_path):
    """Pages for a third of what twelve may reach: sequences step aside because they have to, and the budgets hold."""
    folder, settings = str(reference("llama").folder), {**SETTINGS, **PLACEMENTS[placement]}
    prompts, params = requests()
    # They might end early, for all that is known, and do not.
    job = (
        prompts,
        [
            dataclasses.replace(each, max_tokens=4 * (each.max_tokens or 0), stop="~~~~~~~~", ignore_eos=True)
            for each in params
        ],
    )
    roomy = {"gpu_memory": "1GiB", "cpu_memory": "1GiB"}
    with LLM(folder, **settings, **roomy, reserve="all", offload_dir=str(tmp_path / "all")) as llm:
        wanted, rows = told(llm.generate(*job)), llm.report()["memory"]
    needs = {tier: sum(row["num_bytes"] for row in rows if row["tier"] == tier) for tier in ("gpu", "cpu")}
    for row in rows:
        if row["what"] == "cache" and row["tier"] in needs:
            needs[row["tier"]] -= 6 * row["num_bytes"] // 10
    # A quantized cache that lies on the GPU needs pages to move to.
    short = {"gpu_memory": needs["gpu"], "cpu_memory": max(needs["cpu"], 1 << 20)}
    with LLM(folder, **settings, **short, offload_dir=str(tmp_path / "expected")) as llm:
        teach(llm)
        assert told(llm.generate(*job)) == wanted
        report = llm.report()
        assert all(report["peak_bytes"][tier] <= report["budgets"][tier] for tier in ("gpu", "cpu"))
        # Where a part of the cache is on the disk, which has memory for all, nobody has to.
        if settings["percent"][2] + settings["percent"][3] == 100:
            assert report["preemptions"]["total"] > 0, report["memory"]
        if settings.get("cache_bits") == 4:
            assert not report["preemptions"]["recomputed_tokens"]
        llm.runner.check()
        llm.runner.cache.check([])


def test_requests_come_and_go_while_others_are_aside(reference, tmp_path, forced):
    """With step(): some are given up while they run or are aside, their pages are free, and nobody else sees it."""
    folder, (prompts, params) = str(reference("llama").folder), requests()
    settings = {**SETTINGS, **PLACEMENTS["mixed"], "gpu_memory": "1GiB", "cpu_memory": "1GiB"}
    with LLM(folder, **settings, offload_dir=str(tmp_path)) as llm:
        llm._loop.lengths.reserve = "all"
        wanted = told(llm.generate(prompts, params))
        llm._loop.lengths.reserve = "expected"
        teach(llm)
        keys = [llm.add_request(prompt, each) for prompt, each in zip(prompts, params, strict=True)]
        found, chance, gone = {}, random.Random(2), set()
        while llm.has_unfinished():
            found |= dict(llm.step())
            scheduler = llm._loop.scheduler
            if scheduler is not None:
                scheduler.check()
                # Ids that nobody gave are the numbers of the requests.
                aside = [each.request.index for each in scheduler.aside.sequences]
                if aside and chance.random() < 0.1 and len(gone) < 4:
                    gone.add(given_up := chance.choice(aside))
                    assert llm.abort(given_up)
                    scheduler.check()
                    assert given_up not in {each.request.index for each in scheduler.aside.sequences}
        assert gone and not gone & found.keys() and gone | found.keys() == set(keys)
        assert len(forced) > 10
        for i, key in enumerate(keys):
            if key in found:
                assert told([found[key]]) == [wanted[i]]


def test_a_run_that_is_to_end_finishes_those_that_are_aside_too(reference, tmp_path, forced):
    """They have begun: the rest of a job would have to read and generate them once more."""
    folder, (prompts, params) = str(reference("llama").folder), requests()
    settings = {**SETTINGS, **PLACEMENTS["mixed"], "gpu_batch_size": 2, "gpu_memory": "1GiB", "cpu_memory": "1GiB"}
    with LLM(folder, **settings, offload_dir=str(tmp_path)) as llm:
        teach(llm)
        keys = [llm.add_request(prompt, each) for prompt, each in zip(prompts, params, strict=True)]
        found: dict[Any, Any] = {}
        while not ((scheduler := llm._loop.scheduler) is not None and scheduler.aside.sequences):
            found |= dict(llm.step())
        aside = {each.request.index for each in scheduler.aside.sequences}
        begun = {each.request.index for each in scheduler.started} | found.keys()
        assert llm.drain() == len(scheduler.started)
        while llm.has_unfinished():
            found |= dict(llm.step())
        assert aside and begun == found.keys() < set(keys)
        assert all(completion.error == "" for completion in found.values())


@pytest.mark.slow  # 20 s of processor time
def test_a_block_grows_with_what_is_learned_and_sources_are_told_apart(reference, tmp_path):
    """Memory for a few that reach max_tokens; most end far earlier. The sequences in flight go on in the larger block,
    with the same tokens."""
    folder, chance = str(reference("llama").folder), random.Random(3)
    prompts = random_prompts([chance.randint(3, 40) for _ in range(60)], seed=21)
    stops = list(range(100, 104))
    params = [SamplingParams(temperature=1.0, seed=i, max_tokens=200, stop_token_ids=stops) for i in range(60)]
    items = [(i, prompt, each, f"source {i % 2}") for i, (prompt, each) in enumerate(zip(prompts, params, strict=True))]
    settings = {"device": "cpu", "dtype": "float32", "hardware": "cpu", "gpu_memory": "3600KiB", "cpu_memory": "2MiB"}
    with LLM(folder, **settings, reserve="all", offload_dir=str(tmp_path / "all")) as llm:
        wanted = told(llm.generate(prompts, params))
        assert not any("answers" in reason for reason in llm._loop.replans) and not llm.report()["answer_lengths"]
    with LLM(folder, **settings, offload_dir=str(tmp_path / "expected")) as llm:
        assert told(llm.generate(prompts, params)) == wanted
        (reason,) = [reason for reason in llm._loop.replans if "answers" in reason]
        before, after = reason.rsplit("block ", 1)[1].split(" -> ")
        assert int(after) > int(before) and llm.report()["preemptions"]["dropped"] > 0
        peaks, budgets = llm.report()["peak_bytes"], llm.report()["budgets"]
        assert all(peaks[tier] <= budgets[tier] for tier in ("gpu", "cpu"))
        found = dict(llm.stream(items))
        assert told(found[i] for i in range(60)) == wanted
        seen = llm.report()["answer_lengths"]
        assert {name: each["answers"] for name, each in seen.items()} == {"": 60, "source 0": 30, "source 1": 30}
        with pytest.raises(ConfigurationError, match="source that has a hash"):
            list(llm.stream([(0, prompts[0], params[0], ["no hash"])]))


@pytest.fixture(params=["made anew", "has room"])
def replanned(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Blocks are replaced after every answer that was seen, by turns by larger ones and by smaller ones that do not
    take all that was in flight. With room for the largest it is the one block that grows, or becomes smaller where what
    runs in it allows that."""
    sizes, chosen, advance = itertools.cycle([1, 6, 2, 5, 1, 3]), [], EngineLoop.advance
    most, made, resized = 6 if request.param == "has room" else 0, [], []

    def adopt(planner: Planner, job: Any, pass_seconds: float, held: Any = None) -> Any:
        chosen.append(next(sizes))
        plan = planner.engine_plan
        policy = dataclasses.replace(plan.policy, gpu_batch_size=chosen[-1])
        planner._engine_plan = dataclasses.replace(plan, policy=policy, most=most)
        return planner._engine_plan

    def opened(*arguments: Any, **options: Any) -> Any:
        made.append(1)
        return open_runner(*arguments, **options)

    def watched(scheduler: Scheduler, policy: Any) -> None:
        resized.append(policy.gpu_batch_size)
        resize(scheduler, policy)
        scheduler.check()

    def advanced(loop: EngineLoop, complete: bool) -> Any:
        if loop.lengths.learns:
            loop.lengths.next_comparison = min(loop.lengths.next_comparison, loop.lengths.num_seen + 1)
        finished = advance(loop, complete)
        assert finished or loop.running, "nothing runs, and nobody is told that requests are left"
        return finished

    monkeypatch.setattr(Planner, "adopt_lengths", adopt)
    monkeypatch.setattr(EngineLoop, "advance", advanced)
    monkeypatch.setattr(capacity, "open_runner", opened)
    monkeypatch.setattr(capacity, "resize", watched)
    yield chosen
    assert bool(resized) == bool(most) and (len(made) < len(chosen) / 2 or not most), (made, resized, chosen)


def stepped(llm: LLM) -> dict[Any, Any]:
    found: dict[Any, Any] = {}
    while llm.has_unfinished():
        found |= dict(llm.step())
    return found


def test_what_a_smaller_block_does_not_take_waits_for_its_turn(reference, tmp_path, replanned):
    """Sequences that a block has left wait in the next one, and in the one after that: those that were still waiting
    when it was replaced were lost, and a job waited for them forever."""
    folder, (prompts, params) = str(reference("llama").folder), requests()
    roomy = {**SETTINGS, **PLACEMENTS["gpu"], "gpu_memory": "1GiB", "cpu_memory": "1GiB", "offload_dir": str(tmp_path)}
    with LLM(folder, **roomy, reserve="all") as llm:
        wanted = told(llm.generate(prompts, params))
    with LLM(folder, **roomy) as llm:
        assert told(llm.generate(prompts, params)) == wanted and len(replanned) >= 3
        job = llm.report()["job"]
        assert job["measured_passes"] == llm.statistics.passes >= job["replanned_passes"] / 2
        assert job["measured_answer_tokens"] == llm.statistics.generated_tokens / llm.statistics.requests
        assert "passes, re-planned" in str(llm.report())
        found = dict(llm.stream((i, *item) for i, item in enumerate(zip(prompts, params, strict=True))))
        assert told(found[i] for i in range(len(prompts))) == wanted

        def waiting() -> list[Any]:
            scheduler = llm._loop.scheduler
            return [] if scheduler is None else list(scheduler.waiting)

        # One that waits in the next block is given up; of two samples both go.
        keys = [llm.add_request(prompt, each) for prompt, each in zip(prompts, params, strict=True)]
        found = {}
        while not any(each.num_output_tokens for each in waiting()):
            found |= dict(llm.step())
        given_up = waiting()[-1].request.index
        assert llm.abort(given_up) and given_up not in {each.request.index for each in waiting()}
        found |= stepped(llm)
        assert set(keys) - found.keys() == {given_up}
        assert all(told([found[key]]) == [wanted[i]] for i, key in enumerate(keys) if key in found)

        # A run that is to end finishes what has begun in another block, too.
        keys = [llm.add_request(prompt, each) for prompt, each in zip(prompts, params, strict=True)]
        found = {}
        while not any(each.num_output_tokens for each in waiting()):
            found |= dict(llm.step())
        begun = {each.request.index for each in waiting() if each.num_output_tokens}
        llm.drain()
        found |= stepped(llm)
        assert begun <= found.keys() < set(keys)
        llm.tiers.check()
