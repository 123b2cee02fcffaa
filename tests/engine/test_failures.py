"""What fails half-way is undone: nothing stays reserved or open, and the next call gives the same tokens."""

from __future__ import annotations

import errno
import gc
import inspect
import os
import sys
import threading
from pathlib import Path

import pytest
import torch

import flexbatch
from flexbatch import LLM, SamplingParams
from flexbatch.memory.files import DiskFile, OffloadError
from tests.grids import grid
from tests.tiny_models import make_model, random_prompts

ROOT = Path(flexbatch.__file__).parent
MEMORY = (
    "memory/",
    "block.py",
    "loaded.py",
    "speculative/",
    "execution/executor.py",
    "execution/inputs.py",
    "models/layers.py",
)
PROMPTS = random_prompts([3, 20, 41, 9, 33], seed=9)
GREEDY = SamplingParams(max_tokens=4, temperature=0, ignore_eos=True)
MIXED = (20, 40, 30, 30, 30, 30)
ERRORS = (
    lambda: MemoryError("no memory"),
    lambda: torch.OutOfMemoryError("CUDA out of memory"),
    lambda: OffloadError(errno.ENOSPC, "No space left on device"),
    lambda: KeyboardInterrupt(),
)


class Failing:
    """Raises at the k-th call of a function in the given files of the package, in this thread. ``calls``: how many
    there were. What is read of the host may fail there as anywhere: it counts as not known then."""

    def __init__(self, k: int, files: tuple[str, ...] = MEMORY):
        self.k, self.calls = k, 0
        self.files = tuple(str(ROOT / file) for file in files)

    def __enter__(self):
        self.before = sys.gettrace()
        sys.settrace(self.trace)
        return self

    def trace(self, frame, event, argument):
        name = frame.f_code.co_filename
        # Undoing is not made to fail: Python calls no trace function any more once one has raised.
        is_counted = name.startswith(self.files) and not name.endswith("host_memory.py")
        # Python also enters a generator to go on with it, and to end it: what is raised there skips what it undoes
        # (before 3.11), or nobody is told.
        is_generator = frame.f_code.co_flags & inspect.CO_GENERATOR
        if event == "call" and is_counted and not is_generator and frame.f_code.co_name != "close":
            self.calls += 1
            if self.calls == self.k:
                raise ERRORS[self.k % len(ERRORS)]()
        return None

    def __exit__(self, *exception):
        sys.settrace(self.before)


FAILURES = (MemoryError, torch.OutOfMemoryError, OffloadError, KeyboardInterrupt)


def calls_of(action) -> int:
    with Failing(0) as counted:
        action()
    return counted.calls


def spread(count: int, most: int) -> list[int]:
    return sorted({1 + i * (count - 1) // max(most - 1, 1) for i in range(most)})


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("failures") / "model"
    make_model("llama", folder)
    return folder


def engine(model, folder, **settings):
    defaults = {"percent": MIXED, "gpu_memory": "1GiB", "cpu_memory": "1GiB", "gpu_batch_size": 2, "num_gpu_batches": 2}
    return LLM(str(model), device="cpu", offload_dir=str(folder), **{**defaults, "weight_bits": 8, **settings})


SPECULATION = {"tree": "chain:2"}


def tokens(llm):
    return [completion.token_ids for completion in llm.generate(PROMPTS, GREEDY)]


def held(llm):
    """Everything that the tiers account for, and what this process has open."""
    speculator = llm.speculator
    drafts = [source.tiers for source in speculator.sources] if speculator is not None else []
    return [dict(pool.used_bytes) for tiers in (llm.tiers, *drafts) for pool in tiers.pools], num_open()


def num_open() -> int:
    """Descriptors of this process."""
    return len(os.listdir("/proc/self/fd"))


@pytest.fixture(params=["plain", "draft"])
def running(request, model, tmp_path):
    settings = {"draft": str(model), **SPECULATION} if request.param == "draft" else {}
    with engine(model, tmp_path, **settings) as llm:
        yield llm


def close_runner(llm):
    llm._capacity.close_runner()
    if llm.speculator is not None:
        for source in llm.speculator.sources:
            source.close_runner()


def check(llm):
    llm.tiers.check()
    llm.weights.check()
    llm._turns.check()
    if llm.speculator is not None:
        llm.speculator.check()


@pytest.mark.parametrize("most", [20, pytest.param(1000, marks=pytest.mark.slow)])
def test_a_block_that_fails_anywhere_is_undone(most, running):
    """At every call on the way; the error is still in hand when the next call is made."""
    llm = running
    wanted = tokens(llm)
    close_runner(llm)
    nothing = held(llm)
    calls = calls_of(lambda: llm.prepare(PROMPTS, GREEDY))
    assert calls > 60
    close_runner(llm)
    for k in spread(calls, most):
        with pytest.raises(FAILURES) as caught, Failing(k):
            llm.prepare(PROMPTS, GREEDY)
        assert llm.runner is None, k
        check(llm)
        if k % 5 == 1:
            assert tokens(llm) == wanted, k
        close_runner(llm)
        assert held(llm) == nothing, k
        del caught
    assert tokens(llm) == wanted


def test_a_larger_block_that_fails_leaves_neither(running):
    """The old one is closed by then, also where closing it is what fails."""
    llm = running
    close_runner(llm)
    nothing = held(llm)
    long = [prompt * 5 for prompt in PROMPTS]
    llm.prepare(PROMPTS, GREEDY)
    calls = calls_of(lambda: llm.prepare(long, GREEDY))
    for k in spread(calls, 25):
        close_runner(llm)
        llm.prepare(PROMPTS, GREEDY)
        with pytest.raises(FAILURES), Failing(k):
            llm.prepare(long, GREEDY)
        check(llm)
        close_runner(llm)
        assert held(llm) == nothing, k


@pytest.mark.parametrize("most", [8, pytest.param(200, marks=pytest.mark.slow)])
def test_a_pass_that_fails_anywhere_is_undone(most, running):
    llm = running
    wanted = tokens(llm)
    close_runner(llm)
    nothing = held(llm)
    llm.prepare(PROMPTS, GREEDY)
    calls = calls_of(lambda: tokens(llm))
    for k in spread(calls, most):
        llm.prepare(PROMPTS, GREEDY)
        with pytest.raises(FAILURES), Failing(k):
            tokens(llm)
        check(llm)
        close_runner(llm)
        assert held(llm) == nothing, k
    assert tokens(llm) == wanted


def test_an_end_of_a_job_that_fails_is_made_up_for(running):
    """Ctrl-C may come after the last token, while the last weights that were sent for are waited for."""
    llm = running
    wanted = tokens(llm)
    calls = calls_of(lambda: tokens(llm))
    for k in range(calls - 16, calls + 1, 2):
        with pytest.raises(FAILURES), Failing(k):
            tokens(llm)
        check(llm)
        assert tokens(llm) == wanted, k


@pytest.mark.parametrize(("operation", "running"), grid(["read", "write"], ["plain", "draft"]), indirect=["running"])
def test_a_disk_that_fails_is_asked_again_by_the_next_job(operation, running, monkeypatch):
    """In the threads of the disk, at weights, cache and activations."""
    llm = running
    wanted = tokens(llm)
    transfer, counts = DiskFile.transfer, [0, 0]

    def failing(file, buffer, offset, call, verb):
        counts[0] += verb == operation
        if verb == operation and counts[0] == counts[1]:
            raise OffloadError(errno.EIO, "Input/output error")
        return transfer(file, buffer, offset, call, verb)

    monkeypatch.setattr(DiskFile, "transfer", failing)
    assert tokens(llm) == wanted
    ks, raised = spread(counts[0], 8), 0
    for k in ks:
        counts[:] = [0, k]
        try:
            assert tokens(llm) == wanted, "what nobody used, as it was for the next pass"
        except OffloadError as error:
            assert "Input/output error" in str(error)
            raised += 1
        check(llm)
    assert raised > len(ks) / 2
    counts[:] = [0, -1]
    assert tokens(llm) == wanted


@pytest.mark.parametrize("kind", ["plain", "draft"])
@pytest.mark.parametrize("most", [8, pytest.param(150, marks=pytest.mark.slow)])
def test_a_start_that_fails_anywhere_leaves_nothing(most, kind, model, tmp_path):
    """No file, no thread; what was written to the offload folder is whole, and the next start takes it."""
    settings = {"draft": (str(model),), **SPECULATION} if kind == "draft" else {}
    with engine(model, tmp_path / "reference", **settings) as llm:
        wanted = tokens(llm)
    gc.collect()
    before, threads = num_open(), threading.active_count()
    made = []
    calls = calls_of(lambda: made.append(engine(model, tmp_path / "counted", **settings)))
    made.pop().close()
    for k in spread(calls, most):
        with pytest.raises(FAILURES), Failing(k):
            engine(model, tmp_path / str(k), **settings)
        assert (num_open(), threading.active_count()) == (before, threads), k
        assert not [path.name for path in (tmp_path / str(k)).rglob(".*")], k
        if k % 3 == 0:
            with engine(model, tmp_path / str(k), **settings) as llm:
                assert tokens(llm) == wanted
    assert (num_open(), threading.active_count()) == (before, threads)
