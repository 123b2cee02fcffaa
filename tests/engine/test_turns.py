"""One engine, used from threads, from callbacks, beside an open stream, and after its end: right tokens, or an error
that says what to do."""

from __future__ import annotations

import contextlib
import functools
import inspect
import os
import random
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from flexbatch import LLM, SamplingParams
from flexbatch.cli.settings import read_settings
from flexbatch.config import EngineConfig
from flexbatch.execution.observer import RunObserver
from flexbatch.validation.errors import ConfigurationError, EngineBusyError, EngineClosedError
from tests.grids import grid
from tests.tiny_models import make_model, random_prompts

PROMPTS = random_prompts([3, 20, 41, 9, 33, 12, 5, 28, 17, 6], seed=9)
GREEDY = SamplingParams(max_tokens=4, temperature=0, ignore_eos=True)
OPEN, OWN = "while a stream of this LLM is open", "by what this LLM is running"
SETTINGS = {"device": "cpu", "gpu_memory": "1GiB", "cpu_memory": "1GiB", "gpu_batch_size": 2, "num_gpu_batches": 1}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("turns") / "model"
    make_model("llama", folder)
    return folder


BOTH = pytest.mark.parametrize("llm", ["plain", "draft"], indirect=True)


@pytest.fixture(scope="module")
def engines(model, tmp_path_factory):
    """kind -> engine: what one test does to it may not be seen by the next."""
    with contextlib.ExitStack() as stack:
        settings = {"plain": {}, "draft": {"draft": str(model), "tree": "chain:2"}}
        yield functools.cache(
            lambda kind: stack.enter_context(engine(model, tmp_path_factory.mktemp(kind), **settings[kind]))
        )


@pytest.fixture
def llm(request, engines):
    """Without speculation, unless a test wants both; a new one after a test that failed."""
    failed, llm = request.session.testsfailed, engines(getattr(request, "param", "plain"))
    yield llm
    if request.session.testsfailed > failed:
        engines.cache_clear()
    llm._turns.check()


def engine(model, folder, **settings):
    return LLM(str(model), offload_dir=str(folder), percent=(40, 30, 30, 30, 50, 20), **SETTINGS, **settings)


@pytest.fixture(scope="module")
def wanted(model, tmp_path_factory):
    with engine(model, tmp_path_factory.mktemp("alone")) as llm:
        return [completion.token_ids for completion in llm.generate(PROMPTS, GREEDY)]


def tokens(llm, prompts=PROMPTS, **options):
    return [completion.token_ids for completion in llm.generate(prompts, GREEDY, **options)]


def items(indices=range(10)):
    return ((i, PROMPTS[i], GREEDY) for i in indices)


def check(llm, wanted):
    """The engine is as good as new: nothing of what ended is in the cache."""
    assert tokens(llm) == wanted
    llm.runner.check()
    llm.runner.cache.check([])
    llm.tiers.check()
    llm._turns.check()


@BOTH
@pytest.mark.parametrize("calls", [24, pytest.param(240, marks=pytest.mark.slow)])
def test_threads_take_turns(calls, llm, wanted):
    """Eight of them, and every answer is right."""

    def call(number: int):
        chosen = [number % 10, (3 * number + 1) % 10]
        return tokens(llm, [PROMPTS[i] for i in chosen]) == [wanted[i] for i in chosen]

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(call, range(calls))) == [True] * calls
    check(llm, wanted)


CALLS = {
    "generate": lambda llm: llm.generate(PROMPTS[:1], GREEDY),
    "prepare": lambda llm: llm.prepare(PROMPTS[:1], GREEDY),
    "stream": lambda llm: list(llm.stream(items())),
}


@pytest.mark.parametrize(("call", "thread"), grid(CALLS, [False, True]))
def test_a_call_beside_an_open_stream_is_refused_and_the_stream_goes_on(call, thread, llm, wanted):
    found = {}
    for key, completion in llm.stream(items()):
        found[key] = completion.token_ids
        with ThreadPoolExecutor(1) as pool, pytest.raises(EngineBusyError, match=f"{call} was called {OPEN}.*close"):
            pool.submit(CALLS[call], llm).result() if thread else CALLS[call](llm)
        llm.report()
    assert [found[i] for i in range(len(PROMPTS))] == wanted
    check(llm, wanted)


def test_streams_one_after_another(llm, wanted):
    """A stream has its turn from the first item that is asked for."""
    first, second = llm.stream(items()), llm.stream(items())
    assert tokens(llm) == wanted
    for stream in (second, first):
        assert dict(stream).keys() == set(range(len(PROMPTS)))
    check(llm, wanted)


@pytest.mark.parametrize(
    ("end", "llm"),
    grid(["break", "close", "error", "another thread", "forgotten"], ["plain", "draft"]),
    indirect=["llm"],
)
def test_a_stream_that_is_left_half_way(end, llm, wanted):
    stream = llm.stream(items())
    next(stream)
    if end == "break":
        for _ in stream:
            break
        stream.close()
    elif end == "close":
        stream.close()
        assert list(stream) == []
    elif end == "error":
        with pytest.raises(ZeroDivisionError) as caught:
            for _ in stream:
                raise ZeroDivisionError
        with pytest.raises(EngineBusyError, match=OPEN):
            tokens(llm)
        stream.close()
        assert caught.value
    elif end == "another thread":
        thread = threading.Thread(target=stream.close)
        thread.start()
        thread.join()
    del stream
    check(llm, wanted)


@pytest.mark.parametrize(("call", "placement"), grid([*CALLS, "close"], ["on_tokens", "items", "on_finished"]))
def test_a_call_out_of_a_run_is_refused_there(call, placement, llm, wanted):
    """It is an error of the callback, as any other that a callback raises: it ends the run, and the next call works."""

    def act(*arguments):
        (llm.close if call == "close" else lambda: CALLS[call](llm))()

    def acting():
        yield from items(range(4))
        act()

    with pytest.raises(EngineBusyError, match=f"{call} was called {OWN}"):
        if placement == "on_finished":
            llm.generate(PROMPTS, GREEDY, on_finished=act)
        else:
            list(llm.stream(acting() if placement == "items" else items(), act if placement == "on_tokens" else None))
    check(llm, wanted)


@pytest.mark.parametrize("call", CALLS)
def test_a_callback_may_go_on_after_a_refusal(call, llm, wanted):
    refused, found = [], {}

    def act(key, text):
        with pytest.raises(EngineBusyError):
            CALLS[call](llm)
        refused.append(key)

    for key, completion in llm.stream(items(), act):
        found[key] = completion.token_ids
    assert [found[i] for i in range(len(PROMPTS))] == wanted and len(refused) > len(PROMPTS)


@pytest.mark.parametrize(
    ("placement", "error"),
    grid(
        ["on_tokens", "items at once", "items later", "on_finished", "reader"],
        [KeyError("mine"), KeyboardInterrupt(), MemoryError()],
    ),
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_an_error_of_the_caller_comes_back_as_it_is(placement, error, llm, wanted):
    """While it is in hand the next call works."""

    def fail(*arguments):
        raise error

    def failing(count):
        yield from items(range(count))
        raise error

    with pytest.raises(type(error)) as caught:
        if placement == "on_finished":
            # Of several lengths, so that others are in flight when the first has finished.
            params = [SamplingParams(max_tokens=2 + 3 * (i % 2), ignore_eos=True) for i in range(len(PROMPTS))]
            llm.generate(PROMPTS, params, on_finished=fail)
        elif placement == "reader":
            stream = llm.stream(items())
            try:
                for _ in stream:
                    fail()
            finally:
                stream.close()
        else:
            source = items() if placement == "on_tokens" else failing(0 if placement == "items at once" else 9)
            list(llm.stream(source, fail if placement == "on_tokens" else None))
    assert caught.value is error
    check(llm, wanted)


@BOTH
@pytest.mark.parametrize("steps", [25, pytest.param(500, marks=pytest.mark.slow)])
def test_any_order_of_calls(steps, llm, wanted):
    """Streams are opened, read and left, and calls made beside them: what is not refused is right."""
    chance = random.Random(7)
    streams, opened = [], None
    for _ in range(steps):
        action = chance.choice(["open", "next", "next", "next", "close", "forget", "generate", "report"])
        if action == "open":
            streams.append(llm.stream(items(chance.sample(range(10), chance.randint(0, 6)))))
        elif action == "report":
            llm.report()
        elif action == "generate":
            try:
                assert tokens(llm) == wanted and opened is None
            except EngineBusyError:
                assert opened is not None
        elif streams:
            stream = chance.choice(streams)
            if action == "next":
                try:
                    key, completion = next(stream)
                    assert opened in (None, stream) and completion.token_ids == wanted[key]
                    opened = stream
                except EngineBusyError:
                    assert opened not in (None, stream)
                    streams.remove(stream)
                except StopIteration:
                    streams.remove(stream)
                    opened = None if opened is stream else opened
            else:
                streams.remove(stream)
                opened = None if opened is stream else opened
                if action == "close":
                    stream.close()
                del stream
    streams.clear()
    opened = stream = None
    check(llm, wanted)


# Closing


def test_closing_ends_an_open_stream(model, tmp_path, wanted):
    before, threads = len(os.listdir("/proc/self/fd")), threading.active_count()
    llm = engine(model, tmp_path)
    stream = llm.stream(items())
    next(stream)
    llm.close()
    assert (len(os.listdir("/proc/self/fd")), threading.active_count()) == (before, threads)
    with pytest.raises(EngineClosedError, match="stream: this LLM is closed"):
        next(stream)
    assert list(stream) == []
    llm.close()
    llm._turns.check()


def test_closing_waits_for_a_call_in_another_thread(model, tmp_path, wanted):
    llm = engine(model, tmp_path)
    begun = threading.Event()
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(tokens, llm, on_finished=lambda completion: begun.set())
        begun.wait()
        llm.close()
        assert answer.result() == wanted
    llm.close()


def test_everything_after_close_is_one_error(model, tmp_path):
    """Every public method, streams that had not begun among them; closing twice is no mistake."""
    llm = engine(model, tmp_path)
    early = llm.stream(items())
    llm.close()
    llm.close()
    calls = {**CALLS, "report": LLM.report, "with": LLM.__enter__, "stream ": lambda llm: next(early)}
    calls |= {"add_request": lambda llm: llm.add_request([5]), "abort": lambda llm: llm.abort(0)}
    calls |= {"chat": lambda llm: llm.chat([{"role": "user", "content": "x"}])}
    calls |= {"step": LLM.step, "has_unfinished": LLM.has_unfinished, "watch": lambda llm: llm.watch(RunObserver())}
    made = {"from_config", "from_planner", "plan", "close"}
    # What the model's file says needs nothing that close() frees.
    made |= {"get_default_sampling_params", "get_tokenizer", "drain"}
    public = {name for name, _ in inspect.getmembers(LLM, inspect.isroutine) if not name.startswith("_")}
    assert public - made <= calls.keys(), "a method that nobody has tried on a closed engine"
    for name, call in calls.items():
        with pytest.raises(EngineClosedError, match=f"{name.strip()}: this LLM is closed.*make a new one"):
            call(llm)
    assert llm.tokenizer is not None and llm.arch.num_layers == 3
    assert llm.get_default_sampling_params().temperature == 0


# Several of one


@pytest.mark.parametrize(
    "draft", ["demo-draft", ["demo-draft"], ("demo-draft",), Path("demo-draft"), {"demo-draft"}], ids=repr
)
def test_one_draft_is_one_draft(draft):
    assert EngineConfig(draft=draft).draft == ("demo-draft",)
    assert EngineConfig(draft=["demo-draft", "ngram"]).draft == ("demo-draft", "ngram")


def test_a_draft_by_its_name_speculates(tmp_path):
    with LLM(
        "demo", draft="demo-draft", offload_dir=str(tmp_path), percent=(100, 0, 100, 0, 100, 0), **SETTINGS
    ) as llm:
        llm.generate("def add(a, b):", GREEDY)
        assert llm.report()["speculation"]["drafts"] == ["demo-draft"]


@pytest.mark.parametrize("text", ["draft: demo-draft", "draft: [demo-draft]", "draft:\n- demo-draft"])
def test_a_draft_in_a_file_and_in_the_environment(text, tmp_path):
    import argparse

    (tmp_path / "settings.yaml").write_text(text)
    (found,) = read_settings([EngineConfig], argparse.Namespace(), {}, str(tmp_path / "settings.yaml"))
    (other,) = read_settings([EngineConfig], argparse.Namespace(), {"FLEXBATCH_DRAFT": "demo-draft"}, None)
    assert found.draft == other.draft == ("demo-draft",)


@pytest.mark.parametrize("draft", ["", [""], 5, [None], [["demo-draft"]], [3.5]], ids=repr)
def test_what_is_no_draft_is_refused_by_name(draft):
    with pytest.raises(ConfigurationError, match=r"draft=.* must be a folder, a Hub id"):
        EngineConfig(draft=draft)


def test_other_settings_of_several(tmp_path):
    assert EngineConfig(allow_bits=8).allow_bits == (8,) and EngineConfig(allow_bits=[16, 8]).allow_bits == (16, 8)
    assert EngineConfig(percent=[100, 0, 100, 0, 100, 0]).percent == (100, 0, 100, 0, 100, 0)
    assert EngineConfig(model=tmp_path).model == str(tmp_path) and EngineConfig(draft=()).draft == ()
    with pytest.raises(ConfigurationError, match="percent needs six numbers"):
        EngineConfig(percent=100)
    with pytest.raises(ConfigurationError, match="allow_bits=3"):
        EngineConfig(allow_bits=3)
