"""Requests added one by one and run pass by pass: they come and go at any time, and the tokens are those of
`generate`."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from flexbatch import LLM, SamplingParams
from flexbatch.execution.turns import Turns
from flexbatch.loop import EngineLoop
from flexbatch.text.prompts import PromptError
from flexbatch.validation.errors import ConfigurationError, EngineBusyError
from tests.tiny_models import random_prompts

GREEDY = SamplingParams(temperature=0, max_tokens=7, ignore_eos=True)
PLACEMENTS = {"gpu": (100, 0, 100, 0, 100, 0), "mixed": (50, 30, 30, 40, 50, 20)}
PROMPTS = random_prompts([5, 19, 33, 8, 21, 40, 3, 17, 26, 11, 9], seed=21)


@pytest.fixture(scope="module", params=["gpu", "mixed", "draft"])
def llm(request, reference, tmp_path_factory) -> Iterator[LLM]:
    settings = {"draft": ("ngram",), "tree": "chain:3"} if request.param == "draft" else {}
    with LLM(
        str(reference("llama").folder),
        percent=PLACEMENTS.get(request.param, PLACEMENTS["mixed"]),
        gpu_batch_size=2,
        num_gpu_batches=2,
        device="cpu",
        gpu_memory="1GiB",
        cpu_memory="1GiB",
        offload_dir=str(tmp_path_factory.mktemp("step")),
        **settings,
    ) as engine:
        yield engine


@pytest.fixture(scope="module")
def wanted(llm) -> list[list[int]]:
    return [completion.token_ids for completion in llm.generate(PROMPTS, GREEDY)]


def finish(llm: LLM) -> dict[object, list[int]]:
    """Step until nothing is left; every owner is checked after every step."""
    found = {}
    while llm.has_unfinished():
        found |= {key: completion.token_ids for key, completion in llm.step()}
        check(llm)
    return found


def check(llm: LLM) -> None:
    llm._intake.check()
    llm._turns.check()
    llm.tiers.check()
    if llm._loop.scheduler is not None:
        llm._loop.scheduler.check()
    else:
        llm.runner.check()
        llm.runner.cache.check([])


def test_requests_may_come_between_any_two_passes(llm, wanted):
    """More than the block holds; the queue is empty for a while, which is not the end."""
    found, keys = {}, []
    for prompt in PROMPTS[:6]:
        keys.append(llm.add_request(prompt, GREEDY))
        found |= {key: completion.token_ids for key, completion in llm.step()}
        check(llm)
    found |= finish(llm)
    assert not llm.has_unfinished() and llm.step() == []
    keys += [llm.add_request(prompt, GREEDY) for prompt in PROMPTS[6:]]
    found |= finish(llm)
    assert [found[key] for key in keys] == wanted


def test_ids_are_the_callers_and_samples_come_together(llm):
    params = SamplingParams(temperature=0.8, max_tokens=5, seed=3, n=3, ignore_eos=True)
    assert llm.add_request(PROMPTS[0], params, request_id=("mine", 1)) == ("mine", 1)
    with pytest.raises(ConfigurationError, match=r"'mine', 1.*has not finished"):
        llm.add_request(PROMPTS[1], GREEDY, request_id=("mine", 1))
    done = []
    while llm.has_unfinished():
        done += llm.step()
    ((key, completion),) = done
    (same,) = llm.generate(PROMPTS[:1], params)
    assert key == ("mine", 1) and [s.token_ids for s in completion.samples] == [s.token_ids for s in same.samples]
    llm.add_request(PROMPTS[1], GREEDY, request_id=("mine", 1))
    assert llm.abort(("mine", 1)) and not llm.has_unfinished()


def test_ids_that_nobody_gave_are_not_those_that_somebody_gave(llm, wanted):
    """Whichever numbers the caller uses, and whichever come next."""
    following = llm.add_request(PROMPTS[0], GREEDY)
    assert llm.abort(following)
    given = [following + 1, following + 3, following + 4, "2"]
    keys = [llm.add_request(PROMPTS[i], GREEDY, request_id=key) for i, key in enumerate(given)]
    keys += [llm.add_request(PROMPTS[i], GREEDY) for i in range(len(given), 9)]
    assert len(set(keys)) == 9 and finish(llm) == {key: wanted[i] for i, key in enumerate(keys)}


@pytest.mark.parametrize("key", [["a"], {"a": 1}, ("a", ["b"])], ids=str)
def test_an_id_that_can_be_none_is_refused_by_name(key, llm):
    for call in (lambda: llm.add_request(PROMPTS[0], GREEDY, request_id=key), lambda: llm.abort(key)):
        with pytest.raises(ConfigurationError, match=r"request_id .* without a hash.*one request"):
            call()
    assert not llm.has_unfinished()


@pytest.mark.parametrize("after", [0, 1, 3])
def test_an_aborted_request_frees_its_pages_and_touches_nobody(after, llm, wanted):
    """Waiting ones and running ones, one with several samples among them."""
    keys = [llm.add_request(prompt, GREEDY) for prompt in PROMPTS]
    several = llm.add_request(PROMPTS[0], SamplingParams(temperature=1, n=3, max_tokens=9, ignore_eos=True))
    found = {}
    for _ in range(after):
        found |= {key: completion.token_ids for key, completion in llm.step()}
    gone = [keys[0], keys[3], keys[-1], several]
    assert [llm.abort(key) for key in gone] == [key not in found for key in gone] and not llm.abort("nobody")
    check(llm)
    found |= finish(llm)
    assert found.keys() == set(keys) - set(gone) | (found.keys() & set(gone))
    assert all(found[key] == wanted[i] for i, key in enumerate(keys) if key in found)


def test_text_comes_while_it_grows_and_callbacks_may_add_and_abort(llm, wanted):
    heard: dict[int, list[str]] = {0: [], 1: []}

    def on_text(text: str) -> None:
        heard[0].append(text)
        if len(heard[0]) == 2:
            llm.add_request(PROMPTS[1], GREEDY, request_id="second", on_text=heard[1].append)
            assert llm.abort("third")
            for call in (lambda: llm.generate(PROMPTS[:1], GREEDY), llm.step, llm.close):
                with pytest.raises(EngineBusyError):
                    call()

    llm.add_request(PROMPTS[0], GREEDY, request_id="first", on_text=on_text)
    llm.add_request(PROMPTS[2], SamplingParams(temperature=0, max_tokens=60, ignore_eos=True), request_id="third")
    texts, tokens = {}, {}
    while llm.has_unfinished():
        for key, completion in llm.step():
            texts[key], tokens[key] = completion.text, completion.token_ids
        check(llm)
    assert tokens == {"first": wanted[0], "second": wanted[1]}
    assert ["".join(heard[0]), "".join(heard[1])] == [texts["first"], texts["second"]] and len(heard[0]) > 2


def test_the_more_urgent_take_the_slots_of_others_and_nobody_gets_other_tokens(llm, wanted):
    """More of the others than the block holds, in flight and waiting."""
    keys = [llm.add_request(prompt, GREEDY, priority=1) for prompt in PROMPTS[:8]]
    found, ended = {}, []
    for _ in range(2):
        ended += llm.step()
    urgent = [llm.add_request(prompt, GREEDY) for prompt in PROMPTS[8:]]
    passes = llm.statistics.passes
    while llm.has_unfinished():
        ended += llm.step()
        check(llm)
        if not set(urgent) - {key for key, _ in ended}:
            passes, urgent = llm.statistics.passes - passes, []
    found = {key: completion.token_ids for key, completion in ended}
    assert [found[key] for key in keys] == wanted[:8] and passes < 25, "they waited for those in flight"
    assert sorted(found[key] for key in found.keys() - set(keys)) == sorted(wanted[8:])


def test_every_sample_is_shown_after_every_pass(llm):
    params = SamplingParams(temperature=0.9, max_tokens=6, seed=5, n=3, ignore_eos=True, logprobs=2)
    seen: dict[int, list[int]] = {}

    def on_pass(sequence) -> None:
        assert len(sequence.logprobs) == sequence.num_output_tokens
        seen.setdefault(sequence.request.sample, []).append(sequence.num_output_tokens)

    llm.add_request(PROMPTS[0], params, on_pass=on_pass, source="mine")
    finish(llm)
    assert seen.keys() == {0, 1, 2} and all(sorted(set(each))[-1] == 6 and len(each) > 2 for each in seen.values())


def test_calls_that_need_the_whole_block_wait_for_no_leftovers(llm, wanted):
    llm.add_request(PROMPTS[0], GREEDY, request_id="left")
    llm.step()
    for call in (lambda: llm.generate(PROMPTS[:1], GREEDY), lambda: next(llm.stream([(0, PROMPTS[0], GREEDY)]))):
        with pytest.raises(EngineBusyError, match=r"1 requests of add_request are not finished.*abort"):
            call()
    llm.report()
    assert finish(llm) == {"left": wanted[0]}
    stream = llm.stream((i, prompt, GREEDY) for i, prompt in enumerate(PROMPTS))
    next(stream)
    for call in (lambda: llm.add_request(PROMPTS[0]), lambda: llm.abort(0), llm.step):
        with pytest.raises(EngineBusyError, match="while a stream of this LLM is open"):
            call()
    stream.close()
    assert [completion.token_ids for completion in llm.generate(PROMPTS, GREEDY)] == wanted


def test_requests_come_from_many_threads(llm, wanted):
    keys: dict[object, int] = {}
    lock = threading.Lock()

    def add(numbers: range) -> None:
        for number in numbers:
            key = llm.add_request(PROMPTS[number], GREEDY)
            with lock:
                keys[key] = number

    threads = [threading.Thread(target=add, args=(range(k, len(PROMPTS), 3),)) for k in range(3)]
    for thread in threads:
        thread.start()
    found = {}
    while llm.has_unfinished() or any(thread.is_alive() for thread in threads):
        found |= {key: completion.token_ids for key, completion in llm.step()}
    assert {keys[key]: tokens for key, tokens in found.items()} == dict(enumerate(wanted))


def test_a_request_does_not_wait_for_the_pass_of_another_thread(llm, wanted, monkeypatch):
    """Nor is it in the way of one: passes take seconds where a model is read from the disk. What gives one up gets in
    before the next pass, whoever else is waiting."""
    begun, added = threading.Event(), threading.Event()
    advance = EngineLoop.advance

    def held(loop, complete):
        begun.set()
        assert added.wait(60), "the request waits for the pass that waits for it"
        return advance(loop, complete)

    llm.add_request(PROMPTS[0], GREEDY, request_id="first")
    with monkeypatch.context() as patch, ThreadPoolExecutor(1) as pool:
        patch.setattr(EngineLoop, "advance", held)
        step = pool.submit(llm.step)
        assert begun.wait(60)
        with pytest.raises(ConfigurationError, match="has not finished"):
            llm.add_request(PROMPTS[1], GREEDY, request_id="first")
        with pytest.raises(PromptError):
            llm.add_request([-1], GREEDY, request_id="second")
        assert llm.add_request(PROMPTS[1], GREEDY, request_id="second") == "second"
        added.set()
        step.result()
    assert finish(llm) == {"first": wanted[0], "second": wanted[1]}


def test_whoever_waits_for_a_pass_is_next():
    """A thread that runs pass after pass lets one that waits in between two of them, although it is awake first."""
    turns, order = Turns(), []

    def run(begun: threading.Event, wait: threading.Event) -> None:
        with turns.step():
            begun.set()
            assert wait.wait(60)
        with turns.step():
            order.append("pass")

    def abort() -> None:
        with turns.change("abort"):
            order.append("abort")

    with ThreadPoolExecutor(2) as pool:
        for _ in range(100):
            begun, end = threading.Event(), threading.Event()
            running = pool.submit(run, begun, end)
            assert begun.wait(60)
            waiting = pool.submit(abort)
            while not turns._entrance.locked():
                time.sleep(1e-4)
            end.set()
            running.result()
            waiting.result()
    assert order == ["abort", "pass"] * 100
    turns.check()


def test_requests_come_and_go_from_threads_while_passes_run(llm, wanted):
    """Each thread adds its own and gives up every third of them, while another thread runs pass after pass."""
    found, stop = {}, threading.Event()

    def run() -> None:
        while not stop.is_set() or llm.has_unfinished():
            found.update((key, completion.token_ids) for key, completion in llm.step())

    def ask(thread: int) -> set[object]:
        keys = {llm.add_request(PROMPTS[i], GREEDY, request_id=(thread, i)) for i in range(len(PROMPTS))}
        return {(thread, i) for i in range(0, len(PROMPTS), 3) if llm.abort((thread, i))} & keys

    with ThreadPoolExecutor(4) as pool:
        running = pool.submit(run)
        given_up = [pool.submit(ask, thread) for thread in range(3)]
        gone = set().union(*(each.result() for each in given_up))
        stop.set()
        running.result()
    assert {(thread, i) for thread in range(3) for i in range(len(PROMPTS))} - gone == found.keys()
    assert all(tokens == wanted[i] for (_, i), tokens in found.items())
    check(llm)


def test_a_failing_pass_ends_the_requests_and_the_next_ones_work(llm, wanted, monkeypatch):
    llm.add_request(PROMPTS[0], GREEDY, request_id="lost")
    llm.step()
    with monkeypatch.context() as patch:
        patch.setattr(llm.runner.executor, "run", lambda batch: (_ for _ in ()).throw(RuntimeError("broken link")))
        with pytest.raises(RuntimeError, match="broken link"):
            llm.step()
    assert not llm.has_unfinished() and not llm.abort("lost")
    key = llm.add_request(PROMPTS[1], GREEDY, request_id="lost")
    assert finish(llm) == {key: wanted[1]}


def test_a_slow_source_holds_up_nothing(llm, wanted):
    """The second item comes when the first is answered, and not before: whoever waits for it first waits for ever."""
    answered = threading.Event()

    def source():
        yield 0, PROMPTS[0], GREEDY
        assert answered.wait(60), "the first item was not run"
        yield 1, PROMPTS[1], GREEDY

    found = {}
    for key, completion in llm.stream(source()):
        found[key] = completion.token_ids
        answered.set()
    assert found == {0: wanted[0], 1: wanted[1]}


def test_a_stream_begins_with_what_is_there(llm, wanted):
    """And goes on with what comes while it runs, in the same block."""
    begun = threading.Event()

    def source():
        yield from ((i, prompt, GREEDY) for i, prompt in enumerate(PROMPTS[:3]))
        assert begun.wait(60), "no pass was run"
        yield from ((i, prompt, GREEDY) for i, prompt in enumerate(PROMPTS[3:], 3))

    found = dict(llm.stream(source(), lambda key, text: begun.set()))
    assert [found[i].token_ids for i in range(len(PROMPTS))] == wanted


def test_a_source_that_never_answers_does_not_hold_up_close(llm, wanted):
    release = threading.Event()

    def source():
        yield 0, PROMPTS[0], GREEDY
        release.wait(60)

    stream = llm.stream(source())
    assert next(stream)[1].token_ids == wanted[0]
    started = time.monotonic()
    stream.close()
    assert time.monotonic() - started < 30 and not release.is_set()
    release.set()
    assert [completion.token_ids for completion in llm.generate(PROMPTS[:2], GREEDY)] == wanted[:2]


def test_the_key_of_an_item_is_the_callers_whatever_it_is(llm, wanted):
    """Also None, twice the same, and what has no hash."""
    keys = [None, None, [1], "a"]
    found = [
        (key, completion.token_ids) for key, completion in llm.stream(zip(keys, PROMPTS[:4], [GREEDY] * 4, strict=True))
    ]
    assert sorted(found, key=str) == sorted(zip(keys, wanted[:4], strict=True), key=str)
