"""A run that is asked to end: what is in flight is finished, nothing else begins, and the engine is as new after
it."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest

from flexbatch import LLM, SamplingParams
from tests.tiny_models import random_prompts

GREEDY = SamplingParams(temperature=0, max_tokens=7, ignore_eos=True)
PROMPTS = random_prompts([5, 19, 33, 8, 21, 40, 3, 17, 26, 11, 9, 14, 7, 30], seed=21)
BLOCK = 4


@pytest.fixture(scope="module", params=["plain", "draft"])
def llm(request, reference, tmp_path_factory) -> Iterator[LLM]:
    settings = {"draft": ("ngram",), "tree": "chain:3"} if request.param == "draft" else {}
    with LLM(
        str(reference("llama").folder),
        percent=(50, 30, 30, 40, 50, 20),
        gpu_batch_size=2,
        num_gpu_batches=2,
        device="cpu",
        gpu_memory="1GiB",
        cpu_memory="1GiB",
        offload_dir=str(tmp_path_factory.mktemp("drain")),
        **settings,
    ) as engine:
        yield engine


@pytest.fixture(scope="module")
def wanted(llm) -> list[list[int]]:
    return [completion.token_ids for completion in llm.generate(PROMPTS, GREEDY)]


def sampled(count: int) -> SamplingParams:
    """Samples of one prompt that end at different times."""
    return SamplingParams(temperature=1.0, n=count, seed=3, max_tokens=7)


@pytest.mark.parametrize("after", [1, 2, 5])
def test_generate_ends_after_what_is_in_flight(llm: LLM, wanted, after: int) -> None:
    done: dict[int, list[int]] = {}
    in_flight: list[int] = []

    def told(index: int, completion) -> None:
        done[index] = completion.token_ids
        if len(done) == after:
            in_flight.append(llm.drain())

    with pytest.raises(KeyboardInterrupt):
        llm.generate(PROMPTS, GREEDY, on_prompt=told)
    # The sequences that end in one pass are told one after another, and none takes their place.
    assert after <= len(done) <= after + BLOCK < len(PROMPTS) and in_flight[0] <= BLOCK
    assert sorted(done) == list(range(len(done))), "what began first is whole: the rest can go on after it"
    assert all(tokens == wanted[index] for index, tokens in done.items())
    assert [completion.token_ids for completion in llm.generate(PROMPTS, GREEDY)] == wanted
    llm._turns.check()


def test_prompts_that_have_begun_get_all_their_samples(llm: LLM) -> None:
    """Three prompts of six samples in a block of four: of the second, some samples have not begun."""
    whole = [[each.token_ids for each in one.samples] for one in llm.generate(PROMPTS[:5], sampled(6))]
    done: dict[int, list[list[int]]] = {}

    def told(index: int, completion) -> None:
        done[index] = [each.token_ids for each in completion.samples]
        llm.drain()

    with pytest.raises(KeyboardInterrupt):
        llm.generate(PROMPTS[:5], sampled(6), on_prompt=told)
    assert 1 <= len(done) < 5 and all(samples == whole[index] for index, samples in done.items())


def test_a_stream_ends_and_leaves_the_rest_of_its_items(llm: LLM, wanted) -> None:
    drawn: list[int] = []

    def items() -> Iterator[tuple[int, list[int], SamplingParams]]:
        for index, prompt in enumerate(PROMPTS * 20):
            drawn.append(index)
            yield index, prompt, GREEDY

    done: dict[int, list[int]] = {}
    for key, completion in llm.stream(items()):
        assert completion.error == "" and key not in done
        done[key] = completion.token_ids
        if len(done) == 3:
            llm.drain()
    assert 3 <= len(done) <= 3 + 2 * BLOCK and len(drawn) < len(PROMPTS) * 20
    assert all(tokens == wanted[key % len(PROMPTS)] for key, tokens in done.items())
    assert [completion.token_ids for completion in llm.generate(PROMPTS, GREEDY)] == wanted


def test_a_stream_that_waits_for_its_source_ends(llm: LLM, wanted) -> None:
    """Nothing is in flight, and the next item comes when the test is over."""
    over = threading.Event()

    def items() -> Iterator[tuple[int, list[int], SamplingParams]]:
        yield 0, PROMPTS[0], GREEDY
        over.wait(60)
        yield 1, PROMPTS[1], GREEDY

    stream = llm.stream(items())
    assert next(stream)[1].token_ids == wanted[0]
    helper = threading.Timer(0.3, llm.drain)
    helper.start()
    assert list(stream) == []
    helper.join()
    over.set()


def test_another_thread_may_ask_and_before_a_call_it_is_for_the_next(llm: LLM, wanted) -> None:
    assert llm.drain() == 0
    with pytest.raises(KeyboardInterrupt):
        llm.generate(PROMPTS, GREEDY, on_prompt=lambda index, completion: pytest.fail("began"))
    assert [completion.token_ids for completion in llm.generate(PROMPTS[:2], GREEDY)] == wanted[:2]
    begun = threading.Event()
    helper = threading.Thread(target=lambda: (begun.wait(60), llm.drain()))
    helper.start()
    done = []
    with pytest.raises(KeyboardInterrupt):
        llm.generate(PROMPTS * 50, GREEDY, on_prompt=lambda index, completion: (done.append(index), begun.set()))
    helper.join()
    assert 0 < len(done) < 50 * len(PROMPTS)


def test_requests_one_by_one_are_let_go(llm: LLM, wanted) -> None:
    ids = [llm.add_request(prompt, GREEDY) for prompt in PROMPTS]
    finished = dict(llm.step())
    llm._loop.drain()
    while llm.has_unfinished():
        finished |= dict(llm.step())
    assert 0 < len(finished) <= BLOCK
    assert all(completion.token_ids == wanted[ids.index(key)] for key, completion in finished.items())
    # That was asked of these requests, and not of those that come after them.
    ids = [llm.add_request(prompt, GREEDY) for prompt in PROMPTS]
    finished = {}
    while llm.has_unfinished():
        finished |= dict(llm.step())
    assert [finished[key].token_ids for key in ids] == wanted


def test_what_is_drained_before_it_comes_is_let_go_and_no_more(llm: LLM, wanted) -> None:
    llm.drain()
    assert llm.step() == []
    llm.add_request(PROMPTS[0], GREEDY)
    assert llm.step() == [] and not llm.has_unfinished()
    assert [completion.token_ids for completion in llm.generate(PROMPTS, GREEDY)] == wanted


def test_requests_that_are_drained_and_given_up_drain_no_others(llm: LLM, wanted) -> None:
    ids = [llm.add_request(prompt, GREEDY) for prompt in PROMPTS[:2]]
    llm.step()
    llm.drain()
    for request_id in ids:
        llm.abort(request_id)
    assert llm.step() == []
    assert [completion.token_ids for completion in llm.generate(PROMPTS, GREEDY)] == wanted
