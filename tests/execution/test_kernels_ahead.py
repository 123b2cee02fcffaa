"""What passes launch is known and compiled before they do."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from flexbatch import LLM
from flexbatch.execution import kernels_ahead
from flexbatch.execution.kernels_ahead import Announced, Compiled, compiled_ahead
from flexbatch.execution.planned_kernels import launch_all
from flexbatch.kernels.imagined_gpu import GpuTraits
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
    assert caplog.messages[1].startswith("compiled 3 kernels before the first pass, which waited ")


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
    assert len(started) == 3 and all(each.returncode is not None for each in started)


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


def test_where_no_more_processes_can_be_started_the_others_do_their_part(cache, stand_in, monkeypatch):
    stand_in("""echo '{"count": 5}'""")
    started, start = [], subprocess.Popen

    def limited(*arguments, **options):
        if started:
            raise BlockingIOError(11, "Resource temporarily unavailable")
        started.append(start(*arguments, **options))
        return started[-1]

    monkeypatch.setattr(subprocess, "Popen", limited)
    done: list[Compiled] = []
    with compiled_ahead(GPU, Announced(norms, (512,)), done.append):
        pass
    assert done[0].count == 5 and started[0].returncode == 0
    assert not list(cache.glob("flexbatch-compiled-*[!k]")), "the share of the others is missing"


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
    started, start = [], subprocess.Popen
    monkeypatch.setattr(
        subprocess, "Popen", lambda *told, **options: started.append(start(*told, **options)) or started[-1]
    )
    with pytest.raises(KeyboardInterrupt), compiled_ahead(GPU, Announced(norms, (512,)), free_bytes=int(1.7 * 2**30)):
        raise KeyboardInterrupt
    assert len(started) == 3


def test_an_engine_has_its_kernels_and_its_drafts_compiled_unless_the_model_is_small(monkeypatch):
    settings = {"gpu_memory": "512MiB", "cpu_memory": "512MiB", "draft": ("demo-draft",), "tree": "chain:3"}
    calls = []
    with LLM("demo", device="cpu", hardware="cpu", **settings) as llm:
        assert llm.report()["compiled_ahead"] == {"count": 0, "seconds": 0.0, "processor_seconds": 0.0, "error": ""}
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
