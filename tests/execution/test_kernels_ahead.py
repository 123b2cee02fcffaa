"""What passes launch is known and compiled before they do."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from flexbatch import LLM
from flexbatch.execution import kernels_ahead
from flexbatch.execution.kernel_compilers import KernelCompilers, compile_in_forks
from flexbatch.execution.kernels_ahead import Announced, Compiled, compiled_ahead
from flexbatch.execution.planned_kernels import launch_all
from flexbatch.kernels.imagined_gpu import GpuTraits, Launch
from flexbatch.planner import loader

pytest.importorskip("triton")
MORE = ("own heads", "odd heads", "wide heads", "windows", "biases")
GPU, TRAITS = torch.device("cuda", 0), GpuTraits(90, 132, 232448)


def norms(widths: tuple[int, ...]) -> None:
    from flexbatch.kernels import ops
    from flexbatch.kernels.imagined_gpu import DEVICE

    for width in widths:
        x = torch.empty(4, width, dtype=torch.bfloat16, device=DEVICE)
        ops.rms_norm(x, x[0], 1e-5)


def broken(what: str) -> None:
    raise KeyError(what)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """Triton's, of a machine with a GPU and four cores."""
    from triton import knobs

    monkeypatch.setattr(GpuTraits, "of", classmethod(lambda cls, device: TRAITS))
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(4)))
    monkeypatch.setattr(knobs.cache, "dir", str(tmp_path))
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
    monkeypatch.setattr(kernels_ahead, "LIMIT_SECONDS", 300.0)  # a busy machine takes a minute to import torch
    return tmp_path


@pytest.mark.parametrize(
    "name",
    ["grouped", "experts", *(pytest.param(name, marks=pytest.mark.slow) for name in MORE)],
)
def test_passes_launch_nothing_that_was_not_announced(name):
    """16, 8 and 4 bits; prompts in chunks, prompts beside tokens, long contexts of few, and token trees."""
    command = [sys.executable, "-m", "tests.execution.launched_kernels", name]
    told = subprocess.run(command, env=os.environ | {"TRITON_INTERPRET": "0"}, stdout=subprocess.PIPE, check=True)
    assert json.loads(told.stdout) == {}


def test_what_is_announced_is_compiled_beside_the_body_and_once(cache, caplog, monkeypatch):
    monkeypatch.setattr(kernels_ahead, "SAID_SECONDS", 0.0)
    done: list[Compiled] = []
    with caplog.at_level("INFO"):
        for _ in range(2):
            with compiled_ahead(GPU, Announced(norms, (512, 1024, 2048)), done.append):
                pass
    assert [(each.count, each.error) for each in done] == [(3, "")], "the second time nothing was left to do"
    assert len(list(cache.rglob("*.cubin"))) == 3
    assert caplog.messages[0] == "compiling kernels in 3 processes, where they are not compiled already"
    assert caplog.messages[1].startswith("compiled 3 kernels ahead, and waited ")
    assert min(done[0].imports_seconds, done[0].listing_seconds, done[0].compiling_seconds) > 0


def test_what_cannot_be_listed_is_compiled_where_it_is_launched(cache, caplog):
    done: list[Compiled] = []
    with caplog.at_level("INFO"), compiled_ahead(GPU, Announced(broken, "such a plan"), done.append):
        pass
    assert done[0].error == "KeyError: 'such a plan'" and not list(cache.glob("flexbatch-compiled-*[!k]"))
    assert caplog.messages[-1] == "kernels are compiled where they are first launched: KeyError: 'such a plan'"


def test_processes_end_with_a_body_that_breaks_off(cache, monkeypatch):
    started, start = [], subprocess.Popen

    def noted(*arguments, **options):
        started.append(start(*arguments, **options))
        return started[-1]

    monkeypatch.setattr(subprocess, "Popen", noted)
    with pytest.raises(KeyboardInterrupt), compiled_ahead(GPU, Announced(norms, (512,))):
        raise KeyboardInterrupt
    assert len(started) == 1 and all(each.returncode is not None for each in started)


def test_those_that_compile_end_with_the_process_that_has_forked_them(cache, tmp_path, monkeypatch):
    """They are asleep in a kernel's compiler where it is ended."""
    started, path = tmp_path / "started", tmp_path / "slow.py"
    path.write_text(f"""
import os, time
from flexbatch.kernels.imagined_gpu import Launch

def compile(self):
    open({str(started)!r} + str(os.getpid()), "w").close()
    time.sleep(600)

def slow(what):
    from tests.execution.test_kernels_ahead import norms
    norms(what)

Launch.compile = compile
""")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), *sys.path]))
    kept = Launch.compile
    import slow

    monkeypatch.setattr(Launch, "compile", kept)
    with contextlib.suppress(KeyboardInterrupt), compiled_ahead(GPU, Announced(slow.slow, (512, 1024))):
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


def test_one_that_waits_for_work_ends_where_there_is_none(cache):
    """Of a process that has ended before it knew its GPU."""
    compilers = KernelCompilers("tests.execution.test_kernels_ahead")
    compilers.process.stdin.close()
    compilers.process.stdin = None
    assert compilers.told(300) is None and compilers.process.returncode == 0
    compilers.close()


def test_one_that_was_started_in_advance_does_the_work(cache):
    done: list[Compiled] = []
    for _ in range(2):
        waiting = KernelCompilers("tests.execution.test_kernels_ahead")
        with compiled_ahead(GPU, Announced(norms, (512,)), done.append, waiting=waiting):
            pass
        assert waiting.process.returncode is not None
    assert [(each.count, each.error) for each in done] == [(1, "")], "and nothing where it was done before"


@pytest.fixture
def stand_in(tmp_path_factory, monkeypatch):
    """Has a script run in the place of the interpreter."""

    def stand(script: str) -> None:
        path = tmp_path_factory.mktemp("bin") / "python"
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(0o755)
        monkeypatch.setattr("sys.executable", str(path))

    return stand


def test_processes_that_hang_are_ended(cache, stand_in, monkeypatch):
    stand_in("exec sleep 600")
    monkeypatch.setattr(kernels_ahead, "LIMIT_SECONDS", 0.1)
    done: list[Compiled] = []
    with compiled_ahead(GPU, Announced(norms, (512,)), done.append):
        pass
    assert done[0].count == 0 and not list(cache.glob("flexbatch-compiled-*[!k]"))


def test_processes_that_fail_say_nothing(cache, stand_in, capfd):
    """Each had a traceback on the terminal, eight of them after Ctrl-C."""
    stand_in("echo out; echo Traceback >&2; exit 1")
    with compiled_ahead(GPU, Announced(norms, (512,))):
        pass
    assert capfd.readouterr() == ("", "") and not list(cache.glob("flexbatch-compiled-*[!k]"))


def test_where_no_process_can_be_started_the_body_runs(cache, monkeypatch):
    def none(*arguments, **options):
        raise BlockingIOError(11, "Resource temporarily unavailable")

    monkeypatch.setattr(subprocess, "Popen", none)
    done: list[Compiled] = []
    with compiled_ahead(GPU, Announced(norms, (512,)), done.append):
        pass
    assert not done and not list(cache.glob("flexbatch-compiled-*[!k]"))


@pytest.mark.parametrize("most", [0, 1, 5])
def test_as_many_as_can_be_forked_compile_everything(most, tmp_path, monkeypatch):
    """The longest first, each once; where none can be forked, the process does it itself."""
    forks, fork = [], os.fork

    def limited():
        if len(forks) == most:
            raise BlockingIOError(11, "Resource temporarily unavailable")
        forks.append(fork())
        return forks[-1]

    class Kernel:
        def __init__(self, weight):
            self.weight = weight

        def compile(self):
            with open(tmp_path / "done", "ab", buffering=0) as file:
                file.write(bytes([self.weight]))
            if self.weight == 3:
                raise ValueError("it cannot be compiled")

    monkeypatch.setattr(os, "fork", limited)
    compile_in_forks([Kernel(weight) for weight in (2, 7, 3, 5)], 5)
    done = list((tmp_path / "done").read_bytes())
    assert sorted(done) == [2, 3, 5, 7] and len(forks) == min(most, 4)
    assert most > 1 or done == [7, 5, 3, 2]


def test_kernels_of_a_process_that_was_ended_are_not_taken_for_compiled(cache, tmp_path, monkeypatch):
    """A host without memory ends one: its kernels came in the middle of every later job, as nothing was compiled ahead
    any more."""

    class Kernel:
        weight = 1

        def compile(self):
            os.kill(os.getpid(), signal.SIGKILL)

    with pytest.raises(ChildProcessError, match="1 of 2 processes were ended"):
        compile_in_forks([Kernel(), SimpleNamespace(weight=2, compile=lambda: None)], 2)
    path, done = tmp_path / "ended.py", list[Compiled]()
    path.write_text("""
import os
from flexbatch.kernels.imagined_gpu import Launch
Launch.compile = lambda self: os.kill(os.getpid(), 9)
from tests.execution.test_kernels_ahead import norms as launch
""")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), *sys.path]))
    waiting = KernelCompilers("ended")
    with compiled_ahead(GPU, Announced(norms, (512, 1024)), done.append, waiting=waiting):
        pass
    assert "processes were ended" in done[0].error and not list(cache.glob("flexbatch-compiled-*[!k]"))


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
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(cores)))
    monkeypatch.setattr(subprocess, "Popen", lambda *arguments, **options: pytest.fail("a process was started"))
    with compiled_ahead(torch.device(device), Announced(norms, (512,)), sharers=sharers, free_bytes=free):
        pass


def test_no_more_processes_than_memory_holds_beside_the_weights(cache, stand_in, monkeypatch):
    """Eight of half a GB each were more than a host of 16 GB has left beside a plan for nine tenths of it."""
    stand_in("exec sleep 600")
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(64)))
    started, start, given = [], subprocess.Popen, []
    monkeypatch.setattr(KernelCompilers, "give", lambda self, work: given.append(work[2]))
    monkeypatch.setattr(
        subprocess, "Popen", lambda *told, **options: started.append(start(*told, **options)) or started[-1]
    )
    with pytest.raises(KeyboardInterrupt), compiled_ahead(GPU, Announced(norms, (512,)), free_bytes=int(1.7 * 2**30)):
        raise KeyboardInterrupt
    assert len(started) == 1 and given == [3]


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
