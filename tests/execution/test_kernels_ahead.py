"""What passes launch is known and compiled before they do."""

from __future__ import annotations

import contextlib
import fcntl
import gc
import json
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import asdict
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from flexbatch import LLM
from flexbatch.execution import forked, kernels_ahead
from flexbatch.execution.forked import Forked
from flexbatch.execution.kernel_compilers import compile_in_forks
from flexbatch.execution.kernels_ahead import Announced, Compiled, compiled_ahead
from flexbatch.execution.planned_kernels import launch_all
from flexbatch.kernels.imagined_gpu import GpuTraits
from flexbatch.planner import loader
from tests.execution.compiled_kernels import GPU, TRAITS, norms

pytest.importorskip("triton")
MORE = ("own heads", "odd heads", "wide heads", "windows", "biases")


class Kernel:
    """In the place of a launch."""

    def __init__(self, weight=1, work=lambda: None):
        self.weight, self.compile = weight, work


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """Triton's, of a machine with a GPU and four cores, on which one kernel is listed."""
    from triton import knobs

    monkeypatch.setattr(GpuTraits, "of", classmethod(lambda cls, device: TRAITS))
    monkeypatch.setattr(kernels_ahead, "usable_processors", lambda: 4)
    monkeypatch.setattr(knobs.cache, "dir", str(tmp_path))
    monkeypatch.setattr(kernels_ahead, "listed", lambda announced, traits: [Kernel()])
    return tmp_path


def markers(folder):
    return list(folder.glob("flexbatch-compiled-*[!k]"))


@pytest.mark.parametrize("names", [("grouped", "experts"), pytest.param(MORE, marks=pytest.mark.slow)])
def test_passes_launch_nothing_that_was_not_announced(names):
    """16, 8 and 4 bits; prompts in chunks, prompts beside tokens, long contexts of few, and token trees. And for all
    that is announced, Triton looks for a program once."""
    command = [sys.executable, "-m", "tests.execution.launched_kernels", *names]
    told = subprocess.run(command, env=os.environ | {"TRITON_INTERPRET": "0"}, stdout=subprocess.PIPE, check=True)
    assert json.loads(told.stdout) == {}


def test_what_is_announced_is_compiled_beside_the_body_and_once(tmp_path):
    """In a process in which Triton compiles."""
    command = [sys.executable, "-m", "tests.execution.compiled_kernels", str(tmp_path)]
    told = subprocess.run(command, env=os.environ | {"TRITON_INTERPRET": "0"}, stdout=subprocess.PIPE, check=True)
    found = json.loads(told.stdout)
    (done,) = found["done"]
    assert (done["count"], done["error"]) == (3, ""), "the second time nothing was left to do"
    assert found["files"] == 3 and not found["imported"]
    assert found["said"][0] == "compiling kernels in 3 processes, where they are not compiled already"
    assert found["said"][1].startswith("compiled 3 kernels ahead, and waited ")
    seconds = (done[f"{part}_seconds"] for part in ("imports", "listing", "compiling", "processor"))
    assert min(seconds) > 0


def test_what_cannot_be_listed_is_compiled_where_it_is_launched(cache, caplog, monkeypatch):
    def broken(announced, traits):
        raise KeyError(announced.what)

    monkeypatch.setattr(kernels_ahead, "listed", broken)
    done: list[Compiled] = []
    with caplog.at_level("INFO"), compiled_ahead(GPU, Announced(norms, "such a plan"), done.append):
        pass
    assert done[0].error == "KeyError: 'such a plan'" and not markers(cache)
    assert caplog.messages[-1] == "kernels are compiled where they are first launched: KeyError: 'such a plan'"


def test_processes_end_with_a_body_that_breaks_off(cache, tmp_path, monkeypatch):
    """They are asleep in a kernel's compiler where it is ended."""
    started = tmp_path / "started"

    def sleep():
        open(f"{started}{os.getpid()}", "w").close()
        time.sleep(600)

    monkeypatch.setattr(kernels_ahead, "listed", lambda announced, traits: [Kernel(1, sleep), Kernel(2, sleep)])
    with contextlib.suppress(KeyboardInterrupt), compiled_ahead(GPU, Announced(norms, (512, 1024))):
        until = time.monotonic() + 300
        while len(list(tmp_path.glob("started*"))) < 2 and time.monotonic() < until:
            time.sleep(0.05)
        raise KeyboardInterrupt
    forks = [int(file.name.removeprefix("started")) for file in tmp_path.glob("started*")]
    assert len(forks) == 2
    until = time.monotonic() + 60
    while any(map(runs, forks)) and time.monotonic() < until:
        time.sleep(0.05)
    assert not [fork for fork in forks if runs(fork)]


def runs(process: int) -> bool:
    """In a container without an init, nobody takes away one that has ended."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_a_child_says_what_it_did_and_leaves_this_process_alone(tmp_path, capfd):
    """Its locks, its terminal, its garbage and its way to end."""
    lock = (tmp_path / "lock").open("ab")
    fcntl.flock(lock, fcntl.LOCK_EX)

    def work(say):
        print("of the child", flush=True)
        os.write(2, b"of the child")
        links = [Path(f"/proc/self/fd/{name}") for name in os.listdir("/proc/self/fd") if int(name) > 2]
        files = [os.readlink(link) for link in links if os.path.lexists(link)]
        say({"group": os.getpgid(0), "frozen": gc.get_freeze_count(), "files": files})
        say({"long": "x" * 200_000})
        raise KeyboardInterrupt

    child = Forked(work)
    try:
        told = child.said(60)
        assert told["group"] == child.pid and told["frozen"] > gc.get_freeze_count()
        assert len(told["files"]) == 1 and told["files"][0].startswith("pipe:"), "the way back"
        assert len(child.said(60)["long"]) == 200_000 and child.said(60) is None
    finally:
        child.close()
        child.close()
    with pytest.raises(ChildProcessError):
        os.waitpid(child.pid, os.WNOHANG)
    assert capfd.readouterr() == ("", "")
    with (tmp_path / "lock").open("ab") as again, pytest.raises(BlockingIOError):
        fcntl.flock(again, fcntl.LOCK_EX | fcntl.LOCK_NB)
    lock.close()


def test_a_signal_at_the_fork_is_this_processs_alone(tmp_path, monkeypatch):
    """A child that Ctrl-C reached would go on in this process's place."""
    fork, this, forks = forked.fork, os.getpid(), []

    def interrupted():
        forks.append(fork())
        os.kill(os.getpid(), signal.SIGINT)
        return forks[-1]

    monkeypatch.setattr(forked, "fork", interrupted)
    try:
        Forked(lambda say: time.sleep(600))
    except KeyboardInterrupt:
        with (tmp_path / "interrupted").open("a") as file:
            print(os.getpid(), file=file)
    finally:
        if os.getpid() != this:
            os._exit(1)
    with pytest.raises(ChildProcessError):  # it was ended, and waited for
        os.waitpid(forks[0], 0)
    assert (tmp_path / "interrupted").read_text().split() == [str(this)]
    assert signal.SIGINT not in signal.pthread_sigmask(signal.SIG_BLOCK, [])


def test_a_child_of_a_process_with_threads_that_hold_locks_does_its_work(cache):
    """One computes, one logs, one writes: what they hold at the fork nobody gives back in the child."""
    stop, done = threading.Event(), list[Compiled]()

    def busy(work):
        while not stop.is_set():
            work()

    x = torch.randn(300, 300)
    works = (lambda: x @ x, lambda: kernels_ahead.logger.debug("busy"), lambda: gc.collect(0))
    threads = [threading.Thread(target=busy, args=(work,)) for work in works]
    for thread in threads:
        thread.start()
    try:
        for width in range(4):
            with compiled_ahead(GPU, Announced(norms, (width,)), done.append):
                pass
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert [(each.count, each.error) for each in done] == [(1, "")] * 4 and len(markers(cache)) == 4


@pytest.mark.parametrize("hangs", ["listing", "compiling"])
def test_processes_that_hang_are_ended(hangs, cache, monkeypatch):
    sleep = lambda *told: time.sleep(600)  # noqa: E731
    monkeypatch.setattr(kernels_ahead, "listed", sleep if hangs == "listing" else lambda *told: [Kernel(1, sleep)])
    monkeypatch.setattr(kernels_ahead, "LISTING_SECONDS", 0.1 if hangs == "listing" else 300.0)
    monkeypatch.setattr(kernels_ahead, "LIMIT_SECONDS", 0.1)
    done: list[Compiled] = []
    with compiled_ahead(GPU, Announced(norms, (512,)), done.append):
        pass
    assert done[0].count == 0 and not markers(cache)


def test_where_no_process_can_be_forked_the_body_runs(cache, monkeypatch):
    def none():
        raise BlockingIOError(11, "Resource temporarily unavailable")

    monkeypatch.setattr(os, "fork", none)
    done: list[Compiled] = []
    before = len(os.listdir("/proc/self/fd"))
    with compiled_ahead(GPU, Announced(norms, (512,)), done.append):
        pass
    assert not done and not markers(cache) and len(os.listdir("/proc/self/fd")) == before


@pytest.mark.parametrize("most", [0, 1, 5])
def test_as_many_as_can_be_forked_compile_everything(most, tmp_path, monkeypatch):
    """The longest first, each once; where none can be forked, the process does it itself."""
    forks, fork = [], os.fork

    def limited():
        if len(forks) == most:
            raise BlockingIOError(11, "Resource temporarily unavailable")
        forks.append(fork())
        return forks[-1]

    def compile_one(weight):
        with open(tmp_path / "done", "ab", buffering=0) as file:
            file.write(bytes([weight]))
        if weight == 3:
            raise ValueError("it cannot be compiled")

    monkeypatch.setattr(os, "fork", limited)
    compile_in_forks([Kernel(weight, partial(compile_one, weight)) for weight in (2, 7, 3, 5)], 5)
    done = list((tmp_path / "done").read_bytes())
    assert sorted(done) == [2, 3, 5, 7] and len(forks) == min(most, 4)
    assert most > 1 or done == [7, 5, 3, 2]


def test_kernels_of_a_process_that_was_ended_are_not_taken_for_compiled(cache, monkeypatch):
    """A host without memory ends one: its kernels came in the middle of every later job, as nothing was compiled ahead
    any more."""

    def end():
        os.kill(os.getpid(), signal.SIGKILL)

    with pytest.raises(ChildProcessError, match="1 of 2 processes were ended"):
        compile_in_forks([Kernel(1, end), Kernel(2)], 2)
    done: list[Compiled] = []
    monkeypatch.setattr(kernels_ahead, "listed", lambda announced, traits: [Kernel(1, end), Kernel(2, end)])
    with compiled_ahead(GPU, Announced(norms, (512, 1024)), done.append):
        pass
    assert "processes were ended" in done[0].error and not markers(cache)


def test_of_several_processes_one_compiles(cache, monkeypatch):
    """The ranks of a mesh need the same kernels."""
    announced, done = Announced(norms, (512,)), []
    monkeypatch.setattr(kernels_ahead, "POLL_SECONDS", 0.01)
    with compiled_ahead(GPU, announced, done.append):
        marker = kernels_ahead.marker_of(GPU, announced)
        with compiled_ahead(GPU, announced, done.append):
            marker.touch()
        assert not done, "the second waited for the first"
    assert len(done) == 1


@pytest.mark.parametrize("device, cores, sharers, free", [
    ("cpu", 64, 1, 2**40), ("cuda", 2, 1, 2**40), ("cuda", 8, 4, 2**40),
    ("cuda", 64, 1, 2**30 - 1), ("cuda", 64, 4, 2**32 - 1), ("cuda", 64, 1, -(2**30)),
])  # fmt: skip
def test_without_a_gpu_cores_or_memory_to_spare_nothing_is_begun(device, cores, sharers, free, cache, monkeypatch):
    monkeypatch.setattr(kernels_ahead, "usable_processors", lambda: cores)
    monkeypatch.setattr(os, "fork", lambda: pytest.fail("a process was forked"))
    with compiled_ahead(torch.device(device), Announced(norms, (512,)), sharers=sharers, free_bytes=free):
        pass


def test_no_more_processes_than_memory_holds_beside_the_weights(cache, monkeypatch):
    """Eight of half a GB each were more than a host of 16 GB has left beside a plan for nine tenths of it."""
    monkeypatch.setattr(kernels_ahead, "usable_processors", lambda: 64)
    given, compilers_of = [], kernels_ahead.compilers_of
    monkeypatch.setattr(kernels_ahead, "compilers_of", lambda *told: given.append(told[2]) or compilers_of(*told))
    with pytest.raises(KeyboardInterrupt), compiled_ahead(GPU, Announced(norms, (512,)), free_bytes=int(1.7 * 2**30)):
        raise KeyboardInterrupt
    assert given == [3]


def test_an_engine_has_its_kernels_and_its_drafts_compiled_unless_the_model_is_small(monkeypatch):
    settings = {"gpu_memory": "512MiB", "cpu_memory": "512MiB", "draft": ("demo-draft",), "tree": "chain:3"}
    calls = []
    with LLM("demo", device="cpu", hardware="cpu", **settings) as llm:
        assert llm.report()["compiled_ahead"] == asdict(Compiled())
        model = llm._model
        monkeypatch.setattr(loader, "compiled_ahead", lambda *told: calls.append(told) or contextlib.nullcontext())
        monkeypatch.setattr(model, "queues", SimpleNamespace(device=GPU))
        monkeypatch.setattr(loader, "host_memory_bytes", lambda: 12345)
        with model._kernels_compiled(llm.engine_plan):
            assert not calls
        monkeypatch.setattr(loader, "COMPILED_BYTES", 1)
        with model._kernels_compiled(llm.engine_plan):
            ((device, announced, note, sharers, free),) = calls
        note(Compiled(3, 1.0, 2.0))
        assert llm.report()["compiled_ahead"]["count"] == 3
        monkeypatch.undo()
    assert (device, sharers, announced.launch) == (GPU, 1, launch_all) and free == 12345
    own, draft = announced.what
    assert own.max_nodes == draft.max_nodes == 3 and own.plan.arch.num_layers > draft.plan.arch.num_layers
    assert {tensor.tier for tensor in own.plan.all_tensors} == {"gpu"}, "whatever tier they are on"
